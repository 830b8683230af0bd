"""AdaHessian: Adam with the Hessian diagonal in place of the gradient's second moment."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import check_at_least, check_decay, check_precision
from curvax._types import Batch, Params, PRNGKey
from curvax.estimate import hutchinson_diagonal
from curvax.objective import Objective
from curvax.optim._averaging import Averaging, spatial_average
from curvax.optim._diagonal import scale_by_diagonal, with_decay_and_rate
from curvax.optim._estimating import estimating
from curvax.products import hvp


class AdaHessianInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      mean_curvature: mean over all entries of `sqrt(v / (1 - b2^r))`, the curvature in use.
      num_nonfinite: steps so far whose gradient or curvature was not finite.
    """

    mean_curvature: Float[Array, ""]
    num_nonfinite: Int[Array, ""]


def scale_by_adahessian(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    hessian_power: float = 1.0,
    averaging: Averaging | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by AdaHessian's rule, with the (signed) curvature diagonal given as data.

    ```
    m = b1 m + (1 - b1) g
    D = averaging(|c|),  v = b2 v + (1 - b2) D^2       when update(..., curvature=c)
    u = m / (1 - b1^t) / ((v / (1 - b2^r))^(hessian_power / 2) + eps)
    ```
    after t steps and r refreshes. Before the first curvature the updates are zero.

    Args:
      b1: decay of the gradient average.
      b2: decay of the average of squared curvatures, once a refresh.
      eps: added outside the power.
      hessian_power: in [0, 1]; 1 is a Newton-like step, 0 plain momentum.
      averaging: of `|c|` within each leaf: `curvax.optim.spatial_average()` (default), `curvax.optim.block_average(32)`, or
        `lambda tree: tree` for none.

    Returns:
      `optax.GradientTransformationExtraArgs`: `update(updates, state, params, *, curvature=None)`, curvature a tree like
      params (leaves that the updates do not hold are ignored), or None to go on with what the state holds. A step with a
      non-finite gradient emits NaN and leaves the state as it was; a non-finite curvature is not taken in; both are
      counted in `state.info`.

    Raises:
      ValueError: `hessian_power` outside [0, 1]; at trace time: a curvature unlike the updates (naming the first path).
      TypeError: a hyperparameter that arrives in 16 bits.

    Cost: two trees like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.scale_by_adahessian(b1=0.0, b2=0.0, eps=0.0)
      >>> updates, _ = tx.update(jnp.array([1.0, 9.0]), tx.init(jnp.zeros(2)), curvature=jnp.array([-2.0, 3.0]))
      >>> [round(u, 6) for u in updates.tolist()]
      [0.5, 3.0]

    References: Yao et al. (2021), AdaHessian, algorithm 1, and the reference code. Deviates from the paper, as the code
    does: the absolute value is taken before averaging, not after.
    """
    check_decay(b1=b1, b2=b2)
    if isinstance(hessian_power, int | float) and not 0 <= hessian_power <= 1:
        raise ValueError(f"hessian_power must lie in [0, 1], got {hessian_power}.")
    check_at_least(0, eps=eps)
    check_precision(b1=b1, b2=b2, eps=eps, hessian_power=hessian_power)
    smooth = spatial_average() if averaging is None else averaging

    def average(nu: PyTree[Array], curvature: PyTree[Array]) -> PyTree[Array]:
        return optax.tree.update_moment(smooth(jax.tree.map(jnp.abs, curvature)), nu, b2, 2)

    def step(
        mu: PyTree[Array], nu: PyTree[Array], count: Array, num_refreshes: Array
    ) -> tuple[PyTree[Array], Array]:
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(
            nu, b2, jnp.maximum(num_refreshes, 1)
        )  # no refresh yet: nu = 0, not 0/0
        steps = jax.tree.map(lambda m, v: m / (v ** (hessian_power / 2) + eps), mu_hat, nu_hat)
        total = optax.tree.sum(jax.tree.map(lambda v: jnp.sum(jnp.sqrt(v)), nu_hat))
        return steps, jnp.asarray(total / max(optax.tree.size(nu), 1))

    return scale_by_diagonal(b1, average, step, AdaHessianInfo)


def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    hessian_power: float = 1.0,
    curvature_every: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdaHessian: Adam's form, with Hutchinson's estimate of the Hessian diagonal as second moment.

    Curvature: Hessian; structure: diagonal, by one Rademacher probe, averaged over spatial or input axes; refresh: every
    `curvature_every` steps. `theta -= learning_rate (u + weight_decay theta)` with u of `scale_by_adahessian`. The
    composition is
    ```
    estimator = lambda params, batch, key: hutchinson_diagonal(hvp(objective, params, batch), params, key).mean
    optax.chain(
        estimating(scale_by_adahessian(b1, b2, eps, hessian_power), estimator, curvature_every, seed),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    ```
    which is also how to get at anything else: `averaging=curvax.optim.block_average(32)`, more probes, the Gauss-Newton matrix
    (`ggnvp` in place of `hvp`), masks, groups.

    Args:
      learning_rate: number or schedule; the paper uses 0.15 for image models.
      objective: a `curvax.Objective`.
      b1: decay of the gradient average.
      b2: decay of the average of squared curvatures.
      eps: added outside the power.
      weight_decay: decoupled, times the learning rate.
      hessian_power: in [0, 1].
      curvature_every: steps between refreshes.
      seed: of the probes.

    Returns:
      `optax.GradientTransformationExtraArgs`: `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: at trace time: no `batch=` or `params`; an interval below 1; `hessian_power` outside [0, 1].

    Cost: at interval 1, about 3 gradients in FLOPs with the step's own, which XLA shares.

    Example: one step solves a separable quadratic
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> tx = curvax.adahessian(1.0, objective, b1=0.0, b2=0.0, eps=0.0)
      >>> w, batch = jnp.array([3.0, -2.0]), (jnp.array([[1.0, 5.0]]), jnp.zeros((1, 2)))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> (w + updates).tolist(), optax.tree.get(state, "info").mean_curvature.item()
      ([0.0, 0.0], 13.0)

    References: Yao et al. (2021), AdaHessian: an adaptive second order optimizer for machine learning, algorithm 1.
    """

    def estimator(params: Params, batch: Batch, key: PRNGKey) -> PyTree[Array]:
        return hutchinson_diagonal(hvp(objective, params, batch), params, key).mean

    rule = estimating(
        scale_by_adahessian(b1, b2, eps, hessian_power), estimator, curvature_every, seed
    )
    return with_decay_and_rate(rule, weight_decay, learning_rate)
