"""The printed layout: a table with one line for each leaf."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

# The layout prints itself by this module, so that an import back is for types only.
if TYPE_CHECKING:
    from curvax.kron._layout import Block, Layout, Leaf
    from curvax.kron._placement import Placement

LOW_SHARE = 0.5
"""Below this share of parameters in blocks the table warns."""

HEAD = ("leaf", "shape", "block", "A x G", "stack", "uses", "factors", "note")
WIDTH_OF_NAMES = 60
PLACEMENT_HEAD = ("shape", "slices", "on a device", "full", "of blocks")


def layout_table(layout: Layout) -> str:
    """Write one line for each leaf, what the factors take, and how much is in blocks."""
    lines = _aligned([HEAD, *(_row(layout, leaf) for leaf in layout.leaves)])
    # What factors and diagonals take.
    floats = sum(_floats(block) for block in layout.blocks)
    for leaf in layout.leaves:
        if leaf.outside == "diagonal":
            floats += math.prod(leaf.shape)
    count = f"{len(layout.blocks)} block{'s' * (len(layout.blocks) != 1)}"
    lines.append(f"{count}, factors of {_memory(floats)} in float32")
    lines.append(_share_in_blocks(layout))
    return "\n".join(lines)


def placement_table(placement: Placement) -> str:
    """Write one line for each stack of owners, and what a device has of the factors."""
    rows = [PLACEMENT_HEAD]
    number = placement.owners.number
    for block in placement.blocks:
        stack, inputs, outputs = block.shape
        names = textwrap.shorten(block.name, WIDTH_OF_NAMES, placeholder=" ...")
        counts = str(block.num_slices), str(stack // number)
        rows.append((f"{inputs}x{outputs}", *counts, f"{block.fill.mean():.0%}", names))
    lines = _aligned(rows)
    of_owner = sum(map(_floats, placement.blocks)) // number
    of_others = sum(map(_floats, placement.everywhere))
    others = ", ".join(block.name for block in placement.everywhere)
    lines.append(f"on every device: {others or 'no other block'}")
    total = sum(map(_floats, placement.source.blocks))
    lines.append(f"a device has {_memory(of_owner + of_others)} of {_memory(total)} of factors")
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Write rows of cells as lines, the columns flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _share_in_blocks(layout: Layout) -> str:
    """Write which share of the parameters is in blocks, with a warning if that is little."""
    total = sum(math.prod(leaf.shape) for leaf in layout.leaves)
    outside = 0
    for leaf in layout.leaves:
        # Only of a leaf that lies in blocks in part need entries be counted.
        in_part = leaf.kind == "kron" and leaf.unmatched is not None
        if in_part:
            outside += int(layout.uncovered(leaf.path).sum())
        elif leaf.kind != "kron":
            outside += math.prod(leaf.shape)
    share = (total - outside) / max(total, 1)
    text = f"{100 * share:.3g} % of the parameters are in blocks ({total - outside} of {total})"
    if share >= LOW_SHARE:
        return text
    return f"WARNING: only {text}; the notes say why the others are not"


def _row(layout: Layout, leaf: Leaf) -> tuple[str, ...]:
    """Write the cells of one leaf; a block is described once, with its first leaf."""
    blocks = [block for block in layout.blocks if leaf.path in block.leaves]
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    # Leaves in no block say why.
    if not blocks:
        memory = _memory(math.prod(leaf.shape)) if leaf.kind == "diagonal" else ""
        return leaf.path, shape, leaf.kind, "", "", "", memory, leaf.reason
    described = [block for block in blocks if block.leaves[0] == leaf.path]
    # Of a leaf with several blocks, such as Q, K and V in one kernel, each is listed.
    structures, stacks, notes = [], [], []
    for block in described:
        stack, rows, columns = block.shape
        structures.append(f"{block.a_structure} {rows} x {block.g_structure} {columns}")
        stacks += [str(stack)] if stack > 1 else []
        notes += _notes(block, leaf)
    for block in blocks:
        if block not in described:
            role = "part of" if leaf.path in block.kernel.leaves else "bias of"
            notes.append(f"{role} {block.leaves[0]}")
    # A leaf that is in blocks in part has a reason too, and a choice for the other entries.
    if leaf.reason:
        notes.append(f"{leaf.reason}: {leaf.unmatched}")
    # A block's numbers stand beside its first leaf only, so that the column has each once.
    uses, memory = "", ""
    if described:
        # Blocks for gradients alone have no uses.
        uses = str(sum(len(block.uses) for block in described) or "")
        memory = _memory(sum(map(_floats, described)))
    return (
        leaf.path,
        shape,
        "kron",
        _listed(structures),
        _listed(stacks),
        uses,
        memory,
        _listed(notes, "; "),
    )


def _notes(block: Block, leaf: Leaf) -> list[str]:
    """Write what is not the default in a block."""
    notes = [block.name] if block.name != leaf.path else []
    notes += block.notes
    # Rules on gradients may treat a table of embeddings unlike a matrix.
    notes += ["only looked up"] if block.is_lookup and not block.uses else []
    notes += [block.sharing] if block.sharing != "expand" else []
    notes += ["all positions"] if block.positions == "all" else []
    mask = block.kernel.mask
    if mask is not None:
        notes.append(f"constant mask: {int(mask.sum())} of {mask.size} entries")
    if block.two_products != "balanced":
        notes.append(f"two products: {block.two_products}")
    if block.parts:
        notes.append("in " + ", ".join(name for name, _ in block.parts))
    return notes


def _listed(texts: Iterable[str], separator: str = ", ") -> str:
    """Join texts, each once."""
    return separator.join(dict.fromkeys(texts))


def _floats(block: Block) -> int:
    """Count the floats of a block's factors: a second product, or a lag, is a second pair."""
    pairs = 1 + block.has_second_product + block.is_over_time
    return pairs * sum(map(math.prod, block.factor_shapes))


def _memory(floats: int) -> str:
    """Write the memory of so many floats in float32."""
    size = 4.0 * floats
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
