"""KL-Shampoo and KL-SOAP: second moments of one side, whitened by those of the other."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from curvax._checks import check_at_least, check_decay, check_precision
from curvax._trees import safe_divide, select_slices
from curvax._types import Count
from curvax.kron import Layout
from curvax.kron._layout import Block
from curvax.optim._eigen_parts import (
    AdamMoments,
    adam_step,
    averaged_moments,
    carried,
    init_basis,
    init_moments,
    refreshed_bases,
    rotate,
    rotate_back,
)
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
    average,
    averaged_statistics,
    factors_of,
    init_statistics,
    outer_products,
    rms_at_most,
    scaled,
)
from curvax.optim._refresh import Interval, growing_interval

RELATIVE_FLOOR = 1e-5
"""Eigenvalues below this fraction of their mean count as this fraction.

Rounding of a gradient in float32 is 1e-7 of it, and is divided by their root.
"""

LARGEST_JUMP = 1e3
"""A gradient as many times larger than all before gives L and R a new size."""


class KlBlock(NamedTuple):
    """What goes with the basis of one block.

    Attributes:
      basis: P and Q.
      values: eigenvalues d_L `[s, i]` and d_R `[s, o]`, averages too.
      moments: KL-SOAP's averages in the basis; None for KL-Shampoo.
    """

    basis: Sides
    values: Sides
    moments: AdamMoments | None


class KlMemory(NamedTuple):
    """What KL-Shampoo holds besides.

    Attributes:
      momentum: the average of gradients, `[s, i, o]`.
      scale: the state of the scale.
    """

    momentum: Matrices
    scale: Any


def scale_by_kl_shampoo(
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.98,
    eps: float = 1e-8,
    init_factor: float | None = None,
    refresh_every: Interval = 10,
    scale: ScaleRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide by the root of the Kronecker product closest to the gradients' second moment.

    `L x R` is that of the least Kullback-Leibler divergence between normal distributions with the
    covariances `E[v v']` and `L x R`, where v is the gradient of a matrix. It is stationary where
    `L = E[V R^-1 V'] / out` and `R = E[V' L^-1 V] / in`. With eigenvectors P, Q and eigenvalues
    d_L, d_R,

      L <- b2 L + (1 - b2) V R^-1 V' / out,      R <- b2 R + (1 - b2) V' L^-1 V / in,
      d_L <- b2 d_L + (1 - b2) mean_o(g^2 / d_R),   d_R likewise, with g = P' V Q,
      U = P ((P' M Q) / (sqrt(d_L d_R') + eps)) Q',      M <- b1 M + (1 - b1) V.

    At a refresh P becomes `qr(L P)`. Only the product of L and R means anything: d_L and d_R are
    given equal means, and L and R with them. The first update is zero: its gradient gives the first
    basis.

    Args:
      layout: the matrices: `curvax.matrix_layout(params)`, or `curvax.kron_layout(objective,
        params, batch)`; None reads them from shapes.
      b1: decay of M.
      b2: decay of L, R and their eigenvalues.
      eps: is added to the root.
      init_factor: the eigenvalues at the start; None takes the root mean square of the first
        gradient, so that no step depends on the gradient's unit.
      refresh_every: number of steps between bases, or a schedule of it.
      scale: how long the steps are; by default the root mean square of their entries, which is at
        most about 1 while gradients are like those before, is limited to 1.1.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam(b1, b2, eps)`.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.

    Raises:
      ValueError: A decay is not in [0, 1), eps or `init_factor` is negative, `refresh_every` is
        below 1, or updates are of another layout.

    Cost: `5 i o (i + o)` multiplications a matrix and step; at a refresh about `4 (i^3 + o^3)`.
      Memory: `2 (i^2 + o^2) + i o + i + o` floats a matrix.

    Example: gradients of one scale in the rows and another in the columns become alike.
      >>> import jax, jax.numpy as jnp, curvax
      >>> scales = jnp.outer(jnp.array([1.0, 0.1]), jnp.array([1.0, 0.2, 5.0]))
      >>> rule = curvax.scale_by_kl_shampoo(b1=0.0, b2=0.9)
      >>> state = rule.init(scales)
      >>> noise = jax.random.normal(jax.random.key(0), (200, 2, 3))
      >>> def step(state, noise):
      ...     updates, state = rule.update(scales * noise, state)
      ...     return state, updates
      >>> _, updates = jax.lax.scan(step, state, noise)
      >>> rms = jnp.sqrt(jnp.mean(updates[100:] ** 2, 0))
      >>> bool(rms.max() / rms.min() < 1.5)
      True

    References: Lin et al. (2025), KL-Shampoo, https://arxiv.org/abs/2509.03378, sections 3 and 4.

    Deviates: eigenvalues are bounded below by 1e-5 of their mean, where the authors' code bounds
      them by a number in the gradient's unit; they begin with the size of the first gradient, not
      with 0.1; the gauge is fixed; gradients of zero change nothing; and a step after a jump of the
      gradient, which is not in its own preconditioner, is limited by the scale.
    """
    check_decay(b1=b1, b2=b2)
    check_precision(b1=b1, b2=b2)
    check_at_least(0, eps=eps, init_factor=init_factor)

    length = rms_at_most(1.1) if scale is None else scale

    def init(block: Block, V: Matrices) -> MatrixBlock:
        memory = KlMemory(jnp.zeros_like(V), length.init(V))
        return MatrixBlock(*init_kl(block, V, init_factor, None), memory=memory)

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        basis, values, _ = state.preconditioner
        # The very first gradient is in no average, as its basis is that of the next step.
        M = average(state.memory.momentum, jnp.where(count > 0, V, 0), b1)
        left, right = map(above_floor, values)
        root = jnp.sqrt(left[:, :, None] * right[:, None, :])
        U = rotate_back(basis, rotate(basis, M) / (root + eps))
        memory = KlMemory(M, length.average(state.memory.scale, V))
        return scaled(length, memory.scale, U, M, count), state._replace(memory=memory)

    method = MatrixMethod(
        init=init,
        average=partial(averaged_kl, b2),
        step=step,
        refresh=refresh_kl,
        has_current_gradient=False,
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    return scale_by_matrices(layout, method, refresh_every, fallback or adam)


def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.98,
    refresh_every: Interval = 10,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo for every matrix of a model.

    This is `scale_by_kl_shampoo`, then decoupled weight decay and the learning rate.

    Args:
      learning_rate: a number or a schedule; Adam's fit.
      layout: the matrices, see `curvax.scale_by_kl_shampoo`; None reads them from shapes.
      b1: decay of the momentum.
      b2: decay of second moments.
      refresh_every: number of steps between bases. They begin with one in each step and get rarer,
        see `curvax.optim.growing_interval`; a schedule is used as it is.
      weight_decay: decoupled, `params -= learning_rate weight_decay params`; None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`.

    Raises:
      ValueError: as `scale_by_kl_shampoo` does.

    Cost: that of `scale_by_kl_shampoo`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> target = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> loss = lambda w: jnp.sum((w - target) ** 2)
      >>> tx, w = curvax.kl_shampoo(0.1), jnp.zeros((2, 2))
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(100):
      ...     w, state = step(w, state)
      >>> bool(loss(w) < 0.5)
      True

    References: see `scale_by_kl_shampoo`.
    """
    rule = scale_by_kl_shampoo(layout, b1, b2, refresh_every=growing_interval(refresh_every))
    return finish(rule, learning_rate, weight_decay=weight_decay)


def scale_by_kl_soap(
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.98,
    eps: float = 1e-8,
    init_factor: float | None = None,
    refresh_every: Interval = 10,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Take Adam's step in the eigenbasis of KL-Shampoo's second moments.

    L, R, P, Q, d_L and d_R are those of `scale_by_kl_shampoo`. With `g = P' V Q`

      m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   U = P (m / (sqrt(v) + eps)) Q',

    where m and v are corrected for their bias. At a refresh m is turned into the new basis.

    Args:
      layout: the matrices, see `scale_by_kl_shampoo`; None reads them from shapes.
      b1: decay of m.
      b2: decay of v and of L, R and their eigenvalues.
      eps: is added to the root of v.
      init_factor: the eigenvalues at the start; None takes the root mean square of the first
        gradient.
      refresh_every: number of steps between bases, or a schedule of it.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam(b1, b2, eps)`.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.

    Raises:
      ValueError: as `scale_by_kl_shampoo` does.

    Cost: `5 i o (i + o)` multiplications a matrix and step; at a refresh about `4 (i^3 + o^3)`.
      Memory: `2 (i^2 + o^2) + 2 i o + i + o` floats a matrix.

    Example: for a layout without full sides it is Adam, one gradient later.
      >>> import jax.numpy as jnp, optax, curvax
      >>> gradient = jnp.array([[3.0, -1.0], [0.5, 2.0]])
      >>> layout = curvax.matrix_layout(gradient, max_dim=1)
      >>> rule, adam = curvax.scale_by_kl_soap(layout), optax.scale_by_adam(0.9, 0.98)
      >>> _, state = rule.update(gradient, rule.init(gradient))
      >>> updates, state = rule.update(gradient, state)
      >>> of_adam, _ = adam.update(gradient, adam.init(gradient))
      >>> bool(jnp.allclose(updates, of_adam, atol=1e-6))
      True

    References: Lin et al. (2025), KL-Shampoo, https://arxiv.org/abs/2509.03378.

    Deviates: the averages are corrected for their bias, as SOAP's are.
    """
    check_decay(b1=b1, b2=b2)
    check_precision(b1=b1, b2=b2)
    check_at_least(0, eps=eps, init_factor=init_factor)

    def init(block: Block, V: Matrices) -> MatrixBlock:
        return MatrixBlock(*init_kl(block, V, init_factor, init_moments(V)))

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        current: KlBlock = state.preconditioner
        assert current.moments is not None  # `init` gave it some
        rotated = rotate(current.basis, V)
        moments = averaged_moments(current.moments, rotated, count, b1, b2)
        U = rotate_back(current.basis, adam_step(moments, count, b1, b2, eps))
        return U, state._replace(preconditioner=current._replace(moments=moments))

    method = MatrixMethod(
        init=init,
        average=partial(averaged_kl, b2),
        step=step,
        refresh=refresh_kl,
        has_current_gradient=False,
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    return scale_by_matrices(layout, method, refresh_every, fallback or adam)


def kl_soap(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.98,
    refresh_every: Interval = 10,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-SOAP for every matrix of a model.

    This is `scale_by_kl_soap`, then decoupled weight decay and the learning rate.

    Args:
      learning_rate: a number or a schedule; Adam's fit.
      layout: the matrices, see `curvax.scale_by_kl_soap`; None reads them from shapes.
      b1: decay of the momentum.
      b2: decay of second moments.
      refresh_every: number of steps between bases. They begin with one in each step and get rarer,
        see `curvax.optim.growing_interval`; a schedule is used as it is.
      weight_decay: decoupled, `params -= learning_rate weight_decay params`; None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`.

    Raises:
      ValueError: as `scale_by_kl_soap` does.

    Cost: that of `scale_by_kl_soap`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> target = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> loss = lambda w: jnp.sum((w - target) ** 2)
      >>> tx, w = curvax.kl_soap(0.1), jnp.zeros((2, 2))
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(100):
      ...     w, state = step(w, state)
      >>> bool(loss(w) < 0.5)
      True

    References: see `scale_by_kl_soap`.
    """
    rule = scale_by_kl_soap(layout, b1, b2, refresh_every=growing_interval(refresh_every))
    return finish(rule, learning_rate, weight_decay=weight_decay)


def init_kl(
    block: Block, V: Matrices, init_factor: float | None, moments: AdamMoments | None
) -> tuple[Sides, KlBlock]:
    """Return statistics and basis of no gradients; eigenvalues of zero wait for the first one."""
    statistics = init_statistics(block, V)
    start = 0.0 if init_factor is None else init_factor
    stack, rows, columns = V.shape
    left = jnp.full((stack, rows), start, V.dtype)
    right = jnp.full((stack, columns), start, V.dtype)
    basis = init_basis(factors_of(block, statistics))
    return statistics, KlBlock(basis, _with_ones(block, Sides(left, right)), moments)


def averaged_kl(
    b2: Decay, block: Block, state: MatrixBlock, V: Matrices, count: Count
) -> MatrixBlock:
    """Take a gradient into both second moments and their eigenvalues, each whitened by the other.

    Both from the old ones: a step of Jacobi's kind towards `L = E[V R^-1 V'] / out` and `R = E[V'
    L^-1 V] / in`. Without the divisions there is no such pair of L and R unless in = out.
    """
    del count
    old: KlBlock = state.preconditioner
    statistics, values = _sized(block, state.statistics, old.values, V)
    P, Q = old.basis

    # 1. V R^-1 V' = (V Q d_R^-1/2)(V Q d_R^-1/2)', and V' L^-1 V likewise.
    d_left, d_right = map(above_floor, values)
    of_left = _turned(V, Sides(None, Q)) / jnp.sqrt(d_right[:, None, :])
    of_right = _turned(V, Sides(P, None)) / jnp.sqrt(d_left[:, :, None])
    products = outer_products(block, of_left, of_right)
    _, rows, columns = V.shape
    moments = Sides(products.left / columns, products.right / rows)
    new_statistics = averaged_statistics(statistics, moments, b2)

    # 2. d_L = mean over columns of (P' V Q)^2 / d_R: the diagonal of P' L P.
    new_left = jnp.mean(_turned(of_left, Sides(P, None)) ** 2, axis=2)
    new_right = jnp.mean(_turned(of_right, Sides(None, Q)) ** 2, axis=1)
    averaged = Sides(
        average(values.left, new_left, b2),
        average(values.right, new_right, b2),
    )
    # Eigenvalues belong to a basis: before the first one they stay what they are.
    has_basis = _is_basis(P) & _is_basis(Q)
    new_values = select_slices(has_basis, _with_ones(block, averaged), values)

    # 3. Only the product of L and R means anything.
    new_statistics, new_values = _of_equal_means(block, new_statistics, new_values)
    # A gradient of zero says nothing of a covariance, and L and R would go to zero with it.
    is_zero = jnp.all(V == 0, axis=(1, 2))
    new_statistics, new_values = select_slices(
        is_zero, (state.statistics, old.values), (new_statistics, new_values)
    )
    return state._replace(
        statistics=new_statistics,
        preconditioner=old._replace(values=new_values),
    )


def above_floor(values: Float[Array, "s n"]) -> Float[Array, "s n"]:
    """Bound eigenvalues below by a fraction of their mean, whatever the gradient's unit is."""
    mean = jnp.mean(values, axis=1, keepdims=True)
    # Where all are zero, there has been no gradient yet: 1 makes the step zero, not NaN.
    floor = jnp.where(mean > 0, RELATIVE_FLOOR * mean, 1)
    return jnp.maximum(values, floor)


def _sized(block: Block, statistics: Sides, values: Sides, V: Matrices) -> tuple[Sides, Sides]:
    """Give L and R the size of a gradient that is the first, or far larger than all before.

    Then `mean(d_L) mean(d_R)` is its mean square. From a size that is far too small a step of
    Jacobi's kind would go as far beyond it, since either side is divided by the old other one.
    """
    left, right = (jnp.mean(side, axis=1) for side in values)
    rms = jnp.sqrt(jnp.mean(V * V, axis=(1, 2)))
    expected = jnp.sqrt(left) * jnp.sqrt(right)
    # Where one side is left as it is, the other has the size of both.
    sides_of_size = 1 if "identity" in block.structures else 2
    # 1. The first gradient: eigenvalues are zero.
    is_first = expected == 0
    size = jnp.square(rms) if sides_of_size == 1 else rms
    fill = jax.tree.map(lambda side: jnp.broadcast_to(size[:, None], side.shape), values)
    values = select_slices(is_first, _with_ones(block, fill), values)
    # 2. A jump: c L and c R, each of which whitens the other.
    is_jump = ~is_first & (rms > LARGEST_JUMP * expected)
    c = jnp.where(is_jump, rms / jnp.where(is_first, 1, expected), 1)
    c = jnp.square(c) if sides_of_size == 1 else c
    return _times(block, statistics, values, Sides(c, c))


def _of_equal_means(block: Block, statistics: Sides, values: Sides) -> tuple[Sides, Sides]:
    """Give the eigenvalues of both sides equal means, and L and R with them.

    `c L` and `R / c` are the same Kronecker product for any c, which would drift.
    """
    if "identity" in block.structures:  # the other side alone has a size
        return statistics, values
    left, right = (jnp.mean(side, axis=1) for side in values)
    # c^2 = mean d_R / mean d_L; where one of them is zero nothing is changed.
    ratio = safe_divide(right, left)
    c = jnp.sqrt(jnp.where(ratio > 0, ratio, 1))
    return _times(block, statistics, values, Sides(c, 1 / c))


def _times(block: Block, statistics: Sides, values: Sides, c: Sides) -> tuple[Sides, Sides]:
    """Multiply second moments and eigenvalues of every slice by numbers, one for each side."""
    moments, scaled_values = [], []
    for moment, side, factor in zip(statistics, values, c, strict=True):
        trailing = [1] * (moment.total.ndim - 1)
        moments.append(moment._replace(total=moment.total * factor.reshape(-1, *trailing)))
        scaled_values.append(side * factor[:, None])
    return Sides(*moments), _with_ones(block, Sides(*scaled_values))


def _with_ones(block: Block, values: Sides) -> Sides:
    """Put eigenvalues of 1 where a side is left as it is."""
    sides = []
    for structure, side in zip(block.structures, values, strict=True):
        sides.append(jnp.ones_like(side) if structure == "identity" else side)
    return Sides(*sides)


def _turned(V: Matrices, basis: Sides) -> Matrices:
    """Turn into a basis; slices that have none yet stay as they are."""
    has_basis = _is_basis(basis.left) & _is_basis(basis.right)
    return select_slices(has_basis, rotate(basis, V), V)


def _is_basis(vectors: Array | None) -> Any:
    """Tell which slices have a basis; zeros are none, and None is the identity."""
    # A basis has no column of zeros: one tells of all.
    return True if vectors is None else jnp.any(vectors[:, :, 0] != 0, axis=1)


def refresh_kl(layout: Layout, statistics: ByBlock, states: ByBlock) -> ByBlock:
    """Follow the eigenvectors of L and R; eigenvalues stay with their columns."""
    old = {name: state.basis for name, state in states.items()}
    bases = refreshed_bases(layout, statistics, old, sort=False)
    fresh = {}
    for name, (basis, values, moments) in states.items():
        new = bases[name].basis
        if moments is not None:
            moments = moments._replace(first=carried(moments.first, basis, new))
        fresh[name] = KlBlock(new, values, moments)
    return fresh
