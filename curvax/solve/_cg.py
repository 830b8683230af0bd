"""Conjugate gradients that say how they ended, and stop where the matrix does not curve upwards."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._host import loops_for
from curvax._trees import add_scaled, all_finite, inner_product, keep_unless, norm
from curvax._types import Matvec, Params, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.solve._damped import check_system, damped, finished
from curvax.solve._result import GOING, Result, SolveInfo, code_of


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
    """Solve `(A + damping I) x = b` for symmetric positive (semi)definite A by conjugate gradients.

    Step k minimizes `q(x) = x'(A + damping I)x / 2 - b'x` over the Krylov space of k products. If a search direction p
    comes up with `p'(A + damping I)p <= 0`, the solve ends there: x is what was found so far, which lowers q; if that
    happens in the first step, x is the guess plus p (with no guess b itself, or what the preconditioner makes of it). So
    from `x0 = None`, `b'x > 0` unless x is 0: `-x` is a descent direction when b is a gradient.

    Derivatives of x are not those of the iteration: take them with `jax.lax.custom_linear_solve(matvec, b, solve,
    symmetric=True, has_aux=True)`, `solve = lambda matvec, b: curvax.cg(matvec, b)`.

    Args:
      matvec: `v -> A v` on trees like b, such as `curvax.ggnvp(...)`.
      b: tree of float arrays.
      damping: number or scalar array, at least 0; in units of an eigenvalue of A.
      tol: stop at `|b - (A + damping I) x| <= tol |b|`.
      max_steps: products with A at most.
      preconditioner: `v -> M v`, symmetric positive definite and near the inverse of the damped matrix:
        `curvax.kron_inverse(layout, factors, damping)`, `curvax.solve.window_inverse(window, damping)`.
      x0: guess; None: zero.
      progress: also stop when over the last `k = max(10, steps / 10)` steps q fell by less than `k progress |q|` (Martens
        takes 5e-4); None: never.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`; print `info.message`. Iterates are in at least float32.

    Raises:
      ValueError: negative damping or tol, max_steps below 1, trees that do not fit (by path).
      TypeError: a matvec that changes dtypes.

    Cost: one product and one use of the preconditioner a step, and one product more for the residual (two with x0). Memory:
      four trees like b, one more with a preconditioner.

    Example: a guess, and a matrix that is not positive definite.
      >>> import jax.numpy as jnp, curvax
      >>> matrix, b = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([3.0, 0.0])
      >>> x, info = curvax.cg(lambda v: matrix @ v, b)
      >>> [round(v, 4) for v in x.tolist()], info.steps.item(), info.message
      ([2.0, -1.0], 2, 'converged to the tolerance.')
      >>> x, info = curvax.cg(lambda v: -v, b)
      >>> x.tolist(), info.direction.tolist(), curvax.solve.Result(info.code.item()).name
      ([3.0, 0.0], [1.0, 0.0], 'NEGATIVE_CURVATURE')

    References: Hestenes and Stiefel (1952); Steihaug (1983), for the end at negative curvature; Martens (2010), Deep
      learning via Hessian-free optimization, section 4.4, for `progress`.
    """
    check_system(b, damping, tol, max_steps, x0)
    apply = damped(matvec, damping, b)
    precondition = (
        (lambda v: v)
        if preconditioner is None
        else damped(preconditioner, 0.0, b, "preconditioner")
    )
    wide = tree_at_least_float32(b)
    start = optax.tree.zeros_like(wide) if x0 is None else tree_at_least_float32(x0)
    r = wide if x0 is None else add_scaled(wide, -1, apply(start))
    z = precondition(r)
    enough = (
        0.5 * jnp.asarray(tol) * norm(wide)
    )  # half of what is allowed, so that rounding does not decide
    model = lambda x, r: (
        -0.5 * inner_product(x, optax.tree.add(r, wide))
    )  # q, of x and its residual
    first = _Carry(
        x=start,
        r=r,
        p=z,
        rz=inner_product(r, z),
        largest=jnp.zeros_like(norm(wide)),
        steps=jnp.int32(0),
        # `enough` is NaN where b is, and then this too
        code=code_of(
            (norm(r) <= enough, Result.CONVERGED),
            (~jnp.isfinite(norm(r)), Result.NOT_FINITE),
            (inner_product(r, z) <= 0, Result.BAD_PRECONDITIONER),
            otherwise=GOING,
        ),
        history=jnp.zeros(max_steps + 1 if progress is not None else 1, norm(wide).dtype)
        .at[0]
        .set(model(start, r)),
    )

    def step(c: _Carry) -> _Carry:
        product = apply(c.p)
        curvature, size = inner_product(c.p, product), inner_product(c.p, c.p)
        flat = curvature <= jnp.finfo(size.dtype).eps * c.largest * size
        alpha = jnp.where(flat, jnp.where(c.steps == 0, 1, 0), c.rz / jnp.where(flat, 1, curvature))
        x, r = add_scaled(c.x, alpha, c.p), add_scaled(c.r, -alpha, product)
        z = precondition(r)
        rz = inner_product(r, z)
        finite = all_finite((curvature, rz, norm(r)))
        count = c.steps + 1
        history, slow = _progress(c.history, count, model(x, r), progress)
        code = code_of(
            (~finite, Result.NOT_FINITE),
            (flat, Result.NEGATIVE_CURVATURE),
            (norm(r) <= enough, Result.CONVERGED),
            (rz <= 0, Result.BAD_PRECONDITIONER),
            (slow, Result.LITTLE_PROGRESS),
            (count >= max_steps, Result.MAX_STEPS),
            otherwise=GOING,
        )
        p = keep_unless(finite & ~flat, add_scaled(z, rz / c.rz, c.p), c.p)
        return _Carry(
            keep_unless(finite, x, c.x),
            r,
            p,
            rz,
            jnp.maximum(c.largest, curvature / size),
            count,
            code,
            history,
        )

    with loops_for(matvec):
        last = lax.while_loop(lambda c: c.code == GOING, fast_convs_in_loops(step), first)
    down = last.code == Result.NEGATIVE_CURVATURE
    length = norm(last.p)
    direction = jax.tree.map(
        lambda p: jnp.where(down, p / jnp.where(length > 0, length, 1), 0), last.p
    )
    return finished(apply, last.x, b, last.steps, last.code, tol, direction)


class _Carry(NamedTuple):
    x: Params
    r: Params
    p: Params
    rz: Scalar
    largest: Scalar
    steps: Int[Array, ""]
    code: Int[Array, ""]
    history: Float[Array, " steps"]


def _progress(
    history: Float[Array, " steps"], count: Int[Array, ""], q: Scalar, progress: float | None
) -> tuple[Float[Array, " steps"], Bool[Array, ""]]:
    """Note q of this step, and tell whether it has hardly fallen over the last k steps."""
    if progress is None:
        return history, jnp.array(False)
    history = history.at[count].set(q)
    k = jnp.maximum(10, count // 10)
    fallen = history[jnp.maximum(count - k, 0)] - q
    return history, (count > k) & (q < 0) & (fallen < k * progress * jnp.abs(q))
