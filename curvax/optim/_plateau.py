"""A wrapper that ends preconditioning once the loss has stopped falling."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_at_least, check_count, check_decay
from curvax._types import Batch, Params, Scalar
from curvax.objective import Objective
from curvax.optim._loss_of_update import loss_of_update
from curvax.optim._matrix_parts import average, debiased
from curvax.optim._refresh import refresh_if
from curvax.optim._rule import keep_changed, transformation, zero_count, zero_number


class LossAverages(NamedTuple):
    """Averages of the loss, which began with zeros, and how many losses are in them.

    Attributes:
      fast: the average of the latest losses.
      slow: the average over more of them.
      num_losses: how many.
    """

    fast: Scalar
    slow: Scalar
    num_losses: Int[Array, ""]


class UntilPlateauState(NamedTuple):
    """State of `until_plateau`.

    Attributes:
      averages: `LossAverages`.
      num_flat: how many steps in a row, up to the latest, were without progress.
      has_switched: whether the wrapped transformation is left out from now on.
      inner_state: its state, which after the switch stays as it is.
    """

    averages: LossAverages
    num_flat: Int[Array, ""]
    has_switched: Bool[Array, ""]
    inner_state: Any


def until_plateau(
    inner: optax.GradientTransformation,
    objective: Objective | None = None,
    tolerance: float = 1e-3,
    patience: int = 100,
    b_fast: float = 0.9,
    b_slow: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """Apply a transformation until the loss stops falling; from there on gradients pass unchanged.

    With two averages of the loss, free of bias,

      fast <- b_fast fast + (1 - b_fast) loss,   slow <- b_slow slow + (1 - b_slow) loss,

    a step is without progress if `slow - fast < tolerance |slow|`: the loss has then hardly fallen
    over the last `1 / (1 - b_slow)` steps. After `patience` of them in a row comes the switch, for
    good.

    Args:
      inner: a preconditioner, with its estimator inside, so that this ends too:
        `curvax.estimating(curvax.optim.scale_by_mkor(layout), estimator)`. Momentum and the
        learning rate come after the wrapper and go on through the switch; the steps of `inner`
        should therefore be as long as gradients.
      objective: gives the loss of an update that is called without it.
      tolerance: progress as a fraction of the loss.
      patience: number of steps without progress.
      b_fast: decay of the fast average.
      b_slow: decay of the slow one.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *, value=None,
      batch=None)`. The value is the loss at params, as `optax.contrib.reduce_on_plateau` takes it;
      without it the objective is evaluated on the batch. A loss that is not finite is left out. The
      state is an `UntilPlateauState`. Under `vmap` the transformation runs for as long as some
      member has not switched.

    Raises:
      ValueError: The tolerance is negative, the patience below 1, a decay not in [0, 1); or, at
        trace time, both the value and what it is computed from are missing.

    Cost: nothing where the value is passed, or where the gradient of the same objective and batch
      is in the same compiled step; else a forward pass.

    Example: signs, until two steps in a row bring nothing.
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = curvax.optim.until_plateau(optax.scale_by_sign(), patience=2)
      >>> gradient = jnp.array([3.0, -2.0])
      >>> state = tx.init(gradient)
      >>> for loss in (2.0, 1.0, 1.0):
      ...     updates, state = tx.update(gradient, state, value=loss)
      >>> updates.tolist(), bool(state.has_switched)
      ([1.0, -1.0], False)
      >>> for loss in (5.0, 5.0):
      ...     updates, state = tx.update(gradient, state, value=loss)
      >>> updates.tolist(), bool(state.has_switched)
      ([3.0, -2.0], True)

    References: Mozaffari et al. (2023), https://arxiv.org/abs/2306.01685, has a switch
      by the rate at which the loss falls. Its rule is not published; this one is ours.
    """
    check_at_least(0, tolerance=tolerance)
    check_count(1, patience=patience)
    check_decay(b_fast=b_fast, b_slow=b_slow)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> UntilPlateauState:
        averages = LossAverages(zero_number(), zero_number(), zero_count())
        return UntilPlateauState(averages, zero_count(), jnp.array(False), inner.init(params))

    def update(
        updates: PyTree,
        state: UntilPlateauState,
        params: Params | None = None,
        *,
        value: Any = None,
        batch: Batch | None = None,
        model_params: Params | None = None,
        **extra: Any,
    ) -> tuple[PyTree, UntilPlateauState]:
        model = params if model_params is None else model_params
        value = loss_of_update(value, objective, model, batch)
        averages, num_flat = watched(state, value.astype(jnp.float32))
        has_switched = state.has_switched | (num_flat >= patience)

        def precondition(gradient: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            return inner.update(
                gradient,
                inner_state,
                params,
                value=value,
                batch=batch,
                model_params=model_params,
                **extra,
            )

        def leave(gradient: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            return gradient, inner_state

        step, inner_state = refresh_if(
            ~has_switched, precondition, leave, updates, state.inner_state
        )
        return step, UntilPlateauState(averages, num_flat, has_switched, inner_state)

    def watched(state: UntilPlateauState, loss: Scalar) -> tuple[LossAverages, Array]:
        """Take in a loss; return the averages and how many steps in a row brought nothing."""
        old = state.averages
        count = jnp.asarray(optax.safe_increment(old.num_losses))
        new = LossAverages(average(old.fast, loss, b_fast), average(old.slow, loss, b_slow), count)
        fast, slow = debiased(new.fast, b_fast, count), debiased(new.slow, b_slow, count)
        # A loss of exactly zero, 0 < 0, has nowhere to fall: it is flat too. One loss alone is not.
        is_flat = (slow - fast < tolerance * jnp.abs(slow)) | (slow == 0)
        is_flat &= count > 1
        num_flat = jnp.where(is_flat, state.num_flat + 1, 0)
        is_finite = jnp.isfinite(loss)
        return keep_changed(is_finite, (new, num_flat), (old, state.num_flat))

    return transformation(init, update)
