"""Minimal residuals: solves with symmetric matrices that may be indefinite."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from curvax._host import loops_for
from curvax._trees import add_scaled, all_finite, inner_product, keep_unless, norm
from curvax._types import Matvec, Params, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.solve._damped import check_system, damped, finished
from curvax.solve._result import GOING, Result, SolveInfo, code_of


def minres(
    matvec: Matvec,
    b: Params,
    *,
    damping: Any = 0.0,
    tol: float | Array = 1e-5,
    max_steps: int = 100,
    preconditioner: Matvec | None = None,
    x0: Params | None = None,
) -> tuple[Params, SolveInfo]:
    """Solve `(A + damping I) x = b` for symmetric A, definite or not, by minimal residuals.

    Step k minimizes `|b - (A + damping I) x|` over the Krylov space of k products (in the norm of the preconditioner, if
    one is given). For a Newton step at a saddle this x solves the system, but need not be a descent direction.

    Derivatives of x are not those of the iteration: take them with `jax.lax.custom_linear_solve(matvec, b, solve,
    symmetric=True, has_aux=True)`, `solve = lambda matvec, b: curvax.solve.minres(matvec, b)`.

    Args:
      matvec: `v -> A v` on trees like b, such as `curvax.hvp(...)`.
      b: tree of float arrays.
      damping: a shift of the spectrum; number or scalar array, at least 0.
      tol: stop at `|b - (A + damping I) x| <= tol |b|`, in the norm `sqrt(v' M v)` if there is a preconditioner M.
      max_steps: products with A at most.
      preconditioner: `v -> M v`, symmetric positive definite.
      x0: guess; None: zero.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`; print `info.message`. Iterates are in at least float32.

    Raises:
      ValueError: negative damping or tol, max_steps below 1, trees that do not fit (by path).
      TypeError: a matvec that changes dtypes.

    Cost: one product and one use of the preconditioner a step, and one product more for the residual (two with x0). Memory:
      seven trees like b.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> x, info = curvax.solve.minres(lambda v: jnp.array([2.0, -1.0]) * v, jnp.array([2.0, 3.0]))
      >>> [round(v, 4) for v in x.tolist()], bool(info.converged)
      ([1.0, -3.0], True)

    References: Paige and Saunders (1975), Solution of sparse indefinite systems of linear equations.
    """
    check_system(b, damping, tol, max_steps, x0)
    apply = damped(matvec, damping, b)
    precondition = (
        (lambda v: v)
        if preconditioner is None
        else damped(preconditioner, 0.0, b, "preconditioner")
    )
    wide = tree_at_least_float32(b)
    zero = optax.tree.zeros_like(wide)
    start = zero if x0 is None else tree_at_least_float32(x0)
    r = wide if x0 is None else add_scaled(wide, -1, apply(start))
    z = precondition(r)
    beta = jnp.sqrt(inner_product(r, z))
    # The norm that is minimized is that of the preconditioner; b in it is what tol is relative to.
    length = lambda v: (
        norm(v) if preconditioner is None else jnp.sqrt(inner_product(v, precondition(v)))
    )
    enough = (
        0.5 * jnp.asarray(tol) * length(wide)
    )  # half of what is allowed, so that rounding does not decide
    none = jnp.zeros_like(beta)
    first = _Carry(
        start, zero, r, z, zero, zero, none, beta, none, none, -jnp.ones_like(beta), none, beta, jnp.int32(0),
        none,
        code_of(
            (norm(r) == 0, Result.CONVERGED),
            (jnp.isfinite(norm(r)) & ~(inner_product(r, z) > 0), Result.BAD_PRECONDITIONER),
            (beta <= enough, Result.CONVERGED),
            (jnp.isfinite(beta), GOING),
            otherwise=Result.NOT_FINITE,
        ),
    )  # fmt: skip

    def step(c: _Carry) -> _Carry:
        # Lanczos: A v = beta_new v_new + alpha v + beta v_old, with r = beta v before preconditioning, z after it
        v = optax.tree.scale(1 / c.beta, c.z)
        product = apply(v)
        product = add_scaled(
            product,
            -jnp.where(c.steps > 0, c.beta / jnp.where(c.steps > 0, c.old_beta, 1), 0),
            c.old_r,
        )
        alpha = inner_product(v, product)
        r = add_scaled(product, -alpha / c.beta, c.r)
        z = precondition(r)
        square = inner_product(r, z)
        beta = jnp.sqrt(jnp.maximum(square, 0))
        # The next column of the tridiagonal matrix, by the rotations so far and a new one
        delta = c.cos * c.dbar + c.sin * alpha
        gbar = c.sin * c.dbar - c.cos * alpha
        gamma = jnp.sqrt(gbar**2 + beta**2)
        scale = jnp.maximum(
            c.scale, jnp.maximum(jnp.abs(alpha), beta)
        )  # of the matrix, as seen so far
        eps = jnp.finfo(gamma.dtype).eps
        gone = gamma <= eps * scale  # singular on the Krylov space
        # |A r| / |r| of the x so far: where that is nearly 0 and r is not, r is outside the range of A
        outside = (c.steps > 0) & (jnp.sqrt(gbar**2 + (c.cos * beta) ** 2) <= jnp.sqrt(eps) * scale)
        cos, sin = (x / jnp.where(gone, 1, gamma) for x in (gbar, beta))
        w = add_scaled(add_scaled(v, -c.epsilon, c.older_w), -delta, c.w)
        w = optax.tree.scale(1 / jnp.where(gone, 1, gamma), w)
        finite = all_finite((alpha, beta, gamma))
        count = c.steps + 1
        rest = sin * c.rest
        code = code_of(
            (~finite, Result.NOT_FINITE),
            (outside, Result.LEAST_SQUARES),
            (gone, Result.STALLED),
            (rest <= enough, Result.CONVERGED),
            (square < 0, Result.BAD_PRECONDITIONER),
            (count >= max_steps, Result.MAX_STEPS),
            otherwise=GOING,
        )
        x = keep_unless(finite & ~gone & ~outside, add_scaled(c.x, cos * c.rest, w), c.x)
        return _Carry(
            x,
            c.r,
            r,
            z,
            w,
            c.w,
            c.beta,
            beta,
            c.sin * beta,
            -c.cos * beta,
            cos,
            sin,
            rest,
            count,
            scale,
            code,
        )

    with loops_for(matvec):
        last = lax.while_loop(lambda c: c.code == GOING, fast_convs_in_loops(step), first)
    return finished(apply, last.x, b, last.steps, last.code, tol, norm_of=length)


class _Carry(NamedTuple):
    x: Params
    old_r: Params
    r: Params
    z: Params
    w: Params
    older_w: Params
    old_beta: Scalar
    beta: Scalar
    epsilon: Scalar
    dbar: Scalar
    cos: Scalar
    sin: Scalar
    rest: Scalar  # norm of the residual
    steps: Int[Array, ""]
    scale: Scalar
    code: Int[Array, ""]
