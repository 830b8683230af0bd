"""Follow parameters through a program, and find the linear maps that use them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from curvax._jaxpr import inner_program, is_constant, scan_counts
from curvax.capture._uses import Use, is_lookup, of_conv, of_dot, of_lookup, with_bias
from curvax.capture._views import View, concatenate, cut, reshape, transpose


@dataclass(frozen=True)
class HoldsView:
    """A variable that holds a view of parameters.

    Attributes:
      view: its first `len(loops)` axes run over rounds of the loops around; the variable holds one slice.
      loops: numbers of those loops.
      axes: where the variable repeats entries: for each of its axes the view's (after the loops'), None if repeated.
    """

    view: View
    loops: tuple[int, ...] = ()
    axes: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class HoldsOutput:
    """A variable that holds a use's output, perhaps moved, cast, or with something added: its cotangent is the use's.

    Attributes:
      use: number of the use.
      axes: for each axis of the variable, its place in the use's `spread`, or None.
    """

    use: int
    axes: tuple[int | None, ...]


Holds: TypeAlias = HoldsView | HoldsOutput | None


@dataclass
class Findings:
    """What a walk through a program has met so far.

    Attributes:
      uses: in the order of the program.
      reasons: for every leaf that does something else than enter linear maps, what it does.
      kernel_loops: for each use, the loops over which its kernel is stacked.
      num_loops: loops met so far.
    """

    uses: list[Use] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    kernel_loops: list[tuple[int, ...]] = field(default_factory=list)
    num_loops: int = 0

    def refuse(self, held: Holds, reason: str) -> None:
        """Note why the leaves of a view cannot be in a block (the first reason stays)."""
        if isinstance(held, HoldsView):
            for path in held.view.leaves:
                self.reasons.setdefault(path, reason)


@dataclass(frozen=True)
class Place:
    """Where a program is: indices of the equations around it, and the loops, as `(number, length)`."""

    site: tuple[int, ...] = ()
    loops: tuple[tuple[int, int], ...] = ()


def find_uses(closed: Any, held: Sequence[Holds]) -> Findings:
    """Walk through a program whose arguments hold views (or nothing)."""
    found = Findings()
    outputs = _walk(closed, held, [True] * len(closed.jaxpr.outvars), Place(), found)
    for output in outputs:
        found.refuse(output, "is an output of the model")
    return found


def _walk(
    closed: Any, held: Sequence[Holds], live: Sequence[bool], place: Place, found: Findings
) -> list[Holds]:
    jaxpr = closed.jaxpr
    values: dict[Any, Holds] = dict(zip(jaxpr.invars, held, strict=True))
    look = lambda atom: None if is_constant(atom) else values.get(atom)
    needed = _needed(jaxpr, live)
    wanted = [atom for atom, alive in zip(jaxpr.outvars, live, strict=True) if alive]
    readers = Counter(
        atom
        for eqn in jaxpr.eqns
        if needed.intersection(eqn.outvars)
        for atom in eqn.invars
        if not is_constant(atom)
    )
    readers.update(atom for atom in wanted if not is_constant(atom))

    for index, eqn in enumerate(jaxpr.eqns):
        if not needed.intersection(eqn.outvars):
            continue
        # Read twice, an output has another cotangent than what comes after: no bias is straight on it any more.
        operands = [
            None if isinstance(look(atom), HoldsOutput) and readers[atom] > 1 else look(atom)
            for atom in eqn.invars
        ]
        if any(operand is not None for operand in operands):
            alive = [atom in needed for atom in eqn.outvars]
            here = dataclasses.replace(place, site=(*place.site, index))
            values.update(zip(eqn.outvars, _follow(eqn, operands, alive, here, found), strict=True))
    once = lambda held, atom: None if isinstance(held, HoldsOutput) and readers[atom] > 1 else held
    return [
        once(look(atom), atom) if alive else None
        for atom, alive in zip(jaxpr.outvars, live, strict=True)
    ]


def _needed(jaxpr: Any, live: Sequence[bool]) -> set[Any]:
    """Variables on which the live outputs depend."""
    needed = {
        atom
        for atom, alive in zip(jaxpr.outvars, live, strict=True)
        if alive and not is_constant(atom)
    }
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(atom for atom in eqn.invars if not is_constant(atom))
    return needed


def _follow(
    eqn: Any, operands: Sequence[Holds], live: Sequence[bool], place: Place, found: Findings
) -> list[Holds]:
    """Say what the results of an equation hold, given what its operands hold."""
    name = eqn.primitive.name
    inner = inner_program(eqn)
    if inner is not None:
        return _walk(inner, operands, live, place, found)
    if name == "scan":
        return _follow_scan(eqn, operands, live, place, found)
    if name == "cond":
        for number, branch in enumerate(eqn.params["branches"]):
            here = dataclasses.replace(place, site=(*place.site, number))
            entries = [
                operand if isinstance(operand, HoldsView) else None for operand in operands[1:]
            ]
            for result in _walk(branch, entries, live, here, found):
                found.refuse(result, "is returned by a branch of `cond`")
        return [None] * len(live)
    if name in _SAME:
        return list(operands)
    views = [operand for operand in operands if isinstance(operand, HoldsView)]
    if not views:
        return [_move_output(eqn, operands)] if len(live) == 1 else [None] * len(live)
    if name == "stop_gradient":
        return [None]
    if name in _MOVES and len(views) == len(operands):
        moved = _MOVES[name](eqn, operands)
        if moved is not None:
            return list(moved)
    if name == "add" and len(views) == 1:
        return [_add(operands, eqn, found)]
    use = _use(eqn, operands)
    if use is None:
        both = " with another parameter" if len(views) > 1 else ""
        for view in views:
            found.refuse(view, f"enters `{name}`{both}")
        return [None] * len(live)
    kernel = views[0]
    found.uses.append(
        dataclasses.replace(
            use,
            site=place.site,
            lengths=tuple(length for _, length in place.loops),
            stacked=tuple(number in kernel.loops for number, _ in place.loops),
        )
    )
    found.kernel_loops.append(kernel.loops)
    return [HoldsOutput(len(found.uses) - 1, use.axes)]


def _follow_scan(
    eqn: Any, operands: Sequence[Holds], live: Sequence[bool], place: Place, found: Findings
) -> list[Holds]:
    """Enter a loop: what is closed over stays, what is scanned over gains a loop axis, a carry may only pass through."""
    closed = eqn.params["jaxpr"]
    num_consts, num_carry = scan_counts(eqn)
    body = closed.jaxpr
    number, found.num_loops = found.num_loops, found.num_loops + 1
    carries = slice(num_consts, num_consts + num_carry)
    unchanged = [
        a is b for a, b in zip(body.invars[carries], body.outvars[:num_carry], strict=True)
    ]
    held: list[Holds] = [
        operand if isinstance(operand, HoldsView) else None for operand in operands
    ]
    for i, same in enumerate(unchanged):
        if not same:
            found.refuse(held[num_consts + i], "is changed in the carry of a `scan`")
            held[num_consts + i] = None
    for i in range(num_consts + num_carry, len(held)):
        scanned = held[i]
        if isinstance(scanned, HoldsView):
            if scanned.axes is not None:
                found.refuse(scanned, "is repeated and then scanned over")
                held[i] = None
            else:
                held[i] = HoldsView(scanned.view, (*scanned.loops, number))
    inner_live = [not same for same in unchanged] + list(live[num_carry:])
    here = dataclasses.replace(place, loops=(*place.loops, (number, eqn.params["length"])))
    results = _walk(closed, held, inner_live, here, found)
    for result in results[num_carry:]:
        found.refuse(result, "is returned by a `scan`")
    return [operands[num_consts + i] if same else None for i, same in enumerate(unchanged)] + [
        None
    ] * len(results[num_carry:])


def _use(eqn: Any, operands: Sequence[Holds]) -> Use | None:
    """Read an equation as a linear map with one operand a view of parameters, if it is one."""
    which = [i for i, operand in enumerate(operands) if isinstance(operand, HoldsView)]
    kernel = operands[which[0]]
    if len(which) > 1 or not isinstance(kernel, HoldsView) or kernel.axes is not None:
        return None
    name, hidden = eqn.primitive.name, len(kernel.loops)
    if name == "dot_general":
        return of_dot(kernel.view, hidden, which[0], eqn)
    if name == "conv_general_dilated" and which == [1] and eqn.params["batch_group_count"] == 1:
        return of_conv(kernel.view, hidden, eqn)
    if name == "gather" and which == [0] and is_lookup(eqn):
        return of_lookup(kernel.view, hidden, eqn)
    return None


def _add(operands: Sequence[Holds], eqn: Any, found: Findings) -> Holds:
    """Join a leaf that is added to a use's output as its bias, or say that it is none."""
    shape = eqn.outvars[0].aval.shape
    (bias,) = (operand for operand in operands if isinstance(operand, HoldsView))
    (output,) = (operand for operand in operands if not isinstance(operand, HoldsView))
    if not isinstance(output, HoldsOutput):
        found.refuse(bias, "enters `add`, not straight on a linear map's output")
        return None
    use = found.uses[output.use]
    if use.bias is not None:
        found.refuse(bias, "enters `add` as a second bias")
        return output
    hidden = len(bias.loops)
    sizes = bias.view.shape[hidden:]
    variable_axes = range(len(sizes)) if bias.axes is None else bias.axes
    places: list[int | None] = [None] * len(sizes)
    fits = bias.loops == found.kernel_loops[output.use]
    for i, axis in enumerate(variable_axes):
        if axis is not None and sizes[axis] > 1:
            fits &= output.axes[i] is not None and sizes[axis] == shape[i]
            places[axis] = output.axes[i]
    joined = with_bias(use, bias.view, hidden, places) if fits else None
    if joined is None:
        found.refuse(bias, "enters `add` with axes other than a bias has")
    else:
        found.uses[output.use] = joined
    return output


def _move_output(eqn: Any, operands: Sequence[Holds]) -> Holds:
    """Follow a use's output through what leaves its cotangent the same but for the order of axes."""
    name = eqn.primitive.name
    outputs = [operand for operand in operands if isinstance(operand, HoldsOutput)]
    first = outputs[0]
    shape, before = eqn.outvars[0].aval.shape, eqn.invars[operands.index(first)].aval.shape
    if name in ("add", "sub") and shape == before and (name == "add" or operands[0] is first):
        return first
    if name == "transpose":
        return HoldsOutput(first.use, tuple(first.axes[i] for i in eqn.params["permutation"]))
    if name in ("reshape", "squeeze", "expand_dims"):
        axes = _reshaped_axes(before, shape, first.axes)
        return None if axes is None else HoldsOutput(first.use, axes)
    return None


def _reshaped_axes(
    before: Sequence[int], after: Sequence[int], axes: Sequence[Any]
) -> tuple[Any, ...] | None:
    """Carry labels of axes through a reshape; None if a labelled axis is split or merged."""
    labels: list[Any] = []
    i = j = 0
    while i < len(before) or j < len(after):  # match segments of equal size, the shortest first
        left, right = [i], [j]
        m, n = (before[i] if i < len(before) else 1), (after[j] if j < len(after) else 1)
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                left.append(i)
                m, i = m * before[i], i + 1
            else:
                right.append(j)
                n, j = n * after[j], j + 1
        label = [axes[k] for k in left if k < len(before) and before[k] > 1 and axes[k] is not None]
        places = [k for k in right if k < len(after)]
        wide = [k for k in places if after[k] > 1]
        if label and (
            len(wide) != 1 or after[wide[0]] != before[next(k for k in left if before[k] > 1)]
        ):
            return None
        labels += [label[0] if label and k == wide[0] else None for k in places]
    return tuple(labels)


def _of_one(move: Any) -> Any:
    """Apply a move to one view; a repeated one has no moves but those that only a bias needs."""

    def moved(eqn: Any, operands: Sequence[HoldsView]) -> list[Holds] | None:
        (entries,) = operands[:1]
        if entries.axes is not None:
            return None
        return [
            dataclasses.replace(entries, view=view)
            for view in move(eqn, entries.view, len(entries.loops))
        ]

    return moved


def _reshape(eqn: Any, view: View, hidden: int) -> Iterable[View]:
    yield reshape(view, (*view.shape[:hidden], *eqn.outvars[0].aval.shape))


def _transpose(eqn: Any, view: View, hidden: int) -> Iterable[View]:
    yield transpose(view, (*range(hidden), *(hidden + i for i in eqn.params["permutation"])))


def _reverse(eqn: Any, view: View, hidden: int) -> Iterable[View]:
    reversed_axes = [hidden + i for i in eqn.params["dimensions"]]
    whole = [(0, size, 1) for size in view.shape]
    yield cut(
        view,
        tuple((None, None, -1) if i in reversed_axes else whole[i] for i in range(len(view.shape))),
    )


def _slice(eqn: Any, view: View, hidden: int) -> Iterable[View]:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    whole = [(0, size, 1) for size in view.shape[:hidden]]
    yield cut(
        view,
        (
            *whole,
            *((int(a), int(b), int(c)) for a, b, c in zip(starts, stops, strides, strict=True)),
        ),
    )


def _split(eqn: Any, view: View, hidden: int) -> Iterable[View]:
    axis, start = hidden + eqn.params["axis"], 0
    for size in map(int, eqn.params["sizes"]):
        whole = [(0, length, 1) for length in view.shape]
        yield cut(view, (*whole[:axis], (start, start + size, 1), *whole[axis + 1 :]))
        start += size


def _unstack(eqn: Any, view: View, hidden: int) -> Iterable[View]:
    axis = hidden + eqn.params["axis"]
    for i in range(view.shape[axis]):
        whole = [(0, length, 1) for length in view.shape]
        part = cut(view, (*whole[:axis], (i, i + 1, 1), *whole[axis + 1 :]))
        yield reshape(part, (*view.shape[:axis], *view.shape[axis + 1 :]))


def _joined(eqn: Any, operands: Sequence[HoldsView]) -> list[Holds] | None:
    """Concatenate or stack views of the same loops."""
    loops = operands[0].loops
    if any(entries.loops != loops or entries.axes is not None for entries in operands):
        return None
    views = [entries.view for entries in operands]
    if eqn.primitive.name == "concatenate":
        axis = len(loops) + eqn.params["dimension"]
    else:
        axis = len(loops) + eqn.params["axis"]
        views = [reshape(view, (*view.shape[:axis], 1, *view.shape[axis:])) for view in views]
    return [HoldsView(concatenate(tuple(views), axis), loops)]


def _broadcast(eqn: Any, operands: Sequence[HoldsView]) -> list[Holds] | None:
    """Insert axes: of size 1 into the view itself, others as repeats of it."""
    (entries,) = operands[:1]
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    hidden, view = len(entries.loops), entries.view
    if entries.axes is None and _product(shape) == _product(view.shape[hidden:]):
        return [dataclasses.replace(entries, view=reshape(view, (*view.shape[:hidden], *shape)))]
    before: Sequence[int | None] = (
        range(len(view.shape) - hidden) if entries.axes is None else entries.axes
    )
    axes: list[int | None] = [None] * len(shape)
    for axis, at in zip(before, places, strict=True):
        axes[at] = axis if axis is None or view.shape[hidden + axis] == shape[at] else None
    return [HoldsView(view, entries.loops, tuple(axes))]


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


_SAME = {
    "convert_element_type",
    "copy",
    "copy_p",
    "sharding_constraint",
    "optimization_barrier",
    "name",
    "reshard",
}
_SAME |= {"reduce_precision", "mesh_cast", "pvary"}
"""Primitives whose results hold what their operands hold."""

_MOVES = {
    "reshape": _of_one(_reshape),
    "squeeze": _of_one(_reshape),
    "expand_dims": _of_one(_reshape),
    "transpose": _of_one(_transpose),
    "rev": _of_one(_reverse),
    "slice": _of_one(_slice),
    "split": _of_one(_split),
    "unstack": _of_one(_unstack),
    "concatenate": _joined,
    "stack": _joined,
    "broadcast_in_dim": _broadcast,
}
"""Primitives that move entries of parameters."""
