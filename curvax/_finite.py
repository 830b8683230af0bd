"""Guards against what is not finite: a check, and a choice between new and old."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

T = TypeVar("T")


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every entry is a finite number."""
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)], jnp.array(True))


def keep_unless(good: Bool[Array, ""], new: T, old: T) -> T:
    """Return `new` if it is good, else `old`."""
    kept: T = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    return kept
