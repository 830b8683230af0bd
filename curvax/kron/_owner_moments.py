"""Second moments of EK-FAC for owner blocks: of rows that are anywhere, in bases of owners."""

from __future__ import annotations

from functools import partial
from typing import Any

from jax.tree_util import Partial
from jaxtyping import Array, Float

from curvax.kron._gradient_pairs import Basis, block_moments
from curvax.kron._layout import Block
from curvax.kron._moments import EigenCurvature
from curvax.kron._owner_operators import member_bases
from curvax.kron._packing import packed
from curvax.kron._placement import OwnerBlock, Placement
from curvax.kron._row_sums import by_device, scatter_sums, scattered_spec


def owner_moments(
    placement: Placement, block: OwnerBlock, basis: Basis, curvature: EigenCurvature
) -> Float[Array, "s i o"]:
    """Return the second moments of an owner block that the rows of a curvature have in its basis.

    As `curvax.kron._moments.moments_in`, with every device at work on its own rows: the basis is
    sent to all, and the moments to their owners.
    """
    over_rows = by_device(placement.batch, by_example=True)
    # 1. To all devices the bases, one block at a time.
    bases = member_bases(block, placement.owners.gathered(basis, block.num_slices))
    parts = []
    for member, of_member in zip(block.members, bases, strict=True):
        name = member.block.name
        paired = None if curvature.paired is None else curvature.paired[name]
        of_uses = curvature.inputs[name], curvature.cotangents[name], paired
        # 2. On every device (Q_A' D_b Q_G)^2 of its own rows.
        of_block = Partial(partial(_member_moments, member.block), of_member)
        parts.append(over_rows(of_block, of_uses))

    # 3. The sums over devices to the owners.
    def of_device(parts: list[Array]) -> Array:
        return scatter_sums(placement, block, block.joined([x[0] for x in parts]))

    batch = placement.batch
    scatter = batch.each(of_device, batch.spec, scattered_spec(placement))
    moments = placement.owners.spread(scatter(parts))
    if not block.is_penalized:
        return moments
    factors = packed(placement, curvature.factors).blocks[block.name]
    assert factors.shift is not None
    # The c I of a penalty is c I in every basis.
    return moments + factors.shift.mean[:, None, None]


def _member_moments(block: Block, basis: Basis, of_uses: Any, by_row: Any) -> Array:
    """Sum the moments of a block's rows, in a basis with columns for the padding too."""
    del by_row
    return block_moments(block, basis, *of_uses)
