"""K-FAC: the gradient times the damped inverse of Kronecker factors that are averaged over steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvax import kron
from curvax._checks import check_choice, check_decay
from curvax._types import Params, Scalar
from curvax.kron import Factors, Layout
from curvax.kron._factors import init_factors
from curvax.kron._operator import (
    DAMPING_SCHEMES,
    BlockSpectrum,
    KronOperator,
    diagonal_operator,
    kron_operator,
)
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._kl_clip import kl_clip
from curvax.optim._kronecker import BlockStates, KronRule, scale_by_kron


def scale_by_kfac(
    layout: Layout,
    damping: optax.ScalarOrSchedule = 1e-3,
    inverse_every: int | Int[Array, ""] = 1,
    decay: float | Float[Array, ""] = 0.95,
    damping_scheme: str = "factored",
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by the damped inverse of Kronecker-factored curvature, given as data.

    `A <- decay A + (1 - decay) A_new` and likewise G, with bias correction; every `inverse_every` steps
    `P = (A + pi sqrt(damping) I)^-1`, `Q = (G + sqrt(damping) / pi I)^-1`; the step is `P V Q` for each block V of the
    updates.

    Args:
      layout: of `curvax.kron_layout`.
      damping: in units of an eigenvalue of the curvature: a number, or a schedule of the step. An update that is given
        `damping=` (`curvax.levenberg_marquardt` does) takes that instead.
      inverse_every: steps between inversions, which wait for the next curvature if there is none in that step; step 0
        inverts.
      decay: of the running averages of factors.
      damping_scheme: "factored" or "exact" damping, see `curvax.kron_inverse`.
      stagger: spread the inversions of blocks over the `inverse_every` steps, for an even time per step; they then do not
        wait.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *, curvature=None, damping=None)`;
      curvature are the `Factors` of `curvax.kron_factors`. Leaves that a mask or partition has taken out are left out, and
      with them the blocks they are in. State is a `ScaleByKronState`.

    Raises:
      ValueError: damping that is not positive; unknown schemes; `inverse_every` below 1; updates or curvature of another
        layout.

    Cost: `in out (in + out)` multiplications a block and step; `in^3 + out^3` every `inverse_every` steps. Memory:
      `2 (in^2 + out^2)` floats a block.

    Example: Kronecker blocks by K-FAC, everything else by Adam (a fallback); factors from a quarter of the batch.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda p, x: (x @ p["w"]) * p["s"], curvax.losses.squared_error())
      >>> params, batch = {"w": jnp.ones((3, 2)), "s": jnp.ones(2)}, (jnp.ones((8, 3)), jnp.zeros((8, 2)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout)
      >>> groups = {"kron": curvax.scale_by_kfac(layout, inverse_every=10), "diagonal": optax.scale_by_adam()}
      >>> tx = optax.chain(
      ...     curvax.estimating(
      ...         optax.partition(groups, layout.labels(params)), curvax.on_fraction(estimator, 0.25), curvature_every=2),
      ...     optax.trace(0.9), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(0.1))
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)

    References: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature.

    Deviates: averages are bias-corrected with a constant decay, where the paper has `min(1 - 1/k, 0.95)` at step k.
    """
    check_choice("damping_scheme", damping_scheme, DAMPING_SCHEMES)
    method = KronRule(
        factors=lambda curvature: curvature,
        start=partial(_nothing, damping_scheme),
        refresh=partial(_invert, damping_scheme),
        finish=None,
        power=lambda own, factors, block_state, damping: KronOperator(
            block_state, diagonal_operator(factors.diagonal, damping)
        ),
    )
    return scale_by_kron(layout, method, damping, inverse_every, decay, stagger)


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    layout: Layout,
    damping: optax.ScalarOrSchedule = 1e-3,
    curvature_every: int | Int[Array, ""] = 1,
    inverse_every: int | Int[Array, ""] = 1,
    momentum: float | Float[Array, ""] = 0.9,
    max_kl: float | None = 1e-3,
    seed: int | Int[Array, ""] = 0,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: natural gradient with Kronecker factors of the Fisher, sampled from the model's own predictions.

    `estimating(scale_by_kfac(layout, damping, inverse_every), kron_factors)`, then the limit of `kl_clip`, momentum and the
    learning rate.

    Args:
      learning_rate: number or schedule.
      objective: a `curvax.Objective` whose loss samples.
      layout: of `curvax.kron_layout(objective, params, batch)`.
      damping: in units of an eigenvalue of the curvature; number or schedule.
      curvature_every: steps between estimates of factors; step 0 estimates.
      inverse_every: steps between inversions; step 0 inverts.
      momentum: decay of the sum of past steps, as in `optax.trace`.
      max_kl: limit of the symmetric Kullback-Leibler divergence of a step before momentum, see `curvax.kl_clip`; None for
        no limit. Without it, steps in directions that the sampled factors have hardly seen can be so long that training
        diverges.
      seed: of the sampled targets.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: at trace time, as `scale_by_kfac`, `kron_factors` and `curvax.estimating`.

    Cost: with every interval 1 a backward pass without kernels' gradients, `n (in^2 + out^2) / 2` multiplications for
      the factors of n positions, `in^3 + out^3` for inverses, and `in out (in + out)` for the step. Memory:
      `2 (in^2 + out^2)` floats a block, and a buffer for momentum.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> tx = curvax.kfac(0.5, objective, curvax.kron_layout(objective, params, batch), damping=1e-6)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(objective)(params, batch), state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(objective(params, batch) < 1e-3)
      True

      What else there is comes by composition. Damping adapted, learning rate and momentum of the quadratic model:
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout)
      >>> rule = curvax.estimating(curvax.scale_by_kfac(layout, damping_scheme="exact"), estimator)
      >>> tx = curvax.levenberg_marquardt(curvax.quadratic_model(rule, objective), objective, damping=1.0)

      Weight decay comes between the limit and the learning rate:
      >>> tx = optax.chain(
      ...     curvax.kl_clip(rule, learning_rate=0.1), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(0.1))

    References: Martens and Grosse (2015).
    """
    estimator = kron.estimator(objective, layout)
    rule = scale_by_kfac(layout, damping, inverse_every)
    return with_limit_momentum_and_rate(
        estimating(rule, estimator, curvature_every, seed), max_kl, momentum, learning_rate
    )


def with_limit_momentum_and_rate(
    rule: optax.GradientTransformation,
    max_kl: float | None,
    momentum: Any,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Finish a rule as an optimizer: limit its step, add momentum (no buffer where it is 0), apply the learning rate."""
    check_decay(momentum=momentum)
    limited = rule if max_kl is None else kl_clip(rule, learning_rate, max_kl)
    without_momentum = isinstance(momentum, int | float) and momentum == 0
    sum_of_steps = [] if without_momentum else [optax.trace(momentum)]
    return optax.chain(limited, *sum_of_steps, optax.scale_by_learning_rate(learning_rate))


def _nothing(damping_scheme: str, own: Layout, params: Params) -> BlockStates:
    inverse = jax.eval_shape(
        lambda factors: kron_operator(own, factors, 1.0, damping_scheme).blocks,
        init_factors(own, params),
    )
    zeros: BlockStates = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), inverse)
    return zeros


def _invert(
    damping_scheme: str, own: Layout, factors: Factors, block_state: BlockStates, damping: Scalar
) -> tuple[BlockStates, dict[str, BlockSpectrum]]:
    del block_state
    operator = kron_operator(own, factors._replace(diagonal={}), damping, damping_scheme)
    return dict(operator.blocks), dict(operator.spectra)
