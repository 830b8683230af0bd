"""Conjugate gradients that stop, and say so, where the matrix does not curve upwards."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._host import loops_for
from curvax._trees import add_scaled, all_finite, inner_product, keep_unless, norm, safe_divide
from curvax._types import Matvec, Params, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.solve._damped import (
    check_system,
    damped,
    damped_preconditioner,
    finished,
    largest_residual,
)
from curvax.solve._result import GOING, Result, SolveInfo, code_of

# Names as in Nocedal and Wright, algorithm 5.3, with the residual's sign turned: r = b - A x.
# M: the preconditioner; z = M r; p: the search direction; q: the quadratic model


def cg(
    matvec: Matvec,
    b: Params,
    *,
    damping: Any = 0.0,
    tol: float | Array = 1e-5,
    max_steps: int = 100,
    preconditioner: Matvec | None = None,
    x0: Params | None = None,
    progress: float | None = None,
) -> tuple[Params, SolveInfo]:
    """Solve `(A + damping I) x = b` for symmetric positive (semi)definite A, by CG.

    Step k of conjugate gradients minimizes `q(x) = x'(A + damping I)x / 2 - b'x` over the Krylov
    space of k products. If a search direction p comes up with `p'(A + damping I)p <= 0`, the solve
    ends there: x is the iterate so far, which lowers q; if that happens in the first step, x is the
    guess plus p (with no guess, b itself or the preconditioner's product with it). So from
    `x0 = None`, `b'x > 0` unless x is 0: `-x` is a descent direction when b is a gradient.

    Derivatives of x are not those of the iteration: take them with
    `jax.lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=True)`, where
    `solve = lambda matvec, b: curvax.cg(matvec, b)`.

    Args:
      matvec: `v -> A v` on trees like b, such as `curvax.ggnvp(...)`.
      b: a tree of float arrays.
      damping: a number or scalar array, at least 0, in units of an eigenvalue of A.
      tol: the solve stops at `|b - (A + damping I) x| <= tol |b|`.
      max_steps: the largest number of products with A.
      preconditioner: `v -> M v`, symmetric positive definite and near the inverse of the damped
        matrix: `curvax.kron_inverse(layout, factors, damping)`,
        `curvax.solve.window_inverse(window, damping)`.
      x0: a guess; None stands for zero.
      progress: the solve also stops when over the last `k = max(10, steps / 10)` steps q fell by
        less than `k progress |q|` (Martens takes 5e-4); with None it does not.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`; print `info.message`. Iterates are in at
      least float32.

    Raises:
      ValueError: damping or tol is negative, max_steps is below 1, or trees do not fit (the message
        names the path).
      TypeError: the matvec changes dtypes.

    Cost: one product and one use of the preconditioner a step, and one product more for the
      residual (two with x0). Memory: four trees like b, one more with a preconditioner.

    Example: a guess, and a matrix that is not positive definite.
      >>> import jax.numpy as jnp, curvax
      >>> matrix, b = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([3.0, 0.0])
      >>> x, info = curvax.cg(lambda v: matrix @ v, b)
      >>> [round(v, 4) for v in x.tolist()], info.steps.item(), info.message
      ([2.0, -1.0], 2, 'converged to the tolerance.')
      >>> x, info = curvax.cg(lambda v: -v, b)
      >>> x.tolist(), info.direction.tolist(), curvax.solve.Result(info.code.item()).name
      ([3.0, 0.0], [1.0, 0.0], 'NEGATIVE_CURVATURE')

    References: Hestenes and Stiefel (1952), Methods of conjugate gradients for solving linear
      systems; Steihaug (1983), for the end at negative curvature; Nocedal and Wright (2006),
      algorithms 5.3 and 7.1; Martens (2010), Deep learning via Hessian-free optimization,
      section 4.4, for `progress`.
    """
    check_system(b, damping, tol, max_steps, x0)
    apply = damped(matvec, damping, b)
    precondition = damped_preconditioner(preconditioner, b)
    wide = tree_at_least_float32(b)
    target = largest_residual(tol, norm(wide))

    def model(x: Params, r: Params) -> Scalar:
        # q = x'(A x) / 2 - b'x with A x = b - r
        return -0.5 * inner_product(x, optax.tree.add(r, wide))

    # r_0 = b - A x_0, z_0 = M r_0, p_0 = z_0
    x = optax.tree.zeros_like(wide) if x0 is None else tree_at_least_float32(x0)
    r = wide if x0 is None else add_scaled(wide, -1, apply(x))
    z = precondition(r)
    rz = inner_product(r, z)
    code = code_of(
        (norm(r) <= target, Result.CONVERGED),
        # The target is NaN where b is, and then this too.
        (~jnp.isfinite(norm(r)), Result.NOT_FINITE),
        (rz <= 0, Result.BAD_PRECONDITIONER),
        otherwise=GOING,
    )
    num_models = 1 if progress is None else max_steps + 1
    models = jnp.zeros(num_models, norm(wide).dtype).at[0].set(model(x, r))
    first = _Carry(
        x=x,
        r=r,
        p=z,
        rz=rz,
        largest=jnp.zeros_like(norm(wide)),
        steps=jnp.int32(0),
        code=code,
        models=models,
    )

    def step(c: _Carry) -> _Carry:
        """Minimize q along p, and make the next direction conjugate to it."""
        Ap = apply(c.p)
        pAp, pp = inner_product(c.p, Ap), inner_product(c.p, c.p)
        # Flat is what cannot be told from 0 beside the largest Rayleigh quotient so far.
        flat = pAp <= jnp.finfo(pp.dtype).eps * c.largest * pp

        # alpha = r'z / p'A p, x += alpha p, r -= alpha A p; along a flat p there is no minimum, and
        # x stays, or in the first step goes to the guess plus p (Steihaug).
        alpha_if_flat = jnp.where(c.steps == 0, 1, 0)
        alpha = jnp.where(flat, alpha_if_flat, c.rz / jnp.where(flat, 1, pAp))
        x = add_scaled(c.x, alpha, c.p)
        r = add_scaled(c.r, -alpha, Ap)

        # beta = r_new'z_new / r'z, p = z_new + beta p; a flat p is kept, to be returned
        z = precondition(r)
        rz = inner_product(r, z)
        finite = all_finite((pAp, rz, norm(r)))
        p = keep_unless(finite & ~flat, add_scaled(z, rz / c.rz, c.p), c.p)

        steps = c.steps + 1
        models, slow = _progress(c.models, steps, model(x, r), progress)
        code = code_of(
            (~finite, Result.NOT_FINITE),
            (flat, Result.NEGATIVE_CURVATURE),
            (norm(r) <= target, Result.CONVERGED),
            (rz <= 0, Result.BAD_PRECONDITIONER),
            (slow, Result.LITTLE_PROGRESS),
            (steps >= max_steps, Result.MAX_STEPS),
            otherwise=GOING,
        )
        return _Carry(
            x=keep_unless(finite, x, c.x),
            r=r,
            p=p,
            rz=rz,
            largest=jnp.maximum(c.largest, pAp / pp),
            steps=steps,
            code=code,
            models=models,
        )

    with loops_for(matvec):
        last = lax.while_loop(lambda c: c.code == GOING, fast_convs_in_loops(step), first)

    ended_flat = last.code == Result.NEGATIVE_CURVATURE
    length = norm(last.p)

    def unit_or_zero(p: Array) -> Array:
        return jnp.where(ended_flat, safe_divide(p, length), 0)

    direction = jax.tree.map(unit_or_zero, last.p)
    return finished(apply, last.x, b, last.steps, last.code, tol, direction)


class _Carry(NamedTuple):
    """The state of the iteration after k steps.

    Attributes:
      x: x_k.
      r: its residual, by the recurrence.
      p: the next search direction.
      rz: `r'z`.
      largest: the largest Rayleigh quotient `p'A p / p'p` so far.
      steps: k.
      code: how it ended, or GOING.
      models: q of all iterates so far, if progress asks for it.
    """

    x: Params
    r: Params
    p: Params
    rz: Scalar
    largest: Scalar
    steps: Int[Array, ""]
    code: Int[Array, ""]
    models: Float[Array, " steps"]


def _progress(
    models: Float[Array, " steps"],
    steps: Int[Array, ""],
    q: Scalar,
    progress: float | None,
) -> tuple[Float[Array, " steps"], Bool[Array, ""]]:
    """Note q of this step, and tell whether it has hardly fallen over the last k steps."""
    if progress is None:
        return models, jnp.array(False)
    models = models.at[steps].set(q)
    # Martens (2010), section 4.4: stop if (q_i - q_{i-k}) / q_i < k progress, k = max(10, i / 10)
    k = jnp.maximum(10, steps // 10)
    decrease = models[jnp.maximum(steps - k, 0)] - q
    return models, (steps > k) & (q < 0) & (decrease < k * progress * jnp.abs(q))
