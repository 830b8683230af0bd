"""Which layers can be quantized within a tolerance: the most, by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from curvax._checks import check_function


class LargestSet(NamedTuple):
    """The layers that can be quantized.

    Attributes:
      layers: their names, the least sensitive first.
      value: what `evaluate` returned for them.
      evaluations: the values by number of layers, in the order in which they were asked for.
    """

    layers: tuple[str, ...]
    value: float
    evaluations: dict[int, float]


def largest_set(
    evaluate: Callable[[tuple[str, ...]], Any],
    sensitivities: Mapping[str, Any],
    limit: float,
    *,
    larger_is_better: bool = False,
) -> LargestSet:
    """Find the largest number of layers that can be quantized within a limit.

    Layers are taken in the order of their sensitivity, the smallest first. The number k is the
    largest with `evaluate(first k layers) <= limit`, by bisection. It is the largest of all if the
    value grows with every layer (falls, for `larger_is_better`); if it does not, k is within the
    limit and k + 1 is not, and larger sets may be within it again.

    Args:
      evaluate: a function `layers -> value` of the network in which these layers are quantized: the
        loss, an error rate, an accuracy.
      sensitivities: a number for every layer, by which they are ordered; equal ones stay as they
        come. From a table of several widths take those of one: `{l: row[4] for l, row in
        omegas.items()}`.
      limit: the largest value that is allowed (the smallest, for `larger_is_better`), such as 0.999
        times the accuracy of the network as it is.
      larger_is_better: whether values are accuracies, of which at least `limit` is asked.

    Returns:
      A `LargestSet`. A value that is NaN is not within a limit.

    Raises:
      ValueError: there are no layers, a sensitivity or the limit is NaN, or not even the network
        without quantized layers is within the limit.
      TypeError: `evaluate` is no function.

    Cost: at most `log2(n + 1) + 1` evaluations for n layers.

    Example: each quantized layer costs 0.25.
      >>> from curvax.apps import quantization
      >>> layers = {"a": 5.0, "b": 1.0, "c": 2.0, "d": 9.0}
      >>> quantization.largest_set(lambda chosen: 0.25 * len(chosen), layers, limit=0.5)
      LargestSet(layers=('b', 'c'), value=0.5, evaluations={2: 0.5, 3: 0.75})

    References: bisection over a sorted list of sensitivities is what work on inter-layer dependency
      uses, which we know by its abstract only; this is our own form of it.
    """
    check_function("evaluate", evaluate, "layers -> value", "lambda layers: loss(layers)")
    values = {layer: float(x) for layer, x in sensitivities.items()}
    unknown = [layer for layer, x in values.items() if math.isnan(x)]
    if not values or unknown or math.isnan(limit):
        raise ValueError(
            "largest_set needs layers, their sensitivities and a limit, none of them NaN; got "
            f"{len(values)} layers, NaN for {unknown}, limit {limit}."
        )
    # sorted() is stable
    order = sorted(values, key=values.__getitem__)
    evaluations: dict[int, float] = {}

    def is_within(number: int) -> bool:
        value = float(evaluate(tuple(order[:number])))
        evaluations[number] = value
        return value >= limit if larger_is_better else value <= limit

    # Invariant: `low` layers are within the limit (0 is checked at the end), `high` are not.
    low, high = 0, len(order) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if is_within(middle):
            low = middle
        else:
            high = middle
    if low == 0 and not is_within(0):
        raise ValueError(
            f"without any quantized layer the value is {evaluations[0]}, which the limit {limit} "
            "does not allow; choose a limit from the value of the network as it is."
        )
    return LargestSet(tuple(order[:low]), evaluations[low], evaluations)
