"""The Neumann series of an inverse, cut off: cheap solves of low accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from curvax._checks import check_count
from curvax._host import loops_for
from curvax._trees import add_scaled, keep_unless, norm
from curvax._types import Matvec, Params, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.solve._damped import check_system, damped, finished
from curvax.solve._result import GOING, Result, SolveInfo, code_of


def neumann(
    matvec: Matvec,
    b: Params,
    *,
    damping: Any = 0.0,
    tol: float | Array = 1e-5,
    max_steps: int = 100,
    scale: float | Array | None = None,
    power_steps: int = 10,
) -> tuple[Params, SolveInfo]:
    """Approximate `(A + damping I)^-1 b` by `1/s sum_k (I - (A + damping I) / s)^k b`, for positive definite A.

    What is left after K steps is `b - (A + damping I) x = (I - (A + damping I) / s)^K b` exactly. The series converges if s
    is above half of the largest eigenvalue; K steps of it are K steps of gradient descent with rate 1/s on the quadratic.

    Derivatives of x are not those of the iteration: take them with `jax.lax.custom_linear_solve(matvec, b, solve,
    symmetric=True, has_aux=True)`, `solve = lambda matvec, b: curvax.solve.neumann(matvec, b)`.

    Args:
      matvec: `v -> A v` on trees like b.
      b: tree of float arrays.
      damping: number or scalar array, at least 0; in units of an eigenvalue of A.
      tol: stop at `|b - (A + damping I) x| <= tol |b|`; 0 for exactly `max_steps` terms.
      max_steps: terms of the series at most.
      scale: s; None: the largest eigenvalue, measured by power iteration from b. (What b holds nothing of does not enter
        the series either.)
      power_steps: products spent on measuring it.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`: MAX_STEPS where the series is cut off, DIVERGED where its terms
      grow; x is the sum up to the smallest one then.

    Raises:
      ValueError: negative damping or tol, max_steps below 1, trees that do not fit (by path).
      TypeError: a matvec that changes dtypes.

    Cost: one product a step, `power_steps` and one more. Memory: three trees like b.

    Example: with `A = 1/2` and `s = 1`, three terms are `1 + 1/2 + 1/4`.
      >>> import jax.numpy as jnp, curvax
      >>> x, info = curvax.solve.neumann(lambda v: v / 2, jnp.ones(1), scale=1.0, max_steps=3)
      >>> x.tolist(), info.residual.item(), curvax.solve.Result(info.code.item()).name
      ([1.75], 0.125, 'MAX_STEPS')

    References: Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit differentiation,
      whose K counts one less: their K = 0 is the first term.
    """
    check_system(b, damping, tol, max_steps, None)
    check_count(1, power_steps=power_steps)
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    apply = damped(matvec, damping, b)
    wide = tree_at_least_float32(b)
    size = norm(wide)
    with loops_for(matvec):
        s = (
            _largest_eigenvalue(apply, wide, power_steps)
            if scale is None
            else jnp.asarray(scale, size.dtype)
        )
    enough = (
        0.5 * jnp.asarray(tol) * size
    )  # half of what is allowed, so that rounding does not decide
    first = _Carry(
        optax.tree.zeros_like(wide),
        wide,
        size,
        jnp.int32(0 if scale is not None else power_steps),
        code_of(
            (size <= enough, Result.CONVERGED),
            (~jnp.isfinite(size + s), Result.NOT_FINITE),
            (s <= 0, Result.NOT_DEFINITE),
            otherwise=GOING,
        ),
    )

    def step(c: _Carry) -> _Carry:
        term = add_scaled(c.term, -1 / s, apply(c.term))
        left, count = norm(term), c.steps + 1
        grown = (left > 1.001 * c.left) | jnp.isinf(
            left
        )  # they fall if the series converges, rounding aside
        code = code_of(
            (jnp.isnan(left), Result.NOT_FINITE),
            (grown, Result.DIVERGED),
            (left <= enough, Result.CONVERGED),
            (count - first.steps >= max_steps, Result.MAX_STEPS),
            otherwise=GOING,
        )
        x = keep_unless(~grown & jnp.isfinite(left), add_scaled(c.x, 1 / s, c.term), c.x)
        return _Carry(x, term, left, count, code)

    with loops_for(matvec):
        last = lax.while_loop(lambda c: c.code == GOING, fast_convs_in_loops(step), first)
    return finished(apply, last.x, b, last.steps, last.code, tol)


class _Carry(NamedTuple):
    x: Params
    term: Params  # what is left, b - A x
    left: Scalar  # its norm
    steps: Int[Array, ""]
    code: Int[Array, ""]


def _largest_eigenvalue(apply: Matvec, start: Params, steps: int) -> Scalar:
    """Return the largest `|A v| / |v|` that power iteration meets, which is at most the largest eigenvalue."""

    def step(carry: tuple[Params, Scalar], _: None) -> tuple[tuple[Params, Scalar], None]:
        v, largest = carry
        size = norm(v)
        product = apply(optax.tree.scale(1 / jnp.where(size > 0, size, 1), v))
        return (product, jnp.maximum(largest, norm(product))), None

    (_, largest), _ = lax.scan(
        fast_convs_in_loops(step), (start, jnp.zeros_like(norm(start))), length=steps
    )
    return largest
