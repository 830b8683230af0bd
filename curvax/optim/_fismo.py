"""FISMO: steepest descent under a spectral norm that a Kronecker-factored Fisher matrix weighs.

Experimental: the update is that of two notes which agree; the paper's settings are not known to us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from curvax._checks import check_at_least, check_decay, check_precision
from curvax._types import Count
from curvax.kron import Layout
from curvax.kron._inverse_roots import default_root_method, inverse_roots
from curvax.kron._kron_factor import STRUCTURES, KronFactor, added, scaled
from curvax.kron._layout import Block
from curvax.kron._lookups import without_lookups
from curvax.optim._matrices import (
    ByBlock,
    Matrices,
    MatrixBlock,
    MatrixMethod,
    scale_by_matrices,
)
from curvax.optim._matrix_parts import (
    Decay,
    Sides,
    average,
    factors_of,
    identity_like,
    init_statistics,
)
from curvax.optim._polar import Polar, newton_schulz
from curvax.optim._refresh import Interval, check_interval, growing_interval
from curvax.optim._two_rates import finish_with_two_rates


class FismoFactors(NamedTuple):
    """The Fisher matrix of one block, `P x Q`.

    Attributes:
      factors: P and Q, of trace i and o.
      roots: `P^-1/2` and `Q^-1/2`.
    """

    factors: Sides
    roots: Sides


def scale_by_fismo(
    layout: Layout | None = None,
    b: float | Float[Array, ""] = 0.95,
    decay: float | Float[Array, ""] = 0.95,
    damping: float | Float[Array, ""] = 1e-3,
    refresh_every: Interval = 10,
    polar: Polar | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Take the polar factor of the whitened momentum, and map it back: experimental.

    For the gradient V `[i, o]` of every matrix, at a refresh, first P, then Q with the new P,

      P <- decay P + (1 - decay) (V Q^-1 V' / o + damping tr(P) / i I),   scaled to tr P = i,
      Q <- decay Q + (1 - decay) (V' P^-1 V / i + damping tr(Q) / o I),   scaled to tr Q = o,

    from P = Q = I, and in every step

      M <- b M + (1 - b) P^-1/2 V Q^-1/2,   U = P^-1/2 polar(M) Q^-1/2.

    Of all steps D with a spectral norm `|P^1/2 D Q^1/2| <= 1`, U has the largest inner product with
    the gradient (where b is 0). With P = Q = I it is Muon.

    Args:
      layout: the matrices, see `curvax.scale_by_muon`; tables that are only looked up go to the
        fallback. A side whose structure is "diagonal" has a diagonal factor; with "identity" it is
        left as it is.
      b: decay of the momentum.
      decay: decay of P and Q, for each refresh.
      damping: what is added to the eigenvalues of new factors, in units of the mean eigenvalue.
      refresh_every: number of steps between refreshes, or a schedule of it; step 0 refreshes.
      polar: how polar factors are computed, see `curvax.scale_by_muon`.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam()`.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.
      Where a factor or a root fails, the last good ones go on and `state.info.num_failures` counts.

    Raises:
      ValueError: A decay is not in [0, 1), the damping is negative, `refresh_every` is below 1, or
        updates are of another layout.

    Cost: that of `curvax.scale_by_muon`, and `2 i o (i + o)` multiplications a matrix and step; at
      a refresh as many, and about `10 (i^3 + o^3)`. Memory: `2 (i^2 + o^2) + 2 i o` floats a
      matrix.

    Example: the factors have begun to follow the gradient, which has one long direction.
      >>> import jax.numpy as jnp, curvax
      >>> rule = curvax.scale_by_fismo(decay=0.5, polar=curvax.optim.exact_polar())
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 0.3]])
      >>> updates, state = rule.update(gradient, rule.init(gradient))
      >>> bool(updates[0, 0] < 1 < updates[1, 1])
      True

    References: FISMO, Fisher-structured momentum-orthogonalized optimization, by two descriptions
      of its update.

    Deviates: nothing that is known. Not known are the authors' damping, decays, learning rate and
      refresh interval (those here are ours); whether the damping of P is by `tr(P) / i`, as here,
      or by `tr(Q^-1) / o`; and which rule is for vectors. The momentum stays in the whitened
      coordinates of its time when P and Q move on. P and Q begin with I, and new terms have the
      unit of the squared gradient: where this is far below 1, the step is Muon's.
    """
    check_decay(b=b, decay=decay)
    check_precision(b=b, decay=decay)
    check_at_least(0, damping=damping)
    polar = polar or newton_schulz()

    def init(block: Block, V: Matrices) -> MatrixBlock:
        zeros = factors_of(block, init_statistics(block, V))
        identity = [identity_like(factor) for factor in zeros]
        # Fresh buffers: a state that is donated must not hold one twice.
        roots = [identity_like(factor) for factor in zeros]
        return MatrixBlock(
            statistics=jnp.zeros_like(V),
            preconditioner=FismoFactors(Sides(*identity), Sides(*roots)),
            memory=jnp.zeros_like(V),
        )

    def keep_gradient(block: Block, state: MatrixBlock, V: Matrices, count: Count) -> MatrixBlock:
        del block, count
        return state._replace(statistics=V)

    def refresh(layout: Layout, gradients: ByBlock, current: ByBlock) -> ByBlock:
        P = _left_factors(layout, gradients, current, decay, damping)
        left_roots = _inverse_square_roots(P)
        Q = _right_factors(layout, gradients, left_roots, current, decay, damping)
        right_roots = _inverse_square_roots(Q)
        fresh = {}
        for name in current:
            factors = Sides(P[name], Q[name])
            fresh[name] = FismoFactors(factors, Sides(left_roots[name], right_roots[name]))
        return fresh

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        del count
        left, right = state.preconditioner.roots
        # M <- b M + (1 - b) P^-1/2 V Q^-1/2; polar factors do not see the bias of M
        whitened = right.right(left.left(V))
        M = average(state.memory, whitened, b)
        # U = P^-1/2 polar(M) Q^-1/2
        U = right.right(left.left(polar(M)))
        return U, state._replace(memory=M)

    method = MatrixMethod(init=init, average=keep_gradient, step=step, refresh=refresh)
    rule_outside = fallback or optax.scale_by_adam()
    return scale_by_matrices(layout, method, refresh_every, rule_outside, without_lookups)


def _left_factors(
    layout: Layout, gradients: ByBlock, current: ByBlock, decay: Decay, damping: Any
) -> dict[str, KronFactor]:
    """Return the new P of every block, which takes in `V Q^-1 V' / o`."""
    fresh = {}
    for block in layout.blocks:
        old = current[block.name]
        # Q^-1 = Q^-1/2 Q^-1/2
        whitened = old.roots.right.right(gradients[block.name])
        rows = whitened.mT
        fresh[block.name] = _updated(block.a_structure, old.factors.left, rows, decay, damping)
    return fresh


def _right_factors(
    layout: Layout,
    gradients: ByBlock,
    left_roots: Mapping[str, KronFactor],
    current: ByBlock,
    decay: Decay,
    damping: Any,
) -> dict[str, KronFactor]:
    """Return the new Q of every block, which takes in `V' P^-1 V / i` of the new P."""
    fresh = {}
    for block in layout.blocks:
        old = current[block.name]
        rows = left_roots[block.name].left(gradients[block.name])
        fresh[block.name] = _updated(block.g_structure, old.factors.right, rows, decay, damping)
    return fresh


def _updated(
    structure: str, old: KronFactor, rows: Matrices, decay: Decay, damping: Any
) -> KronFactor:
    """Average a factor with the mean of `x x'` over rows x, damped, and scale it to trace n."""
    mean = STRUCTURES[structure].second_moment(rows, None) / rows.shape[1]
    new = STRUCTURES[structure].from_moment(mean).damped(damping * old.mean_eigenvalue())
    ones = jnp.ones_like(old.trace())
    total = added(scaled(old, decay * ones), scaled(new, (1 - decay) * ones))
    # 0/0 is where neither the old factor, nor the gradient, nor the damping counts: it is NaN, and
    # the old factor goes on.
    return scaled(total, old.size / total.trace())


def _inverse_square_roots(factors: Mapping[str, KronFactor]) -> dict[str, KronFactor]:
    """Return `F^-1/2` of every block; those of about equal size share a program."""
    results = inverse_roots(list(factors.values()), [2] * len(factors), default_root_method())
    return {name: result.root for name, result in zip(factors, results, strict=True)}


def fismo(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None = None,
    b: float | Float[Array, ""] = 0.95,
    decay: float | Float[Array, ""] = 0.95,
    damping: float | Float[Array, ""] = 1e-3,
    refresh_every: Interval = 10,
    polar: Polar | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule = 3e-4,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FISMO for every matrix of a model, and AdamW for everything else: experimental.

    This is `scale_by_fismo`, then decoupled weight decay and two learning rates.

    Args:
      learning_rate: of matrices; a number or a schedule; Muon's are a start.
      layout: the matrices, see `curvax.scale_by_muon`; None reads them from shapes.
      b: decay of the momentum.
      decay: decay of P and Q, for each refresh.
      damping: what is added to the eigenvalues of new factors, in units of the mean eigenvalue.
      refresh_every: number of steps between refreshes. They begin with one in each step and get
        rarer, see `curvax.optim.growing_interval`; a schedule is used as it is.
      polar: how polar factors are computed, see `curvax.scale_by_muon`.
      fallback_learning_rate: of Adam, for entries in no matrix; a number or a schedule.
      weight_decay: decoupled, `params -= rate weight_decay params` with the rate of their place;
        None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`.

    Raises:
      ValueError: as `scale_by_fismo` does.

    Cost: that of `scale_by_fismo`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> loss = lambda w: jnp.sum((w - jnp.eye(3)) ** 2)
      >>> tx, w = curvax.fismo(optax.linear_schedule(0.1, 0.0, 60)), jnp.zeros((3, 3))
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(60):
      ...     w, state = step(w, state)
      >>> bool(loss(w) < 0.1)
      True

    References: see `scale_by_fismo`.
    """
    check_interval(refresh_every=refresh_every)
    interval = growing_interval(refresh_every)
    rule = scale_by_fismo(layout, b, decay, damping, interval, polar)
    return finish_with_two_rates(
        rule, layout, learning_rate, fallback_learning_rate, weight_decay, without_lookups
    )
