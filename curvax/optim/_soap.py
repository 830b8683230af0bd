"""SOAP: Adam in the eigenbasis of Shampoo's second moments."""

from __future__ import annotations

from typing import NamedTuple

import optax
from jaxtyping import Array, Float

from curvax._checks import check_at_least, check_decay, check_precision
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
    reordered,
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
    Sides,
    averaged_statistics,
    factors_of,
    init_statistics,
    outer_products,
)
from curvax.optim._refresh import Interval, growing_interval


class SoapBlock(NamedTuple):
    """What follows the basis of one block.

    Attributes:
      basis: P and Q.
      moments: Adam's averages in it.
    """

    basis: Sides
    moments: AdamMoments


def scale_by_soap(
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.95,
    b2: float | Float[Array, ""] = 0.95,
    eps: float = 1e-8,
    shampoo_beta: float | Float[Array, ""] | None = None,
    refresh_every: Interval = 10,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Take Adam's step in the eigenbasis of `V V'` and `V' V`, on average over gradients V.

    For the gradient V `[i, o]` of every matrix, with P and Q the eigenvectors of L and R,

      g = P' V Q,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,
      U = P (m / (sqrt(v) + eps)) Q' sqrt(1 - b2^t) / (1 - b1^t),

    and then `L <- b L + (1 - b) V V'`, `R <- b R + (1 - b) V' V`. At a refresh P becomes `qr(L P)`,
    with its columns in descending order of `diag(P' L P)` first; v follows that order, and m is
    turned into the new basis exactly. The first update is zero: its gradient gives the first basis,
    by an eigendecomposition.

    Args:
      layout: the matrices: `curvax.matrix_layout(params)`, or `curvax.kron_layout(objective,
        params, batch)`; None reads them from shapes. A side whose structure is not "full" (by
        default one longer than `max_dim`) is not turned.
      b1: decay of m.
      b2: decay of v.
      eps: is added to the root of v; it is not corrected for the bias of v.
      shampoo_beta: the decay b of L and R; None takes b2.
      refresh_every: number of steps between bases, or a schedule of it.
      fallback: the rule for what is in no matrix; by default `optax.scale_by_adam(b1, b2, eps)`.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.
      Where a basis is not finite, the last good one goes on and `state.info.num_failures` counts.

    Raises:
      ValueError: A decay is not in [0, 1), eps is negative, `refresh_every` is below 1, or updates
        are of another layout.

    Cost: `3 i o (i + o)` multiplications a matrix and step, a third of them statistics; at a
      refresh about `4 (i^3 + o^3)`. Memory: `2 (i^2 + o^2) + 2 i o` floats a matrix.

    Example: for a layout without full sides it is Adam, one gradient later.
      >>> import jax.numpy as jnp, optax, curvax
      >>> gradient = jnp.array([[3.0, -1.0], [0.5, 2.0]])
      >>> layout = curvax.matrix_layout(gradient, max_dim=1)
      >>> rule, adam = curvax.scale_by_soap(layout), optax.scale_by_adam(0.95, 0.95)
      >>> _, state = rule.update(gradient, rule.init(gradient))
      >>> updates, state = rule.update(gradient, state)
      >>> of_adam, _ = adam.update(gradient, adam.init(gradient))
      >>> bool(jnp.allclose(updates, of_adam, atol=1e-6))
      True

    References: Vyas et al. (2024), SOAP, https://arxiv.org/abs/2409.11321, algorithm 3.

    Deviates: the fallback takes its first step at once, where the authors' code leaves out the
      first step of all parameters.
    """
    check_decay(b1=b1, b2=b2)
    b = b2 if shampoo_beta is None else shampoo_beta
    check_decay(shampoo_beta=b)
    check_precision(b1=b1, b2=b2, shampoo_beta=b)
    check_at_least(0, eps=eps)

    def init(block: Block, V: Matrices) -> MatrixBlock:
        statistics = init_statistics(block, V)
        basis = init_basis(factors_of(block, statistics))
        return MatrixBlock(statistics, SoapBlock(basis, init_moments(V)))

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        basis, moments = state.preconditioner
        moments = averaged_moments(moments, rotate(basis, V), count, b1, b2)
        # Algorithm 3: N = P (m / (sqrt(v) + eps)) Q'
        N = rotate_back(basis, adam_step(moments, count, b1, b2, eps))
        return N, state._replace(preconditioner=SoapBlock(basis, moments))

    def average_products(
        block: Block, state: MatrixBlock, V: Matrices, count: Count
    ) -> MatrixBlock:
        del count
        moments = outer_products(block, V, V)
        return state._replace(statistics=averaged_statistics(state.statistics, moments, b))

    method = MatrixMethod(
        init=init,
        average=average_products,
        step=step,
        refresh=refresh_soap,
        has_current_gradient=False,
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    return scale_by_matrices(layout, method, refresh_every, fallback or adam)


def refresh_soap(layout: Layout, statistics: ByBlock, states: ByBlock) -> ByBlock:
    """Follow the eigenvectors of L and R, and carry Adam's averages into the new basis."""
    old = {name: state.basis for name, state in states.items()}
    bases = refreshed_bases(layout, statistics, old, sort=True)
    fresh = {}
    for name, (basis, moments) in states.items():
        new = bases[name]
        # Squares cannot be turned: v goes with the columns that it was measured along.
        first = carried(moments.first, basis, new.basis)
        second = reordered(moments.second, new.orders)
        fresh[name] = SoapBlock(new.basis, AdamMoments(first, second))
    return fresh


def soap(
    learning_rate: optax.ScalarOrSchedule,
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.95,
    b2: float | Float[Array, ""] = 0.95,
    refresh_every: Interval = 10,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in the eigenbasis of Shampoo's second moments, for every matrix of a model.

    This is `scale_by_soap`, then decoupled weight decay and the learning rate.

    Args:
      learning_rate: a number or a schedule; 3e-3 is the authors'.
      layout: the matrices, see `curvax.scale_by_soap`; None reads them from shapes.
      b1: decay of the average of gradients.
      b2: decay of the averages of squares and outer products.
      refresh_every: number of steps between bases. They begin with one in each step and get rarer,
        see `curvax.optim.growing_interval`; a schedule is used as it is.
      weight_decay: decoupled, `params -= learning_rate weight_decay params`; None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`.

    Raises:
      ValueError: as `scale_by_soap` does.

    Cost: that of `scale_by_soap`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> target = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> loss = lambda w: jnp.sum((w - target) ** 2)
      >>> tx, w = curvax.soap(0.1), jnp.zeros((2, 2))
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(100):
      ...     w, state = step(w, state)
      >>> bool(loss(w) < 0.5)
      True

    References: see `scale_by_soap`.

    Deviates: weight decay is of the params before the step, in the authors' code after it.
    """
    rule = scale_by_soap(layout, b1, b2, refresh_every=growing_interval(refresh_every))
    return finish(rule, learning_rate, weight_decay=weight_decay)
