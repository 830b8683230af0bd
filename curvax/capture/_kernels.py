"""From uses to kernels: which uses share one, and which leaves must stay out."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Int

from curvax.capture._uses import Use
from curvax.capture._views import View, entry_numbers

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes of the leaves of params, by path."""

Reasons: TypeAlias = dict[str, str]
"""For leaves that are in no kernel, by path, why not."""


@dataclass(frozen=True)
class UseKind:
    """What one use of a kernel is.

    Attributes:
      kind: "dot", "conv" or "lookup".
      transposed: whether it multiplies by the transpose of the kernel.
      biased: whether the kernel's bias is added to its output.
      one: the input of that bias: 1, but where constants multiply kernel and bias differently.
    """

    kind: str
    transposed: bool = False
    biased: bool = False
    one: float = 1.0


@dataclass(frozen=True)
class Kernel:
    """Entries of parameters that linear maps use as one matrix for each slice of a stack.

    Attributes:
      view: view `[stack, in, out]`, of which a constant mask may let some entries through only.
      bias: view `[stack, out]`, a further input that is 1, or None.
      uses: what each of the uses is, in the order of the program.
    """

    view: View
    bias: View | None
    uses: tuple[UseKind, ...]

    @property
    def views(self) -> tuple[View, ...]:
        """The views of the kernel and of its bias."""
        return (self.view,) if self.bias is None else (self.view, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Stack, rows (inputs, and one more for a bias) and columns (outputs)."""
        stack, rows, columns = self.view.shape
        return stack, rows + (self.bias is not None), columns


def group_uses(
    uses: Sequence[Use],
    reasons: Mapping[str, str],
    shapes: Shapes,
) -> tuple[dict[Kernel, tuple[int, ...]], Reasons]:
    """Group uses by their kernel.

    A leaf that is refused for one use is in no kernel, and takes those with it that are joined to
    it in one: so the grouping goes on until no further leaf is refused.

    Args:
      uses: the uses, as the walk through the program met them.
      reasons: why leaves are refused already.
      shapes: shapes of all leaves.

    Returns:
      The kernels with the numbers of their uses, and why a leaf is in none.
    """
    # Ours to add to: the reasons of the walk are not changed.
    reasons = dict(reasons)
    while True:
        before = len(reasons)
        kernels = _by_kernel(_usable(uses, reasons), reasons, shapes)
        if len(reasons) == before:
            return kernels, reasons


def match_uses(
    kernels: Sequence[Kernel],
    uses: Sequence[Use],
    reasons: Mapping[str, str],
    shapes: Shapes,
) -> dict[Kernel, tuple[int, ...]]:
    """Group uses by kernels that are known already, such as those of several programs together.

    Args:
      kernels: the kernels; their own uses do not matter.
      uses: the uses, as the walk through a program met them.
      reasons: why leaves are refused in this program.
      shapes: shapes of all leaves.

    Returns:
      The kernels with what their uses are in this program, and the numbers of these; kernels
      without a use, and uses of other kernels, are not there.
    """
    # A stand-in goes before the uses, and so says which way round the kernel is, and what its bias.
    first = [_stand_in(kernel) for kernel in kernels]
    leaves = {path for kernel in kernels for view in kernel.views for path in view.leaves}
    others = {path: "is in no kernel" for path in shapes if path not in leaves}
    grouped, _ = group_uses([*first, *uses], {**reasons, **others}, shapes)
    matched = {}
    for kernel, (number, *numbers) in grouped.items():
        if number < len(first) and numbers:
            kinds = kernel.uses[1:]
            known = dataclasses.replace(kernel, uses=kinds)
            matched[known] = tuple(n - len(first) for n in numbers)
    return matched


def _stand_in(kernel: Kernel) -> Use:
    """Return a use of a kernel that is in no program."""
    nothing = jax.ShapeDtypeStruct((), np.float32)

    def unchanged(x: Any) -> Any:
        return x

    return Use(
        kind="dot",
        view=kernel.view,
        operand=0,
        output=nothing,
        axes=(),
        spread=(),
        to_inputs=unchanged,
        to_outputs=unchanged,
        bias=kernel.bias,
    )


def _usable(
    uses: Sequence[Use],
    reasons: Reasons,
) -> dict[int, Use]:
    """Drop uses of refused leaves, and refused biases of others; refuse what is joined to them."""
    usable = {}
    for number, use in enumerate(uses):
        refused = next((path for path in use.view.leaves if path in reasons), None)
        bias_leaves = use.bias.leaves if use.bias is not None else ()
        # A view with a refused leaf is no kernel; the leaves beside it in the view go with it.
        if refused is not None:
            for path in use.view.leaves:
                reasons.setdefault(path, f"is joined with {refused}, which {reasons[refused]}")
            for path in bias_leaves:
                why = f"its map is in no block: {refused} {reasons[refused]}"
                reasons.setdefault(path, why)
            continue
        # A refused bias leaves the kernel standing, without it.
        if any(path in reasons for path in bias_leaves):
            why = f"is joined with a leaf in no block in the bias {use.bias}"
            for path in bias_leaves:
                reasons.setdefault(path, why)
            use = dataclasses.replace(use, bias=None, one=1.0)
        usable[number] = use
    return usable


class _UseOf(NamedTuple):
    """Which use of a kernel, and which way round."""

    number: int
    transposed: bool


def _by_kernel(
    uses: Mapping[int, Use], reasons: Reasons, shapes: Shapes
) -> dict[Kernel, tuple[int, ...]]:
    """Put uses with the same entries together, as they are or transposed."""
    views = [view for use in uses.values() for view in (use.view, use.bias) if view is not None]
    # Views are compared by the entries that they read, not by how they are written.
    numbering = _Numbering(shapes, views)
    groups: list[tuple[View, list[_UseOf]]] = []

    # A use with a bias says which way round the matrix is: those go first.
    for number in sorted(uses, key=lambda number: uses[number].bias is None):
        view = uses[number].view
        for other, group in groups:
            if numbering.equal(other, view):
                group.append(_UseOf(number, False))
                break
            if numbering.equal(other, view, transposed=True):
                group.append(_UseOf(number, True))
                break
        else:
            groups.append((view, [_UseOf(number, False)]))

    kernels = {}
    for view, group in groups:
        # Back into the order of the program, in which inputs are recorded.
        group = sorted(group)
        kernel = _kernel(view, group, uses, numbering, reasons)
        kernels[kernel] = tuple(use.number for use in group)
    _refuse_overlaps(kernels, numbering, reasons)
    return kernels


def _kernel(
    view: View,
    group: Sequence[_UseOf],
    uses: Mapping[int, Use],
    numbering: _Numbering,
    reasons: Reasons,
) -> Kernel:
    """Join the uses of a view, with the one bias that they share; refuse any other bias."""
    biases = [(uses[use.number].bias, use.transposed) for use in group]
    # The bias is a row of the kernel: one that is added to the transpose's output is not.
    straight = (bias for bias, transposed in biases if bias is not None and not transposed)
    bias = next(straight, None)
    for other, transposed in biases:
        if other is None:
            continue
        if transposed or bias is None or not numbering.equal(bias, other):
            why = "transposed" if transposed else "with another bias elsewhere"
            for path in other.leaves:
                reasons.setdefault(path, f"is a bias of {view}, which is used {why}")
    # A use without the bias has 0 for its input, which `biased` says.
    kinds = []
    for number, transposed in group:
        use = uses[number]
        kinds.append(UseKind(use.kind, transposed, use.bias is not None, use.one))
    return Kernel(view, bias, tuple(kinds))


def _refuse_overlaps(
    kernels: Mapping[Kernel, tuple[int, ...]],
    numbering: _Numbering,
    reasons: Reasons,
) -> None:
    """Refuse leaves of which an entry is in two views, or twice in one."""
    # Kernels and biases alike: no entry of params may have two curvatures.
    views = [view for kernel in kernels for view in kernel.views]
    biases = {kernel.bias for kernel in kernels}
    readers = Counter(path for view in views for path in view.leaves)
    shared = {path for path, count in readers.items() if count > 1}
    # Numbering all entries is slow for large models: only where views may overlap at all.
    suspects = [view.repeats or bool(shared.intersection(view.leaves)) for view in views]
    if not any(suspects):
        return
    owner = np.full(numbering.total, -1)  # for every entry the number of the view that has it
    for i, view in enumerate(views):
        if not suspects[i]:
            continue
        entries = numbering.entries(view).ravel()
        # An entry twice in one view makes the map from leaves to matrix no permutation.
        if len(np.unique(entries)) < entries.size:
            for path in view.leaves:
                reasons.setdefault(path, "enters one linear map several times")
        for j in np.unique(owner[entries]).tolist():
            if j < 0:
                continue
            why = "is used by several linear maps, as matrices that overlap"
            if {view, views[j]} <= biases:
                why = "is the bias of several kernels"
            for path in shared.intersection((*view.leaves, *views[j].leaves)):
                reasons.setdefault(path, why)
        owner[entries] = i


class _Numbering:
    """Entries of views as numbers, computed only where views must be compared."""

    def __init__(
        self,
        shapes: Shapes,
        views: Sequence[View],
    ) -> None:
        paths = {path for view in views for path in view.leaves}
        self._shapes = {path: shape for path, shape in shapes.items() if path in paths}
        self._known: dict[View, Int[np.ndarray, "..."]] = {}
        self.total = sum(math.prod(shape) for shape in self._shapes.values())

    def entries(
        self,
        view: View,
    ) -> Int[np.ndarray, "..."]:
        if view not in self._known:
            self._known[view] = entry_numbers(view, self._shapes)
        return self._known[view]

    def equal(
        self,
        a: View,
        b: View,
        transposed: bool = False,
    ) -> bool:
        """Tell whether two views have the same entries at the same places (of the transpose)."""
        shape = (*b.shape[:-2], b.shape[-1], b.shape[-2]) if transposed else b.shape
        # The same expression: no need to number its entries.
        if not transposed and a == b:
            return True
        if a.shape != shape or set(a.leaves) != set(b.leaves):
            return False
        # The same entries behind another mask are not the same matrix.
        if not _same_mask(a.mask, b.mask, transposed):
            return False
        entries = self.entries(b)
        if transposed:
            entries = entries.swapaxes(-1, -2)
        return np.array_equal(self.entries(a), entries)


def _same_mask(
    a: Bool[np.ndarray, "..."] | None,
    b: Bool[np.ndarray, "..."] | None,
    transposed: bool,
) -> bool:
    """Tell whether two masks (or the lack of one) are the same, the second as it is or not."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b.swapaxes(-1, -2) if transposed else b)
