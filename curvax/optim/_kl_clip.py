"""A bound on how far a step moves the model's predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from curvax._checks import check_at_least
from curvax._trees import inner_product, scaled
from curvax._types import Count, Params, Scalar
from curvax.optim._rule import resolve_schedule, transformation, zero_count


class KlClipState(NamedTuple):
    """State of `kl_clip`.

    Attributes:
      count: steps taken.
      inner_state: state of the wrapped transformation.
      scale: the factor by which the latest step was shortened, at most 1.
    """

    count: Count
    inner_state: Any
    scale: Scalar


def kl_clip(
    inner: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule, max_kl: float = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Shorten steps that change the model's predictions by more than `max_kl`.

    Let g be the gradient and `u = F^-1 g` the step that `inner` makes of it. To second order, the
    symmetric Kullback-Leibler divergence `KL(p, q) + KL(q, p)` between the predictions p before and
    q after the step `lr u` is `(lr u)' F (lr u) = lr^2 g.u`. The step becomes `u min(1, sqrt(max_kl
    / (lr^2 g.u)))`.

    Args:
      inner: the transformation that returns the preconditioned gradient, as
        `curvax.estimating(curvax.scale_by_kfac(layout), estimator)` does.
      learning_rate: the rate that will be applied afterwards, a number or a schedule.
      max_kl: the limit of the symmetric divergence of one step, in nats for each term of the mean
        loss.

    Returns:
      `optax.GradientTransformationExtraArgs`; the learning rate is still to be applied. The state
      is a `KlClipState`.

    Raises:
      ValueError: The limit is negative.

    Cost: one inner product of trees like params.

    Example:
      >>> import jax.numpy as jnp, optax, curvax
      >>> tx = curvax.kl_clip(optax.identity(), learning_rate=1.0, max_kl=1.0)
      >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> [round(x, 3) for x in updates.tolist()], round(state.scale.item(), 3)
      ([0.6, 0.8], 0.2)

    References: Ba, Grosse and Martens (2017), Distributed second-order optimization using
      Kronecker-factored approximations, section 5.
    """
    check_at_least(0, max_kl=max_kl)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> KlClipState:
        return KlClipState(zero_count(), inner.init(params), jnp.ones([], jnp.float32))

    def update(
        updates: PyTree, state: KlClipState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, KlClipState]:
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra)
        # Ba, Grosse and Martens (2017), section 5: divergence = lr^2 g.u, scale = min(1,
        # sqrt(max_kl / divergence)).
        rate = resolve_schedule(learning_rate, state.count)
        divergence = rate**2 * inner_product(updates, steps)
        # A divergence that is NaN, negative or zero does not exceed the limit, and divides nothing.
        exceeds = divergence > max_kl
        shortened = jnp.sqrt(max_kl / jnp.where(exceeds, divergence, 1))
        scale = jnp.where(exceeds, shortened, 1)
        count = jnp.asarray(optax.safe_increment(state.count))
        return scaled(scale, steps), KlClipState(count, inner_state, scale.astype(jnp.float32))

    return transformation(init, update)
