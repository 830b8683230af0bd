"""What diagonal methods share: running averages of gradients and of curvature diagonals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import check_like, check_params, is_masked
from curvax._trees import all_finite
from curvax._types import (
    Batch,
    Count,
    Params,
    PRNGKey,
    Scalar,
    at_least_float32,
    tree_at_least_float32,
)
from curvax.estimate import Estimate, hutchinson_diagonal
from curvax.objective import Objective
from curvax.optim._estimating import Estimator
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.products import hvp

LeafAverage: TypeAlias = Callable[[Array, Array], Array]


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
    b1: float | Array,
    average_curvature: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]],
    step: Callable[[ScaleByDiagonalState, PyTree[Array], StepContext], StepResult],
    info_type: Callable[[Array, Array], Any],
) -> optax.GradientTransformationExtraArgs:
    """Build a diagonal rule from how a method averages curvature and how it steps.

    Args:
      b1: decay of the average of gradients, `m <- b1 m + (1 - b1) g`.
      average_curvature: `(average, curvature) -> average`, both trees of at least float32.
      step: as in `curvature_rule`; it reads `state.mu` and `state.curvature`.
      info_type: the Info of the method, with a float32 field and `num_nonfinite`.
    """
    average_of_gradients = leaf_average(b1)

    def init(params: Params) -> ScaleByDiagonalState:
        check_params(params)
        # Averages start at zero. As published, AdaHessian corrects that bias and Sophia does not.
        return ScaleByDiagonalState(
            count=zero_count(),
            num_refreshes=zero_count(),
            mu=wide_zeros(params),
            curvature=wide_zeros(params),
            info=info_type(zero_number(), zero_count()),
        )

    def average(state: ScaleByDiagonalState, gradient: PyTree[Array]) -> ScaleByDiagonalState:
        mu = jax.tree.map(average_of_gradients, tree_at_least_float32(gradient), state.mu)
        return state._replace(mu=mu)

    def take_in(
        state: ScaleByDiagonalState, curvature: PyTree[Array], gradient: PyTree[Array]
    ) -> tuple[ScaleByDiagonalState, Array]:
        # An estimate is of the whole model; under a mask this rule steps only a part of it.
        curvature = select_leaves(curvature, gradient)
        averages = average_curvature(state.curvature, curvature)
        return state._replace(curvature=averages), all_finite(curvature)

    return curvature_rule(init, step, average=average, take_in=take_in)


def leaf_average(decay: float | Array, order: int = 1) -> LeafAverage:
    """Return the function `(x, average) -> decay average + (1 - decay) x^order` of one leaf."""

    # Compiled inside: a tree has many leaves of few shapes, and each shape is traced once.
    @jax.jit
    def average(x: Array, old: Array) -> Array:
        # 1 - decay is computed before any rounding to float32, where 0.999 has three digits less.
        return (1 - decay) * x**order + decay * old

    return average


def select_leaves(curvature: PyTree, updates: PyTree) -> PyTree[Array]:
    """Select the leaves of `curvature` that `updates` has, in at least float32.

    Raises:
      ValueError: The two trees differ; the message names the first path where they do.
      TypeError: The curvature is an `Estimate` in place of its mean.
    """
    # By its type, for the check below could only say that two trees differ.
    if isinstance(curvature, Estimate):
        raise TypeError(
            "curvature is an Estimate(mean, sem); pass its mean: "
            "estimator = lambda ...: estimate(...).mean."
        )
    check_like(curvature, updates, "curvature", "updates")
    return tree_at_least_float32(select_unmasked(curvature, updates))


def select_unmasked(tree: PyTree, updates: PyTree) -> PyTree:
    """Return `tree` with a `MaskedNode` wherever `updates` has one, so that both map together."""

    # A MaskedNode stands for a whole subtree of `tree`, so that it has to count as a leaf.
    def select(update: Any, subtree: Any) -> Any:
        return update if is_masked(update) else subtree

    return jax.tree.map(select, updates, tree, is_leaf=is_masked)


def hessian_diagonal(objective: Objective, num_probes: int = 1) -> Estimator:
    """Return the estimator of the Hessian's diagonal, for `curvax.estimating`.

    It is Hutchinson's `E[z * (H z)]` with random signs z, exact where H is diagonal. Entries may be
    negative.

    Args:
      objective: the `curvax.Objective` that is minimized.
      num_probes: number of products over which an estimate is averaged.

    Returns:
      `(params, batch, key) -> diagonal`, a tree like params.

    Raises:
      ValueError, TypeError: At trace time, as `curvax.hvp` and `curvax.hutchinson_diagonal` do.

    Cost: that of `num_probes` Hessian products.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> estimator = curvax.optim.hessian_diagonal(objective)
      >>> batch = jnp.array([[1.0, 5.0]]), jnp.zeros((1, 2))
      >>> estimator(jnp.ones(2), batch, jax.random.key(0)).tolist()
      [1.0, 25.0]

    References: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix.
    """

    def estimator(params: Params, batch: Batch, key: PRNGKey) -> PyTree[Array]:
        matvec = hvp(objective, params, batch)
        return hutchinson_diagonal(matvec, params, key, num_probes).mean

    return estimator


def floored(diagonal: PyTree[Array], floor: Any) -> tuple[PyTree[Array], Scalar]:
    """Return `max(|d|, floor)` of every entry, and the fraction of entries that the floor lifts."""
    metric = jax.tree.map(lambda d: _floored(d, floor), diagonal)
    counts = jax.tree.map(lambda d: _num_below(d, floor), diagonal)
    # A mask may take everything out: then none of no entries.
    fraction = jnp.asarray(optax.tree.sum(counts)) / max(optax.tree.size(diagonal), 1)
    return metric, fraction


# Compiled inside: a tree has many leaves of few shapes, and each shape is traced once.
@jax.jit
def _floored(d: Array, floor: Array) -> Array:
    return jnp.maximum(jnp.abs(d), floor)


@jax.jit
def _num_below(d: Array, floor: Array) -> Array:
    return jnp.sum(jnp.abs(d) < floor)


@jax.jit
def divide(x: Array, d: Array) -> Array:
    """Return `x / d`, compiled inside."""
    return x / d


def wide_zeros(params: Params) -> PyTree[Array]:
    """Return fresh zeros like params, in at least float32."""
    return jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
