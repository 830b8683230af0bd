"""Sophia: clipped momentum over a lazily refreshed diagonal."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import check_at_least, check_decay, check_precision
from curvax._types import Batch, Params, PRNGKey
from curvax.estimate import gauss_newton_bartlett
from curvax.objective import Objective
from curvax.optim._diagonal import (
    ScaleByDiagonalState,
    hessian_diagonal,
    leaf_average,
    scale_by_diagonal,
)
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._rule import StepContext, StepResult, resolve_schedule


class SophiaInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      unclipped_fraction: the fraction of entries with `|m| < gamma h`, the paper's win rate. Tune
        gamma so that it lies in 0.1 to 0.5 (a larger gamma raises it).
      num_nonfinite: the number of steps so far whose gradient or curvature was not finite.
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
    Entries with h <= 0 take a step of momentum's sign. Before the first curvature the updates are
    zero.

    Args:
      b1: decay of the gradient average.
      b2: decay of the curvature average; it acts once a refresh.
      gamma: a number, or a schedule of the step count; the fraction of unclipped entries grows with
        it.
      eps: floor of the denominator.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None)`. The curvature is a tree like params, of which leaves that the updates do not
      have are ignored; with None the rule goes on with the average in the state.
      `curvax.optim.curvature_rule` says what happens with numbers that are not finite. The state is
      a `ScaleByDiagonalState`.

    Raises:
      ValueError: At trace time, the curvature is unlike the updates (the message names the first
        path that differs).
      TypeError: A hyperparameter arrives in 16 bits.

    Cost: two trees like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0)
      >>> gradient, curvature = jnp.array([1.0, 9.0]), jnp.array([2.0, 3.0])
      >>> updates, _ = tx.update(gradient, tx.init(jnp.zeros(2)), curvature=curvature)
      >>> updates.tolist()
      [0.5, 1.0]

    References: Liu et al. (2023), Sophia: a scalable stochastic second-order optimizer, algorithm
      3, https://arxiv.org/abs/2305.14342.

    Deviates: the batch factor of Gauss-Newton-Bartlett is in the estimate, not in the denominator;
      curvature is taken in before its first use, not after.
    """
    check_decay(b1=b1, b2=b2)
    check_at_least(0, eps=eps, gamma=gamma)
    check_precision(b1=b1, b2=b2, eps=eps, gamma=gamma)
    average_of_curvature = leaf_average(b2)

    def average_curvature(h: PyTree[Array], curvature: PyTree[Array]) -> PyTree[Array]:
        # Algorithm 3: h <- b2 h + (1 - b2) c.
        return jax.tree.map(average_of_curvature, curvature, h)

    def step(
        state: ScaleByDiagonalState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        del gradient, context
        scale = resolve_schedule(gamma, state.count)
        # Algorithm 3: u = clip(m / max(gamma h, eps), 1), entry by entry.
        steps = jax.tree.map(
            lambda m, h: _clipped_ratio(m, h, scale, eps), state.mu, state.curvature
        )
        # The win rate: how many entries are not clipped.
        counts = jax.tree.map(lambda m, h: _num_unclipped(m, h, scale), state.mu, state.curvature)
        fraction = optax.tree.sum(counts) / max(optax.tree.size(state.mu), 1)
        return StepResult(updates=steps, state=state, info={"unclipped_fraction": fraction})

    return scale_by_diagonal(b1, average_curvature, step, SophiaInfo)


@jax.jit
def _clipped_ratio(m: Array, h: Array, gamma: Array, eps: Array) -> Array:
    # Where h <= 0 the floor makes the ratio huge, and the clip leaves a step of momentum's sign.
    return jnp.clip(m / jnp.maximum(gamma * h, eps), -1, 1)


@jax.jit
def _num_unclipped(m: Array, h: Array, gamma: Array) -> Array:
    # Without the floor eps: an entry with h <= 0 is counted as clipped, as it should be.
    return jnp.sum(jnp.abs(m) < gamma * h)


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

    Curvature: Hessian; structure: diagonal, by one Rademacher probe; refresh: every
    `curvature_every` steps. `theta -= learning_rate (clip(m / max(gamma h, 1e-12), -1, 1) +
    weight_decay theta)`. The composition is
    ```
    estimator = curvax.optim.hessian_diagonal(objective)
    optax.chain(
        estimating(scale_by_sophia(b1, b2, gamma), estimator, curvature_every, seed),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    ```
    Compose it by hand for anything else: more probes, another product, masks, groups.

    Args:
      learning_rate: a number or a schedule; it bounds the change of each entry in a step.
      objective: the `curvax.Objective` that is minimized.
      b1: decay of the gradient average.
      b2: decay of the curvature average.
      gamma: a number or a schedule; tune it by `SophiaInfo.unclipped_fraction`.
      weight_decay: decoupled weight decay; it is multiplied by the learning rate.
      curvature_every: number of steps between refreshes.
      seed: the seed of the probes.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: An interval is below 1; or, at trace time, `batch=` or `params` is missing.

    Cost: amortized, one gradient and a Hessian product (about 3 gradients with its building) /
      `curvature_every`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> tx = curvax.sophia_h(0.1, objective, b1=0.0, b2=0.0, gamma=1.0, weight_decay=0.0)
      >>> w, batch = jnp.array(0.5), (jnp.ones(2), jnp.zeros(2))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> round(updates.item(), 6), optax.tree.get(state, "info").unclipped_fraction.item()
      (-0.05, 1.0)

    References: Liu et al. (2023), Sophia: a scalable stochastic second-order optimizer, algorithms
      1 and 3, https://arxiv.org/abs/2305.14342.
    """
    # Algorithm 1: z * H z, which may be negative; the clip guards against that.
    estimator = hessian_diagonal(objective)
    rule = estimating(scale_by_sophia(b1, b2, gamma), estimator, curvature_every, seed)
    return finish(rule, learning_rate, weight_decay=weight_decay)


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

    Curvature: Gauss-Newton, by sampled targets; structure: diagonal; refresh: every
    `curvature_every` steps. The same composition as `sophia_h`, with `estimator = lambda params,
    batch, key: gauss_newton_bartlett(objective, params, batch, key)`.

    Args:
      learning_rate: a number or a schedule; it bounds the change of each entry in a step.
      objective: the `curvax.Objective` that is minimized; its loss must be able to sample.
      b1: decay of the gradient average.
      b2: decay of the curvature average.
      gamma: a number or a schedule; tune it by `SophiaInfo.unclipped_fraction`.
      weight_decay: decoupled weight decay; it is multiplied by the learning rate.
      curvature_every: number of steps between refreshes.
      seed: the seed of the sampled targets.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: An interval is below 1; or, at trace time, `batch=` or `params` is missing.
      TypeError: The loss cannot sample.

    Cost: amortized, `1 + 1 / curvature_every` gradients.

    Deviates: from the reference code, in that the sampled gradient is not clipped before squaring
      (which would bias it low), and
    the curvature comes from the step's own batch, not from one more.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> tx = curvax.sophia_g(0.1, objective)
      >>> w, batch = jnp.zeros((3, 1)), (jnp.ones((4, 3)), jnp.ones((4, 1)))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> bool((abs(updates) <= 0.1).all())
      True

    References: Liu et al. (2023), Sophia: a scalable stochastic second-order optimizer, algorithms
      2 and 3, https://arxiv.org/abs/2305.14342.
    """

    def estimator(params: Params, batch: Batch, key: PRNGKey) -> PyTree[Array]:
        # Algorithm 2: B ghat * ghat, with ghat the gradient for targets sampled from the model.
        return gauss_newton_bartlett(objective, params, batch, key)

    rule = estimating(scale_by_sophia(b1, b2, gamma), estimator, curvature_every, seed)
    return finish(rule, learning_rate, weight_decay=weight_decay)
