"""Building a placement: blocks of about equal shape are joined, while that saves work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from curvax._checks import check_choice, check_count, describe
from curvax.kron._layout import Block, Layout, parts_of_equal_work
from curvax.kron._owners import Owners
from curvax.kron._placement import Member, OwnerBlock, Placement, virtual_kernel

PRECONDITION = ("owners", "everyone")


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
      min_size: blocks whose larger side is below this stay on every device, as a slice does that
        is alone in its shape.
      turns: for a rule with `stagger=True` its `inverse_every`: blocks that have their turns at
        different steps are not joined.

    Returns:
      A `Placement`, for `placement=` of `curvax.kfac`, `curvax.ekfac`, their rules and
      `curvax.kron_factors`. Its `layout`, with owner blocks in it, goes with their factors, to
      `curvax.kron_inverse` for instance. Blocks that are used transposed too, over time, or whose
      leaves have entries in no block stay on every device.

    Raises:
      ValueError: an axis is not one of the mesh's; `precondition` is unknown.

    Cost: once, about 0.1 s for 50 shapes; no arrays are touched. In use, sums over the rows of a
      device are padded before they are sent: for a time it has a whole stack of them.

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
      shape  slices  on a device  full  of blocks
      8x32   2       2            100%  ['up'] + ['down']
      on every device: no other block
      a device has 8.7 kB of 8.7 kB of factors

    References: Osawa et al. (2019), Large-scale distributed second-order optimization using
      Kronecker-factored approximate curvature, https://arxiv.org/abs/1811.12019 (owners of layers);
      Pauloski et al. (2021), KAISA, https://arxiv.org/abs/2107.01739 (owners precondition, or all).

    Deviates: all devices run one program, so that what counts is the number of padded slices on
      each, which is the same for all, and not the sum of costs of the blocks that they own.
    """
    axes = _checked(mesh, axes, "axes")
    batch_axes = axes if batch_axes is None else _checked(mesh, batch_axes, "batch_axes")
    check_choice("precondition", precondition, dict.fromkeys(PRECONDITION))
    check_count(1, min_size=min_size, turns=turns)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be what curvax.kron_layout returns, got {describe(layout)}.")
    owners = Owners(mesh, axes)
    # 1. Blocks of one shape and one turn together.
    groups: dict[Shape, list[Member]] = {}
    for turn, part in enumerate(parts_of_equal_work(layout, turns)):
        for block in _placeable(part, min_size):
            shape, member = _oriented(block, turn)
            groups.setdefault(shape, []).append(member)
    # 2. Shapes that are padded to one.
    groups = _join(groups, owners.number)
    if owners.number > 1:
        # A stack with room for as many slices on every device as there are saves nothing.
        groups = {
            shape: members
            for shape, members in groups.items()
            if _slots(members, owners.number) < _num_slices(members)
        }
    # 3. What is not placed stays as it is.
    placed = {member.block.name for members in groups.values() for member in members}
    blocks: list[Block] = []
    for shape, members in groups.items():
        blocks.append(_owner_block(shape, members, owners, precondition))
    blocks += [block for block in layout.blocks if block.name not in placed]
    packed = Layout(tuple(blocks), layout.leaves)
    return Placement(layout, packed, owners, Owners(mesh, batch_axes))


class Shape(NamedTuple):
    """What slices of one owner block have in common.

    Attributes:
      kind: structures of both factors, whether a penalty adds to them, and their turn.
      rows: the smaller side.
      columns: the larger side.
    """

    kind: tuple[str, str, bool, int]
    rows: int
    columns: int

    @property
    def work(self) -> int:
        """Multiplications of an inversion, of full sides."""
        a_structure, g_structure, _, _ = self.kind
        work = 0
        if a_structure == "full":
            work += self.rows**3
        if g_structure == "full":
            work += self.columns**3
        return work


def _checked(mesh: Mesh | AbstractMesh, axes: Sequence[str], name: str) -> tuple[str, ...]:
    """Return axes of a mesh, and raise if it has one of them not."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {describe(mesh)}.")
    # One name is a sequence of letters, too.
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in names:
        check_choice(f"an axis of {name}", axis, mesh.shape)
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"{name} must be different axes of the mesh, at least one, got {names}.")
    return names


def _placeable(layout: Layout, min_size: int) -> list[Block]:
    """Return the blocks that can be read and written whole, and whose factors are one product."""
    partly = {leaf.path for leaf in layout.leaves if leaf.kind == "kron" and leaf.outside}
    candidates = []
    for block in layout.blocks:
        is_plain = block.is_one_product and not block.has_transposed_uses
        # Diagonal factors cost nothing that would be worth sending.
        is_large = max(block.shape[1:]) >= min_size and "full" in block.structures
        is_all = not partly.intersection(block.leaves)
        if is_plain and is_large and is_all:
            candidates.append(block)
    return candidates


def _oriented(block: Block, turn: int) -> tuple[Shape, Member]:
    """Return the shape of a block's slices with the smaller side first, and whether it was not."""
    _, inputs, outputs = block.shape
    sides = (inputs, block.a_structure), (outputs, block.g_structure)
    # Of a square the structures decide, so that equal blocks have equal shapes.
    first, second = sorted(sides)
    (rows, a_structure), (columns, g_structure) = first, second
    kind = a_structure, g_structure, block.is_penalized, turn
    is_swapped = (first, second) != sides
    return Shape(kind, rows, columns), Member(block, is_swapped)


def _owner_block(
    shape: Shape, members: Sequence[Member], owners: Owners, precondition: str
) -> OwnerBlock:
    """Join the slices of the members into a stack of as many for each owner."""
    a_structure, g_structure, is_penalized, _ = shape.kind
    name = " + ".join(member.block.name for member in members)
    stack = owners.number * _slots(members, owners.number)
    return OwnerBlock(
        name=name,
        kernel=virtual_kernel(name, (stack, shape.rows, shape.columns)),
        bias=None,
        uses=(),
        a_structure=a_structure,
        g_structure=g_structure,
        sharing="expand",
        is_penalized=is_penalized,
        members=tuple(members),
        owners=owners,
        precondition=precondition,
    )


def _slots(members: Sequence[Member], num_owners: int) -> int:
    """Return how many slices each owner has of a stack of these blocks."""
    return math.ceil(_num_slices(members) / num_owners)


def _num_slices(members: Sequence[Member]) -> int:
    return sum(member.block.shape[0] for member in members)


def _join(groups: dict[Shape, list[Member]], num_owners: int) -> dict[Shape, list[Member]]:
    """Join groups pair by pair, the best first, while that lessens the work of a device."""
    # All devices run one program: the work of each is that of the slices it has room for.
    work = {shape: shape.work * _slots(groups[shape], num_owners) for shape in groups}
    best, least = None, 0
    for x, y in itertools.combinations(sorted(groups), 2):
        joined = _padded_to(x, y)
        if joined is None:
            continue
        work_together = joined.work * _slots([*groups[x], *groups[y]], num_owners)
        change = work_together - work[x] - work[y]
        if change < least:
            best, least = (x, y, joined), change
    if best is None:
        return groups
    x, y, joined = best
    others = {shape: members for shape, members in groups.items() if shape not in (x, y)}
    # A third group may have that shape already.
    together = [*groups[x], *groups[y], *others.get(joined, [])]
    return _join({**others, joined: together}, num_owners)


def _padded_to(x: Shape, y: Shape) -> Shape | None:
    """Return the shape to which slices of two shapes can be padded; None if there is none."""
    if x.kind != y.kind:
        return None
    # A side of 1 is a multiple of the identity, which damping treats in a way of its own.
    if min(x.rows, y.rows) == 1 and x.rows != y.rows:
        return None
    rows = max(x.rows, y.rows)
    columns = max(x.columns, y.columns)
    return Shape(x.kind, rows, columns)
