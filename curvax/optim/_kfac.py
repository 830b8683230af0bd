"""K-FAC: the gradient times the damped inverse of running averages of Kronecker factors."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvax import kron
from curvax._checks import check_choice
from curvax._types import Params, Scalar
from curvax.kron import Factors, Layout
from curvax.kron._factors import init_factors
from curvax.kron._operator import (
    DAMPING_SCHEMES,
    KronOperator,
    diagonal_operator,
    kron_operator,
)
from curvax.kron._placement import Placement
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._kronecker import BlockStates, KronRule, Refreshed, scale_by_kron
from curvax.optim._refresh import Interval, check_interval, growing_interval
from curvax.optim._relative_damping import RelativeDamping


def scale_by_kfac(
    layout: Layout,
    damping: optax.ScalarOrSchedule | RelativeDamping = 1e-2,
    inverse_every: Interval = 1,
    decay: float | Float[Array, ""] = 0.95,
    damping_scheme: str = "factored",
    stagger: bool = False,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by the damped inverse of Kronecker-factored curvature, given as data.

    `A <- decay A + (1 - decay) A_new` and likewise G, with bias correction; every `inverse_every`
    steps `P = (A + pi sqrt(damping) I)^-1`, `Q = (G + sqrt(damping) / pi I)^-1`; the step is `P V
    Q` for each block V of the updates.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      damping: in units of an eigenvalue of the curvature: a number, or a schedule of the step; or a
        `curvax.optim.RelativeDamping`, a fraction of the mean eigenvalue. An update that is passed
        `damping=` (`curvax.levenberg_marquardt` does so) uses that instead.
      inverse_every: number of steps between inversions. They wait for the next curvature if a step
        brings none; step 0 inverts.
      decay: decay of the running averages of factors.
      damping_scheme: "factored" or "exact" damping, see `curvax.kron_inverse`.
      stagger: True spreads the inversions of blocks over the `inverse_every` steps, for an even
        time per step; they then do not wait.
      placement: a `curvax.kron_placement` of the layout: factors, inverses and the work on them are
        spread over the devices of a mesh. Diagnostics are of its owner blocks. None leaves all that
        to the compiler, which does it on every device.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None, damping=None)`. The curvature is the `Factors` returned by
      `curvax.kron_factors`. Leaves that a mask or partition has removed are left out, and with them
      the blocks they are in. `curvax.optim.curvature_rule` says what happens with numbers that are
      not finite. The state is a `ScaleByKronState`.

    Raises:
      ValueError: The damping is not positive, the scheme is unknown, `inverse_every` is below 1, or
        updates, curvature or placement are of another layout.

    Cost: `in out (in + out)` multiplications a block and step; `in^3 + out^3` every `inverse_every`
      steps. Memory: `2 (in^2 + out^2)` floats a block. With a placement each device has its share
      of both, in padded slices, and sends the steps of its own.

    Example: Kronecker blocks by K-FAC, everything else by Adam (a fallback); factors from a quarter
      of the batch.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> model = lambda p, x: (x @ p["w"]) * p["s"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"w": jnp.ones((3, 2)), "s": jnp.ones(2)}
      >>> batch = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout)
      >>> kfac, adam = curvax.scale_by_kfac(layout, inverse_every=10), optax.scale_by_adam()
      >>> rule = optax.partition({"kron": kfac, "diagonal": adam}, layout.labels(params))
      >>> quarter = curvax.on_fraction(estimator, 0.25)
      >>> tx = optax.chain(
      ...     curvax.estimating(rule, quarter, curvature_every=2),
      ...     optax.trace(0.9),
      ...     optax.add_decayed_weights(1e-4),
      ...     optax.scale_by_learning_rate(0.1),
      ... )
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)

    References: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored
      approximate curvature, https://arxiv.org/abs/1503.05671, sections 5 (averages) and 6.3
      (factored damping).

    Deviates: averages are bias-corrected with a constant decay, where the paper has `min(1 - 1/k,
      0.95)` at step k.
    """
    check_choice("damping_scheme", damping_scheme, DAMPING_SCHEMES)
    # The averages of section 5 are all that K-FAC averages, and the inverse follows from them.
    method = KronRule(
        factors=_all_factors,
        init_block_state=partial(_init_inverse, damping_scheme),
        refresh=partial(_invert, damping_scheme),
        average_block_state=None,
        power=_power,
    )
    return scale_by_kron(layout, method, damping, inverse_every, decay, stagger, placement)


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    layout: Layout,
    damping: optax.ScalarOrSchedule | RelativeDamping = 1e-2,
    curvature_every: Interval = 1,
    inverse_every: Interval = 1,
    momentum: float | Float[Array, ""] = 0.9,
    max_kl: float | None = 1e-3,
    seed: int | Int[Array, ""] = 0,
    fisher: str = "mc",
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: natural gradient with Kronecker factors of the Fisher.

    This is `estimating(scale_by_kfac(layout, damping, inverse_every), kron.estimator(objective,
    layout, fisher=fisher))`, followed by the limit of `kl_clip`, momentum and the learning rate.

    Args:
      learning_rate: a number or a schedule; 0.1 is a good start, with momentum 0.9.
      objective: the `curvax.Objective` that is minimized.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      damping: a number or a schedule, in units of an eigenvalue of the curvature, or a
        `curvax.optim.RelativeDamping`. The default is for losses in nats: with it, all tasks of
        `examples/benchmarks/robust.py` train at rates two decades apart.
      curvature_every: number of steps between estimates of factors. They begin with one in each
        step and get rarer, see `curvax.optim.growing_interval`; a schedule is used as it is.
      inverse_every: number of steps between inversions, likewise.
      momentum: decay of the sum of past steps, as in `optax.trace`; the number 0 leaves out the
        buffer.
      max_kl: limit of the symmetric Kullback-Leibler divergence of a step before momentum, see
        `curvax.kl_clip`; None means no limit. Without it, steps in directions that the sampled
        factors have hardly seen can be so long that training diverges.
      seed: the seed of the sampled targets.
      fisher: "mc", targets sampled from the model, for losses that can sample; "exact", their
        expectation, for models with few outputs; "empirical", the batch's own targets, for losses
        that have no other Fisher (log densities). See `curvax.kron_factors`.
      placement: as in `scale_by_kfac`; estimates are made for it.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: At trace time, as `scale_by_kfac`, `kron_factors` and
        `curvax.estimating` do.

    Cost: with every interval 1 a backward pass without kernels' gradients, `n (in^2 + out^2) / 2`
      multiplications for the factors of n positions, `in^3 + out^3` for inverses, and `in out (in +
      out)` for the step. Memory: `2 (in^2 + out^2)` floats a block, and a buffer for momentum.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> tx = curvax.kfac(0.5, objective, layout, damping=1e-6)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradient = jax.grad(objective)(params, batch)
      ...     updates, state = tx.update(gradient, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(objective(params, batch) < 1e-3)
      True

      Everything else comes by composition. Damping adapted, learning rate and momentum of the
        quadratic model:
      >>> estimator = curvax.kron.estimator(objective, layout)
      >>> rule = curvax.estimating(curvax.scale_by_kfac(layout, damping_scheme="exact"), estimator)
      >>> inner = curvax.quadratic_model(rule, objective)
      >>> tx = curvax.levenberg_marquardt(inner, objective, damping=1.0)

      Weight decay comes between the limit and the learning rate:
      >>> limited = curvax.kl_clip(rule, learning_rate=0.1)
      >>> decayed = optax.chain(limited, optax.add_decayed_weights(1e-4))
      >>> tx = optax.chain(decayed, optax.scale_by_learning_rate(0.1))

    References: Martens and Grosse (2015), https://arxiv.org/abs/1503.05671; Ba, Grosse and Martens
      (2017) for the limit.
    """
    check_interval(curvature_every=curvature_every, inverse_every=inverse_every)
    # Martens and Grosse (2015), section 5: by default targets are sampled from the model, for with
    # those of the data the factors are those of the empirical Fisher matrix.
    rule = scale_by_kfac(layout, damping, growing_interval(inverse_every), placement=placement)
    estimator = kron.estimator(objective, layout, fisher=fisher, placement=placement)
    estimated = estimating(rule, estimator, growing_interval(curvature_every), seed)
    return finish(estimated, learning_rate, max_kl=max_kl, momentum=momentum)


def _all_factors(curvature: Factors) -> Factors:
    # EK-FAC's curvature holds more than factors; this one does not.
    return curvature


# Everything below goes through the inverses of `curvax.kron`.


def _init_inverse(damping_scheme: str, layout: Layout, params: Params) -> BlockStates:
    """Return zeros in the shapes of the blocks' inverses."""

    # Only shapes are read from the result, so any damping will do.
    def invert(factors: Factors) -> BlockStates:
        return dict(kron_operator(layout, factors, 1.0, damping_scheme).blocks)

    shapes = jax.eval_shape(invert, init_factors(layout, params))
    zeros: BlockStates = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return zeros


def _invert(
    damping_scheme: str,
    layout: Layout,
    factors: Factors,
    block_state: BlockStates,
    damping: Scalar,
) -> Refreshed:
    """Return the damped inverse of every block, and what its spectrum is known to be."""
    # Section 6.3: P = (A + pi sqrt(damping) I)^-1 and Q = (G + sqrt(damping) / pi I)^-1, where pi^2
    # is the mean eigenvalue of A over that of G; or, by the scheme "exact", (A x G + damping I)^-1.
    del block_state
    inverse = kron_operator(layout, factors, damping, damping_scheme)
    return dict(inverse.blocks), dict(inverse.spectra)


def _power(
    layout: Layout, factors: Factors, block_state: BlockStates, damping: Scalar
) -> KronOperator:
    """Return the inverse to apply: that of the state, and `1 / (diagonal + damping)` elsewhere."""
    # The blocks keep the damping of their refresh until the next one; a diagonal costs nothing to
    # invert, so it has the damping of this step.
    del layout
    return KronOperator(block_state, diagonal_operator(factors.diagonal, damping))
