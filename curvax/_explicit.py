"""Models that say how arrays are sharded, run where the compiler decides that.

A model for axes of a mesh of the type `Explicit` names these axes, `einsum(..., out_sharding=
P("data"))`. JAX refuses the names where the axes are of type `Auto`, and nowhere can one row of a
batch be sharded over an axis. So such a model is traced for a stand-in: a mesh that has these axes,
each of size 1, where any array may be sharded in any way. Its program is then evaluated without all
that it says on sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from curvax._jaxpr import (
    AsItIs,
    as_closed,
    as_function,
    bind,
    inner_program,
    interpret,
    is_program,
    programs_in,
    trace_model,
)

PLACES = ("out_sharding", "sharding")
"""Parameters of primitives that say how their result is sharded."""

_ADVICE = (
    "Here a model that is sharded over axes of the type Explicit was traced for a mesh with the "
    "same axes, each of size 1. Let it say how arrays are sharded by a PartitionSpec (no "
    "NamedSharding), and take arrays that it closes over from params or inputs (curvax.Shared)."
)


def without_placement(model: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return a model fit for the compiler's own placement, and for parts of a batch.

    Args:
      model: a function of arrays.
      *args: arguments that the model takes outside of that placement; they may have more rows.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(args)]
    meshes = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return model
    names, types = meshes[0].axis_names, meshes[0].axis_types
    mesh = AbstractMesh((1,) * len(names), names, types)
    specs = tuple(sharding.spec for sharding in shardings)
    return _WithoutPlacement(model, mesh, specs)


def is_placed(model: Callable[..., Any], *args: Any) -> bool:
    """Tell whether a model says over which axes of a mesh an array is to be sharded."""
    program, _ = trace_model(model, *args)
    return _places_arrays(program)


@dataclass(frozen=True)
class _WithoutPlacement:
    """A model without all that it says on sharding; hashable if the model is.

    Attributes:
      model: the model.
      mesh: the stand-in for the mesh, with axes of size 1.
      specs: how the model expects the leaves of its arguments to be sharded.
    """

    model: Callable[..., Any]
    mesh: AbstractMesh
    specs: tuple[PartitionSpec, ...]

    def __call__(self, *args: Any) -> Any:
        """Call the model where the compiler places arrays."""
        leaves, structure = jax.tree.flatten(args)
        shapes = []
        for x, spec in zip(leaves, self.specs, strict=True):
            shapes.append(_shape_in(self.mesh, jax.typeof(x), spec))
        try:
            with _alone(self.mesh):
                program, results = trace_model(self.model, *jax.tree.unflatten(structure, shapes))
        except Exception as error:
            error.add_note(_ADVICE)
            raise
        if not _places_arrays(program):
            return self.model(*args)
        return jax.tree.unflatten(jax.tree.structure(results), _run(self.mesh, program, leaves))


@contextmanager
def _alone(mesh: AbstractMesh) -> Iterator[None]:
    """Trace for a mesh, whatever mesh is in force around."""
    # JAX lets no mesh of another size follow one, but lets any follow none.
    with use_abstract_mesh(AbstractMesh((), (), ())), use_abstract_mesh(mesh):
        yield


def _shape_in(mesh: AbstractMesh, aval: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """Return the shape of an argument for a program that is traced for a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)


def _places_arrays(program: Any) -> bool:
    """Tell whether a program says over which axes of a mesh an array is to be sharded."""
    for eqn in program.eqns:
        shardings = [eqn.params.get(name) for name in (*PLACES, "dst_sharding")]
        specs = [sharding.spec for sharding in shardings if isinstance(sharding, NamedSharding)]
        if any(axis is not None for spec in specs for axis in spec):
            return True
        if any(map(_places_arrays, programs_in(eqn))):
            return True
    return False


def _run(mesh: AbstractMesh, program: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluate a program that was traced for a mesh without what it says on sharding."""

    def rule(index: int, eqn: Any, operands: list[Any], as_it_is: AsItIs) -> Sequence[Any]:
        del index, as_it_is  # which would run in the mesh of the program
        name = eqn.primitive.name
        if name in ("reshard", "mesh_cast", "sharding_constraint"):
            return operands
        if name in ("jit", "pjit"):
            return _run(mesh, inner_program(eqn), operands)
        if name in ("custom_jvp_call", "custom_vjp_call"):
            return _with_derivative(mesh, program, eqn)(*operands)
        if name == "shard_map":
            raise NotImplementedError(
                "a model that names axes of the mesh (`out_sharding`, `reshard`) has a `shard_map` "
                "too, which cannot be captured together. Give the mesh axes of the type Auto."
            )
        params = eqn.params | {place: None for place in PLACES if place in eqn.params}
        for key, value in eqn.params.items():
            if is_program(value):
                params[key] = _nested(mesh, value)
            elif isinstance(value, tuple) and any(map(is_program, value)):  # branches
                params[key] = tuple(_nested(mesh, branch) for branch in value)
        return bind(eqn, operands, params)

    return interpret(program, args, lambda index, eqn: True, rule)


def _nested(mesh: AbstractMesh, program: Any) -> Any:
    """Trace a nested program again, for the mesh around."""
    closed = as_closed(program)
    shapes = []
    for variable in closed.jaxpr.invars:
        aval = variable.aval
        shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type))
    traced = jax.make_jaxpr(lambda *args: _run(mesh, closed, args))(*shapes)
    return traced if closed is program else traced.jaxpr


def _with_derivative(mesh: AbstractMesh, program: Any, eqn: Any) -> Callable[..., list[Any]]:
    """Return an equation that has a derivative of its own as a function that has it too."""
    run = as_function(program, eqn)
    # Integers have no derivative.
    is_float = [jnp.issubdtype(atom.aval.dtype, jnp.inexact) for atom in eqn.invars]
    count = len(is_float)

    def floats(values: Sequence[Any]) -> list[Any]:
        return [x for x, is_one in zip(values, is_float, strict=True) if is_one]

    def as_it_was(args: Sequence[Any]) -> Callable[..., list[Any]]:
        """Return the equation as a function of floats, with the integers among `args`."""

        def of_floats(*values: Any) -> list[Any]:
            remaining = iter(values)
            pairs = zip(args, is_float, strict=True)
            return run(*[next(remaining) if is_one else x for x, is_one in pairs])

        return of_floats

    def push(*numbers: Any) -> Any:
        args, tangents = numbers[:count], numbers[count:]
        return jax.jvp(as_it_was(args), floats(args), list(tangents))

    def pull(*numbers: Any) -> Any:
        args, cotangents = numbers[:count], numbers[count:]
        _, pulled = jax.vjp(as_it_was(args), *floats(args))
        return pulled(list(cotangents))

    def value(*args: Any) -> list[Any]:
        return _run(mesh, as_closed(eqn.params["call_jaxpr"]), args)

    if eqn.primitive.name == "custom_jvp_call":
        forward = jax.custom_jvp(value)

        @forward.defjvp
        def _(args: Sequence[Any], tangents: Sequence[Any]) -> Any:
            types = [*eqn.invars, *floats(eqn.invars)]
            return _evaluate(mesh, push, [*args, *floats(tangents)], types)

        return forward

    def backward(args: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        types = [*eqn.invars, *eqn.outvars]
        pulled = iter(_evaluate(mesh, pull, [*args, *cotangents], types))
        return tuple(next(pulled) if is_one else None for is_one in is_float)

    reverse = jax.custom_vjp(value)
    # The value is computed once more from its arguments, which XLA sees to be the same.
    reverse.defvjp(lambda *args: (value(*args), args), backward)
    return reverse


def _evaluate(
    mesh: AbstractMesh, fn: Callable[..., Any], args: Sequence[Any], types: Sequence[Any]
) -> Any:
    """Trace a function for a mesh, on arguments of the types of variables, and evaluate it."""
    shapes = []
    for x, variable in zip(args, types, strict=True):
        shapes.append(_shape_in(mesh, jax.typeof(x), variable.aval.sharding.spec))
    with _alone(mesh):
        program, results = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    return jax.tree.unflatten(jax.tree.structure(results), _run(mesh, program, args))
