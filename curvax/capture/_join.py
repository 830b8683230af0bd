"""Captures of several batches as one of all their examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax.capture._record import Capture, PerUseArray, UseCotangents


def join_examples(
    batches: Sequence[Mapping[str, list[PerUseArray]]],
    sizes: Sequence[int],
    names: Iterable[str],
    axis: int = 0,
) -> dict[str, list[PerUseArray]]:
    """Give the uses of each batch the examples of all batches, with zeros in those of others.

    A use then has no cotangent in the examples of another batch, and gradients `sum a g'` get
    nothing from it there.

    Args:
      batches: for each batch the arrays of its uses, by kernel.
      sizes: the numbers of examples of the batches.
      names: the names of all kernels.
      axis: the axis of the examples.

    Returns:
      For each kernel the arrays of all its uses, those of the first batch first.
    """
    joined: dict[str, list[PerUseArray]] = {name: [] for name in names}
    for number, arrays in enumerate(batches):
        before, behind = sum(sizes[:number]), sum(sizes[number + 1 :])
        for name, of_batch in joined.items():
            of_batch += [_padded(x, axis, before, behind) for x in arrays.get(name, [])]
    return joined


def joined_captures(
    captures: Sequence[tuple[Capture, UseCotangents]], names: Sequence[str]
) -> tuple[Capture, UseCotangents]:
    """Join captures by example, each with its k cotangents of every example, to one of all rows.

    Where a batch has fewer cotangents for each example than others, the missing ones are zero.

    Args:
      captures: for each batch what `record` has captured, and its cotangents with a leading axis k.
      names: the names of all kernels.

    Returns:
      What `gram` takes, of the rows `[k, b]` with the examples b of all batches.
    """
    # b of every batch, from its outputs, and k, from any of its cotangents.
    sizes, counts = [], []
    for capture, cotangents in captures:
        sizes.append(_length(capture.outputs))
        counts.append(_length(cotangents))
    most = max(counts)

    # Rows [k, b] need one k for all batches.
    inputs, blocks, outside = [], [], []
    for (capture, cotangents), k in zip(captures, counts, strict=True):
        padded = jax.tree.map(lambda x, n=most - k: _padded(x, 0, 0, n), cotangents)
        inputs.append(capture.inputs)
        blocks.append(padded.blocks)
        outside.append(padded.outside)

    first, _ = captures[0]
    joined = UseCotangents(
        blocks=join_examples(blocks, sizes, names, axis=1),
        outside=jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *outside),
    )
    return first._replace(inputs=join_examples(inputs, sizes, names), chunks={}), joined


def _length(tree: PyTree[Array]) -> int:
    """Return the length of the leading axis, which all leaves have."""
    return len(jax.tree.leaves(tree)[0])


def _padded(x: Array, axis: int, before: int, behind: int) -> Array:
    """Add zeros before and behind along one axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = before, behind
    return jnp.pad(x, widths)
