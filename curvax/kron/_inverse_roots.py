"""Inverse roots of Kronecker factors, `A^(-1/p)`: by `eigh`, or by matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from curvax._checks import check_choice, check_integer
from curvax._types import at_least_float32
from curvax._xla import refresh_if
from curvax.kron._kron_factor import (
    Diagonal,
    Eigen,
    Full,
    Identity,
    KronFactor,
    PerSlice,
    Squares,
    Vectors,
    in_batches,
    matmul,
    nearly_equal_sizes,
)

ROOT_METHODS = ("eigh", "products")


class InverseRoot(NamedTuple):
    """An inverse root of a factor, and how it was computed; `[s]` each.

    Attributes:
      root: `A^(-1/p)`, of the structure of A.
      is_finite: whether root and factor are. Where not, keep the last good root.
      fell_back: whether products did not get there, and `eigh` was taken; their sum is the number
        of fall-backs.
    """

    root: KronFactor
    is_finite: Bool[Array, " s"]
    fell_back: Bool[Array, " s"]


def default_root_method() -> str:
    """Return how inverse roots are best computed on this backend: "eigh" on CPUs, else "products".

    The 15 to 40 products of a coupled Newton iteration take longer than LAPACK on a CPU. On
    accelerators products run at full speed, and `eigh` at a few percent of it.
    """
    return "eigh" if jax.default_backend() == "cpu" else "products"


def inverse_root(
    factor: KronFactor,
    p: int,
    method: str = "eigh",
    rtol: float | None = None,
    tolerance: float = 0.1,
) -> InverseRoot:
    """Compute `A^(-1/p)` of a symmetric positive definite factor.

    With "products" by the coupled Newton iteration: from `M = z A`, `X = z^(1/p) I` with `z = (p +
    1) / (2 |A|_F)`,

        T = ((p + 1) I - M) / p,   X <- X T,   M <- T^p M,

    so that `M = A X^p` goes to I and X to `A^(-1/p)`. By rounding M and X drift apart, and M
    reports success for an X that is wrong; so the residual `A X^p - I` is computed from X in the
    end, and a slice where its root mean square over rows exceeds `tolerance` is decomposed by
    `eigh` instead.

    Args:
      factor: the factor A, damped by the caller.
      p: the root, at least 1.
      method: "eigh" or "products", see `default_root_method`.
      rtol: None for the inverse root of a positive definite A, whose eigenvalues are taken to be at
        least the precision of its floats times the largest one. A number for the root of the
        pseudo-inverse: eigenvalues of at most `rtol` times the largest count as zero, and stay
        zero. Only with "eigh".
      tolerance: the largest residual of products. The condition of A times the precision of its
        floats is a residual that no method avoids: in float32 it is 4e-4 at a condition of 1e4,
        0.03 at 1e6 (by `eigh` 0.06), and above 1 at 1e8, where the iteration breaks down.

    Returns:
      The `InverseRoot`, in at least float32.

    Raises:
      ValueError: p is below 1, the method is unknown, or `rtol` is with "products".

    Cost: "eigh": about `10 n^3` multiplications. "products": 2 products for each step with p = 1, 3
      with p = 2, 4 with p = 4, and about `log2(condition) + 7` steps; products run at full speed on
      accelerators.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.kron import Full
      >>> from curvax.kron._inverse_roots import inverse_root
      >>> matrix = jnp.array([[[2.5, 1.5], [1.5, 2.5]]])      # eigenvalues 4 and 1
      >>> result = inverse_root(Full(matrix), 2, method="products")
      >>> [[round(x, 5) for x in row] for row in result.root.matrix[0].tolist()]
      [[0.75, -0.25], [-0.25, 0.75]]

    References: Guo and Higham (2006), A Schur-Newton method for the matrix pth root and its
      inverse; Anil et al. (2020), Scalable second order optimization for deep
      learning, https://arxiv.org/abs/2002.09018.

    Deviates: Anil et al. check M, and take X back a step where M gets worse.
    """
    return inverse_roots([factor], [p], method, rtol, tolerance)[0]


def inverse_roots(
    factors: Sequence[KronFactor],
    powers: Sequence[int],
    method: str = "eigh",
    rtol: float | None = None,
    tolerance: float = 0.1,
) -> list[InverseRoot]:
    """Do as `inverse_root` for every factor, each with its p.

    Full factors with one p and of about equal size are a batch, one compiled program; the smaller
    ones are padded with their mean eigenvalue, which changes no root.
    """
    check_choice("method", method, ROOT_METHODS)
    if rtol is not None and method == "products":
        raise ValueError(
            'rtol, the root of the pseudo-inverse, needs eigenvalues; use method="eigh".'
        )
    results: dict[int, InverseRoot] = {}
    for p in sorted(set(powers)):
        check_integer(1, 2**31 - 1, p=p)
        chosen = [k for k, power in enumerate(powers) if power == p]
        wide = [_at_least_float32(factors[k]) for k in chosen]
        fn = partial(
            _root,
            p=p,
            method=method,
            rtol=rtol,
            tolerance=tolerance,
        )
        batched = in_batches(fn, wide, nearly_equal_sizes)
        for k, result in zip(chosen, batched, strict=True):
            results[k] = _cut(result, factors[k].size)
    return [results[k] for k in range(len(factors))]


def _at_least_float32(factor: KronFactor) -> KronFactor:
    wide: KronFactor = jax.tree.map(at_least_float32, factor)
    return wide


def _cut(result: InverseRoot, size: int) -> InverseRoot:
    """Cut off what padding added."""
    root = result.root
    if not isinstance(root, Full):
        return result
    matrix = root.matrix[:, :size, :size]
    return result._replace(root=Full(matrix))


def _root(
    factor: KronFactor,
    *,
    p: int,
    method: str,
    rtol: float | None,
    tolerance: float,
) -> InverseRoot:
    """Compute the root of a stack of matrices, or of a diagonal factor."""
    if not isinstance(factor, Full):
        return _root_of_diagonal(factor, p, rtol)
    matrix, scale, is_finite = _normalized(factor.matrix)
    if method == "eigh":
        root = _by_eigh(matrix, p, rtol)
        is_wrong = jnp.zeros_like(is_finite)
    else:
        root, is_wrong = _by_products(matrix, p, tolerance)
    # (c A)^(-1/p) = c^(-1/p) A^(-1/p)
    root = root * _spread(scale ** (-1 / p))
    root_is_finite = jnp.isfinite(root).all(axis=(1, 2))
    return InverseRoot(
        root=Full(root),
        is_finite=is_finite & root_is_finite,
        fell_back=is_finite & is_wrong,
    )


def _root_of_diagonal(factor: KronFactor, p: int, rtol: float | None) -> InverseRoot:
    """Compute the root entry by entry; entries are eigenvalues that no rounding has touched."""
    entries = factor.diagonal()
    raised = _raised(entries, p, rtol)
    is_finite = jnp.isfinite(raised) & jnp.isfinite(entries)
    root: KronFactor = Diagonal(raised)
    if isinstance(factor, Identity):
        root = Identity(raised[:, 0], factor.size)
    return InverseRoot(
        root=root,
        is_finite=is_finite.all(axis=1),
        fell_back=jnp.zeros(len(entries), bool),
    )


def _raised(values: Vectors, p: int, rtol: float | None) -> Vectors:
    """Raise eigenvalues to the power -1/p; with `rtol` small ones become 0."""
    if rtol is None:
        return values ** (-1 / p)
    largest = jnp.max(values, axis=1, keepdims=True)
    is_zero = values <= rtol * largest
    # 0^(-1/p) is infinite, also where it is not selected.
    positive = jnp.where(is_zero, 1, values)
    return jnp.where(is_zero, 0, positive ** (-1 / p))


def _normalized(matrix: Squares) -> tuple[Squares, PerSlice, Bool[Array, " s"]]:
    """Divide slices by their traces, put I where one is not finite, and tell what is finite."""
    # The scale of curvature is arbitrary: 1e-30 has no square in float32.
    trace = jnp.trace(matrix, axis1=1, axis2=2)
    is_finite = jnp.isfinite(matrix).all(axis=(1, 2))
    # NaN must not get into LAPACK, whose iterations may not end then.
    finite = jnp.where(_spread(is_finite), matrix, _identity_like(matrix))
    # Zeros have a trace of 0. They stay: zeros have no inverse, and are their pseudo-inverse.
    scale = jnp.where(is_finite & (trace > 0), trace, 1)
    return finite / _spread(scale), scale, is_finite


def _by_eigh(matrix: Squares, p: int, rtol: float | None) -> Squares:
    """Compute the root from eigenvalues, none of them below the rounding error of the largest."""
    values, vectors = Full(matrix).eigh()
    if rtol is None:
        # What is smaller is a rounding error of the decomposition, as likely zero as not.
        largest = jnp.max(values, axis=1, keepdims=True)
        rounding = jnp.finfo(values.dtype).eps * largest
        values = jnp.maximum(values, rounding)
    root = Eigen(_raised(values, p, rtol), vectors).power(1.0)
    assert isinstance(root, Full)  # as the factor is
    return _symmetric(root.matrix)


def _by_products(matrix: Squares, p: int, tolerance: float) -> tuple[Squares, Bool[Array, " s"]]:
    """Compute the root by products, by `eigh` where it turns out wrong; tell where that was."""
    root = _newton(matrix, p)
    # |A X^p - I|, of X and not of M, which the iteration drives to I whatever X is.
    product = matmul(matrix, _to_power(root, p))
    residual = _norm(product - _identity_like(matrix))
    mean = residual / matrix.shape[-1] ** 0.5
    # Negated, so that NaN is a failure too.
    is_wrong = ~(mean <= tolerance)

    def decomposed(matrix: Squares, root: Squares) -> Squares:
        return jnp.where(_spread(is_wrong), _by_eigh(matrix, p, None), root)

    def same(matrix: Squares, root: Squares) -> Squares:
        del matrix
        return root

    root = refresh_if(jnp.any(is_wrong), decomposed, same, matrix, root)
    return root, is_wrong


class _Newton(NamedTuple):
    """The state of the coupled Newton iteration.

    Attributes:
      x: X, which goes to `A^(-1/p)`.
      m: M, which goes to I.
      error: `|M - I|` of each slice.
      is_going: which slices are not at their end.
      steps: number of steps.
    """

    x: Squares
    m: Squares
    error: PerSlice
    is_going: Bool[Array, " s"]
    steps: Any


def _newton(matrix: Squares, p: int) -> Squares:
    """Iterate `T = ((p + 1) I - M) / p`, `X <- X T`, `M <- T^p M` to the end of progress."""
    identity = _identity_like(matrix)
    n, eps = matrix.shape[-1], float(jnp.finfo(matrix.dtype).eps)
    # A small eigenvalue of M grows by at least 2 in each step, and one below the precision of the
    # largest is noise: so many steps, and a few more for the quadratic end.
    max_steps = math.ceil(-math.log2(eps)) + 16

    def step(carry: _Newton) -> _Newton:
        # Guo and Higham (2006): T = ((p + 1) I - M) / p, X <- X T, M <- T^p M
        t = ((p + 1) * identity - carry.m) / p
        x = matmul(carry.x, t)
        m = matmul(_to_power(t, p), carry.m)
        error = _norm(m - identity)

        # Far from I small eigenvalues of M grow unseen beside the others. Near it the error is
        # squared by every step; where it does not even halve, rounding has the upper hand.
        is_at_end = (error < 0.1) & (error > 0.5 * carry.error)
        is_worse = error > 1.2 * carry.error
        is_exact = error <= eps * n**0.5
        # The last step of a slice counts, unless it made things worse.
        is_step = carry.is_going & ~is_worse
        return _Newton(
            x=jnp.where(_spread(is_step), x, carry.x),
            m=jnp.where(_spread(is_step), m, carry.m),
            error=error,
            is_going=is_step & ~is_at_end & ~is_exact,
            steps=carry.steps + 1,
        )

    def is_going(carry: _Newton) -> Array:
        is_within = jnp.asarray(carry.steps < max_steps)
        return jnp.any(carry.is_going) & is_within

    norm = _norm(matrix)
    # z = (p + 1) / (2 |A|): eigenvalues of z A are in [0, (p + 1) / 2], from where the iteration
    # converges. Zeros have no root; with z = 1 they stay finite, and fail the check.
    z = jnp.where(norm > 0, (p + 1) / 2 / jnp.where(norm > 0, norm, 1), 1)
    first = _Newton(
        x=_spread(z ** (1 / p)) * identity,
        m=_spread(z) * matrix,
        error=jnp.full_like(norm, jnp.inf),
        is_going=jnp.ones(norm.shape, bool),
        steps=jnp.int32(0),
    )
    x = lax.while_loop(is_going, step, first).x
    return _symmetric(x)


def _to_power(matrix: Squares, p: int) -> Squares:
    """Raise matrices to a positive power, by squares."""
    if p == 1:
        return matrix
    half = _to_power(matrix, p // 2)
    square = matmul(half, half)
    if p % 2 == 0:
        return square
    return matmul(square, matrix)


def _symmetric(matrix: Squares) -> Squares:
    # Rounding makes products of functions of A unsymmetric, by 3e-3 as has been seen.
    mirrored = matrix.swapaxes(1, 2)
    return jnp.asarray(matrix + mirrored) / 2


def _norm(matrix: Squares) -> PerSlice:
    return jnp.asarray(jnp.linalg.norm(matrix, axis=(1, 2)))


def _identity_like(matrix: Squares) -> Squares:
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return jnp.broadcast_to(identity, matrix.shape)


def _spread(x: Array) -> Array:
    """Give a number for each slice the axes of matrices."""
    return x[:, None, None]
