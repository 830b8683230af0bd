"""Layouts that have vectors for matrices of one column: all params together, or single leaves."""

from __future__ import annotations

import dataclasses
import math

from curvax._checks import check_choice, check_params
from curvax._types import Params
from curvax.capture._views import View, concatenate, leaf_view, reshape
from curvax.kron._kron_factor import STRUCTURES
from curvax.kron._layout import Block, Layout, Leaf, leaf_shapes


def vector_layout(params: Params, structure: str = "full") -> Layout:
    """Make a layout that has all params together as one column, for rules on gradients.

    The column is a matrix `[1, d, 1]`, so that a rule which has a matrix for each side of a matrix
    `[in, out]` has one of d x d here: for few parameters, up to some thousands.

    Args:
      params: pytree of float arrays (or of `jax.ShapeDtypeStruct`).
      structure: that of the d x d matrix: "full", "diagonal" or "identity".

    Returns:
      A `Layout` of one block, "params", whose other side is the identity.

    Raises:
      ValueError: the structure does not exist.
      TypeError: params are not float.

    Cost: static work alone. A rule that reads the column copies all params.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> layout = curvax.kron.vector_layout(params)
      >>> {block.name: block.shape for block in layout.blocks}
      {'params': (1, 15, 1)}
    """
    check_params(params)
    check_choice("structure", structure, STRUCTURES)
    shapes = leaf_shapes(params)
    # Leaves without entries have no part in the column.
    columns = [_column(path, shape) for path, shape in shapes.items() if math.prod(shape)]
    if not columns:
        empty = [_without_matrix(path, shape) for path, shape in shapes.items()]
        return Layout((), tuple(empty))
    view = concatenate(tuple(columns), 1)
    block = _column_block("params", view, structure, "all params as one column")
    leaves = []
    for path, shape in shapes.items():
        leaf = Leaf(path=path, shape=shape, kind="kron")
        leaves.append(leaf if math.prod(shape) else _without_matrix(path, shape))
    return Layout((block,), tuple(leaves))


def with_columns(layout: Layout) -> Layout:
    """Add a block of one column, of diagonal structure, for every leaf that is in no matrix.

    Leaves of kind "identity", whose gradient stays as it is, are left out.
    """
    blocks, leaves = list(layout.blocks), []
    for leaf in layout.leaves:
        if leaf.kind == "diagonal" and math.prod(leaf.shape) > 0:
            view = _column(leaf.path, leaf.shape)
            blocks.append(_column_block(leaf.path, view, "diagonal", "as one column"))
            leaf = dataclasses.replace(leaf, kind="kron", reason="")
        leaves.append(leaf)
    return Layout(tuple(blocks), tuple(leaves))


def _column(path: str, shape: tuple[int, ...]) -> View:
    """View a leaf as `[stack, in, out]` with one matrix of one column."""
    return reshape(leaf_view(path, shape), (1, math.prod(shape), 1))


def _column_block(name: str, view: View, structure: str, note: str) -> Block:
    """Make a block of a column; its side of one row has nothing to tell."""
    return Block(
        name=name,
        kernel=view,
        bias=None,
        uses=(),
        a_structure=structure,
        g_structure="identity",
        sharing="expand",
        notes=(note,),
    )


def _without_matrix(path: str, shape: tuple[int, ...]) -> Leaf:
    return Leaf(path=path, shape=shape, kind="diagonal", reason="has no entries")
