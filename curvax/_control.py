"""How programs are put before the compiler: bodies of loops and branches, shardings that it chooses, loops in Python."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jax.tree_util import Partial
from jaxtyping import Array

from curvax._jaxpr import replacing

T = TypeVar("T")


def body(fn: Callable[..., T]) -> Callable[..., T]:
    """Return `fn` fit for the inside of `scan`, `map` or `cond`.

    On CPUs, XLA brings the convolutions of a backward pass into the layout that its fast kernels take (batch, space,
    features) at the top level of a program only; inside loops and branches they run as naive loops, 50 times slower.
    There the layout is changed here. Elsewhere, and where loops run in Python, `fn` is returned as it is.
    """
    if jax.default_backend() != "cpu" or loops_in_python():
        return fn
    return replacing(fn, {"conv_general_dilated": _channels_last})


def in_round(closure: T, index: Array) -> T:
    """Tie the arrays of a closure (a `Partial`) to the index of a loop's round.

    What a round computes from them is then computed in the round, not once before the loop and kept in memory.
    """
    return lax.optimization_barrier((closure, index))[0] if isinstance(closure, Partial) else closure


def in_auto_mode(fn: Callable[..., T], *args: Any) -> T:
    """Return `fn(*args)`, replicated, with explicitly sharded arguments handed over to the compiler's own placement.

    Sums over a batch that is sharded explicitly would each have to say how their result is sharded.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    mesh = next((s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types), None)
    if mesh is None:
        return fn(*args)
    result: T = auto_axes(fn, out_sharding=NamedSharding(mesh, PartitionSpec()))(*args)
    return result


@dataclass(frozen=True)
class OnHost:
    """A function that loops in Python over compiled parts, and therefore cannot be traced.

    Args:
      function: is called with arrays, never with tracers.
    """

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call the function with `jit` in force, whatever surrounds it."""
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
            raise TypeError(
                "a matvec over batches on the host cannot be traced. Call what uses it outside of jax.jit, vmap and grad, "
                "and hand it over as curvax.streamed returned it; if it is part of a function of your own, call that "
                "under `with jax.disable_jit():`, where JAX runs loops in Python."
            )
        with jax.disable_jit(False):
            return self.function(*args)


def loops_for(matvec: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context in which `lax` loops run in Python if `matvec` is `OnHost`, else one that changes nothing."""
    return jax.disable_jit() if isinstance(matvec, OnHost) else contextlib.nullcontext()


def loops_in_python() -> bool:
    """Tell whether `jax.disable_jit` is in force."""
    return bool(getattr(jax.config, "jax_disable_jit", False))  # (the attribute is not declared to type checkers)


def compiled(fn: Callable[..., T], donate: tuple[int, ...] = (), static: tuple[int, ...] = ()) -> Callable[..., T]:
    """Return `fn` as one compiled call where loops run in Python; elsewhere as it is, part of the program around it.

    For functions at the top level of a module, so that each is compiled once. Buffers of the arguments `donate` are reused,
    `static` ones are Python values.
    """
    program = jax.jit(fn, donate_argnums=donate, static_argnums=static)

    @functools.wraps(fn)
    def call(*args: Any) -> T:
        if not loops_in_python():
            return fn(*args)
        with jax.disable_jit(False):
            result: T = program(*args)
        return result

    return call


def _channels_last(lhs: Array, rhs: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    """Convolve with batch first and features last, kernel [*space, in, out], whatever layout the operands are in."""
    of_lhs, of_rhs, of_out = dimension_numbers
    space = tuple(range(1, lhs.ndim - 1))
    standard = lax.ConvDimensionNumbers(
        (0, lhs.ndim - 1, *space), (lhs.ndim - 1, lhs.ndim - 2, *range(lhs.ndim - 2)), (0, lhs.ndim - 1, *space)
    )
    out = lax.conv_general_dilated(
        lhs.transpose(of_lhs[0], *of_lhs[2:], of_lhs[1]),
        rhs.transpose(*of_rhs[2:], of_rhs[1], of_rhs[0]),
        dimension_numbers=standard,
        **params,
    )
    order = (of_out[0], *of_out[2:], of_out[1])  # order[i]: where axis i of the standard layout belongs
    return out.transpose([order.index(axis) for axis in range(lhs.ndim)])
