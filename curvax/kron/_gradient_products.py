"""Inner products with the examples' gradients of a block, from its inputs and output-gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._batch import ENTRIES_AT_A_TIME
from curvax.kron._layout import Block
from curvax.kron._moments import Basis, gradient_of_pair, rotated_pairs
from curvax.kron._operator import EigenOperator
from curvax.kron._tapping import PerUseArray

# q: vectors, e: examples, s: stack, t: positions, i: inputs (and one more for a bias), o: outputs, r: rank


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

Pairs: TypeAlias = Sequence[tuple[Array, Array]]
"""For every use of a kernel what its gradient is the sum of outer products of: `[e, s, t, i]` and `[e, s, t, o]`."""


def gradient_pairs(
    block: Block, inputs: list[PerUseArray], pulled: list[PerUseArray], basis: Basis | None = None
) -> Pairs:
    """Return the pairs of a block, in a Kronecker eigenbasis if one is given. Of a lookup the first are row numbers."""
    return rotated_pairs(block, basis or Basis(None, None), inputs, pulled)


def products_by_example(
    block: Block, vectors: Float[Array, "q s i o"], pairs: Pairs
) -> Float[Array, "q e"]:
    """Return the inner products of vectors with every example's gradient `D = sum_t a_t g_t'`, summed over uses.

    Cost, an example and slice: `(t + q) in out` multiplications, through D; where there is one position, or one vector,
      `q t in out`, without it; of lookups `q t out`.
    """
    return jnp.asarray(sum(_of_use(block, vectors, *pair) for pair in pairs))


def products_by_position(vector: Array | LowRank, pair: tuple[Array, Array]) -> Float[Array, "e t"]:
    """Return `sum_s a_t' V g_t` for one vector `[s, i, o]` (or its factors) and every position of one use.

    Cost, an example, slice and position: `in out` multiplications, of rank r `r (in + out)`, of lookups `out` or `r out`.
    """
    left, right = pair
    if isinstance(vector, LowRank):
        right = jnp.einsum("esto,sro->estr", right, vector.right, precision=lax.Precision.HIGHEST)
        vector = vector.left
    return jnp.sum(_through(vector, left) * right, axis=(1, 3))


def squares_by_example(block: Block, power: EigenOperator, pairs: Pairs) -> Float[Array, " e"]:
    """Return `D . P D` for every example's gradient, P a power of the block; the pairs are in its eigenbasis."""
    left, right = pairs[0]
    if len(pairs) == 1 and left.shape[2] == 1 and not _is_lookup(left):  # (a g')^2 = a^2 (g^2)'
        return jnp.sum(_through(power.scale, left**2) * right**2, axis=(1, 2, 3))
    gradient = sum(gradient_of_pair(block, *pair) for pair in pairs)
    return jnp.sum(gradient * gradient * power.scale, axis=(1, 2, 3))


def worth_forming(vectors: LowRank, pairs: Pairs) -> bool:
    """Tell whether vectors of low rank cost less as whole matrices, by example, and take 64 MB at most."""
    q, s, i, r = vectors.left.shape
    e, _, positions, o = pairs[0][1].shape
    directly = q * s * i * o * r + e * s * (positions + q) * i * o
    return q * s * i * o <= ENTRIES_AT_A_TIME and directly < e * s * positions * q * r * (i + o)


def examples_at_a_time(
    block: Block, vectors: Vectors, inputs: Sequence[PerUseArray], by_position: bool
) -> int:
    """Return of how many examples work arrays have at most 2^24 entries, 8 vectors at a time by position."""
    number, stack, rows, columns = len(jax.tree.leaves(vectors)[0]), *block.shape
    if isinstance(vectors, LowRank):
        columns, by_position = vectors.left.shape[3], True
    each = [
        8 * x.shape[2] * columns
        if by_position
        else columns * (number if _directly(x, number) else rows)
        for x in inputs
    ]
    return max(1, ENTRIES_AT_A_TIME // (stack * max(each)))


def _of_use(
    block: Block, vectors: Float[Array, "q s i o"], left: Array, right: Array
) -> Float[Array, "q e"]:
    if _directly(left, len(vectors)):
        return jax.vmap(lambda v: jnp.sum(_through(v, left) * right, axis=(1, 2, 3)))(vectors)
    return jnp.einsum(
        "qsio,esio->qe",
        vectors,
        gradient_of_pair(block, left, right),
        precision=lax.Precision.HIGHEST,
    )


def _directly(left: PerUseArray, num_vectors: int) -> bool:
    """Tell whether `a_t' V` costs less than the gradient."""
    return left.shape[2] == 1 or num_vectors == 1 or _is_lookup(left)


def _is_lookup(left: PerUseArray) -> bool:
    return bool(jnp.issubdtype(left.dtype, jnp.integer))


def _through(vector: Float[Array, "s i o"], left: PerUseArray) -> Float[Array, "e s t o"]:
    """Return `a_t' V`; of lookups rows of V, zero for row numbers out of range."""
    if not _is_lookup(left):
        return jnp.einsum("esti,sio->esto", left, vector, precision=lax.Precision.HIGHEST)
    ids = left[..., 0]
    known = jnp.where(
        ids < 0, vector.shape[1], ids
    )  # indexing would count negative numbers from the end
    rows = lambda v, ids: v.at[ids].get(mode="fill", fill_value=0)
    looked_up: Array = jax.vmap(rows, in_axes=(0, 1), out_axes=1)(vector, known)
    return looked_up
