"""The printed layout: a table with one line for each leaf."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

# The layout prints itself by this module, so that an import back is for types only.
if TYPE_CHECKING:
    from curvax.kron._layout import Block, Layout, Leaf

HEAD = ("leaf", "shape", "block", "A x G", "stack", "uses", "factors", "note")


def layout_table(layout: Layout) -> str:
    """Write one line for each leaf, and what the factors take."""
    rows = [HEAD, *(_row(layout, leaf) for leaf in layout.leaves)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    # The last line: what factors and diagonals take.
    floats = sum(_floats(block) for block in layout.blocks)
    for leaf in layout.leaves:
        if leaf.outside == "diagonal":
            floats += math.prod(leaf.shape)
    count = f"{len(layout.blocks)} block{'s' * (len(layout.blocks) != 1)}"
    lines.append(f"{count}, factors of {_memory(floats)} in float32")
    return "\n".join(lines)


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
        uses = str(sum(len(block.uses) for block in described))
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
    notes += [block.sharing] if block.sharing != "expand" else []
    notes += ["all positions"] if block.positions == "all" else []
    if block.two_products != "balanced":
        notes.append(f"two products: {block.two_products}")
    if block.parts:
        notes.append("in " + ", ".join(name for name, _ in block.parts))
    return notes


def _listed(texts: Iterable[str], separator: str = ", ") -> str:
    """Join texts, each once."""
    return separator.join(dict.fromkeys(texts))


def _floats(block: Block) -> int:
    """Count the floats of a block's factors, of which a second product has a second pair."""
    return (1 + block.has_second_product) * sum(map(math.prod, block.factor_shapes))


def _memory(floats: int) -> str:
    """Write the memory of so many floats in float32."""
    size = 4.0 * floats
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
