"""Inner products with the examples' gradients of a block, from its inputs and cotangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._batch import ENTRIES_AT_A_TIME
from curvax.capture import DensePair, GradientPair, LookupPair, PerUseArray
from curvax.kron._block_operators import EigenOperator
from curvax.kron._gradient_pairs import gradient_of
from curvax.kron._layout import Block

# q: vectors, b: examples, s: stack, t: positions, i: inputs (with the 1 of a bias), o: outputs,
# r: rank


class LowRank(NamedTuple):
    """Vectors of a block as products `left right`.

    Attributes:
      left: `[q, s, i, r]`.
      right: `[q, s, r, o]`.
    """

    left: Array
    right: Array


Vectors: TypeAlias = Array | LowRank
"""Vectors of a block, `[q, s, i, o]`, or as products."""


def products_by_example(
    block: Block,
    vectors: Float[Array, "q s i o"],
    pairs: Sequence[GradientPair],
) -> Float[Array, "q b"]:
    """Return the inner products `V . D` of vectors with every example's gradient D.

    Cost, an example and slice: `(t + q) in out` multiplications, through D; where there is one
      position, or one vector, `q t in out`, without it; of lookups `q t out`.
    """
    return jnp.asarray(sum(_of_use(block, vectors, pair) for pair in pairs))


def products_by_position(
    vector: Array | LowRank,
    pair: GradientPair,
) -> Float[Array, "b t"]:
    """Return `sum_s a_t' V g_t` for one vector `[s, i, o]` and every position of one use.

    Cost, an example, slice and position: `in out` multiplications, of rank r `r (in + out)`, of
      lookups `out` or `r out`.
    """
    if not isinstance(vector, LowRank):
        return jnp.sum(pair.through(vector) * pair.g, axis=(1, 3))
    # a' (L R) g = (L'a) . (R g)
    projected = jnp.einsum("bsto,sro->bstr", pair.g, vector.right, precision=lax.Precision.HIGHEST)
    return jnp.sum(pair.through(vector.left) * projected, axis=(1, 3))


def squares_by_example(
    block: Block, power: EigenOperator, pairs: Sequence[GradientPair]
) -> Float[Array, " b"]:
    """Return `D . P D` for every example's gradient, P a power of the block in its eigenbasis.

    The pairs are in that eigenbasis.
    """
    pair = pairs[0]
    if len(pairs) == 1 and isinstance(pair, DensePair) and pair.g.shape[2] == 1:
        # One position: the square of a g' is a^2 (g^2)'.
        squares = DensePair(pair.a**2, pair.g**2)
        products = squares.through(power.scale) * squares.g
        return jnp.sum(products, axis=(1, 2, 3))
    gradient = gradient_of(block, pairs)
    return jnp.sum(gradient * gradient * power.scale, axis=(1, 2, 3))


def worth_forming(vectors: LowRank, pairs: Sequence[GradientPair]) -> bool:
    """Tell whether vectors of low rank cost less as full matrices, by example, in 64 MB at most."""
    q, s, i, r = vectors.left.shape
    b, _, t, o = pairs[0].g.shape
    # Multiplications: to form V and then D . V, against a' L R g for each position.
    formed = q * s * i * o * r + b * s * (t + q) * i * o
    return q * s * i * o <= ENTRIES_AT_A_TIME and formed < b * s * t * q * r * (i + o)


def examples_at_a_time(
    block: Block, vectors: Vectors, inputs: Sequence[PerUseArray], by_position: bool
) -> int:
    """Return for how many examples work arrays have at most 2^24 entries.

    By position 8 vectors are worked on at a time.
    """
    num_vectors = len(jax.tree.leaves(vectors)[0])
    stack, rows, columns = block.shape
    if isinstance(vectors, LowRank):
        columns, by_position = vectors.left.shape[3], True
    widths = []
    for use, x in zip(block.uses, inputs, strict=True):
        t = x.shape[2]
        if by_position:
            widths.append(8 * t * columns)
        elif _without_gradient(t, num_vectors, use.kind == "lookup"):
            widths.append(columns * num_vectors)
        else:
            widths.append(columns * rows)
    # Behind a mask the pairs are formed gradients.
    if block.kernel.mask is not None:
        widths.append(block.shape[1] * block.shape[2])
    return max(1, ENTRIES_AT_A_TIME // (stack * max(widths)))


def _of_use(
    block: Block, vectors: Float[Array, "q s i o"], pair: GradientPair
) -> Float[Array, "q b"]:
    """Return what one use adds to `V . D`."""
    if _without_gradient(
        pair.g.shape[2],
        len(vectors),
        isinstance(pair, LookupPair),
    ):

        def product(v: Float[Array, "s i o"]) -> Float[Array, " b"]:
            products = pair.through(v) * pair.g
            return jnp.sum(products, axis=(1, 2, 3))

        return jax.vmap(product)(vectors)
    gradient = pair.gradient(block.shape)
    return jnp.einsum("qsio,bsio->qb", vectors, gradient, precision=lax.Precision.HIGHEST)


def _without_gradient(num_positions: int, num_vectors: int, is_lookup: bool) -> bool:
    """Tell whether `a_t' V` costs less than the gradient."""
    return num_positions == 1 or num_vectors == 1 or is_lookup
