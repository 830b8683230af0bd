"""Layouts for rules on gradients: matrices as they are, cut into tiles where they are large."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

from curvax._checks import check_count
from curvax.capture._views import View, cut, reshape, transpose
from curvax.kron._build_layout import covered_entries
from curvax.kron._layout import Block, Layout, Leaf

Range: TypeAlias = tuple[int, int]
"""First row (or column), and the one after the last."""


def gradient_layout(layout: Layout) -> Layout:
    """Return the layout by which rules on gradients alone read matrices: kernels without biases.

    K-FAC has a bias as one more row of its kernel, since both have the same cotangents. A rule that
    sees gradients only takes the kernel `[stack, in, out]` alone; the bias is in no block. What the
    uses of a kernel say of its curvature (transposes, sharing, parts) is dropped, but whether it is
    a table that is only looked up: `Block.is_lookup`.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`, or by
        `curvax.matrix_layout`, which is returned as it is.

    Returns:
      A `Layout` whose blocks have no bias and no uses.

    Cost: static work alone; entries are numbered only where a leaf is in a block in part.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> model = lambda p, x: x @ p["w"] + p["b"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> layout = curvax.kron_layout(objective, params, (jnp.ones((8, 4)), jnp.ones((8, 3))))
      >>> [block.shape for block in layout.blocks]
      [(1, 5, 3)]
      >>> layout = curvax.kron.gradient_layout(layout)
      >>> [block.shape for block in layout.blocks], layout.leaves[0].reason
      ([(1, 4, 3)], "bias of ['w']")
    """
    blocks = tuple(map(_without_uses, layout.blocks))
    bias_of = {}
    for block in layout.blocks:
        for path in block.bias.leaves if block.bias else ():
            bias_of[path] = block.kernel.leaves[0]
    # A leaf may hold a kernel and its bias: it stays in the block in part. Only of those few are
    # entries counted.
    shapes = {leaf.path: leaf.shape for leaf in layout.leaves}
    holders = [block for block in blocks if bias_of.keys() & block.leaves]
    covered = covered_entries(holders, shapes)
    leaves = []
    for leaf in layout.leaves:
        if leaf.path in bias_of:
            leaf = _without_bias(leaf, covered[leaf.path], bias_of[leaf.path])
        leaves.append(leaf)
    return Layout(blocks, tuple(leaves))


def tiled(layout: Layout, block_size: int) -> Layout:
    """Cut the matrices of a layout into tiles of at most `block_size x block_size`.

    Each tile is a block by itself, with statistics and a norm of its own. Equal tiles of a matrix
    are the stack of one block; what remains at its right and lower edges are further blocks. With
    tiles of b x b, full factors of an `[in, out]` matrix take about `2 in out` numbers, and their
    roots `in out b` operations, whatever the sides. The result depends on the tiles.

    Args:
      layout: a `Layout`, of which `gradient_layout` is cut.
      block_size: longest side of a tile.

    Returns:
      A `Layout`. Sides whose factor is "diagonal" or "identity" are not cut: it does not grow with
      the square of the side. So a table that is only looked up has its rows in one piece, and so
      have sides beyond the `max_dim` of `curvax.kron_layout`; to cut those, make the layout with
      another `max_dim`.

    Raises:
      TypeError, ValueError: `block_size` is not an integer of at least 1.

    Cost: static work alone.

    Example: tiles of at most 4 x 4.
      >>> import jax.numpy as jnp, curvax
      >>> layout = curvax.kron.matrix_layout({"w": jnp.ones((8, 5))})
      >>> layout = curvax.kron.tiled(layout, 4)
      >>> {block.name: block.shape for block in layout.blocks}
      {"['w'][0:8, 0:4]": (2, 4, 4), "['w'][0:8, 4:5]": (2, 4, 1)}

    References: Anil et al. (2020), Scalable second order optimization for deep learning, on large
      tensors that are partitioned into blocks, https://arxiv.org/abs/2002.09018.
    """
    check_count(1, block_size=block_size)
    layout = gradient_layout(layout)
    blocks = []
    for block in layout.blocks:
        blocks += _tiles(block, block_size)
    return Layout(tuple(blocks), layout.leaves)


def _without_uses(block: Block) -> Block:
    """Drop the bias of a block, and what only its uses are asked for."""
    return dataclasses.replace(
        block,
        bias=None,
        uses=(),
        parts=(),
        sharing="expand",
        positions="active",
        two_products="balanced",
        is_penalized=False,
    )


def _without_bias(leaf: Leaf, covered: int, kernel: str) -> Leaf:
    """Say what becomes of a leaf that holds a bias and has so many entries in kernels."""
    # What was chosen for other entries of the leaf is for those of the bias too.
    unmatched = leaf.unmatched or "diagonal"
    if covered == 0:
        return dataclasses.replace(leaf, kind=unmatched, unmatched=None, reason=f"bias of {kernel}")
    size = math.prod(leaf.shape)
    reason = f"{size - covered} of {size} entries are in no matrix"
    return dataclasses.replace(leaf, unmatched=unmatched, reason=reason)


def _tiles(block: Block, size: int) -> list[Block]:
    """Cut one block; up to four are returned, since either side may have a shorter last tile."""
    _, rows, columns = block.kernel.shape
    row_ranges = _ranges(rows, size if block.a_structure == "full" else rows)
    column_ranges = _ranges(columns, size if block.g_structure == "full" else columns)
    tiles = []
    for row_range, row_size in row_ranges:
        for column_range, column_size in column_ranges:
            view = _tile_view(block.kernel, row_range, row_size, column_range, column_size)
            name, notes = block.name, block.notes
            # The place of the tiles in the matrix, where they are not all of it.
            if (row_range, column_range) != ((0, rows), (0, columns)):
                name += "[{}:{}, {}:{}]".format(*row_range, *column_range)
            if (row_size, column_size) != (rows, columns):
                number = view.shape[0]
                text = f"{number} tile{'s' * (number > 1)} of {row_size} x {column_size}"
                notes = (*notes, text)
            tiles.append(dataclasses.replace(block, name=name, kernel=view, notes=notes))
    return tiles


def _ranges(length: int, size: int) -> list[tuple[Range, int]]:
    """Cut a side into a range of equal tiles, and one shorter tile; with the length of a tile."""
    if length <= size:
        return [((0, length), length)]
    even = length - length % size
    ranges = [((0, even), size)]
    if even < length:
        ranges.append(((even, length), length - even))
    return ranges


def _tile_view(
    kernel: View, row_range: Range, row_size: int, column_range: Range, column_size: int
) -> View:
    """View a part of a kernel `[stack, in, out]` as a stack of equal tiles."""
    stack = kernel.shape[0]
    part = cut(kernel, ((0, stack, 1), (*row_range, 1), (*column_range, 1)))
    # [s, i, o] -> [s, p, i / p, q, o / q] -> [s, p, q, i / p, o / q] -> [s p q, i / p, o / q]
    _, rows, columns = part.shape
    p, q = rows // row_size, columns // column_size
    grid = reshape(part, (stack, p, row_size, q, column_size))
    by_tile = transpose(grid, (0, 1, 3, 2, 4))
    return reshape(by_tile, (stack * p * q, row_size, column_size))
