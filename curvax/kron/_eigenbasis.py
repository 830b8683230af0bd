"""Eigenbases that follow a factor which changes slowly, by one QR step instead of `eigh`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax._checks import check_choice, describe
from curvax._trees import select_slices
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
      values: what is known of the eigenvalues, `[s, n]`, without another product: those of `eigh`;
        or `diag(Q'LQ)` in the basis before, in the new order, which is second order in the angle
        to the eigenbasis. Their sum is the trace of L.
      off_diagonal_ratio: `|B - diag B| / |B|` in Frobenius norms, `[s]`, with `B = Q'LQ` in the
        basis *before* the step: the relative error of L where it is taken for diagonal there. It
        is 1 where that basis was zero.
      order: `[s, n]`, numbers of columns: column k follows column `order[k]` of the basis before.
        What is stored by column goes along as `x[..., order]`.
      is_turned: whether the basis is another one than before, `[s]`.
      is_finite: whether L was, `[s]`. Where it was not, the basis is the one before.
    """

    basis: Squares | None
    values: Vectors
    off_diagonal_ratio: PerSlice
    order: Int[Array, "s n"]
    is_turned: Bool[Array, " s"]
    is_finite: Bool[Array, " s"]


BASIS_METHODS = ("eigh", "qr")


def default_basis_method() -> str:
    """Return how eigenbases are best refreshed on this backend: "eigh" on CPUs, elsewhere "qr".

    A QR step of 16 factors of up to 1,000 rows takes two CPU cores 0.37 s, and LAPACK's `eigh`
    0.34 s. On accelerators `eigh` takes many times as long as QR and products.
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
    method: str = "qr",
) -> TrackedBasis:
    """Turn a basis towards the eigenbasis of a factor L by one step, `Q <- qr(L Q)`.

    This is a step of orthogonal iteration from the basis before. It is the step `Q <- Q qr(Q'LQ)`
    of the QR algorithm, up to signs of columns, which mean nothing. A basis within a few percent of
    the eigenbasis, which a running average leaves within a step, stays so by one step each time.

    A slice is skipped, and keeps its basis, where `|B - diag B| <= tolerance |B|` with `B = Q'LQ`:
    where taking L for diagonal in the basis in use is a relative error of at most `tolerance`. A
    factor of zeros, which has no eigenbasis of its own, and one that is not finite keep it too. A
    slice whose basis is zero, as a state begins, gets its first basis by `eigh`.

    Args:
      factor: a factor, or matrices `[s, n, n]`, symmetric and positive semidefinite.
      basis: orthogonal, `[s, n, n]` in columns; None for factors that are diagonal.
      tolerance: a number below 1; 0 never skips.
      sort: whether columns are first put in descending order of `diag(Q'LQ)`. Without, columns
        that L maps to zero may come before others, and turn these to directions of rounding
        errors: QR gives each column all that those before it have not.
      method: "qr"; or "eigh", which decomposes the slices that are not skipped, sorted.

    Returns:
      The `TrackedBasis`, in at least float32.

    Raises:
      ValueError: The matrices are not `[s, n, n]`, the basis is unlike them, or the method is
        unknown.

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
    return tracked_bases([factor], [basis], tolerance, sort, method)[0]


def first_bases(factors: Sequence[KronFactor | Squares]) -> list[TrackedBasis]:
    """Do as `first_basis` for every factor; full ones of equal size are a batch."""
    wide = [_as_factor(factor) for factor in factors]
    return in_batches(_first, wide, equal_sizes)


def tracked_bases(
    factors: Sequence[KronFactor | Squares],
    bases: Sequence[Squares | None],
    tolerance: float = 0.0,
    sort: bool = True,
    method: str = "qr",
) -> list[TrackedBasis]:
    """Do as `tracked_basis` for every factor and its basis; full ones of equal size are a batch."""
    check_choice("method", method, BASIS_METHODS)
    wide = [_as_factor(factor) for factor in factors]
    for factor, basis in zip(wide, bases, strict=True):
        _check_basis(factor, basis)
    # Rotations of small angles need the precision of the factor's own accumulation.
    operands = [None if basis is None else at_least_float32(basis) for basis in bases]
    step = partial(
        _tracked,
        tolerance=tolerance,
        sort=sort or method == "eigh",
        method=method,
    )
    return in_batches(step, wide, equal_sizes, operands)


def _first(factor: KronFactor) -> TrackedBasis:
    """Decompose a stack of matrices, in descending order."""
    if not isinstance(factor, Full):
        return _of_diagonal(factor)
    eye = jnp.eye(factor.size, dtype=factor.matrix.dtype)
    identity = jnp.broadcast_to(eye, factor.matrix.shape)
    return _tracked(factor, identity, tolerance=-1.0, sort=True, method="eigh")


class _Turned(NamedTuple):
    """What a step changes."""

    basis: Squares
    values: Vectors
    order: Int[Array, "s n"]


def _tracked(
    factor: KronFactor,
    basis: Squares | None,
    *,
    tolerance: float,
    sort: bool,
    method: str,
) -> TrackedBasis:
    """Do one step for a stack of matrices."""
    if basis is None or not isinstance(factor, Full):
        return _of_diagonal(factor)
    matrix, unit, is_finite = _normalized(factor.matrix)
    product, quotients, ratio = _residual(matrix, basis)
    # A basis of zeros is none at all.
    is_new = ~jnp.any(basis != 0, axis=(1, 2))
    ratio = jnp.where(is_new, 1, ratio)
    is_due = is_finite & (ratio > tolerance)

    def turned(matrix: Squares, product: Squares, old: _Turned) -> _Turned:
        if method == "eigh":
            new = _decomposed(matrix, old)
        else:
            by_qr = _orthogonalized(product, old, sort)
            # Only a state's first step is one of these.
            new = refresh_if(jnp.any(is_new), _decomposed_where(is_new), _second, matrix, by_qr)
        return select_slices(is_due, new, old)

    def same(matrix: Squares, product: Squares, old: _Turned) -> _Turned:
        del matrix, product
        return old

    old = _Turned(basis, quotients, _unchanged_order(factor))
    # Without a tolerance hardly a slice is ever skipped, and a condition would only be in the way.
    if tolerance <= 0:
        latest = turned(matrix, product, old)
    else:
        latest = refresh_if(jnp.any(is_due), turned, same, matrix, product, old)
    return TrackedBasis(
        basis=latest.basis,
        values=latest.values * unit[:, None],
        off_diagonal_ratio=ratio,
        order=latest.order,
        is_turned=is_due,
        is_finite=is_finite,
    )


def _orthogonalized(product: Squares, old: _Turned, sort: bool) -> _Turned:
    """Return `qr(L Q)`, with columns first in descending order of `diag(Q'LQ)`."""
    if not sort:
        return old._replace(basis=jnp.linalg.qr(product)[0])
    # Vyas et al. (2024): o = argsort desc diag(Q'LQ), and L Q[:, o] = (L Q)[:, o].
    order = jnp.argsort(-old.values, axis=1)
    ordered = jnp.take_along_axis(product, order[:, None, :], axis=2)
    return _Turned(
        basis=jnp.linalg.qr(ordered)[0],
        values=jnp.take_along_axis(old.values, order, axis=1),
        order=order,
    )


def _decomposed(matrix: Squares, old: _Turned) -> _Turned:
    """Return the eigenbasis by `eigh`; column k follows the k-th largest of the basis before."""
    values, vectors = Full(matrix).eigh()
    assert vectors is not None  # those of a full factor are
    # LAPACK returns ascending order.
    return _Turned(
        basis=vectors[:, :, ::-1],
        values=values[:, ::-1],
        order=jnp.argsort(-old.values, axis=1),
    )


def _decomposed_where(is_new: Bool[Array, " s"]) -> Callable[[Squares, _Turned], _Turned]:
    """Return the function that decomposes, and selects the result where a slice is new."""

    def fn(matrix: Squares, other: _Turned) -> _Turned:
        return select_slices(is_new, _decomposed(matrix, other), other)

    return fn


def _second(matrix: Squares, other: _Turned) -> _Turned:
    del matrix
    return other


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


def _normalized(matrix: Squares) -> tuple[Squares, PerSlice, Bool[Array, " s"]]:
    """Divide slices by their largest entries, and make those that are not finite zero."""
    # Squares of entries of 1e-25 would underflow in norms of float32. The basis knows no scale.
    largest = jnp.max(jnp.abs(matrix), axis=(1, 2))
    is_finite = jnp.isfinite(largest)
    unit = jnp.where(is_finite & (largest > 0), largest, 1)
    # NaN must not get into LAPACK, whose iterations may not end then.
    finite = jnp.where(is_finite[:, None, None], matrix, 0)
    return finite / unit[:, None, None], unit, is_finite


def _of_diagonal(factor: KronFactor) -> TrackedBasis:
    """Return the basis I of a diagonal factor, which None stands for."""
    entries = factor.diagonal()
    stack = len(entries)
    return TrackedBasis(
        basis=None,
        values=entries,
        off_diagonal_ratio=jnp.zeros(stack, entries.dtype),
        order=_unchanged_order(factor),
        is_turned=jnp.zeros(stack, bool),
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
