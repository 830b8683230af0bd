"""Workarounds for XLA: CPU convolutions in loops, loop-invariant hoisting, explicit sharding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jax.tree_util import Partial
from jaxtyping import Array

from curvax._host import loops_in_python
from curvax._jaxpr import replacing

T = TypeVar("T")


def fast_convs_in_loops(fn: Callable[..., T]) -> Callable[..., T]:
    """Return `fn` fit for the inside of `scan`, `map` or `cond`.

    On CPUs, XLA brings the convolutions of a backward pass into the layout that its fast kernels take (batch, space,
    features) at the top level of a program only; inside loops and branches they run as naive loops, 50 times slower.
    There the layout is changed here. Elsewhere, and where loops run in Python, `fn` is returned as it is.
    """
    if jax.default_backend() != "cpu" or loops_in_python():
        return fn
    return replacing(fn, {"conv_general_dilated": _channels_last})


def pin_to_iteration(closure: T, index: Array) -> T:
    """Tie the arrays of a closure (a `Partial`) to the index of a loop's round.

    What a round computes from them is then computed in the round, not once before the loop and kept in memory.
    """
    return (
        lax.optimization_barrier((closure, index))[0] if isinstance(closure, Partial) else closure
    )


def with_auto_sharding(fn: Callable[..., T], *args: Any) -> T:
    """Return `fn(*args)`, replicated, with explicitly sharded arguments handed over to the compiler's own placement.

    Sums over a batch that is sharded explicitly would each have to say how their result is sharded.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    mesh = next((s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types), None)
    if mesh is None:
        return fn(*args)
    result: T = auto_axes(fn, out_sharding=NamedSharding(mesh, PartitionSpec()))(*args)
    return result


def _channels_last(lhs: Array, rhs: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    """Convolve with batch first and features last, kernel [*space, in, out], whatever layout the operands are in."""
    of_lhs, of_rhs, of_out = dimension_numbers
    space = tuple(range(1, lhs.ndim - 1))
    standard = lax.ConvDimensionNumbers(
        (0, lhs.ndim - 1, *space),
        (lhs.ndim - 1, lhs.ndim - 2, *range(lhs.ndim - 2)),
        (0, lhs.ndim - 1, *space),
    )
    out = lax.conv_general_dilated(
        lhs.transpose(of_lhs[0], *of_lhs[2:], of_lhs[1]),
        rhs.transpose(*of_rhs[2:], of_rhs[1], of_rhs[0]),
        dimension_numbers=standard,
        **params,
    )
    order = (
        of_out[0],
        *of_out[2:],
        of_out[1],
    )  # order[i]: where axis i of the standard layout belongs
    return out.transpose([order.index(axis) for axis in range(lhs.ndim)])
