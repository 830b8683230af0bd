"""Where sums over the rows of a batch are taken: in one place, or by each device for its rows.

`fn(of_uses, by_row)` sums over rows, in arrays of uses `[b, s, t, ...]` and arrays by row
`[b, ...]`. What takes such sums is written once, and told where by one of the two functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from curvax.kron._factors import BlockFactors, Factors
from curvax.kron._owners import Owners, pad_to
from curvax.kron._packing import join_factors, of_every_device
from curvax.kron._placement import OwnerBlock, Placement

T = TypeVar("T")
RowSums: TypeAlias = Callable[..., Any]
"""`(fn, of_uses, by_row) -> sums`."""


def together(fn: Callable[..., T], of_uses: PyTree[Array], by_row: PyTree[Array] = ()) -> T:
    """Sum over all rows; where they are sharded, the compiler says how."""
    return fn(of_uses, by_row)


def by_device(batch: Owners, by_example: bool) -> RowSums:
    """Return the function by which every device sums over the rows that it has.

    The sums get an axis of the devices in front, over which they are still to be summed; it is
    spread, so that no device has more of them than before, and none is sent.

    Args:
      batch: the axes over which the batch is sharded.
      by_example: whether examples are told apart. Otherwise all rows are the positions of one.
    """
    # Sums over examples and positions are the same for any partition of the positions, too.
    use_axis = 0 if by_example else 2

    def sums(fn: Callable[..., T], of_uses: PyTree[Array], by_row: PyTree[Array] = ()) -> T:
        # Arrays that a `Partial` holds are whole on every device.
        fn = fn if isinstance(fn, Partial) else Partial(fn)

        def of_device(fn: Callable[..., T], of_uses: PyTree[Array], by_row: PyTree[Array]) -> T:
            partial_sums: T = jax.tree.map(lambda x: x[None], fn(of_uses, by_row))
            return partial_sums

        def of_first_device(x: Array) -> Array:
            return pad_to(x, batch.number, *x.shape[1:])

        lengths = {x.shape[use_axis] for x in jax.tree.leaves(of_uses)}
        lengths |= {len(x) for x in jax.tree.leaves(by_row)}
        remainders = {length % batch.number for length in lengths}
        if any(remainders):
            # A query without rows, say, is the same on all devices: only the first one's counts.
            first: T = jax.tree.map(of_first_device, of_device(fn, of_uses, by_row))
            return first
        in_specs = PartitionSpec(), PartitionSpec(*[None] * use_axis, batch.axes), batch.spec
        return batch.each(of_device, in_specs, batch.spec)(fn, of_uses, by_row)

    return sums


def collect_factors(placement: Placement, factors: Factors) -> Factors:
    """Sum factors `by_device` over the devices, those of owner blocks by their owners."""
    batch = placement.batch

    def share(x: Array) -> Array:
        # Sums have the axis of devices; a number, such as the weight of G, is of the whole batch.
        return x[0] if x.ndim else x / batch.number

    def of_device(factors: Factors) -> tuple[Factors, dict[str, BlockFactors]]:
        of_rows = jax.tree.map(share, factors)
        others = of_every_device(placement, of_rows)
        everywhere = lax.psum(Factors(others, of_rows.diagonal), batch.axes)
        on_owners = {}
        for block in placement.blocks:
            on_owners[block.name] = scatter_sums(placement, block, join_factors(block, of_rows))
        return everywhere, on_owners

    def spec(x: Array) -> PartitionSpec:
        return batch.spec if x.ndim else PartitionSpec()

    in_specs = (jax.tree.map(spec, factors),)
    out_specs = PartitionSpec(), scattered_spec(placement)
    others, on_owners = batch.each(of_device, in_specs, out_specs)(factors)
    return others._replace(blocks=others.blocks | placement.owners.spread(on_owners))


def factor_specs(placement: Placement) -> Factors:
    """Return how the factors of a placement are sharded: a tree with one entry for each block."""
    everywhere: Any = PartitionSpec()
    blocks: dict[str, Any] = {}
    for block in placement.layout.blocks:
        blocks[block.name] = placement.owners.spec if block.is_joined else everywhere
    return Factors(blocks, everywhere)


def scatter_sums(placement: Placement, block: OwnerBlock, stacks: T) -> T:
    """Sum stacks of an owner block over the devices of the batch, and leave each with its part.

    It is for the inside of a `shard_map` over the batch.
    """
    batch = placement.batch

    def scatter(x: Array) -> Array:
        num_rows = batch.few_rows(len(x), block.num_slices)
        if num_rows is None:
            part = lax.psum_scatter(x, batch.axes, scatter_dimension=0, tiled=True)
            return jnp.asarray(part)
        total = lax.psum(x[:num_rows], batch.axes)
        slots = len(x) // batch.number
        start = slots * lax.axis_index(batch.axes)
        part = lax.dynamic_slice_in_dim(total, start, slots, axis=0)
        return jnp.where(start < num_rows, part, 0)

    if not _owners_split_batch(placement):
        everywhere: T = lax.psum(stacks, batch.axes)
        return everywhere
    scattered: T = jax.tree.map(scatter, stacks)
    return scattered


def scattered_spec(placement: Placement) -> PartitionSpec:
    """Return how the results of `scatter_sums` are sharded."""
    return placement.batch.spec if _owners_split_batch(placement) else PartitionSpec()


def _owners_split_batch(placement: Placement) -> bool:
    """Tell whether owners are the devices of the batch, or parts of each of them."""
    batch, owners = placement.batch.axes, placement.owners.axes
    return owners[: len(batch)] == batch
