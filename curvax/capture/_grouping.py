"""From uses to blocks: which uses share a kernel, and which leaves must stay out."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from curvax.capture._uses import Use
from curvax.capture._views import View, entry_numbers

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the leaves of params, by path."""


@dataclass(frozen=True)
class Member:
    """One use of a block's kernel.

    Attributes:
      kind: "dot", "conv" or "lookup".
      transposed: it multiplies by the kernel's transpose.
      biased: the block's bias is added to its output.
    """

    kind: str
    transposed: bool = False
    biased: bool = False


@dataclass(frozen=True)
class Group:
    """Uses of the same entries of parameters, as one matrix (or its transpose).

    Attributes:
      kernel: view `[stack, in, out]`.
      bias: view `[stack, out]`, or None.
      members: what each use is.
      numbers: which uses they are.
    """

    kernel: View
    bias: View | None
    members: tuple[Member, ...]
    numbers: tuple[int, ...]


def group_uses(
    uses: Sequence[Use], reasons: Mapping[str, str], shapes: Shapes
) -> tuple[list[Group], dict[str, str]]:
    """Group uses by their kernel; return the groups, and why a leaf is in none.

    A leaf refused for one use is out of all, and takes those with it that are joined to it in one kernel.
    """
    reasons = dict(reasons)
    while True:
        before = len(reasons)
        alive = dict(_usable(uses, reasons))
        groups = _by_kernel(alive, reasons, shapes)
        if len(reasons) == before:
            return groups, reasons


def _usable(uses: Sequence[Use], reasons: dict[str, str]) -> Iterator[tuple[int, Use]]:
    for number, use in enumerate(uses):
        bad = next((path for path in use.kernel.leaves if path in reasons), None)
        bias = use.bias
        if bad is not None:
            for path in use.kernel.leaves:
                reasons.setdefault(path, f"is joined with {bad}, which {reasons[bad]}")
            for path in bias.leaves if bias else ():
                reasons.setdefault(path, f"is the bias of {use.kernel}, which is in no block")
            continue
        if bias is not None and any(path in reasons for path in bias.leaves):
            for path in bias.leaves:
                reasons.setdefault(path, f"is joined with a leaf in no block in the bias {bias}")
            bias = None
        yield number, dataclasses.replace(use, bias=bias)


def _by_kernel(uses: Mapping[int, Use], reasons: dict[str, str], shapes: Shapes) -> list[Group]:
    number_of = _Numbering(
        shapes, [view for use in uses.values() for view in (use.kernel, use.bias) if view]
    )
    groups: list[tuple[View, list[tuple[int, bool]]]] = []
    # A use with a bias says which way round the matrix is; among others it is the first.
    for number, use in sorted(uses.items(), key=lambda pair: pair[1].bias is None):
        for kernel, members in groups:
            if number_of.equal(kernel, use.kernel):
                members.append((number, False))
                break
            if number_of.equal(kernel, use.kernel, transposed=True):
                members.append((number, True))
                break
        else:
            groups.append((use.kernel, [(number, False)]))
    made = [_group(kernel, members, uses, number_of, reasons) for kernel, members in groups]
    _refuse_overlaps(made, number_of, reasons)
    return made


def _group(
    kernel: View,
    members: Sequence[tuple[int, bool]],
    uses: Mapping[int, Use],
    same: _Numbering,
    reasons: dict[str, str],
) -> Group:
    biases = [
        (bias, transposed)
        for number, transposed in members
        if (bias := uses[number].bias) is not None
    ]
    bias = next((view for view, transposed in biases if not transposed), None)
    for view, transposed in biases:
        if transposed or bias is None or not same.equal(bias, view):
            why = "transposed" if transposed else "with another bias elsewhere"
            for path in view.leaves:
                reasons.setdefault(path, f"is a bias of {kernel}, which is used {why}")
    members = sorted(members)
    kinds = tuple(
        Member(uses[n].kind, transposed, uses[n].bias is not None) for n, transposed in members
    )
    return Group(kernel, bias, kinds, tuple(number for number, _ in members))


def _refuse_overlaps(
    groups: Sequence[Group], numbering: _Numbering, reasons: dict[str, str]
) -> None:
    """Refuse leaves of which an entry is in two views, or twice in one."""
    views = [
        (view, group) for group in groups for view in (group.kernel, group.bias) if view is not None
    ]
    touching = Counter(path for view, _ in views for path in view.leaves)
    shared = {path for path, count in touching.items() if count > 1}
    owner = (
        np.full(numbering.total, -1)
        if shared or any(numbering.repeats(view) for view, _ in views)
        else None
    )
    for i, (view, _) in enumerate(views):
        if owner is None or not (numbering.repeats(view) or shared.intersection(view.leaves)):
            continue
        numbers = numbering.entries(view).ravel()
        if len(np.unique(numbers)) < numbers.size:
            for path in view.leaves:
                reasons.setdefault(path, "enters one linear map several times")
        for other in {views[k][0] for k in np.unique(owner[numbers]).tolist() if k >= 0}:
            biases = {view, other} <= {group.bias for group in groups}
            why = (
                "is the bias of several kernels"
                if biases
                else "is used by several linear maps, as matrices that overlap"
            )
            for path in shared.intersection((*view.leaves, *other.leaves)):
                reasons.setdefault(path, why)
        owner[numbers] = i


class _Numbering:
    """Entries of views as numbers, worked out only where views must be compared."""

    def __init__(self, shapes: Shapes, views: Sequence[View]) -> None:
        paths = {path for view in views for path in view.leaves}
        self._shapes = {path: shape for path, shape in shapes.items() if path in paths}
        self._known: dict[View, np.ndarray] = {}
        self.total = sum(math.prod(shape) for shape in self._shapes.values())

    def entries(self, view: View) -> np.ndarray:
        if view not in self._known:
            self._known[view] = entry_numbers(view, self._shapes)
        return self._known[view]

    def equal(self, a: View, b: View, transposed: bool = False) -> bool:
        """Whether two views hold the same entries at the same places (or at those of the transpose)."""
        shape = (*b.shape[:-2], b.shape[-1], b.shape[-2]) if transposed else b.shape
        if not transposed and a == b:
            return True
        if a.shape != shape or set(a.leaves) != set(b.leaves):
            return False
        numbers = self.entries(b)
        return bool(
            np.array_equal(self.entries(a), numbers.swapaxes(-1, -2) if transposed else numbers)
        )

    def repeats(self, view: View) -> bool:
        """Whether a leaf occurs more than once in the expression."""
        leaves = view.leaves
        return math.prod(view.shape) > sum(
            math.prod(self._shapes[path]) for path in leaves
        ) or _occurrences(view) > len(leaves)


def _occurrences(view: View) -> int:
    return 1 if view.move == "leaf" else sum(map(_occurrences, view.of))
