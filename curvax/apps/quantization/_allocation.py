"""Which layer gets how many bits: the exact minimum of a sum over layers under a budget, and all trade-offs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Picks: TypeAlias = list[tuple[np.ndarray, np.ndarray]]
"""For each layer and each point of the front so far: the point that it came from, and the place of the layer's width."""


class Allocation(NamedTuple):
    """Widths of layers, and what they add up to.

    Attributes:
      bits: by layer.
      size: of the weights, in bits.
      omega: sum of the sensitivities.
    """

    bits: dict[str, int]
    size: int
    omega: float


def allocate(
    omegas: Mapping[str, Mapping[int, Any]], sizes: Mapping[str, int], budget: float
) -> Allocation:
    """Choose a width for every layer so that the sum of sensitivities is least within a size: exactly.

    `min sum_l Omega_l(b_l)` subject to `sum_l n_l b_l <= budget`.

    Args:
      omegas: `{layer: {bits: Omega}}`, such as from `hawq_v2`; layers may have different widths to choose from.
      sizes: weights n_l by layer, such as from `sizes`.
      budget: in bits, for these weights.

    Returns:
      `Allocation`; of several with the same Omega, a smallest.

    Raises:
      ValueError: a budget that no choice meets, with the smallest that one does; see also `pareto`.

    Cost: that of `pareto`.

    Example:
      >>> from curvax.apps import quantization
      >>> omegas = {"first": {2: 5.0, 4: 1.0}, "last": {2: 3.0, 4: 0.5}}
      >>> quantization.allocate(omegas, {"first": 10, "last": 20}, budget=100)
      Allocation(bits={'first': 4, 'last': 2}, size=80, omega=4.0)

    References: Yao et al. (2021), HAWQ-V3, which solves the same problem by integer linear programming.
    """
    size, omega, picks = _front(omegas, sizes)
    fits = int(np.searchsorted(size, budget, side="right"))
    if fits == 0:
        raise ValueError(
            f"no choice of widths fits into {budget} bits; the smallest takes {size[0]}."
        )
    return _allocation(omegas, size, omega, picks, fits - 1)


def pareto(omegas: Mapping[str, Mapping[int, Any]], sizes: Mapping[str, int]) -> list[Allocation]:
    """Return every allocation that no other beats in size and Omega both, in order of size.

    Args:
      omegas: `{layer: {bits: Omega}}`.
      sizes: weights by layer.

    Returns:
      allocations of growing size and falling Omega; of several that are equal in both, one.

    Raises:
      ValueError: layers without a size, without widths, or with a sensitivity that is not finite.

    Cost: a dynamic programme over layers that keeps the sizes worth having: at most (bits in all) / (common divisor of
      sizes) of them, times the widths, for each layer.

    Example:
      >>> from curvax.apps import quantization
      >>> omegas = {"first": {2: 5.0, 4: 1.0}, "last": {2: 3.0, 4: 0.5}}
      >>> [(x.size, x.omega) for x in quantization.pareto(omegas, {"first": 10, "last": 20})]
      [(60, 8.0), (80, 4.0), (120, 1.5)]

    References: Dong et al. (2020), HAWQ-V2, section 3.3; Nemhauser and Ullmann (1969), for the programme.
    """
    size, omega, picks = _front(omegas, sizes)
    return [_allocation(omegas, size, omega, picks, i) for i in range(len(size))]


def _front(
    omegas: Mapping[str, Mapping[int, Any]], sizes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, Picks]:
    """Return sizes and Omegas of the front, and how its points came about."""
    if not omegas:
        raise ValueError("omegas has no layers: nothing to allocate.")
    size, omega, picks = np.zeros(1, np.int64), np.zeros(1), Picks()
    for layer, row in omegas.items():
        values = np.array([float(x) for x in row.values()])
        if layer not in sizes or not len(values) or not np.isfinite(values).all():
            raise ValueError(
                f"layer {layer} needs a size, widths, and finite sensitivities; got size {sizes.get(layer)}, "
                f"sensitivities { {width: float(x) for width, x in row.items()} }."
            )
        every_size = (size[:, None] + sizes[layer] * np.array(list(row), np.int64)).ravel()
        every_omega = (omega[:, None] + values).ravel()
        order = np.lexsort((every_omega, every_size))
        least = np.minimum.accumulate(every_omega[order])
        better = np.append(True, least[1:] < least[:-1])  # than all that are no larger
        kept = order[better]
        size, omega = every_size[kept], every_omega[kept]
        picks.append((kept // len(values), kept % len(values)))
    return size, omega, picks


def _allocation(
    omegas: Mapping[str, Mapping[int, Any]],
    size: np.ndarray,
    omega: np.ndarray,
    picks: Picks,
    point: int,
) -> Allocation:
    bits, at = {}, point
    for (layer, row), (parents, places) in reversed(list(zip(omegas.items(), picks, strict=True))):
        bits[layer] = list(row)[places[at]]
        at = int(parents[at])
    return Allocation(dict(reversed(bits.items())), int(size[point]), float(omega[point]))
