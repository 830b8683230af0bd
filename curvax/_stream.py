"""Batches that are read one after the other from the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from curvax._batch import check_batch
from curvax._checks import describe
from curvax._shared import is_shared
from curvax._types import Batch


def check_rereadable(batches: Iterable[Batch]) -> None:
    """Raise if `batches` is an iterator."""
    # An iterator is its own iterator; everything else begins anew.
    if iter(batches) is batches:
        raise TypeError(
            f"batches is an iterator ({type(batches).__name__}), which can be gone through but "
            "once; here they are read again and again. Give a list, a DataLoader, or an object "
            "whose __iter__ begins anew."
        )


def on_device(batches: Iterable[Any]) -> Iterator[Any]:
    """Go through batches of NumPy, JAX or PyTorch arrays as JAX arrays."""
    for batch in batches:
        # Of an objective with several parts a batch is a dict of pairs, None for a penalty.
        if isinstance(batch, Mapping):
            yield {name: None if pair is None else _arrays(pair) for name, pair in batch.items()}
        else:
            yield _arrays(batch)


def _arrays(batch: Any) -> Batch:
    """Return a batch of JAX arrays, or raise if it is no pair."""
    # The pair is checked before conversion, which would turn a bare array into rows.
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"batches must hold pairs (inputs, targets), got {describe(batch)}.")
    inputs, targets = batch
    _check_global((inputs, targets))
    arrays: Batch = jax.tree.map(_as_jax, (inputs, targets))
    check_batch(arrays)
    return arrays


def _check_global(batch: Batch) -> None:
    """Raise if rows are of this process alone, of several that work together.

    Each process would take its rows for the whole batch, and nothing would add them up.
    """
    if jax.process_count() == 1:
        return
    for path, x in jax.tree.leaves_with_path(batch, is_leaf=is_shared):
        # What is common to all examples may be in every process.
        is_local = not isinstance(x, jax.Array) or x.is_fully_addressable
        if is_local and not is_shared(x):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} is {describe(x)}, known to this process alone "
                f"of {jax.process_count()}; make it one array of all processes, by "
                "jax.make_array_from_process_local_data(sharding, rows_of_this_process)."
            )


def _as_jax(x: Any) -> Array:
    # NumPy reads PyTorch's CPU tensors without a copy; keys of JAX it cannot read.
    return x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x))
