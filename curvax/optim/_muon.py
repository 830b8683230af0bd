"""Muon: the polar factor of the momentum of every matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from curvax._checks import check_decay, check_precision
from curvax._types import Count
from curvax.kron import Layout
from curvax.kron._layout import Block
from curvax.kron._lookups import without_lookups
from curvax.optim._matrices import Matrices, MatrixBlock, MatrixMethod, scale_by_matrices
from curvax.optim._matrix_parts import (
    Decay,
    ScaleRule,
    average,
    debiased,
    scaled,
    shape_norm,
)
from curvax.optim._polar import Polar, newton_schulz
from curvax.optim._two_rates import finish_with_two_rates


class MuonMemory(NamedTuple):
    """What Muon holds.

    Attributes:
      momentum: M, the average of gradients, `[s, i, o]`.
      scale: the state of the scale.
    """

    momentum: Matrices
    scale: Any


def scale_by_muon(
    layout: Layout | None = None,
    b: float | Float[Array, ""] = 0.95,
    nesterov: bool = True,
    polar: Polar | None = None,
    scale: ScaleRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace the momentum of every matrix by its polar factor, about `(M M')^-1/2 M`.

    For the gradient V `[i, o]` of every matrix, in step t, which counts from 0,

      M <- b M + (1 - b) V,
      N = b M / (1 - b^(t+2)) + (1 - b) V / (1 - b^(t+1))       (Nesterov; otherwise N = M),
      U = sqrt(max(1, o / i)) polar(N).

    All singular values of the polar factor are 1, so that no direction of the momentum is lost
    beside the large ones: it is the steepest descent for a given spectral norm of the step.

    Args:
      layout: the matrices: `curvax.kron_layout(objective, params, batch)`, which knows stacked,
        convolutional and headed kernels, and tables that are only looked up: these go to the
        fallback (`curvax.kron.without_lookups` shows them). `curvax.matrix_layout(params, axes)`
        needs to be told; None reads all from shapes.
      b: decay of the momentum M.
      nesterov: whether the gradient is mixed in once more.
      polar: how polar factors are computed: `curvax.optim.newton_schulz(coefficients, eps, dtype)`,
        by default with Muon's coefficients; or `curvax.optim.exact_polar()`.
      scale: how long the steps are; by default `curvax.optim.shape_norm()`. With `shape_norm(0.2)`
        they are as long as AdamW's, whose learning rates then fit.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam()`. Its steps are
        of another length than those of matrices: `curvax.muon` gives them another rate.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.
      A matrix whose momentum is zero has a step of zero.

    Raises:
      ValueError: b is not in [0, 1), or updates are of another layout.

    Cost: with n the shorter side of a matrix and m the longer `10 n^2 m + 5 n^3` multiplications a
      matrix and step, beside `3 i o` for each position of the batch in its gradient. Memory: `i o`
      floats a matrix.

    Example: the head by Adam, too; all singular values of other matrices get near 1.
      >>> import jax.numpy as jnp, curvax
      >>> params = {"head": jnp.ones((2, 3)), "w": jnp.array([[3.0, 0.0], [0.0, 0.1]])}
      >>> layout = curvax.matrix_layout(params).edit("['head']", kind="diagonal")
      >>> rule = curvax.scale_by_muon(layout, polar=curvax.optim.exact_polar())
      >>> updates, state = rule.update(params, rule.init(params))
      >>> updates["w"].round(4).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    References: Jordan et al. (2024), Muon, https://kellerjordan.github.io/posts/muon; Bernstein and
      Newhouse (2024), https://arxiv.org/abs/2409.20325, proposition 5 (steepest descent).

    Deviates: the mix N has the bias corrections of `optax.contrib.muon`, where the authors have `b
      M + (1 - b) V`: the first steps weigh V differently. Products are in float32 unless `polar`
      says otherwise.
    """
    check_decay(b=b)
    check_precision(b=b)
    polar = polar or newton_schulz()
    scale = scale or shape_norm()

    def init(block: Block, V: Matrices) -> MatrixBlock:
        del block
        return MatrixBlock(memory=MuonMemory(jnp.zeros_like(V), scale.init(V)))

    def average_all(block: Block, state: MatrixBlock, V: Matrices, count: Count) -> MatrixBlock:
        del block, count
        memory = MuonMemory(
            momentum=average(state.memory.momentum, V, b),
            scale=scale.average(state.memory.scale, V),
        )
        return state._replace(memory=memory)

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        momentum, scale_state = state.memory
        N = mixed(momentum, V, b, count, nesterov)
        return scaled(scale, scale_state, polar(N), N, count + 1), state

    method = MatrixMethod(init=init, average=average_all, step=step)
    rule_outside = fallback or optax.scale_by_adam()
    return scale_by_matrices(layout, method, 1, rule_outside, without_lookups)


def mixed(M: Matrices, V: Matrices, b: Decay, count: Count, nesterov: bool) -> Matrices:
    """Return the average M, free of bias; with Nesterov's look ahead, the V in it counts again."""
    if not nesterov:
        return debiased(M, b, count + 1)
    # Dozat (2016): b M / (1 - b^(t+2)) + (1 - b) V / (1 - b^(t+1))
    return average(debiased(M, b, count + 2), debiased(V, b, count + 1), b)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None = None,
    b: float | Float[Array, ""] = 0.95,
    polar: Polar | None = None,
    scale: ScaleRule | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule = 3e-4,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for every matrix of a model, and AdamW for everything else.

    This is `scale_by_muon`, then decoupled weight decay and two learning rates.

    Args:
      learning_rate: of matrices; a number or a schedule; 0.02 is the authors'.
      layout: the matrices, see `curvax.scale_by_muon`; None reads them from shapes, embeddings and
        heads too. The authors leave these to AdamW: `layout.edit(path, kind="diagonal")`.
      b: decay of the momentum.
      polar: how polar factors are computed, see `curvax.scale_by_muon`.
      scale: how long the steps of matrices are; `curvax.optim.shape_norm(0.2)` goes with the
        learning rate of AdamW.
      fallback_learning_rate: of Adam, for entries in no matrix; a number or a schedule.
      weight_decay: decoupled, `params -= rate weight_decay params` with the rate of their place;
        None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`.

    Raises:
      ValueError: as `scale_by_muon` does.

    Cost: that of `scale_by_muon`.

    Example: one step of a matrix and a bias.
      >>> import jax.numpy as jnp, curvax
      >>> params = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2))}
      >>> polar = curvax.optim.exact_polar()
      >>> tx = curvax.muon(0.5, polar=polar, fallback_learning_rate=0.125)
      >>> gradient = {"b": jnp.ones(2), "w": jnp.array([[5.0, 0.0], [0.0, -0.1]])}
      >>> updates, state = tx.update(gradient, tx.init(params), params)
      >>> jnp.abs(updates["w"]).round(4).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
      >>> updates["b"].round(4).tolist()
      [-0.125, -0.125]

      Bring singular values nearer to 1, with products in bfloat16 and steps as long as AdamW's:
      >>> polar = curvax.optim.newton_schulz(curvax.optim.polar_express(6), dtype=jnp.bfloat16)
      >>> tx = curvax.muon(1e-3, polar=polar, scale=curvax.optim.shape_norm(0.2), weight_decay=0.1)

    References: see `scale_by_muon`.
    """
    rule = scale_by_muon(layout, b, polar=polar, scale=scale)
    return finish_with_two_rates(
        rule, layout, learning_rate, fallback_learning_rate, weight_decay, without_lookups
    )
