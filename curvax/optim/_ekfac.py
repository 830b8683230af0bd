"""EK-FAC: second moments of gradients, averaged in the eigenbasis of Kronecker factors."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvax import kron
from curvax._checks import check_choice, check_precision
from curvax._types import Params, Scalar
from curvax._xla import refresh_if
from curvax.kron import (
    Basis,
    EigenCurvature,
    Factors,
    Layout,
    WeightedMean,
    kron_basis,
    moving_average,
)
from curvax.kron._eigenbasis import BASIS_METHODS, TrackedBasis
from curvax.kron._factors import init_factors
from curvax.kron._kron_factor import Eigen
from curvax.kron._moments import EigenFactors, carried_moments, decompose, moments_in, track
from curvax.kron._operator import (
    KronOperator,
    eigen_spectrum,
    kron_operator,
    shifted_damping,
)
from curvax.kron._owner_moments import owner_moments
from curvax.kron._placement import OwnerBlock, Placement
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._kronecker import BlockStates, KronRule, Refreshed, scale_by_kron
from curvax.optim._refresh import Interval, check_interval, growing_interval
from curvax.optim._relative_damping import RelativeDamping


class EigenBlockState(NamedTuple):
    """What EK-FAC holds of a block besides its factors.

    Attributes:
      basis: eigenvectors of both factors.
      moments: running average of second moments in that basis, `[stack, in (+ 1), out]`.
    """

    basis: Basis
    moments: WeightedMean


def scale_by_ekfac(
    layout: Layout,
    damping: optax.ScalarOrSchedule | RelativeDamping = 1e-1,
    inverse_every: Interval = 1,
    decay: float | Float[Array, ""] = 0.95,
    stagger: bool = False,
    basis: str = "eigh",
    tolerance: float = 0.0,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide by damped second moments in the eigenbasis of Kronecker factors, given as data.

    Every `inverse_every` steps `A = Q_A D_A Q_A'`, `G = Q_G D_G Q_G'`, of running averages; with
    every curvature `M <- decay M + (1 - decay) sum_b (Q_A' D_b Q_G)^2`, with bias correction; the
    step is `Q_A ((Q_A' V Q_G) / (M + damping)) Q_G'` for each block V of the updates. When the
    basis changes, M goes along: it becomes the diagonal, in the new basis, of the matrix that it
    was in the old one.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      damping: in units of an eigenvalue of the curvature: a number, or a schedule of the step; or a
        `curvax.optim.RelativeDamping`, a fraction of the mean eigenvalue. An update that is passed
        `damping=` uses that instead.
      inverse_every: number of steps between eigendecompositions, as in `scale_by_kfac`.
      decay: decay of the running averages of factors and moments.
      stagger: True spreads the decompositions of blocks over the `inverse_every` steps.
      basis: "eigh" decomposes factors anew; "qr" turns the basis in use by one step
        `Q <- qr(A Q)`, after a first decomposition. It needs no `eigh` after that, which is slow on
        accelerators, and serves as well where factors change by little between refreshes.
      tolerance: a factor keeps its basis where taking it for diagonal there is a relative error of
        at most this much, `|B - diag B| <= tolerance |B|` with `B = Q'AQ`. That costs a product, a
        third of the decomposition on CPUs. 0 never skips. (`age` in the Info counts from the latest
        check.)
      placement: a `curvax.kron_placement` of the layout, as in `scale_by_kfac`. With every
        curvature bases are sent to all devices, where the rows are, and moments to their owners.
        A `tolerance` is of factors with their padding, which makes the relative error smaller.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None, damping=None)`. The curvature is the `EigenCurvature` returned by
      `curvax.kron.eigen_curvature`. Masks, numbers that are not finite, state and Info are treated
      as in `scale_by_kfac`; the state of a block is an `EigenBlockState`.

    Raises:
      ValueError: As `scale_by_kfac` does.

    Cost: `2 in out (in + out)` multiplications a block and step, eigendecompositions (about `10
      (in^3 + out^3)`) every `inverse_every` steps. Memory: `2 (in^2 + out^2) + in out` floats a
      block. On two CPU cores, on an autoencoder with layers of up to 1,000 units, a step took 8 of
      Adam's with curvature in each step and a basis every 10, and 4.5 with both every 10.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> model = lambda p, x: (x @ p["w"]) * p["s"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"w": jnp.ones((3, 2)), "s": jnp.ones(2)}
      >>> batch = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout, curvax.kron.eigen_curvature)
      >>> rule = curvax.estimating(curvax.scale_by_ekfac(layout, inverse_every=10), estimator)
      >>> tx = optax.chain(rule, optax.scale_by_learning_rate(0.1))
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)

    References: George et al. (2018), Fast approximate natural gradient descent in a
      Kronecker-factored eigenbasis, https://arxiv.org/abs/1806.03884.

    Deviates: moments are carried into a new basis, where the paper starts them anew.
    """
    check_choice("basis", basis, BASIS_METHODS)
    check_precision(tolerance=tolerance)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}.")
    refresh = _refresh_basis
    # A new decomposition does not depend on the basis before.
    if basis != "eigh" or tolerance > 0:
        refresh = partial(_turn_basis, tolerance, basis)
    # George et al. (2018), algorithm 1: the basis is costly and is kept for some steps; the moments
    # are cheap and follow every curvature.
    method = KronRule(
        factors=_factors_of,
        init_block_state=_init_eigen,
        refresh=refresh,
        average_block_state=partial(_average_moments, decay, placement),
        power=_power,
    )
    return scale_by_kron(layout, method, damping, inverse_every, decay, stagger, placement)


def ekfac(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    layout: Layout,
    damping: optax.ScalarOrSchedule | RelativeDamping = 1e-1,
    curvature_every: Interval = 1,
    inverse_every: Interval = 1,
    momentum: float | Float[Array, ""] = 0.9,
    max_kl: float | None = 1e-3,
    seed: int | Int[Array, ""] = 0,
    fisher: str = "mc",
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """EK-FAC: natural gradient, diagonal in the eigenbasis of Kronecker factors of the Fisher.

    This is `estimating(scale_by_ekfac(layout, damping, inverse_every), estimator)` with the
    estimator `kron.estimator(objective, layout, kron.eigen_curvature, fisher=fisher)`, followed by
    the limit of `kl_clip`, momentum and the learning rate.

    Args:
      learning_rate: a number or a schedule; 0.1 is a good start, with momentum 0.9.
      objective: the `curvax.Objective` that is minimized; its model must not mix examples.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      damping: a number or a schedule, in units of an eigenvalue of the curvature, or a
        `curvax.optim.RelativeDamping`. The default is for losses in nats: with it, a classifier
        with a head of zeros, a transformer and a flow train at rates two decades apart
        (`tests/optim/test_robust.py`).
      curvature_every: number of steps between estimates of factors and moments. They begin with
        one in each step and get rarer, see `curvax.optim.growing_interval`; a schedule is used as
        it is.
      inverse_every: number of steps between eigendecompositions, likewise.
      momentum: decay of the sum of past steps, as in `optax.trace`; the number 0 leaves out the
        buffer.
      max_kl: limit of the symmetric Kullback-Leibler divergence of a step before momentum, see
        `curvax.kl_clip`; None means no limit. Without it, steps in directions that the sampled
        factors have hardly seen can be so long that training diverges.
      seed: the seed of the sampled targets.
      fisher: "mc", targets sampled from the model, for losses that can sample; "exact", their
        expectation, for models with few outputs; "empirical", the batch's own targets, for losses
        that have no other Fisher (log densities). See `curvax.kron.eigen_curvature`.
      placement: as in `scale_by_ekfac`; estimates are made for it.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: At trace time, as `scale_by_ekfac`, `eigen_curvature` and
        `curvax.estimating` do.

    Cost: that of `scale_by_ekfac`, and that of `kfac` for the factors. Memory: `2 (in^2 + out^2) +
      in out` floats a block, and a buffer for momentum.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> tx = curvax.ekfac(0.1, objective, layout, damping=1e-3)
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

    References: George et al. (2018), https://arxiv.org/abs/1806.03884.
    """
    check_interval(curvature_every=curvature_every, inverse_every=inverse_every)
    # Moments need the gradients of single examples, so this curvature keeps inputs and cotangents.
    estimator = kron.estimator(
        objective, layout, kron.eigen_curvature, fisher=fisher, placement=placement
    )
    rule = scale_by_ekfac(layout, damping, growing_interval(inverse_every), placement=placement)
    estimated = estimating(rule, estimator, growing_interval(curvature_every), seed)
    return finish(estimated, learning_rate, max_kl=max_kl, momentum=momentum)


def _factors_of(curvature: EigenCurvature) -> Factors:
    return curvature.factors


def _average_moments(
    decay: float | Array,
    placement: Placement | None,
    layout: Layout,
    block_state: BlockStates,
    curvature: EigenCurvature,
) -> BlockStates:
    """Average second moments in the basis in use: `M <- decay M + (1 - decay) M_new`."""
    averages = dict(block_state)
    for block in layout.blocks:
        basis, moments = block_state[block.name]
        # George et al. (2018), algorithm 1: M_new = sum_b (Q_A' D_b Q_G)^2, with D_b = a_b g_b'.
        if isinstance(block, OwnerBlock) and placement is not None:
            of_batch = owner_moments(placement, block, basis, curvature)
        else:
            of_batch = moments_in(block, basis, curvature)
        # Sum and weight decay alike and M is their ratio, which makes it free of bias.
        weight = jnp.broadcast_to(curvature.terms, moments.weight.shape)
        new = WeightedMean(curvature.terms * of_batch, weight)
        averages[block.name] = EigenBlockState(basis, moving_average(moments, new, decay))
    return averages


# Everything below goes through the eigenbases and inverses of `curvax.kron`.


def _init_eigen(layout: Layout, params: Params) -> BlockStates:
    """Return zeros in the shapes of the blocks' eigenbases and second moments."""
    factors = init_factors(layout, params)
    # For the shapes alone: zeros have no eigenbasis worth computing.
    basis = jax.eval_shape(partial(kron_basis, layout), factors)
    states: BlockStates = {}
    for block in layout.blocks:
        dtype = factors.blocks[block.name].g.total.dtype
        vectors = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), basis[block.name])
        # With weight 0, so that the first curvature's moments are the whole average.
        weight_shape = block.shape[:1] if block.is_joined else ()
        moments = WeightedMean(jnp.zeros(block.shape, dtype), jnp.zeros(weight_shape, dtype))
        states[block.name] = EigenBlockState(vectors, moments)
    return states


def _refresh_basis(
    layout: Layout, factors: Factors, block_state: BlockStates, damping: Scalar
) -> Refreshed:
    """Decompose the averages, `A = Q_A D_A Q_A'`, and carry second moments into the new basis."""
    states: BlockStates = {}
    spectra = {}
    for name, (a, g) in decompose(layout.blocks, factors).items():
        old, basis = block_state[name], Basis(a.vectors, g.vectors)
        # M <- (R_A * R_A) M (R_G * R_G)' with R = Q_new' Q_old: the same matrix, its diagonal in
        # the new basis.
        moments = carried_moments(old.basis, basis, old.moments)
        states[name] = EigenBlockState(basis, moments)
        # Diagnostics are of A x G, as in K-FAC: M goes on changing between refreshes.
        amount = shifted_damping(damping, name, factors)
        spectra[name] = eigen_spectrum(a, g, amount)
    return states, spectra


def _turn_basis(
    tolerance: float,
    method: str,
    layout: Layout,
    factors: Factors,
    block_state: BlockStates,
    damping: Scalar,
) -> Refreshed:
    """Turn the bases in use to those of the averages, and carry second moments along."""
    bases = {block.name: block_state[block.name].basis for block in layout.blocks}
    states: BlockStates = {}
    spectra = {}
    for name, (a, g) in track(layout.blocks, factors, bases, tolerance, method).items():
        old, basis = block_state[name], Basis(_good(a), _good(g))

        def carried(basis: Basis, old: EigenBlockState) -> EigenBlockState:
            moments = carried_moments(old.basis, basis, old.moments)
            return EigenBlockState(basis, moments)

        def same(basis: Basis, old: EigenBlockState) -> EigenBlockState:
            return EigenBlockState(basis, old.moments)

        # Where both factors keep their bases, so do the moments.
        is_turned = jnp.any(a.is_turned) | jnp.any(g.is_turned)
        states[name] = refresh_if(is_turned, carried, same, basis, old)
        amount = shifted_damping(damping, name, factors)
        eigen_a, eigen_g = Eigen(a.values, basis.a), Eigen(g.values, basis.g)
        spectra[name] = eigen_spectrum(eigen_a, eigen_g, amount)
    return states, spectra


def _good(tracked: TrackedBasis) -> Array | None:
    """Return a basis with NaN where its factor is not finite, by which `KronRule` knows a failure.

    It then counts that, and keeps the last good state of the block.
    """
    if tracked.basis is None:
        return None
    is_finite = tracked.is_finite[:, None, None]
    return jnp.where(is_finite, tracked.basis, jnp.nan)


def _power(
    layout: Layout, factors: Factors, block_state: BlockStates, damping: Scalar
) -> KronOperator:
    """Return the inverse to apply: `1 / (M + damping)` in each block's eigenbasis."""
    # Algorithm 1: Q_A ((Q_A' V Q_G) / (M + damping)) Q_G'. Nothing is inverted in advance, so the
    # damping of this step acts at once.
    basis, moments = {}, {}
    for block in layout.blocks:
        basis[block.name], moments[block.name] = block_state[block.name]
    return kron_operator(layout, EigenFactors(basis, moments, factors.diagonal), damping)
