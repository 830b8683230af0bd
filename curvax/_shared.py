"""Parts of a batch that have no batch axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree


# A pytree, so that it passes through `jit`; a type of its own, so that chunking can tell it apart.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """Mark a part of `inputs` (or `targets`) that has no batch axis, such as a dropout key.

    The model receives `value` itself, unwrapped. Where curvax works by example or by chunk, every
    example and every chunk gets all of it: with a dropout key, examples that are worked on one at
    a time all draw the same mask.

    Args:
      value: any pytree of arrays, keys included; running statistics, for instance.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> def model(params, inputs):
      ...     keep = jax.random.bernoulli(inputs["dropout"], 0.5, inputs["x"].shape)
      ...     return (inputs["x"] * keep) @ params
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> inputs = {"x": jnp.ones((4, 3)), "dropout": curvax.Shared(jax.random.key(0))}
      >>> objective(jnp.zeros((3, 1)), (inputs, jnp.ones((4, 1)))).item()
      0.5
    """

    value: Any


def is_shared(x: Any) -> bool:
    """Tell whether `x` is a part without batch axis."""
    return isinstance(x, Shared)


def unwrap(tree: PyTree) -> PyTree:
    """Replace every `Shared(value)` in `tree` by `value`, in containers of its own."""

    # A model may use up a container: an Equinox `State` can be read once, and the batch is read
    # more often, for the gradient and for the curvature.
    def value_of(x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf, x.value) if is_shared(x) else x

    return jax.tree.map(value_of, tree, is_leaf=is_shared)
