"""Which device owns which slices: blocks of about equal shape, joined into stacks that shard.

An `OwnerBlock` is a stack of slices of several blocks, padded to one shape, whose leading axis is
sharded over devices. To everything that works slice by slice (averages, inverses, eigenbases, the
step) it is a block like others; it differs in where its matrices are read from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from curvax._checks import describe
from curvax.capture import View
from curvax.kron._layout import Block, Layout, parts_of_equal_work
from curvax.kron._layout_table import placement_table
from curvax.kron._owners import Owners, pad_to

T = TypeVar("T")


class Member(NamedTuple):
    """A block whose slices are in an owner block.

    Attributes:
      block: the block.
      is_swapped: whether inputs and outputs are exchanged there, `V' = G V' A` for `A V G`.
    """

    block: Block
    is_swapped: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of its matrices, as they are in the owner block."""
        _, inputs, outputs = self.block.shape
        return (outputs, inputs) if self.is_swapped else (inputs, outputs)

    def oriented(self, pair: tuple[T, T]) -> tuple[T, T]:
        """Return what belongs to A and to G in the order of the owner block."""
        first, second = pair
        return (second, first) if self.is_swapped else pair


@dataclass(frozen=True)
class OwnerBlock(Block):
    """Slices of several blocks in one stack, padded to one shape; empty slices come last.

    Attributes:
      members: the blocks.
      owners: the devices over which the stack is spread.
      precondition: "owners" multiply their slices by the inverse, or "everyone" all.
    """

    members: tuple[Member, ...] = field(kw_only=True)
    owners: Owners = field(kw_only=True)
    precondition: str = "owners"

    @property
    def leaves(self) -> tuple[str, ...]:
        """See `Block`."""
        paths = [path for member in self.members for path in member.block.leaves]
        return tuple(dict.fromkeys(paths))

    @property
    def is_joined(self) -> bool:
        """See `Block`."""
        return True

    @property
    def fill(self) -> Float[np.ndarray, " s"]:
        """See `Block`."""
        stack, rows, columns = self.shape
        fill = np.zeros(stack)
        # Slices of the members follow each other; those after them are empty.
        for member, slices in self.slices():
            fill[slices] = math.prod(member.sides) / (rows * columns)
        return fill

    def slices(self) -> Iterator[tuple[Member, slice]]:
        """Give every member, and where its slices are in the stack."""
        start = 0
        for member in self.members:
            stop = start + member.block.shape[0]
            yield member, slice(start, stop)
            start = stop

    def split(self, stacks: T) -> Iterator[tuple[Member, T]]:
        """Give every member, and its slices of stacks."""
        for member, slices in self.slices():
            yield member, jax.tree.map(lambda x, slices=slices: x[slices], stacks)

    def matrix(self, leaves: Mapping[str, Any]) -> Float[Array, "s i o"]:
        """See `Block`."""
        return self.joined([member.block.matrix(leaves) for member in self.members])

    def sent(self, matrix: Float[Array, "s i o"]) -> Float[Array, "s i o"]:
        """See `Block`."""
        # First everywhere: the compiler would send more to join parts where they belong.
        return self.owners.spread(self.owners.everywhere(matrix))

    def returned(self, product: Float[Array, "s i o"]) -> Float[Array, "s i o"]:
        """See `Block`."""
        return self.owners.gathered(product, self.num_slices)

    @property
    def num_slices(self) -> int:
        """How many slices are not empty."""
        return sum(member.block.shape[0] for member in self.members)

    def joined(self, matrices: Sequence[Float[Array, "s i o"]]) -> Float[Array, "s i o"]:
        """Pad the matrices of every member with zeros, and join them into one stack."""
        stack, rows, columns = self.shape
        padded = []
        for member, x in zip(self.members, matrices, strict=True):
            turned = x.swapaxes(1, 2) if member.is_swapped else x
            padded.append(pad_to(turned, len(x), rows, columns))
        return pad_to(jnp.concatenate(padded), stack, rows, columns)

    def of_owner(self) -> OwnerBlock:
        """Return the part of the block that one owner has."""
        stack, rows, columns = self.shape
        shape = stack // self.owners.number, rows, columns
        return replace(self, kernel=virtual_kernel(self.name, shape))


def virtual_kernel(name: str, shape: tuple[int, ...]) -> View:
    """Return the kernel of an owner block, which is read by `matrix` and from no leaf."""
    return View("leaf", shape, (name,))


@dataclass(frozen=True)
class Placement:
    """Which device owns which slices of a layout's blocks; hashable, and printed as a table.

    Attributes:
      source: the layout as it was.
      layout: the layout with owner blocks in place of the blocks that are placed.
      owners: the devices.
      batch: the axes over which the batch is sharded, of the same mesh.
    """

    source: Layout
    layout: Layout
    owners: Owners
    batch: Owners

    def __str__(self) -> str:
        """One line for each owner block, and what a device does and holds."""
        return placement_table(self)

    @cached_property
    def blocks(self) -> tuple[OwnerBlock, ...]:
        """The owner blocks."""
        return tuple(block for block in self.layout.blocks if isinstance(block, OwnerBlock))

    @cached_property
    def everywhere(self) -> tuple[Block, ...]:
        """The blocks that every device has."""
        return tuple(block for block in self.layout.blocks if not isinstance(block, OwnerBlock))


def check_placement(placement: Placement, layout: Layout) -> None:
    """Raise unless a placement is of this layout."""
    if not isinstance(placement, Placement):
        raise TypeError(
            f"placement must be what curvax.kron_placement returns, got {describe(placement)}."
        )
    if placement.source != layout:
        raise ValueError(
            "placement is of another layout; make it of the layout that the rule has: "
            "curvax.kron_placement(layout, mesh)."
        )


def parts_of_placement(placement: Placement, unmasked: Layout, number: int) -> list[Layout]:
    """Divide the blocks of a placement as `parts_of_equal_work` divides those of its source.

    Args:
      placement: the placement.
      unmasked: its layout, without what a mask has removed.
      number: how many turns there are.
    """
    turns: dict[str, int] = {}
    for turn, part in enumerate(parts_of_equal_work(placement.source, number)):
        turns |= {block.name: turn for block in part.blocks}
    parts: list[list[Block]] = [[] for _ in range(number)]
    for block in unmasked.blocks:
        members = [block]
        if isinstance(block, OwnerBlock):
            members = [member.block for member in block.members]
        of_members = {turns[member.name] for member in members}
        if len(of_members) > 1:
            raise ValueError(
                f"the placement joins blocks that are refreshed in different turns: {block.name}. "
                f"Make it with curvax.kron_placement(..., turns={number})."
            )
        parts[of_members.pop()].append(block)
    return [Layout(tuple(part), unmasked.leaves) for part in parts]
