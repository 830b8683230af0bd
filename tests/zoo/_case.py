"""A model, with what is expected of its leaves: kron, or diagonal for a reason."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """A model, and the leaves that are expected not to be kron.

    Attributes:
      model: `(params, inputs) -> outputs`, of any number of rows.
      params: float arrays.
      inputs: arrays with a leading batch axis.
      diagonal: a word of the reason by path of the leaf; all other leaves are kron.
      stacks: sizes of the stack dimensions by path of the leaf, where there are any.
      by_example: whether every row of the inputs can be run by itself.
    """

    model: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    diagonal: Mapping[str, str] = {}
    stacks: Mapping[str, tuple[int, ...]] = {}
    by_example: bool = True


def normal(seed: int, *shape: int, scale: float = 1.0) -> Any:
    """Drawn by NumPy, which compiles nothing."""
    return jnp.asarray(
        scale * np.random.default_rng(seed).normal(size=shape), jnp.result_type(float)
    )


def ids(seed: int, size: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).integers(size, size=shape))


def shaken(params: Any) -> Any:
    """Params in the default precision, moved off the zeros and ones that biases and
    scales start from.
    """
    moved = lambda p: jnp.asarray(
        np.asarray(p) + 0.1 * np.asarray(normal(2, *p.shape)), jnp.result_type(float)
    )
    return jax.tree.map(moved, params)


def random_params(module: Any, x: Any) -> Any:
    shapes = jax.eval_shape(module.init, jax.random.key(1), x)["params"]
    seeds = iter(range(100))
    return jax.tree.map(lambda s: normal(next(seeds), *s.shape, scale=0.7), shapes)


def linen(module: Any, x: Any, diagonal: Any = None, stacks: Any = None) -> Case:
    model = lambda params, x: module.apply({"params": params}, x)
    return Case(model, random_params(module, x), x, diagonal or {}, stacks or {})
