"""Which device owns which slices: blocks of about equal shape, joined into stacks that shard.

An `OwnerBlock` is a stack of slices of several blocks, padded to one shape, whose leading axis is
sharded over devices. To everything that works slice by slice (averages, inverses, eigenbases, the
step) it is a block like others; it differs in where its matrices are read from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from curvax._checks import check_choice, check_count, describe
from curvax.capture import View
from curvax.kron._layout import Block, Layout, parts_of_equal_work

T = TypeVar("T")

PRECONDITION = ("owners", "everyone")


@dataclass(frozen=True)
class Owners:
    """The devices that own slices, as axes of a mesh.

    Attributes:
      mesh: the mesh.
      axes: names of its axes over which slices are spread.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    @property
    def number(self) -> int:
        """How many parts there are."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def spec(self) -> PartitionSpec:
        """Leading axis of an array spread over the owners."""
        return PartitionSpec(self.axes)

    @property
    def mesh_here(self) -> Mesh | AbstractMesh:
        """The mesh as it is in this context, where axes may be those of the compiler for a time."""
        context = jax.sharding.get_abstract_mesh()
        return self.mesh if context.empty else context

    def spread(self, tree: T) -> T:
        """Place arrays on their owners, by their leading axis."""
        return self._placed(tree, self.spec)

    def everywhere(self, tree: T) -> T:
        """Place arrays on every device."""
        return self._placed(tree, PartitionSpec())

    def _placed(self, tree: T, spec: PartitionSpec) -> T:
        sharding = NamedSharding(self.mesh_here, spec)
        is_explicit = AxisType.Explicit in sharding.mesh.axis_types
        place = jax.sharding.reshard if is_explicit else lax.with_sharding_constraint
        placed: T = jax.tree.map(lambda x: place(x, sharding), tree)
        return placed


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

    members: tuple[Member, ...] = ()
    owners: Owners | None = None
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
        shares: list[float] = []
        for member in self.members:
            share = math.prod(member.sides) / (rows * columns)
            shares += [share] * member.block.shape[0]
        return np.pad(np.array(shares), (0, stack - len(shares)))

    def matrix(self, leaves: Mapping[str, Any]) -> Float[Array, "s i o"]:
        """See `Block`."""
        parts = []
        for member in self.members:
            x = member.block.matrix({path: leaves[path] for path in member.block.leaves})
            parts.append(x.swapaxes(1, 2) if member.is_swapped else x)
        joined = self.joined(parts)
        assert self.owners is not None
        if self.precondition == "everyone":
            return joined
        # Joined everywhere first: to join parts that are elsewhere each would send more.
        return self.owners.spread(self.owners.everywhere(joined))

    def joined(self, parts: Sequence[Array]) -> Array:
        """Pad `[stack, rows, columns]` of every member with zeros, and join them into one stack."""
        stack, rows, columns = self.shape
        padded = [_pad(x, x.shape[0], rows, columns) for x in parts]
        return _pad(jnp.concatenate(padded), stack, rows, columns)

    def of_owner(self) -> OwnerBlock:
        """Return the part of the block that one owner has."""
        assert self.owners is not None
        stack, *sides = self.shape
        return replace(self, kernel=_virtual(self.name, (stack // self.owners.number, *sides)))


def _pad(x: Array, *shape: int) -> Array:
    """Append zeros up to a shape."""
    return jnp.pad(x, [(0, size - here) for here, size in zip(x.shape, shape, strict=True)])


def _virtual(name: str, shape: tuple[int, ...]) -> View:
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
        return _table(self)

    @cached_property
    def blocks(self) -> tuple[OwnerBlock, ...]:
        """The owner blocks."""
        return tuple(block for block in self.layout.blocks if isinstance(block, OwnerBlock))


def kron_placement(
    layout: Layout,
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str] = ("data",),
    *,
    batch_axes: Sequence[str] | None = None,
    precondition: str = "owners",
    min_size: int = 64,
    turns: int = 1,
) -> Placement:
    """Spread Kronecker factors, inverses and their work over the devices of a mesh.

    Every slice of a block, with its factors A and G, belongs to one device. Blocks of about equal
    shape are joined into one stack, sharded over the axes by its leading axis: the smaller are
    padded, and a kernel may lie in it transposed, so that `[n, 4n]` and `[4n, n]` are one shape.
    Stacks are joined for as long as that lessens the work of a device.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      mesh: the mesh of the parameters.
      axes: axes of the mesh over whose devices the slices are spread.
      batch_axes: axes over which the batch is sharded; by default `axes`. Factors are summed where
        their rows are, and sent to the owners.
      precondition: "owners", who send steps, or "everyone": then inverses are sent when they are
        new, and held by all.
      min_size: blocks whose larger side is below this stay on every device.
      turns: for a rule with `stagger=True` its `inverse_every`: blocks that have their turns at
        different steps are not joined.

    Returns:
      A `Placement`, for `placement=` of `curvax.kfac`, `curvax.ekfac`, their rules and
      `curvax.kron_factors`. Blocks with two products, over time, or that share a leaf with such,
      stay on every device.

    Raises:
      ValueError: an axis is not one of the mesh's; `precondition` is unknown.

    Cost: a few milliseconds, once; no arrays are touched.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> objective = curvax.Objective(
      ...     lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], curvax.losses.squared_error())
      >>> params = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
      >>> batch = jnp.ones((4, 8)), jnp.zeros((4, 8))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> placement = curvax.kron_placement(layout, mesh, min_size=16)
      >>> print(placement)
      owners                  slices  on a device  shape    entries used
      ['up'] + ['down']            2            2  [8, 32]          100%
      on every device: nothing; a device holds 8.7 kB of factors, of 8.7 kB in all

    References: Osawa et al. (2019), Large-scale distributed second-order optimization using
      Kronecker-factored approximate curvature, https://arxiv.org/abs/1811.12019 (owners of layers);
      Pauloski et al. (2021), KAISA, https://arxiv.org/abs/2107.01739 (owners precondition, or all).

    Deviates: all devices run one program, so that what counts is the number of padded slices on
      each, which is the same for all, and not the sum of costs of the blocks that they own.
    """
    axes = _checked(mesh, axes, "axes")
    batch_axes = axes if batch_axes is None else _checked(mesh, batch_axes, "batch_axes")
    check_choice("precondition", precondition, dict.fromkeys(PRECONDITION))
    check_count(1, min_size=min_size)
    owners = Owners(mesh, axes)
    check_count(1, turns=turns)
    parts = parts_of_equal_work(layout, turns)
    groups: dict[Shape, list[Member]] = {}
    for block in _placeable(layout, min_size):
        (turn,) = (k for k, part in enumerate(parts) if block in part.blocks)
        shape, member = _oriented(block, turn)
        groups.setdefault(shape, []).append(member)
    joined = _join(groups, owners.number)
    blocks: list[Block] = []
    for shape, members in joined.items():
        slots = _slots(members, owners.number)
        name = " + ".join(member.block.name for member in members)
        blocks.append(
            OwnerBlock(
                name=name,
                kernel=_virtual(name, (slots * owners.number, shape.rows, shape.columns)),
                bias=None,
                uses=(),
                a_structure=shape.a_structure,
                g_structure=shape.g_structure,
                sharing="expand",
                is_penalized=shape.is_penalized,
                members=tuple(members),
                owners=owners,
                precondition=precondition,
            )
        )
    placed = {member.block.name for members in joined.values() for member in members}
    others = [block for block in layout.blocks if block.name not in placed]
    packed = Layout((*blocks, *others), layout.leaves)
    return Placement(layout, packed, owners, Owners(mesh, batch_axes))


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
        members = [m.block for m in block.members] if isinstance(block, OwnerBlock) else [block]
        of_members = {turns[member.name] for member in members}
        if len(of_members) > 1:
            raise ValueError(
                f"the placement joins blocks that are refreshed in different turns: {block.name}. "
                f"Make it with curvax.kron_placement(..., turns={number})."
            )
        parts[of_members.pop()].append(block)
    return [Layout(tuple(part), unmasked.leaves) for part in parts]


class Shape(NamedTuple):
    """What slices of one owner block have in common."""

    a_structure: str
    g_structure: str
    is_penalized: bool
    turn: int
    rows: int
    columns: int

    @property
    def work(self) -> int:
        """Multiplications of an inversion, of full sides."""
        sides = ((self.a_structure, self.rows), (self.g_structure, self.columns))
        return sum(size**3 for structure, size in sides if structure == "full")


def _checked(mesh: Mesh | AbstractMesh, axes: Sequence[str], name: str) -> tuple[str, ...]:
    """Return axes of a mesh, and raise if it has one of them not."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {describe(mesh)}.")
    if isinstance(axes, str):
        axes = (axes,)
    for axis in axes:
        check_choice(f"an axis of {name}", axis, mesh.shape)
    return tuple(axes)


def _placeable(layout: Layout, min_size: int) -> list[Block]:
    """Return the blocks that can be read and written whole, and whose factors are one product."""
    partly = {leaf.path for leaf in layout.leaves if leaf.kind == "kron" and leaf.outside}
    candidates = []
    for block in layout.blocks:
        is_plain = block.is_one_product and not block.has_transposed_uses
        is_large = max(block.shape[1:]) >= min_size and "full" in block.structures
        if is_plain and is_large and not partly.intersection(block.leaves):
            candidates.append(block)
    return candidates


def _oriented(block: Block, turn: int) -> tuple[Shape, Member]:
    """Return the shape of a block's slices with the smaller side first, and whether it was not."""
    sides = tuple(zip(block.shape[1:], block.structures, strict=True))
    first, second = sorted(sides)
    shape = Shape(first[1], second[1], block.is_penalized, turn, first[0], second[0])
    return shape, Member(block, is_swapped=(first, second) != sides)


def _slots(members: Sequence[Member], num_owners: int) -> int:
    """Return how many slices each owner has of a stack of these blocks."""
    return -(-sum(member.block.shape[0] for member in members) // num_owners)


def _join(groups: dict[Shape, list[Member]], num_owners: int) -> dict[Shape, list[Member]]:
    """Join groups pair by pair, the best first, while that lessens the work of a device."""
    groups = dict(groups)
    while True:
        best, gain = None, 0
        for x in groups:
            for y in groups:
                joined = _padded_to(x, y)
                if x >= y or joined is None:
                    continue
                apart = sum(shape.work * _slots(groups[shape], num_owners) for shape in (x, y))
                together = joined.work * _slots([*groups[x], *groups[y]], num_owners)
                if apart - together > gain:
                    best, gain = (x, y, joined), apart - together
        if best is None:
            return groups
        x, y, joined = best
        members = [*groups.pop(x), *groups.pop(y)]
        groups[joined] = [*groups.get(joined, []), *members]


def _padded_to(x: Shape, y: Shape) -> Shape | None:
    """Return the shape to which slices of two shapes can be padded; None if there is none."""
    if x[:4] != y[:4]:
        return None
    # A side of 1 is a multiple of the identity, which damping treats in a way of its own.
    if min(x.rows, y.rows) == 1 and x.rows != y.rows:
        return None
    return x._replace(rows=max(x.rows, y.rows), columns=max(x.columns, y.columns))


def _table(placement: Placement) -> str:
    """Print a placement."""
    header = ("owners", "slices", "on a device", "shape", "entries used")
    rows = []
    for block in placement.blocks:
        stack, *sides = block.shape
        number = sum(member.block.shape[0] for member in block.members)
        slots = stack // placement.owners.number
        rows.append((block.name, str(number), str(slots), str(sides), f"{block.fill.mean():.0%}"))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = (0, 3)
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    others = [block.name for block in placement.layout.blocks if block not in placement.blocks]
    here = _entries(others_of(placement)) + _entries(placement.blocks) // placement.owners.number
    everything = _entries(placement.source.blocks)
    lines.append(
        f"on every device: {', '.join(others) or 'nothing'}; a device holds "
        f"{4e-3 * here:.1f} kB of factors, of {4e-3 * everything:.1f} kB in all"
    )
    return "\n".join(lines)


def others_of(placement: Placement) -> tuple[Block, ...]:
    """Return the blocks that every device has."""
    return tuple(b for b in placement.layout.blocks if not isinstance(b, OwnerBlock))


def _entries(blocks: Sequence[Block]) -> int:
    """Count the entries of the factors of blocks."""
    return sum(math.prod(shape) for block in blocks for shape in block.factor_shapes)
