"""OASIS: the absolute value of the Hessian's diagonal as the metric of a gradient step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import check_decay, check_positive, check_precision
from curvax.objective import Objective
from curvax.optim._diagonal import (
    ScaleByDiagonalState,
    divide,
    floored,
    hessian_diagonal,
    leaf_average,
    scale_by_diagonal,
)
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._rule import StepContext, StepResult


class OasisInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      floored_fraction: the fraction of entries with `|D| < alpha`. Where it is 0, and D exact,
        steps do not depend on the scale of params.
      num_nonfinite: the number of steps so far whose gradient or curvature was not finite.
    """

    floored_fraction: Float[Array, ""]
    num_nonfinite: Int[Array, ""]


def scale_by_oasis(
    b1: float = 0.9, b2: float = 0.99, alpha: float = 1e-2
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by OASIS's rule, with the (signed) curvature diagonal given as data.

    ```
    m = b1 m + (1 - b1) g
    D = b2 D + (1 - b2) c                  when update(..., curvature=c); the first time D = c
    u = m / (1 - b1^t) / max(|D|, alpha)
    ```
    after t steps. Before the first curvature the updates are zero.

    Args:
      b1: decay of the gradient average; 0 gives the gradient itself.
      b2: decay of the curvature average; it acts once a refresh.
      alpha: floor of the metric, in units of a curvature.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None)`. The curvature is a tree like params, of which leaves that the updates do not
      have are ignored; with None the rule goes on with the average in the state.
      `curvax.optim.curvature_rule` says what happens with numbers that are not finite. The state is
      a `ScaleByDiagonalState`.

    Raises:
      ValueError: The floor is not positive; or, at trace time, the curvature is unlike the updates
        (the message names the first path that differs).
      TypeError: A hyperparameter arrives in 16 bits.

    Cost: two trees like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.scale_by_oasis(b1=0.0, alpha=0.5)
      >>> gradient, curvature = jnp.array([1.0, 9.0, 1.0]), jnp.array([-2.0, 3.0, 0.1])
      >>> updates, state = tx.update(gradient, tx.init(jnp.zeros(3)), curvature=curvature)
      >>> updates.tolist()
      [0.5, 3.0, 2.0]

    References: Jahani et al. (2021), Doubly adaptive scaled algorithm for machine learning using
      second-order information, https://arxiv.org/abs/2109.05198.

    Deviates: the average of gradients is corrected for its bias, as Adam's is.
    """
    check_decay(b1=b1, b2=b2)
    check_positive(alpha=alpha)
    check_precision(b1=b1, b2=b2, alpha=alpha)

    def step(
        state: ScaleByDiagonalState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        del gradient, context
        # Jahani et al.: u = Dhat^-1 m, Dhat = max(|D|, alpha) entry by entry.
        metric, fraction = floored(state.curvature, alpha)
        mu_hat = optax.tree.bias_correction(state.mu, b1, state.count + 1)
        steps = jax.tree.map(divide, mu_hat, metric)
        return StepResult(updates=steps, state=state, info={"floored_fraction": fraction})

    return scale_by_diagonal(b1, running_diagonal(b2), step, OasisInfo)


def running_diagonal(b2: Any) -> Callable[[Any, PyTree[Array]], PyTree[Array]]:
    """Return `(state, c) -> b2 D + (1 - b2) c`, with D in `state.curvature`; at first c itself."""
    average = leaf_average(b2)

    def averaged(state: Any, curvature: PyTree[Array]) -> PyTree[Array]:
        # D_0 is an estimate, not zero: the floor would take its place for 1 / (1 - b2) refreshes.
        is_first = state.num_refreshes == 0

        def of_leaf(c: Array, d: Array) -> Array:
            return jnp.where(is_first, c, average(c, d))

        diagonal: PyTree[Array] = jax.tree.map(of_leaf, curvature, state.curvature)
        return diagonal

    return averaged


def oasis(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    b1: float = 0.9,
    b2: float = 0.99,
    alpha: float = 1e-2,
    weight_decay: float = 0.0,
    curvature_every: int = 1,
    num_first: int = 10,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """OASIS with a fixed rate and momentum, in the metric of Hutchinson's Hessian diagonal.

    Curvature: Hessian; structure: diagonal, by one Rademacher probe, averaged over steps; refresh:
    every `curvature_every` steps. `theta -= learning_rate (u + weight_decay theta)` with u of
    `scale_by_oasis`. The composition is
    ```
    rule = scale_by_oasis(b1, b2, alpha)
    estimator = curvax.optim.hessian_diagonal(objective)
    optax.chain(
        estimating(rule, estimator, curvature_every, seed, num_first),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    ```
    `curvax.oasis_auto(objective)` needs no learning rate.

    Args:
      learning_rate: a number or a schedule, about `alpha`; 1 is a Newton step where H is diagonal.
      objective: the `curvax.Objective` that is minimized.
      b1: decay of the gradient average.
      b2: decay of the curvature average.
      alpha: floor of the metric, in units of a curvature. The rate divided by it bounds the rate of
        any entry.
      weight_decay: decoupled weight decay; it is multiplied by the learning rate.
      curvature_every: number of steps between refreshes.
      num_first: number of probes that the first curvature is the mean of.
      seed: the seed of the probes.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: The floor is not positive, an interval or `num_first` is below 1; or, at trace
        time, `batch=` or `params` is missing.

    Cost: at interval 1, about 3 gradients in FLOPs with the step's own, which XLA shares.

    Example: one step solves a separable quadratic
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> tx = curvax.oasis(1.0, objective, b1=0.0)
      >>> w, batch = jnp.array([3.0, -2.0]), (jnp.array([[1.0, 5.0]]), jnp.zeros((1, 2)))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> (w + updates).tolist()
      [0.0, 0.0]

    References: Jahani et al. (2021), Doubly adaptive scaled algorithm for machine learning using
      second-order information, https://arxiv.org/abs/2109.05198: the metric. That a variant with
      a fixed rate and momentum exists is from memory; its defaults here are ours.

    Deviates: as `scale_by_oasis` does.
    """
    rule = scale_by_oasis(b1, b2, alpha)
    estimated = estimating(rule, hessian_diagonal(objective), curvature_every, seed, num_first)
    return finish(estimated, learning_rate, weight_decay=weight_decay)
