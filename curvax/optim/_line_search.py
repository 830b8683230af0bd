"""A line search on a grid, around any optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_positive, params_and_batch
from curvax._trees import scaled
from curvax._types import Batch, Params, Scalar, at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.objective import Objective
from curvax.optim._loss_of_update import loss_of_update
from curvax.optim._rule import transformation, zero_count, zero_number
from curvax.optim._step_search import rounded


class LineSearchInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      scale: the factor of the step that was taken, 0 where none lowered the loss.
      value: the loss of the batch after it.
      accepted: whether a step was taken.
      num_rejected: the number of updates so far in which none was.
    """

    scale: Scalar
    value: Scalar
    accepted: Bool[Array, ""]
    num_rejected: Int[Array, ""]


class LineSearchState(NamedTuple):
    """State of `line_search`.

    Attributes:
      inner_state: state of the wrapped optimizer.
      info: `LineSearchInfo`.
    """

    inner_state: Any
    info: LineSearchInfo


def line_search(
    inner: optax.GradientTransformation,
    objective: Objective,
    largest: float = 1.0,
    num_trials: int = 31,
) -> optax.GradientTransformationExtraArgs:
    """Scale the step of an optimizer by the best of `largest 2^-k`, k = 0 ... num_trials - 1, or 0.

    Every scale is tried on the batch of the step, and that with the least loss is taken; if none is
    below the loss before, no step is. It makes safe what a fixed rate does not: K-FAC and
    Gauss-Newton on residuals with little damping.

    Args:
      inner: an optimizer, with the sign of a descent and a learning rate of 1 where it is a
        Newton-type method; it may be any `optax.chain`.
      objective: the `curvax.Objective` that is minimized.
      largest: the scale that is tried first.
      num_trials: the number of scales.

    Returns:
      `optax.GradientTransformationExtraArgs`, to be the outermost but for
      `curvax.levenberg_marquardt`; call `update(grads, state, params, batch=batch)`, where
      `value=loss` saves one evaluation if the loss is known. The state is a `LineSearchState`.
      Where no step is taken updates are zero, and the inner state goes on: it has averages and
      momentum of the batches that it has seen, params at which they are still in place, and
      another direction next time. A trial whose loss is not finite is never taken; where the
      inner step itself is not finite, updates are NaN, which `optax.apply_if_finite` sees.

    Raises:
      ValueError: `largest` is not positive, `num_trials` is below 1, or at trace time params or
        batch are missing.

    Cost: `num_trials` + 1 evaluations of the loss, one after another in one compiled loop. Memory:
      one tree like params.

    Example: a step that is four times too long, and the grid finds a quarter of it.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> w, batch = jnp.zeros(1), (jnp.ones((3, 1)), jnp.ones(3))
      >>> tx = curvax.line_search(optax.sgd(4.0), objective)
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> updates.tolist(), state.info.scale.item(), state.info.value.item()
      ([1.0], 0.25, 0.0)

    References: the grid from 1 to 2^-30 is that of Müller and Zeinhofer (2023),
      https://arxiv.org/abs/2302.13163, and of the codes of Dangel et al. (2024),
      https://arxiv.org/abs/2405.15603, which were read.

    Deviates: from the code of the former, in that no step is taken where none lowers the loss, and
      that a loss of NaN is not taken for the least one. Its loss has no factor 1/2, so that its
      Gauss-Newton step is at 1/2 on the grid, and here at 1.
    """
    check_positive(largest=largest)
    check_count(1, num_trials=num_trials)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> LineSearchState:
        info = LineSearchInfo(
            scale=zero_number(),
            value=zero_number(),
            accepted=jnp.array(False),
            num_rejected=zero_count(),
        )
        return LineSearchState(inner.init(params), info)

    def update(
        updates: PyTree,
        state: LineSearchState,
        params: Params | None = None,
        *,
        value: Any = None,
        batch: Batch | None = None,
        **extra: Any,
    ) -> tuple[PyTree, LineSearchState]:
        params, batch = params_and_batch(params, batch, "trials of the step need both")
        before = loss_of_update(value, objective, params, batch)
        steps, inner_state = inner.update(
            updates, state.inner_state, params, value=before, batch=batch, **extra
        )

        def loss_at(scale: Scalar) -> Scalar:
            moved = optax.apply_updates(params, scaled(scale, steps))
            at = jax.tree.map(rounded, cast(Params, moved))
            return at_least_float32(objective.value(at, batch))

        scales = largest * 0.5 ** jnp.arange(num_trials, dtype=before.dtype)
        losses = lax.map(fast_convs_in_loops(loss_at), scales)
        # NaN would be taken for the least of all.
        losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
        best = jnp.argmin(losses)
        accepted = losses[best] < before
        scale = jnp.where(accepted, scales[best], 0)
        info = LineSearchInfo(
            scale=scale.astype(jnp.float32),
            value=jnp.where(accepted, losses[best], before).astype(jnp.float32),
            accepted=accepted,
            num_rejected=state.info.num_rejected + ~accepted,
        )
        return scaled(scale, steps), LineSearchState(inner_state, info)

    return transformation(init, update)
