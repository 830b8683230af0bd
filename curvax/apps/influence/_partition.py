"""Parts of a layout, for models whose factors or queries do not fit into memory at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from curvax._checks import check_count
from curvax.kron._layout import Layout, Leaf


def partition(layout: Layout, num_parts: int) -> list[Layout]:
    """Cut a layout into parts that are fitted and scored one after the other, and summed.

    The curvature is block-diagonal, so that a score is the sum of its blocks' parts. Each part has
    a share of the blocks, and holds all other leaves fixed; every block and every leaf with a
    diagonal is in one part. Blocks that share a leaf stay together. The parts' scores add up to
    those of the layout with every method but "cg" and "mfac", which have curvature between blocks.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      num_parts: the number of parts; they are made about equal in memory.

    Returns:
      The layouts of the parts.

    Raises:
      ValueError: there are fewer blocks and leaves that can stand alone than parts.

    Cost: each part is a fit and a scoring of its own, with forward and backward passes through the
      model; memory of factors, eigenvectors and queries is that of one part.

    Example: two layers, one at a time.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> model = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"w": jnp.eye(2), "v": jnp.ones((2, 1))}
      >>> batch, key = (jnp.eye(2), jnp.ones((2, 1))), jax.random.key(0)
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> def scores(layout):
      ...     fitted = influence.fit(objective, layout, params, [batch], key, progress=False)
      ...     result, _ = influence.influence(fitted, objective, params, batch, [batch])
      ...     return result.change_if_removed
      >>> total = sum(map(scores, influence.partition(layout, 2)))
      >>> bool(jnp.allclose(total, scores(layout), rtol=1e-4))
      True
    """
    check_count(1, num_parts=num_parts)
    groups = _groups(layout)
    if num_parts > len(groups):
        raise ValueError(
            f"num_parts must be at most {len(groups)}, the number of blocks and leaves of this "
            f"layout that can stand alone, got {num_parts}."
        )
    memory = [sum(_memory(layout, path) for path in group) for group in groups]
    # The largest first, each to the part that is smallest so far.
    paths: list[list[str]] = [[] for _ in range(num_parts)]
    sizes = [0] * num_parts
    for k in sorted(range(len(groups)), key=lambda k: -memory[k]):
        smallest = sizes.index(min(sizes))
        paths[smallest] += groups[k]
        sizes[smallest] += memory[k]
    return [_part(layout, frozenset(part)) for part in paths]


def _groups(layout: Layout) -> list[list[str]]:
    """Return the leaves that take part, with those together that share a block."""
    group_of = {leaf.path: [leaf.path] for leaf in layout.leaves if _takes_part(leaf)}
    for block in layout.blocks:
        joined: list[str] = []
        for path in block.leaves:
            joined += [other for other in group_of[path] if other not in joined]
        group_of |= dict.fromkeys(joined, joined)
    return [group for path, group in group_of.items() if group[0] == path]


def _takes_part(leaf: Leaf) -> bool:
    return leaf.kind == "kron" or leaf.outside == "diagonal"


def _memory(layout: Layout, path: str) -> int:
    """Count the floats of a leaf's diagonal, and of the blocks that are listed with it."""
    floats = sum(math.prod(leaf.shape) for leaf in layout.leaves if leaf.path == path)
    for block in layout.blocks:
        if block.leaves[0] == path:
            floats += sum(map(math.prod, block.factor_shapes))
    return floats


def _part(layout: Layout, paths: Collection[str]) -> Layout:
    """Return the layout with the blocks of some leaves alone; all others are held fixed."""
    blocks = tuple(block for block in layout.blocks if block.leaves[0] in paths)
    leaves = []
    for leaf in layout.leaves:
        fixed = dataclasses.replace(leaf, kind="identity", unmatched=None, reason="in another part")
        leaves.append(leaf if leaf.path in paths else fixed)
    return Layout(blocks, tuple(leaves))
