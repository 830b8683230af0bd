"""When costly work is due, and conditional work that stays conditional under `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from curvax._checks import check_count, check_integer
from curvax._types import Count
from curvax._xla import fast_convs_in_loops

T = TypeVar("T")

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


def refresh_if(
    pred: Bool[Array, ""], fn: Callable[..., T], keep: Callable[..., T], *operands: object
) -> T:
    """Return `fn(*operands)` where `pred` holds, else `keep(*operands)`, under `vmap` too.

    A `lax.cond` on a predicate that differs between the members of a `vmap` becomes a `select`,
    which runs both branches every time. Here the condition is whether *any* member asks; then each
    member picks its result.

    Args:
      pred: a scalar bool.
      fn: the costly branch.
      keep: the cheap branch. It runs under `pred` too, for the members that do not ask.
      *operands: the arguments of both branches, whose results must agree in structure, shapes and
        dtypes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax.optim import refresh_if
      >>> f = jax.vmap(lambda pred, x: refresh_if(pred, jnp.sqrt, jnp.negative, x))
      >>> f(jnp.array([True, False]), jnp.array([4.0, 9.0])).tolist()
      [2.0, -9.0]
    """

    def refresh(*operands: object) -> T:
        # Inside a `vmap` this branch runs for every member as soon as one asks; the others keep
        # what they have.
        fresh, old = fast_convs_in_loops(fn)(*operands), keep(*operands)
        chosen: T = jax.tree.map(lambda new, old: jnp.where(pred, new, old), fresh, old)
        return chosen

    result: T = lax.cond(_any_member(pred), refresh, keep, *operands)
    return result


@jax.custom_batching.custom_vmap
def _any_member(pred: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return `pred`; over the members of a `vmap`, one unbatched answer: does it hold for any?"""
    return pred


@_any_member.def_vmap
def _(
    axis_size: int, in_batched: list[bool], preds: Bool[Array, " members"]
) -> tuple[Bool[Array, ""], bool]:
    del axis_size, in_batched
    return _any_member(jnp.any(preds)), False  # recursion, for there may be an outer vmap
