"""Conditional work that stays conditional under `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from curvax._xla import fast_convs_in_loops

T = TypeVar("T")


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
