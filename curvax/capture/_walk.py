"""Walk through a program and say of every variable what it holds.

An abstract interpretation: the analysis (`Rules`) brings a lattice of what a variable may hold and
says what an equation does to it; the walk brings the program, its dead code and its nested
programs. Two analyses use it: `_find` follows parameters, `_mixing` the batch axis.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from curvax._jaxpr import is_constant, scan_counts
from curvax.capture._frames import Frame, Source

Value: TypeAlias = Any
"""What a variable holds: an element of the analysis' lattice, None for nothing that it follows."""

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where an equation is.

    Attributes:
      site: its index in its program, after the indices of the equations around that program.
      loops: the loops around it, as `(number, length)`, outermost first.
      sources: where the arguments of the program come from that is gone into next; None if nothing
        is known.
    """

    site: tuple[int, ...] = ()
    loops: tuple[tuple[int, int], ...] = ()
    sources: tuple[Source, ...] | None = None

    def at(self, index: int) -> Place:
        """Go one program further in."""
        return dataclasses.replace(self, site=(*self.site, index))


class Step(NamedTuple):
    """An equation as the walk meets it.

    Attributes:
      eqn: the equation.
      operands: what its operands hold.
      live: for each result, whether the outputs of the program depend on it.
      place: where it is.
      frame: the program that it is in, which says where its operands come from.
    """

    eqn: Any
    operands: list[Value]
    live: list[bool]
    place: Place
    frame: Frame


class Rules(NamedTuple):
    """An analysis.

    Attributes:
      results: `step -> what the results of the equation hold`.
      enters: `equation -> the program inside` that the walk goes through in its place, or None.
      read_twice: `held -> what is known of it` where two equations read one variable.
      stops: names of primitives whose operands do not count: what leads to them alone is dead code.
    """

    results: Callable[[Step], Sequence[Value]]
    enters: Callable[[Any], Any]
    read_twice: Callable[[Value], Value]
    stops: frozenset[str] = frozenset()


def walk(
    program: Any,
    arguments: Sequence[Value],
    live: Sequence[bool],
    rules: Rules,
    place: Place,
) -> list[Value]:
    """Return what the outputs of a program hold, given what its arguments hold.

    Only equations on which a live output depends, and that read a variable that holds something,
    are looked at.
    """
    jaxpr = program.jaxpr
    # What each variable holds; one that is absent holds nothing.
    values: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    needed = _needed(jaxpr, live, rules.stops)
    readers = _readers(jaxpr, live, needed, rules.stops)
    frame = Frame(program, place.sources)

    def look(atom: Any) -> Value:
        if is_constant(atom):
            return None
        value = values.get(atom)
        return rules.read_twice(value) if readers[atom] > 1 else value

    for index, eqn in enumerate(jaxpr.eqns):
        operands = [look(atom) for atom in eqn.invars]
        # Dead code, or nothing of interest: the results hold nothing.
        if not needed.intersection(eqn.outvars) or all(value is None for value in operands):
            continue
        alive, here = [atom in needed for atom in eqn.outvars], place.at(index)
        inner = rules.enters(eqn)
        # A nested program with one argument for each operand is walked through in place.
        if inner is not None:
            sources = tuple(map(frame.source, eqn.invars))
            inside = dataclasses.replace(here, sources=sources)
            results: Sequence[Value] = walk(inner, operands, alive, rules, inside)
        else:
            step = Step(eqn=eqn, operands=operands, live=alive, place=here, frame=frame)
            results = rules.results(step)
        values.update(zip(eqn.outvars, results, strict=True))
    outputs = zip(jaxpr.outvars, live, strict=True)
    return [look(atom) if alive else None for atom, alive in outputs]


class ScanOperands(NamedTuple, Generic[T]):
    """The operands of a `scan` (or their counterparts in its body).

    Attributes:
      consts: those that are closed over.
      carry: those that are carried from round to round.
      xs: those that are scanned over.
    """

    consts: list[T]
    carry: list[T]
    xs: list[T]


def scan_operands(
    eqn: Any,
    operands: Sequence[T],
) -> ScanOperands[T]:
    """Tell the three kinds of operands of a `scan` apart."""
    # In this order, in the operands of the equation as in the arguments of its body.
    num_consts, num_carry = scan_counts(eqn)
    first = num_consts + num_carry
    return ScanOperands(
        list(operands[:num_consts]), list(operands[num_consts:first]), list(operands[first:])
    )


def _needed(
    jaxpr: Any,
    live: Sequence[bool],
    stops: frozenset[str],
) -> set[Any]:
    """Return the variables on which the live outputs depend, other than through `stops`."""
    # From the outputs back.
    needed = _variables(_live_outputs(jaxpr, live))
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name not in stops and needed.intersection(eqn.outvars):
            needed |= _variables(eqn.invars)
    return needed


def _readers(
    jaxpr: Any,
    live: Sequence[bool],
    needed: set[Any],
    stops: frozenset[str],
) -> Counter[Any]:
    """Count for every variable how often it is read; being an output is a reading too."""
    # Dead code reads nothing, and neither does what has no derivative.
    reads = _live_outputs(jaxpr, live)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in stops and needed.intersection(eqn.outvars):
            reads += eqn.invars
    return Counter(atom for atom in reads if not is_constant(atom))


def _live_outputs(
    jaxpr: Any,
    live: Sequence[bool],
) -> list[Any]:
    return [atom for atom, alive in zip(jaxpr.outvars, live, strict=True) if alive]


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {atom for atom in atoms if not is_constant(atom)}
