"""The batch axis: what has one, how long it is, and how work goes over it in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from curvax._checks import describe
from curvax._shared import is_shared
from curvax._trees import cast_like, wide_dtype
from curvax._types import Batch, at_least_float32
from curvax._xla import fast_convs_in_loops

# 64 MB in float32.
ENTRIES_AT_A_TIME = 2**24
"""Entries of a work array that are in memory at a time, where it would grow with the batch."""


def map_rows(fn: Callable[[Array], Array], rows: PyTree) -> PyTree:
    """Apply `fn` to every leaf with a batch axis, and leave `Shared` parts as they are."""

    def to_leaf(x: Any) -> Any:
        return x if is_shared(x) else fn(x)

    return jax.tree.map(to_leaf, rows, is_leaf=is_shared)


def check_batch(batch: Any) -> None:
    """Raise unless `batch` is a pair `(inputs, targets)` whose arrays share one leading axis."""
    is_sequence = isinstance(batch, tuple | list)
    if not is_sequence or len(batch) != 2:
        length = f" of length {len(batch)}" if is_sequence else ""
        raise TypeError(f"batch must be a pair (inputs, targets), got {describe(batch)}{length}.")
    batch_size(batch)


def batch_size(rows: PyTree) -> int:
    """Return the length of the leading axis common to all arrays of `rows` but `Shared` ones."""
    # Path and size of the first array, which later ones are compared with.
    first: tuple[str, int] | None = None
    for path, leaf in jax.tree.leaves_with_path(rows, is_leaf=is_shared):
        if is_shared(leaf):
            continue
        where = f"batch{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{where} is {describe(leaf)} and has no batch axis; a value common to all "
                "examples goes into inputs as curvax.Shared(value)."
            )
        size = jnp.shape(leaf)[0]
        if first is None:
            first = where, size
        elif size != first[1]:
            raise ValueError(
                f"leading axes disagree: {first[0]} has {first[1]} rows, {where} is "
                f"{describe(leaf)}; a value without batch axis goes into inputs as "
                "curvax.Shared(value)."
            )
    if first is None:
        raise ValueError("batch holds no array with a batch axis.")
    return first[1]


def with_index(batch: Batch, first: Any = 0) -> tuple[Batch, Array]:
    """Pair `batch` with row numbers from `first` on.

    A row then keeps its number, and with it its random draws, in whatever chunk it is.
    """
    numbers = jnp.arange(batch_size(batch), dtype=jnp.uint32)
    return batch, numbers + jnp.asarray(first, jnp.uint32)


def map_examples(fn: Callable[[PyTree], PyTree], rows: PyTree) -> PyTree:
    """Apply `fn` to every row, as a batch of one, by `vmap`; `Shared` parts are not mapped."""

    def axis_of(x: Any) -> int | None:
        return None if is_shared(x) else 0

    def on_row(row: PyTree) -> PyTree:
        # `vmap` has removed the batch axis, which models and losses expect.
        return fn(map_rows(lambda x: x[None], row))

    axes = jax.tree.map(axis_of, rows, is_leaf=is_shared)
    return jax.vmap(on_row, in_axes=(axes,))(rows)


def _chunks(rows: PyTree, microbatch: int) -> tuple[int, Callable[[Array], PyTree], PyTree | None]:
    """Cut `rows` into n chunks of `microbatch` rows and the remaining rows (or None).

    Chunk i holds the rows i, n + i, 2n + i, ...: with this stride a batch axis that is sharded
    over devices stays sharded inside every chunk.
    """
    size = batch_size(rows)
    n = size // microbatch

    def chunk(i: Array) -> PyTree:
        def rows_of(x: Array) -> Array:
            # Row k of chunk i is row k n + i of the batch.
            by_chunk = x[: n * microbatch].reshape(microbatch, n, *x.shape[1:])
            block: Array = lax.dynamic_index_in_dim(by_chunk, i, axis=1, keepdims=False)
            return block

        return map_rows(rows_of, rows)

    if size % microbatch == 0:
        return n, chunk, None
    return n, chunk, map_rows(lambda x: x[n * microbatch :], rows)


def sum_over_chunks(
    fn: Callable[[PyTree], PyTree],
    rows: PyTree,
    microbatch: int,
) -> PyTree:
    """Sum `fn(chunk)` over chunks of `microbatch` rows, one at a time, in at least float32."""
    n, chunk, remainder = _chunks(rows, microbatch)
    if n == 0 or (n == 1 and remainder is None):
        return fn(rows)
    fn = fast_convs_in_loops(fn)
    # Shapes and dtypes of the result, without running anything.
    result = jax.eval_shape(lambda: fn(chunk(jnp.int32(0))))

    def add(total: PyTree, part: PyTree) -> PyTree:
        return jax.tree.map(lambda t, x: t + at_least_float32(x), total, fn(part))

    def add_chunk(total: PyTree, i: Array) -> tuple[PyTree, None]:
        return add(total, chunk(i)), None

    # The total is wide: many small chunks would vanish in a 16-bit sum.
    zeros = jax.tree.map(lambda s: jnp.zeros_like(s, wide_dtype(s)), result)
    total, _ = lax.scan(add_chunk, zeros, jnp.arange(n))
    if remainder is not None:
        total = add(total, remainder)
    return cast_like(total, result)


def map_chunks(
    fn: Callable[[PyTree], PyTree],
    rows: PyTree,
    microbatch: int,
) -> PyTree:
    """Apply `fn`, which maps rows to rows, to chunks of `microbatch` rows, one at a time.

    The results come back in the order of the rows.
    """
    n, chunk, remainder = _chunks(rows, microbatch)
    # One chunk holds all rows: no loop.
    if n == 0 or (n == 1 and remainder is None):
        return fn(rows)
    by_chunk = lax.map(lambda i: fast_convs_in_loops(fn)(chunk(i)), jnp.arange(n))

    def in_order(y: Array) -> Array:
        # [n, microbatch, ...]: row k of chunk i goes to place k n + i.
        return y.swapaxes(0, 1).reshape(n * microbatch, *y.shape[2:])

    results = jax.tree.map(in_order, by_chunk)
    if remainder is None:
        return results
    return jax.tree.map(lambda y, r: jnp.concatenate([y, r]), results, fn(remainder))
