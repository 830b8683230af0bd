"""Names for the pytrees and callables that every floor passes around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

Params: TypeAlias = PyTree[Float[Array, "..."]]
Outputs: TypeAlias = PyTree[Float[Array, "batch ..."]]
Targets: TypeAlias = PyTree[Shaped[Array, "batch ..."]]
Batch: TypeAlias = tuple[Any, Any]
"""`(inputs, targets)`, each any pytree of arrays with a leading batch axis, or `curvax.Shared`."""

Scalar: TypeAlias = Float[Array, ""]
PRNGKey: TypeAlias = Key[Array, ""]
Count: TypeAlias = Any
"""An int32 scalar array. (Type checkers take a NamedTuple's field `count` for an override of
`tuple.count`.)"""

Matvec: TypeAlias = Callable[[Params], Params]
"""A square linear map on params: `mv(v)` is a tree like `v`."""


def at_least_float32(x: Array) -> Array:
    """Widen a 16-bit float (or an integer) to float32; leave float32 and float64 as they are."""
    # Curvature adds many small squares, which 8 or 11 bits of mantissa would round away.
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    return jnp.asarray(x, dtype)


def tree_at_least_float32(tree: PyTree) -> PyTree:
    """Widen every leaf by `at_least_float32`."""
    return jax.tree.map(at_least_float32, tree)
