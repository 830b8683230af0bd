"""The batch axis: what has one, how long it is, and how work goes over it in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from curvax._checks import describe
from curvax._shared import is_shared
from curvax._types import Batch, at_least_float32
from curvax._xla import fast_convs_in_loops

ENTRIES_AT_A_TIME = 2**24
"""Entries of a work array that are held at a time, where it would grow with the batch: 64 MB in float32."""


def map_rows(fn: Callable[[Array], Array], rows: PyTree) -> PyTree:
    """Apply `fn` to every leaf with a batch axis, and leave `Shared` parts as they are."""
    return jax.tree.map(lambda x: x if is_shared(x) else fn(x), rows, is_leaf=is_shared)


def check_batch(batch: Any) -> None:
    """Raise unless `batch` is a pair `(inputs, targets)` whose arrays share one leading axis."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(f"batch must be a pair (inputs, targets), got {describe(batch)}{length}.")
    batch_size(batch)


def batch_size(rows: PyTree) -> int:
    """Length of the leading axis common to all arrays of `rows` that are not `Shared`."""
    first: tuple[str, int] | None = None
    for path, leaf in jax.tree.leaves_with_path(rows, is_leaf=is_shared):
        if is_shared(leaf):
            continue
        where = f"batch{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{where} is {describe(leaf)} and has no batch axis; a value common to all examples "
                "goes into inputs as curvax.Shared(value)."
            )
        size = jnp.shape(leaf)[0]
        if first is None:
            first = where, size
        elif size != first[1]:
            raise ValueError(
                f"leading axes disagree: {first[0]} has {first[1]} rows, {where} is {describe(leaf)}; "
                "a value without batch axis goes into inputs as curvax.Shared(value)."
            )
    if first is None:
        raise ValueError("batch holds no array with a batch axis.")
    return first[1]


def with_index(batch: Batch, first: Any = 0) -> tuple[Batch, Array]:
    """Pair `batch` with row numbers from `first` on, so that a row keeps its number in whatever chunk it is."""
    return batch, jnp.arange(batch_size(batch), dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)


def map_examples(fn: Callable[[PyTree], PyTree], rows: PyTree) -> PyTree:
    """Apply `fn` to every row, kept as a batch of one, by `vmap`; `Shared` parts are not mapped."""
    axes = jax.tree.map(lambda x: None if is_shared(x) else 0, rows, is_leaf=is_shared)
    return jax.vmap(lambda row: fn(map_rows(lambda x: x[None], row)), in_axes=(axes,))(rows)


def _chunks(rows: PyTree, microbatch: int) -> tuple[int, Callable[[Array], PyTree], PyTree | None]:
    """Cut `rows` into `n` chunks of `microbatch` rows and a ragged rest (or None).

    Chunk i holds the rows i, n + i, 2n + i, ...: with this stride a batch axis that is sharded over devices stays
    sharded inside every chunk.
    """
    size = batch_size(rows)
    n = size // microbatch
    take = lambda i: map_rows(
        lambda x: lax.dynamic_index_in_dim(
            x[: n * microbatch].reshape(microbatch, n, *x.shape[1:]), i, axis=1, keepdims=False
        ),
        rows,
    )
    rest = map_rows(lambda x: x[n * microbatch :], rows) if size % microbatch else None
    return n, take, rest


def sum_over_chunks(fn: Callable[[PyTree], PyTree], rows: PyTree, microbatch: int) -> PyTree:
    """Sum `fn(chunk)` over chunks of `microbatch` rows, one at a time, accumulating in at least float32."""
    n, take, rest = _chunks(rows, microbatch)
    if n == 0 or (n == 1 and rest is None):
        return fn(rows)
    fn = fast_convs_in_loops(fn)
    shapes = jax.eval_shape(lambda: fn(take(jnp.int32(0))))
    widen = lambda s: jnp.zeros_like(s, jnp.promote_types(s.dtype, jnp.float32))
    add = lambda total, chunk: jax.tree.map(lambda t, x: t + at_least_float32(x), total, fn(chunk))
    total, _ = lax.scan(
        lambda t, i: (add(t, take(i)), None), jax.tree.map(widen, shapes), jnp.arange(n)
    )
    if rest is not None:
        total = add(total, rest)
    return jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes)


def map_chunks(fn: Callable[[PyTree], PyTree], rows: PyTree, microbatch: int) -> PyTree:
    """Apply `fn`, which maps rows to rows, over chunks of `microbatch` rows; rows come back in their order."""
    n, take, rest = _chunks(rows, microbatch)
    if n == 0 or (n == 1 and rest is None):
        return fn(rows)
    stacked = lax.map(lambda i: fast_convs_in_loops(fn)(take(i)), jnp.arange(n))
    done = jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(n * microbatch, *y.shape[2:]), stacked)
    if rest is None:
        return done
    return jax.tree.map(lambda y, r: jnp.concatenate([y, r]), done, fn(rest))
