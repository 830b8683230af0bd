"""Structural views: arrays made of entries of parameters by moves alone, as static expressions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class StaticArray:
    """An array as a static fact: hashable, and equal to another by its entries.

    Attributes:
      shape: its shape.
      dtype: the name of its dtype.
      data: its entries in row-major order.
    """

    shape: tuple[int, ...]
    dtype: str
    data: bytes

    @property
    def array(self) -> np.ndarray:
        """The array, read-only."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


def static(x: Any) -> StaticArray:
    """Make an array of numbers or truth values a static fact."""
    array = np.asarray(x)
    return StaticArray(array.shape, array.dtype.name, array.tobytes())


@dataclass(frozen=True)
class View:
    """An array whose every entry is an entry of a leaf; hashable, and independent of any program.

    Attributes:
      move: "leaf", "reshape", "transpose", "slice", "concatenate", "take" or "times".
      shape: the shape of the array.
      how: the settings of the move: the path of the leaf; the permutation; one
        (start, stop, step) for each axis; the axis; the numbers of the entries in row-major order;
        what is multiplied by, in a shape that broadcasts. The kernel of a block is multiplied by
        nothing but a mask, of zeros and ones.
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
        return {node.how[0]: node.shape for node in _nodes(self, "leaf")}

    @property
    def repeats(self) -> bool:
        """Whether some leaf occurs more than once in the expression, so that an entry might."""
        # More entries than the leaves have, a leaf written twice, or entries taken by number.
        sizes = map(math.prod, self.leaf_shapes.values())
        nodes = list(_nodes(self, "leaf"))
        is_larger = math.prod(self.shape) > sum(sizes)
        return is_larger or len(nodes) > len(self.leaves) or self.has("take")

    def has(self, move: str) -> bool:
        """Tell whether a move is anywhere in the expression."""
        return any(True for _ in _nodes(self, move))

    @property
    def mask(self) -> Bool[np.ndarray, "..."] | None:
        """Which entries the mask lets through; None if there is none."""
        if not self.has("times"):
            return None
        through: Bool[np.ndarray, "..."] = factor_of(self) != 0
        return through

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
        if self.move == "take":
            return parts[0].reshape(-1)[self.how[0].array]
        if self.move == "times":
            # In the precision of the leaves, as NumPy or JAX.
            return parts[0] * self.how[0].array.astype(parts[0].dtype)
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


def take(
    view: View,
    numbers: Int[np.ndarray, "..."],
) -> View:
    """View entries by their numbers in row-major order; a number may come several times."""
    # The numbers of all entries in order are no move.
    size = math.prod(view.shape)
    if numbers.size == size and np.array_equal(numbers.ravel(), np.arange(size)):
        return reshape(view, numbers.shape)
    return View("take", numbers.shape, (static(numbers.astype(np.int32)),), (view,))


def times(
    view: View,
    factor: Any,
) -> View:
    """Multiply by an array that broadcasts to the shape of the view."""
    # Along axes on which it does not vary one entry is enough.
    array = np.asarray(factor)
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return View("times", view.shape, (static(array),), (view,))


def factor_of(view: View) -> Any:
    """Return what the view multiplies its entries by, in its shape."""
    # A view is linear in its leaves: of ones it makes the factors.
    ones = {path: np.ones(shape) for path, shape in view.leaf_shapes.items()}
    return view.read(ones)


def without_factors(view: View) -> View:
    """View the same entries, not multiplied by anything."""
    if not view.has("times"):
        return view
    parts = tuple(map(without_factors, view.of))
    if view.move == "times":
        return parts[0]
    # By the functions of this module, which join moves that follow one another.
    if view.move == "reshape":
        return reshape(parts[0], view.shape)
    if view.move == "transpose":
        return transpose(parts[0], view.how)
    return View(view.move, view.shape, view.how, parts)


def entry_numbers(
    view: View,
    leaves: Mapping[str, tuple[int, ...]],
) -> Int[np.ndarray, "..."]:
    """Number the entries of all `leaves` (shapes by path) in order; return those of the view.

    Entries behind a mask, or multiplied by something, have their numbers too.
    """
    numbers: dict[str, Any] = {}
    # Leaf after leaf, each in row-major order.
    start = 0
    for path, shape in leaves.items():
        stop = start + math.prod(shape)
        numbers[path] = np.arange(start, stop).reshape(shape)
        start = stop
    entries: Int[np.ndarray, "..."] = without_factors(view).read(numbers)
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


def _nodes(view: View, move: str) -> Iterator[View]:
    if view.move == move:
        yield view
    for part in view.of:
        yield from _nodes(part, move)


def _bounds_text(
    bounds: tuple[int | None, int | None, int],
    size: int,
) -> str:
    start, stop, step = bounds
    text = f"{start or ''}:{'' if stop in (None, size) else stop}"
    return text if step == 1 else f"{text}:{step}"
