"""Diagnostics of a damped block: trace and extreme eigenvalues."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._types import Scalar
from curvax.kron.factors import BlockFactors
from curvax.kron.inverse import Sandwich, Spectral, damped_sides
from curvax.kron.layout import Block
from curvax.kron.moments import Basis
from curvax.kron.sides import Side, sides, trace


class BlockSpectrum(NamedTuple):
    """What is known of a block's curvature; of a stack, over all slices.

    Attributes:
      trace: of the undamped block `A x G`.
      largest: largest eigenvalue of the damped block (by power iteration where no eigenvalues are at hand: from below).
      smallest: smallest eigenvalue of the damped block (likewise, from above).
    """

    trace: Scalar
    largest: Scalar
    smallest: Scalar


def block_spectrum(block: Block, factors: BlockFactors, inverse: Sandwich | Spectral, damping: Any) -> BlockSpectrum:
    """Read a block's spectrum off its factors and its damped inverse."""
    left, right = sides(block, factors)
    total = jnp.sum(trace(left) * trace(right))
    if isinstance(inverse, Spectral):
        return BlockSpectrum(total, 1 / jnp.min(inverse.scale), 1 / jnp.max(inverse.scale))
    a, g = damped_sides(block, left, right, damping)
    largest = jnp.max(_largest(a) * _largest(g))
    smallest = jnp.min(1 / (_largest(inverse.left) * _largest(inverse.right)))
    return BlockSpectrum(total, largest, smallest)


def basis_spectrum(block: Block, factors: BlockFactors, basis: Basis, damping: Any) -> BlockSpectrum:
    """Read a block's spectrum off its factors and the eigenvectors of its sides."""
    left, right = sides(block, factors)
    values = _values(left, basis.inputs)[:, :, None] * _values(right, basis.outputs)[:, None, :]
    return BlockSpectrum(jnp.sum(trace(left) * trace(right)), jnp.max(values) + damping, jnp.min(values) + damping)


def _values(side: Side, vectors: Array | None) -> Float[Array, "s n"]:
    if vectors is None:
        return side
    return jnp.maximum(jnp.sum(vectors * jnp.matmul(side, vectors, precision=lax.Precision.HIGHEST), axis=1), 0)


def _largest(side: Side, steps: int = 5) -> Float[Array, " s"]:
    """Estimate the largest eigenvalue, from below, starting from the column of the largest diagonal entry."""
    if side.ndim == 2:
        return jnp.max(side, axis=1)
    column = jnp.argmax(jnp.diagonal(side, axis1=1, axis2=2), axis=1)
    x = jnp.take_along_axis(side, column[:, None, None], axis=2)
    for _ in range(steps):
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        y = jnp.matmul(side, x, precision=lax.Precision.HIGHEST)
        value, x = jnp.sum(x * y, axis=(1, 2)), y
    return value
