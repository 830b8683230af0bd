"""Which layer gets how many bits: the exact optimum under a budget, and all trade-offs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Picks: TypeAlias = list[tuple[np.ndarray, np.ndarray]]
"""For each layer and point of the front so far: its parent point, and the place of its width."""

# n_l: weights of layer l, b_l: its width in bits, Omega_l(b): its sensitivity at that width


class Allocation(NamedTuple):
    """Widths of layers, and what they add up to.

    Attributes:
      bits: the width of each layer.
      size: the size of the weights, in bits.
      omega: the sum of the sensitivities.
    """

    bits: dict[str, int]
    size: int
    omega: float


def allocate(
    omegas: Mapping[str, Mapping[int, Any]],
    sizes: Mapping[str, int],
    budget: float,
) -> Allocation:
    """Choose widths of least total sensitivity within a size: the exact optimum.

    It solves `min sum_l Omega_l(b_l)` subject to `sum_l n_l b_l <= budget`.

    Args:
      omegas: a table `{layer: {bits: Omega}}`, such as the one that `hawq_v2` returns; layers may
        have different widths to choose from.
      sizes: the numbers of weights n_l by layer, which the function `sizes` returns.
      budget: the size in bits that these weights may have.

    Returns:
      An `Allocation`; of several with the same Omega, one of least size.

    Raises:
      ValueError: no choice meets the budget (the message gives the least size), or `pareto` raises.

    Cost: that of `pareto`.

    Example:
      >>> from curvax.apps import quantization
      >>> omegas = {"first": {2: 5.0, 4: 1.0}, "last": {2: 3.0, 4: 0.5}}
      >>> quantization.allocate(omegas, {"first": 10, "last": 20}, budget=100)
      Allocation(bits={'first': 4, 'last': 2}, size=80, omega=4.0)

    References: Yao et al. (2021), HAWQ-V3, https://arxiv.org/abs/2011.10680, which solves the same
      problem by integer linear programming.
    """
    size, omega, picks = _front(omegas, sizes)
    # The front has growing size and falling Omega: the best choice is the last that fits.
    fits = int(np.searchsorted(size, budget, side="right"))
    if fits == 0:
        raise ValueError(
            f"no choice of widths fits into {budget} bits; the smallest takes {size[0]}."
        )
    return _allocation(omegas, size, omega, picks, fits - 1)


def pareto(omegas: Mapping[str, Mapping[int, Any]], sizes: Mapping[str, int]) -> list[Allocation]:
    """Return every allocation that no other beats in size and Omega both, in order of size.

    Args:
      omegas: a table `{layer: {bits: Omega}}`.
      sizes: the numbers of weights by layer.

    Returns:
      Allocations of growing size and falling Omega; of several that are equal in both, one.

    Raises:
      ValueError: a layer has no size or no widths, or a sensitivity is not finite.

    Cost: a dynamic programme over layers that keeps the sizes worth having: for each layer at most
      (bits in all) / (common divisor of sizes) of them, times the widths.

    Example:
      >>> from curvax.apps import quantization
      >>> omegas = {"first": {2: 5.0, 4: 1.0}, "last": {2: 3.0, 4: 0.5}}
      >>> [(x.size, x.omega) for x in quantization.pareto(omegas, {"first": 10, "last": 20})]
      [(60, 8.0), (80, 4.0), (120, 1.5)]

    References: Dong et al. (2020), HAWQ-V2, https://arxiv.org/abs/1911.03852, section 3.3;
      Nemhauser and Ullmann (1969), Discrete dynamic programming and capital allocation.
    """
    size, omega, picks = _front(omegas, sizes)
    return [_allocation(omegas, size, omega, picks, i) for i in range(len(size))]


def _front(
    omegas: Mapping[str, Mapping[int, Any]], sizes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, Picks]:
    """Return sizes and Omegas of the front, and from which choices its points came."""
    if not omegas:
        raise ValueError("omegas has no layers: nothing to allocate.")
    size, omega, picks = np.zeros(1, np.int64), np.zeros(1), Picks()
    for layer, row in omegas.items():
        values = np.array(list(map(float, row.values())))
        if layer not in sizes or not len(values) or not np.isfinite(values).all():
            sensitivities = dict(zip(row, values.tolist(), strict=True))
            raise ValueError(
                f"layer {layer} needs a size, widths, and finite sensitivities; "
                f"got size {sizes.get(layer)}, sensitivities {sensitivities}."
            )
        # Every point of the front so far, with every width of this layer.
        widths = np.array(list(row), np.int64)
        every_size = (size[:, None] + sizes[layer] * widths).ravel()
        every_omega = (omega[:, None] + values).ravel()
        # A point is on the new front if its Omega is below that of all which are no larger.
        order = np.lexsort((every_omega, every_size))
        least = np.minimum.accumulate(every_omega[order])
        better = np.append(True, least[1:] < least[:-1])
        front = order[better]
        size, omega = every_size[front], every_omega[front]
        # The index of a combination is `point * widths + width`: this undoes it.
        picks.append((front // len(values), front % len(values)))
    return size, omega, picks


def _allocation(
    omegas: Mapping[str, Mapping[int, Any]],
    size: np.ndarray,
    omega: np.ndarray,
    picks: Picks,
    point: int,
) -> Allocation:
    """Follow a point of the front back through the layers, the last one first."""
    bits: dict[str, int] = {}
    parent = point
    layers = reversed(list(omegas))
    for layer, (parents, places) in zip(layers, reversed(picks), strict=True):
        widths = list(omegas[layer])
        bits[layer] = widths[places[parent]]
        parent = int(parents[parent])
    # the layers in the order of omegas again
    in_order = dict(reversed(bits.items()))
    return Allocation(in_order, int(size[point]), float(omega[point]))
