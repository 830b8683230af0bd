"""Learning rate and momentum that minimize the quadratic model of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from curvax._shared import unwrap
from curvax._trees import all_finite, inner_product, keep_unless
from curvax._types import Batch, Params, Scalar, at_least_float32
from curvax.objective import Objective
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
      previous: the last step taken.
      inner_state: of the wrapped transformation.
      info: `QuadraticModelInfo`.
    """

    previous: PyTree[Array]
    inner_state: Any
    info: QuadraticModelInfo


def quadratic_model(
    inner: optax.GradientTransformation, objective: Objective, damping: float | Array = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Choose learning rate and momentum in every step by minimizing the quadratic model of the loss exactly.

    With D the direction (minus what `inner` returns), d the previous step and F the exact Gauss-Newton matrix of the
    batch: minimize `M(alpha, mu) = g.s + s'(F + damping I)s / 2` over `s = alpha D + mu d`, and step s.

    Args:
      inner: gives the preconditioned gradient, as `curvax.estimating(curvax.scale_by_kfac(layout), estimator)` does.
      objective: a `curvax.Objective`.
      damping: of the model, where the update is not given `damping=` (as `curvax.levenberg_marquardt` gives it).

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer: no learning rate comes after it. Call
      `update(grads, state, params, batch=batch)` with gradients of the same batch. State is a `QuadraticModelState`.

    Raises:
      ValueError: no params or no batch.
      TypeError: a model through which forward mode does not pass.

    Cost: a linearization (a forward pass) and two products of the Jacobian with a vector: about a gradient.

    Example: one step solves a linear least-squares problem.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> estimator = curvax.kron.estimator(objective, layout, fisher="exact")
      >>> tx = curvax.quadratic_model(curvax.estimating(curvax.scale_by_kfac(layout, 1e-6), estimator), objective)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)
      >>> [round(x, 3) for x in updates.ravel().tolist()], round(state.info.learning_rate.item(), 3)
      ([2.0, -1.0], 1.0)

    References: Martens and Grosse (2015), sections 6.4 and 7.
    """
    inner = optax.with_extra_args_support(inner)
    own_damping = damping

    def init(params: Params) -> QuadraticModelState:
        number = lambda: jnp.zeros([], jnp.float32)
        previous = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        return QuadraticModelState(
            previous, inner.init(params), QuadraticModelInfo(number(), number(), number())
        )

    def update(
        updates: PyTree,
        state: QuadraticModelState,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        damping: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, QuadraticModelState]:
        if params is None or batch is None:
            raise ValueError(
                "the quadratic model needs both: tx.update(grads, state, params, batch=batch)."
            )
        given = {} if damping is None else {"damping": damping}
        direction, inner_state = inner.update(
            updates, state.inner_state, params, batch=batch, **given, **extra
        )
        direction = jax.tree.map(lambda u: -at_least_float32(u), direction)
        pair = [direction, state.previous]
        slope = jnp.stack([inner_product(updates, s) for s in pair])
        gram = jnp.array([[inner_product(a, b) for b in pair] for a in pair])
        curvature = quadratic_form(objective, params, batch, pair)
        weights = _minimizer(
            curvature + (own_damping if damping is None else damping) * gram, slope
        )
        step = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, *pair)
        info = QuadraticModelInfo(
            *(x.astype(jnp.float32) for x in (*weights, jnp.dot(weights, slope) / 2))
        )
        emitted = jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates)
        good = all_finite(step)  # an update of NaN must not stay in the state
        new = QuadraticModelState(
            jax.tree.map(lambda s, p: s.astype(p.dtype), step, state.previous), inner_state, info
        )
        return emitted, keep_unless(good, new, state._replace(inner_state=inner_state))

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def quadratic_form(
    objective: Objective, params: Params, batch: Batch, vectors: Sequence[Params]
) -> Float[Array, "k k"]:
    """Return `v_i' F v_j` with F the Gauss-Newton matrix of the batch, by one product with the Jacobian for each vector."""
    inputs, targets = batch
    outputs, jacobian = linearize(
        lambda p: objective.outputs(p, inputs), params, "Use a fixed learning rate."
    )
    own = lambda v: jax.tree.map(lambda x, p: x.astype(p.dtype), v, params)
    pushed = [jacobian(own(v)) for v in vectors]
    curved = [objective.loss.curvature_product(outputs, unwrap(targets), u) for u in pushed]
    return jnp.array([[inner_product(u, c) for c in curved] for u in pushed])


def _minimizer(matrix: Float[Array, "2 2"], slope: Float[Array, " 2"]) -> Float[Array, " 2"]:
    """Solve `matrix w = -slope`; along the direction alone where the two vectors are (nearly) one, as in the first step."""
    first = -slope[0] / jnp.where(matrix[0, 0] > 0, matrix[0, 0], jnp.inf)  # no curvature, no step
    determinant = matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]
    regular = determinant > jnp.finfo(matrix.dtype).eps * matrix[0, 0] * matrix[1, 1]
    both = jnp.array(
        [
            matrix[0, 1] * slope[1] - matrix[1, 1] * slope[0],
            matrix[1, 0] * slope[0] - matrix[0, 0] * slope[1],
        ]
    )
    return jnp.where(
        regular,
        both / jnp.where(regular, determinant, 1),
        jnp.stack([first, jnp.zeros_like(first)]),
    )
