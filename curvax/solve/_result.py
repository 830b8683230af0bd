"""How a solve is called, and how an iteration ended: a code that crosses `jit`, with the cure."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from curvax._types import Params, Scalar


class Result(enum.IntEnum):
    """How a solve or an eigenvalue iteration ended; `.message` names the cure."""

    CONVERGED = 0
    MAX_STEPS = 1
    NEGATIVE_CURVATURE = 2
    LITTLE_PROGRESS = 3
    STALLED = 4
    DIVERGED = 5
    NOT_FINITE = 6
    BAD_PRECONDITIONER = 7
    LEAST_SQUARES = 8
    NOT_DEFINITE = 9
    PSEUDO_INVERSE = 10

    @property
    def message(self) -> str:
        """Say what happened and what to do."""
        return _MESSAGES[self]


_MESSAGES = {
    Result.CONVERGED: "converged to the tolerance.",
    Result.MAX_STEPS: "max_steps were not enough: raise max_steps or damping, "
    "or give a preconditioner.",
    Result.NEGATIVE_CURVATURE: "the matrix is not positive definite along info.direction: "
    "raise damping, use the Gauss-Newton matrix (curvax.ggnvp) in place of the Hessian, "
    "or curvax.solve.minres, which takes indefinite matrices.",
    Result.LITTLE_PROGRESS: "stopped because the quadratic model hardly falls any more, "
    "as asked by progress; progress=None goes on to the tolerance.",
    Result.STALLED: "the precision of the floats is spent before the tolerance is met: "
    "raise tol or damping, or work in float64 "
    '(jax.config.update("jax_enable_x64", True)).',
    Result.DIVERGED: "the iteration does not contract: the matrix is not positive definite, "
    "or its largest eigenvalue is underestimated; raise damping, or pass a larger scale.",
    Result.NOT_FINITE: "the matrix-vector product is not finite; the last finite iterate "
    "is returned. Look for inf or NaN in params, batch and loss.",
    Result.BAD_PRECONDITIONER: "the preconditioner is not positive definite: "
    "raise its damping, or leave it out.",
    Result.LEAST_SQUARES: "to half the digits of the floats, b has a part outside the range "
    "of the matrix, and x is a least-squares solution: "
    "take it as that, add damping, or work in float64.",
    Result.NOT_DEFINITE: "the matrix plus damping is not positive definite: raise damping.",
    Result.PSEUDO_INVERSE: "the matrix plus damping is not positive definite, and x is by its "
    "pseudo-inverse, as asked by pseudo_inverse=True: raise damping.",
}


# The code of an iteration that has not ended; no `Result` is negative.
GOING = -1


class SolveInfo(NamedTuple):
    """What a solve tells about itself.

    Attributes:
      residual: `|b - (A + damping I) x| / |b|`, computed from the x that is returned and not
        carried along in the iteration.
      steps: the number of products with A on the way to x, without those for the residual.
      code: a `Result`, as int32.
      direction: where the code is NEGATIVE_CURVATURE, a unit vector along which A + damping I does
        not curve upwards; else zero. It is None with solvers that do not look for one.
    """

    residual: Scalar
    steps: Int[Array, ""]
    code: Int[Array, ""]
    direction: PyTree[Array] | None = None

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the tolerance was met."""
        return self.code == Result.CONVERGED

    @property
    def message(self) -> str:
        """Say how it ended and what to do; outside of `jit`."""
        return Result(int(self.code)).message


class Solver(Protocol):
    """A function that solves `(C + damping I) x = b`.

    `curvax.cg`, `curvax.solve.minres`, `curvax.solve.neumann` and `curvax.solve.direct` are such
    functions; `functools.partial` gives them options.
    """

    def __call__(
        self,
        curvature: Any,
        b: Params,
        /,
        *,
        damping: Any,
    ) -> tuple[Params, SolveInfo]:
        """Return x and its `SolveInfo`; curvature is a matvec, or whatever the solver takes."""
        ...


def code_of(
    *cases: tuple[Any, int],
    otherwise: Any,
) -> Int[Array, ""]:
    """Return the first result whose condition holds."""
    code: Array = jnp.int32(otherwise)
    # From the last to the first, so that an earlier case overrides the later ones.
    for condition, result in reversed(cases):
        code = jnp.where(condition, jnp.int32(result), code)
    return code
