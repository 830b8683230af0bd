"""OASIS: the absolute value of the Hessian's diagonal as the metric of a gradient step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import check_decay, check_params, check_positive, check_precision
from curvax._trees import all_finite
from curvax._types import Count, Params
from curvax.objective import Objective
from curvax.optim._diagonal import (
    divide,
    floored,
    hessian_diagonal,
    leaf_average,
    select_leaves,
    wide_zeros,
)
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._rule import (
    StepContext,
    StepResult,
    curvature_rule,
    zero_count,
    zero_number,
)


class OasisInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      floored_fraction: the fraction of entries with `|D| < alpha`. Where it is 0, and D exact,
        steps do not depend on the scale of params.
      num_nonfinite: the number of steps so far whose gradient or curvature was not finite.
    """

    floored_fraction: Float[Array, ""]
    num_nonfinite: Int[Array, ""]


class ScaleByOasisState(NamedTuple):
    """State of `scale_by_oasis`.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in; while it is 0 the updates are zero.
      curvature: D, in at least float32.
      info: `OasisInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    curvature: PyTree[Array]
    info: OasisInfo


def scale_by_oasis(b2: float = 0.99, alpha: float = 1e-2) -> optax.GradientTransformationExtraArgs:
    """Divide updates by OASIS's metric, with the (signed) curvature diagonal given as data.

    ```
    D = b2 D + (1 - b2) c                  when update(..., curvature=c); the first time D = c
    u = g / max(|D|, alpha)
    ```
    Before the first curvature the updates are zero.

    Args:
      b2: decay of the curvature average; it acts once a refresh.
      alpha: floor of the metric, in units of a curvature.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None)`. The curvature is a tree like params, of which leaves that the updates do not
      have are ignored; with None the rule goes on with the average in the state.
      `curvax.optim.curvature_rule` says what happens with numbers that are not finite. The state is
      a `ScaleByOasisState`.

    Raises:
      ValueError: The floor is not positive; or, at trace time, the curvature is unlike the updates
        (the message names the first path that differs).
      TypeError: A hyperparameter arrives in 16 bits.

    Cost: a tree like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.scale_by_oasis(alpha=0.5)
      >>> gradient, curvature = jnp.array([1.0, 9.0, 1.0]), jnp.array([-2.0, 3.0, 0.1])
      >>> updates, state = tx.update(gradient, tx.init(jnp.zeros(3)), curvature=curvature)
      >>> updates.tolist()
      [0.5, 3.0, 2.0]

    References: Jahani et al. (2021), Doubly adaptive scaled algorithm for machine learning using
      second-order information, https://arxiv.org/abs/2109.05198.
    """
    check_decay(b2=b2)
    check_positive(alpha=alpha)
    check_precision(b2=b2, alpha=alpha)

    def init(params: Params) -> ScaleByOasisState:
        check_params(params)
        info = OasisInfo(zero_number(), zero_count())
        return ScaleByOasisState(zero_count(), zero_count(), wide_zeros(params), info)

    def step(state: ScaleByOasisState, gradient: PyTree[Array], context: StepContext) -> StepResult:
        del context
        # Jahani et al.: u = Dhat^-1 g, Dhat = max(|D|, alpha) entry by entry.
        metric, fraction = floored(state.curvature, alpha)
        steps = jax.tree.map(divide, gradient, metric)
        return StepResult(updates=steps, state=state, info={"floored_fraction": fraction})

    return curvature_rule(init, step, take_in=taking_in_diagonals(b2))


def taking_in_diagonals(b2: Any) -> Callable[..., tuple[Any, Array]]:
    """Return the `take_in` of a rule: D is `b2 D + (1 - b2) c`, and at first c itself."""
    average = leaf_average(b2)

    def take_in(state: Any, curvature: PyTree[Array], gradient: PyTree[Array]) -> tuple[Any, Array]:
        # An estimate is of the whole model; under a mask this rule steps only a part of it.
        curvature = select_leaves(curvature, gradient)
        # D_0 is an estimate, not zero: the floor would take its place for 1 / (1 - b2) refreshes.
        is_first = state.num_refreshes == 0

        def of_leaf(c: Array, d: Array) -> Array:
            return jnp.where(is_first, c, average(c, d))

        diagonal = jax.tree.map(of_leaf, curvature, state.curvature)
        return state._replace(curvature=diagonal), all_finite(curvature)

    return take_in


def oasis(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    b2: float = 0.99,
    alpha: float = 1e-2,
    momentum: float | Array = 0.9,
    weight_decay: float = 0.0,
    max_kl: float | None = 1e-3,
    curvature_every: int = 1,
    num_first: int = 10,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """OASIS with a fixed rate and momentum, in the metric of Hutchinson's Hessian diagonal.

    Curvature: Hessian; structure: diagonal, by one Rademacher probe, averaged over steps; refresh:
    every `curvature_every` steps. The composition is
    ```
    estimator = curvax.optim.hessian_diagonal(objective)
    rule = estimating(scale_by_oasis(b2, alpha), estimator, curvature_every, seed, num_first)
    optax.chain(
        kl_clip(rule, learning_rate, max_kl),
        optax.trace(momentum),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    ```
    `curvax.oasis_auto(objective)` needs no learning rate.

    Args:
      learning_rate: a number or a schedule, such as 0.01; 1 is a Newton step where H is diagonal,
        and momentum and `max_kl` are off.
      objective: the `curvax.Objective` that is minimized.
      b2: decay of the curvature average.
      alpha: floor of the metric, in units of a curvature. The rate divided by it bounds the rate of
        any entry.
      momentum: decay of the sum of past steps.
      weight_decay: decoupled weight decay; it is multiplied by the learning rate.
      max_kl: the largest `|learning_rate u|_Dhat^2` of a step before momentum, see
        `curvax.kl_clip`; None for no limit. The Hessian is here in the place of the Fisher matrix.
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
      >>> tx = curvax.oasis(1.0, objective, momentum=0.0, max_kl=None)
      >>> w, batch = jnp.array([3.0, -2.0]), (jnp.array([[1.0, 5.0]]), jnp.zeros((1, 2)))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> (w + updates).tolist()
      [0.0, 0.0]

    References: Jahani et al. (2021), Doubly adaptive scaled algorithm for machine learning using
      second-order information, https://arxiv.org/abs/2109.05198: the metric. That a variant with
      a fixed rate and momentum exists is from memory; its form and defaults here are ours.

    Deviates: by the limit on the step. Without it, and with momentum as an average of gradients,
      the rate 0.1 diverged on a variational autoencoder and on a flow. With it rates from 0.001 to
      0.1 trained on these and five other small tasks, but for one of two flows at 0.1.
    """
    rule = scale_by_oasis(b2, alpha)
    estimated = estimating(rule, hessian_diagonal(objective), curvature_every, seed, num_first)
    return finish(
        estimated,
        learning_rate,
        max_kl=max_kl,
        momentum=momentum,
        weight_decay=weight_decay,
    )
