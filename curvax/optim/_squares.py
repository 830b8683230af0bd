"""Squares of gradients as a metric, without the root: AdaGrad-SQR and Adam-SQR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import check_decay, check_params, check_positive, check_precision
from curvax._types import Count, Params, Scalar, tree_at_least_float32
from curvax.optim._diagonal import divide, floored, leaf_average, wide_zeros
from curvax.optim._rule import (
    StepContext,
    StepResult,
    curvature_rule,
    transformation,
    zero_count,
    zero_number,
)


class SquaresInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      floored_fraction: the fraction of entries of B that the floor lifts. Steps do not depend on
        the scale of params where it is 0.
      num_nonfinite: the number of steps so far whose gradient, or its square, was not finite.
    """

    floored_fraction: Scalar
    num_nonfinite: Int[Array, ""]


class ScaleBySquaresState(NamedTuple):
    """State of `scale_by_adagrad_sqr` and `scale_by_adam_sqr`.

    Attributes:
      count: steps taken.
      nu: the sum, or the average, of squared gradients, in at least float32.
      info: `SquaresInfo`.
    """

    count: Count
    nu: PyTree[Array]
    info: SquaresInfo


def scale_by_adagrad_sqr(eps: float = 0.1) -> optax.GradientTransformationExtraArgs:
    """Divide the gradient by the sum of its squares: `u = g / max(sum g^2, eps)`.

    Without AdaGrad's root, `u` turns into `u / v` where params are measured in units v: it has the
    unit of params divided by that of the loss, as a Newton step has but for the loss. It is
    made for a step length that is chosen by the loss, `curvax.optim.scale_by_sania`.

    Args:
      eps: the floor, in units of a squared gradient.

    Returns:
      `optax.GradientTransformationExtraArgs`; needs gradients only. `curvax.optim.curvature_rule`
      says what happens with gradients that are not finite, among which is one whose squares are
      not. The state is a `ScaleBySquaresState`.

    Raises:
      ValueError: The floor is not positive.
      TypeError: A hyperparameter arrives in 16 bits.

    Cost: a tree like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> rule = curvax.optim.scale_by_adagrad_sqr(eps=1e-6)
      >>> state = rule.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     u, state = rule.update(jnp.array([2.0, -0.5]), state)
      >>> u.tolist()
      [0.25, -1.0]

    References: Abdukhakimov et al. (2023), SANIA: Polyak-type optimization framework leads to scale
      invariant stochastic algorithms, https://arxiv.org/abs/2312.17369, and the authors' code, of
      which the floor 0.1 is.
    """

    def add_square(g: Array, total: Array) -> Array:
        return total + g**2

    return _scale_by_squares(add_square, lambda nu, count: nu, eps)


def scale_by_adam_sqr(
    b2: float | Array = 0.999, eps: float = 0.1
) -> optax.GradientTransformationExtraArgs:
    """Divide the gradient by the average of its squares: `u = g / max(v / (1 - b2^t), eps)`.

    With `v = b2 v + (1 - b2) g^2` as in Adam, but without its root and without an average of
    gradients; see `scale_by_adagrad_sqr`.

    Args:
      b2: decay of the average of squares.
      eps: the floor, in units of a squared gradient.

    Returns:
      As `scale_by_adagrad_sqr` does.

    Raises:
      ValueError: The floor is not positive, or the decay is outside [0, 1).
      TypeError: A hyperparameter arrives in 16 bits.

    Cost: a tree like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> rule = curvax.optim.scale_by_adam_sqr(b2=0.5, eps=0.01)
      >>> u, state = rule.update(jnp.array([2.0, 0.05]), rule.init(jnp.zeros(2)))
      >>> [round(x, 4) for x in u.tolist()], state.info.floored_fraction.item()
      ([0.5, 5.0], 0.5)

    References: see `scale_by_adagrad_sqr`.
    """
    check_decay(b2=b2)
    check_precision(b2=b2)

    def free_of_bias(nu: PyTree[Array], count: Array) -> PyTree[Array]:
        debiased: PyTree[Array] = optax.tree.bias_correction(nu, b2, count)
        return debiased

    return _scale_by_squares(leaf_average(b2, order=2), free_of_bias, eps)


def _scale_by_squares(
    add_square: Callable[[Array, Array], Array],
    free_of_bias: Callable[[PyTree[Array], Array], PyTree[Array]],
    eps: Any,
) -> optax.GradientTransformationExtraArgs:
    """Build the rule from how squares add up: `(g, nu) -> nu` of a leaf, `(nu, count) -> B`."""
    check_positive(eps=eps)
    check_precision(eps=eps)

    def init(params: Params) -> ScaleBySquaresState:
        check_params(params)
        info = SquaresInfo(zero_number(), zero_count())
        return ScaleBySquaresState(zero_count(), wide_zeros(params), info)

    def average(state: ScaleBySquaresState, gradient: PyTree[Array]) -> ScaleBySquaresState:
        nu = jax.tree.map(add_square, tree_at_least_float32(gradient), state.nu)
        return state._replace(nu=nu)

    def step(
        state: ScaleBySquaresState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        # Algorithm of Adam-SQR: B = max(v / (1 - b2^t), eps), u = B^-1 g; this step is in B.
        diagonal = free_of_bias(state.nu, jnp.asarray(state.count + 1))
        metric, fraction = floored(diagonal, eps)
        steps = jax.tree.map(divide, gradient, metric)
        return StepResult(updates=steps, state=state, info={"floored_fraction": fraction})

    rule = curvature_rule(init, step, average=average)

    def update(
        updates: PyTree[Array],
        state: ScaleBySquaresState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[PyTree[Array], Any]:
        # An infinite square would stay in B for ever. To the rule its gradient is not finite.
        squares = average(state, updates).nu
        marked = jax.tree.map(_nan_unless_finite, updates, squares)
        return rule.update(marked, state, params, **extra)

    return transformation(init, update)


def _nan_unless_finite(g: Array, square: Array) -> Array:
    return jnp.where(jnp.isfinite(square), g, jnp.nan)
