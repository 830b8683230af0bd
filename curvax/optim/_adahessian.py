"""AdaHessian: Adam with the Hessian diagonal in place of the gradient's second moment."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import check_at_least, check_decay, check_precision
from curvax.objective import Objective
from curvax.optim._averaging import Averaging, spatial_average
from curvax.optim._diagonal import (
    ScaleByDiagonalState,
    hessian_diagonal,
    leaf_average,
    scale_by_diagonal,
)
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._rule import StepContext, StepResult


class AdaHessianInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      mean_curvature: the mean over all entries of `sqrt(v / (1 - b2^r))`, the curvature in use.
      num_nonfinite: the number of steps so far whose gradient or curvature was not finite.
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
      b2: decay of the average of squared curvatures; it acts once a refresh.
      eps: number that is added outside the power.
      hessian_power: in [0, 1]; 1 is a Newton-like step, 0 plain momentum.
      averaging: how `|c|` is averaged within each leaf: `curvax.optim.spatial_average()` (the
        default), `curvax.optim.block_average(32)`, or `lambda tree: tree` for no averaging.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None)`. The curvature is a tree like params, of which leaves that the updates do not
      have are ignored; with None the rule goes on with the average in the state.
      `curvax.optim.curvature_rule` says what happens with numbers that are not finite. The state is
      a `ScaleByDiagonalState`.

    Raises:
      ValueError: `hessian_power` is outside [0, 1]; or, at trace time, the curvature is unlike the
        updates (the message names the first path).
      TypeError: A hyperparameter arrives in 16 bits.

    Cost: two trees like params of state, in at least float32.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.scale_by_adahessian(b1=0.0, b2=0.0, eps=0.0)
      >>> gradient, curvature = jnp.array([1.0, 9.0]), jnp.array([-2.0, 3.0])
      >>> updates, _ = tx.update(gradient, tx.init(jnp.zeros(2)), curvature=curvature)
      >>> [round(u, 6) for u in updates.tolist()]
      [0.5, 3.0]

    References: Yao et al. (2021), AdaHessian: an adaptive second order optimizer for machine
      learning, algorithm 1, https://arxiv.org/abs/2006.00719, and the reference code.

    Deviates: from the paper, as the reference code does: the absolute value is taken before
      averaging, not after.
    """
    check_decay(b1=b1, b2=b2)
    if isinstance(hessian_power, int | float) and not 0 <= hessian_power <= 1:
        raise ValueError(f"hessian_power must lie in [0, 1], got {hessian_power}.")
    check_at_least(0, eps=eps)
    check_precision(b1=b1, b2=b2, eps=eps, hessian_power=hessian_power)
    average_within_leaves = spatial_average() if averaging is None else averaging
    average_of_squares = leaf_average(b2, order=2)

    @jax.jit
    def divide(m: Array, v: Array) -> Array:
        # Algorithm 1: m / (v^(k / 2) + eps). The root of v is a curvature, so k = 1 is a Newton
        # step; eps is outside the power.
        return m / (v ** (hessian_power / 2) + eps)

    def average_curvature(nu: PyTree[Array], curvature: PyTree[Array]) -> PyTree[Array]:
        # Algorithm 1 of Yao et al.: v <- b2 v + (1 - b2) D^2, D = averaging(|c|).
        magnitudes = jax.tree.map(jnp.abs, curvature)
        return jax.tree.map(average_of_squares, average_within_leaves(magnitudes), nu)

    def step(
        state: ScaleByDiagonalState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        del gradient, context
        # Algorithm 1: m / (1 - b1^t) after t steps, v / (1 - b2^r) after r refreshes.
        mu_hat = optax.tree.bias_correction(state.mu, b1, state.count + 1)
        # Before the first refresh nu is 0 and its correction 0 / 0; with one refresh in its place
        # nu stays 0.
        num_refreshes = jnp.maximum(state.num_refreshes, 1)
        nu_hat = optax.tree.bias_correction(state.curvature, b2, num_refreshes)
        steps = jax.tree.map(divide, mu_hat, nu_hat)

        # The mean over all entries of sqrt(v), in units of curvature.
        roots = optax.tree.sum(jax.tree.map(_sum_of_roots, nu_hat))
        mean_curvature = roots / max(optax.tree.size(nu_hat), 1)
        info = {"mean_curvature": mean_curvature}
        return StepResult(updates=steps, state=state, info=info)

    return scale_by_diagonal(b1, average_curvature, step, AdaHessianInfo)


@jax.jit
def _sum_of_roots(v: Array) -> Array:
    return jnp.sum(jnp.sqrt(v))


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

    Curvature: Hessian; structure: diagonal, by one Rademacher probe, averaged over spatial or input
    axes; refresh: every `curvature_every` steps. `theta -= learning_rate (u + weight_decay theta)`
    with u of `scale_by_adahessian`. The composition is
    ```
    rule = scale_by_adahessian(b1, b2, eps, hessian_power)
    optax.chain(
        estimating(rule, curvax.optim.hessian_diagonal(objective), curvature_every, seed),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    ```
    Compose it by hand for anything else: `averaging=curvax.optim.block_average(32)`, more probes,
    the Gauss-Newton matrix (`ggnvp` in place of `hvp`), masks, groups.

    Args:
      learning_rate: a number or a schedule; the paper uses 0.15 for image models.
      objective: the `curvax.Objective` that is minimized.
      b1: decay of the gradient average.
      b2: decay of the average of squared curvatures.
      eps: number that is added outside the power.
      weight_decay: decoupled weight decay; it is multiplied by the learning rate.
      hessian_power: in [0, 1]; 1 is a Newton-like step, 0 plain momentum.
      curvature_every: number of steps between refreshes.
      seed: the seed of the probes.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: `hessian_power` is outside [0, 1] or an interval is below 1; or, at trace time,
        `batch=` or `params` is missing.

    Cost: at interval 1, about 3 gradients in FLOPs with the step's own, which XLA shares.

    Example: one step solves a separable quadratic
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> tx = curvax.adahessian(1.0, objective, b1=0.0, b2=0.0, eps=0.0)
      >>> w, batch = jnp.array([3.0, -2.0]), (jnp.array([[1.0, 5.0]]), jnp.zeros((1, 2)))
      >>> updates, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> (w + updates).tolist(), optax.tree.get(state, "info").mean_curvature.item()
      ([0.0, 0.0], 13.0)

    References: Yao et al. (2021), AdaHessian: an adaptive second order optimizer for machine
      learning, algorithm 1, https://arxiv.org/abs/2006.00719.
    """
    rule = scale_by_adahessian(b1, b2, eps, hessian_power)
    # Algorithm 1, Hutchinson: diag(H) = E[z * H z] for random signs z.
    estimated = estimating(rule, hessian_diagonal(objective), curvature_every, seed)
    return finish(estimated, learning_rate, weight_decay=weight_decay)
