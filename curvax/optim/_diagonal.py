"""The step that diagonal methods share: momentum, an average of curvature taken in when it comes, guards, diagnostics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import check_like, check_params, is_masked
from curvax._trees import all_finite, keep_unless
from curvax._types import Count, Params, at_least_float32, tree_at_least_float32
from curvax.estimate import Estimate

T = TypeVar("T")

Average: TypeAlias = Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]]
"""`(held, curvature) -> held`: take a new curvature in."""

Step: TypeAlias = Callable[
    [PyTree[Array], PyTree[Array], Array, Array], tuple[PyTree[Array], Float[Array, ""]]
]
"""`(mu, held, count, num_refreshes) -> (steps, measure)`; counts include this step; measure goes to the Info."""


class ScaleByDiagonalState(NamedTuple):
    """State of a diagonal method.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in; while it is 0 the updates are zero.
      mu: average of gradients, in at least float32.
      curvature: average of (a function of) curvature diagonals, in at least float32.
      info: diagnostics of the latest step, a NamedTuple of the method.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    mu: PyTree[Array]
    curvature: PyTree[Array]
    info: Any


def scale_by_diagonal(
    b1: float | Array, average: Average, step: Step, info: Callable[[Array, Array], Any]
) -> optax.GradientTransformationExtraArgs:
    """Build a transformation from how a method averages curvature and how it steps.

    What they share: curvature comes as data, `update(updates, state, params, *, curvature=None)`, a tree like params of
    which the leaves that the updates hold are kept; it is taken in before the step; without any so far the step is zero.
    A gradient that is not finite gives an update of NaN (seen by `optax.apply_if_finite`) and leaves the state as it was;
    a curvature that is not finite is not taken in; `info.num_nonfinite` counts both. (`optax.apply_if_finite` restores the
    state and with it this count, and keeps its own, `notfinite_count`.)

    Args:
      b1: decay of the gradient average.
      average: how curvature is taken in.
      step: from gradient average and held curvature to the step.
      info: `(measure, num_nonfinite) -> Info`.
    """

    def init(params: Params) -> ScaleByDiagonalState:
        check_params(params)
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        count = lambda: jnp.zeros([], jnp.int32)
        return ScaleByDiagonalState(
            count(), count(), zeros(), zeros(), info(jnp.zeros([], jnp.float32), count())
        )

    def update(
        updates: PyTree,
        state: ScaleByDiagonalState,
        params: Params | None = None,
        *,
        curvature: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByDiagonalState]:
        del params, extra
        good = finite = all_finite(updates)
        mu = optax.tree.update_moment(tree_at_least_float32(updates), state.mu, b1, 1)
        held, num_refreshes = state.curvature, state.num_refreshes
        if curvature is not None:
            curvature = select_leaves(curvature, updates)
            finite = good & all_finite(curvature)
            held = keep_unless(finite, average(held, curvature), held)
            num_refreshes = num_refreshes + finite

        count = jnp.asarray(optax.safe_increment(state.count))
        steps, measure = step(mu, held, count, num_refreshes)
        amplitude = jnp.where(good, jnp.where(num_refreshes > 0, 1, 0), jnp.nan)
        steps = jax.tree.map(
            lambda s, u: jnp.where(amplitude == 0, 0, amplitude * s).astype(u.dtype), steps, updates
        )
        num_nonfinite = state.info.num_nonfinite + ~finite
        new = ScaleByDiagonalState(
            count, num_refreshes, mu, held, info(measure.astype(jnp.float32), num_nonfinite)
        )
        old = state._replace(info=state.info._replace(num_nonfinite=num_nonfinite))
        return steps, keep_unless(good, new, old)

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def select_leaves(curvature: PyTree, updates: PyTree) -> PyTree[Array]:
    """Keep the leaves of `curvature` that `updates` holds (a mask or partition may have taken some out), widened.

    Raises:
      ValueError: naming the first path where the two differ.
      TypeError: an `Estimate` in place of its mean.
    """
    if isinstance(curvature, Estimate):
        raise TypeError(
            "curvature is an Estimate(mean, sem); pass its mean: estimator = lambda ...: estimate(...).mean."
        )
    check_like(curvature, updates, "curvature", "updates")
    own = jax.tree.map(lambda u, c: u if is_masked(u) else c, updates, curvature, is_leaf=is_masked)
    return tree_at_least_float32(own)


def with_decay_and_rate(
    rule: optax.GradientTransformation,
    weight_decay: optax.ScalarOrSchedule,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Finish a rule as optimizer: decoupled weight decay, then the (negative) learning rate on both."""
    return optax.chain(
        rule, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
