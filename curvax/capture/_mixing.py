"""Follow the batch axis through a program, to tell whether examples mix.

What a variable may hold, the lattice of the walk:

  Axis     its entries along one axis depend on one example each
  Mixed    one of its entries depends on several examples
  LOST     we cannot tell (an index computed from data, a loop over the batch)
  None     it does not depend on the batch

An equation that reads a Mixed variable is Mixed; one without a rule below makes LOST. The error is
on one side: a model that is refused does mix, a model that is let through may.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from curvax._jaxpr import inner_program
from curvax.capture._walk import Place, Rules, Step, scan_operands, walk


@dataclass(frozen=True)
class Axis:
    """Where the batch axis of a variable is.

    Attributes:
      at: its number.
      alone: whether the axis is the batch axis alone; else other axes have been merged into it.
    """

    at: int
    alone: bool = True


@dataclass(frozen=True)
class Mixed:
    """A variable of which one entry depends on several examples.

    Attributes:
      by: the name of the operation that mixed them.
    """

    by: str


@dataclass(frozen=True)
class Lost:
    """A variable of which we cannot tell."""


LOST = Lost()

Where: TypeAlias = Axis | Mixed | Lost | None
Rule: TypeAlias = Callable[[Any, Sequence[Where]], Where]
"""`(equation, operands) -> what each of its results holds`."""


def mixing_operation(
    program: Any,
    is_batched: Sequence[bool],
    live: Sequence[bool],
) -> str | None:
    """Name an operation by which one row of the inputs influences what is computed of another.

    None means that no such operation was met; where the batch axis cannot be followed, nothing is
    said.

    Args:
      program: the program, with its constants.
      is_batched: for each argument whether its first axis is the batch axis.
      live: for each output whether it counts.
    """
    arguments = [Axis(0) if batched else None for batched in is_batched]
    # Only what reaches the outputs counts: statistics in aux may mix.
    results = walk(program, arguments, live, _RULES, Place())
    return next((where.by for where in results if isinstance(where, Mixed)), None)


def keeps_examples_apart(
    program: Any,
    is_batched: Sequence[bool],
    live: Sequence[bool],
) -> bool:
    """Tell whether every row of the outputs is known to be of the row of inputs in its place.

    Arguments are those of `mixing_operation`. False where examples mix and where we cannot tell.
    """
    arguments = [Axis(0) if batched else None for batched in is_batched]
    results = walk(program, arguments, live, _RULES, Place())
    of_outputs = [where for where, counts in zip(results, live, strict=True) if counts]
    return all(where is None or where == Axis(0) for where in of_outputs)


def _enters(eqn: Any) -> Any:
    """Enter custom derivatives too: how a result depends on examples is in the primal program."""
    inner = inner_program(eqn) or eqn.params.get("call_jaxpr")
    # Custom derivatives may have arguments of their own; then the axis is lost.
    fits = inner is not None and len(inner.jaxpr.invars) == len(eqn.invars)
    return inner if fits else None


def _results(step: Step) -> list[Where]:
    """Say where the batch axis of an equation's results is."""
    eqn, operands = step.eqn, step.operands
    name, number = eqn.primitive.name, len(eqn.outvars)
    if name == "scan":
        return _through_scan(step)
    # Which branch of a `cond` is taken may depend on all examples; what it computes is looked at.
    read = operands[1:] if name == "cond" else operands
    mixed = next((where for where in read if isinstance(where, Mixed)), None)
    if mixed is not None:
        return [mixed] * number
    # Rules are about axes: they need to know all of them.
    if LOST not in operands:
        rule = _PRIMITIVES.get(name)
        if rule is None and name.startswith(("reduce_", "arg")) and "axes" in eqn.params:
            rule = _reduce
        if rule is not None:
            return [rule(eqn, operands)] * number
    # Entry by entry, examples stay apart where their axes agree.
    if number == 1 and _is_elementwise(eqn):
        return [_together(operands)]
    return [LOST] * number


def _through_scan(step: Step) -> list[Where]:
    """Walk through a loop over another axis than the batch, to a fixed point of its carries."""
    eqn = step.eqn
    consts, carry, xs = scan_operands(eqn, step.operands)
    # The body sees one slice: without the scanned axis, which must not be the batch.
    slices = [_shifted(where, -1) for where in xs]
    live = [True] * len(eqn.outvars)
    results: list[Where] = []
    # Two rounds are enough: a carry that starts without the batch axis may gain it once, and
    # then only stay or be lost.
    for _ in range(2):
        arguments = [*consts, *carry, *slices]
        results = walk(eqn.params["jaxpr"], arguments, live, _RULES, step.place)
        carry = [_together(pair) for pair in zip(carry, results[: len(carry)], strict=True)]
    return [*carry, *(_shifted(where, 1) for where in results[len(carry) :])]


def _shifted(where: Where, by: int) -> Where:
    """Move the batch axis when a leading axis is taken off, or put on."""
    if not isinstance(where, Axis):
        return where
    return dataclasses.replace(where, at=where.at + by) if where.at + by >= 0 else LOST


def _is_elementwise(eqn: Any) -> bool:
    """Tell whether an operation without axes in its settings keeps shapes (or repeats size 1)."""
    shape = eqn.outvars[0].aval.shape
    if {"axis", "axes", "dimension", "dimensions", "dimension_numbers"} & set(eqn.params):
        return False
    return all(_fits(atom.aval.shape, shape) for atom in eqn.invars)


def _fits(shape: Sequence[int], result: Sequence[int]) -> bool:
    """Tell whether an operand of this shape is repeated, at most, to the shape of the result."""
    if not shape or len(shape) != len(result):
        return not shape
    return all(n in (1, m) for n, m in zip(shape, result, strict=True))


def _together(operands: Sequence[Where]) -> Where:
    """Combine operands entry by entry: their batch axes must be the same."""
    known = {operand for operand in operands if operand is not None}
    mixed = next((operand for operand in known if isinstance(operand, Mixed)), None)
    if mixed is not None or not known:
        return mixed
    return known.pop() if len(known) == 1 else LOST


def _reduce(eqn: Any, operands: Sequence[Where]) -> Where:
    """Reduce over axes: over the batch axis that mixes."""
    where, axes = _together(operands), eqn.params["axes"]
    if not isinstance(where, Axis):
        return where
    if where.at in axes:
        return Mixed(eqn.primitive.name)
    return _shifted(where, -sum(axis < where.at for axis in axes))


def _along(eqn: Any, operands: Sequence[Where]) -> Where:
    """Sort or accumulate along an axis."""
    where = _together(operands)
    axis = eqn.params.get("axis", eqn.params.get("dimension"))
    if isinstance(where, Axis) and where.at == axis:
        return Mixed(eqn.primitive.name)
    return where


def _dot(eqn: Any, operands: Sequence[Where]) -> Where:
    """Contract: the output has batch axes first, then the free ones of each operand."""
    contracting, batch = eqn.params["dimension_numbers"]
    free = []
    for number, atom in enumerate(eqn.invars):
        bound = (*contracting[number], *batch[number])
        free.append([i for i in range(len(atom.aval.shape)) if i not in bound])
    # Where the free axes of each operand begin in the output.
    firsts = (len(batch[0]), len(batch[0]) + len(free[0]))

    # Where the batch axis of either operand goes.
    places = set()
    batched = [(number, where) for number, where in enumerate(operands) if isinstance(where, Axis)]
    for number, where in batched:
        if where.at in contracting[number]:
            return Mixed("dot_general")
        if where.at in batch[number]:
            places.add(list(batch[number]).index(where.at))
        else:
            places.add(firsts[number] + free[number].index(where.at))
    # Two batch axes apart: every example meets every other.
    if len(places) > 1:
        return Mixed("dot_general")
    return Axis(places.pop(), all(where.alone for _, where in batched))


def _conv(eqn: Any, operands: Sequence[Where]) -> Where:
    numbers, (image, kernel) = eqn.params["dimension_numbers"], operands
    # Other axes than the batch's own: we cannot tell.
    if isinstance(image, Axis) and kernel is None and image.at == numbers.lhs_spec[0]:
        return dataclasses.replace(image, at=numbers.out_spec[0])
    return LOST


def _transpose(eqn: Any, operands: Sequence[Where]) -> Where:
    (where,) = operands
    if not isinstance(where, Axis):
        return where
    return dataclasses.replace(where, at=eqn.params["permutation"].index(where.at))


def _broadcast(eqn: Any, operands: Sequence[Where]) -> Where:
    where = operands[0]
    if not isinstance(where, Axis):
        return where
    return dataclasses.replace(where, at=eqn.params["broadcast_dimensions"][where.at])


def _reshape(eqn: Any, operands: Sequence[Where]) -> Where:
    """Follow the axis: merged with others it is still known, split again it is lost."""
    where = operands[0]
    if not isinstance(where, Axis):
        return where
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    # In row-major order the batch axis has `ahead` blocks before it.
    ahead, size = math.prod(before[: where.at]), before[where.at]
    start = 1
    for i, length in enumerate(after):
        if start == ahead and length == size:
            return dataclasses.replace(where, at=i)
        # An axis that holds at least one complete batch axis, from where that starts.
        covers = start <= ahead and start * length >= ahead * size
        if covers and length >= size and ahead % start == 0:
            return Axis(i, alone=False)
        start *= length
    return LOST


def _same_axes(eqn: Any, operands: Sequence[Where]) -> Where:
    """Cut or join along other axes than the batch."""
    where = _together(operands)
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if isinstance(where, Axis) and before[where.at] != after[where.at]:
        return LOST
    return where


_PRIMITIVES: Mapping[str, Rule] = {
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


def _same(where: Where) -> Where:
    return where


_RULES = Rules(_results, _enters, _same)
