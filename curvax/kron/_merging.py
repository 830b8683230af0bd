"""Combine the curvature of two batches into that of both together."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from curvax._xla import spec_of_rows, with_auto_sharding
from curvax.kron._factors import Factors
from curvax.kron._moments import EigenCurvature, EigenFactors

C = TypeVar("C", Factors, EigenFactors, EigenCurvature)


def merge(first: C, second: C) -> C:
    """Combine the curvature of two batches into that of both together.

    With it factors stream over a data set, `factors = merge(factors, kron_factors(...))`, and
    resume from a checkpoint. It is exact for `fisher="exact"` and "empirical" and, in expectation,
    for what samples; for a `weighted_sum` of losses if each of its heads has the same share of the
    terms in both.

    Args:
      first: `Factors`, `EigenFactors` (in one basis), or `EigenCurvature`.
      second: curvature of the same kind and layout.

    Raises:
      ValueError: the two belong to different layouts.

    Cost: one sum; the rows of an `EigenCurvature` are concatenated.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.kron import Factors, WeightedMean
      >>> of = lambda n: Factors({}, {"w": WeightedMean(n * jnp.ones(1), jnp.float32(n))})
      >>> curvax.kron.merge(of(1), of(3)).diagonal["w"].mean.tolist()
      [1.0]
    """
    if isinstance(first, EigenCurvature):
        return _merge_rows(first, second)
    if isinstance(first, EigenFactors):
        # Moments of one basis add up; the basis is common to both, and is no sum.
        moments, diagonal = _sum(
            (first.moments, first.diagonal),
            (second.moments, second.diagonal),
        )
        return EigenFactors(first.basis, moments, diagonal)
    merged: Factors = _sum(first, second)
    return merged


def _merge_rows(first: EigenCurvature, second: EigenCurvature) -> EigenCurvature:
    """Concatenate the rows, with cotangents scaled to their share of the common mean loss."""
    terms = first.terms + second.terms

    def scaled_cotangents(part: EigenCurvature) -> Any:
        # Moments are squares of cotangents, so that the share of the mean enters by its root.
        root = jnp.sqrt(part.terms / terms)
        both = part.cotangents, part.paired
        return jax.tree.map(lambda x: (root * x).astype(x.dtype), both)

    # A gradient is a g': scaling g scales it, and inputs stay as they are.
    rows = [(part.inputs, *scaled_cotangents(part)) for part in (first, second)]
    inputs, cotangents, paired = with_auto_sharding(_joined, *rows, like=spec_of_rows(rows))
    return EigenCurvature(
        factors=merge(first.factors, second.factors),
        inputs=inputs,
        cotangents=cotangents,
        terms=terms,
        paired=paired,
    )


def _sum(first: Any, second: Any) -> Any:
    """Add sums and weights; the means are then those of both batches."""
    # Addition would broadcast some shapes that differ, and answer wrongly.
    if jax.tree.map(jnp.shape, first) != jax.tree.map(jnp.shape, second):
        raise ValueError("these factors are of different layouts: their blocks or shapes differ.")
    return jax.tree.map(jnp.add, first, second)


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)
