"""Structural views: arrays made of entries of parameters by moves alone, as static expressions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class View:
    """An array whose every entry is an entry of a leaf; hashable, and independent of any program.

    Attributes:
      move: "leaf", "reshape", "transpose", "slice" or "concatenate".
      shape: the shape of the array.
      how: the settings of the move: the path of the leaf; the permutation; one
        (start, stop, step) for each axis; the axis.
      of: the views that are moved.
    """

    move: str
    shape: tuple[int, ...]
    how: tuple[Any, ...] = ()
    of: tuple[View, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths of the leaves that the view reads, each once, in order."""
        return tuple(self.leaf_shapes)

    @property
    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the leaves that the view reads, by path."""
        return {node.how[0]: node.shape for node in _leaf_nodes(self)}

    @property
    def repeats(self) -> bool:
        """Whether some leaf occurs more than once in the expression, so that an entry might."""
        # More entries than the leaves have, or a leaf written twice.
        sizes = map(math.prod, self.leaf_shapes.values())
        nodes = list(_leaf_nodes(self))
        return math.prod(self.shape) > sum(sizes) or len(nodes) > len(self.leaves)

    def read(self, leaves: Mapping[str, Any]) -> Any:
        """Make the array out of the leaves by path (NumPy or JAX arrays)."""
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
        if self.move == "leaf":
            return str(self.how[0])
        if self.move == "slice":
            axes = zip(self.how, self.of[0].shape, strict=True)
            text = ", ".join(_bounds_text(bounds, size) for bounds, size in axes)
            return f"{self.of[0]}[{text}]"
        if self.move == "concatenate":
            return " | ".join(map(str, self.of))
        return str(self.of[0])


def leaf_view(
    path: str,
    shape: tuple[int, ...],
) -> View:
    """View all of a leaf."""
    return View("leaf", tuple(shape), (path,))


def reshape(
    view: View,
    shape: tuple[int, ...],
) -> View:
    """View the entries in another shape, in row-major order."""
    if view.shape == tuple(shape):
        return view
    # Of two reshapes the first is forgotten, so that equal views are equal expressions.
    if view.move == "reshape":
        return reshape(view.of[0], shape)
    return View("reshape", tuple(map(int, shape)), (), (view,))


def transpose(
    view: View,
    permutation: tuple[int, ...],
) -> View:
    """Permute the axes.

    Axes of size 1 do not count: the same entries in the same order are the same expression.
    """
    shape = tuple(view.shape[i] for i in permutation)
    # 1. The axes longer than 1 alone decide whether anything moves.
    long_axes = [i for i in permutation if view.shape[i] > 1]
    if long_axes == sorted(long_axes):
        return reshape(view, shape)
    # 2. Permute those, ...
    narrow = reshape(view, tuple(size for size in view.shape if size > 1))
    order = tuple(sorted(long_axes).index(i) for i in long_axes)
    # 3. ... two permutations one after the other being one.
    if narrow.move == "transpose":
        composed = tuple(narrow.how[i] for i in order)
        return reshape(transpose(narrow.of[0], composed), shape)
    permuted = View(
        "transpose",
        tuple(narrow.shape[i] for i in order),
        order,
        (narrow,),
    )
    return reshape(permuted, shape)


def cut(
    view: View,
    bounds: tuple[tuple[int | None, int | None, int], ...],
) -> View:
    """Slice, by one (start, stop, step) for each axis; a negative step reverses."""
    # A slice that leaves nothing out is no move.
    if bounds == tuple((0, size, 1) for size in view.shape):
        return view
    axes = zip(bounds, view.shape, strict=True)
    shape = tuple(len(range(size)[slice(*each)]) for each, size in axes)
    return View("slice", shape, tuple(tuple(each) for each in bounds), (view,))


def concatenate(
    views: tuple[View, ...],
    axis: int,
) -> View:
    """Join views along an axis."""
    # Nothing is joined: the view itself.
    if len(views) == 1:
        return views[0]
    shape = list(views[0].shape)
    shape[axis] = sum(view.shape[axis] for view in views)
    return View("concatenate", tuple(shape), (axis,), views)


def entry_numbers(
    view: View,
    leaves: Mapping[str, tuple[int, ...]],
) -> Int[np.ndarray, "..."]:
    """Number the entries of all `leaves` (shapes by path) in order; return those of the view."""
    numbers: dict[str, Any] = {}
    # Leaf after leaf, each in row-major order.
    start = 0
    for path, shape in leaves.items():
        stop = start + math.prod(shape)
        numbers[path] = np.arange(start, stop).reshape(shape)
        start = stop
    entries: Int[np.ndarray, "..."] = view.read(numbers)
    return entries


def uncovered(
    path: str,
    shape: tuple[int, ...],
    views: Sequence[View],
) -> Bool[np.ndarray, "..."]:
    """Tell for each entry of a leaf whether none of the views reads it.

    Args:
      path: the path of the leaf.
      shape: the shape of the leaf.
      views: the views of all kernels and biases; those that do not read the leaf do not matter.
    """
    touching = [view for view in views if path in view.leaves]
    for view in touching:
        sizes = map(math.prod, view.leaf_shapes.values())
        # A view as large as its leaves, with nothing twice, reads all of them: no need to number.
        if not view.repeats and math.prod(view.shape) == sum(sizes):
            return np.broadcast_to(np.False_, shape)
    mask = np.ones(math.prod(shape), bool)
    for view in touching:
        shapes = {path: shape, **view.leaf_shapes}  # the leaf first: its numbers start at 0
        # Entries of other leaves have numbers beyond those of this one.
        numbers = entry_numbers(view, shapes)
        mask[numbers[numbers < mask.size]] = False
    return mask.reshape(shape)


def _leaf_nodes(view: View) -> Iterator[View]:
    if view.move == "leaf":
        yield view
    for part in view.of:
        yield from _leaf_nodes(part)


def _bounds_text(
    bounds: tuple[int | None, int | None, int],
    size: int,
) -> str:
    start, stop, step = bounds
    text = f"{start or ''}:{'' if stop in (None, size) else stop}"
    return text if step == 1 else f"{text}:{step}"
