"""K-FAC without a learning rate: rate, momentum and damping are chosen by the quadratic model."""

from __future__ import annotations

import optax
from jaxtyping import Array, Int

from curvax import kron
from curvax.kron import Layout
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._kfac import scale_by_kfac
from curvax.optim._levenberg_marquardt import levenberg_marquardt
from curvax.optim._quadratic_model import quadratic_model
from curvax.optim._refresh import Interval, check_interval, growing_interval


def kfac_auto(
    objective: Objective,
    layout: Layout,
    damping: float | Array = 0.1,
    curvature_every: Interval = 1,
    inverse_every: Interval = 1,
    min_damping: float = 1e-3,
    seed: int | Int[Array, ""] = 0,
    fisher: str = "mc",
) -> optax.GradientTransformationExtraArgs:
    """K-FAC that tunes itself: no learning rate, no momentum, and a damping that adapts.

    This is `levenberg_marquardt(quadratic_model(rule, objective), objective, damping)` around the
    rule `estimating(scale_by_kfac(layout, inverse_every=...), estimator)`: each step minimizes the
    quadratic model of the batch's loss over the direction of K-FAC and the previous step, and every
    five steps the damping follows how well that model predicted the loss.

    Args:
      objective: the `curvax.Objective` that is minimized.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      damping: the first damping, in units of an eigenvalue of the curvature.
      curvature_every: number of steps between estimates of factors. They begin with one in each
        step and get rarer, see `curvax.optim.growing_interval`; a schedule is used as it is.
      inverse_every: number of steps between inversions, likewise.
      min_damping: the smallest damping. On small batches the model of one batch is trusted too
        much if this is far below the mean eigenvalue of the curvature.
      seed: the seed of sampled targets.
      fisher: "mc", "exact" or "empirical", see `curvax.kron_factors`.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer; call `update(grads, state, params,
      batch=batch)` with gradients of the same batch. The state is a `LevenbergMarquardtState`.

    Raises:
      ValueError, TypeError: As the functions that it is composed of do.

    Cost: `kfac`'s, a linearization with two products of the Jacobian in every step (about a
      gradient), and about one more gradient in every fifth.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> tx = curvax.kfac_auto(objective, layout)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradient = jax.grad(objective)(params, batch)
      ...     updates, state = tx.update(gradient, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> bool(objective(params, batch) < 1e-3)
      True

    References: Martens and Grosse (2015), https://arxiv.org/abs/1503.05671, sections 6.4 (rate),
      6.5 (damping) and 7 (momentum).

    Deviates: one damping serves the quadratic model and the Kronecker factors, where section 6.6
      adapts a separate gamma for the factors.
    """
    check_interval(curvature_every=curvature_every, inverse_every=inverse_every)
    estimator = kron.estimator(objective, layout, fisher=fisher)
    rule = scale_by_kfac(layout, inverse_every=growing_interval(inverse_every))
    estimated = estimating(rule, estimator, growing_interval(curvature_every), seed)
    # Sections 6.4 and 7: rate and momentum minimize the quadratic model; section 6.5: damping.
    stepping = quadratic_model(estimated, objective)
    return levenberg_marquardt(stepping, objective, damping, bounds=(min_damping, 1e8))
