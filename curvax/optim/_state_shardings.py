"""Where the arrays of an optimizer's state belong, given where the parameters are."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from curvax._jaxpr import placed_results
from curvax._types import Params
from curvax.solve._window import Window

Path = tuple[Any, ...]


def state_shardings(tx: optax.GradientTransformation, params: Params) -> optax.OptState:
    """Return the sharding of every array in the state of an optimizer.

    A state that is made by `jax.jit(tx.init)` alone sits on one device, whatever the shardings of
    params. With these it is made where it belongs, and restored there from a checkpoint.

    An array that mirrors a parameter (a momentum, a diagonal of curvature) is sharded as the
    parameter is; where it has more axes in front, these are whole on each device. The gradients of
    M-FAC's window are spread over the axes of the mesh on which the parameter is whole, where their
    number is a multiple of those devices: under data parallelism each has some. What a
    `curvax.kron_placement` spreads over owners is sharded so. Everything else is replicated.

    Args:
      tx: any optimizer of this library or of optax, chains and wrappers of them.
      params: the parameters, or `jax.ShapeDtypeStruct`s of them, each with its sharding.

    Returns:
      A tree like `tx.init(params)` of shardings, for `jax.jit(tx.init, out_shardings=...)`, for
      `jax.device_put`, or for the targets of a checkpoint library. They are `NamedSharding`s if
      those of params are; parameters on a single device have a state there.

    Raises:
      ValueError: a parameter has no sharding, or parameters are on different meshes.

    Cost: `init` is traced, and nothing is computed.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("data",))
      >>> params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("data")))}
      >>> tx = optax.chain(curvax.scale_by_mfac(window_size=4), optax.adam(1e-3))
      >>> shardings = curvax.state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> optax.tree.get(state, "mu")["w"].sharding == params["w"].sharding
      True

    A checkpoint that another number of devices wrote is restored by orbax to the targets
    `jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(tx.init, params), shardings)`.
    """
    by_path = dict(jax.tree.leaves_with_path(params))
    elsewhere = _shared_sharding(by_path)
    shapes, placed = placed_results(tx.init, params)
    by_init = iter(placed)
    rows = {id(leaf) for leaf in _rows_of_windows(shapes)}

    def sharding(path: Path, leaf: jax.ShapeDtypeStruct) -> Sharding:
        stated = next(by_init)
        # 1. Where `init` says itself: the stacks of owners.
        if stated is not None and isinstance(elsewhere, NamedSharding) and id(leaf) not in rows:
            _check_mesh(stated, elsewhere)
            return NamedSharding(elsewhere.mesh, _trimmed(stated.spec))
        # 2. Where the parameter is that it mirrors. The path of a mirror ends with the path of its
        # parameter, whatever holds it: a chain, a mask, a group of `optax.partition`.
        for start in range(len(path) + 1):
            param = by_path.get(path[start:])
            if param is not None and _mirrors(leaf, param):
                if id(leaf) in rows:
                    return _with_rows_spread(param.sharding, leaf.shape[0])
                return _behind_leading_axes(param.sharding, leaf.ndim - param.ndim)
        return elsewhere

    result: optax.OptState = jax.tree.map_with_path(sharding, shapes)
    return result


def _shared_sharding(by_path: dict[Path, Any]) -> Sharding:
    """Return where arrays go that mirror no parameter: to every device of the parameters' mesh."""
    shardings: list[Sharding] = []
    for path, leaf in by_path.items():
        placed = getattr(leaf, "sharding", None)
        if placed is None:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)}, a {type(leaf).__name__}, has no sharding; "
                "give arrays on their devices, or jax.ShapeDtypeStruct(..., sharding=...)."
            )
        shardings.append(placed)
    meshes = {s.mesh: None for s in shardings if isinstance(s, NamedSharding)}
    if len(meshes) > 1:
        raise ValueError(
            f"params are on {len(meshes)} different meshes: {[dict(m.shape) for m in meshes]}; "
            "place all of them on one."
        )
    for mesh in meshes:
        return NamedSharding(mesh, PartitionSpec())
    if not shardings:
        raise ValueError("params have no arrays, and so no place; give a tree with arrays.")
    return shardings[0]


def _check_mesh(stated: NamedSharding, of_params: NamedSharding) -> None:
    """Raise if a state is placed on another mesh than params."""
    if dict(stated.mesh.shape) != dict(of_params.mesh.shape):
        raise ValueError(
            f"the optimizer has a placement for a mesh {dict(stated.mesh.shape)}, and params are "
            f"on one of {dict(of_params.mesh.shape)}: make the placement for that."
        )


def _trimmed(spec: PartitionSpec) -> PartitionSpec:
    """Return a spec without the axes at its end that are whole."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _mirrors(leaf: Any, param: Any) -> bool:
    """Return whether an array has the shape of a parameter, possibly behind more axes."""
    first = leaf.ndim - param.ndim
    same: bool = first >= 0 and leaf.shape[first:] == param.shape
    return same


def _behind_leading_axes(sharding: Sharding, num_axes: int) -> Sharding:
    """Return a parameter's sharding for an array with so many whole axes in front."""
    if num_axes == 0 or not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*[None] * num_axes, *sharding.spec)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _rows_of_windows(state: Any) -> list[Any]:
    """Return the arrays that hold the gradients of windows, anywhere in a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Window))
    windows = [node for node in nodes if isinstance(node, Window)]
    return jax.tree.leaves([window.rows for window in windows])


def _with_rows_spread(sharding: Sharding, num_rows: int) -> Sharding:
    """Return a parameter's sharding for rows like it, some on each device if that can be."""
    behind = _behind_leading_axes(sharding, 1)
    if not isinstance(behind, NamedSharding):
        return behind
    used = jax.tree.leaves(tuple(behind.spec))
    free = tuple(axis for axis in behind.mesh.axis_names if axis not in used)
    number = math.prod(behind.mesh.shape[axis] for axis in free)
    if not free or num_rows % number:
        return behind
    spec = PartitionSpec(free, *behind.spec[1:])
    return NamedSharding(behind.mesh, spec, memory_kind=behind.memory_kind)
