"""Kronecker factors as they accumulate: sums with their weights, which average and merge."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax._checks import check_decay
from curvax._types import Params, at_least_float32
from curvax.kron._layout import Block, Layout, named_leaves

T = TypeVar("T")


class WeightedMean(NamedTuple):
    """A mean that is kept as sum and weight, so that means of two batches average and merge.

    Attributes:
      total: the sum.
      weight: what to divide by; `[stack]` (each slice counts its own rows) or a scalar.
    """

    total: Array
    weight: Array

    @property
    def mean(self) -> Array:
        """The mean; where nothing has been counted (0/0), zeros."""
        weight = jnp.where(self.weight > 0, self.weight, 1)
        # A weight for each slice stands before the other axes of the sum.
        trailing = [1] * (self.total.ndim - weight.ndim)
        return self.total / weight.reshape(*weight.shape, *trailing)


class LagFactors(NamedTuple):
    """Second moments between a time and the next, of a block over time; `[stack, size, size]` each.

    Both are sums over neighbors with the weights of A and G, which are over all times. So they are
    lags of one sequence with zeros around it, and of moments `[[A, A1], [A1', A]]` that are
    positive semidefinite, whatever the data are.

    Attributes:
      a: A1, the mean over positions of `a_(t+1) a_t'`, of zero where there is no next.
      g: G1, the sum over positions of `g_(t+1) g_t'`, as curvature of the mean loss.
      length: T, the mean over examples of how many positions count, `[stack]`.
    """

    a: WeightedMean
    g: WeightedMean
    length: WeightedMean


class BlockFactors(NamedTuple):
    """Second moments of one block, each of the shape that its structure accumulates in.

    That is `[stack, size, size]` for the structure "full", else `[stack, size]`.

    Attributes:
      a: A, the mean over positions (or examples) of `a a'`.
      g: G, the sum over positions (or examples) of `g g'`, as curvature of the mean loss.
      second: A and G of a second product, or None. Such is that of uses which multiply by the
        kernel's transpose: their `g g'` is on the inputs' side, the mean of their `a a'` on the
        outputs'. With `two_products="exact"` it may be that of a second part of the objective.
      shift: the curvature that penalties on params add to every eigenvalue, `[stack]`, or None.
      lags: the `LagFactors` of a block over time, or None.
    """

    a: WeightedMean
    g: WeightedMean
    second: tuple[WeightedMean, WeightedMean] | None
    shift: WeightedMean | None = None
    lags: LagFactors | None = None


class Factors(NamedTuple):
    """Curvature in the form that a layout gives it.

    Attributes:
      blocks: the second moments of every block, by name.
      diagonal: for leaves with entries in no block the diagonal of the Fisher, by path.
    """

    blocks: dict[str, BlockFactors]
    diagonal: dict[str, WeightedMean]


def moving_average(average: T, new: T, decay: float | Array) -> T:
    """Return the exponential moving average `decay average + (1 - decay) new`.

    It is that of sums and of weights, Martens and Grosse (2015), section 5. Started from zeros, the
    means need no bias correction: their weights decay with them. A block that was not used (an
    expert, a branch) adds no weight and keeps its mean of inputs.
    """
    check_decay(decay=decay)

    # Block by block, so that blocks of equal shapes are traced and lowered once.
    def is_block(x: object) -> bool:
        return isinstance(x, BlockFactors | WeightedMean)

    def averaged(x: Any, y: Any) -> Any:
        return _averaged(x, y, decay, 1 - decay)

    result: T = jax.tree.map(averaged, average, new, is_leaf=is_block)
    return result


@jax.jit
def _averaged(average: T, new: T, decay: Any, complement: Any) -> T:
    """Average the arrays of one block; the complement is `1 - decay`."""

    def averaged(x: Array, y: Array) -> Array:
        mean: Array = decay * x + complement * y
        return mean.astype(x.dtype)  # a decay in float64 does not widen the state

    result: T = jax.tree.map(averaged, average, new)
    return result


def init_factors(layout: Layout, params: Params) -> Factors:
    """Return factors of no data: zeros, in at least float32."""
    # Of weight 0, so that a merge with them changes nothing, and an average forgets them at once.
    leaves = named_leaves(layout, params)
    blocks = {block.name: _init_block(block, leaves) for block in layout.blocks}
    diagonal = {}
    for leaf in layout.leaves:
        if leaf.outside == "diagonal":
            total = jnp.zeros_like(at_least_float32(leaves[leaf.path]))
            diagonal[leaf.path] = WeightedMean(total, jnp.zeros([], total.dtype))
    return Factors(blocks, diagonal)


def _init_block(block: Block, leaves: dict[str, Array]) -> BlockFactors:
    """Return second moments of no data; those of inputs have a weight for every slice."""
    dtype = jnp.result_type(jnp.float32, *(leaves[path] for path in block.leaves))
    a_shape, g_shape = block.factor_shapes
    stack, _, _ = block.shape

    def zeros(shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> WeightedMean:
        return WeightedMean(jnp.zeros(shape, dtype), jnp.zeros(weight_shape, dtype))

    # Of transposed uses the inputs are on the outputs' side, and the cotangents on the inputs'.
    second = None
    if block.has_transposed_uses:
        second = zeros(a_shape, ()), zeros(g_shape, (stack,))
    elif block.has_second_product:
        second = zeros(a_shape, (stack,)), zeros(g_shape, ())
    # Slices that a placement has joined have each the weight of its own block.
    g_weight = (stack,) if block.is_joined else ()
    shift = zeros((stack,), g_weight) if block.is_penalized else None
    lags = None
    if block.is_over_time:
        length = zeros((stack,), (stack,))
        lags = LagFactors(zeros(a_shape, (stack,)), zeros(g_shape, ()), length)
    return BlockFactors(
        a=zeros(a_shape, (stack,)),
        g=zeros(g_shape, g_weight),
        second=second,
        shift=shift,
        lags=lags,
    )
