"""Losses of a Gaussian whose mean and variance are both outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax._checks import describe
from curvax._trees import cast_like
from curvax._types import Outputs, PRNGKey, Scalar, at_least_float32
from curvax.losses._likelihoods import check_entries, every_axis
from curvax.losses._loss import Loss, from_function

Gaussians = tuple[Array, Array]
"""Mean and log-variance."""


def gaussian() -> Loss:
    """Gaussian negative log-likelihood with learned variance, summed over a row, mean over rows.

    Per entry, with mean m and log-variance s: `1/2 (s + (y - m)^2 e^-s + log 2 pi)`. Its Hessian is
    indefinite where the residual is small, so the curvature is the Fisher information
    `diag(e^-s, 1/2)`.

    Returns:
      A `Loss` for outputs `(mean, log_variance)`, a pair of arrays `[batch, ...]`, and targets of
      that shape.

    Deviates: `curvature_product` is the Fisher, not the Hessian; both agree in expectation over y.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> f = (jnp.zeros((5, 1)), jnp.full((5, 1), jnp.log(4.0)))
      >>> v = (jnp.ones((5, 1)), jnp.ones((5, 1)))
      >>> m, s = curvax.losses.gaussian().curvature_product(f, jnp.zeros((5, 1)), v)
      >>> [round(5 * x[0, 0].item(), 4) for x in (m, s)]
      [0.25, 0.5]
    """

    # m, s: mean and log-variance [batch, ...], y: targets [batch, ...]
    def read(outputs: Gaussians, targets: Array) -> tuple[Array, Array, Array]:
        m, s = _check_gaussians("gaussian", outputs)
        check_entries("gaussian", m, targets)
        return m, s, jnp.asarray(targets, m.dtype)

    def value(outputs: Gaussians, targets: Array) -> Scalar:
        m, s, y = read(outputs, targets)
        twice_the_cost = s + (y - m) ** 2 * jnp.exp(-s) + math.log(2 * math.pi)
        return 0.5 * jnp.sum(twice_the_cost) / m.shape[0]

    # Fisher information of an entry, over n rows: diag(e^-s, 1/2) / n.
    def curvature_product(
        outputs: Gaussians,
        targets: Array,
        v: Gaussians,
    ) -> Outputs:
        """Multiply mean and log-variance by their Fisher information."""
        _, s, _ = read(outputs, targets)
        return _by_entry(outputs, _fisher_information(s), v)

    def sample(
        key: PRNGKey,
        outputs: Gaussians,
        targets: Array,
    ) -> Array:
        m, s, _ = read(outputs, targets)
        # e^(s/2) is the standard deviation.
        noise = jax.random.normal(key, m.shape, m.dtype)
        return m + jnp.exp(0.5 * s) * noise

    return from_function(
        value, curvature_product=curvature_product, sample=sample, block_axes=every_axis
    )


def gaussian_kl() -> Loss:
    """Divergence `KL(N(m, e^s) || N(0, 1))` of a predicted Gaussian, the second part of an ELBO.

    Per entry, with mean m and log-variance s: `1/2 (m^2 + e^s - s - 1)`, summed over a row, mean
    over rows. The curvature is the Fisher information of the Gaussian, `diag(e^-s, 1/2)`.

    Returns:
      A `Loss` for outputs `(mean, log_variance)`, a pair of float arrays `[batch, ...]`. There are
      no targets: give `None`.

    Deviates: `curvature_product` is not the Hessian of the divergence, `diag(1, e^s / 2)`, which it
      is equal to at the prior.

    Example: an ELBO is the sum of two heads of one model, see `tests/recipes/test_vae.py`.
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.gaussian_kl()
      >>> round(loss((jnp.ones((5, 3)), jnp.zeros((5, 3))), None).item(), 4)          # 3 * 1/2
      1.5
      >>> elbo = curvax.losses.weighted_sum({
      ...     "reconstruction": (1.0, curvax.losses.sigmoid_cross_entropy()),
      ...     "kl": (1.0, loss),
      ... })

    References: Kingma and Welling (2014), Auto-encoding variational Bayes, appendix B,
      https://arxiv.org/abs/1312.6114.
    """

    # Two curvatures would do, both positive and equal at the prior: the Hessian of the divergence
    # diag(1, e^s / 2), and the Fisher diag(e^-s, 1/2) of the Gaussian, which measures how far the
    # distribution itself moves. For a sharp one, s << 0, the Hessian has nearly no curvature in s
    # (Newton's step from s = -5 is +147), so it is the Fisher here. A VAE of digits trains alike
    # with both: K-FAC reaches 193.8 and 192.1 after 40 steps, from 448.
    def value(outputs: Gaussians, targets: Any) -> Scalar:
        del targets
        m, s = _check_gaussians("gaussian_kl", outputs)
        # e^s - 1 without the cancellation near s = 0, where posteriors collapse.
        twice_the_divergence = m**2 + jnp.expm1(s) - s
        return 0.5 * jnp.sum(twice_the_divergence) / m.shape[0]

    def curvature_product(
        outputs: Gaussians,
        targets: Any,
        v: Gaussians,
    ) -> Outputs:
        """Multiply mean and log-variance by their Fisher information."""
        del targets
        _, s = _check_gaussians("gaussian_kl", outputs)
        return _by_entry(outputs, _fisher_information(s), v)

    # S is diagonal: with random signs z, r = S^1/2 z has E[r r'] = S, and r_i^2 = S_ii every time.
    def pseudo_gradient(
        key: PRNGKey,
        outputs: Gaussians,
        targets: Any,
    ) -> Outputs:
        """Draw a sign for every entry, times the root of its curvature."""
        del targets
        _, s = _check_gaussians("gaussian_kl", outputs)
        n = s.shape[0]
        roots = [jnp.sqrt(n * c) for c in _fisher_information(s)]
        keys = jax.random.split(key)
        signs = [jax.random.rademacher(k, s.shape, s.dtype) for k in keys]
        return _by_entry(outputs, roots, signs)

    # The divergence is a mean over the Gaussian already.
    def sample(
        key: PRNGKey,
        outputs: Gaussians,
        targets: Any,
    ) -> Any:
        del key, outputs
        return targets

    return from_function(
        value,
        curvature_product=curvature_product,
        sample=sample,
        pseudo_gradient=pseudo_gradient,
        block_axes=every_axis,
    )


def _check_gaussians(name: str, outputs: Any) -> tuple[Array, Array]:
    """Return mean and log-variance in at least float32, or raise unless they are a pair of them."""
    if not isinstance(outputs, tuple | list) or len(outputs) != 2:
        raise TypeError(f"{name} needs outputs (mean, log_variance), got {describe(outputs)}.")
    mean, log_variance = outputs
    check_entries(name, mean, mean)
    check_entries(name, log_variance, mean)
    return at_least_float32(mean), at_least_float32(log_variance)


def _fisher_information(log_variance: Array) -> list[Array]:
    """Return what an entry of N(m, e^s) tells about m and about s, `(e^-s, 1/2)`."""
    return [jnp.exp(-log_variance), jnp.full_like(log_variance, 0.5)]


def _by_entry(
    outputs: Gaussians,
    diagonals: list[Array],
    v: Sequence[Array],
) -> Outputs:
    """Multiply v by a diagonal matrix for mean and log-variance, as that of the mean over rows."""
    n = diagonals[0].shape[0]
    pairs = zip(diagonals, v, strict=True)
    products = [diagonal * at_least_float32(x) / n for diagonal, x in pairs]
    # The pair may be a tuple or a list.
    by_output = jax.tree.unflatten(jax.tree.structure(outputs), products)
    return cast_like(by_output, outputs)
