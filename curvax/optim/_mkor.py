"""MKOR: inverses of both sides of every matrix, from mean inputs and mean cotangents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from curvax._checks import check_at_least, check_choice, check_decay, check_precision, describe
from curvax._trees import select_slices
from curvax._types import Batch, Count, Params, PRNGKey
from curvax.kron import Layout, MeanVectors, mean_vectors
from curvax.kron._kron_factor import STRUCTURES, Diagonal, Full, Identity, KronFactor, matmul
from curvax.kron._layout import Block
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._matrices import Matrices, MatrixBlock, MatrixMethod, scale_by_matrices
from curvax.optim._matrix_parts import (
    Decay,
    ScaleRule,
    Sides,
    identity_like,
    momentum_norm,
    scaled,
)
from curvax.optim._plateau import until_plateau
from curvax.optim._refresh import Interval, check_interval, growing_interval

VARIANTS = ("exact", "reference")


def scale_by_mkor(
    layout: Layout,
    decay: float | Float[Array, ""] = 0.95,
    stabilize_above: float | None = 2.0,
    zeta: float | Float[Array, ""] = 0.9,
    variant: str = "exact",
    scale: ScaleRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by inverses of averages of rank one, `U = L^-1 V R^-1`, given vectors as data.

    With the mean input a of a matrix and the mean cotangent g of its outputs,

      L <- decay L + (1 - decay) a a',   R <- decay R + (1 - decay) g g',

    from the identity on. The inverses are updated, and no matrix is ever inverted: by Sherman and
    Morrison, for x = a and likewise for g, with `c = decay`,

      L^-1 <- (L^-1 - (1 - c) L^-1 x x' L^-1 / (c + (1 - c) x' L^-1 x)) / c.

    Where no vector has had a part the inverse grows by 1 / c each time. The stabilizer mixes one
    with an entry above `stabilize_above` with the identity, `L^-1 <- zeta L^-1 + (1 - zeta) I`. U
    is then given the norm of V.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`. Biases are in
        no matrix, and follow the fallback. A diagonal side has the diagonal of L; with the
        structure "identity" a side is left as it is.
      decay: c, the decay of L and R for each curvature that comes, not for each step.
      stabilize_above: largest entry of an inverse that is let be; None leaves the stabilizer out.
      zeta: weight of the inverse beside the identity, where it is stabilized.
      variant: "exact", or "reference" for what the released code does: `M = c L^-1 + (1 - c) I`,
        then the inverse of `M^-1 + x x'`.
      scale: how long the steps are; by default as gradients, `curvax.optim.momentum_norm()` (the
        momentum is the gradient here). `curvax.optim.unscaled()` leaves U as it is.
      fallback: the rule for what is in no matrix; None leaves the gradient as it is, so that all
        together has the length of the gradient.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *,
      curvature=None)`. The curvature is what `curvax.kron.mean_vectors` returns; without one the
      inverses stay as they are, and before the first the step is zero. A side whose vectors are
      zero, of an expert that no position reached, stays as it is too. Where an update of an inverse
      is not finite, the last good one goes on and `state.info.num_failures` counts. The state is a
      `curvax.optim.ScaleByMatricesState`.

    Raises:
      ValueError: The variant is unknown, a decay is not in [0, 1), `stabilize_above` is below 1, or
        updates or curvature are of another layout.

    Cost: `i o (i + o)` multiplications a matrix `[i, o]` and step, and `2 (i^2 + o^2)` for a
      curvature. Memory: `i^2 + o^2` floats a matrix.

    Example: `L = 0.5 I + 0.5 a a'` has the eigenvector a, of eigenvalue 0.5 + 0.5 |a|^2, and R is
      0.5 + 0.5.
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> w, a = jnp.zeros((2, 1)), jnp.array([[1.0, 3.0]])
      >>> layout = curvax.kron_layout(objective, w, (a, jnp.ones((1, 1))))
      >>> rule = curvax.optim.scale_by_mkor(layout, 0.5, scale=curvax.optim.unscaled())
      >>> vectors = {"": curvax.kron.MeanVectors(a[None], jnp.ones((1, 1, 1)))}
      >>> updates, state = rule.update(a.T, rule.init(w), curvature=vectors)
      >>> bool(jnp.allclose(updates, a.T / 5.5))
      True

    References: Mozaffari et al. (2023), MKOR: Momentum-enabled Kronecker-factor-based optimizer
      using rank-1 updates, https://arxiv.org/abs/2306.01685, algorithm 1; Sherman and Morrison
      (1950).

    Deviates: the rank-one update that the paper prints is not the inverse of its average (19 % off
      on a random 5 x 5 matrix), and is left out. The released code also clips activations to +-100,
      keeps inverses in 16 bits, and sums the norms of weight and bias. Its stabilizer acts in the
      update after the one that saw a large entry, and in place of it.
    """
    method = _mkor_method(decay, stabilize_above, zeta, variant, scale or momentum_norm())
    return scale_by_matrices(layout, method, fallback=fallback)


def mkor(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    layout: Layout,
    curvature_every: Interval = 10,
    decay: float | Float[Array, ""] = 0.95,
    momentum: float | Float[Array, ""] = 0.9,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MKOR: gradient descent with momentum, in directions of rank-one curvature.

    This is `estimating(scale_by_mkor(layout, decay), estimator)` with the estimator
    `curvax.kron.mean_vectors(objective, layout, params, batch)`; then momentum, decoupled weight
    decay and the learning rate.

    Args:
      learning_rate: a number or a schedule; steps are as long as those of gradient descent with
        momentum, whose rates fit.
      objective: the `curvax.Objective` that is minimized.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      curvature_every: number of steps between updates of the inverses. They begin with one in each
        step and get rarer, see `curvax.optim.growing_interval`; a schedule is used as it is.
      decay: decay of the averages for each such update.
      momentum: decay of the sum of past steps, as in `optax.trace`; the number 0 leaves out the
        buffer.
      weight_decay: `params -= learning_rate weight_decay params`; None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: At trace time, as `scale_by_mkor`, `curvax.kron.mean_vectors` and
        `curvax.estimating` do.

    Cost: that of `scale_by_mkor`; every `curvature_every` steps a forward and a backward pass
      without kernels' gradients.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> tx = curvax.optim.mkor(0.05, objective, layout)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradient = jax.grad(objective)(params, batch)
      ...     updates, state = tx.update(gradient, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> bool(objective(params, batch) < 1e-3)
      True

    References: see `scale_by_mkor`; momentum, interval and updates in every
      step at first are those of the released code.
    """
    rule = _estimated(objective, layout, curvature_every, decay)
    return finish(rule, learning_rate, momentum=momentum, weight_decay=weight_decay)


def mkor_h(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    layout: Layout,
    curvature_every: Interval = 10,
    decay: float | Float[Array, ""] = 0.95,
    momentum: float | Float[Array, ""] = 0.9,
    tolerance: float = 1e-3,
    patience: int = 100,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MKOR until the loss stops falling, and from there on gradient descent with momentum.

    This is `mkor` with its rule inside `curvax.optim.until_plateau(rule, objective, tolerance,
    patience)`: after the switch neither vectors are measured nor inverses applied.

    Args:
      learning_rate: see `mkor`; it serves both, for their steps are equally long.
      objective: the `curvax.Objective` that is minimized.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      curvature_every: number of steps between updates of the inverses, see `mkor`.
      decay: decay of the averages for each such update.
      momentum: decay of the sum of past steps; it goes on through the switch.
      tolerance: see `curvax.optim.until_plateau`.
      patience: number of steps without progress that switch.
      weight_decay: `params -= learning_rate weight_decay params`; None leaves it out.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`, or
      also with `value=loss`.

    Raises:
      ValueError, TypeError: At trace time, as `mkor` and `curvax.optim.until_plateau` do.

    Cost: that of `mkor`, and that of gradient descent after the switch. The loss costs nothing
      where it is that of a gradient in the same compiled step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.ones((2, 1)), (jnp.eye(2), jnp.zeros((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> tx = curvax.optim.mkor_h(0.1, objective, layout, patience=2)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)

    References: Mozaffari et al. (2023), for the idea; the rule of the switch is in no
      publication or code, and is ours.
    """
    rule = _estimated(objective, layout, curvature_every, decay)
    switching = until_plateau(rule, objective, tolerance, patience)
    return finish(switching, learning_rate, momentum=momentum, weight_decay=weight_decay)


def _estimated(
    objective: Objective, layout: Layout, curvature_every: Interval, decay: Decay
) -> optax.GradientTransformationExtraArgs:
    """Return the rule with its estimator, of the batch's own targets."""

    def estimate(params: Params, batch: Batch, key: PRNGKey) -> dict[str, MeanVectors]:
        del key  # nothing is drawn
        return mean_vectors(objective, layout, params, batch)

    check_interval(curvature_every=curvature_every)
    # At first the inverses are the identity, and cotangents change within a few steps.
    interval = growing_interval(curvature_every)
    return estimating(scale_by_mkor(layout, decay), estimate, interval)


def _mkor_method(
    decay: Decay, stabilize_above: float | None, zeta: Decay, variant: str, scale: ScaleRule
) -> MatrixMethod:
    """Return what MKOR does with every matrix; the inverses are its preconditioner."""
    check_decay(decay=decay, zeta=zeta)
    check_precision(decay=decay, zeta=zeta)
    if isinstance(decay, int | float) and decay == 0:
        raise ValueError("decay must be above 0: a single product x x' has no inverse.")
    check_choice("variant", variant, VARIANTS)
    if stabilize_above is not None:
        # Below 1 the identity itself would have to be mixed.
        check_at_least(1, stabilize_above=stabilize_above)
    update = _exact if variant == "exact" else _reference

    def init(block: Block, V: Matrices) -> MatrixBlock:
        # Algorithm 1: both inverses are the identity at first.
        sides = []
        for name, shape in zip(block.structures, block.factor_shapes, strict=True):
            zeros = STRUCTURES[name].from_moment(jnp.zeros(shape, V.dtype))
            sides.append(identity_like(zeros))
        return MatrixBlock(preconditioner=Sides(*sides), memory=scale.init(V))

    def average(block: Block, state: MatrixBlock, V: Matrices, count: Count) -> MatrixBlock:
        del block, count
        return state._replace(memory=scale.average(state.memory, V))

    def take_in(state: MatrixBlock, vectors: MeanVectors) -> MatrixBlock:
        fresh: list[KronFactor] = []
        for inverse, rows in zip(state.preconditioner, vectors, strict=True):
            _check_vectors(inverse, rows)
            if isinstance(inverse, Identity):  # a side that is left as it is
                fresh.append(inverse)
                continue
            updated = update(inverse, rows, decay)
            if stabilize_above is not None:
                updated = _stabilized(updated, stabilize_above, zeta)
            # Without vectors there is nothing to forget an average for.
            has_vectors = jnp.any(rows != 0, axis=(1, 2))
            fresh.append(select_slices(has_vectors, updated, inverse))
        return state._replace(preconditioner=Sides(*fresh))

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        left, right = state.preconditioner
        # U = L^-1 V R^-1
        U = right.right(left.left(V))
        return scaled(scale, state.memory, U, V, count + 1), state

    return MatrixMethod(init=init, average=average, step=step, take_in=take_in)


def _check_vectors(inverse: KronFactor, rows: Float[Array, "s k n"]) -> None:
    """Raise unless there are vectors for every slice of a side, of its size."""
    stack, size = len(inverse.trace()), inverse.size
    # A stack of one would broadcast.
    if rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != (stack, size):
        raise ValueError(
            f"curvature is of another layout: vectors [{stack}, k, {size}] were expected, got "
            f"{describe(rows)}. Pass the layout of this rule to curvax.kron.mean_vectors."
        )


def _exact(inverse: KronFactor, vectors: Float[Array, "s k n"], decay: Decay) -> KronFactor:
    """Return the inverse of `c L + (1 - c) sum_k x_k x_k'`."""
    forgotten = _times(1 / decay, inverse)
    return _with_vectors(forgotten, vectors, 1 - decay)


def _reference(inverse: KronFactor, vectors: Float[Array, "s k n"], decay: Decay) -> KronFactor:
    """Return the inverse of `(c L^-1 + (1 - c) I)^-1 + sum_k x_k x_k'`."""
    return _with_vectors(_mixed(inverse, decay), vectors, 1)


def _with_vectors(inverse: KronFactor, vectors: Float[Array, "s k n"], weight: Decay) -> KronFactor:
    """Return the inverse of `M + weight sum_k x_k x_k'`, from that of M."""
    for k in range(vectors.shape[1]):
        inverse = _with_vector(inverse, vectors[:, k], weight)
    return inverse


def _with_vector(inverse: KronFactor, x: Float[Array, "s n"], weight: Decay) -> KronFactor:
    """Return the inverse of `M + weight x x'` by Sherman and Morrison, or of its diagonal.

    With `y = M^-1 x` it is `M^-1 - weight y y' / (1 + weight x'y)`; the denominator is at least 1.
    """
    if isinstance(inverse, Full):
        y = matmul(inverse.matrix, x[:, :, None])
        denominator = 1 + weight * jnp.sum(x[:, :, None] * y, axis=1, keepdims=True)
        # The product y y' comes first, entry by entry, so that the matrix stays symmetric.
        change = y * y.mT * (weight / denominator)
        return Full((inverse.matrix - change).astype(inverse.matrix.dtype))
    if isinstance(inverse, Diagonal):
        entries = inverse.entries
        return Diagonal((entries / (1 + weight * entries * x * x)).astype(entries.dtype))
    return inverse


def _stabilized(inverse: KronFactor, threshold: float, zeta: Decay) -> KronFactor:
    """Mix an inverse with the identity where it has an entry above the threshold."""
    # The largest entry of a positive definite matrix is on its diagonal.
    is_large = jnp.max(inverse.diagonal(), axis=1) > threshold
    return select_slices(is_large, _mixed(inverse, zeta), inverse)


def _mixed(inverse: KronFactor, zeta: Decay) -> KronFactor:
    """Return `zeta L^-1 + (1 - zeta) I`."""
    return _times(zeta, inverse).damped(1 - zeta)


def _times(c: Decay, factor: KronFactor) -> KronFactor:
    # A decay in float64 does not widen the state.
    result: KronFactor = jax.tree.map(lambda x: (c * x).astype(x.dtype), factor)
    return result
