"""Read and evaluate jaxprs, equation by equation where needed. The one module that touches `jax.extend`."""

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

AsItIs: TypeAlias = Callable[[], list[Any]]
"""Evaluate the equation at hand unchanged."""


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


def trace_model(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Return the program of `fn(*args)`, with its constants, and the shapes of its results.

    The same function traced again, on the same shapes and under the same settings of JAX, gives the
    same program without running its Python: the trace is the one that `jax.jit(fn)` keeps, for as
    long as the function lives.
    """
    # `make_jaxpr` looks for a kept trace too: a function made here has none.
    trace_anew = jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)
    try:
        hash(fn)
    except TypeError:  # a module of arrays, as Equinox has them, is no key of a cache
        return trace_anew(*args)
    traced = jax.jit(fn).trace(*args)
    if len(traced.jaxpr.jaxpr.invars) != len(jax.tree.leaves(args)):
        # The function closes over values that are being traced, which `jit` makes arguments of. A
        # kept trace would not say which they are now: trace again, with them as constants.
        return trace_anew(*args)
    return traced.jaxpr, traced.out_info


def is_constant(atom: Any) -> bool:
    """Whether an operand is written into the program as a number."""
    return isinstance(atom, core.Literal)


def inner_program(eqn: Any) -> Any:
    """The program inside a nested `jit` or remat, with its constants; None for any other equation."""
    if eqn.primitive.name in ("checkpoint", "remat2"):
        return core.ClosedJaxpr(eqn.params["jaxpr"], [])
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") else None


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a `scan` are closed over, and how many are carried; the rest are scanned over."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()  # from jax 0.11
    return len(consts), len(carry)


def interpret(
    closed: Any,
    args: Sequence[Any],
    concerned: Callable[[int, Any], bool],
    rule: Callable[[int, Any, list[Any], AsItIs], Sequence[Any]],
) -> list[Any]:
    """Evaluate a program; `rule(index, eqn, operands, as_it_is)` gives the results of every `concerned` equation."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    read = lambda atom: atom.val if is_constant(atom) else values[atom]
    needed = {atom for eqn in jaxpr.eqns for atom in eqn.invars if not is_constant(atom)}
    needed |= {atom for atom in jaxpr.outvars if not is_constant(atom)}
    for chosen, group in itertools.groupby(enumerate(jaxpr.eqns), lambda pair: concerned(*pair)):
        if not chosen:
            values.update(_run(jaxpr, [eqn for _, eqn in group], values, needed))
            continue
        for index, eqn in group:
            as_it_is = lambda eqn=eqn: list(_run(jaxpr, [eqn], values, set(eqn.outvars)).values())
            results = rule(index, eqn, [read(atom) for atom in eqn.invars], as_it_is)
            values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _concerned(eqn: Any, rules: Mapping[str, Rule]) -> bool:
    inner = inner_program(eqn)
    return eqn.primitive.name in rules or (
        inner is not None and any(_concerned(e, rules) for e in inner.jaxpr.eqns)
    )


def _evaluate(closed: Any, args: Sequence[Any], rules: Mapping[str, Rule]) -> list[Any]:
    def rule(index: int, eqn: Any, operands: list[Any], as_it_is: AsItIs) -> Sequence[Any]:
        del index, as_it_is
        if eqn.primitive.name in rules:
            return [rules[eqn.primitive.name](*operands, **eqn.params)]
        if eqn.params.get("prevent_cse") and eqn.params["differentiated"]:
            operands = lax.optimization_barrier(
                operands
            )  # as remat does: compute again, keep nothing
        return _evaluate(inner_program(eqn), operands, rules)

    return interpret(closed, args, lambda index, eqn: _concerned(eqn, rules), rule)


def _run(
    jaxpr: Any, eqns: list[Any], values: Mapping[Any, Any], needed: set[Any]
) -> dict[Any, Any]:
    """Evaluate consecutive equations as a program of their own; return the values that are needed elsewhere."""
    made = dict.fromkeys(variable for eqn in eqns for variable in eqn.outvars)
    read = dict.fromkeys(atom for eqn in eqns for atom in eqn.invars if not is_constant(atom))
    inputs = [variable for variable in read if variable not in made]
    outputs = [variable for variable in made if variable in needed]
    program = core.ClosedJaxpr(
        jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=eqns), []
    )
    return dict(
        zip(
            outputs,
            core.jaxpr_as_fun(program)(*(values[variable] for variable in inputs)),
            strict=True,
        )
    )
