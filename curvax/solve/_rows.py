"""Stacks of trees: their leaves have a leading axis of rows, as in a basis or a window."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from curvax._trees import wide_dtype
from curvax._types import Params


def sharded_zeros(like: Array, dtype: Any = None) -> Array:
    """Return zeros with the shape and sharding of an array, by default in at least float32."""
    # `zeros_like` of a traced array has no mesh since JAX 0.12, and none of a closed-over array
    # before either; where a loop carries it, or rows are written into it, the explicit sharding of
    # the arrays that meet it there must be the same. XLA reduces this `where` to a constant.
    zeros = jnp.where(False, like, 0)
    return zeros.astype(wide_dtype(like) if dtype is None else dtype)


def zero_rows(
    like: Params,
    num_rows: int,
    dtype: Any = None,
) -> PyTree[Array]:
    """Return rows of zeros, each with the sharding of `like`, by default in at least float32."""

    def rows(x: Array) -> Array:
        return jnp.broadcast_to(sharded_zeros(x, dtype)[None], (num_rows, *x.shape))

    return jax.tree.map(rows, like)


def put_row(
    rows: PyTree[Array],
    row: Params,
    index: Any,
) -> PyTree[Array]:
    """Write one row in place of the row with this index."""

    def put(x: Array, y: Array) -> Array:
        return jnp.asarray(lax.dynamic_update_index_in_dim(x, y, index, axis=0))

    return jax.tree.map(put, rows, row)


def get_row(rows: PyTree[Array], index: Any) -> Params:
    """Read the row with this index."""

    def get(x: Array) -> Array:
        return jnp.asarray(lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False))

    return jax.tree.map(get, rows)
