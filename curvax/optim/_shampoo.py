"""Shampoo and its one-sided form: roots of the second moments of the gradient's matrices."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from curvax._checks import check_at_least, check_count, check_decay, check_precision
from curvax._types import Count
from curvax.kron import Layout
from curvax.kron._inverse_roots import default_root_method, inverse_roots
from curvax.kron._kron_factor import Identity, KronFactor
from curvax.kron._layout import Block
from curvax.optim._finish import finish
from curvax.optim._matrices import (
    ByBlock,
    Matrices,
    MatrixBlock,
    MatrixMethod,
    scale_by_matrices,
)
from curvax.optim._matrix_parts import (
    Decay,
    ScaleRule,
    Sides,
    adam_norm,
    average,
    averaged_statistics,
    debiased,
    factors_of,
    identity_like,
    init_statistics,
    outer_products,
    rms_norm,
    scaled,
)
from curvax.optim._refresh import Interval, growing_interval


class ShampooMemory(NamedTuple):
    """What Shampoo holds besides statistics and roots.

    Attributes:
      momentum: the average of gradients, `[s, i, o]`.
      scale: the state of the scale.
    """

    momentum: Matrices
    scale: Any


def scale_by_shampoo(
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.999,
    eps: float = 1e-12,
    relative_eps: float = 0.0,
    root: int = 4,
    refresh_every: Interval = 10,
    scale: ScaleRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by roots of second moments, `U = (L + eps I)^-p M (R + eps I)^-p`.

    For the gradient V `[i, o]` of every matrix

      L <- b2 L + (1 - b2) V V',   R <- b2 R + (1 - b2) V' V,   M <- b1 M + (1 - b1) V,

    all three free of bias. The roots are those of the latest refresh, in which the gradient of that
    step has a part already. U is then given the norm that the scale wants.

    Args:
      layout: the matrices: `curvax.matrix_layout(params)`, with `block_size` for tiles of them, or
        `curvax.kron_layout(objective, params, batch)`; None reads them from shapes. A diagonal side
        has a diagonal second moment; with the structure "identity" a side is left as it is.
      b1: decay of the momentum M.
      b2: decay of L and R; the number 1 sums, `L + V V'`, as AdaGrad does.
      eps: what is added to the eigenvalues of L and R, in the gradient's unit squared.
      relative_eps: what is added besides, as a fraction of the mean eigenvalue.
      root: the exponent is `p = 1 / root`. With the fourth root a single gradient gives its polar
        factor; with the square root `V (V' V)^-1`, so that averages over many steps are needed.
      refresh_every: number of steps between roots, or a schedule of it; step 0 computes them.
      scale: how long the steps are; by default as Adam's, `curvax.optim.adam_norm()`.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam(b1, b2)`.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.
      Where a root fails, the last good one goes on and `state.info.num_failures` counts.

    Raises:
      ValueError: A decay is not in [0, 1], an eps is negative, the root or `refresh_every` is below
        1, or updates are of another layout.

    Cost: `2 i o (i + o)` multiplications a matrix and step, half of them statistics; about `10 (i^3
      + o^3)` at a refresh. Memory: `2 (i^2 + o^2) + i o` floats a matrix, and `i o` for the scale.

    Example: one gradient without averages gives the polar factor, of singular values 1.
      >>> import jax.numpy as jnp, curvax
      >>> rule = curvax.scale_by_shampoo(b1=0.0, b2=0.0, scale=curvax.optim.unscaled())
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 0.2]])
      >>> updates, state = rule.update(gradient, rule.init(gradient))
      >>> updates.round(4).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    References: Gupta, Koren and Singer (2018), https://arxiv.org/abs/1802.09568, algorithm 1; Anil
      et al. (2020), https://arxiv.org/abs/2002.09018, for the scale; Shi et al. (2023),
      https://arxiv.org/abs/2309.06497, for averages.

    Deviates: averages and a scale where algorithm 1 has sums and none: `b1=0, b2=1,
      refresh_every=1, scale=curvax.optim.unscaled()` is algorithm 1.
    """
    method = _root_method(b1, b2, eps, relative_eps, root, scale or adam_norm())
    adam = optax.scale_by_adam(b1, 0.999 if _is_sum(b2) else b2)
    return scale_by_matrices(layout, method, refresh_every, fallback or adam)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.999,
    refresh_every: Interval = 10,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo with steps as long as Adam's, for every matrix of a model.

    This is `scale_by_shampoo`, then decoupled weight decay and the learning rate.

    Args:
      learning_rate: a number or a schedule; Adam's fit.
      layout: the matrices, see `curvax.scale_by_shampoo`; None reads them from shapes.
      b1: decay of the momentum.
      b2: decay of second moments.
      refresh_every: number of steps between roots. They begin with one in each step and get rarer,
        see `curvax.optim.growing_interval`; a schedule is used as it is.
      weight_decay: decoupled, `params -= learning_rate weight_decay params`; None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`.

    Raises:
      ValueError: as `scale_by_shampoo` does.

    Cost: that of `scale_by_shampoo`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> loss = lambda w: jnp.sum((w - jnp.eye(3)) ** 2)
      >>> tx, w = curvax.shampoo(0.1), jnp.zeros((3, 3))
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(60):
      ...     w, state = step(w, state)
      >>> bool(loss(w) < 0.1)
      True

    References: see `scale_by_shampoo`.
    """
    rule = scale_by_shampoo(layout, b1, b2, refresh_every=growing_interval(refresh_every))
    return finish(rule, learning_rate, weight_decay=weight_decay)


def scale_by_asgo(
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.8,
    eps: float = 1e-10,
    refresh_every: Interval = 1,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by the root of the second moment of one side, `U = (L + eps I)^-1/2 M`.

    The shorter side of every matrix `[i, o]` is taken: with more rows than columns `U = M (R + eps
    I)^-1/2`. The entries of U then get the root mean square 0.2. For a single gradient U is a
    multiple of its polar factor, so that this is Muon with a memory. It is `scale_by_shampoo` with
    one side, square roots and `scale=curvax.optim.rms_norm(0.2)`.

    Args:
      layout: the matrices, see `curvax.scale_by_shampoo`; None reads them from shapes.
      b1: decay of the momentum M.
      b2: decay of second moments.
      eps: what is added to their eigenvalues, in the gradient's unit squared.
      refresh_every: number of steps between roots.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam(b1, 0.999)`.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.

    Raises:
      ValueError: as `scale_by_shampoo` does.

    Cost: with n the shorter side `2 i o n` multiplications a matrix and step, and about `10 n^3` at
      a refresh. Memory: `2 n^2 + i o` floats a matrix.

    Example: the update does not depend on the gradient's unit.
      >>> import jax.numpy as jnp, curvax
      >>> rule, gradient = curvax.scale_by_asgo(), jnp.array([[3.0, 1.0, 0.0], [0.0, 0.2, 1.0]])
      >>> updates, _ = rule.update(gradient, rule.init(gradient))
      >>> of_double, _ = rule.update(2 * gradient, rule.init(gradient))
      >>> bool(jnp.allclose(updates, of_double, atol=1e-5))
      True

    References: An et al. (2025), ASGO, https://arxiv.org/abs/2503.20762, algorithm 1.

    Deviates: the root is that of an eigendecomposition, where their code has a polynomial.
    """
    method = _root_method(b1, b2, eps, 0.0, 2, rms_norm(0.2))
    adam = optax.scale_by_adam(b1)
    return scale_by_matrices(layout, method, refresh_every, fallback or adam, _one_sided)


def asgo(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.8,
    refresh_every: Interval = 1,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One-sided Shampoo for every matrix of a model.

    This is `scale_by_asgo`, then decoupled weight decay and the learning rate.

    Args:
      learning_rate: a number or a schedule; 0.01 is the authors'.
      layout: the matrices, see `curvax.scale_by_shampoo`; None reads them from shapes.
      b1: decay of the momentum.
      b2: decay of second moments.
      refresh_every: number of steps between roots. They begin with one in each step and get rarer,
        see `curvax.optim.growing_interval`; a schedule is used as it is.
      weight_decay: decoupled, `params -= learning_rate weight_decay params`; None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`.

    Raises:
      ValueError: as `scale_by_asgo` does.

    Cost: that of `scale_by_asgo`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> tx, w = curvax.asgo(0.01), jnp.zeros((2, 3))
      >>> updates, state = tx.update(jnp.ones((2, 3)), tx.init(w), w)
      >>> [[round(x, 4) for x in row] for row in updates.tolist()]
      [[-0.002, -0.002, -0.002], [-0.002, -0.002, -0.002]]

    References: see `scale_by_asgo`.
    """
    rule = scale_by_asgo(layout, b1, b2, refresh_every=growing_interval(refresh_every))
    return finish(rule, learning_rate, weight_decay=weight_decay)


def _root_method(
    b1: Decay, b2: Decay, eps: float, relative_eps: float, root: int, scale: ScaleRule
) -> MatrixMethod:
    """Return what Shampoo does with every matrix."""
    check_decay(b1=b1)
    if not _is_sum(b2):
        check_decay(b2=b2)
    check_precision(b1=b1, b2=b2)
    check_at_least(0, eps=eps, relative_eps=relative_eps)
    check_count(1, root=root)

    def init(block: Block, V: Matrices) -> MatrixBlock:
        # Roots are the identity until one is computed.
        statistics = init_statistics(block, V)
        zeros = factors_of(block, statistics)
        return MatrixBlock(
            statistics=statistics,
            preconditioner=Sides(*map(identity_like, zeros)),
            memory=ShampooMemory(jnp.zeros_like(V), scale.init(V)),
        )

    def average_all(block: Block, state: MatrixBlock, V: Matrices, count: Count) -> MatrixBlock:
        del count
        moments = outer_products(block, V, V)
        return state._replace(
            statistics=averaged_statistics(state.statistics, moments, b2),
            memory=ShampooMemory(
                momentum=average(state.memory.momentum, V, b1),
                scale=scale.average(state.memory.scale, V),
            ),
        )

    def refresh(layout: Layout, statistics: ByBlock, roots: ByBlock) -> ByBlock:
        del roots
        # One list of the sides of all blocks: those of about equal size share a program.
        factors: list[KronFactor] = []
        for block in layout.blocks:
            factors += map(with_eps, factors_of(block, statistics[block.name]))
        results = inverse_roots(factors, [root] * len(factors), default_root_method())
        fresh = {}
        for k, block in enumerate(layout.blocks):
            left, right = results[2 * k : 2 * k + 2]
            fresh[block.name] = Sides(left.root, right.root)
        return fresh

    def with_eps(factor: KronFactor) -> KronFactor:
        if isinstance(factor, Identity):  # nothing was measured there
            return factor
        return factor.damped(eps + relative_eps * factor.mean_eigenvalue())

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        del V
        M = debiased(state.memory.momentum, b1, count + 1)
        # Algorithm 1: U = L^-p M R^-p
        left, right = state.preconditioner
        U = right.right(left.left(M))
        return scaled(scale, state.memory.scale, U, M, count + 1), state

    return MatrixMethod(
        init=init,
        average=average_all,
        step=step,
        refresh=refresh,
    )


def _is_sum(b2: Decay) -> bool:
    return isinstance(b2, int | float) and b2 == 1


def _one_sided(layout: Layout) -> Layout:
    """Leave the longer side of every matrix as it is."""
    blocks = []
    for block in layout.blocks:
        _, rows, columns = block.shape
        if rows <= columns:
            blocks.append(dataclasses.replace(block, g_structure="identity"))
        else:
            blocks.append(dataclasses.replace(block, a_structure="identity"))
    return dataclasses.replace(layout, blocks=tuple(blocks))
