"""Learning rate and momentum that minimize the quadratic model of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from curvax._checks import params_and_batch
from curvax._shared import unwrap
from curvax._trees import all_finite, inner_product, keep_unless
from curvax._types import Batch, Params, Scalar, at_least_float32
from curvax.objective import Objective, Part, of_parts, penalty_diagonal
from curvax.optim._rule import transformation, zero_number
from curvax.products._linear import linearize


class QuadraticModelInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      learning_rate: the factor alpha of the direction.
      momentum: the factor mu of the previous step.
      predicted: change of the damped model, never positive.
    """

    learning_rate: Scalar
    momentum: Scalar
    predicted: Scalar


class QuadraticModelState(NamedTuple):
    """State of `quadratic_model`.

    Attributes:
      previous: the previous step.
      inner_state: state of the wrapped transformation.
      info: `QuadraticModelInfo`.
    """

    previous: PyTree[Array]
    inner_state: Any
    info: QuadraticModelInfo


def quadratic_model(
    inner: optax.GradientTransformation, objective: Objective, damping: float | Array = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Choose learning rate and momentum in every step: the minimum of the quadratic model.

    With D the direction (minus what `inner` returns), d the previous step and F the exact
    Gauss-Newton matrix of the
    batch: minimize `M(alpha, mu) = g.s + s'(F + damping I)s / 2` over `s = alpha D + mu d`, and
    step s.

    Args:
      inner: the transformation that returns the preconditioned gradient, as
        `curvax.estimating(curvax.scale_by_kfac(layout), estimator)` does.
      objective: the `curvax.Objective` that is minimized.
      damping: the damping of the model. An update that is passed `damping=`
        (`curvax.levenberg_marquardt` does so) uses that instead, and passes it on to `inner`.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer: no learning rate comes after it.
        Call
      `update(grads, state, params, batch=batch)` with gradients of the same batch. The state is a
      `QuadraticModelState`.

    Raises:
      ValueError: Params or batch are missing.
      TypeError: Forward-mode differentiation does not pass through the model.

    Cost: a linearization (a forward pass) and two products of the Jacobian with a vector: about a
      gradient.

    Example: one step solves a linear least-squares problem.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout, fisher="exact")
      >>> rule = curvax.estimating(curvax.scale_by_kfac(layout, 1e-6), estimator)
      >>> tx = curvax.quadratic_model(rule, objective)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> [round(x, 3) for x in updates.ravel().tolist()], round(state.info.learning_rate.item(), 3)
      ([2.0, -1.0], 1.0)

    References: Martens and Grosse (2015), sections 6.4 and 7, https://arxiv.org/abs/1503.05671.
    """
    inner = optax.with_extra_args_support(inner)
    damping_of_model = damping

    def init(params: Params) -> QuadraticModelState:
        previous = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        info = QuadraticModelInfo(zero_number(), zero_number(), zero_number())
        return QuadraticModelState(previous, inner.init(params), info)

    def update(
        updates: PyTree,
        state: QuadraticModelState,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        damping: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, QuadraticModelState]:
        params, batch = params_and_batch(params, batch, "the quadratic model needs both")
        direction, inner_state = inner.update(
            updates, state.inner_state, params, batch=batch, damping=damping, **extra
        )
        damping = damping_of_model if damping is None else damping

        # Section 7, equation for (alpha, mu): with S = [D, d] minimize g' S w + w' S' (F + damping
        # I) S w / 2.
        direction = jax.tree.map(lambda u: -at_least_float32(u), direction)
        pair = [direction, state.previous]
        slope = jnp.stack([inner_product(updates, s) for s in pair])
        gram = _gram(pair, pair)
        curvature = quadratic_form(objective, params, batch, pair)
        weights = _minimizer(curvature + damping * gram, slope)
        step = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, *pair)

        # At the minimum the model has changed by half of what its slope alone would give.
        predicted = jnp.dot(weights, slope) / 2
        alpha, mu, predicted = (x.astype(jnp.float32) for x in (*weights, predicted))
        info = QuadraticModelInfo(alpha, mu, predicted)

        emitted = jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates)
        previous = jax.tree.map(lambda s, p: s.astype(p.dtype), step, state.previous)
        new = QuadraticModelState(previous, inner_state, info)
        is_finite = all_finite(step)  # an update of NaN must not stay in the state
        return emitted, keep_unless(is_finite, new, state._replace(inner_state=inner_state))

    return transformation(init, update)


def quadratic_form(
    objective: Objective, params: Params, batch: Batch, vectors: Sequence[Params]
) -> Float[Array, "k k"]:
    """Return `v_i' F v_j` with F the Gauss-Newton matrix, by a Jacobian product for each vector."""
    if objective.parts:
        return _form_of_parts(objective, params, batch, vectors)
    inputs, targets = batch
    outputs, jacobian = linearize(
        lambda p: objective.outputs(p, inputs), params, "Use a fixed learning rate."
    )

    # F = J' S J, so v' F w = (J v)' S (J w), with S the curvature of the loss in the outputs.
    pushed, curved = [], []
    for vector in vectors:
        tangent = jax.tree.map(lambda x, p: x.astype(p.dtype), vector, params)
        in_outputs = jacobian(tangent)
        pushed.append(in_outputs)
        curved.append(objective.loss.curvature_product(outputs, unwrap(targets), in_outputs))
    return _gram(pushed, curved)


def _form_of_parts(
    objective: Objective, params: Params, batch: Batch, vectors: Sequence[Params]
) -> Float[Array, "k k"]:
    """Return `v_i' F v_j` of several parts, `F = sum_p w_p F_p` and the diagonals of penalties."""

    def of_part(part: Part, params: Params, rows: Batch) -> Float[Array, "k k"]:
        return quadratic_form(part.objective, params, rows, vectors)

    terms = [part.weight * form for part, form in of_parts(of_part, objective, params, batch)]
    diagonal = penalty_diagonal(objective, params)
    if diagonal is not None:
        # v' diag(h) w = v . (h w)
        curved = [jax.tree.map(jnp.multiply, diagonal, vector) for vector in vectors]
        terms.append(_gram(vectors, curved))
    return jnp.asarray(sum(terms))


def _gram(rows: Sequence[PyTree], columns: Sequence[PyTree]) -> Float[Array, "k k"]:
    """Return the matrix of inner products `row_i . column_j`."""
    products = [[inner_product(a, b) for b in columns] for a in rows]
    return jnp.array(products)


def _minimizer(matrix: Float[Array, "2 2"], slope: Float[Array, " 2"]) -> Float[Array, " 2"]:
    """Solve `matrix w = -slope`, along the direction alone where the two vectors are one."""
    (a, b), (c, d) = matrix
    p, q = slope
    along_direction = -p / jnp.where(a > 0, a, jnp.inf)  # no curvature, no step
    alone = jnp.stack([along_direction, jnp.zeros_like(along_direction)])

    # Cramer's rule, where the determinant is above its rounding: the previous step is 0 at first.
    determinant = a * d - b * c
    is_regular = determinant > jnp.finfo(matrix.dtype).eps * a * d
    both = jnp.stack([b * q - d * p, c * p - a * q])
    return jnp.where(is_regular, both / jnp.where(is_regular, determinant, 1), alone)
