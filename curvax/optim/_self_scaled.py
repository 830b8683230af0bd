"""Self-scaled quasi-Newton methods, BFGS and Broyden's family, for deterministic problems."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._checks import check_choice, check_count, check_params, params_and_batch
from curvax._trees import all_finite, as_vector, inner_product, norm, safe_divide, scaled
from curvax._types import Batch, Count, Params, Scalar, tree_at_least_float32
from curvax.objective import Objective
from curvax.optim._rule import (
    StepContext,
    StepResult,
    curvature_rule,
    keep_changed,
    transformation,
    zero_count,
)

KINDS = ("ssbroyden", "ssbfgs")

Vector = Float[Array, " d"]
Matrix = Float[Array, "d d"]


class SsbroydenInfo(NamedTuple):
    """Diagnostics of self-scaled quasi-Newton methods.

    Attributes:
      num_nonfinite: how many gradients were not finite, so far.
      num_skipped: how many steps left H as it was, for want of positive curvature.
    """

    num_nonfinite: Int[Array, ""]
    num_skipped: Int[Array, ""]


class ScaleBySsbroydenState(NamedTuple):
    """State of `scale_by_ssbroyden`; all parameters lie in one vector of size d.

    Attributes:
      count: steps taken.
      num_updates: how often H was updated.
      inverse: H, the inverse of the approximate Hessian, `[d, d]`.
      params: where the latest gradient was taken, `[d]`.
      gradient: the latest gradient, `[d]`.
      direction: its product with H, `[d]`.
      info: `SsbroydenInfo`.
    """

    count: Count
    num_updates: Int[Array, ""]
    inverse: Matrix
    params: Vector
    gradient: Vector
    direction: Vector
    info: SsbroydenInfo


class Scales(NamedTuple):
    """Numbers of one update of H.

    Attributes:
      theta: where in Broyden's family the update is; 0 is BFGS, 1 is DFP.
      tau: by what H is divided first.
      sigma: `1 + a theta`, positive where the update is positive definite.
    """

    theta: Scalar
    tau: Scalar
    sigma: Scalar


def scale_by_ssbroyden(kind: str = "ssbroyden") -> optax.GradientTransformationExtraArgs:
    """Multiply by a self-scaled quasi-Newton inverse Hessian, `u = H g`.

    With the step `s = x_new - x` and the change `y = g_new - g` of the gradient,

      H <- (H - Hy (Hy)' / y.Hy + phi y.Hy v v') / tau + s s' / y.s,   v = s / y.s - Hy / y.Hy,

    so that `H y = s`. H begins with the identity. With `b = s.H^-1 s / y.s`, `h = y.Hy / y.s`,
    `a = b h - 1`, `c = sqrt(a / (1 + a))` and `r = min(1, h (1 - c))`

      theta = max((r - 1) / a, min(1 / r, (1 - b) / b)),   sigma = 1 + a theta,
      tau   = min(1, 1/b) min(sigma^(-1/(d-1)), 1/theta) where theta > 0,
              else min(min(1, 1/b) sigma^(-1/(d-1)), sigma);   phi = (1 - theta) / sigma,

    and for "ssbfgs" `theta = 0`, `tau = min(1, 1/b)`. The first update has `tau = h / sigma`.

    Args:
      kind: "ssbroyden" or "ssbfgs".

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params)`. What follows
      may only choose how far to go along the step, as a line search or a learning rate does: b is
      computed from `s = -alpha H g`. H stays as it is, and `state.info.num_skipped` counts, where
      `y.s` is not positive (above the rounding of the product), since no positive definite H has
      then `H y = s`, or where the new H is not finite. The state is a `ScaleBySsbroydenState`.

    Raises:
      ValueError: The kind is unknown, or an update is called without params.

    Cost: about `8 d^2` operations a step, and `d^2` floats: for up to some thousand parameters, and
      gradients without noise. Float64 is advised: differences of gradients lose digits.

    Example: with the exact step along each direction a quadratic of d variables takes d steps.
      >>> import jax.numpy as jnp, curvax
      >>> hessian, x = jnp.diag(jnp.array([1.0, 10.0])), jnp.ones(2)
      >>> rule = curvax.optim.scale_by_ssbroyden("ssbfgs")
      >>> state = rule.init(x)
      >>> for _ in range(2):
      ...     gradient = hessian @ x
      ...     u, state = rule.update(gradient, state, x)
      ...     x -= u * (u @ gradient) / (u @ hessian @ u)
      >>> bool(jnp.allclose(x, 0, atol=1e-5))
      True

    References: Al-Baali (1998), Numerical experience with a class of self-scaling quasi-Newton
      algorithms; Urbán, Stefanou and Pons (2025), Unveiling the optimization process of
      physics-informed neural networks, https://arxiv.org/abs/2405.04230.

    Deviates: a is at least 0, and so no absolute value is needed in c; of the two bounds on theta
      the one by a is left out at `a = 0`, its limit; an update that would not be positive definite
      is that of BFGS.
    """
    check_choice("kind", kind, KINDS)

    def init(params: Params) -> ScaleBySsbroydenState:
        check_params(params)
        flat = _flat(params)
        return ScaleBySsbroydenState(
            count=zero_count(),
            num_updates=zero_count(),
            inverse=jnp.eye(flat.size, dtype=flat.dtype),
            params=jnp.zeros_like(flat),
            gradient=jnp.zeros_like(flat),
            direction=jnp.zeros_like(flat),
            info=SsbroydenInfo(zero_count(), zero_count()),
        )

    def step(
        state: ScaleBySsbroydenState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        if context.params is None:
            raise ValueError(
                "differences of gradients need params: tx.update(grads, state, params)."
            )
        x, dtype = _flat(context.params), state.inverse.dtype
        g, to_tree = as_vector(tree_at_least_float32(gradient))
        x, g = x.astype(dtype), g.astype(dtype)

        # 1. H takes in the step that led here; there is none before the first.
        inverse, is_usable = _updated_inverse(state, x, g, kind)
        has_step, is_finite = state.count > 0, context.gradient_is_finite
        is_updated = has_step & is_usable & is_finite
        inverse = jnp.where(is_updated, inverse, state.inverse)

        # 2. u = H g
        direction = _times(inverse, g)
        new = state._replace(
            num_updates=state.num_updates + is_updated,
            inverse=inverse,
            params=x,
            gradient=g,
            direction=direction,
        )
        num_skipped = state.info.num_skipped + (has_step & ~is_usable)
        return StepResult(
            updates=to_tree(direction),
            state=keep_changed(is_finite, new, state),
            info={"num_skipped": num_skipped},
        )

    return curvature_rule(init, step)


def ssbroyden(
    objective: Objective, max_search_steps: int = 25
) -> optax.GradientTransformationExtraArgs:
    """Self-scaled Broyden with a line search, for deterministic problems.

    This is `scale_by_ssbroyden("ssbroyden")`, the sign of descent, and
    `optax.scale_by_zoom_linesearch` with the first trial 1, on the objective of the batch. The very
    first step, along the gradient, has length 1 at most before the search.

    Args:
      objective: the `curvax.Objective` that is minimized.
      max_search_steps: the largest number of trials in a line search.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer: no learning rate comes after it.
      Call `update(grads, state, params, batch=batch)` with gradients of that batch, which is the
      same in every step.

    Raises:
      ValueError: `max_search_steps` is below 1; or, at trace time, params or batch are missing.

    Cost: that of `scale_by_ssbroyden`, and a loss and gradient for each trial, 1 to 3 as a rule.
      The loss costs nothing where the gradient of the same batch is in the same compiled step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> fit = lambda p, x: jnp.exp(-p[0] * x) + p[1]
      >>> objective = curvax.Objective(fit, curvax.losses.squared_error())
      >>> x = jnp.linspace(0.0, 2.0, 8)[:, None]
      >>> params, batch = jnp.zeros(2), (x, jnp.exp(-2.0 * x) + 0.5)
      >>> tx = curvax.optim.ssbroyden(objective)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradient = jax.grad(objective)(params, batch)
      ...     updates, state = tx.update(gradient, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(15):
      ...     params, state = step(params, state)
      >>> [round(x, 2) for x in params.tolist()]
      [2.0, 0.5]

    References: see `scale_by_ssbroyden`; Nocedal and Wright (2006), Numerical Optimization,
      algorithms 3.5 and 3.6, for the search.
    """
    return _searching(objective, "ssbroyden", max_search_steps)


def ssbfgs(
    objective: Objective, max_search_steps: int = 25
) -> optax.GradientTransformationExtraArgs:
    """Self-scaled BFGS with a line search, for deterministic problems.

    This is `ssbroyden` with `scale_by_ssbroyden("ssbfgs")`, whose arguments and cost it has.

    Args:
      objective: the `curvax.Objective` that is minimized.
      max_search_steps: the largest number of trials in a line search.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer: call `update(grads, state, params,
      batch=batch)`.

    Raises:
      ValueError: as `ssbroyden` does.

    Cost: that of `ssbroyden`.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> tx = curvax.optim.ssbfgs(objective)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> bool(objective(params + updates, batch) < objective(params, batch))
      True

    References: see `scale_by_ssbroyden`.

    Deviates: the line search ends at a point of positive `y.s` (the strong Wolfe conditions), where
      published code steps back only.
    """
    return _searching(objective, "ssbfgs", max_search_steps)


def _searching(
    objective: Objective, kind: str, max_search_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Compose a rule with a line search on the objective of the batch."""
    check_count(1, max_search_steps=max_search_steps)
    search = optax.scale_by_zoom_linesearch(max_search_steps, initial_guess_strategy="one")
    first = _first_step_of_unit_length()
    inner = optax.chain(scale_by_ssbroyden(kind), first, optax.scale(-1.0), search)

    def init(params: Params) -> Any:
        # The search begins with numbers of weak types and ends with others: a second compilation.
        return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), inner.init(params))

    def update(
        updates: PyTree,
        state: Any,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del extra  # the search refuses what the function that it minimizes does not take
        params, batch = params_and_batch(params, batch, "the line search needs both")

        def loss_at(point: Params) -> Scalar:
            return objective.value(point, batch)

        # The compiler shares this forward pass with that of the gradient.
        value = loss_at(params)
        return inner.update(updates, state, params, value=value, grad=updates, value_fn=loss_at)

    return transformation(init, update)


def _first_step_of_unit_length() -> optax.GradientTransformationExtraArgs:
    """Shorten the first step to length 1, where it is longer.

    It is a gradient, whose unit is not that of params: the trials of a search, which begin at 1,
    might not come down to a step that lowers the loss.
    """

    def init(params: Params) -> Count:
        del params
        return zero_count()

    def update(
        updates: PyTree, count: Count, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, Count]:
        del params, extra
        length = optax.tree.norm(updates)
        factor = jnp.where((count == 0) & (length > 1), 1 / length, 1)
        return scaled(factor, updates), optax.safe_increment(count)

    return transformation(init, update)


def _updated_inverse(
    state: ScaleBySsbroydenState, x: Vector, g: Vector, kind: str
) -> tuple[Matrix, Bool[Array, ""]]:
    """Return H with the step to x in it, and whether it is fit for use."""
    H, s, y = state.inverse, x - state.params, g - state.gradient
    y_s, y_Hy = inner_product(y, s), inner_product(y, _times(H, y))
    # Where y.s is rounding, 1 / y.s is noise.
    rounding = jnp.finfo(H.dtype).eps * norm(y) * norm(s)
    is_positive = (y_s > rounding) & (y_Hy > 0)
    rho, h = safe_divide(1, y_s), safe_divide(y_Hy, y_s)

    # s = -alpha H g of the latest gradient, so that s.H^-1 s = -alpha s.g
    direction = state.direction
    alpha = -safe_divide(inner_product(s, direction), inner_product(direction, direction))
    b = -alpha * rho * inner_product(s, state.gradient)
    scales = _scales(b, h, s.size, kind, is_first=state.num_updates == 0)
    new = _broyden(H, s, y, scales)
    return new, is_positive & all_finite(new)


def _broyden(H: Matrix, s: Vector, y: Vector, scales: Scales) -> Matrix:
    """Return `(H - Hy (Hy)' / y.Hy + phi y.Hy v v') / tau + rho s s'`; it maps y to s."""
    theta, tau, sigma = scales
    Hy = _times(H, y)
    rho, of_Hy = safe_divide(1, inner_product(y, s)), safe_divide(1, inner_product(y, Hy))
    # v = rho s - Hy / y.Hy is orthogonal to y.
    v = rho * s - of_Hy * Hy
    phi_y_Hy = (1 - theta) / sigma * inner_product(y, Hy)
    orthogonal = H - of_Hy * jnp.outer(Hy, Hy) + phi_y_Hy * jnp.outer(v, v)
    return orthogonal / tau + rho * jnp.outer(s, s)


def _scales(b: Scalar, h: Scalar, size: int, kind: str, is_first: Bool[Array, ""]) -> Scales:
    """Return theta, tau and sigma of an update, from `b = s.H^-1 s / y.s` and `h = y.Hy / y.s`."""
    # a >= 0 by Cauchy and Schwarz; below is rounding.
    a = jnp.maximum(b * h - 1, 0)
    c = jnp.sqrt(a / (1 + a))
    # 1 - c = 1 / ((1 + a)(1 + c)), which does not cancel for large a.
    r = jnp.minimum(1, h / ((1 + a) * (1 + c)))
    by_r = jnp.minimum(safe_divide(1, r), safe_divide(1 - b, b))
    # At a = 0, s and Hy are parallel and any theta gives the same H: the other bound is left out.
    by_a = jnp.where(a > 0, safe_divide(r - 1, a), -jnp.inf)
    theta = jnp.zeros_like(a) if kind == "ssbfgs" else jnp.maximum(by_a, by_r)
    # H is positive definite for sigma > 0; otherwise BFGS, which always is.
    theta = jnp.where(1 + a * theta > 0, theta, 0)
    sigma = 1 + a * theta

    # In one dimension a = 0 and sigma = 1, with every exponent.
    q = sigma ** (-1 / max(size - 1, 1))
    bound = jnp.minimum(1, safe_divide(1, b))
    if kind == "ssbfgs":
        tau = bound
    else:
        by_theta = jnp.minimum(q, safe_divide(1, theta))
        tau = jnp.where(theta > 0, bound * by_theta, jnp.minimum(bound * q, sigma))
    # The identity has no scale of its own: the first update gives it one.
    return Scales(theta, jnp.where(is_first, h / sigma, tau), sigma)


def _flat(tree: Params) -> Vector:
    return as_vector(tree_at_least_float32(tree))[0]


def _times(matrix: Matrix, x: Vector) -> Vector:
    return jnp.matmul(matrix, x, precision=lax.Precision.HIGHEST)
