"""The matrices of a layout's blocks, read from a tree like params and put back into one."""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float, PyTree

from curvax._types import Params, tree_at_least_float32
from curvax.kron._layout import Layout, named_leaves, present
from curvax.kron._operator import block_matrix


def block_matrices(layout: Layout, tree: Params) -> dict[str, Float[Array, "s i o"]]:
    """Return the matrix V of every block, with its bias as last row, in at least float32.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
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
    return _read(present(layout, tree), tree_at_least_float32(tree))


def with_block_matrices(
    layout: Layout, matrices: dict[str, Float[Array, "s i o"]], tree: Params
) -> Params:
    """Return `tree` with these matrices in place of its blocks, in the dtypes of `tree`.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      matrices: `[stack, in (+ 1), out]` for each block, by name, as `block_matrices` returns them.
      tree: a tree like params, whose entries in no block stay.
    """
    wide = tree_at_least_float32(tree)
    read = partial(_read, present(layout, tree))
    # S reads the blocks, S' puts them back, and S S' = I: x - S' S x is in no block.
    write = jax.linear_transpose(read, wide)
    (in_blocks,) = write(read(wide))
    (replaced,) = write(matrices)
    return jax.tree.map(
        lambda x, old, new, like: (x - old + new).astype(like.dtype),
        wide,
        in_blocks,
        replaced,
        tree,
    )


def _read(layout: Layout, tree: PyTree[Array]) -> dict[str, Array]:
    """Return the matrices of all blocks; linear in `tree`."""
    leaves = named_leaves(layout, tree)
    return {block.name: block_matrix(block, leaves) for block in layout.blocks}
