"""Diagnostics of a damped block: trace and extreme eigenvalues."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._types import Scalar
from curvax.kron._factors import BlockFactors
from curvax.kron._gradient_pairs import Basis
from curvax.kron._inverse import BlockPower, EigenPower
from curvax.kron._layout import Block
from curvax.kron._sides import Inverse, KronFactor, combined_factors, trace


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


def factored_spectrum(
    block: Block, factors: BlockFactors, left: Inverse, right: Inverse
) -> BlockSpectrum:
    """Read a block's spectrum off the inverses of its sides."""
    largest, smallest = (
        jnp.max(left.largest * right.largest),
        jnp.min(left.smallest * right.smallest),
    )
    return BlockSpectrum(_trace(block, factors), largest, smallest)


def spectral_spectrum(block: Block, factors: BlockFactors, inverse: BlockPower) -> BlockSpectrum:
    """Read a block's spectrum off its inverse in the eigenbasis."""
    assert isinstance(inverse, EigenPower)
    return BlockSpectrum(
        _trace(block, factors), 1 / jnp.min(inverse.scale), 1 / jnp.max(inverse.scale)
    )


def basis_spectrum(
    block: Block, factors: BlockFactors, basis: Basis, damping: Any
) -> BlockSpectrum:
    """Read a block's spectrum off its factors and the eigenvectors of its sides."""
    left, right = combined_factors(block, factors)
    values = _values(left, basis.a)[:, :, None] * _values(right, basis.g)[:, None, :]
    return BlockSpectrum(
        _trace(block, factors), jnp.max(values) + damping, jnp.min(values) + damping
    )


def _trace(block: Block, factors: BlockFactors) -> Scalar:
    left, right = combined_factors(block, factors)
    return jnp.sum(trace(left) * trace(right))


def _values(side: KronFactor, vectors: Array | None) -> Float[Array, "s n"]:
    if vectors is None:
        return side
    return jnp.maximum(
        jnp.sum(vectors * jnp.matmul(side, vectors, precision=lax.Precision.HIGHEST), axis=1), 0
    )
