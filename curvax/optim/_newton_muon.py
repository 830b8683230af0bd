"""Newton-Muon: the polar factor of gradients that K-FAC's input factor has preconditioned."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from curvax import kron
from curvax._checks import check_at_least, check_choice, check_decay, check_precision
from curvax._trees import safe_divide
from curvax._types import Count
from curvax.kron import Layout, WeightedMean
from curvax.kron._factors import moving_average
from curvax.kron._input_factors import input_factors
from curvax.kron._kron_factor import STRUCTURES, KronFactor, invert_all
from curvax.kron._kron_factor import scaled as multiplied
from curvax.kron._layout import Block
from curvax.kron._lookups import without_lookups
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._matrices import (
    ByBlock,
    Matrices,
    MatrixBlock,
    MatrixMethod,
    scale_by_matrices,
)
from curvax.optim._matrix_parts import ScaleRule, average, identity_like, scaled, shape_norm
from curvax.optim._muon import MuonMemory, mixed
from curvax.optim._polar import Polar, newton_schulz
from curvax.optim._refresh import Interval, check_interval, growing_interval
from curvax.optim._two_rates import finish_with_two_rates

PLACES = ("after", "before")
"""Where momentum may be."""


def scale_by_newton_muon(
    layout: Layout,
    b: float | Float[Array, ""] = 0.95,
    nesterov: bool = True,
    decay: float | Float[Array, ""] = 0.95,
    damping: float | Float[Array, ""] = 0.2,
    refresh_every: Interval = 64,
    momentum_place: str = "after",
    polar: Polar | None = None,
    scale: ScaleRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Take polar factors of gradients times the inverse second moment of the layer's inputs.

    With A the average of K-FAC's input factor, of mean diagonal `r = tr A / i`, and V the gradient
    of a matrix `[i, o]`,

      P = (1 + damping) (A / r + damping I)^-1,
      M <- b M + (1 - b) P V,   U = sqrt(max(1, o / i)) polar(N),

    with Muon's mix N of M and P V. Neither the unit of inputs nor a change of it matters, since A
    is divided by r; white inputs, A = I, give Muon.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`. Tables that
        are only looked up go to the fallback. A side with the structure "identity" is left as it
        is, and so are kernels that are used transposed too.
      b: decay of the momentum M.
      nesterov: as in `curvax.scale_by_muon`.
      decay: decay of the average of A, for each curvature that is passed.
      damping: in units of the mean diagonal of A.
      refresh_every: number of steps between inverses P, or a schedule of it; step 0 computes them.
      momentum_place: "after", the average is over preconditioned gradients, as the authors have it,
        each with the P of its time; "before", it is over gradients, and the latest P is for all.
      polar: how polar factors are computed, see `curvax.scale_by_muon`.
      scale: how long the steps are; by default `curvax.optim.shape_norm()`.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam()`.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None)`. The curvature is what `curvax.kron.input_factors` returns. Before the first
      one updates are zero; a P is the identity until a refresh has seen inputs. The state is a
      `curvax.optim.ScaleByMatricesState`. Where an inverse fails, the last good one goes on and
      `state.info.num_failures` counts.

    Raises:
      ValueError: A decay is not in [0, 1), the damping is negative, the place is unknown,
        `refresh_every` is below 1, or updates or curvature are of another layout.

    Cost: that of `curvax.scale_by_muon`, `i^2 o` multiplications a matrix and step, and `i^3` at a
      refresh. Memory: `2 i^2 + i o` floats a matrix.

    Example: the second input is ten times as large as the first, and so is its row of the gradient.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 2)), (jnp.diag(jnp.array([1.0, 10.0])), jnp.ones((2, 2)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> rule = curvax.scale_by_newton_muon(layout, damping=0.0)
      >>> a = curvax.kron.input_factors(objective, layout, params, batch, jax.random.key(0))
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, _ = rule.update(gradient, rule.init(params), params, curvature=a)
      >>> bool(jnp.allclose(updates[0], 10 * updates[1], rtol=1e-4))
      True

    References: Newton-Muon, https://arxiv.org/abs/2604.01472; Martens and Grosse (2015), section 3,
      https://arxiv.org/abs/1503.05671, for A.

    Deviates: A is divided by its mean diagonal before it is inverted, so that gradients in M weigh
      the same while activations grow; and it begins with the first batch, where the authors' begins
      with 1e-3 I, and inverts after 64 steps. Inputs of four times the width are one matrix,
      theirs four.
    """
    check_decay(b=b, decay=decay)
    check_precision(b=b, decay=decay)
    check_at_least(0, damping=damping)
    check_choice("momentum_place", momentum_place, PLACES)
    polar = polar or newton_schulz()
    scale = scale or shape_norm()

    def init(block: Block, V: Matrices) -> MatrixBlock:
        shape, _ = block.factor_shapes
        statistics = WeightedMean(jnp.zeros(shape, V.dtype), jnp.zeros(len(V), V.dtype))
        return MatrixBlock(
            statistics=statistics,
            preconditioner=identity_like(_input_factor(block, statistics)),
            memory=MuonMemory(jnp.zeros_like(V), scale.init(V)),
        )

    def take_in(state: MatrixBlock, measured: WeightedMean) -> MatrixBlock:
        old = state.statistics
        shape = measured.total.shape if isinstance(measured, WeightedMean) else None
        if shape != old.total.shape:
            got = type(measured).__name__ if shape is None else f"a factor {list(shape)}"
            raise ValueError(
                f"curvature has {got} where the layout of this rule has a factor "
                f"{list(old.total.shape)}; pass that of curvax.kron.input_factors(objective, "
                "layout, params, batch, key)."
            )
        return state._replace(statistics=moving_average(old, measured, decay))

    def average_scale(block: Block, state: MatrixBlock, V: Matrices, count: Count) -> MatrixBlock:
        del block, count
        memory = state.memory._replace(scale=scale.average(state.memory.scale, V))
        return state._replace(memory=memory)

    def refresh(layout: Layout, statistics: ByBlock, inverses: ByBlock) -> ByBlock:
        del inverses
        factors = []
        for block in layout.blocks:
            factor = _input_factor(block, statistics[block.name])
            factors.append(_normalized(factor, damping))
        # One list of all blocks: those of about equal size share a program.
        fresh = {}
        for block, inverted in zip(layout.blocks, invert_all(factors), strict=True):
            inverse = inverted.inverse
            # So that of A = I the inverse is I.
            unit = jnp.full_like(inverse.trace(), 1 + damping)
            fresh[block.name] = multiplied(inverse, unit)
        return fresh

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        P, memory = state.preconditioner, state.memory
        averaged = P.left(V) if momentum_place == "after" else V
        momentum = average(memory.momentum, averaged, b)
        N = mixed(momentum, averaged, b, count, nesterov)
        if momentum_place == "before":
            N = P.left(N)
        U = scaled(scale, memory.scale, polar(N), N, count + 1)
        return U, state._replace(memory=memory._replace(momentum=momentum))

    method = MatrixMethod(
        init=init, average=average_scale, step=step, refresh=refresh, take_in=take_in
    )
    rule_outside = fallback or optax.scale_by_adam()
    return scale_by_matrices(layout, method, refresh_every, rule_outside, without_lookups)


def _input_factor(block: Block, statistics: WeightedMean) -> KronFactor:
    """Return the mean A as a Kronecker factor of the block's structure."""
    structure: Any = STRUCTURES[block.a_structure]
    factor: KronFactor = structure.from_moment(statistics.mean)
    return factor


def _normalized(factor: KronFactor, damping: Any) -> KronFactor:
    """Return `A / r + damping I`, with r the mean eigenvalue of A."""
    mean = factor.mean_eigenvalue()
    # Inputs that are all zero, or not yet seen, say nothing: as for white ones, P is the identity.
    amount = jnp.where(mean > 0, damping, 1 + damping)
    return multiplied(factor, safe_divide(1.0, mean)).damped(amount)


def newton_muon(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    layout: Layout,
    b: float | Float[Array, ""] = 0.95,
    damping: float | Float[Array, ""] = 0.2,
    curvature_every: Interval = 8,
    inverse_every: Interval = 64,
    polar: Polar | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule = 3e-4,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Newton-Muon for every matrix of a model, and AdamW for everything else.

    This is `estimating(scale_by_newton_muon(layout, b), kron.estimator(objective, layout,
    kron.input_factors))`, then decoupled weight decay and two learning rates.

    Args:
      learning_rate: of matrices; a number or a schedule; 0.02 is the authors'.
      objective: the `curvax.Objective` that is minimized.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`. The authors
        leave the head to AdamW too: `layout.edit(path, kind="diagonal")`.
      b: decay of the momentum.
      damping: in units of the mean diagonal of A.
      curvature_every: number of steps between measurements of A. They begin with one in each step
        and get rarer, see `curvax.optim.growing_interval`; a schedule is used as it is.
      inverse_every: number of steps between inverses, likewise.
      polar: how polar factors are computed, see `curvax.scale_by_muon`.
      fallback_learning_rate: of Adam, for entries in no matrix; a number or a schedule.
      weight_decay: decoupled, `params -= rate weight_decay params` with the rate of their place;
        None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: At trace time, as `scale_by_newton_muon`, `kron.input_factors` and
        `curvax.estimating` do.

    Cost: that of `scale_by_newton_muon`, and every `curvature_every` steps a forward pass and `n
      i^2 / 2` multiplications a matrix for n positions.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 20.0], [0.0, 30.0], [1.0, 10.0]])
      >>> params, batch = jnp.zeros((2, 2)), (x, x @ jnp.array([[1.0, 0.0], [0.0, 0.1]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> tx = curvax.newton_muon(optax.linear_schedule(0.1, 0.0, 100), objective, layout)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradient = jax.grad(objective)(params, batch)
      ...     updates, state = tx.update(gradient, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> before = objective(params, batch)
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(objective(params, batch) < 0.1 * before)
      True

    References: see `scale_by_newton_muon`.
    """
    check_interval(curvature_every=curvature_every, inverse_every=inverse_every)
    rule = scale_by_newton_muon(
        layout, b, damping=damping, refresh_every=growing_interval(inverse_every), polar=polar
    )
    estimator = kron.estimator(objective, layout, input_factors)
    estimated = estimating(rule, estimator, growing_interval(curvature_every))
    return finish_with_two_rates(
        estimated, layout, learning_rate, fallback_learning_rate, weight_decay, without_lookups
    )
