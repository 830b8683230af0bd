"""What primitives that move entries do to a view.

A view in a loop has the loops' axes first: axis i of the variable is axis `hidden + i` of the view,
with `hidden` the number of loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from curvax.capture._views import View, concatenate, cut, reshape, transpose

Move: TypeAlias = Callable[[Any, View, int], list[View]]
"""`(equation, view, hidden) -> views of the results`, for a primitive with one operand."""


def joined(
    eqn: Any,
    views: list[View],
    hidden: int,
) -> View:
    """Concatenate or stack views."""
    if eqn.primitive.name == "concatenate":
        return concatenate(tuple(views), hidden + eqn.params["dimension"])
    axis = hidden + eqn.params["axis"]
    # Stacking is joining along a new axis of size 1.
    rows = [reshape(view, (*view.shape[:axis], 1, *view.shape[axis:])) for view in views]
    return concatenate(tuple(rows), axis)


def _reshape(
    eqn: Any,
    view: View,
    hidden: int,
) -> list[View]:
    # Row-major, and loops stay in front: a reshape of one round is one of all rounds.
    return [reshape(view, (*view.shape[:hidden], *eqn.outvars[0].aval.shape))]


def _transpose(
    eqn: Any,
    view: View,
    hidden: int,
) -> list[View]:
    permutation = (hidden + i for i in eqn.params["permutation"])
    return [transpose(view, (*range(hidden), *permutation))]


def _reverse(
    eqn: Any,
    view: View,
    hidden: int,
) -> list[View]:
    bounds: list[tuple[int | None, int | None, int]] = [*_everything(view)]
    for axis in eqn.params["dimensions"]:
        # A negative step from the end to the beginning.
        bounds[hidden + axis] = (None, None, -1)
    return [cut(view, tuple(bounds))]


def _slice(
    eqn: Any,
    view: View,
    hidden: int,
) -> list[View]:
    """Cut a view at the equation's bounds; axes of loops around it stay whole."""
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    # JAX leaves the strides out where all are 1.
    strides = eqn.params["strides"] or (1,) * len(starts)
    bounds = _everything(view)[:hidden]
    for start, stop, stride in zip(starts, stops, strides, strict=True):
        bounds.append((int(start), int(stop), int(stride)))
    return [cut(view, tuple(bounds))]


def _split(
    eqn: Any,
    view: View,
    hidden: int,
) -> list[View]:
    """Cut a view into consecutive parts along one axis."""
    axis, start = hidden + eqn.params["axis"], 0
    parts = []
    for size in map(int, eqn.params["sizes"]):
        parts.append(_between(view, axis, start, start + size))
        start += size
    return parts


def _unstack(
    eqn: Any,
    view: View,
    hidden: int,
) -> list[View]:
    """Take the slices of a view along one axis, which is dropped."""
    axis = hidden + eqn.params["axis"]
    # Without the axis along which the parts lay.
    shape = (*view.shape[:axis], *view.shape[axis + 1 :])
    parts = []
    for i in range(view.shape[axis]):
        parts.append(reshape(_between(view, axis, i, i + 1), shape))
    return parts


def _between(
    view: View,
    axis: int,
    start: int,
    stop: int,
) -> View:
    """Slice along one axis."""
    bounds = _everything(view)
    bounds[axis] = (start, stop, 1)
    return cut(view, tuple(bounds))


def _everything(view: View) -> list[tuple[int, int, int]]:
    """Return the bounds of a slice that leaves nothing out."""
    return [(0, size, 1) for size in view.shape]


# By name, because jax.extend exports only some of these primitives.
MOVES: Mapping[str, Move] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
}
"""Primitives that move the entries of one operand."""
