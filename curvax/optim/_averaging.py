"""Averages of a diagonal within a leaf, by which AdaHessian lowers the noise of its estimate."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._checks import check_at_least

Averaging: TypeAlias = Callable[[PyTree[Array]], PyTree[Array]]
"""Replace the entries of each leaf by averages, keeping shapes."""


def flax_axes(path: str, leaf: Array) -> tuple[int, ...]:
    """Return the axes of a Flax parameter over which its curvature is averaged.

    Kernels `[in, out]` are averaged over the input axis, kernels `[*spatial, in, out]` with three
    or more axes over all but the last two. Vectors, scalars, and leaves named bias, scale or
    embedding are not averaged. (The kernels of attention `[in, heads, features]` are averaged over
    the input axis; those stacked by `nn.scan` need axes of their own.)
    """
    if re.search(r"\b(bias|scale|embedding)\b", path):
        return ()
    if leaf.ndim == 2:
        return (0,)
    return tuple(range(max(leaf.ndim - 2, 0)))


def spatial_average(axes: Callable[[str, Array], tuple[int, ...]] = flax_axes) -> Averaging:
    """Average each leaf over some of its axes, and broadcast the result back.

    Args:
      axes: `(path, leaf) -> axes`, with the path as `jax.tree_util.keystr` prints it. The default
        is right for Flax layouts (convolutions `[*spatial, in, out]` over the spatial axes, dense
        kernels `[in, out]` over the input axis).

    Example: average over the output axis in layers named head.
      >>> import jax.numpy as jnp, curvax
      >>> def axes(path, leaf):
      ...     return (1,) if "head" in path else curvax.optim.flax_axes(path, leaf)
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> averages = curvax.optim.spatial_average(axes)({"head": x, "kernel": x, "embedding": x})
      >>> averages["embedding"].tolist(), averages["head"].tolist(), averages["kernel"].tolist()
      ([[1.0, 2.0], [3.0, 6.0]], [[1.5, 1.5], [4.5, 4.5]], [[2.0, 4.0], [2.0, 4.0]])

    References: Yao et al. (2021), AdaHessian, section 3.2, https://arxiv.org/abs/2006.00719; the
      axes are those of the reference code, moved to Flax's layout.
    """

    def average_leaf(path: tuple[object, ...], x: Array) -> Array:
        # D_i = mean of D over the block that entry i is in, here a slice along the axes.
        means = jnp.mean(x, axes(jax.tree_util.keystr(path), x), keepdims=True)
        return jnp.broadcast_to(means, x.shape)

    def average(tree: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map_with_path(average_leaf, tree)

    return average


def block_average(size: int) -> Averaging:
    """Average each leaf over consecutive groups of `size` entries in row-major order.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.optim.block_average(2)(jnp.array([1.0, 3.0, 5.0])).tolist()
      [2.0, 2.0, 5.0]

    References: Yao et al. (2021), AdaHessian, section 3.2, https://arxiv.org/abs/2006.00719; the
      reference code for transformers uses 32.
    """
    check_at_least(1, size=size)

    def average_leaf(x: Float[Array, "..."]) -> Float[Array, "..."]:
        padding = -x.size % size
        groups = jnp.pad(x.ravel(), (0, padding)).reshape(-1, size)
        # The last group has fewer entries, and its padding counts for nothing.
        starts = size * jnp.arange(len(groups))
        counts = jnp.clip(x.size - starts, 0, size)
        means = groups.sum(1) / counts
        spread = jnp.broadcast_to(means[:, None], groups.shape).ravel()
        return spread[: x.size].reshape(x.shape)

    def average(tree: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(average_leaf, tree)

    return average
