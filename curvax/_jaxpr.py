"""Read and evaluate jaxprs, equation by equation where needed.

This is the one module that touches `jax.extend`. From JAX 0.11 on a `ClosedJaxpr` is a `Jaxpr`, so
nothing here asks which of the two it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.extend import core
from jaxtyping import Array

Rule: TypeAlias = Callable[..., Array]
"""`(*operands, **params) -> result`, in place of a primitive with one result."""

AsItIs: TypeAlias = Callable[[], list[Any]]
"""Evaluate the equation at hand unchanged."""

Concerned: TypeAlias = Callable[[int, Any], bool]
"""Tell by its index and itself whether an equation is one to replace."""

EquationRule: TypeAlias = Callable[[int, Any, list[Any], AsItIs], Sequence[Any]]
"""`(index, equation, operands, as_it_is) -> results`, in place of one equation."""


def replacing(fn: Callable[..., Any], rules: Mapping[str, Rule]) -> Callable[..., Any]:
    """Return `fn` with the primitives named in `rules` computed by their rules.

    Nested `jit` and remat are entered; other nested programs (loops, custom derivatives) are left
    as they are.
    """

    def replaced(*args: Any) -> Any:
        closed, shapes = trace_model(fn, *args)
        results = _evaluate(closed, jax.tree.leaves(args), rules)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return replaced


def primitives(fn: Callable[..., Any], *args: Any) -> set[str]:
    """Return the names of all primitives that `fn(*args)` runs, in nested programs too."""

    def names(eqns: Any) -> Iterator[str]:
        for eqn in eqns:
            yield eqn.primitive.name
            for program in programs_in(eqn):
                yield from names(program.eqns)

    return set(names(jax.make_jaxpr(fn)(*args).eqns))


def may_depend_on_arguments(fn: Callable[..., Any], *args: Any) -> bool:
    """Tell whether the results of `fn(*args)` may depend on its arguments.

    False is certain: no equation leads from an argument to a result, as where JAX has found a
    derivative to be zero. A nested program counts as one equation.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    dependent = set(jaxpr.invars)

    def is_dependent(atom: Any) -> bool:
        return not is_constant(atom) and atom in dependent

    for eqn in jaxpr.eqns:
        if any(map(is_dependent, eqn.invars)):
            dependent.update(eqn.outvars)
    return any(map(is_dependent, jaxpr.outvars))


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


def placed_results(fn: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]]:
    """Return the shapes of what `fn` returns, and for each array the sharding that `fn` gives it.

    That is the sharding of a constraint, or of a type that states one; None where `fn` leaves the
    array to the compiler.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return shapes, _placed_outputs(closed.jaxpr)


def _placed_outputs(jaxpr: Any) -> list[Any]:
    """Return the shardings of a program's results, see `placed_results`."""
    producers = {id(var): (eqn, k) for eqn in jaxpr.eqns for k, var in enumerate(eqn.outvars)}
    shardings = []
    for var in jaxpr.outvars:
        eqn, k = producers.get(id(var), (None, 0))
        typed = var.aval.sharding
        sharding = None
        if any(typed.spec):
            sharding = typed
        elif eqn is not None and eqn.primitive.name == "sharding_constraint":
            sharding = eqn.params["sharding"]
        elif eqn is not None and eqn.primitive.name in ("jit", "pjit"):
            sharding = _placed_outputs(eqn.params["jaxpr"].jaxpr)[k]
        shardings.append(sharding)
    return shardings


def is_constant(atom: Any) -> bool:
    """Tell whether an operand is written into the program as a number."""
    return isinstance(atom, core.Literal)


def evaluate(
    program: Any,
    eqn: Any,
    operands: Mapping[Any, Any],
    mapped: Sequence[frozenset[Any]] = (),
) -> Any:
    """Evaluate an equation with one result on concrete operands, inside of a trace as outside.

    Args:
      program: the program that the equation is in.
      eqn: the equation.
      operands: the values of its variables.
      mapped: leading axes over which the equation is mapped, outermost first: for each the
        variables that have it.
    """
    variables = list(operands)

    def run(*values: Any) -> Any:
        (result,) = _run_one(program.jaxpr, eqn, dict(zip(variables, values, strict=True)))
        return result

    # The outermost axis is the first: it is mapped over last.
    for having in reversed(mapped):
        axes = [0 if variable in having else None for variable in variables]
        run = jax.vmap(run, in_axes=axes)
    with jax.ensure_compile_time_eval():
        return run(*operands.values())


def is_concrete(x: Any) -> bool:
    """Tell whether an array has values, and is not one that is being traced."""
    return not isinstance(x, jax.core.Tracer)


def programs_in(eqn: Any) -> Iterator[Any]:
    """Go through the programs that are parameters of an equation."""
    for param in eqn.params.values():
        # `cond` holds a tuple of programs, the others one; most parameters are none.
        yield from filter(is_program, param if isinstance(param, tuple | list) else (param,))


def is_program(x: Any) -> bool:
    """Tell whether a parameter of an equation is a program."""
    return hasattr(x, "eqns")


def as_closed(program: Any) -> Any:
    """Return a nested program together with its constants, of which remat's has none."""
    return program if hasattr(program, "consts") else core.ClosedJaxpr(program, [])


def bind(eqn: Any, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Any]:
    """Apply the primitive of an equation with other parameters, in the mesh around."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return list(results) if eqn.primitive.multiple_results else [results]


def as_function(program: Any, eqn: Any) -> Callable[..., list[Any]]:
    """Return an equation of a program as a function of its operands."""

    def run(*operands: Any) -> list[Any]:
        pairs = zip(eqn.invars, operands, strict=True)
        return _run_one(program.jaxpr, eqn, {x: v for x, v in pairs if not is_constant(x)})

    return run


def inner_program(eqn: Any) -> Any:
    """Return the program inside a nested `jit` or remat; None for any other equation."""
    # remat's program has no constants of its own, `jit`'s comes with them.
    if eqn.primitive.name in ("checkpoint", "remat2"):
        return core.ClosedJaxpr(eqn.params["jaxpr"], [])
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") else None


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Return how many operands of a `scan` are closed over, and how many are carried.

    The operands after those are scanned over.
    """
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # From JAX 0.11 on the two numbers stand in the tree of operands.
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def interpret(
    closed: Any,
    args: Sequence[Any],
    concerned: Concerned,
    rule: EquationRule,
) -> list[Any]:
    """Evaluate a program; the results of every `concerned` equation come from `rule`."""
    jaxpr = closed.jaxpr
    variables = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(variables, [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_constant(atom) else values[atom]

    # What some equation or the caller reads; a run of equations has to return no more than that.
    operands = [atom for eqn in jaxpr.eqns for atom in eqn.invars]
    needed = {atom for atom in (*operands, *jaxpr.outvars) if not is_constant(atom)}

    # Equations between two concerned ones are evaluated together, as one program.
    groups = itertools.groupby(enumerate(jaxpr.eqns), lambda pair: concerned(*pair))
    for is_concerned, group in groups:
        if not is_concerned:
            eqns = [eqn for _, eqn in group]
            values.update(_run(jaxpr, eqns, values, needed))
            continue
        for index, eqn in group:
            as_it_is = partial(_run_one, jaxpr, eqn, values)
            results = rule(index, eqn, [read(atom) for atom in eqn.invars], as_it_is)
            values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(
    closed: Any,
    args: Sequence[Any],
    rules: Mapping[str, Rule],
) -> list[Any]:
    """Evaluate a program with the primitives named in `rules` computed by their rules."""

    def has_rule(eqn: Any) -> bool:
        if eqn.primitive.name in rules:
            return True
        inner = inner_program(eqn)
        return inner is not None and any(map(has_rule, inner.jaxpr.eqns))

    def concerned(index: int, eqn: Any) -> bool:
        del index
        return has_rule(eqn)

    def rule(
        index: int,
        eqn: Any,
        operands: list[Any],
        as_it_is: AsItIs,
    ) -> Sequence[Any]:
        """Apply the rule of a primitive, or go into a nested program."""
        del index, as_it_is
        if eqn.primitive.name in rules:
            return [rules[eqn.primitive.name](*operands, **eqn.params)]
        # As remat does in a backward pass: compute again from the operands, and keep nothing.
        if eqn.params.get("prevent_cse") and eqn.params["differentiated"]:
            operands = lax.optimization_barrier(operands)
        return _evaluate(inner_program(eqn), operands, rules)

    return interpret(closed, args, concerned, rule)


def _run(
    jaxpr: Any,
    eqns: list[Any],
    values: Mapping[Any, Any],
    needed: set[Any],
) -> dict[Any, Any]:
    """Evaluate consecutive equations as a program; return the values that are needed elsewhere."""
    # Dicts in place of sets: the order of inputs and outputs is that of the equations.
    defined = dict.fromkeys(variable for eqn in eqns for variable in eqn.outvars)
    operands = dict.fromkeys(atom for eqn in eqns for atom in eqn.invars if not is_constant(atom))
    inputs = [variable for variable in operands if variable not in defined]
    outputs = [variable for variable in defined if variable in needed]

    # Constants are inputs like all others: `values` holds them too.
    part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=eqns)
    program = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))
    results = program(*(values[variable] for variable in inputs))
    return dict(zip(outputs, results, strict=True))


def _run_one(
    jaxpr: Any,
    eqn: Any,
    values: Mapping[Any, Any],
) -> list[Any]:
    """Evaluate one equation; return its results."""
    results = _run(jaxpr, [eqn], values, set(eqn.outvars))
    return list(results.values())
