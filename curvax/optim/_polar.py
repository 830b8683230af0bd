"""Polar factors of matrices: by products alone, with given coefficients, or exactly.

With the singular value decomposition `X = U diag(s) V'` the polar factor is `U V'`: the nearest
matrix with orthonormal rows (or columns), in which every direction of X is equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from curvax._checks import check_at_least, check_count
from curvax._trees import safe_divide
from curvax._types import at_least_float32
from curvax._xla import one_after_another
from curvax.kron._kron_factor import matmul
from curvax.optim._matrices import Matrices, PerMatrix
from curvax.optim._matrix_parts import matrix_norm

Polar: TypeAlias = Callable[[Matrices], Matrices]
"""A function from a stack of matrices to their polar factors, exact or not; of zeros zeros."""

Coefficients: TypeAlias = tuple[tuple[float, float, float], ...]
"""The numbers (a, b, c) of each step `X <- a X + b X X' X + c (X X')^2 X`."""

MUON_COEFFICIENTS: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's: singular values above 1.6e-3 of the norm get to [0.68, 1.20]."""


def newton_schulz(
    coefficients: Sequence[tuple[float, float, float]] = MUON_COEFFICIENTS,
    eps: float = 1e-8,
    dtype: Any = None,
) -> Polar:
    """Make a function that approximates polar factors by matrix products.

    From `X = V / (|V| + eps)` each step is

      X <- a X + (b A + c A^2) X,   A = X X',

    which maps every singular value s to `a s + b s^3 + c s^5`, and leaves singular vectors as they
    are. A is on the shorter side of the matrix.

    Args:
      coefficients: (a, b, c) for each step. By default Muon's five; `curvax.optim.polar_express(5)`
        brings singular values nearer to 1 in as many products; `[(2.0, -1.5, 0.5)] * 12` gets to
        [0.7, 1] from 2e-4 on without a jump.
      eps: is added to the Frobenius norm. Matrices with a norm far above it have a polar factor
        that does not depend on their unit; with 0 all but zeros have.
      dtype: of the products. None takes float32 (float64 for such gradients) in full precision.
        `jnp.bfloat16` is what Muon is trained with on accelerators, where these products are
        several times as fast; it moves singular values by a few percent.

    Returns:
      The function from `[s, i, o]` to an array like it. Of zeros it gives zeros.

    Raises:
      ValueError: eps is negative, or a step has not three coefficients.

    Cost: with n the shorter side and m the longer `2 n^2 m + n^3` multiplications a step.

    Example: the coefficients of a Taylor series, which converge.
      >>> import jax.numpy as jnp, curvax
      >>> polar = curvax.optim.newton_schulz([(15 / 8, -10 / 8, 3 / 8)] * 12)
      >>> polar(jnp.array([[[0.0, 3.0], [-0.2, 0.0]]])).round(4).tolist()
      [[[0.0, 1.0], [-1.0, 0.0]]]

    References: Jordan et al. (2024), Muon, https://kellerjordan.github.io/posts/muon; Higham
      (2008), Functions of matrices, chapter 8.
    """
    check_at_least(0, eps=eps)
    steps = tuple(map(_checked, coefficients))
    return partial(_iterate, coefficients=steps, eps=eps, dtype=dtype)


def _checked(coefficients: Sequence[float]) -> tuple[float, float, float]:
    if np.shape(coefficients) != (3,):
        raise ValueError(
            f"coefficients: each step needs three numbers (a, b, c), got {coefficients!r}; Muon's "
            "are [(3.4445, -4.7750, 2.0315)] * 5."
        )
    a, b, c = coefficients
    return float(a), float(b), float(c)


# Compiled inside: a model has many matrices of few shapes, and each shape is traced once.
@partial(jax.jit, static_argnames=("coefficients", "eps", "dtype"))
def _iterate(V: Matrices, *, coefficients: Coefficients, eps: float, dtype: Any) -> Matrices:
    """Take the steps of `newton_schulz`."""
    is_tall = V.shape[1] > V.shape[2]
    X = _normalized(V.mT if is_tall else V, eps)
    # Products in another dtype round as that does; others must not be cut by the backend.
    product = matmul if dtype is None else jnp.matmul
    X = X if dtype is None else X.astype(dtype)
    for a, b, c in coefficients:
        A = product(X, X.mT)
        # X <- a X + (b A + c A^2) X
        B = b * A + c * product(A, A)
        X = a * X + product(B, X)
    return (X.mT if is_tall else X).astype(V.dtype)


def _normalized(V: Matrices, eps: float) -> Matrices:
    """Return `V / (|V| + eps)`, for zeros zeros; all singular values are then at most 1."""
    # Squares of gradients of 1e-20 would be zero in float32, and the norm with them.
    largest = _largest(V)
    norm = largest * matrix_norm(safe_divide(V, jnp.broadcast_to(largest, V.shape)))
    return safe_divide(V, jnp.broadcast_to(norm + eps, V.shape))


def _largest(V: Matrices) -> PerMatrix:
    return jnp.max(jnp.abs(V), axis=(1, 2), keepdims=True)


# -- coefficients ------------------------------------------------------------------------------


_MARGIN = 1.01
"""By how much singular values may exceed their interval: rounding to bfloat16 is 0.4 %."""

_SMALLEST_RATIO = 0.024
"""Lower over upper end of the interval of one step, at least: the best polynomial on [r, 1] maps
the middle to as little as 8 r. A step in bfloat16, with terms of the size 20, has an error of 0.1.
(With smallest = 1e-4 and eight steps, singular values above 0.01 are off by 0.75 in bfloat16
without this bound, and by 0.006 with it.)"""

_EXCHANGES = 40
"""Steps of Remez; they converge quadratically, but the first few from far away."""


def polar_express(num_steps: int = 5, smallest: float = 1e-3) -> Coefficients:
    """Compute coefficients for `newton_schulz` that are the best for every step.

    Each step is the odd polynomial `p(s) = a s + b s^3 + c s^5` with the least `max |1 - p(s)|`
    over the interval that the steps before it leave. The composition of such steps is the best one
    of its length, but for margins for rounding. With five steps singular values in [1e-3, 1] get to
    [0.86, 1.14], with six to [0.998, 1.002], with eight to 1 up to 1e-7.

    Args:
      num_steps: number of steps.
      smallest: the singular value, as a fraction of the norm, from which on this holds. Smaller
        ones grow by the product of all a, 1,000 with five steps and 1,900 with six.

    Returns:
      A triple (a, b, c) for each step.

    Raises:
      ValueError: there is no step, or `smallest` is not in (0, 1).

    Cost: static work alone.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> polar = curvax.optim.newton_schulz(curvax.optim.polar_express(8))
      >>> polar(jnp.array([[[3.0, 0.0], [0.0, 0.1]]])).round(4).tolist()
      [[[1.0, 0.0], [0.0, 1.0]]]

    References: Amsel et al. (2025), The polar express, https://arxiv.org/abs/2505.16932, theorem
      3.1 (composition of the best steps is best) and section 4.4 (rounding).

    Deviates: each interval is 1 % wider than the steps before it leave it, where the authors divide
      the argument of all but the last polynomial by 1.01; and no step is shifted to be around 1,
      since the next one is for the interval as it is.
    """
    check_count(1, num_steps=num_steps)
    if not 0 < smallest < 1:
        raise ValueError(f"smallest must lie between 0 and 1, got {smallest}.")
    coefficients = []
    low, high = smallest, 1.0
    for _ in range(num_steps):
        high *= _MARGIN
        a, b, c = _best_quintic(max(low, _SMALLEST_RATIO * high), high)
        coefficients.append((a, b, c))
        # It swings between 1 - E at the lower end and 1 + E at the upper one; below the former
        # it rises from 0.
        peak = 1 + abs(1 - _value(a, b, c, high))
        low, high = min(2 - peak, _value(a, b, c, low)), peak
    return tuple(coefficients)


def _best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Return the (a, b, c) with the least `max |1 - a s - b s^3 - c s^5|` over [low, high].

    By Chebyshev, the error of the best one has the same size E and alternating signs at four
    points. Two are the ends of the interval, the other two the extrema inside. Remez: solve for (a,
    b, c, E) with guessed points, take the extrema of the result as the next guess.
    """
    first, second = (3 * low + high) / 4, (low + 3 * high) / 4
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    a = b = c = 0.0
    for _ in range(_EXCHANGES):
        s = np.array([low, first, second, high])
        # a s + b s^3 + c s^5 + (+-E) = 1
        system = np.stack([s, s**3, s**5, signs], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4)).tolist()
        # p' = a + 3 b s^2 + 5 c s^4 is zero at the extrema.
        root = np.sqrt(9 * b**2 - 20 * a * c)
        first = float(np.sqrt((-3 * b - root) / (10 * c)))
        second = float(np.sqrt((-3 * b + root) / (10 * c)))
    return a, b, c


def _value(a: float, b: float, c: float, s: float) -> float:
    return a * s + b * s**3 + c * s**5


# -- exact -------------------------------------------------------------------------------------


def exact_polar(rtol: float | None = None) -> Polar:
    """Make a function that computes polar factors by singular value decompositions.

    `U V'` of `X = U diag(s) V'`. It is for tests and small matrices: decompositions do not run at
    the speed of products.

    Args:
      rtol: singular values of at most `rtol` times the largest have no direction, and are zero in
        the result too: it is a partial isometry, as unique as X. None takes the precision of the
        floats times the longer side.

    Returns:
      The function from `[s, i, o]` to an array like it. Of zeros it gives zeros; a matrix that is
      not finite gives NaN.

    Raises:
      ValueError: rtol is negative.

    Cost: with n the shorter side and m the longer about `14 n^2 m + 8 n^3` multiplications.

    Example: a matrix of rank one keeps its rank.
      >>> import jax.numpy as jnp, curvax
      >>> polar = curvax.optim.exact_polar()
      >>> polar(jnp.array([[[0.0, 5.0], [0.0, 0.0]]])).tolist()
      [[[0.0, 1.0], [0.0, 0.0]]]
    """
    if rtol is not None:
        check_at_least(0, rtol=rtol)

    def polar(V: Matrices) -> Matrices:
        precision = jnp.finfo(V.dtype).eps * max(V.shape[1:])
        cutoff = precision if rtol is None else rtol
        # NaN must not get into LAPACK, whose iterations may not end then.
        is_finite = jnp.isfinite(V).all(axis=(1, 2), keepdims=True)
        finite = jnp.where(is_finite, V, 0)
        largest = jnp.broadcast_to(_largest(finite), V.shape)
        U, s, Vt = _decomposed(safe_divide(finite, largest))
        # Strictly above, so that zeros have no direction with any cutoff.
        has_direction = s > cutoff * s[:, :1]
        factor = matmul(U * has_direction[:, None, :], Vt)
        return jnp.where(is_finite, factor, jnp.nan)

    return polar


def _decomposed(X: Matrices) -> tuple[Array, Array, Array]:
    """Decompose into U, s and V'; on CPUs one slice after another, which is faster there."""

    def of_slice(x: Array) -> tuple[Array, Array, Array]:
        U, s, Vt = jnp.linalg.svd(at_least_float32(x), full_matrices=False)
        return U, s, Vt

    if jax.default_backend() != "cpu":
        return of_slice(X)
    result: tuple[Array, Array, Array] = lax.map(one_after_another(of_slice), X)
    return result
