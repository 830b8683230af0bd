"""Evaluate a function with some of its primitive operations replaced. The one module that reads jaxprs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.extend import core
from jaxtyping import Array

Rule: TypeAlias = Callable[..., Array]
"""`(*operands, **params) -> result`, in place of a primitive with one result."""


def replacing(fn: Callable[..., Any], rules: Mapping[str, Rule]) -> Callable[..., Any]:
    """Return `fn` with the primitives named in `rules` computed by their rules.

    Nested `jit` and remat are entered; other nested programs (loops, custom derivatives) are left as they are.
    """

    def replaced(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        results = _evaluate(closed, jax.tree.leaves(args), rules)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return replaced


def primitives(fn: Callable[..., Any], *args: Any) -> set[str]:
    """Names of all primitives that `fn(*args)` runs, those of nested programs included."""

    def names(eqns: Any) -> Iterator[str]:
        for eqn in eqns:
            yield eqn.primitive.name
            for param in eqn.params.values():
                for program in param if isinstance(param, tuple | list) else (param,):
                    yield from names(getattr(program, "eqns", ()))

    return set(names(jax.make_jaxpr(fn)(*args).eqns))


def _inner(eqn: Any) -> Any:
    """The program inside a nested `jit` or remat, with its constants; None for any other equation."""
    if eqn.primitive.name in ("checkpoint", "remat2"):
        return core.ClosedJaxpr(eqn.params["jaxpr"], [])
    return eqn.params["jaxpr"] if eqn.primitive.name == "jit" else None


def _concerned(eqn: Any, rules: Mapping[str, Rule]) -> bool:
    inner = _inner(eqn)
    return eqn.primitive.name in rules or (inner is not None and any(_concerned(e, rules) for e in inner.jaxpr.eqns))


def _evaluate(closed: Any, args: Sequence[Any], rules: Mapping[str, Rule]) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    needed = {atom for eqn in jaxpr.eqns for atom in eqn.invars if not isinstance(atom, core.Literal)}
    needed |= {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    for concerned, group in itertools.groupby(jaxpr.eqns, lambda eqn: _concerned(eqn, rules)):
        if not concerned:
            values.update(_run(jaxpr, list(group), values, needed))
            continue
        for eqn in group:
            operands = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in rules:
                results = [rules[eqn.primitive.name](*operands, **eqn.params)]
            else:
                if eqn.params.get("prevent_cse") and eqn.params["differentiated"]:
                    operands = lax.optimization_barrier(operands)  # as remat does: compute again, keep nothing
                results = _evaluate(_inner(eqn), operands, rules)
            values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(jaxpr: Any, eqns: list[Any], values: Mapping[Any, Any], needed: set[Any]) -> dict[Any, Any]:
    """Evaluate consecutive equations as a program of their own; return the values that are needed elsewhere."""
    made = dict.fromkeys(variable for eqn in eqns for variable in eqn.outvars)
    read = dict.fromkeys(atom for eqn in eqns for atom in eqn.invars if not isinstance(atom, core.Literal))
    inputs = [variable for variable in read if variable not in made]
    outputs = [variable for variable in made if variable in needed]
    program = core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=eqns), [])
    return dict(zip(outputs, core.jaxpr_as_fun(program)(*(values[variable] for variable in inputs)), strict=True))
