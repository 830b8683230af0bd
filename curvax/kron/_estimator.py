"""Estimators of Kronecker-factored curvature, for `curvax.estimating`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvax._types import Batch, Params, PRNGKey
from curvax.kron._accumulate import kron_factors
from curvax.kron._layout import Layout
from curvax.objective import Objective


def estimator(
    objective: Objective,
    layout: Layout,
    estimate: Callable[..., Any] = kron_factors,
    **options: Any,
) -> Callable[[Params, Batch, PRNGKey], Any]:
    """Return the function `(params, batch, key) -> curvature` that `curvax.estimating` takes.

    Args:
      objective: the `curvax.Objective` whose curvature is estimated.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      estimate: `curvax.kron_factors` for `scale_by_kfac`, `curvax.kron.eigen_curvature` for
        `scale_by_ekfac`.
      **options: keyword arguments of `estimate`, such as `fisher="exact"` or `microbatch=32`.

    Cost: that of `estimate`.

    Example: K-FAC with the exact Fisher instead of a sampled one.
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> exact = curvax.kron.estimator(objective, layout, fisher="exact")
      >>> tx = curvax.estimating(curvax.scale_by_kfac(layout), exact)
    """

    # Layout and options are closed over: `estimating` calls every estimator in the same way.
    def estimate_curvature(params: Params, batch: Batch, key: PRNGKey) -> Any:
        return estimate(objective, layout, params, batch, key, **options)

    return estimate_curvature
