"""The matrices of a layout's blocks, read from a tree like params and put back into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._checks import describe
from curvax._types import Params, at_least_float32, tree_at_least_float32
from curvax.kron._layout import Block, Layout, named_leaves, present
from curvax.kron._operator import scatter


def block_matrices(layout: Layout, tree: Params) -> dict[str, Float[Array, "s i o"]]:
    """Return the matrix V of every block, its bias as last row if it has one, in at least float32.

    Args:
      layout: the `Layout` of `curvax.kron_layout(objective, params, batch)`, or one for gradients
        alone, of `curvax.matrix_layout(params)`.
      tree: a tree like params, for instance a gradient. Blocks that are masked out are left out.

    Returns:
      `[stack, in (+ 1), out]` for each block, by name.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> model = lambda p, x: x @ p["w"] + p["b"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1)}
      >>> layout = curvax.kron_layout(objective, params, (jnp.ones((4, 2)), jnp.ones((4, 1))))
      >>> {name: x.tolist() for name, x in curvax.kron.block_matrices(layout, params).items()}
      {"['w']": [[[1.0], [1.0], [0.0]]]}
    """
    # A block that is masked out has no arrays to read.
    layout = present(layout, tree)
    return _read(layout.blocks, named_leaves(layout, tree_at_least_float32(tree)))


def with_block_matrices(
    layout: Layout, matrices: dict[str, Float[Array, "s i o"]], tree: Params
) -> Params:
    """Return `tree` with these matrices in place of its blocks, in the dtypes of `tree`.

    Args:
      layout: the `Layout` of `curvax.kron_layout(objective, params, batch)`, or one for gradients
        alone, of `curvax.matrix_layout(params)`.
      matrices: `[stack, in (+ 1), out]` for each block, by name, as `block_matrices` returns them.
      tree: a tree like params, whose entries in no block (or behind a constant mask) stay as they
        are, bit by bit. Of leaves that are in blocks wholly, only shapes and dtypes are used.

    Raises:
      ValueError: a block has no matrix, or one of another shape, or a matrix no block.

    Cost: none for a leaf that is in one block; one pass over leaves that are in blocks in part.
    """
    layout = present(layout, tree)
    _check_matrices(layout, matrices)
    leaves = named_leaves(layout, tree)
    replaced = _put_back(layout.blocks, matrices, leaves)
    # S reads the blocks and S' puts them back: S' S 1 is 1 at their entries, and 0 elsewhere.
    in_part = _covered_in_part(layout)
    blocks = [block for block in layout.blocks if in_part.intersection(block.leaves)]
    touched = [path for block in blocks for path in block.leaves]
    ones = {path: jnp.ones_like(leaves[path]) for path in touched}
    covered = _put_back(blocks, _read(blocks, ones), ones)
    ordered = []
    for path, x in leaves.items():
        if path in in_part:
            # A choice, and no sum x - S' S x + S' V, which is NaN where x is not finite.
            x = jnp.where(covered[path] != 0, replaced[path].astype(x.dtype), x)
        elif path in replaced:
            x = replaced[path].astype(x.dtype)
        ordered.append(x)
    return jax.tree.unflatten(jax.tree.structure(tree), ordered)


def _read(blocks: Sequence[Block], leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Return the matrices of blocks; linear in the leaves."""
    return {block.name: block.matrix(leaves) for block in blocks}


def _put_back(
    blocks: Sequence[Block], matrices: Mapping[str, Array], leaves: Mapping[str, Array]
) -> dict[str, Array]:
    """Put matrices to where blocks read them, in at least float32; zeros elsewhere in a leaf."""
    results: dict[str, Array] = {}
    for block in blocks:
        # Shapes and dtypes of the leaves matter, and not what they hold.
        of_block = {path: at_least_float32(leaves[path]) for path in block.leaves}
        for path, x in scatter(block, matrices[block.name], of_block).items():
            results[path] = results[path] + x if path in results else x
    return results


def _covered_in_part(layout: Layout) -> set[str]:
    """Return the paths of leaves in blocks with entries that no block reads, as static facts."""
    paths = {leaf.path for leaf in layout.leaves if leaf.kind == "kron" and leaf.outside}
    for block in layout.blocks:
        # What a constant mask hides is in the block, where nothing is read or written.
        if any(view.has("times") for view in (block.kernel, block.bias) if view is not None):
            paths.update(block.leaves)
    return paths


def _check_matrices(layout: Layout, matrices: Mapping[str, Array]) -> None:
    """Raise unless every block has a matrix of its shape, and every matrix a block."""
    shapes = {block.name: block.shape for block in layout.blocks}
    for name in dict.fromkeys((*shapes, *matrices)):
        want, got = shapes.get(name), matrices.get(name)
        if want is None or got is None or jnp.shape(got) != want:
            there = "no such block" if want is None else f"a block {list(want)}"
            here = "none" if got is None else describe(got)
            raise ValueError(
                f"matrices[{name!r}]: the layout has {there}, got {here}; give what "
                "curvax.kron.block_matrices(layout, tree) has the shapes of."
            )
