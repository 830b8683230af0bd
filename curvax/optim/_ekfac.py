"""EK-FAC: second moments of gradients, averaged in the eigenbasis of Kronecker factors."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvax import kron
from curvax._types import Params, Scalar
from curvax.kron import Factors, Layout, kron_basis, moving_average
from curvax.kron._factors import WeightedMean, init_factors
from curvax.kron._gradient_pairs import Basis, block_moments
from curvax.kron._moments import EigenCurvature, EigenFactors, carried_moments, decompose
from curvax.kron._operator import BlockSpectrum, KronOperator, eigen_spectrum, kron_operator
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._kfac import with_limit_momentum_and_rate
from curvax.optim._kronecker import BlockStates, KronRule, scale_by_kron


class EigenBlockState(NamedTuple):
    """What EK-FAC holds of a block besides its factors.

    Attributes:
      basis: eigenvectors of both sides.
      moments: running average of second moments in that basis, `[stack, in (+ 1), out]`.
    """

    basis: Basis
    moments: WeightedMean


def scale_by_ekfac(
    layout: Layout,
    damping: optax.ScalarOrSchedule = 1e-3,
    inverse_every: int | Int[Array, ""] = 1,
    decay: float | Float[Array, ""] = 0.95,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Divide by damped second moments in the eigenbasis of Kronecker factors, given as data.

    Every `inverse_every` steps `A = Q_A D_A Q_A'`, `G = Q_G D_G Q_G'`, of running averages; with every curvature
    `M <- decay M + (1 - decay) sum_b (Q_A' D_b Q_G)^2`, with bias correction; the step is
    `Q_A ((Q_A' V Q_G) / (M + damping)) Q_G'` for each block V of the updates. When the basis changes, M goes along: it
    becomes the diagonal, in the new basis, of the matrix that it was in the old one.

    Args:
      layout: of `curvax.kron_layout`.
      damping: in units of an eigenvalue of the curvature: a number, or a schedule of the step. An update that is given
        `damping=` takes that instead.
      inverse_every: steps between eigendecompositions, as in `scale_by_kfac`.
      decay: of the running averages of factors and moments.
      stagger: spread the decompositions of blocks over the `inverse_every` steps.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *, curvature=None, damping=None)`;
      curvature is the `EigenCurvature` of `curvax.kron.eigen_curvature`. Masks, state and Info as in `scale_by_kfac`.

    Raises:
      As `scale_by_kfac`.

    Cost: `2 in out (in + out)` multiplications a block and step, eigendecompositions (about `10 (in^3 + out^3)`) every
      `inverse_every` steps. Memory: `2 (in^2 + out^2) + in out` floats a block.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda p, x: (x @ p["w"]) * p["s"], curvax.losses.squared_error())
      >>> params, batch = {"w": jnp.ones((3, 2)), "s": jnp.ones(2)}, (jnp.ones((8, 3)), jnp.zeros((8, 2)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout, curvax.kron.eigen_curvature)
      >>> rule = curvax.estimating(curvax.scale_by_ekfac(layout, inverse_every=10), estimator)
      >>> tx = optax.chain(rule, optax.scale_by_learning_rate(0.1))
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)

    References: George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored eigenbasis.

    Deviates: moments are carried into a new basis, where the paper starts them again.
    """

    def start(own: Layout, params: Params) -> BlockStates:
        factors = init_factors(own, params)
        basis = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(partial(kron_basis, own), factors)
        )
        dtype = lambda block: factors.blocks[block.name].g.total.dtype
        zeros = lambda block: WeightedMean(
            jnp.zeros(block.shape, dtype(block)), jnp.zeros([], dtype(block))
        )
        return {
            block.name: EigenBlockState(basis[block.name], zeros(block)) for block in own.blocks
        }

    def finish(own: Layout, block_state: BlockStates, curvature: EigenCurvature) -> BlockStates:
        taken = {}
        for block in own.blocks:
            basis, moments = block_state[block.name]
            rows = curvature.inputs[block.name], curvature.cotangents[block.name]
            new = WeightedMean(
                curvature.terms * block_moments(block, basis, *rows), curvature.terms
            )
            taken[block.name] = EigenBlockState(basis, moving_average(moments, new, decay))
        return block_state | taken

    def power(
        own: Layout, factors: Factors, block_state: BlockStates, damping: Scalar
    ) -> KronOperator:
        basis = {block.name: block_state[block.name].basis for block in own.blocks}
        moments = {block.name: block_state[block.name].moments for block in own.blocks}
        return kron_operator(own, EigenFactors(basis, moments, factors.diagonal), damping)

    method = KronRule(lambda curvature: curvature.factors, start, _refresh_basis, finish, power)
    return scale_by_kron(layout, method, damping, inverse_every, decay, stagger)


def ekfac(
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
    """EK-FAC: natural gradient, diagonal in the eigenbasis of Kronecker factors of the Fisher.

    `estimating(scale_by_ekfac(layout, damping, inverse_every), eigen_curvature)`, then the limit of `kl_clip`, momentum and
    the learning rate.

    Args:
      learning_rate: number or schedule.
      objective: a `curvax.Objective` whose loss samples, and whose model does not mix examples.
      layout: of `curvax.kron_layout(objective, params, batch)`.
      damping: in units of an eigenvalue of the curvature; number or schedule.
      curvature_every: steps between estimates of factors and moments; step 0 estimates.
      inverse_every: steps between eigendecompositions; step 0 decomposes.
      momentum: decay of the sum of past steps, as in `optax.trace`.
      max_kl: limit of the symmetric Kullback-Leibler divergence of a step before momentum, see `curvax.kl_clip`; None for
        no limit. Without it, steps in directions that the sampled factors have hardly seen can be so long that training
        diverges.
      seed: of the sampled targets.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: at trace time, as `scale_by_ekfac`, `eigen_curvature` and `curvax.estimating`.

    Cost: as `scale_by_ekfac`; and as `kfac` for the factors. Memory: `2 (in^2 + out^2) + in out` floats a block, and a
      buffer for momentum.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> tx = curvax.ekfac(0.1, objective, curvax.kron_layout(objective, params, batch), damping=1e-3)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(objective)(params, batch), state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(objective(params, batch) < 1e-3)
      True

    References: George et al. (2018).
    """
    estimator = kron.estimator(objective, layout, kron.eigen_curvature)
    rule = scale_by_ekfac(layout, damping, inverse_every)
    return with_limit_momentum_and_rate(
        estimating(rule, estimator, curvature_every, seed), max_kl, momentum, learning_rate
    )


def _refresh_basis(
    own: Layout, factors: Factors, block_state: BlockStates, damping: Scalar
) -> tuple[BlockStates, dict[str, BlockSpectrum]]:
    made, spectra = {}, {}
    for name, (a, g) in decompose(own.blocks, factors).items():
        old, new = block_state[name], Basis(a.vectors, g.vectors)
        made[name] = EigenBlockState(new, carried_moments(old.basis, new, old.moments))
        spectra[name] = eigen_spectrum(a, g, damping)
    return made, spectra
