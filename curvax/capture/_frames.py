"""Where the variables of a program come from: from arguments of the model, or from constants.

The walk follows parameters. Of the other operands that they meet it asks two things here, which are
answered when asked: which arguments of the model does this depend on? If on none, what is it?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from curvax._jaxpr import evaluate, inner_program, is_concrete, is_constant

UNKNOWN = 1
"""The origin of what no argument of the model explains: traced constants, effects, carries."""

MAX_ENTRIES = 2**26
"""Constants with more entries than this are not computed."""


class Constant(NamedTuple):
    """The value of a variable that depends on no argument of the model.

    Attributes:
      value: the array; its first axes run over the rounds of the loops.
      loops: the numbers of these loops, outermost first.
    """

    value: Any
    loops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where an argument of a program comes from.

    Attributes:
      origins: a bit for each argument of the model that it depends on.
      atom: the variable of the frame around that is passed; None for an argument of the model.
      frame: the frame around.
      loop: the number of the loop that slices it for each round, or None.
    """

    origins: int
    atom: Any = None
    frame: Frame | None = None
    loop: int | None = None


class Frame:
    """A program, with where its arguments come from.

    Args:
      program: the program, with its constants.
      sources: for each argument; None if nothing is known.
    """

    def __init__(
        self,
        program: Any,
        sources: Sequence[Source] | None,
    ) -> None:
        """Look nothing up yet: of most programs nothing is asked."""
        jaxpr = program.jaxpr
        # Of an analysis that asks nothing, nothing is known.
        if sources is None:
            sources = [Source(UNKNOWN)] * len(jaxpr.invars)
        self._program = program
        self._consts = dict(zip(jaxpr.constvars, program.consts, strict=True))
        self._sources: dict[Any, Source] = dict(zip(jaxpr.invars, sources, strict=True))
        self._origins: dict[Any, int] = {}
        self._equations: dict[Any, Any] = {}
        self._constants: dict[Any, Constant | None] = {}

    def source(
        self,
        atom: Any,
        loop: int | None = None,
    ) -> Source:
        """Return the source of an argument of a program inside, to which `atom` is passed."""
        return Source(self.origins(atom), atom, self, loop)

    def unknown(self, atoms: Sequence[Any]) -> Source:
        """Return the source of what is computed from all of the atoms, in other programs."""
        origins = UNKNOWN
        for atom in atoms:
            origins |= self.origins(atom)
        return Source(origins)

    def origins(self, atom: Any) -> int:
        """Return a bit for each argument of the model that a variable depends on."""
        if is_constant(atom):
            return 0
        if not self._origins:
            self._find_origins()
        return self._origins[atom]

    def _find_origins(self) -> None:
        """Go through the program once, from its arguments on."""
        origins = self._origins
        for variable, x in self._consts.items():
            origins[variable] = 0 if is_concrete(x) else UNKNOWN
        for variable, source in self._sources.items():
            origins[variable] = source.origins
        for eqn in self._program.jaxpr.eqns:
            # Of a program inside, each result is taken to depend on all that it reads.
            bits = UNKNOWN if eqn.effects else 0
            for atom in eqn.invars:
                bits |= 0 if is_constant(atom) else origins[atom]
            origins.update(dict.fromkeys(eqn.outvars, bits))
            self._equations.update(dict.fromkeys(eqn.outvars, eqn))

    def definition(self, atom: Any) -> tuple[Frame, Any] | None:
        """Return the equation whose result a variable is, with its frame; None of an argument.

        Nested `jit` and remat are looked into.
        """
        # Arguments of the program and its constants are no results.
        if is_constant(atom) or atom in self._consts:
            return None
        if atom in self._sources:
            source = self._sources[atom]
            return None if source.frame is None else source.frame.definition(source.atom)
        self.origins(atom)  # which looks all equations up
        eqn = self._equations[atom]
        inner = inner_program(eqn)
        if inner is None:
            return self, eqn
        inside = Frame(inner, list(map(self.source, eqn.invars)))
        return inside.definition(inner.jaxpr.outvars[eqn.outvars.index(atom)])

    def constant(self, atom: Any) -> Constant | None:
        """Return the value of a variable; None if it depends on an argument of the model."""
        if is_constant(atom):
            return Constant(atom.val)
        if self.origins(atom):
            return None
        if atom not in self._constants:
            self._constants[atom] = self._constant(atom)
        return self._constants[atom]

    def _constant(self, atom: Any) -> Constant | None:
        """Compute a constant from the constants of the program."""
        if atom in self._consts:
            return Constant(self._consts[atom])
        if atom in self._sources:
            source = self._sources[atom]
            if source.frame is None:
                return None
            outer = source.frame.constant(source.atom)
            if outer is None or source.loop is None:
                return outer
            # What is scanned over has its rounds first, after those of the loops around.
            return outer._replace(loops=(*outer.loops, source.loop))
        eqn = self._equations[atom]
        if len(eqn.outvars) > 1 or atom.aval.size > MAX_ENTRIES:
            return None
        return self.evaluated(eqn, {})

    def evaluated(
        self,
        eqn: Any,
        values: dict[Any, Constant],
    ) -> Constant | None:
        """Evaluate an equation with one result on constants, for all rounds of their loops.

        Args:
          eqn: an equation of the program.
          values: what stands for operands that are no constants.

        Returns:
          The result; None if an operand is neither.
        """
        operands = dict(values)
        for atom in eqn.invars:
            if is_constant(atom) or atom in operands:
                continue
            x = self.constant(atom)
            if x is None:
                return None
            operands[atom] = x
        if eqn.primitive.name == "broadcast_in_dim" and len(operands) == 1:
            return _broadcast(eqn, *operands.values())
        # Loops inside are numbered after those around them.
        loops = sorted({loop for x in operands.values() for loop in x.loops})
        mapped = []
        for loop in loops:
            having = frozenset(atom for atom, x in operands.items() if loop in x.loops)
            mapped.append(having)
        arrays = {atom: x.value for atom, x in operands.items()}
        return Constant(evaluate(self._program, eqn, arrays, mapped), tuple(loops))


def _broadcast(eqn: Any, x: Constant) -> Constant:
    """Broadcast without copies: a number that fills a kernel stays a number."""
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    value = np.asarray(x.value)
    rounds = value.shape[: len(x.loops)]
    aligned = [1] * len(shape)
    for axis, place in enumerate(places):
        aligned[place] = value.shape[len(rounds) + axis]
    return x._replace(value=np.broadcast_to(value.reshape(*rounds, *aligned), (*rounds, *shape)))
