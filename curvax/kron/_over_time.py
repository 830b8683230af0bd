"""The curvature of a kernel that is used at every time of a sequence, and its inverse.

An example's gradient is `sum_t a_t g_t'` over its T times. With the lags `A_k = E[a_(t+k) a_t']`, a
mean over times, and `G_k = E[g_(t+k) g_t']`, a sum over times, its second moment is

    F = sum_(|k| < T) (1 - |k| / T) A_k x G_k,

taken that inputs and cotangents are independent, and stationary in time. The sum has no inverse in
closed form. Martens, Ba and Johnson (2018) take the inputs, and the cotangents, for chains,

    A_k = A^(1/2) Psi_A^k A^(1/2)  for k >= 0,    Psi_A = A^(-1/2) A_1 A^(-1/2),

and invert F in two cases:

"time_symmetric" (their option 1): Psi is replaced by its symmetric part `U diag(psi) U'`. Then all
    products are diagonal together, with the eigenvalues `f(psi_A psi_G')`,
    `f(x) = sum_(|k| < T) (1 - |k| / T) x^|k|`.
"time_infinite" (option 2): T goes to infinity. With the map `Phi(Z) = Psi_A Z Psi_G'` the sum over
    all k is `(1 - Phi')^-1 (1 - Phi' Phi) (1 - Phi)^-1` between factors A^(1/2) and G^(1/2), and
    `Phi' Phi` is diagonal in the eigenvectors of `Psi' Psi`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax.kron._block_operators import (
    BlockOperator,
    BlockSpectrum,
    ChainOperator,
    EigenOperator,
    outer,
)
from curvax.kron._factors import BlockFactors
from curvax.kron._inverse_roots import inverse_roots
from curvax.kron._kron_factor import (
    Full,
    PerSlice,
    Squares,
    eigh_all,
    lower_bound_of_largest,
    matmul,
)
from curvax.kron._layout import Block
from curvax.kron._two_products import FactorPair, damped_factors, kron_products

LARGEST = 1 - 1e-6
"""Eigenvalues of Psi and Psi'Psi are at most that: at 1 a chain never forgets, and F may vanish."""

POWERS = {"time_symmetric": (-1, 1), "time_infinite": (-1,)}
"""Which powers of the curvature are known."""


class Chain(NamedTuple):
    """Inputs or cotangents as a chain, `A_k = A^(1/2) Psi^k A^(1/2)`; `[s, n, n]` each.

    Attributes:
      moment: A, damped.
      root: `A^(-1/2)`.
      psi: Psi, no eigenvalue and no singular value of which is above 1.
    """

    moment: Squares
    root: Squares
    psi: Squares


def power_over_time(
    block: Block, factors: BlockFactors, damping: Any, power: float
) -> tuple[BlockOperator, BlockSpectrum]:
    """Invert the curvature of a block over time, whose lag 0 is damped; or multiply by it."""
    if factors.lags is None:
        raise ValueError(
            f'{block.name} has sharing="{block.sharing}", and its factors have no lags: they were '
            "computed with another layout. Compute them anew, with this one."
        )
    if power not in POWERS[block.sharing]:
        raise ValueError(
            f'{block.name} has sharing="{block.sharing}", of whose curvature the power {power} is '
            f"not known, only {' and '.join(map(str, POWERS[block.sharing]))}. Use "
            f'layout.edit("{block.leaves[0]}", sharing="expand").'
        )
    ((a, g),) = kron_products(block.structures, factors)
    lags = factors.lags.a.mean, factors.lags.g.mean
    length = factors.lags.length.mean
    if block.sharing == "time_symmetric":
        forward, inverse, spectrum = _symmetric((a, g), lags, length, damping)
        return (inverse if power == -1 else forward), spectrum
    chains, spectrum = _infinite((a, g), lags, damping)
    return chains, spectrum


@jax.jit
def _symmetric(
    pair: FactorPair, lags: tuple[Squares, Squares], length: PerSlice, damping: Any
) -> tuple[EigenOperator, EigenOperator, BlockSpectrum]:
    """Return the curvature for symmetric Psi, its inverse, and its spectrum.

    `F = (A^(1/2) U_A x G^(1/2) U_G) diag(f) (...)'`, so that `F^-1` has the roots' inverses.
    """
    chains = damped_chains(pair, lags, damping)
    # The moments of two times, [[I, Psi'], [Psi, I]], are positive semidefinite, and so is I + Psi:
    # the decomposition of factors, which has no negative eigenvalues, is for it.
    shifted = [Full(_identity_like(x.psi) + (x.psi + _t(x.psi)) / 2) for x in chains]
    eigen = eigh_all(shifted)
    psi_a, psi_g = (jnp.clip(x.values - 1, -LARGEST, LARGEST) for x in eigen)
    f = sum_over_lags(outer(psi_a, psi_g), _steps(length)[:, None, None])

    bases: list[Squares] = []
    inverse_bases: list[Squares] = []
    for chain, (_, vectors) in zip(chains, eigen, strict=True):
        assert vectors is not None  # as full factors have them
        # A^(-1/2) U, and A^(1/2) U = A A^(-1/2) U
        inverse_basis = matmul(chain.root, vectors)
        inverse_bases.append(inverse_basis)
        bases.append(matmul(chain.moment, inverse_basis))
    base_a, base_g = bases
    inverse_a, inverse_g = inverse_bases
    forward = EigenOperator(base_a, base_g, f)
    inverse = EigenOperator(inverse_a, inverse_g, 1 / f)
    largest = lower_bound_of_largest(forward.times, forward.diagonal())
    return forward, inverse, _spectrum(pair, inverse, largest)


@jax.jit
def _infinite(
    pair: FactorPair, lags: tuple[Squares, Squares], damping: Any
) -> tuple[ChainOperator, BlockSpectrum]:
    """Return the inverse of the curvature for infinite T, and its spectrum.

    With `Psi'Psi = E diag(mu) E'`, `K = A^(-1/2) E` and `N = A^(-1/2) Psi E` on both sides

      `D = (K_A' V K_G - N_A' V N_G) / (1 - mu_A mu_G')`,   `F^-1 V = K_A D K_G' - N_A D N_G'`.
    """
    chains = damped_chains(pair, lags, damping)
    eigen = eigh_all([Full(matmul(_t(x.psi), x.psi)) for x in chains])
    # Both at their limit, the denominator is 2e-6 and no zero.
    mu_a, mu_g = (jnp.minimum(x.values, LARGEST) for x in eigen)
    k: list[Squares] = []
    n: list[Squares] = []
    for chain, (_, vectors) in zip(chains, eigen, strict=True):
        assert vectors is not None  # as full factors have them
        k.append(matmul(chain.root, vectors))
        n.append(matmul(chain.root, matmul(chain.psi, vectors)))
    inverse = ChainOperator(
        left=k[0],
        right=k[1],
        next_left=n[0],
        next_right=n[1],
        scale=1 / (1 - outer(mu_a, mu_g)),
    )
    # By the inequality of Cauchy and Schwarz `F_jj (F^-1)_jj >= 1` for every j.
    largest = jnp.max(1 / inverse.diagonal(), axis=(1, 2))
    return inverse, _spectrum(pair, inverse, largest)


def damped_chains(
    pair: FactorPair, lags: tuple[Squares, Squares], damping: Any
) -> tuple[Chain, Chain]:
    """Damp A and G, and return both as chains, of `A + pi sqrt(damping) I` and the lag A1.

    So Psi is smaller than without damping: what damping adds forgets from one time to the next.
    """
    a, g = pair
    lag_a, lag_g = lags
    damped_a, damped_g = damped_factors(a, g, damping)
    # A factor c of one row is 1 there, and goes to the other side; so do lags of both.
    c = a.as_multiple()
    if c is not None:
        lag_a, lag_g = _divided(lag_a, c), c[:, None, None] * lag_g
    elif (c := g.as_multiple()) is not None:
        lag_a, lag_g = c[:, None, None] * lag_a, _divided(lag_g, c)
    root_a, root_g = inverse_roots([damped_a, damped_g], [2, 2])

    def chain(damped: Any, root: Any, lag: Squares) -> Chain:
        # A matrix that is not finite has the root of I, which must not pass for one of it.
        is_finite = root.is_finite[:, None, None]
        matrix = jnp.where(is_finite, root.root.matrix, jnp.nan)
        return Chain(damped.matrix, matrix, matmul(matmul(matrix, lag), matrix))

    return chain(damped_a, root_a, lag_a), chain(damped_g, root_g, lag_g)


def sum_over_lags(x: Array, steps: Array) -> Array:
    """Return `f(x) = sum_(|k| < T) (1 - |k| / T) x^|k|` for |x| < 1 and a whole number T of steps.

    It is `(T (1 - x^2) - 2 x (1 - x^T)) / (T (1 - x)^2)`, 1 over T times the gamma of the paper;
    `f(0) = 1` and `f(1) = T`.
    """
    # x^T of a negative x by its sign: for an array of exponents powers of negative numbers are NaN.
    log = jnp.log(jnp.abs(x))
    is_negative = (x < 0) & (steps % 2 == 1)
    # 1 - x^T without cancellation near x = 1.
    complement = jnp.where(is_negative, 1 + jnp.exp(steps * log), -jnp.expm1(steps * log))
    e = 1 - x
    closed = (steps * e * (1 + x) - 2 * x * complement) / (steps * e**2)
    # Near 1 terms of order e cancel to one of order T e^2, and with u = -log x there is the series
    # f = T - (T^2 - 1) u / 3 + T (T^2 - 1) u^2 / 12 - ...; 2e-11 is neglected where it is used.
    u = -log
    excess = steps**2 - 1
    series = steps - excess * u / 3 + steps * excess * u**2 / 12
    return jnp.where((x > 0) & (steps * u < 1e-3), series, closed)


def _steps(length: PerSlice) -> PerSlice:
    """Return T as a whole number: the mean length of ragged sequences is none."""
    # Before the first data (a mean of 0) it is 1, which is F without any lag.
    return jnp.maximum(jnp.round(length), 1)


def _spectrum(
    pair: FactorPair, inverse: EigenOperator | ChainOperator, largest: PerSlice
) -> BlockSpectrum:
    """Return the spectrum of a block with this inverse."""
    a, g = pair
    largest_of_inverse = lower_bound_of_largest(inverse.times, inverse.diagonal())
    return BlockSpectrum(
        trace=a.trace() * g.trace(),
        largest=largest,
        smallest=1 / largest_of_inverse,
    )


def _divided(lag: Squares, c: PerSlice) -> Squares:
    """Divide a lag by lag 0; without any input (0/0) it is 0."""
    safe = jnp.where(c > 0, c, 1)
    return lag / safe[:, None, None]


def _identity_like(matrix: Squares) -> Float[Array, "n n"]:
    return jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)
