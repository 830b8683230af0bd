"""When costly work is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from curvax._checks import check_count, check_integer
from curvax._types import Count
from curvax._xla import refresh_if as refresh_if

Interval: TypeAlias = int | Int[Array, ""] | Callable[[Count], Any]
"""A number of steps, or a schedule of it: a function of the number of steps before this one."""


def check_interval(**intervals: Interval) -> None:
    """Raise if a number of steps is below 1; a schedule shows its values at run time only."""
    for name, interval in intervals.items():
        if not callable(interval):
            check_integer(1, 2**31 - 1, **{name: interval})


def growing_interval(every: Interval, start: int = 10) -> Interval:
    """Return a schedule of intervals that is 1 at first and grows to `every`.

    The interval at step t is the largest power of two that is at most `t / start`, at least 1; from
    step `start every` on it is `every`. So the first `2 start` steps each refresh, and each further
    doubling of the number of steps takes `start` refreshes. (Powers of two divide each other: where
    the interval doubles, no refresh comes early.)

    Early in training curvature changes within a few steps: networks that start with a layer of
    zeros have none below it in step 0. Inverses that are then kept for ten steps can be wrong by
    orders of magnitude.

    Args:
      every: the final interval, in steps. The number 1 is returned as it is, and so is a schedule.
      start: number of steps after which the interval may grow.

    Returns:
      A schedule for `curvature_every` and `inverse_every`.

    Raises:
      ValueError: A number is below 1.

    Cost: up to step `start every` about `start (2 + log2(every))` refreshes take place, instead of
      `start`.

    Example:
      >>> from curvax.optim import growing_interval
      >>> interval = growing_interval(10)
      >>> [int(interval(step)) for step in (0, 19, 25, 50, 1000)]
      [1, 1, 2, 4, 10]
    """
    check_interval(every=every)
    check_count(1, start=start)
    # For the number 1 no work is conditional; a schedule says itself how it begins.
    if callable(every) or (isinstance(every, int) and every == 1):
        return every

    def interval(step: Count) -> Any:
        ratio = jnp.maximum(jnp.asarray(step, jnp.int32) // start, 1)
        power_of_two = 1 << (31 - lax.clz(ratio))
        return jnp.where(ratio < every, power_of_two, every)

    return interval
