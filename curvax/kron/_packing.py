"""Factors and work between the named blocks of a layout and the owner blocks of a placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from curvax.kron._factors import BlockFactors, Factors, WeightedMean
from curvax.kron._kron_factor import STRUCTURES
from curvax.kron._layout import Block, Layout
from curvax.kron._owners import pad_to
from curvax.kron._placement import Member, OwnerBlock, Placement


def packed(placement: Placement, factors: Factors) -> Factors:
    """Turn the factors of the named blocks into those of owner blocks, which may be so already."""
    if any(block.name in factors.blocks for block in placement.blocks):
        return factors
    return pack_factors(placement, factors)


def pack_factors(placement: Placement, factors: Factors) -> Factors:
    """Turn the factors of the named blocks into those of owner blocks, on their owners."""
    blocks = of_every_device(placement, factors)
    for block in placement.blocks:
        blocks[block.name] = placement.owners.spread(join_factors(block, factors))
    return Factors(blocks, factors.diagonal)


def of_every_device(placement: Placement, factors: Factors) -> dict[str, BlockFactors]:
    """Return the factors of the blocks that are not placed, by name; a mask may lack some."""
    names = [block.name for block in placement.everywhere]
    return {name: factors.blocks[name] for name in names if name in factors.blocks}


def join_factors(block: OwnerBlock, factors: Factors) -> BlockFactors:
    """Join the factors of an owner block's members into stacks, padded by the mean eigenvalue.

    The inverse of `blockdiag(F, c I)` is `blockdiag(F^-1, I / c)`. With the mean eigenvalue for c
    the mean eigenvalue stays, by which damping is divided between A and G. Padding is linear in F,
    so that averages of padded factors are padded averages.
    """
    of_a, of_g, shifts = [], [], []
    for member in block.members:
        of_block = factors.blocks[member.block.name]
        a, g = member.oriented((of_block.a, of_block.g))
        of_a.append(a)
        of_g.append(g)
        if of_block.shift is not None:
            shifts.append(of_block.shift)
    return BlockFactors(
        a=_joined_means(block, of_a, side=1),
        g=_joined_means(block, of_g, side=2),
        second=None,
        shift=_joined_means(block, shifts, side=None) if block.is_penalized else None,
    )


def _joined_means(
    block: OwnerBlock, means: Sequence[WeightedMean], side: int | None
) -> WeightedMean:
    """Join means of the members into one stack; of empty slices the weight is 0."""
    stack = block.shape[0]
    totals, weights = [], []
    for member, mean in zip(block.members, means, strict=True):
        total = mean.total
        if side is not None:
            structure = STRUCTURES[block.structures[side - 1]]
            total = structure.padded_moment(total, block.shape[side])
        totals.append(total)
        # G has one weight for a block; here every slice has its own.
        num_slices = member.block.shape[0]
        weights.append(jnp.broadcast_to(mean.weight, num_slices))
    return WeightedMean(stacked(totals, stack), stacked(weights, stack))


def stacked(parts: Sequence[Array], stack: int) -> Array:
    """Join stacks, and fill up with zeros."""
    joined = jnp.concatenate(parts)
    return pad_to(joined, stack, *joined.shape[1:])


def place_factors(placement: Placement, factors: Factors) -> Factors:
    """Place the factors of owner blocks on their owners."""
    blocks = dict(factors.blocks)
    for block in placement.blocks:
        if block.name in blocks:  # a mask may have removed it
            blocks[block.name] = placement.owners.spread(blocks[block.name])
    return factors._replace(blocks=blocks)


def place_states(placement: Placement, states: dict[str, Any]) -> dict[str, Any]:
    """Place what is held of owner blocks, by name: inverses, bases, moments."""
    placed = dict(states)
    for block in placement.blocks:
        if block.name not in states:  # a part of the blocks, whose turn it is
            continue
        state = states[block.name]
        if block.precondition == "everyone":
            placed[block.name] = placement.owners.gathered(state, block.num_slices)
        else:
            placed[block.name] = placement.owners.spread(state)
    return placed


def unpack_factors(placement: Placement, factors: Factors) -> Factors:
    """Turn the factors of owner blocks into those of the named blocks; `pack_factors` undone."""
    blocks = of_every_device(placement, factors)
    for block in placement.blocks:
        if block.name not in factors.blocks:  # a mask has removed it
            continue
        for member, of_member in block.split(factors.blocks[block.name]):
            blocks[member.block.name] = _cut(member, of_member)
    return Factors(blocks, factors.diagonal)


def _cut(member: Member, of_owners: BlockFactors) -> BlockFactors:
    """Cut off what padding has added to the factors of a block."""
    a, g = member.oriented((of_owners.a, of_owners.g))
    a_shape, g_shape = member.block.factor_shapes
    a_corner = tuple(map(slice, a_shape))
    g_corner = tuple(map(slice, g_shape))
    # G and a penalty have one weight for all slices.
    shift = of_owners.shift
    if shift is not None:
        shift = WeightedMean(shift.total, shift.weight[0])
    return BlockFactors(
        a=WeightedMean(a.total[a_corner], a.weight),
        g=WeightedMean(g.total[g_corner], g.weight[0]),
        second=None,
        shift=shift,
    )


def on_owners(placement: Placement, refresh: Callable[..., Any]) -> Callable[..., Any]:
    """Return `refresh(layout, factors, block_state, damping)`, by every owner for its own slices.

    It returns for each block a state and a spectrum, of arrays whose leading axis is the stack.
    """
    owners = placement.owners

    def placed_refresh(layout: Layout, factors: Factors, block_state: Any, damping: Any) -> Any:
        # 1. Blocks that every device has, as without a placement.
        blocks: list[OwnerBlock] = []
        others: list[Block] = []
        for block in layout.blocks:
            if isinstance(block, OwnerBlock):
                blocks.append(block)
            else:
                others.append(block)
        everywhere = Layout(tuple(others), layout.leaves)
        states, spectra = refresh(everywhere, factors, block_state, damping)

        # 2. Owner blocks: inside `shard_map` a loop over slices, or a batch of several blocks, is
        # over those of one device. The compiler would send all slices to all devices for them.
        local = Layout(tuple(block.of_owner() for block in blocks), ())
        in_specs = owners.spec, owners.spec, PartitionSpec()
        by_owner = owners.each(partial(refresh, local), in_specs, owners.spec)
        names = [block.name for block in blocks]
        placed_factors = Factors({name: factors.blocks[name] for name in names}, {})
        placed_states = {name: block_state[name] for name in names}
        new_states, new_spectra = by_owner(placed_factors, placed_states, damping)
        # Numbers of each slice: diagnostics are made of them on every device.
        return states | new_states, spectra | owners.everywhere(new_spectra)

    return placed_refresh
