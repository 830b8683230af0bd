"""Direct solves: by a matrix over parameters, or over the rows of what it is the square of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from curvax._checks import check_damping, check_like, describe
from curvax._trees import add_scaled, all_finite, inner_product, norm
from curvax._types import Matvec, Params, Scalar, at_least_float32, tree_at_least_float32
from curvax.solve._damped import check_system, finished
from curvax.solve._result import Result, SolveInfo, code_of

# n: rows, d: parameters


class SampleSpace(NamedTuple):
    """A matrix `F = U U'` by the inner products of its n rows `U'`.

    Attributes:
      gram: `U'U`, `[n, n]`.
      push: `v -> U'v`, from trees like params to `[n]`; a pytree.
      pull: `q -> U q`, from `[n]` to trees like params; a pytree.
      gradient: q with `U q` the gradient of the batch, `[n]`.
    """

    gram: Float[Array, "n n"]
    push: Callable[[Params], Float[Array, " n"]]
    pull: Callable[[Float[Array, " n"]], Params]
    gradient: Float[Array, " n"]


class Dense(NamedTuple):
    """A symmetric matrix over all entries of params.

    Attributes:
      matrix: `[d, d]`, in the order of `jax.flatten_util.ravel_pytree`, as of `curvax.to_dense`.
    """

    matrix: Float[Array, "d d"]


Formed: TypeAlias = SampleSpace | Dense


def direct(
    curvature: Formed, b: Params, *, damping: Any, tol: float | Array = 1e-5
) -> tuple[Params, SolveInfo]:
    """Solve `(F + damping I) x = b` by Cholesky, for positive semidefinite F.

    In sample space `x = (b - U (U'U + damping I)^-1 U'b) / damping`; what rounding does to it for a small damping, a step
    of refinement takes back.

    Args:
      curvature: of `curvax.solve.sample_space(objective, params, batch)`, or `Dense(curvax.to_dense(matvec, params))`.
      b: tree like params.
      damping: positive (with `Dense` it may be 0); in units of an eigenvalue of F.
      tol: residual above which the code is STALLED.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`. Where `F + damping I` is not positive definite, or not finite, x
      is 0 and the code NOT_DEFINITE or NOT_FINITE.

    Raises:
      ValueError: damping that is not positive; b of another size.

    Cost: `n^3 / 3` multiplications and five products with U or U'; with `Dense` `d^3 / 3`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> dense = curvax.solve.Dense(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> x, info = curvax.solve.direct(dense, jnp.array([3.0, 0.0]), damping=0)
      >>> [round(v, 4) for v in x.tolist()], bool(info.converged)
      ([2.0, -1.0], True)
    """
    check_damping(damping, allow_zero=isinstance(curvature, Dense))
    check_system(b, damping, tol, 1, None)
    wide = tree_at_least_float32(b)
    if isinstance(curvature, Dense):
        x, product = _of_matrix(curvature, damping, wide)
    elif isinstance(curvature, SampleSpace):
        x, product = _of_rows(curvature, damping, wide)
    else:
        raise TypeError(
            f"direct takes what curvax.solve.sample_space returns, or curvax.solve.Dense(matrix), got {describe(curvature)}; "
            "a matvec is for curvax.cg."
        )
    good = all_finite(x)
    finite = all_finite((_trace(curvature[0]), b))
    code = code_of(
        (good, Result.CONVERGED), (finite, Result.NOT_DEFINITE), otherwise=Result.NOT_FINITE
    )
    return finished(
        product, jax.tree.map(lambda x: jnp.where(good, x, 0), x), b, jnp.int32(0), code, tol
    )


def _of_rows(curvature: SampleSpace, damping: Any, b: Params) -> tuple[Params, Matvec]:
    """Solve for the part of b along the gradient as `U (U'U + damping I)^-1 q`, for the rest by Woodbury's identity.

    The latter divides differences by damping. What of a gradient is outside of the range of U is rounding, and left out.
    """
    solve = _solver(curvature.gram, damping)
    check_like(b, jax.eval_shape(curvature.pull, curvature.gradient), "b", "params")
    pull = lambda q: jax.tree.map(lambda x, y: x.astype(y.dtype), curvature.pull(q), b)
    gradient = pull(curvature.gradient)
    square = inner_product(gradient, gradient)
    share = inner_product(gradient, b) / jnp.where(square > 0, square, 1)
    rest = add_scaled(b, -share, gradient)
    negligible = norm(rest) <= 64 * jnp.finfo(square.dtype).eps * norm(b)
    rest = jax.tree.map(lambda x: jnp.where(negligible, 0, x / damping).astype(x.dtype), rest)
    both = solve(jnp.stack([curvature.gradient, curvature.push(rest)], axis=1))
    x = add_scaled(rest, 1, pull(share * both[:, 0] - both[:, 1]))
    return x, lambda v: add_scaled(pull(curvature.push(v)), damping, v)


def _of_matrix(curvature: Dense, damping: Any, b: Params) -> tuple[Params, Matvec]:
    flat, unravel = ravel_pytree(b)
    matrix = at_least_float32(curvature.matrix)
    if matrix.shape != (flat.size, flat.size):
        raise ValueError(f"the matrix is {list(matrix.shape)}, b has {flat.size} entries in all.")
    multiply = lambda v: jnp.matmul(matrix, v, precision=lax.Precision.HIGHEST) + damping * v
    product = lambda v: unravel(multiply(ravel_pytree(v)[0]).astype(flat.dtype))
    return unravel(_solver(matrix, damping)(flat.astype(matrix.dtype)).astype(flat.dtype)), product


def _trace(matrix: Float[Array, "n n"]) -> Scalar:
    """Sum the diagonal, reading nothing else: XLA would form the whole Gram matrix again for `jnp.trace`."""
    return jnp.sum(jnp.diagonal(matrix))


def _solver(matrix: Float[Array, "n n"], damping: Any) -> Callable[[Array], Array]:
    """Return `v -> (M + damping I)^-1 v` for a vector or columns; one step of refinement takes most of the rounding back.

    The factor is that of at least the damping that can be told from rounding in a sum over the trace.
    """
    damping = jnp.asarray(damping, matrix.dtype)
    least = jnp.finfo(matrix.dtype).eps * _trace(matrix)
    factored = matrix + jnp.maximum(damping, least) * jnp.eye(len(matrix), dtype=matrix.dtype)
    lower = lax.linalg.cholesky(factored, symmetrize_input=False)
    solve = lambda v: jax.scipy.linalg.cho_solve((lower, True), v)

    def refined(v: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        x = solve(v)
        return x + solve(v - damping * x - jnp.matmul(matrix, x, precision=lax.Precision.HIGHEST))

    return refined
