"""Gradients of a block's kernel, example by example, in its Kronecker eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._batch import ENTRIES_AT_A_TIME
from curvax.capture import DensePair, GradientPair, LookupPair, PerUseArray, gradient_pairs
from curvax.kron._layout import Block
from curvax.kron._plan import kernel_of

# b: examples, s: stack, t: positions, i: inputs (with the 1 of a bias), o: outputs


class Basis(NamedTuple):
    """Eigenvectors of both factors of a block, `[s, n, n]` in columns; None for a diagonal factor.

    Attributes:
      a: eigenvectors of A.
      g: eigenvectors of G.
    """

    a: Array | None
    g: Array | None


def rotated_pairs(
    block: Block,
    basis: Basis,
    inputs: Sequence[PerUseArray],
    cotangents: Sequence[PerUseArray],
) -> list[GradientPair]:
    """Return the pairs of every use in an eigenbasis: those of `Q_A' D Q_G = sum_t Q_A'a (Q_G'g)'`.

    Args:
      block: the block.
      basis: the eigenbasis.
      inputs: the inputs of the block's uses, as captured.
      cotangents: the cotangents of their outputs.
    """
    pairs = gradient_pairs(kernel_of(block), inputs, cotangents)
    return [_rotated(pair, basis) for pair in pairs]


def block_moments(
    block: Block,
    basis: Basis,
    inputs: Sequence[PerUseArray],
    g: Sequence[PerUseArray],
    h: Sequence[PerUseArray] | None = None,
) -> Float[Array, "s i o"]:
    """Sum over examples `(Q_A' D Q_G) * (Q_A' E Q_G)`, D of the cotangents g and E of h (or g).

    These are the second moments of EK-FAC: George et al. (2018), equation 10.
    """
    if block.kernel.mask is not None:
        return _moments_behind_mask(block, basis, inputs, g, h)
    first = rotated_pairs(block, basis, inputs, g)
    second = first if h is None else rotated_pairs(block, basis, inputs, h)
    pair, other = first[0], second[0]
    is_single = len(first) == 1 and pair.g.shape[2] == 1
    if is_single and isinstance(pair, DensePair) and isinstance(other, DensePair):
        # One position: the square of a g' is a^2 (g^2)', and no gradient is formed.
        a_squared, g_squared = pair.a * other.a, pair.g * other.g
        return jnp.einsum("bsti,bsto->sio", a_squared, g_squared, precision=lax.Precision.HIGHEST)
    return _sum_of_products(block, (first,) if h is None else (first, second))


def _moments_behind_mask(
    block: Block,
    basis: Basis,
    inputs: Sequence[PerUseArray],
    g: Sequence[PerUseArray],
    h: Sequence[PerUseArray] | None,
) -> Float[Array, "s i o"]:
    """Do as `block_moments` where the pairs of a kernel behind a mask are its formed gradients."""

    def of_examples(rows: Any) -> Float[Array, "s i o"]:
        inputs, *cotangents = rows
        formed = []
        for each in cotangents:
            pairs = rotated_pairs(block, basis, inputs, each)
            formed.append(gradient_of(block, pairs))
        return jnp.sum(formed[0] * formed[-1], axis=0)

    return _summed_in_chunks(block, (inputs, g) if h is None else (inputs, g, h), of_examples)


def _sum_of_products(
    block: Block, gradients: tuple[list[GradientPair], ...]
) -> Float[Array, "s i o"]:
    """Form the gradients of a few examples at a time, and sum their products entry by entry."""

    def of_examples(rows: tuple[list[GradientPair], ...]) -> Float[Array, "s i o"]:
        formed = [gradient_of(block, pairs) for pairs in rows]
        return jnp.sum(formed[0] * formed[-1], axis=0)

    return _summed_in_chunks(block, gradients, of_examples)


def _summed_in_chunks(
    block: Block,
    gradients: Any,
    of_examples: Callable[[Any], Float[Array, "s i o"]],
) -> Float[Array, "s i o"]:
    """Sum `of_examples` over a few examples at a time of arrays with a leading axis of examples."""
    # A gradient takes as many entries as the kernel: only a few examples at a time.
    size = jax.tree.leaves(gradients)[0].shape[0]
    few = min(size, max(1, ENTRIES_AT_A_TIME // math.prod(block.shape)))
    num_chunked = size // few * few
    if few == size:
        return of_examples(gradients)

    def add(
        total: Array,
        rows: Any,
    ) -> tuple[Array, None]:
        return total + of_examples(rows), None

    # The scan takes full chunks; what is over is done after it.
    chunks = jax.tree.map(
        lambda x: x[:num_chunked].reshape(
            -1,
            few,
            *x.shape[1:],
        ),
        gradients,
    )
    sums = jax.eval_shape(of_examples, gradients)
    total, _ = lax.scan(add, jnp.zeros(sums.shape, sums.dtype), chunks)
    if num_chunked < size:
        total = total + of_examples(jax.tree.map(lambda x: x[num_chunked:], gradients))
    return total


def gradient_of(
    block: Block,
    pairs: Sequence[GradientPair],
) -> Float[Array, "b s i o"]:
    """Return every example's gradient of the block's kernel, summed over uses."""
    return jnp.asarray(sum(pair.gradient(block.shape) for pair in pairs))


def _rotated(pair: GradientPair, basis: Basis) -> GradientPair:
    # Q_G' g for every position.
    g = _into(basis.g, pair.g)
    if isinstance(pair, DensePair):
        return DensePair(_into(basis.a, pair.a), g)
    if basis.a is None:
        return LookupPair(pair.rows, g)
    # `Q' e_r` is row r of Q.
    rows_of_q = jax.vmap(lambda q, rows: q[rows], (0, 1), 1)
    return DensePair(rows_of_q(basis.a, pair.rows), g)


def _into(
    q: Array | None,
    x: Float[Array, "b s t n"],
) -> Float[Array, "b s t n"]:
    """Return `Q' x` for every vector x."""
    if q is None:
        return x
    return jnp.einsum("bsti,sij->bstj", x, q, precision=lax.Precision.HIGHEST)
