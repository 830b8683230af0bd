"""Follow the batch axis through a program, to tell whether examples mix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from curvax._jaxpr import inner_program, is_constant, scan_counts


@dataclass(frozen=True)
class Axis:
    """Where the batch axis of a variable is.

    Attributes:
      at: its place.
      whole: the axis is the batch axis alone; else other axes have been merged into it.
    """

    at: int
    whole: bool = True


@dataclass(frozen=True)
class Mixed:
    """A variable of which one entry depends on several examples.

    Attributes:
      by: name of the operation that mixed them.
    """

    by: str


Where: TypeAlias = Axis | Mixed | str | None
"""An `Axis`; `Mixed`; None for a variable that does not depend on the batch; `_LOST` if we cannot tell."""

_LOST = "lost"


def mixing_operation(closed: Any, is_batched: Sequence[bool]) -> str | None:
    """Name an operation by which one row of the inputs influences what is computed of another.

    None means that none was found: where the batch axis cannot be followed (an index computed from data, a loop over the
    batch), nothing is said.

    Args:
      closed: the program.
      is_batched: for each argument, whether its first axis is the batch axis.
    """
    results = _walk(closed, [Axis(0) if batched else None for batched in is_batched])
    return next((where.by for where in results if isinstance(where, Mixed)), None)


def _walk(closed: Any, given: Sequence[Where]) -> list[Where]:
    jaxpr = closed.jaxpr
    values: dict[Any, Where] = dict(zip(jaxpr.invars, given, strict=True))
    look = lambda atom: None if is_constant(atom) else values.get(atom)
    for eqn in jaxpr.eqns:
        operands = [look(atom) for atom in eqn.invars]
        if any(operand is not None for operand in operands):
            results = _follow(eqn, operands)
            values.update(zip(eqn.outvars, results, strict=True))
    return [look(atom) for atom in jaxpr.outvars]


def _follow(eqn: Any, operands: Sequence[Where]) -> list[Where]:
    name, number = eqn.primitive.name, len(eqn.outvars)
    mixed = next((w for w in operands[1 if name == "cond" else 0 :] if isinstance(w, Mixed)), None)
    if mixed is not None and name != "scan":
        return [mixed] * number
    inner = inner_program(eqn) or eqn.params.get("call_jaxpr")
    if inner is not None and len(inner.jaxpr.invars) == len(operands):
        return _walk(inner, operands)
    if name == "scan":
        return _follow_scan(eqn, operands)
    if name in _RULES and _LOST not in operands:
        return [_RULES[name](eqn, operands)] * number
    if name.startswith(("reduce_", "arg")) and "axes" in eqn.params and _LOST not in operands:
        return [_reduce(eqn, operands)] * number
    if number == 1 and _is_elementwise(eqn):
        return [_together(operands)]
    return [_LOST] * number


def _follow_scan(eqn: Any, operands: Sequence[Where]) -> list[Where]:
    """Enter a loop over another axis than the batch; carries must keep the batch axis where it is."""
    consts, carries = scan_counts(eqn)
    inner: list[Where] = list(operands)
    for i in range(consts + carries, len(operands)):
        scanned = operands[i]
        if isinstance(scanned, Axis):
            inner[i] = dataclasses.replace(scanned, at=scanned.at - 1) if scanned.at > 0 else _LOST
    for _ in range(2):  # a carry that starts without the batch axis may gain it
        results = _walk(eqn.params["jaxpr"], inner)
        inner[consts : consts + carries] = [
            _together([a, b])
            for a, b in zip(inner[consts : consts + carries], results[:carries], strict=True)
        ]
    outer = lambda w: dataclasses.replace(w, at=w.at + 1) if isinstance(w, Axis) else w
    return [*inner[consts : consts + carries], *map(outer, results[carries:])]


def _is_elementwise(eqn: Any) -> bool:
    """Whether an operation without axes of its own keeps shapes (operands of size 1 are repeated)."""
    shape = eqn.outvars[0].aval.shape
    fits = lambda s: (
        not s or (len(s) == len(shape) and all(a in (1, b) for a, b in zip(s, shape, strict=True)))
    )
    own_axes = {"axis", "axes", "dimension", "dimensions", "dimension_numbers"} & set(eqn.params)
    return not own_axes and all(fits(atom.aval.shape) for atom in eqn.invars)


def _together(operands: Sequence[Where]) -> Where:
    """Combine operands entry by entry: their batch axes must be the same."""
    known = {operand for operand in operands if operand is not None}
    mixed = [operand for operand in known if isinstance(operand, Mixed)]
    if mixed:
        return mixed[0]
    return known.pop() if len(known) == 1 else (_LOST if known else None)


def _reduce(eqn: Any, operands: Sequence[Where]) -> Where:
    where = _together(operands)
    if not isinstance(where, Axis):
        return where
    if where.at in eqn.params["axes"]:
        return Mixed(eqn.primitive.name)
    return dataclasses.replace(
        where, at=where.at - sum(axis < where.at for axis in eqn.params["axes"])
    )


def _along(eqn: Any, operands: Sequence[Where]) -> Where:
    """Sort or accumulate along an axis."""
    where = _together(operands)
    axis = eqn.params.get("axis", eqn.params.get("dimension"))
    if isinstance(where, Axis) and where.at == axis:
        return Mixed(eqn.primitive.name)
    return where


def _dot(eqn: Any, operands: Sequence[Where]) -> Where:
    contracting, batch = eqn.params["dimension_numbers"]
    places = []
    for side, where in enumerate(operands):
        if not isinstance(where, Axis):
            continue
        if where.at in contracting[side]:
            return Mixed("dot_general")
        if where.at in batch[side]:
            places.append(list(batch[side]).index(where.at))
            continue
        free = lambda s: [
            i for i in range(len(eqn.invars[s].aval.shape)) if i not in (*contracting[s], *batch[s])
        ]
        places.append(
            len(batch[0]) + (len(free(0)) if side else 0) + sum(i < where.at for i in free(side))
        )
    if len(set(places)) > 1:
        return Mixed("dot_general")
    axes = [w for w in operands if isinstance(w, Axis)]
    return Axis(places[0], all(w.whole for w in axes))


def _conv(eqn: Any, operands: Sequence[Where]) -> Where:
    numbers, (lhs, rhs) = eqn.params["dimension_numbers"], operands
    if isinstance(lhs, Axis) and rhs is None and lhs.at == numbers.lhs_spec[0]:
        return dataclasses.replace(lhs, at=numbers.out_spec[0])
    return _LOST


def _transpose(eqn: Any, operands: Sequence[Where]) -> Where:
    (where,) = operands
    return (
        dataclasses.replace(where, at=eqn.params["permutation"].index(where.at))
        if isinstance(where, Axis)
        else where
    )


def _broadcast(eqn: Any, operands: Sequence[Where]) -> Where:
    where = operands[0]
    return (
        dataclasses.replace(where, at=eqn.params["broadcast_dimensions"][where.at])
        if isinstance(where, Axis)
        else where
    )


def _reshape(eqn: Any, operands: Sequence[Where]) -> Where:
    """Follow the axis through a reshape; merged with others it is still known, split again it is lost."""
    where = operands[0]
    if not isinstance(where, Axis):
        return where
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    ahead = _product(before[: where.at])
    size = before[where.at]
    start = 1
    for i, length in enumerate(after):
        # the axis of the result that holds at least one whole batch axis, from where it starts
        if start == ahead and length == size:
            return dataclasses.replace(where, at=i)
        if (
            start <= ahead
            and start * length >= ahead * size
            and length >= size
            and ahead % start == 0
        ):
            return Axis(i, whole=False)
        start *= length
    return _LOST


def _same_axes(eqn: Any, operands: Sequence[Where]) -> Where:
    """Cut or join along other axes than the batch."""
    where = _together(operands)
    if (
        isinstance(where, Axis)
        and eqn.invars[0].aval.shape[where.at] != eqn.outvars[0].aval.shape[where.at]
    ):
        return _LOST
    return where


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


_RULES = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "cumsum": _along,
    "cumprod": _along,
    "cummax": _along,
    "cummin": _along,
    "cumlogsumexp": _along,
    "sort": _along,
    "slice": _same_axes,
    "split": _same_axes,
    "concatenate": _same_axes,
    "pad": _same_axes,
}
