"""Parts of rules that step in the eigenbasis of the gradient's second moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from curvax._trees import safe_divide
from curvax._types import Count
from curvax.kron import Layout
from curvax.kron._eigenbasis import tracked_bases
from curvax.kron._kron_factor import Full, KronFactor, matmul
from curvax.optim._matrices import Matrices
from curvax.optim._matrix_parts import Decay, Sides, average, factors_of

# P: eigenvectors of L, Q: of R, in columns; None on a side that is not turned.


class AdamMoments(NamedTuple):
    """Adam's averages in an eigenbasis.

    Attributes:
      first: m, the average of `P' V Q`, `[s, i, o]`.
      second: v, that of its squares.
    """

    first: Matrices
    second: Matrices


def init_basis(zeros: tuple[KronFactor, KronFactor]) -> Sides:
    """Return a basis of zeros, before the first gradient; whatever is turned by it is zero."""
    return Sides(*map(_zero_vectors, zeros))


def _zero_vectors(factor: KronFactor) -> Array | None:
    return jnp.zeros_like(factor.matrix) if isinstance(factor, Full) else None


def rotate(basis: Sides, V: Matrices) -> Matrices:
    """Turn into the eigenbasis, `P' V Q`."""
    turned = V if basis.left is None else matmul(basis.left.mT, V)
    return turned if basis.right is None else matmul(turned, basis.right)


def rotate_back(basis: Sides, V: Matrices) -> Matrices:
    """Turn back, `P V Q'`."""
    turned = V if basis.left is None else matmul(basis.left, V)
    return turned if basis.right is None else matmul(turned, basis.right.mT)


def init_moments(V: Matrices) -> AdamMoments:
    """Return averages of no gradients."""
    return AdamMoments(jnp.zeros_like(V), jnp.zeros_like(V))


def averaged_moments(
    moments: AdamMoments, rotated: Matrices, count: Count, b1: Decay, b2: Decay
) -> AdamMoments:
    """Take a gradient into Adam's averages; the very first one, without a basis, is left out."""
    # A basis of zeros has turned it to zero already; sides that are not turned have not.
    rotated = jnp.where(count > 0, rotated, 0)
    return AdamMoments(
        first=average(moments.first, rotated, b1),
        second=average(moments.second, rotated * rotated, b2),
    )


def adam_step(moments: AdamMoments, count: Count, b1: Decay, b2: Decay, eps: float) -> Matrices:
    """Return `m / (sqrt(v) + eps)` times `sqrt(1 - b2^t) / (1 - b1^t)` after t gradients."""
    m, v = moments
    # The very first gradient is in no average, so that t is the number of steps before this one. At
    # t = 0 the quotient of zeros is zero.
    t = jnp.maximum(count, 1)
    correction = jnp.sqrt(1 - jnp.asarray(b2, v.dtype) ** t) / (1 - jnp.asarray(b1, v.dtype) ** t)
    return correction * safe_divide(m, jnp.sqrt(v) + eps)


def carried(m: Matrices, old: Sides, new: Sides) -> Matrices:
    """Turn an average of gradients from one basis into another, `P_new' (P_old m Q_old') Q_new`."""
    # Exactly, since it is linear in the gradients.
    return rotate(new, rotate_back(old, m))


class NewBasis(NamedTuple):
    """The eigenbasis of one block after a refresh.

    Attributes:
      basis: P and Q.
      orders: for both sides, which of the old columns each new one continues, `[s, n]`.
    """

    basis: Sides
    orders: Sides


def refreshed_bases(
    layout: Layout, statistics: Mapping[str, Sides], old: Mapping[str, Sides], sort: bool
) -> dict[str, NewBasis]:
    """Follow the eigenvectors of L and R of every block by one QR step each; at first by `eigh`.

    Args:
      layout: the blocks.
      statistics: L and R, by block.
      old: the bases so far; one of zeros stands for none.
      sort: bring the columns into descending order of `diag(P' L P)` first.
    """
    # One list of the sides of all blocks: those of equal size share a program.
    factors: list[KronFactor] = []
    bases: list[Array | None] = []
    for block in layout.blocks:
        factors += factors_of(block, statistics[block.name])
        bases += old[block.name]
    tracked = tracked_bases(factors, bases, sort=sort)
    result = {}
    for k, block in enumerate(layout.blocks):
        left, right = tracked[2 * k : 2 * k + 2]
        basis, orders = Sides(left.basis, right.basis), Sides(left.order, right.order)
        result[block.name] = NewBasis(basis, orders)
    return result


def reordered(x: Matrices, orders: Sides) -> Matrices:
    """Move what belongs to the columns of the old bases to those that continue them."""
    x = jnp.take_along_axis(x, orders.left[:, :, None], axis=1)
    return jnp.take_along_axis(x, orders.right[:, None, :], axis=2)
