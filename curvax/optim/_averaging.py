"""Averages of a diagonal within a leaf, which AdaHessian takes to lower the noise of its estimate."""

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
    """Axes of a Flax parameter over which curvature is averaged, by its number of dimensions.

    Kernels `[in, out]`: the input axis. Kernels `[*spatial, in, out]` with three or more axes: all but the last two.
    Vectors, scalars, and leaves named bias, scale or embedding: none. (The kernels of attention `[in, heads, features]`
    are averaged over the input axis; those stacked by `nn.scan` need axes of their own.)
    """
    if re.search(r"\b(bias|scale|embedding)\b", path):
        return ()
    return (0,) if leaf.ndim == 2 else tuple(range(max(leaf.ndim - 2, 0)))


def spatial_average(axes: Callable[[str, Array], tuple[int, ...]] = flax_axes) -> Averaging:
    """Average each leaf over some of its axes, and broadcast back.

    Args:
      axes: `(path, leaf) -> axes`, with the path as `jax.tree_util.keystr` prints it. Default: right for Flax layouts
        (convolutions `[*spatial, in, out]` over the spatial axes, dense kernels `[in, out]` over the input axis).

    Example: average over the output axis in layers named head
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.optim._averaging import flax_axes
      >>> average = curvax.optim.spatial_average(lambda path, leaf: (1,) if "head" in path else flax_axes(path, leaf))
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> {k: v.tolist() for k, v in average({"head": x, "kernel": x, "embedding": x}).items()}
      {'embedding': [[1.0, 2.0], [3.0, 6.0]], 'head': [[1.5, 1.5], [4.5, 4.5]], 'kernel': [[2.0, 4.0], [2.0, 4.0]]}

    References: Yao et al. (2021), AdaHessian, section 3.2; axes of the reference code, moved to Flax's layout.
    """

    def average(path: tuple[object, ...], x: Array) -> Array:
        return jnp.broadcast_to(
            jnp.mean(x, axes(jax.tree_util.keystr(path), x), keepdims=True), x.shape
        )

    return lambda tree: jax.tree.map_with_path(average, tree)


def block_average(size: int) -> Averaging:
    """Average each leaf over consecutive groups of `size` entries in row-major order; a ragged last group by itself.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.optim.block_average(2)(jnp.array([1.0, 3.0, 5.0])).tolist()
      [2.0, 2.0, 5.0]

    References: Yao et al. (2021), AdaHessian, section 3.2; the reference code for transformers uses 32.
    """
    check_at_least(1, size=size)

    def average(x: Float[Array, "..."]) -> Float[Array, "..."]:
        groups = jnp.pad(x.ravel(), (0, -x.size % size)).reshape(-1, size)
        counts = jnp.clip(x.size - size * jnp.arange(len(groups)), 0, size)
        means = jnp.broadcast_to((groups.sum(1) / counts)[:, None], groups.shape)
        return means.ravel()[: x.size].reshape(x.shape)

    return lambda tree: jax.tree.map(average, tree)
