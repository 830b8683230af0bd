"""Eigenbases that follow a factor which changes slowly, by one QR step instead of `eigh`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax._checks import describe
from curvax._types import at_least_float32
from curvax._xla import refresh_if
from curvax.kron._kron_factor import (
    Full,
    KronFactor,
    PerSlice,
    Squares,
    Vectors,
    equal_sizes,
    in_batches,
    matmul,
)


class TrackedBasis(NamedTuple):
    """An eigenbasis after a step, and how the one before did.

    Attributes:
      basis: Q, `[s, n, n]` in columns; None for a diagonal factor, whose basis is I.
      off_diagonal_ratio: `|B - diag B| / |B|` in Frobenius norms, `[s]`, with `B = Q'LQ` in the
        basis *before* the step: the relative error of L where it is taken for diagonal there.
      order: `[s, n]`, numbers of columns: column k follows column `order[k]` of the basis before.
        What is stored by column goes along as `x[..., order]`.
      is_finite: whether L was, `[s]`. Where it was not, the basis is the one before.
    """

    basis: Squares | None
    off_diagonal_ratio: PerSlice
    order: Int[Array, "s n"]
    is_finite: Bool[Array, " s"]


def default_basis_method() -> str:
    """Return how eigenbases are best refreshed on this backend: "eigh" on CPUs, elsewhere "qr".

    On a CPU a QR step takes three quarters of the time of LAPACK's `eigh`, too little for a basis
    that is only tracked. On accelerators `eigh` takes many times as long as products and QR.
    """
    return "eigh" if jax.default_backend() == "cpu" else "qr"


def first_basis(factor: KronFactor | Squares) -> TrackedBasis:
    """Return the eigenbasis of a factor by `eigh`, with eigenvalues in descending order.

    Args:
      factor: a factor, or matrices `[s, n, n]`.

    Returns:
      The `TrackedBasis`, with the identity for a basis before. Where the factor is not finite the
      basis is the identity.

    Raises:
      ValueError: The matrices are not `[s, n, n]`.

    Cost: about `10 n^3` multiplications.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.kron._eigenbasis import first_basis
      >>> abs(first_basis(jnp.diag(jnp.array([1.0, 4.0]))[None]).basis).tolist()
      [[[0.0, 1.0], [1.0, 0.0]]]
    """
    return first_bases([factor])[0]


def tracked_basis(
    factor: KronFactor | Squares,
    basis: Squares | None,
    tolerance: float = 0.0,
    sort: bool = True,
) -> TrackedBasis:
    """Turn a basis towards the eigenbasis of a factor L by one step, `Q <- qr(L Q)`.

    This is a step of orthogonal iteration from the basis before. It is the step `Q <- Q qr(Q'LQ)`
    of the QR algorithm, up to signs of columns, which mean nothing. A basis within a few percent of
    the eigenbasis, which a running average leaves within a step, stays so by one step each time.

    A slice is skipped, and keeps its basis, where `|B - diag B| <= tolerance |B|` with `B = Q'LQ`:
    where taking L for diagonal in the basis in use is a relative error of at most `tolerance`. A
    factor of zeros, which has no eigenbasis of its own, and one that is not finite keep it too.

    Args:
      factor: a factor, or matrices `[s, n, n]`, symmetric and positive semidefinite.
      basis: orthogonal, `[s, n, n]` in columns; None for factors that are diagonal.
      tolerance: a number below 1; 0 never skips.
      sort: whether columns are first put in descending order of `diag(Q'LQ)`. Without, columns
        that L maps to zero may come before others, and turn these to directions of rounding
        errors: QR gives each column all that those before it have not.

    Returns:
      The `TrackedBasis`, in at least float32.

    Raises:
      ValueError: The matrices are not `[s, n, n]`, or the basis is unlike them.

    Cost: one product of `n^3` multiplications for the criterion; where a slice is not skipped, a QR
      decomposition with its Q (`8 n^3 / 3`).

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.kron._eigenbasis import tracked_basis
      >>> matrix, basis = jnp.array([[[4.0, 1.0], [1.0, 1.0]]]), jnp.eye(2)[None]
      >>> ratios = []
      >>> for _ in range(4):
      ...     result = tracked_basis(matrix, basis)
      ...     basis = result.basis
      ...     ratios.append(round(float(result.off_diagonal_ratio[0]), 4))
      >>> ratios
      [0.3244, 0.0573, 0.0093, 0.0015]

    References: Golub and Van Loan (2013), Matrix computations, sections 7.3 and 8.2 (orthogonal
      iteration); Vyas et al. (2024), SOAP, algorithm 4, https://arxiv.org/abs/2409.11321;
      Eschenhagen et al. (2025), https://arxiv.org/abs/2506.03595 (the criterion).

    Deviates: the criterion is the residual `|L Q - Q diag(B)|`, which is `|B - diag B|` for an
      orthogonal Q. The difference `|B|^2 - |diag B|^2` reads 0 in float32 for a ratio of 1e-4.
    """
    return tracked_bases([factor], [basis], tolerance, sort)[0]


def first_bases(factors: Sequence[KronFactor | Squares]) -> list[TrackedBasis]:
    """Do as `first_basis` for every factor; full ones of equal size are a batch."""
    wide = [_as_factor(factor) for factor in factors]
    return in_batches(_first, wide, equal_sizes)


def tracked_bases(
    factors: Sequence[KronFactor | Squares],
    bases: Sequence[Squares | None],
    tolerance: float = 0.0,
    sort: bool = True,
) -> list[TrackedBasis]:
    """Do as `tracked_basis` for every factor and its basis; full ones of equal size are a batch."""
    wide = [_as_factor(factor) for factor in factors]
    for factor, basis in zip(wide, bases, strict=True):
        _check_basis(factor, basis)
    # Rotations of small angles need the precision of the factor's own accumulation.
    operands = [None if basis is None else at_least_float32(basis) for basis in bases]
    step = partial(_tracked, tolerance=tolerance, sort=sort)
    return in_batches(step, wide, equal_sizes, operands)


def rayleigh_quotients(factor: KronFactor, basis: Squares | None) -> Vectors:
    """Return `diag(Q'LQ)`, `[s, n]`, near to the eigenvalues of L where Q is to its eigenbasis."""
    if basis is None:
        return factor.diagonal()
    return jnp.sum(basis * factor.left(basis), axis=1)


def _first(factor: KronFactor) -> TrackedBasis:
    """Decompose a stack of matrices, in descending order."""
    if not isinstance(factor, Full):
        return _of_diagonal(factor)
    matrix, is_finite = _normalized(factor.matrix)
    # Ascending order, which LAPACK returns, is turned round.
    vectors = Full(matrix).eigh().vectors
    assert vectors is not None  # those of a full factor are
    eye = jnp.eye(factor.size, dtype=matrix.dtype)
    identity = jnp.broadcast_to(eye, matrix.shape)
    basis = jnp.where(is_finite[:, None, None], vectors[:, :, ::-1], identity)
    _, _, ratio = _residual(matrix, identity)
    return TrackedBasis(basis, ratio, _unchanged_order(factor), is_finite)


def _tracked(
    factor: KronFactor, basis: Squares | None, *, tolerance: float, sort: bool
) -> TrackedBasis:
    """Do one step for a stack of matrices."""
    if basis is None or not isinstance(factor, Full):
        return _of_diagonal(factor)
    matrix, is_finite = _normalized(factor.matrix)
    product, quotients, ratio = _residual(matrix, basis)
    # A ratio is 0 for zeros too: all slices but those that are exactly diagonal pass a tolerance
    # of 0.
    is_due = is_finite & (ratio > tolerance)

    def turned(product: Squares, basis: Squares) -> tuple[Squares, Array]:
        order = _unchanged_order(factor)
        if sort:
            # Vyas et al. (2024): o = argsort desc diag(Q'LQ), and L Q[:, o] = (L Q)[:, o].
            order = jnp.argsort(-quotients, axis=1)
            product = jnp.take_along_axis(product, order[:, None, :], axis=2)
        vectors, _ = jnp.linalg.qr(product)
        chosen = jnp.where(is_due[:, None, None], vectors, basis)
        return chosen, jnp.where(is_due[:, None], order, _unchanged_order(factor))

    def same(product: Squares, basis: Squares) -> tuple[Squares, Array]:
        del product
        return basis, _unchanged_order(factor)

    # Without a tolerance hardly a slice is ever skipped, and a condition would only be in the way.
    if tolerance == 0:
        new_basis, order = turned(product, basis)
    else:
        new_basis, order = refresh_if(jnp.any(is_due), turned, same, product, basis)
    return TrackedBasis(new_basis, ratio, order, is_finite)


def _residual(matrix: Squares, basis: Squares) -> tuple[Squares, Vectors, PerSlice]:
    """Return `L Q`, `d = diag(Q'LQ)`, and the off-diagonal ratio of `B = Q'LQ`."""
    product = matmul(matrix, basis)
    quotients = jnp.sum(basis * product, axis=1)
    # |L Q - Q diag(d)| = |Q (B - diag d)| = |B - diag B|, as Q is orthogonal: no second product,
    # and no difference of two large norms.
    beside = product - basis * quotients[:, None, :]
    norm = jnp.linalg.norm(product, axis=(1, 2))
    # 0 / 0 of a factor of zeros, which is diagonal in any basis, is 0.
    safe_norm = jnp.where(norm > 0, norm, 1)
    ratio = jnp.linalg.norm(beside, axis=(1, 2)) / safe_norm
    return product, quotients, ratio


def _normalized(matrix: Squares) -> tuple[Squares, Bool[Array, " s"]]:
    """Divide slices by their largest entries, and make those that are not finite zero."""
    # Squares of entries of 1e-25 would underflow in norms of float32. The basis knows no scale.
    largest = jnp.max(jnp.abs(matrix), axis=(1, 2), keepdims=True)
    is_finite = jnp.isfinite(largest)
    is_usable = is_finite & (largest > 0)
    # NaN must not get into LAPACK, whose iterations may not end then.
    unit = jnp.where(is_usable, largest, 1)
    finite = jnp.where(is_finite, matrix, 0)
    return finite / unit, is_finite[:, 0, 0]


def _of_diagonal(factor: KronFactor) -> TrackedBasis:
    """Return the basis I of a diagonal factor, which None stands for."""
    entries = factor.diagonal()
    return TrackedBasis(
        basis=None,
        off_diagonal_ratio=jnp.zeros(entries.shape[0], entries.dtype),
        order=_unchanged_order(factor),
        is_finite=jnp.isfinite(entries).all(axis=1),
    )


def _unchanged_order(factor: KronFactor) -> Int[Array, "s n"]:
    stack = factor.trace().shape[0]
    return jnp.broadcast_to(jnp.arange(factor.size), (stack, factor.size))


def _as_factor(factor: KronFactor | Float[Array, "s n n"]) -> KronFactor:
    """Widen a factor to at least float32; matrices are a full factor."""
    if not isinstance(factor, jax.Array):
        wide: KronFactor = jax.tree.map(at_least_float32, factor)
        return wide
    if factor.ndim != 3 or factor.shape[1] != factor.shape[2]:
        raise ValueError(
            f"a factor must be matrices [stack, n, n], got {describe(factor)}; "
            "give a single matrix a leading axis, matrix[None]."
        )
    return Full(at_least_float32(factor))


def _check_basis(factor: KronFactor, basis: Any) -> None:
    """Raise unless the basis of a full factor has its shape, and a diagonal one has none."""
    if isinstance(factor, Full):
        shape = factor.matrix.shape
        if basis is None or basis.shape != shape:
            raise ValueError(
                f"the basis of a full factor must be {list(shape)} as the factor is, got "
                f"{describe(basis)}; begin with the basis of first_basis(factor)."
            )
    elif basis is not None:
        raise ValueError(
            f"the basis of a diagonal factor is I and must be None, got {describe(basis)}."
        )
