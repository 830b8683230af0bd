"""Losses that are negative log-likelihoods with independent entries: Bernoulli, Gaussian, Poisson."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Shaped

from curvax._checks import describe
from curvax._types import Outputs, PRNGKey, Scalar, at_least_float32
from curvax.losses._loss import Loss, from_function

Entries = Shaped[Array, "batch ..."]


def sigmoid_cross_entropy() -> Loss:
    """Sigmoid (Bernoulli) cross-entropy of logits, summed over the entries of a row, mean over rows.

    Per entry `log(1 + e^f) - y f`; curvature `p (1 - p)` with `p = sigmoid(f)`.

    Returns:
      A `Loss` for outputs `[batch, ...]` and targets of that shape with values in [0, 1] (bool, integer or float).

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> round(curvax.losses.sigmoid_cross_entropy()(jnp.zeros((5, 2)), jnp.ones((5, 2))).item(), 4)     # 2 log 2
      1.3863
    """
    return _independent_entries(
        "sigmoid_cross_entropy",
        cost=lambda f, y: jax.nn.softplus(f) - y * f,
        curvature=lambda f: jax.nn.sigmoid(f) * jax.nn.sigmoid(-f),
        draw=lambda key, f: jax.random.bernoulli(key, jax.nn.sigmoid(f)).astype(f.dtype),
    )


def squared_error() -> Loss:
    """Half the squared error, `1/2 |f - y|^2` summed over the entries of a row, mean over rows; curvature I per row.

    The negative log-likelihood of a unit-variance Gaussian, up to a constant.

    Returns:
      A `Loss` for outputs `[batch, ...]` and targets of that shape.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.losses.squared_error()(jnp.zeros((5, 4)), jnp.ones((5, 4))).item()
      2.0
    """
    return _independent_entries(
        "squared_error",
        cost=lambda f, y: 0.5 * (f - y) ** 2,
        curvature=jnp.ones_like,
        draw=lambda key, f: f + jax.random.normal(key, f.shape, f.dtype),
    )


def poisson() -> Loss:
    """Poisson negative log-likelihood of log-rates, summed over the entries of a row, mean over rows.

    Per entry `e^f - y f + log y!`; curvature `e^f`. Above a rate of a million, counts are drawn from the normal
    distribution of the same mean and variance. Sampling needs JAX's default (threefry) keys.

    Returns:
      A `Loss` for outputs `[batch, ...]` (log of the rate) and counts of that shape as targets.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.losses.poisson()(jnp.zeros((5, 3)), jnp.ones((5, 3), int)).item()
      3.0
    """
    return _independent_entries(
        "poisson",
        cost=lambda f, y: jnp.exp(f) - y * f + gammaln(y + 1),
        curvature=jnp.exp,
        draw=_draw_poisson,
    )


def gaussian() -> Loss:
    """Gaussian negative log-likelihood with learned variance, summed over the entries of a row, mean over rows.

    Per entry, with mean m and log-variance s: `1/2 (s + (y - m)^2 e^-s + log 2 pi)`. Its Hessian is indefinite where the
    residual is small, so the curvature is the Fisher information `diag(e^-s, 1/2)`.

    Returns:
      A `Loss` for outputs `(mean, log_variance)`, a pair of arrays `[batch, ...]`, and targets of that shape.

    Deviates: `curvature_product` is the Fisher, not the Hessian; both agree in expectation over y.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> f = (jnp.zeros((5, 1)), jnp.full((5, 1), jnp.log(4.0)))
      >>> v = (jnp.ones((5, 1)), jnp.ones((5, 1)))
      >>> m, s = curvax.losses.gaussian().curvature_product(f, jnp.zeros((5, 1)), v)
      >>> [round(5 * x[0, 0].item(), 4) for x in (m, s)]
      [0.25, 0.5]
    """

    # m, s: mean and log-variance [batch, ...]
    def read(outputs: tuple[Array, Array], targets: Array) -> tuple[Array, Array, Array]:
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            raise TypeError(
                f"gaussian needs outputs (mean, log_variance), got {describe(outputs)}."
            )
        m, s = outputs
        _check_entries("gaussian", m, targets)
        _check_entries("gaussian", s, targets)
        m, s = at_least_float32(m), at_least_float32(s)
        return m, s, jnp.asarray(targets, m.dtype)

    def value(outputs: tuple[Array, Array], targets: Array) -> Scalar:
        m, s, y = read(outputs, targets)
        return 0.5 * jnp.sum(s + (y - m) ** 2 * jnp.exp(-s) + math.log(2 * math.pi)) / m.shape[0]

    def curvature_product(
        outputs: tuple[Array, Array], targets: Array, v: tuple[Array, Array]
    ) -> Outputs:
        _, s, _ = read(outputs, targets)
        dm, ds = map(at_least_float32, v)
        n = s.shape[0]
        products = (
            (jnp.exp(-s) * dm / n).astype(outputs[0].dtype),
            (0.5 * ds / n).astype(outputs[1].dtype),
        )
        return jax.tree.unflatten(jax.tree.structure(outputs), products)

    def sample(key: PRNGKey, outputs: tuple[Array, Array], targets: Array) -> Array:
        m, s, _ = read(outputs, targets)
        return m + jnp.exp(0.5 * s) * jax.random.normal(key, m.shape, m.dtype)

    return from_function(value, curvature_product=curvature_product, sample=sample)


def _draw_poisson(key: PRNGKey, f: Float[Array, "..."]) -> Float[Array, "..."]:
    rate, largest = jnp.exp(f), 1e6  # JAX draws int32 counts
    normal = rate + jnp.sqrt(rate) * jax.random.normal(jax.random.fold_in(key, 1), f.shape, f.dtype)
    counts = jax.random.poisson(key, jnp.minimum(rate, largest)).astype(f.dtype)
    return jnp.where(rate > largest, normal, counts)


def _independent_entries(
    name: str,
    *,
    cost: Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, "..."]],
    curvature: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    draw: Callable[[PRNGKey, Float[Array, "..."]], Float[Array, "..."]],
) -> Loss:
    """Build the loss that adds `cost(f, y)` over the entries of a row and averages over rows."""

    def value(outputs: Entries, targets: Entries) -> Scalar:
        _check_entries(name, outputs, targets)
        f = at_least_float32(outputs)
        return jnp.sum(cost(f, jnp.asarray(targets, f.dtype))) / f.shape[0]

    def curvature_product(outputs: Entries, targets: Entries, v: Entries) -> Entries:
        _check_entries(name, outputs, targets)
        product = curvature(at_least_float32(outputs)) * at_least_float32(v) / outputs.shape[0]
        return product.astype(outputs.dtype)

    def sample(key: PRNGKey, outputs: Entries, targets: Entries) -> Entries:
        _check_entries(name, outputs, targets)
        return draw(key, at_least_float32(outputs))

    return from_function(value, curvature_product=curvature_product, sample=sample)


def _check_entries(name: str, outputs: Array, targets: Array) -> None:
    dtype = getattr(outputs, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or outputs.ndim < 1:
        raise ValueError(f"{name} needs float outputs [batch, ...], got {describe(outputs)}.")
    if jnp.shape(targets) != outputs.shape or jnp.issubdtype(
        jnp.result_type(targets), jnp.complexfloating
    ):
        raise ValueError(
            f"targets {describe(targets)} do not fit outputs {describe(outputs)}: "
            f"{name} needs real targets of shape {list(outputs.shape)}."
        )
