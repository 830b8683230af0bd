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
from curvax.solve._damped import (
    check_system,
    damped,
    damped_preconditioner,
    finished,
    largest_residual,
)
from curvax.solve._result import GOING, Result, SolveInfo, code_of

# v_k: Lanczos vectors; T: [k + 1, k], tridiagonal, alpha_k on its diagonal and beta_k beside it
# M: the preconditioner; r_k = beta_k v_k before M is applied and z_k = M r_k after it
# Names of scalars are those of Paige and Saunders' program: a bar is an entry not yet rotated.


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

    Step k minimizes `|b - (A + damping I) x|` over the Krylov space of k products (in the norm of
    the preconditioner, if there is one). For a Newton step at a saddle this x solves the system,
    but need not be a descent direction.

    Derivatives of x are not those of the iteration: take them with
    `jax.lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=True)`, where
    `solve = lambda matvec, b: curvax.solve.minres(matvec, b)`.

    Args:
      matvec: `v -> A v` on trees like b, such as `curvax.hvp(...)`.
      b: a tree of float arrays.
      damping: a shift of the spectrum; a number or scalar array, at least 0.
      tol: the solve stops at `|b - (A + damping I) x| <= tol |b|`, in the norm `sqrt(v' M v)` if
        there is a preconditioner M.
      max_steps: the largest number of products with A.
      preconditioner: `v -> M v`, symmetric positive definite.
      x0: a guess; None stands for zero.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`; print `info.message`. Iterates are in at
      least float32.

    Raises:
      ValueError: damping or tol is negative, max_steps is below 1, or trees do not fit (the message
        names the path).
      TypeError: the matvec changes dtypes.

    Cost: one product and one use of the preconditioner a step, and one product more for the
      residual (two with x0). Memory: seven trees like b.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> matvec = lambda v: jnp.array([2.0, -1.0]) * v
      >>> x, info = curvax.solve.minres(matvec, jnp.array([2.0, 3.0]))
      >>> [round(v, 4) for v in x.tolist()], bool(info.converged)
      ([1.0, -3.0], True)

    References: Paige and Saunders (1975), Solution of sparse indefinite systems of linear
      equations.
    """
    check_system(b, damping, tol, max_steps, x0)
    apply = damped(matvec, damping, b)
    precondition = damped_preconditioner(preconditioner, b)
    wide = tree_at_least_float32(b)

    def norm_of(v: Params) -> Scalar:
        # The norm that is minimized is that of the preconditioner.
        if preconditioner is None:
            return norm(v)
        return jnp.sqrt(inner_product(v, precondition(v)))

    target = largest_residual(tol, norm_of(wide))

    # beta_1 v_1 = r_1 = b - A x_0, beta_1 = sqrt(r_1'M r_1)
    zeros = optax.tree.zeros_like(wide)
    x = zeros if x0 is None else tree_at_least_float32(x0)
    r = wide if x0 is None else add_scaled(wide, -1, apply(x))
    z = precondition(r)
    square = inner_product(r, z)
    beta = jnp.sqrt(square)
    code = code_of(
        (norm(r) == 0, Result.CONVERGED),
        (jnp.isfinite(norm(r)) & ~(square > 0), Result.BAD_PRECONDITIONER),
        (beta <= target, Result.CONVERGED),
        (jnp.isfinite(beta), GOING),
        otherwise=Result.NOT_FINITE,
    )
    zero = jnp.zeros_like(beta)
    first = _Carry(
        x=x,
        previous_r=zeros,
        r=r,
        z=z,
        w=zeros,
        previous_w=zeros,
        previous_beta=zero,
        beta=beta,
        epsilon=zero,
        delta_bar=zero,
        cos=-jnp.ones_like(beta),
        sin=zero,
        phi_bar=beta,
        steps=jnp.int32(0),
        scale=zero,
        code=code,
    )

    def step(c: _Carry) -> _Carry:
        """Extend T by a column, rotate it into the triangular R, and move x along the new w."""
        # Lanczos: beta_{k+1} v_{k+1} = A v_k - alpha_k v_k - beta_k v_{k-1}, with r in place of v
        v = optax.tree.scale(1 / c.beta, c.z)
        product = apply(v)
        is_later = c.steps > 0  # the first step has no vector before it
        ratio = jnp.where(is_later, c.beta / jnp.where(is_later, c.previous_beta, 1), 0)
        product = add_scaled(product, -ratio, c.previous_r)
        alpha = inner_product(v, product)
        r = add_scaled(product, -alpha / c.beta, c.r)
        z = precondition(r)
        square = inner_product(r, z)
        beta = jnp.sqrt(jnp.maximum(square, 0))

        # The previous rotation on column k of T: (delta_bar, alpha) -> (delta, gamma_bar), and on
        # column k + 1: (0, beta) -> (epsilon, delta_bar of the next step).
        delta = c.cos * c.delta_bar + c.sin * alpha
        gamma_bar = c.sin * c.delta_bar - c.cos * alpha
        next_epsilon = c.sin * beta
        next_delta_bar = -c.cos * beta

        # A new rotation turns (gamma_bar, beta) into (gamma, 0). Where gamma is nothing beside the
        # entries of T so far, the matrix is singular on the Krylov space.
        gamma = jnp.sqrt(gamma_bar**2 + beta**2)
        scale = jnp.maximum(c.scale, jnp.maximum(jnp.abs(alpha), beta))
        eps = jnp.finfo(gamma.dtype).eps
        singular = gamma <= eps * scale
        gamma = jnp.where(singular, 1, gamma)
        cos, sin = gamma_bar / gamma, beta / gamma

        # |A r| / |r| = |(gamma_bar, delta_bar of the next step)| for the x so far. Where that is
        # nearly 0 and r is not, r is outside the range of A.
        normal_residual = jnp.sqrt(gamma_bar**2 + next_delta_bar**2)
        outside_range = is_later & (normal_residual <= jnp.sqrt(eps) * scale)

        # W = V R^-1: w_k = (v_k - epsilon_k w_{k-2} - delta_k w_{k-1}) / gamma_k, and
        # x_k = x_{k-1} + phi_k w_k with phi_k = cos_k phi_bar_k; |b - A x_k| = sin_k phi_bar_k.
        w = add_scaled(add_scaled(v, -c.epsilon, c.previous_w), -delta, c.w)
        w = optax.tree.scale(1 / gamma, w)
        finite = all_finite((alpha, beta, gamma))
        phi_bar = sin * c.phi_bar
        moves = finite & ~singular & ~outside_range
        x = keep_unless(moves, add_scaled(c.x, cos * c.phi_bar, w), c.x)

        steps = c.steps + 1
        code = code_of(
            (~finite, Result.NOT_FINITE),
            (outside_range, Result.LEAST_SQUARES),
            (singular, Result.STALLED),
            (phi_bar <= target, Result.CONVERGED),
            (square < 0, Result.BAD_PRECONDITIONER),
            (steps >= max_steps, Result.MAX_STEPS),
            otherwise=GOING,
        )
        return _Carry(
            x=x,
            previous_r=c.r,
            r=r,
            z=z,
            w=w,
            previous_w=c.w,
            previous_beta=c.beta,
            beta=beta,
            epsilon=next_epsilon,
            delta_bar=next_delta_bar,
            cos=cos,
            sin=sin,
            phi_bar=phi_bar,
            steps=steps,
            scale=scale,
            code=code,
        )

    with loops_for(matvec):
        last = lax.while_loop(lambda c: c.code == GOING, fast_convs_in_loops(step), first)
    return finished(apply, last.x, b, last.steps, last.code, tol, norm_of=norm_of)


class _Carry(NamedTuple):
    """The state of the iteration between step k - 1 and step k.

    Attributes:
      x: x_{k-1}.
      previous_r: r_{k-1}.
      r: r_k, the unnormalized Lanczos vector.
      z: `M r_k`.
      w: w_{k-1}, the direction of the last step.
      previous_w: w_{k-2}.
      previous_beta: beta_{k-1}.
      beta: beta_k.
      epsilon: the entry of R two above the diagonal, in column k.
      delta_bar: the entry of column k beside the diagonal, before the last rotation.
      cos: the cosine of the last rotation.
      sin: its sine.
      phi_bar: the norm of the residual `b - A x_{k-1}`.
      steps: k - 1.
      scale: the largest entry of T so far.
      code: how it ended, or GOING.
    """

    x: Params
    previous_r: Params
    r: Params
    z: Params
    w: Params
    previous_w: Params
    previous_beta: Scalar
    beta: Scalar
    epsilon: Scalar
    delta_bar: Scalar
    cos: Scalar
    sin: Scalar
    phi_bar: Scalar
    steps: Int[Array, ""]
    scale: Scalar
    code: Int[Array, ""]
