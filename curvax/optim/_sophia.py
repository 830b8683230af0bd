"""Sophia: clipped momentum over a lazily refreshed diagonal."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import check_at_least, check_decay, check_precision
from curvax._types import Batch, Params, PRNGKey
from curvax.estimate import gauss_newton_bartlett, hutchinson_diagonal
from curvax.objective import Objective
from curvax.optim._diagonal import scale_by_diagonal, with_decay_and_rate
from curvax.optim._estimating import estimating
from curvax.products import hvp


class SophiaInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      unclipped_fraction: fraction of entries with `|m| < gamma h`, the paper's win rate; tune gamma so that it lies in
        0.1 to 0.5 (a larger gamma raises it).
      num_nonfinite: steps so far whose gradient or curvature was not finite.
    """

    unclipped_fraction: Float[Array, ""]
    num_nonfinite: Int[Array, ""]


def scale_by_sophia(
    b1: float = 0.965, b2: float = 0.99, gamma: optax.ScalarOrSchedule = 0.05, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by Sophia's rule, with the curvature diagonal given as data.

    ```
    m = b1 m + (1 - b1) g
    h = b2 h + (1 - b2) c                 when update(..., curvature=c)
    u = clip(m / max(gamma h, eps), -1, 1)
    ```
    Entries with h <= 0 take a step of momentum's sign. Before the first curvature the updates are zero.

    Args:
      b1: decay of the gradient average.
      b2: decay of the curvature average, once a refresh.
      gamma: number or schedule of the step count; the fraction of unclipped entries grows with it.
      eps: floor of the denominator.

    Returns:
      `optax.GradientTransformationExtraArgs`: `update(updates, state, params, *, curvature=None)`, curvature a tree like
      params (leaves that the updates do not hold are ignored), or None to go on with what the state holds. A step with a
      non-finite gradient emits NaN and leaves the state as it was; a non-finite curvature is not taken in; both are
      counted in `state.info`.

    Raises:
      ValueError: at trace time: a curvature unlike the updates (naming the first differing path).
      TypeError: a hyperparameter that arrives in 16 bits.

    Cost: two trees like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0)
      >>> updates, _ = tx.update(jnp.array([1.0, 9.0]), tx.init(jnp.zeros(2)), curvature=jnp.array([2.0, 3.0]))
      >>> updates.tolist()
      [0.5, 1.0]

    References: Liu et al. (2023), Sophia, algorithm 3. Deviates: the batch factor of Gauss-Newton-Bartlett is in the
    estimate, not in the denominator; curvature is taken in before its first use, not after.
    """
    check_decay(b1=b1, b2=b2)
    check_at_least(0, eps=eps, gamma=gamma)
    check_precision(b1=b1, b2=b2, eps=eps, gamma=gamma)

    def average(h: PyTree[Array], curvature: PyTree[Array]) -> PyTree[Array]:
        return optax.tree.update_moment(curvature, h, b2, 1)

    def step(
        mu: PyTree[Array], h: PyTree[Array], count: Array, _: Array
    ) -> tuple[PyTree[Array], Array]:
        scale = gamma(count - 1) if callable(gamma) else gamma
        steps = jax.tree.map(lambda m, h: jnp.clip(m / jnp.maximum(scale * h, eps), -1, 1), mu, h)
        unclipped = optax.tree.sum(
            jax.tree.map(lambda m, h: jnp.sum(jnp.abs(m) < scale * h), mu, h)
        )
        return steps, jnp.asarray(unclipped / max(optax.tree.size(mu), 1))

    return scale_by_diagonal(b1, average, step, SophiaInfo)


def sophia_h(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    b1: float = 0.965,
    b2: float = 0.99,
    gamma: optax.ScalarOrSchedule = 0.01,
    weight_decay: float = 0.1,
    curvature_every: int = 10,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia with Hutchinson's estimate of the Hessian diagonal.

    Curvature: Hessian; structure: diagonal, by one Rademacher probe; refresh: every `curvature_every` steps.
    `theta -= learning_rate (clip(m / max(gamma h, 1e-12), -1, 1) + weight_decay theta)`. The composition is
    ```
    estimator = lambda params, batch, key: hutchinson_diagonal(hvp(objective, params, batch), params, key).mean
    optax.chain(
        estimating(scale_by_sophia(b1, b2, gamma), estimator, curvature_every, seed),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    ```
    which is also how to get at anything else: more probes, another product, masks, groups.

    Args:
      learning_rate: number or schedule; bounds the change of each entry in a step.
      objective: a `curvax.Objective`.
      b1: decay of the gradient average.
      b2: decay of the curvature average.
      gamma: number or schedule; see `SophiaInfo.unclipped_fraction`.
      weight_decay: decoupled, times the learning rate.
      curvature_every: steps between refreshes.
      seed: of the probes.

    Returns:
      `optax.GradientTransformationExtraArgs`: `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: at trace time: no `batch=` or `params`; an interval below 1.

    Cost: amortized, one gradient and a Hessian product (about 3 gradients with its building) / `curvature_every`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())      # Hessian 1
      >>> tx = curvax.sophia_h(0.1, objective, b1=0.0, b2=0.0, gamma=1.0, weight_decay=0.0)
      >>> w, batch = jnp.array(0.5), (jnp.ones(2), jnp.zeros(2))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> round(updates.item(), 6), optax.tree.get(state, "info").unclipped_fraction.item()
      (-0.05, 1.0)

    References: Liu et al. (2023), Sophia: a scalable stochastic second-order optimizer, algorithms 1 and 3.
    """

    def estimator(params: Params, batch: Batch, key: PRNGKey) -> PyTree[Array]:
        return hutchinson_diagonal(hvp(objective, params, batch), params, key).mean

    rule = estimating(scale_by_sophia(b1, b2, gamma), estimator, curvature_every, seed)
    return with_decay_and_rate(rule, weight_decay, learning_rate)


def sophia_g(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    b1: float = 0.965,
    b2: float = 0.99,
    gamma: optax.ScalarOrSchedule = 0.05,
    weight_decay: float = 0.1,
    curvature_every: int = 10,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia with the Gauss-Newton-Bartlett estimate of the Gauss-Newton diagonal.

    Curvature: Gauss-Newton, by sampled targets; structure: diagonal; refresh: every `curvature_every` steps. The same
    composition as `sophia_h`, with
    `estimator = lambda params, batch, key: gauss_newton_bartlett(objective, params, batch, key)`.

    Args:
      learning_rate: number or schedule; bounds the change of each entry in a step.
      objective: a `curvax.Objective` whose loss samples.
      b1: decay of the gradient average.
      b2: decay of the curvature average.
      gamma: number or schedule; see `SophiaInfo.unclipped_fraction`.
      weight_decay: decoupled, times the learning rate.
      curvature_every: steps between refreshes.
      seed: of the sampled targets.

    Returns:
      `optax.GradientTransformationExtraArgs`: `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: at trace time: no `batch=` or `params`; an interval below 1.
      TypeError: a loss that cannot sample.

    Cost: amortized, `1 + 1 / curvature_every` gradients.

    Deviates: from the reference code: the sampled gradient is not clipped before squaring (which would bias it low), and
    the curvature comes from the step's own batch, not from one more.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> tx = curvax.sophia_g(0.1, objective)
      >>> w, batch = jnp.zeros((3, 1)), (jnp.ones((4, 3)), jnp.ones((4, 1)))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> bool((abs(updates) <= 0.1).all())
      True

    References: Liu et al. (2023), Sophia: a scalable stochastic second-order optimizer, algorithms 2 and 3.
    """

    def estimator(params: Params, batch: Batch, key: PRNGKey) -> PyTree[Array]:
        return gauss_newton_bartlett(objective, params, batch, key)

    rule = estimating(scale_by_sophia(b1, b2, gamma), estimator, curvature_every, seed)
    return with_decay_and_rate(rule, weight_decay, learning_rate)
