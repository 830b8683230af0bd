"""Levenberg-Marquardt: damping adapted to how well the quadratic model predicts the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_damping, params_and_batch
from curvax._trees import inner_product, keep_unless
from curvax._types import Batch, Count, Matvec, Params, Scalar
from curvax.objective import Objective
from curvax.optim._quadratic_model import quadratic_form
from curvax.optim._refresh import refresh_if
from curvax.optim._rule import transformation, zero_count, zero_number


class LevenbergMarquardtInfo(NamedTuple):
    """Diagnostics of the latest trial.

    Attributes:
      ratio: reduction of the loss over the reduction that the quadratic model predicted; 1 is a
        perfect model.
      accepted: whether the latest step was taken.
      num_rejected: the number of steps rejected so far.
    """

    ratio: Scalar
    accepted: Bool[Array, ""]
    num_rejected: Int[Array, ""]


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`.

    Attributes:
      count: steps tried.
      damping: the damping of the next step.
      inner_state: state of the wrapped transformation.
      info: `LevenbergMarquardtInfo`.
    """

    count: Count
    damping: Scalar
    inner_state: Any
    info: LevenbergMarquardtInfo


def levenberg_marquardt(
    inner: optax.GradientTransformation,
    objective: Objective,
    damping: float | Array,
    every: int = 5,
    factor: float = 0.95,
    bounds: tuple[float, float] = (1e-8, 1e8),
    matvec_of: Callable[..., Matvec] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adapt the damping of `inner`, and reject steps that do not lower the loss.

    Every `every` steps the step d of `inner` is tried: with `M(d) = g.d + d' F d / 2` (F the exact
    Gauss-Newton matrix of the batch, undamped) and `rho = (L(params + d) - L(params)) / M(d)`,

      rho > 3/4: damping *= factor^every;   rho < 1/4, or NaN: damping /= factor^every.

    If the loss does not go down, or is not finite, the step is rejected: the update is zero and the
    state of `inner` stays bitwise what it was; only the damping grows.

    Args:
      inner: a whole optimizer that takes `damping=` in its updates: `curvax.quadratic_model(...)`,
        or a chain with `curvax.scale_by_kfac` that ends with the learning rate. This wrapper must
        be the outermost one.
      objective: the `curvax.Objective` that is minimized.
      damping: the first damping.
      every: number of steps between trials. Steps in between are accepted without a trial.
      factor: the change of the damping per step, in (0, 1).
      bounds: the smallest and the largest damping.
      matvec_of: `(objective, params, batch) -> matvec`, the F of the model in place of the
        Gauss-Newton matrix: `curvax.hvp` for methods on the Hessian.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)` with
      gradients of the same batch. The state is a `LevenbergMarquardtState`.

    Raises:
      ValueError: The damping is not positive, the factor is outside (0, 1), or params or batch are
        missing.

    Cost: every `every` steps two evaluations of the loss and a product of the Jacobian with a
      vector: about a gradient. With `matvec_of` one of those.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout)
      >>> rule = curvax.estimating(curvax.scale_by_kfac(layout), estimator)
      >>> inner = curvax.quadratic_model(rule, objective)
      >>> tx = curvax.levenberg_marquardt(inner, objective, damping=1.0, every=1)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> bool(state.info.accepted), round(state.damping.item(), 3), 0.7 < state.info.ratio.item()
      (True, 0.95, True)

    References: Martens and Grosse (2015), section 6.5, https://arxiv.org/abs/1503.05671; Moré
      (1978), The Levenberg-Marquardt algorithm.

    Deviates: one damping serves the quadratic model and the Kronecker factors, where section 6.6 of
      Martens and Grosse (2015) adapts a separate gamma for the factors.
    """
    check_damping(damping)
    check_count(1, every=every)
    if not 0 < factor < 1:
        raise ValueError(f"factor must lie in (0, 1), got {factor}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> LevenbergMarquardtState:
        info = LevenbergMarquardtInfo(zero_number(), jnp.array(True), zero_count())
        # The sum is a fresh buffer, also where the damping is an array of the caller's.
        first_damping = jnp.asarray(damping, jnp.float32) + zero_number()
        return LevenbergMarquardtState(zero_count(), first_damping, inner.init(params), info)

    def update(
        updates: PyTree,
        state: LevenbergMarquardtState,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        **extra: Any,
    ) -> tuple[PyTree, LevenbergMarquardtState]:
        params, batch = params_and_batch(params, batch, "a trial of the step needs both")
        step, inner_state = inner.update(
            updates, state.inner_state, params, batch=batch, damping=state.damping, **extra
        )

        def trial(
            grads: PyTree, step: PyTree, params: Params, batch: Batch
        ) -> tuple[Scalar, Array]:
            before = objective.value(params, batch)
            after = objective.value(cast(Params, optax.apply_updates(params, step)), batch)
            # M(d) = g.d + d' F d / 2 and rho = (L(params + d) - L(params)) / M(d)
            curvature = _curvature_along(step, objective, params, batch, matvec_of)
            model = inner_product(grads, step) + curvature / 2
            ratio = (after - before) / model
            # At a minimum rounding decides what is lower: then the step is accepted, and damping
            # stays as it is.
            rounding = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)
            is_flat = (jnp.abs(model) <= rounding) & (after - before <= rounding)
            is_lower = (is_flat | (after < before)) & jnp.isfinite(after)  # NaN is not lower
            return jnp.where(is_flat, 0.5, ratio).astype(jnp.float32), is_lower

        def no_trial(*operands: Any) -> tuple[Scalar, Array]:
            return state.info.ratio, jnp.array(True)

        is_due = state.count % every == 0
        ratio, is_lower = refresh_if(is_due, trial, no_trial, updates, step, params, batch)

        # Section 6.5: less damping for rho > 3/4, more for rho < 1/4, for NaN and for a step that
        # is rejected.
        less, more = state.damping * factor**every, state.damping / factor**every
        by_ratio = jnp.where(ratio > 0.75, less, jnp.where(ratio >= 0.25, state.damping, more))
        adapted = jnp.clip(jnp.where(is_lower, by_ratio, more), *bounds)
        next_damping = jnp.where(is_due, adapted, state.damping).astype(state.damping.dtype)

        step = jax.tree.map(lambda s: jnp.where(is_lower, s, 0), step)
        info = LevenbergMarquardtInfo(ratio, is_lower, state.info.num_rejected + ~is_lower)
        count = jnp.asarray(optax.safe_increment(state.count))
        inner_state = keep_unless(is_lower, inner_state, state.inner_state)
        return step, LevenbergMarquardtState(count, next_damping, inner_state, info)

    return transformation(init, update)


def _curvature_along(
    step: PyTree,
    objective: Objective,
    params: Params,
    batch: Batch,
    matvec_of: Callable[..., Matvec] | None,
) -> Scalar:
    """Return `d' F d`; the Gauss-Newton matrix needs half a product, `(J d)' S (J d)`."""
    if matvec_of is None:
        return quadratic_form(objective, params, batch, [step])[0, 0]
    return inner_product(step, matvec_of(objective, params, batch)(step))
