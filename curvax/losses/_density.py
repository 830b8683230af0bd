"""The loss of models that give log densities themselves: flows, autoregressive densities."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._types import Outputs, PRNGKey, Scalar, at_least_float32
from curvax.losses._likelihoods import check_entries
from curvax.losses._loss import Loss, from_function

LogDensities = Float[Array, "batch ..."]


def negative_log_density() -> Loss:
    """Minus the log densities that a model gives to its data, summed over a row, mean over rows.

    The loss is linear in the outputs, `-f`, so that its curvature in them is zero and so is the
    Gauss-Newton matrix. Of the Fisher matrices of the density there are two:

    * the empirical one, of gradients at the data: `fisher="empirical"` of `curvax.kfac`,
      `curvax.ekfac` and `curvax.kron_factors`; `curvax.empirical_fishervp`;
    * the Fisher, of gradients at draws from the model, which this loss cannot make: the same
      functions on a batch of them. The example builds an estimator so.

    The Hessian of the parameters (`curvax.newton_cg`, `curvax.hvp`) is another choice.

    Returns:
      A `Loss` for outputs `[batch, ...]`, log densities of a row or of its parts. There are no
      targets: give `None`.

    Example: a Gaussian of unknown mean w; its Fisher is 1.
      >>> import jax, jax.numpy as jnp, curvax
      >>> log_density = lambda w, x: -0.5 * (x - w["mean"]) ** 2
      >>> objective = curvax.Objective(log_density, curvax.losses.negative_log_density())
      >>> params, batch = {"mean": jnp.zeros(1)}, (jnp.array([[1.0], [3.0]]), None)
      >>> jax.grad(objective)(params, batch)["mean"].tolist()
      [-2.0]
      >>> matvec = curvax.empirical_fishervp(objective, params, batch)
      >>> round(matvec({"mean": jnp.ones(1)})["mean"].item(), 4)                      # (1 + 9) / 2
      5.0
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> def fisher(params, batch, key):
      ...     draws = params["mean"] + jax.random.normal(key, (10_000, 1))
      ...     drawn = draws, None
      ...     options = {"fisher": "empirical"}
      ...     return curvax.kron_factors(objective, layout, params, drawn, key, **options)
      >>> factors = fisher(params, batch, jax.random.key(0))
      >>> round(factors.diagonal["['mean']"].mean.item(), 1)
      1.0
      >>> rule = curvax.estimating(curvax.scale_by_kfac(layout), fisher)

    References: Martens (2020), New insights and perspectives on the natural gradient method,
      sections 5 and 11, https://arxiv.org/abs/1412.1193.
    """

    def value(outputs: LogDensities, targets: Any) -> Scalar:
        del targets
        check_entries("negative_log_density", outputs, outputs)
        f = at_least_float32(outputs)
        return -jnp.sum(f) / f.shape[0]

    # Linear in f: the derivative is constant.
    def curvature_product(
        outputs: LogDensities,
        targets: Any,
        v: LogDensities,
    ) -> LogDensities:
        del targets, v
        return jnp.zeros_like(outputs)

    def pseudo_gradient(
        key: PRNGKey,
        outputs: LogDensities,
        targets: Any,
    ) -> Outputs:
        """Raise: log densities do not say how to draw data."""
        del key, outputs, targets
        raise TypeError(
            "negative_log_density cannot sample: log densities do not say how to draw data. Take "
            'fisher="empirical" (curvax.kfac, ekfac, kron_factors), or for the Fisher the same on '
            "a batch of draws from the model, as the docstring of negative_log_density shows."
        )

    return from_function(
        value, curvature_product=curvature_product, pseudo_gradient=pseudo_gradient
    )
