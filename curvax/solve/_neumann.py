"""The Neumann series of an inverse, cut off: cheap solves of low accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from curvax._checks import check_count
from curvax._host import loops_for
from curvax._trees import add_scaled, keep_unless, norm, safe_divide
from curvax._types import Matvec, Params, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.solve._damped import check_system, damped, finished, largest_residual
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
    """Approximate `(A + damping I)^-1 b` by `1/s sum_k (I - (A + damping I) / s)^k b`.

    A is positive definite. The residual after K steps is exactly
    `b - (A + damping I) x = (I - (A + damping I) / s)^K b`. The series converges if s is above half
    of the largest eigenvalue; K steps of it are K steps of gradient descent with rate 1/s on the
    quadratic.

    Derivatives of x are not those of the iteration: take them with
    `jax.lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=True)`, where
    `solve = lambda matvec, b: curvax.solve.neumann(matvec, b)`.

    Args:
      matvec: `v -> A v` on trees like b.
      b: a tree of float arrays.
      damping: a number or scalar array, at least 0, in units of an eigenvalue of A.
      tol: the solve stops at `|b - (A + damping I) x| <= tol |b|`; 0 gives exactly `max_steps`
        terms.
      max_steps: the largest number of terms of the series.
      scale: s. None stands for the largest eigenvalue, measured by power iteration from b.
        (Eigenvectors that b has no part in do not enter the series either.)
      power_steps: the number of products spent on measuring it.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`. Its code is MAX_STEPS where the series is
      cut off, and DIVERGED where its terms grow; x is the sum up to the smallest one then.

    Raises:
      ValueError: damping or tol is negative, max_steps is below 1, or trees do not fit (the message
        names the path).
      TypeError: the matvec changes dtypes.

    Cost: one product a step, `power_steps` and one more. Memory: three trees like b.

    Example: with `A = 1/2` and `s = 1`, three terms are `1 + 1/2 + 1/4`.
      >>> import jax.numpy as jnp, curvax
      >>> x, info = curvax.solve.neumann(lambda v: v / 2, jnp.ones(1), scale=1.0, max_steps=3)
      >>> x.tolist(), info.residual.item(), curvax.solve.Result(info.code.item()).name
      ([1.75], 0.125, 'MAX_STEPS')

    References: Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by
      implicit differentiation, https://arxiv.org/abs/1911.02590, whose K counts one less: their
      K = 0 is the first term.
    """
    check_system(b, damping, tol, max_steps, None)
    check_count(1, power_steps=power_steps)
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    apply = damped(matvec, damping, b)
    wide = tree_at_least_float32(b)
    norm_of_b = norm(wide)
    target = largest_residual(tol, norm_of_b)
    with loops_for(matvec):
        if scale is None:
            s = _largest_eigenvalue(apply, wide, power_steps)
        else:
            s = jnp.asarray(scale, norm_of_b.dtype)

    # x_0 = 0, and the first term of the series is b.
    code = code_of(
        (norm_of_b <= target, Result.CONVERGED),
        (~jnp.isfinite(norm_of_b + s), Result.NOT_FINITE),
        (s <= 0, Result.NOT_DEFINITE),
        otherwise=GOING,
    )
    first = _Carry(
        x=optax.tree.zeros_like(wide),
        term=wide,
        length=norm_of_b,
        steps=jnp.int32(power_steps if scale is None else 0),
        code=code,
    )

    def step(c: _Carry) -> _Carry:
        """Add a term to x, and multiply it by `I - (A + damping I) / s` for the next one."""
        # r_{K+1} = (I - (A + damping I) / s) r_K
        term = add_scaled(c.term, -1 / s, apply(c.term))
        length, steps = norm(term), c.steps + 1
        # Terms fall if the series converges, rounding aside.
        grows = (length > 1.001 * c.length) | jnp.isinf(length)
        code = code_of(
            (jnp.isnan(length), Result.NOT_FINITE),
            (grows, Result.DIVERGED),
            (length <= target, Result.CONVERGED),
            (steps - first.steps >= max_steps, Result.MAX_STEPS),
            otherwise=GOING,
        )
        good = ~grows & jnp.isfinite(length)
        # x_{K+1} = x_K + r_K / s
        x = keep_unless(good, add_scaled(c.x, 1 / s, c.term), c.x)
        return _Carry(x=x, term=term, length=length, steps=steps, code=code)

    with loops_for(matvec):
        last = lax.while_loop(lambda c: c.code == GOING, fast_convs_in_loops(step), first)
    return finished(apply, last.x, b, last.steps, last.code, tol)


class _Carry(NamedTuple):
    """The state of the series after K terms; the next term is the residual `b - A x`, too."""

    x: Params
    term: Params
    length: Scalar  # |term|
    steps: Int[Array, ""]
    code: Int[Array, ""]


def _largest_eigenvalue(apply: Matvec, start: Params, num_steps: int) -> Scalar:
    """Return the largest `|A v| / |v|` that power iteration meets, a lower bound of |A|."""

    def step(
        carry: tuple[Params, Scalar],
        _: None,
    ) -> tuple[tuple[Params, Scalar], None]:
        v, largest = carry
        # v may be 0: then so is its product, which does not count.
        unit = optax.tree.scale(safe_divide(1, norm(v)), v)
        product = apply(unit)
        return (product, jnp.maximum(largest, norm(product))), None

    initial = (start, jnp.zeros_like(norm(start)))
    (_, largest), _ = lax.scan(fast_convs_in_loops(step), initial, length=num_steps)
    return largest
