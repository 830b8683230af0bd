"""Parts of which rules on matrices are made: statistics, averages, and how long a step is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax._checks import check_at_least, check_decay
from curvax._trees import safe_divide
from curvax._types import Count
from curvax.kron._factors import WeightedMean, moving_average
from curvax.kron._kron_factor import STRUCTURES, Identity, KronFactor
from curvax.kron._layout import Block
from curvax.optim._matrices import Matrices, PerMatrix

Decay: TypeAlias = Any
"""A decay rate: a number in [0, 1], or a scalar array."""


class Sides(NamedTuple):
    """Something for both sides of a matrix `[i, o]`.

    Attributes:
      left: for the rows, of size i.
      right: for the columns, of size o.
    """

    left: Any
    right: Any


def init_statistics(block: Block, V: Matrices) -> Sides:
    """Return second moments of no gradients."""
    left, right = block.factor_shapes
    return Sides(_no_mean(left, V), _no_mean(right, V))


def _no_mean(shape: tuple[int, ...], V: Matrices) -> WeightedMean:
    # One weight for all slices: every gradient counts for each of them.
    return WeightedMean(jnp.zeros(shape, V.dtype), jnp.zeros([], V.dtype))


def outer_products(block: Block, of_left: Matrices, of_right: Matrices) -> Sides:
    """Return `V V'` of the first and `V' V` of the second, as the block's structures have them."""
    left, right = (STRUCTURES[name] for name in block.structures)
    # A second moment sums over rows of data: for the left side these are the columns of V.
    return Sides(left.second_moment(of_left.mT, None), right.second_moment(of_right, None))


def averaged_statistics(statistics: Sides, new: Sides, decay: Decay) -> Sides:
    """Return `decay L + (1 - decay) L_new` for both sides; their means are free of bias.

    The number 1 for the decay sums, `L + L_new`, as AdaGrad does.
    """
    sides = []
    for old, moment in zip(statistics, new, strict=True):
        if isinstance(decay, int | float) and decay == 1:
            # Of weight 1, so that the mean is the sum.
            sides.append(WeightedMean(old.total + moment, jnp.ones_like(old.weight)))
            continue
        of_step = WeightedMean(moment, jnp.ones_like(old.weight))
        sides.append(moving_average(old, of_step, decay))
    return Sides(*sides)


def factors_of(block: Block, statistics: Sides) -> tuple[KronFactor, KronFactor]:
    """Return both means as Kronecker factors of the block's structures."""
    left, right = (STRUCTURES[name] for name in block.structures)
    return left.from_moment(statistics.left.mean), right.from_moment(statistics.right.mean)


def identity_like(zeros: KronFactor) -> KronFactor:
    """Return the identity in the structure of a factor of zeros."""
    # The structure "identity" is one already, whatever it was made of; buffers are never shared.
    return jax.tree.map(jnp.copy, zeros) if isinstance(zeros, Identity) else zeros.damped(1.0)


def average(old: Array, new: Array, decay: Decay) -> Array:
    """Return `decay old + (1 - decay) new`, in the precision of `old`."""
    mean: Array = decay * old + (1 - decay) * new
    return mean.astype(old.dtype)  # a decay in float64 does not widen the state


def debiased(x: Array, decay: Decay, count: Count) -> Array:
    """Divide an average that began with zeros, `count` terms ago, by `1 - decay^count`.

    Kingma and Ba (2015), section 3. Before the first term, 0/0, it is zero.
    """
    weight = 1 - jnp.asarray(decay, x.dtype) ** count
    return safe_divide(x, jnp.broadcast_to(weight, x.shape))


def matrix_norm(x: Matrices) -> PerMatrix:
    """Return the Frobenius norm of every matrix."""
    return jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True))


class ScaleRule(NamedTuple):
    """How long the step of a matrix is: `U -> s U`, with a number s for every matrix.

    `curvax.optim.adam_norm()`, `momentum_norm()`, `rms_norm()`, `shape_norm()` and `unscaled()`
    make such rules.

    Attributes:
      init: `V -> state`, from zeros like the gradient V.
      average: `(state, V) -> state`, in every step.
      factor: `(state, U, M, count) -> s` for a step U and the momentum M, free of bias, after
        `count` steps with this one, `[s, 1, 1]` or a number; None for s = 1.
    """

    init: Callable[[Matrices], Any]
    average: Callable[[Any, Matrices], Any]
    factor: Callable[[Any, Matrices, Matrices, Count], PerMatrix | float] | None


def scaled(scale: ScaleRule, state: Any, U: Matrices, M: Matrices, count: Count) -> Matrices:
    """Give the steps the length that the rule wants."""
    return U if scale.factor is None else U * scale.factor(state, U, M, count)


def to_norm(norm: PerMatrix, U: Matrices) -> PerMatrix:
    """Return the number that gives a step this norm; a step of zeros stays one."""
    return safe_divide(norm, matrix_norm(U))


def unscaled() -> ScaleRule:
    """Leave steps as long as the method makes them."""
    return _stateless(None)


def rms_norm(rms: float = 0.2) -> ScaleRule:
    """Give the entries of every step the root mean square `rms`.

    AdamW's steps have one of about 0.2, so that its learning rates can be used: Liu et al. (2025),
    section 2.2, https://arxiv.org/abs/2502.16982.
    """
    check_at_least(0, rms=rms)

    def factor(state: Any, U: Matrices, M: Matrices, count: Count) -> PerMatrix:
        del state, M, count
        norm = jnp.full((len(U), 1, 1), rms * math.sqrt(U.shape[1] * U.shape[2]), U.dtype)
        return to_norm(norm, U)

    return _stateless(factor)


def shape_norm(rms: float | None = None) -> ScaleRule:
    """Multiply steps by a number that follows from their shape `[i, o]`: `sqrt(max(1, o / i))`.

    Polar factors of every width then change outputs by as much: Jordan et al. (2024), Muon. With
    `rms` the number is `rms sqrt(max(i, o))`, which gives the entries of a polar factor of full
    rank that root mean square. AdamW's steps have about 0.2: Liu et al. (2025), section 2.2,
    https://arxiv.org/abs/2502.16982.
    """
    if rms is not None:
        check_at_least(0, rms=rms)

    def factor(state: Any, U: Matrices, M: Matrices, count: Count) -> float:
        del state, M, count
        _, rows, columns = U.shape
        if rms is None:
            return math.sqrt(max(1, columns / rows))
        return rms * math.sqrt(max(rows, columns))

    return _stateless(factor)


def rms_at_most(rms: float = 1.1) -> ScaleRule:
    """Shorten steps whose entries have a root mean square above `rms`."""
    check_at_least(0, rms=rms)

    def factor(state: Any, U: Matrices, M: Matrices, count: Count) -> PerMatrix:
        del state, M, count
        largest = rms * math.sqrt(U.shape[1] * U.shape[2])
        return to_norm(jnp.minimum(matrix_norm(U), largest), U)

    return _stateless(factor)


def momentum_norm() -> ScaleRule:
    """Give every step the norm of the momentum, as a step of gradient descent has it."""

    def factor(state: Any, U: Matrices, M: Matrices, count: Count) -> PerMatrix:
        del state, count
        return to_norm(matrix_norm(M), U)

    return _stateless(factor)


def adam_norm(b2: Decay = 0.999, eps: float = 1e-8) -> ScaleRule:
    """Give every step the norm of Adam's, `M / (sqrt(v) + eps)`: Adam's grafting.

    The step has the direction of one method and the length of another: Agarwal et al. (2020),
    https://arxiv.org/abs/2002.11803; and Anil et al. (2020), section 2.4, for Shampoo. Memory: `i
    o` floats a matrix.

    Args:
      b2: decay of the average of squared gradients.
      eps: is added to its root.
    """
    check_decay(b2=b2)

    def average_squares(v: Matrices, V: Matrices) -> Matrices:
        return average(v, V * V, b2)

    def factor(v: Matrices, U: Matrices, M: Matrices, count: Count) -> PerMatrix:
        of_adam = M / (jnp.sqrt(debiased(v, b2, count)) + eps)
        return to_norm(matrix_norm(of_adam), U)

    return ScaleRule(jnp.zeros_like, average_squares, factor)


def _stateless(factor: Any) -> ScaleRule:
    def init(V: Matrices) -> None:
        del V

    def unchanged(state: None, V: Matrices) -> None:
        del V
        return state

    return ScaleRule(init, unchanged, factor)
