"""Sums over examples and positions of which Kronecker factors are made.

Expand and reduce are the two ways to treat positions that share weights: Eschenhagen et al. (2023),
sections 3.1 and 3.2; expand is that of Grosse and Martens (2016) for convolutions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._batch import map_chunks, sum_over_chunks
from curvax._trees import out_of_range_if_negative
from curvax._types import at_least_float32
from curvax.capture import ChunkedInputs, PerUseArray, UseKind
from curvax.kron._factors import WeightedMean
from curvax.kron._kron_factor import STRUCTURES
from curvax.kron._layout import Block

# b: examples, s: stack, t: positions, i: inputs (with the 1 of a bias), o: outputs
Counted = Float[Array, "b s t"]
PerUse: TypeAlias = list[PerUseArray]
Chunks: TypeAlias = list[ChunkedInputs | None]


def input_moments(
    block: Block, inputs: PerUse, chunks: Chunks, counted: list[Counted]
) -> tuple[WeightedMean, WeightedMean | None]:
    """Return A of a block's uses, and of those of the transpose if there are any.

    Args:
      block: the block.
      inputs: the inputs of its uses.
      chunks: the same in chunks, which come first; None where there are none.
      counted: which positions count.
    """
    # In one part of an objective all uses of a block may be transposed.
    if not _of_orientation(block, False):
        moment = _no_inputs(block, counted[0].dtype)
    else:
        moment = _input_moment(block, inputs, chunks, counted, transposed=False)
    if not block.has_transposed_uses:
        return moment, None
    return moment, _input_moment(block, inputs, chunks, counted, transposed=True)


def output_moments(block: Block, g: PerUse, h: PerUse | None) -> list[Array]:
    """Return the sum of `g h'` of a block's uses, and if there are any of transposed ones."""
    if not _of_orientation(block, False):
        moments = [jnp.zeros(block.factor_shapes[1], at_least_float32(g[0]).dtype)]
    else:
        moments = [_output_moment(block, g, h, False)]
    if block.has_transposed_uses:
        moments.append(_output_moment(block, g, h, True))
    return moments


def diagonal_sums(of_uses: tuple[()], by_row: Any) -> dict[str, Array]:
    """Sum `u v` over examples for the leaves with entries in no block: the diagonal of the Fisher.

    They are widened before the product: in bfloat16 its rounding would show in the third digit.

    Args:
      of_uses: nothing, see `curvax.kron._row_sums`.
      by_row: gradients of examples `[b, *leaf]` by path, of u and of v; None where those are equal.
    """
    del of_uses
    gradients, others = by_row
    sums = {}
    for path, x in gradients.items():
        wide, other = at_least_float32(x), at_least_float32((others or gradients)[path])
        sums[path] = jnp.sum(wide * other, axis=0)
    return sums


def mean_inputs(
    block: Block, inputs: PerUse, chunks: Chunks, counted: list[Counted], transposed: bool
) -> WeightedMean:
    """Average the inputs of a block's uses of one orientation, over positions that count.

    The arguments are those of `input_moments`. The inputs `[s, i]` are those of the kernel alone,
    without the 1 of a bias; row numbers of a lookup are one-hot inputs.
    """
    # Sums over the positions of an example are what "reduce" begins with.
    pooled = dataclasses.replace(block, sharing="reduce", bias=None)
    totals, weights = [], []
    for k in _of_orientation(block, transposed):
        use = block.uses[k]
        by_row, counts = _of_use(pooled, use, inputs[k], chunks[k], counted[k])
        totals.append(jnp.sum(by_row, axis=0))
        weights.append(jnp.sum(counts, axis=0))
    return WeightedMean(_sum(totals), _sum(weights))


def summed_cotangents(block: Block, g: PerUse, transposed: bool) -> Float[Array, "s o"]:
    """Sum the cotangents of a block's uses of one orientation, over all positions."""
    sums = []
    for k in _of_orientation(block, transposed):
        sums.append(jnp.sum(at_least_float32(g[k]), axis=(0, 2)))
    return _sum(sums)


def counted_positions(block: Block, g: PerUse) -> list[Counted]:
    """Give 1 to the positions of every use that A is a mean over.

    Unless the block's choice is "all", they are those that have a cotangent: padding, units that
    are dead or not pooled, and branches not taken, have none.
    """

    def counted(x: PerUseArray) -> Counted:
        dtype = at_least_float32(x).dtype
        if block.positions == "all":
            return jnp.ones(x.shape[:-1], dtype)
        return jnp.any(x != 0, axis=-1).astype(dtype)

    return [counted(x) for x in g]


def _no_inputs(block: Block, dtype: Any) -> WeightedMean:
    """Return A of no use, with the weight 0."""
    total = jnp.zeros(block.factor_shapes[0], dtype)
    weight = jnp.zeros(block.shape[0], dtype)
    return WeightedMean(total, weight)


def _input_moment(
    block: Block, inputs: PerUse, chunks: Chunks, counted: list[Counted], transposed: bool
) -> WeightedMean:
    """Sum `a a'` of the inputs (with the 1 of a bias) of all uses, over positions that count.

    Expand sums over the positions t of all examples b; reduce over examples, of the mean over t:
    `sum_bt a a'` and `sum_b (mean_t a)(mean_t a)'`.
    """
    # A transposed use has its input on the outputs' side.
    structure = STRUCTURES[block.g_structure if transposed else block.a_structure]
    totals, weights = [], []
    for k in _of_orientation(block, transposed):
        use = block.uses[k]
        total, weight = _of_use(block, use, inputs[k], chunks[k], counted[k])
        totals.append(total)
        weights.append(weight)
    total, weight = _sum(totals), _sum(weights)
    if block.sharing != "reduce":
        return WeightedMean(total, weight)
    # An example with no position that counts has the mean 0/0; it is 0 and left out of the weight.
    mean = total / jnp.maximum(weight, 1)[..., None]
    num_examples = jnp.sum(weight > 0, axis=0).astype(mean.dtype)
    rows = mean.swapaxes(0, 1)
    return WeightedMean(structure.second_moment(rows, None), num_examples)


def _output_moment(
    block: Block, g: PerUse, h: PerUse | None, transposed: bool
) -> Float[Array, "s ..."]:
    """Sum `g h'` of the cotangents of all uses; of "reduce" the sum over positions comes first.

    Cotangents are of the mean loss, so that this sum over examples is G; no mean is taken.
    """
    structure = STRUCTURES[block.a_structure if transposed else block.g_structure]
    g = _rows_of_orientation(block, g, transposed)
    h = g if h is None else _rows_of_orientation(block, h, transposed)
    moments = []
    for x, y in zip(g, h, strict=True):
        # The second moment of rows with themselves costs half of what that with others does.
        other = None if y is x else flat(y)
        moments.append(structure.second_moment(flat(x), other))
    total = _sum(moments)
    if transposed and block.bias is not None:
        # On the inputs' side the bias has a row, which transposed uses leave alone.
        return structure.with_zero_row(total)
    return total


def _rows_of_orientation(block: Block, rows: PerUse, transposed: bool) -> PerUse:
    """Return the cotangents of all uses of one orientation; "reduce" sums them over positions."""
    chosen = [at_least_float32(rows[k]) for k in _of_orientation(block, transposed)]
    if block.sharing != "reduce":
        return chosen
    sums = [jnp.sum(x, axis=2, keepdims=True) for x in chosen]
    return [_sum(sums)]


def _of_orientation(block: Block, transposed: bool) -> list[int]:
    return [k for k, use in enumerate(block.uses) if use.transposed == transposed]


def _of_use(
    block: Block, use: UseKind, a: PerUseArray, chunks: ChunkedInputs | None, m: Counted
) -> tuple[Array, Array]:
    """Return what A is made of, with its weight, of one use: chunk by chunk if it has chunks."""
    # Over time, A is that of "expand": the moment of each time with itself.
    expand = block.sharing != "reduce"
    of_rows = functools.partial(_expanded_moment if expand else _summed_inputs, block, use)
    if chunks is None:
        return of_rows(a, m)

    def of_chunk(rows: tuple[Array, Counted]) -> tuple[Array, Array]:
        recorded, m = rows
        return of_rows(chunks.matrices(recorded), m)

    # Where all rows are one example, its positions are [row, position of the row].
    if len(m) == 1:
        stack, num_rows = m.shape[1], len(chunks.rows)
        by_row = m[0].reshape(stack, num_rows, -1)
        m = by_row.swapaxes(0, 1)
    # Expand sums over rows; reduce has a mean for each of them.
    over_chunks = sum_over_chunks if expand else map_chunks
    result: tuple[Array, Array] = over_chunks(of_chunk, (chunks.rows, m), chunks.size)
    return result


# m: 1 where a position counts, 0 where not
def _expanded_moment(
    block: Block, use: UseKind, a: PerUseArray, m: Counted
) -> tuple[Float[Array, "s ..."], Float[Array, " s"]]:
    """Sum `a a'` over all positions of one use, and count them."""
    structure = STRUCTURES[block.g_structure if use.transposed else block.a_structure]
    weight = jnp.sum(m, axis=(0, 2))
    if use.kind == "lookup":  # inputs are one-hot: `a a'` counts how often each row was looked up
        ids = flat(a)[..., 0]
        counts = _count_rows(ids, flat(m), _table_rows(block, use))
        counts = with_one(block, use, counts, weight)
        has_one = block.bias is not None and not use.transposed and use.biased
        return structure.moment_of_counts(counts, has_one), weight
    m = flat(m)
    # `where`, not a product: inputs that do not count may be infinite.
    wide = flat(a).astype(m.dtype)
    rows = jnp.where(m[..., None] > 0, wide, 0)
    rows = with_one(block, use, rows, m)
    return structure.second_moment(rows, None), weight


def _summed_inputs(
    block: Block, use: UseKind, a: PerUseArray, m: Counted
) -> tuple[Float[Array, "b s i"], Float[Array, "b s"]]:
    """Sum inputs over the positions of each example, and count them."""
    count = jnp.sum(m, axis=2)
    if use.kind == "lookup":
        count_rows = functools.partial(_count_rows, size=_table_rows(block, use))
        total = jax.vmap(count_rows)(a[..., 0], m)
    else:
        counting = jnp.where(m[..., None] > 0, a.astype(m.dtype), 0)
        total = jnp.sum(counting, axis=2)
    return with_one(block, use, total, count), count


def with_one(block: Block, use: UseKind, a: Array, one: Array) -> Array:
    """Append the bias's coordinate.

    It is `one` times the use's input of the bias where that is added, and 0 for a use without it;
    without a bias there is none.
    """
    if block.bias is None or use.transposed:
        return a
    coordinate = one * (use.one if use.biased else 0)
    last = coordinate[..., None]
    return jnp.concatenate([a, last], axis=-1)


def _table_rows(block: Block, use: UseKind) -> int:
    """Return how many rows the table of a lookup has."""
    return block.kernel.shape[2 if use.transposed else 1]


def _count_rows(ids: Array, m: Float[Array, "s t"], size: int) -> Float[Array, "s i"]:
    """Count how often each row was looked up, slice by slice of the stack.

    Row numbers out of range count nowhere.
    """
    known = out_of_range_if_negative(ids, size)

    def count(ids: Array, m: Array) -> Array:
        return jnp.zeros(size, m.dtype).at[ids].add(m, mode="drop")

    return jax.vmap(count)(known, m)


def flat(x: Array) -> Array:
    """Bring examples and positions into one axis: `[stack, rows, ...]`."""
    _, stack, _, *trailing = x.shape
    return x.swapaxes(0, 1).reshape(stack, -1, *trailing)


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)
