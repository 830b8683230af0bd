"""Fake quantization: weights rounded to few levels but kept as floats, with straight-through gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._checks import check_integer, check_params, look_up
from curvax._types import Params, Scalar, at_least_float32
from curvax.spectra import By, layer_paths

Table: TypeAlias = dict[str, dict[int, Scalar]]
"""A number for each layer and each width in bits."""


def kernels(path: str, leaf: Array) -> bool:
    """Leaves of two or more axes: kernels and embeddings, not biases or scales."""
    del path
    return leaf.ndim >= 2


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized.

    Attributes:
      axis: None: one scale for a leaf; an axis or several: one for each index along them (-1: output channels of Flax's
        kernels; (0, -1) where the first axis stacks layers).
      scale: "max": the largest `|w|` is the last level; "least_squares": the scale, of 32 between 0.2 and 1 times that one,
        with the least squared error; weights beyond the last level are put on it.
      by: what a layer is, see `curvax.spectra.layer_paths`; the leaves of one layer have one width.
      quantizable: `(path, leaf) -> bool`; other leaves stay in full precision: by default biases and all else with fewer
        than two axes.
    """

    axis: int | tuple[int, ...] | None = None
    scale: str = "max"
    by: By = None
    quantizable: Callable[[str, Array], bool] = kernels


def quantize(
    params: Params, bits: int | Array | Mapping[str, int | Array], scheme: Scheme | None = None
) -> Params:
    """Round weights to the `2^bits - 1` levels `s {-L, ..., 0, ..., L}`, `L = 2^(bits - 1) - 1`: symmetric, with zero.

    The gradient goes straight through, as if nothing were rounded, so that a loss of quantized params can be fine-tuned:
    `jax.grad(lambda params: objective(quantize(params, bits), batch))`.

    Args:
      params: pytree of float arrays.
      bits: 2 to 8, for all layers or by a layer's name; may be traced. Layers that a dict leaves out stay as they are.
      scheme: scales, layers, and which leaves; None: `Scheme()`.

    Returns:
      a tree like params, in its dtypes.

    Raises:
      ValueError: bits outside [2, 8]; layers that params do not have; an axis that a leaf does not have, by path.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> params = {"w": jnp.array([[0.2, -1.5], [0.9, 0.0]]), "b": jnp.array([0.3])}
      >>> quantization.quantize(params, 2)["w"].tolist()
      [[0.0, -1.5], [1.5, 0.0]]
      >>> quantization.quantize(params, {"['w']": 3}, quantization.Scheme(axis=-2))["w"].tolist()
      [[0.0, -1.5], [0.9..., 0.0]]

    References: Bengio, Leonard and Courville (2013), for the straight-through gradient.
    """
    scheme = scheme or Scheme()
    layers = layers_by_path(params, scheme)
    widths = bits if isinstance(bits, Mapping) else dict.fromkeys(layers.values(), bits)
    unknown = widths.keys() - layers.values()
    if unknown:
        known = ", ".join(dict.fromkeys(layers.values()))
        raise ValueError(
            f"bits names layers that params do not have: {', '.join(sorted(unknown))}; there are {known}."
        )
    check_integer(2, 8, **{f"bits of {layer}": width for layer, width in widths.items()})

    def own(keys: Any, w: Array) -> Array:
        path = jax.tree_util.keystr(keys)
        if path not in layers or layers[path] not in widths:
            return w
        rounded = _rounded(path, w, widths[layers[path]], scheme).astype(w.dtype)
        return lax.stop_gradient(rounded) + (w - lax.stop_gradient(w))

    return jax.tree.map_with_path(own, params)


def perturbations(params: Params, widths: Iterable[int], scheme: Scheme | None = None) -> Table:
    """Return `|Q_b(W_l) - W_l|^2` for every layer l and width b.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> table = quantization.perturbations({"w": jnp.array([[0.25, -1.0]])}, (2, 4))
      >>> {width: round(float(x), 4) for width, x in table["['w']"].items()}
      {2: 0.0625, 4: 0.0013}
    """
    layers = layers_by_path(params, scheme)
    table: Table = {layer: {} for layer in layers.values()}
    for width in widths:
        quantized = dict(_leaves(quantize(params, width, scheme)))
        for path, w in _leaves(params):
            if path in layers:
                row, moved = (
                    table[layers[path]],
                    at_least_float32(quantized[path]) - at_least_float32(w),
                )
                row[width] = row.get(width, 0) + jnp.sum(moved**2)
    return table


def sizes(params: Params, scheme: Scheme | None = None) -> dict[str, int]:
    """Return the number of weights n_l of every layer that the scheme quantizes."""
    layers, found = layers_by_path(params, scheme), dict[str, int]()
    for path, leaf in _leaves(params):
        if path in layers:
            found[layers[path]] = found.get(layers[path], 0) + leaf.size
    return found


def layers_by_path(params: Params, scheme: Scheme | None = None) -> dict[str, str]:
    """Return the layer of every leaf that the scheme quantizes; its method `get` is a `by` for `curvax.spectra.traces_by`.

    Raises:
      ValueError: there is nothing to quantize.
    """
    check_params(params)
    scheme, leaves = scheme or Scheme(), dict(_leaves(params))
    layers = {
        path: layer for layer, paths in layer_paths(params, scheme.by).items() for path in paths
    }
    found = {
        path: layer for path, layer in layers.items() if scheme.quantizable(path, leaves[path])
    }
    if not found:
        raise ValueError(
            "the scheme quantizes no leaf of params; see Scheme.quantizable, by default those of two or more axes."
        )
    return found


def _leaves(tree: Params) -> list[tuple[str, Array]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _rounded(path: str, w: Array, bits: int | Array, scheme: Scheme) -> Array:
    choose = look_up("scale", scheme.scale, {"max": _by_largest, "least_squares": _by_error})
    axes = (
        ()
        if scheme.axis is None
        else (scheme.axis,)
        if isinstance(scheme.axis, int)
        else scheme.axis
    )
    if any(not -w.ndim <= axis < w.ndim for axis in axes):
        raise ValueError(f"axis {scheme.axis} of the scheme is none of {path}, which has {w.ndim}.")
    others = tuple(i for i in range(w.ndim) if i not in {axis % w.ndim for axis in axes})
    wide = at_least_float32(w)
    last = jnp.exp2(jnp.asarray(bits, wide.dtype) - 1) - 1  # L
    step = choose(wide, jnp.max(jnp.abs(wide), axis=others, keepdims=True) / last, last, others)
    return _nearest(wide, step, last)


def _nearest(w: Array, step: Array, last: Array) -> Array:
    safe = jnp.where(step > 0, step, 1)  # all weights are zero
    return step * jnp.clip(jnp.round(w / safe), -last, last)


def _by_largest(w: Array, step: Array, last: Array, others: tuple[int, ...]) -> Array:
    del w, last, others
    return step


def _by_error(w: Array, step: Array, last: Array, others: tuple[int, ...]) -> Array:
    def attempt(
        best: tuple[Array, Array], factor: Float[Array, ""]
    ) -> tuple[tuple[Array, Array], None]:
        error = jnp.sum((_nearest(w, factor * step, last) - w) ** 2, axis=others, keepdims=True)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, factor * step, best[1])), None

    start = jnp.full_like(step, jnp.inf), step
    return lax.scan(attempt, start, jnp.linspace(1, 0.2, 32, dtype=w.dtype))[0][1]
