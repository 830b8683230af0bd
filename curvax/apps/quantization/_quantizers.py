"""Fake quantization: weights on few levels that stay floats, with straight-through gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._checks import check_integer, check_params, look_up
from curvax._trees import by_path
from curvax._types import Params, Scalar, at_least_float32
from curvax.apps._prunable import kernels
from curvax.spectra import By, layer_paths

Table: TypeAlias = dict[str, dict[int, Scalar]]
"""A number for each layer and each width in bits."""

Quantized: TypeAlias = tuple[Array, Array]
"""An error and the step that gives it, one of each for every scale of a leaf."""

# w: weights of a leaf, L: number of the last level, step: distance of two levels (s below)


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized.

    Attributes:
      axis: the axis or axes along which each index has a scale of its own (-1: output channels of
        Flax's kernels; (0, -1) where the first axis stacks layers); None: one scale for a leaf.
      scale: "max" puts the last level on the largest `|w|`; "least_squares" takes, of 32 scales
        between 0.2 and 1 times that one, the one with the least squared error, and puts weights
        beyond the last level on it.
      by: what a layer is, see `curvax.spectra.layer_paths`; all leaves of a layer have one width.
      quantizable: a function `(path, leaf) -> bool`; leaves for which it is False stay in full
        precision. The default leaves out biases and all else with fewer than two axes.
    """

    axis: int | tuple[int, ...] | None = None
    scale: str = "max"
    by: By = None
    quantizable: Callable[[str, Array], bool] = kernels


def quantize(
    params: Params,
    bits: int | Array | Mapping[str, int | Array],
    scheme: Scheme | None = None,
) -> Params:
    """Round weights to `s {-L, ..., 0, ..., L}` with `L = 2^(bits - 1) - 1`.

    These are `2^bits - 1` levels: symmetric, with zero.

    The gradient goes straight through, as if nothing were rounded, so that a loss of quantized
    params can be fine-tuned: `jax.grad(lambda params: objective(quantize(params, bits), batch))`.

    Args:
      params: a pytree of float arrays.
      bits: an integer from 2 to 8 for all layers, or a dict of them by the layer's name; layers
        that the dict leaves out are not changed. They may be traced.
      scheme: the scales, layers and leaves; None: `Scheme()`.

    Returns:
      A tree like params, in its dtypes.

    Raises:
      ValueError: bits are outside [2, 8] or name layers that params do not have, or a leaf (named
        by path) does not have the scheme's axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> params = {"w": jnp.array([[0.2, -1.5], [0.9, 0.0]]), "b": jnp.array([0.3])}
      >>> quantization.quantize(params, 2)["w"].tolist()
      [[0.0, -1.5], [1.5, 0.0]]
      >>> quantization.quantize(params, {"['w']": 3}, quantization.Scheme(axis=-2))["w"].tolist()
      [[0.0, -1.5], [0.9..., 0.0]]

    References: Bengio, Leonard and Courville (2013), Estimating or propagating gradients through
      stochastic neurons, https://arxiv.org/abs/1308.3432, for the straight-through gradient.
    """
    scheme = scheme or Scheme()
    widths = widths_by_path(params, bits, scheme)

    def of_leaf(keys: Any, w: Array) -> Array:
        path = jax.tree_util.keystr(keys)
        if path not in widths:
            return w
        wide = at_least_float32(w)
        grid = grid_of(path, wide, widths[path], scheme)
        rounded = nearest(wide, grid.step, grid.last).astype(w.dtype)
        # Straight-through estimator: the value of `rounded`, the derivative of w.
        return lax.stop_gradient(rounded) + (w - lax.stop_gradient(w))

    return jax.tree.map_with_path(of_leaf, params)


def perturbations(
    params: Params,
    widths: Iterable[int],
    scheme: Scheme | None = None,
) -> Table:
    """Return `|Q_b(W_l) - W_l|^2` for every layer l and width b.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> table = quantization.perturbations({"w": jnp.array([[0.25, -1.0]])}, (2, 4))
      >>> {width: round(float(x), 4) for width, x in table["['w']"].items()}
      {2: 0.0625, 4: 0.0013}
    """
    layers, weights = layers_by_path(params, scheme), by_path(params)
    table: Table = {layer: {} for layer in layers.values()}
    for width in widths:
        quantized = by_path(quantize(params, width, scheme))
        for path, layer in layers.items():
            error = at_least_float32(quantized[path]) - at_least_float32(weights[path])
            row = table[layer]
            row[width] = row.get(width, 0) + jnp.sum(error**2)
    return table


def sizes(params: Params, scheme: Scheme | None = None) -> dict[str, int]:
    """Return the number of weights n_l of every layer that the scheme quantizes."""
    layers, weights = layers_by_path(params, scheme), by_path(params)
    numbers = dict.fromkeys(layers.values(), 0)
    for path, layer in layers.items():
        numbers[layer] += weights[path].size
    return numbers


def layers_by_path(params: Params, scheme: Scheme | None = None) -> dict[str, str]:
    """Return the layer of every leaf that the scheme quantizes, by path.

    The method `get` of this dict is a `by` for `curvax.spectra.traces_by`.

    Raises:
      ValueError: there is nothing to quantize.
    """
    check_params(params)
    scheme, leaves = scheme or Scheme(), by_path(params)
    layers = {}
    for layer, paths in layer_paths(params, scheme.by).items():
        chosen = [path for path in paths if scheme.quantizable(path, leaves[path])]
        layers.update(dict.fromkeys(chosen, layer))
    if not layers:
        raise ValueError(
            "the scheme quantizes no leaf of params; see Scheme.quantizable, by default those of "
            "two or more axes."
        )
    return layers


def widths_by_path(
    params: Params,
    bits: int | Array | Mapping[str, int | Array],
    scheme: Scheme,
) -> dict[str, int | Array]:
    """Return the width of every leaf that has one, by path; raises as `quantize` does."""
    layers = layers_by_path(params, scheme)
    widths = bits if isinstance(bits, Mapping) else dict.fromkeys(layers.values(), bits)
    unknown = widths.keys() - layers.values()
    if unknown:
        # each name once, in the order of params
        known = ", ".join(dict.fromkeys(layers.values()))
        raise ValueError(
            "bits names layers that params do not have: "
            f"{', '.join(sorted(unknown))}; there are {known}."
        )
    named = {f"bits of {layer}": width for layer, width in widths.items()}
    check_integer(2, 8, **named)
    # Layers that the dict leaves out have no width.
    return {path: widths[layer] for path, layer in layers.items() if layer in widths}


class Grid(NamedTuple):
    """The levels `step {-L, ..., L}` of a leaf.

    Attributes:
      step: the distance of two levels, of a shape that broadcasts to the leaf's.
      last: L, a scalar.
    """

    step: Array
    last: Array


def grid_of(
    path: str,
    wide: Array,
    bits: int | Array,
    scheme: Scheme,
) -> Grid:
    """Choose the levels of one leaf, which is in at least float32."""
    scales = {"max": _largest_step, "least_squares": _best_step}
    choose_step = look_up("scale", scheme.scale, scales)
    axes: tuple[int, ...] = ()
    if scheme.axis is not None:
        axes = (scheme.axis,) if isinstance(scheme.axis, int) else scheme.axis
    if any(not -wide.ndim <= axis < wide.ndim for axis in axes):
        raise ValueError(
            f"axis {scheme.axis} of the scheme is none of {path}, which has {wide.ndim}."
        )
    # Weights that differ only in these axes share a scale.
    scaled_axes = {axis % wide.ndim for axis in axes}
    shared = tuple(axis for axis in range(wide.ndim) if axis not in scaled_axes)
    last = jnp.exp2(jnp.asarray(bits, wide.dtype) - 1) - 1  # L = 2^(bits - 1) - 1
    largest_step = jnp.max(jnp.abs(wide), axis=shared, keepdims=True) / last
    return Grid(choose_step(wide, largest_step, last, shared), last)


def nearest(
    w: Array,
    step: Array,
    last: Array,
) -> Array:
    """Round to the nearest of the levels `step {-L, ..., L}`."""
    # A step of 0 means that all weights are zero, and so are the levels.
    nonzero = jnp.where(step > 0, step, 1)
    return step * jnp.clip(jnp.round(w / nonzero), -last, last)


def _largest_step(
    w: Array,
    step: Array,
    last: Array,
    shared: tuple[int, ...],
) -> Array:
    # the step that puts L on the largest |w|, as it came
    del w, last, shared
    return step


def _best_step(
    w: Array,
    step: Array,
    last: Array,
    shared: tuple[int, ...],
) -> Array:
    """Search the step of least squared error among 32 between 0.2 and 1 times the largest."""

    def attempt(best: Quantized, factor: Float[Array, ""]) -> tuple[Quantized, None]:
        least_error, best_step = best
        candidate = factor * step
        squares = (nearest(w, candidate, last) - w) ** 2
        error = jnp.sum(squares, axis=shared, keepdims=True)
        better = error < least_error
        least_error = jnp.where(better, error, least_error)
        return (least_error, jnp.where(better, candidate, best_step)), None

    # From the largest step down, so that of equal ones it stays: no weight is clipped there.
    factors = jnp.linspace(1, 0.2, 32, dtype=w.dtype)
    (_, best_step), _ = lax.scan(attempt, (jnp.full_like(step, jnp.inf), step), factors)
    return best_step
