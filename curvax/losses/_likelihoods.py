"""Negative log-likelihoods of independent entries with one parameter each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Shaped

from curvax._checks import describe
from curvax._types import PRNGKey, Scalar, at_least_float32
from curvax.losses._loss import Loss, from_function

Entries = Shaped[Array, "batch ..."]


def sigmoid_cross_entropy() -> Loss:
    """Sigmoid (Bernoulli) cross-entropy of logits, summed over a row, mean over rows.

    Per entry `log(1 + e^f) - y f`; curvature `p (1 - p)` with `p = sigmoid(f)`.

    Returns:
      A `Loss` for outputs `[batch, ...]` and targets of that shape with values in [0, 1] (bool,
      integer or float).

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.sigmoid_cross_entropy()
      >>> round(loss(jnp.zeros((5, 2)), jnp.ones((5, 2))).item(), 4)      # 2 log 2
      1.3863
    """

    def cost(f: Array, y: Array) -> Array:
        return jax.nn.softplus(f) - y * f

    # 1 - p is sigmoid(-f), without the cancellation where p rounds to 1.
    def curvature(f: Array) -> Array:
        return jax.nn.sigmoid(f) * jax.nn.sigmoid(-f)

    def draw(key: PRNGKey, f: Array) -> Array:
        p = jax.nn.sigmoid(f)
        return jax.random.bernoulli(key, p).astype(f.dtype)

    return _independent_entries("sigmoid_cross_entropy", cost, curvature, draw)


def squared_error() -> Loss:
    """Half the squared error, `1/2 |f - y|^2` summed over the entries of a row, mean over rows.

    It is the negative log-likelihood of a unit-variance Gaussian, up to a constant; the curvature
    of a row is I.

    Returns:
      A `Loss` for outputs `[batch, ...]` and targets of that shape.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.losses.squared_error()(jnp.zeros((5, 4)), jnp.ones((5, 4))).item()
      2.0
    """

    def cost(f: Array, y: Array) -> Array:
        return 0.5 * (f - y) ** 2

    # The density that belongs to the cost: y ~ N(f, 1).
    def draw(key: PRNGKey, f: Array) -> Array:
        noise: Array = jax.random.normal(key, f.shape, f.dtype)
        return f + noise

    return _independent_entries("squared_error", cost, jnp.ones_like, draw)


def poisson() -> Loss:
    """Poisson negative log-likelihood of log-rates, summed over a row, mean over rows.

    Per entry `e^f - y f + log y!`; curvature `e^f`. Above a rate of a million, counts are drawn
    from the normal distribution of the same mean and variance. Sampling needs JAX's default
    (threefry) keys.

    Returns:
      A `Loss` for outputs `[batch, ...]` (log of the rate) and counts of that shape as targets.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.losses.poisson()(jnp.zeros((5, 3)), jnp.ones((5, 3), int)).item()
      3.0
    """

    # log y! = log Gamma(y + 1)
    def cost(f: Array, y: Array) -> Array:
        return jnp.exp(f) - y * f + gammaln(y + 1)

    return _independent_entries("poisson", cost, jnp.exp, _draw_poisson)


def _draw_poisson(key: PRNGKey, f: Float[Array, "..."]) -> Float[Array, "..."]:
    """Draw counts of rate e^f; above a million from N(rate, rate), which is close there."""
    rate = jnp.exp(f)
    # JAX draws int32 counts, which a larger rate would overflow.
    largest = 1e6
    noise = jax.random.normal(jax.random.fold_in(key, 1), f.shape, f.dtype)
    normal = rate + jnp.sqrt(rate) * noise
    counts = jax.random.poisson(key, jnp.minimum(rate, largest)).astype(f.dtype)
    return jnp.where(rate > largest, normal, counts)


def _independent_entries(
    name: str,
    cost: Callable[[Array, Array], Array],
    curvature: Callable[[Array], Array],
    draw: Callable[[PRNGKey, Array], Array],
) -> Loss:
    """Build the loss that adds `cost(f, y)` over the entries of a row and averages over rows.

    `curvature` gives the second derivative of the cost by entry, `draw` targets from the model's
    own density.
    """

    def value(outputs: Entries, targets: Entries) -> Scalar:
        check_entries(name, outputs, targets)
        f = at_least_float32(outputs)
        y = jnp.asarray(targets, f.dtype)
        return jnp.sum(cost(f, y)) / f.shape[0]

    # The Hessian is diagonal, since entries are independent; 1/B, as that of the mean over rows.
    def curvature_product(
        outputs: Entries,
        targets: Entries,
        v: Entries,
    ) -> Entries:
        check_entries(name, outputs, targets)
        diagonal = curvature(at_least_float32(outputs))
        product = diagonal * at_least_float32(v) / outputs.shape[0]
        return product.astype(outputs.dtype)

    def sample(
        key: PRNGKey,
        outputs: Entries,
        targets: Entries,
    ) -> Entries:
        check_entries(name, outputs, targets)
        return draw(key, at_least_float32(outputs))

    return from_function(
        value, curvature_product=curvature_product, sample=sample, block_axes=every_axis
    )


def every_axis(outputs: Any, targets: Any) -> int:
    """Return the number of axes: the curvature of independent entries is diagonal."""
    del targets
    return int(jax.tree.leaves(outputs)[0].ndim)


def check_entries(
    name: str,
    outputs: Any,
    targets: Any,
) -> None:
    """Raise unless outputs are floats and targets are real numbers of the same shape."""
    dtype = getattr(outputs, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or outputs.ndim < 1:
        raise ValueError(f"{name} needs float outputs [batch, ...], got {describe(outputs)}.")
    # A shape that merely broadcasts, [batch] against [batch, 1], would add B^2 costs.
    is_complex = jnp.issubdtype(jnp.result_type(targets), jnp.complexfloating)
    if jnp.shape(targets) != outputs.shape or is_complex:
        raise ValueError(
            f"targets {describe(targets)} do not fit outputs {describe(outputs)}: "
            f"{name} needs real targets of shape {list(outputs.shape)}."
        )
