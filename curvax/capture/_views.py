"""Structural views: arrays made of entries of parameters by moves alone, written as expressions of static facts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class View:
    """An array whose every entry is an entry of a leaf; hashable, and independent of any program.

    Attributes:
      move: "leaf", "reshape", "transpose", "slice" or "concatenate".
      shape: of the array.
      how: the move's settings: path of the leaf; permutation; (start, stop, step) by axis; axis.
      of: the views that are moved.
    """

    move: str
    shape: tuple[int, ...]
    how: tuple[Any, ...] = ()
    of: tuple[View, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths of the leaves that it reads, each once, in order."""
        return tuple(dict.fromkeys(_reads(self)))

    def read(self, leaves: Mapping[str, Any]) -> Any:
        """Make the array of the leaves by path (NumPy or JAX arrays)."""
        if self.move == "leaf":
            return leaves[self.how[0]]
        parts = [view.read(leaves) for view in self.of]
        if self.move == "reshape":
            return parts[0].reshape(self.shape)
        if self.move == "transpose":
            return parts[0].transpose(self.how)
        if self.move == "slice":
            return parts[0][tuple(slice(*bounds) for bounds in self.how)]
        return parts[0].__array_namespace__().concatenate(parts, axis=self.how[0])

    def __str__(self) -> str:
        """Write the view as NumPy would, without reshapes and transposes."""
        if self.move == "slice":
            bounds = zip(self.how, self.of[0].shape, strict=True)
            text = ", ".join(
                _bounds_text(start, stop, step, size) for (start, stop, step), size in bounds
            )
            return f"{self.of[0]}[{text}]"
        if self.move == "concatenate":
            return " | ".join(map(str, self.of))
        return str(self.how[0]) if self.move == "leaf" else str(self.of[0])


def leaf_view(path: str, shape: tuple[int, ...]) -> View:
    """View a whole leaf."""
    return View("leaf", tuple(shape), (path,))


def reshape(view: View, shape: tuple[int, ...]) -> View:
    """View the entries in another shape, in row-major order."""
    if view.shape == tuple(shape):
        return view
    if view.move == "reshape":
        return reshape(view.of[0], shape)
    return View("reshape", tuple(map(int, shape)), (), (view,))


def transpose(view: View, permutation: tuple[int, ...]) -> View:
    """Permute the axes. Axes of size 1 do not count, so that the same entries in the same order are the same view."""
    shape = tuple(view.shape[i] for i in permutation)
    kept = [i for i in permutation if view.shape[i] > 1]
    if kept == sorted(kept):
        return reshape(view, shape)
    narrow = reshape(view, tuple(size for size in view.shape if size > 1))
    order = tuple(sorted(kept).index(i) for i in kept)
    if narrow.move == "transpose":
        return reshape(transpose(narrow.of[0], tuple(narrow.how[i] for i in order)), shape)
    return reshape(
        View("transpose", tuple(narrow.shape[i] for i in order), order, (narrow,)), shape
    )


def cut(view: View, bounds: tuple[tuple[int | None, int | None, int], ...]) -> View:
    """Slice, one (start, stop, step) for each axis; a negative step reverses."""
    shape = tuple(len(range(size)[slice(*b)]) for b, size in zip(bounds, view.shape, strict=True))
    if all(b == (0, size, 1) for b, size in zip(bounds, view.shape, strict=True)):
        return view
    return View("slice", shape, tuple(tuple(b) for b in bounds), (view,))


def concatenate(views: tuple[View, ...], axis: int) -> View:
    """Join views along an axis."""
    first = views[0].shape
    shape = (*first[:axis], sum(view.shape[axis] for view in views), *first[axis + 1 :])
    return views[0] if len(views) == 1 else View("concatenate", shape, (axis,), views)


def entry_numbers(view: View, leaves: Mapping[str, tuple[int, ...]]) -> Any:
    """Number all entries of `leaves` (shapes by path) in order; return the numbers that the view is made of."""
    starts = np.cumsum([0, *(math.prod(shape) for shape in leaves.values())])
    return view.read(
        {
            path: np.arange(start, start + math.prod(shape)).reshape(shape)
            for (path, shape), start in zip(leaves.items(), starts, strict=False)
        }
    )


def _reads(view: View) -> Iterator[str]:
    if view.move == "leaf":
        yield view.how[0]
    for part in view.of:
        yield from _reads(part)


def _bounds_text(start: int | None, stop: int | None, step: int, size: int) -> str:
    text = f"{start or ''}:{'' if stop in (None, size) else stop}"
    return text if step == 1 else f"{text}:{step}"
