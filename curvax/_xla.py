"""Workarounds for XLA: CPU convolutions in loops, LAPACK calls that wait for each other,
conditions under `vmap`, loop-invariant hoisting, explicit sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jax.tree_util import Partial
from jaxtyping import Array, Bool, PyTree

from curvax._host import loops_in_python
from curvax._jaxpr import replacing

T = TypeVar("T")


def fast_convs_in_loops(fn: Callable[..., T]) -> Callable[..., T]:
    """Return `fn` fit for the inside of `scan`, `map` or `cond`.

    On CPUs, XLA brings the convolutions of a backward pass into the layout that its fast kernels
    take (batch, space, features) at the top level of a program only; inside loops and branches
    they run as naive loops, 50 times slower. There the layout is changed here. Elsewhere, and
    where loops run in Python, `fn` is returned as it is.
    """
    if jax.default_backend() != "cpu" or loops_in_python():
        return fn
    return replacing(fn, {"conv_general_dilated": _channels_last})


def one_after_another(fn: Callable[..., T]) -> Callable[..., T]:
    """Return `fn` fit for LAPACK calls on CPUs: members of a `vmap` call it one after another.

    A decomposition of several matrices hands them to the threads of the pool that it runs in
    itself, and waits. As many of these calls at once as there are threads wait for ever: K-FAC for
    two members of a `vmap` did so on two cores (jaxlib 0.10.2).
    """
    sequential = jax.custom_batching.sequential_vmap(fn)

    # A rule for batches has no reverse mode; derivatives go through the function itself.
    @jax.custom_jvp
    def called(*args: Any) -> T:
        result: T = sequential(*args)
        return result

    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[T, T]:
        value, tangent = jax.jvp(fn, primals, tangents)
        return value, tangent

    called.defjvp(derivative)
    return called


def refresh_if(
    pred: Bool[Array, ""], fn: Callable[..., T], keep: Callable[..., T], *operands: object
) -> T:
    """Return `fn(*operands)` where `pred` holds, else `keep(*operands)`, under `vmap` too.

    A `lax.cond` on a predicate that differs between the members of a `vmap` becomes a `select`,
    which runs both branches every time. Here the condition is whether *any* member asks; then each
    member picks its result.

    Args:
      pred: a scalar bool.
      fn: the costly branch.
      keep: the cheap branch. It runs under `pred` too, for the members that do not ask.
      *operands: the arguments of both branches, whose results must agree in structure, shapes and
        dtypes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax.optim import refresh_if
      >>> f = jax.vmap(lambda pred, x: refresh_if(pred, jnp.sqrt, jnp.negative, x))
      >>> f(jnp.array([True, False]), jnp.array([4.0, 9.0])).tolist()
      [2.0, -9.0]
    """

    def refresh(*operands: object) -> T:
        # Inside a `vmap` this branch runs for every member as soon as one asks; the others keep
        # what they have.
        fresh, old = fast_convs_in_loops(fn)(*operands), keep(*operands)
        asks = _this_member(pred)
        chosen: T = jax.tree.map(lambda new, old: jnp.where(asks, new, old), fresh, old)
        return chosen

    result: T = lax.cond(_any_member(pred), refresh, keep, *operands)
    return result


@jax.custom_batching.custom_vmap
def _any_member(pred: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return `pred`; over the members of a `vmap`, one unbatched answer: does it hold for any?"""
    return pred


@_any_member.def_vmap
def _(
    axis_size: int, in_batched: list[bool], preds: Bool[Array, " members"]
) -> tuple[Bool[Array, ""], bool]:
    del axis_size, in_batched
    return _any_member(jnp.any(preds)), False  # recursion, for there may be an outer vmap


@jax.custom_batching.custom_vmap
def _this_member(pred: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return `pred` where it is known to hold for any member: without `vmap` that is True.

    XLA does not see that a branch knows its predicate. It would run `keep` beside `fn`, and hold
    the operands: of EK-FAC's refresh of 1.0 s on an autoencoder, 0.2 s.
    """
    return jnp.ones_like(pred)


@_this_member.def_vmap
def _(
    axis_size: int, in_batched: list[bool], preds: Bool[Array, " members"]
) -> tuple[Bool[Array, " members"], bool]:
    del axis_size, in_batched
    return preds, True


def pin_to_iteration(closure: T, index: Array) -> T:
    """Tie the arrays of a closure (a `Partial`) to the index of a loop's round.

    What a round computes from them is then computed in the round, not once before the loop and
    kept in memory.
    """
    if not isinstance(closure, Partial):
        return closure
    # The barrier makes every array depend on the index, which XLA cannot know before the round.
    pinned: T = lax.optimization_barrier((closure, index))[0]
    return pinned


def with_auto_sharding(
    fn: Callable[..., T],
    *args: Any,
    like: PyTree | None = None,
) -> T:
    """Return `fn(*args)` under the compiler's own placement of sharded arguments.

    Sums over a batch that is sharded explicitly would each have to say how their result is
    sharded. What comes back is replicated; or with `like`, a tree of the result's structure or of
    its beginning, is sharded as the arrays (or the `PartitionSpec`s) in that are.
    """
    leaves = [x for x in jax.tree.leaves((args, like)) if isinstance(x, jax.Array)]
    meshes = [s.mesh for s in map(_explicit_sharding, leaves) if s is not None]
    if not meshes:
        return fn(*args)
    replicated = NamedSharding(meshes[0], PartitionSpec())
    shardings = replicated

    def sharding_of(x: Any) -> NamedSharding:
        if isinstance(x, PartitionSpec):
            return NamedSharding(replicated.mesh, x)
        return _explicit_sharding(x) or replicated

    if like is not None:
        shardings = jax.tree.map(sharding_of, like)
    result: T = auto_axes(fn, out_sharding=shardings)(*args)
    return result


def is_on_one_device() -> bool:
    """Tell whether arrays are on one device: there is no other, or a `shard_map` is around."""
    mesh = jax.sharding.get_abstract_mesh()
    is_manual = not mesh.empty and set(mesh.axis_types) == {AxisType.Manual}
    return is_manual or jax.device_count() == 1


def spec_of_rows(batch: PyTree) -> PartitionSpec:
    """Return how the leading axis of arrays is sharded explicitly, as a spec of that axis."""
    for x in jax.tree.leaves(batch):
        sharding = _explicit_sharding(x)
        if sharding is not None and len(sharding.spec) > 0:
            return PartitionSpec(sharding.spec[0])
    return PartitionSpec()


def _explicit_sharding(x: Any) -> NamedSharding | None:
    """Return the sharding that the type of an array states, if it states one."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _channels_last(lhs: Array, rhs: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    """Convolve with batch first, features last and kernel [*space, in, out], whatever the layout.

    The dimension numbers list the axes of an operand as (batch, features, *space), and those of a
    kernel as (out, in, *space).
    """
    lhs_axes, rhs_axes, out_axes = dimension_numbers
    last = lhs.ndim - 1
    space = tuple(range(1, last))

    # Where the standard layout has these axes, in the order of the dimension numbers.
    standard_lhs = (0, last, *space)
    standard_rhs = (last, last - 1, *range(last - 1))
    standard = lax.ConvDimensionNumbers(standard_lhs, standard_rhs, standard_lhs)

    out = lax.conv_general_dilated(
        lhs.transpose(lhs_axes[0], *lhs_axes[2:], lhs_axes[1]),
        rhs.transpose(*rhs_axes[2:], rhs_axes[1], rhs_axes[0]),
        dimension_numbers=standard,
        **params,
    )

    # order[i]: where axis i of the standard layout belongs in the result.
    order = (out_axes[0], *out_axes[2:], out_axes[1])
    return out.transpose([order.index(axis) for axis in range(lhs.ndim)])
