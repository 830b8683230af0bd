"""Combine the curvature of two batches into that of both together."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax.kron._factors import Factors
from curvax.kron._moments import EigenCurvature, EigenFactors

C = TypeVar("C", Factors, EigenFactors, EigenCurvature)


def merge(first: C, second: C) -> C:
    """Combine the curvature of two batches into that of both together.

    With it factors stream over a data set, `factors = merge(factors, kron_factors(...))`, and resume from a checkpoint.
    Exact for `fisher="exact"` and, in expectation, "mc"; for "empirical" if both batches have as many terms for each
    example; for a `weighted_sum` of losses if each of its heads has the same share of the terms in both.

    Args:
      first: `Factors`, `EigenFactors` (in one basis), or `EigenCurvature`.
      second: of the same kind and layout.

    Raises:
      ValueError: curvature of different layouts.

    Cost: one sum; of `EigenCurvature` the rows are concatenated.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.kron import Factors, WeightedMean
      >>> one, two = (Factors({}, {"w": WeightedMean(n * jnp.ones(1), jnp.float32(n))}) for n in (1, 3))
      >>> curvax.kron.merge(one, two).diagonal["w"].mean.tolist()
      [1.0]
    """
    if isinstance(first, EigenCurvature):
        terms = first.terms + second.terms
        scaled = [
            jax.tree.map(_times_root(part.terms / terms), part.cotangents)
            for part in (first, second)
        ]
        inputs = jax.tree.map(_join, first.inputs, second.inputs)
        return EigenCurvature(
            merge(first.factors, second.factors), inputs, jax.tree.map(_join, *scaled), terms
        )
    if isinstance(first, EigenFactors):
        sums = _sum((first.moments, first.diagonal), (second.moments, second.diagonal))
        return EigenFactors(first.basis, *sums)
    merged: Factors = _sum(first, second)
    return merged


def _sum(first: Any, second: Any) -> Any:
    if jax.tree.map(jnp.shape, first) != jax.tree.map(jnp.shape, second):
        raise ValueError("these factors are of different layouts: their blocks or shapes differ.")
    return jax.tree.map(jnp.add, first, second)


def _join(x: Array, y: Array) -> Array:
    return jnp.concatenate([x, y])


def _times_root(share: Array) -> Any:
    return lambda x: (jnp.sqrt(share) * x).astype(x.dtype)
