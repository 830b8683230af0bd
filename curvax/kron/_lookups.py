"""Layouts without tables that are only looked up."""

from __future__ import annotations

import dataclasses

from curvax.kron._layout import Layout, Leaf


def without_lookups(layout: Layout) -> Layout:
    """Take tables whose rows are only looked up, such as embeddings, out of the blocks.

    Such a table is no linear map of a vector: each row is a vector of its own, and the gradient has
    a few of them. Rules that take a matrix as a map, and give all its directions equal length
    (Muon), leave it to their fallback. A table that is the head of the model too stays in.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`; one from
        shapes alone does not know which matrices are tables, and is returned as it is.

    Returns:
      A `Layout`, which says of the tables' leaves why they are in no block.

    Cost: static work alone.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> model = lambda p, ids: p["table"][ids] @ p["head"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"head": jnp.ones((4, 3)), "table": jnp.ones((9, 4))}
      >>> batch = jnp.arange(5), jnp.zeros((5, 3))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> layout = curvax.kron.without_lookups(layout)
      >>> [block.name for block in layout.blocks], layout.leaves[1].reason
      (["['head']"], 'its rows are only looked up')
    """
    tables = [block for block in layout.blocks if block.is_lookup]
    of_tables = {path for block in tables for path in block.leaves}
    blocks = tuple(block for block in layout.blocks if not block.is_lookup)
    of_blocks = {path for block in blocks for path in block.leaves}

    leaves = []
    for leaf in layout.leaves:
        if leaf.path in of_tables:
            leaf = _without_table(leaf, leaf.path in of_blocks)
        leaves.append(leaf)
    return Layout(blocks, tuple(leaves))


def _without_table(leaf: Leaf, is_in_a_block: bool) -> Leaf:
    """Say what becomes of a leaf that holds a table."""
    reason = "its rows are only looked up"
    if is_in_a_block:  # the leaf holds another matrix too
        return dataclasses.replace(leaf, unmatched=leaf.unmatched or "diagonal", reason=reason)
    return dataclasses.replace(leaf, kind="diagonal", unmatched=None, reason=reason)
