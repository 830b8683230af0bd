"""Newton's method with a Hessian that is formed, factorized once, and used for several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import check_damping, check_params, check_precision
from curvax._trees import all_finite, keep_unless
from curvax._types import Count, Matvec, Params, Scalar
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.products import hvp, to_dense
from curvax.solve import Dense, EigenDecomposition, absolute, decompose


class LazyNewtonInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      smallest: eigenvalue of the curvature held.
      largest: eigenvalue of the curvature held.
      damping: in effect.
      num_nonfinite: steps with a gradient or a curvature that was not finite, so far.
    """

    smallest: Scalar
    largest: Scalar
    damping: Scalar
    num_nonfinite: Int[Array, ""]


class ScaleByLazyNewtonState(NamedTuple):
    """State of `scale_by_lazy_newton`.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in.
      curvature: the eigendecomposition held.
      info: `LazyNewtonInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    curvature: EigenDecomposition
    info: LazyNewtonInfo


def scale_by_lazy_newton(
    damping: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by `(|C| + damping I)^-1`, with C the last curvature that was given, as a matrix.

    `|C|` has the absolute eigenvalues of C: the Newton direction where C is positive definite, the saddle-free one
    elsewhere. A gradient that is not finite gives an update of NaN and leaves the state; a curvature that is not is not
    taken in.

    Args:
      damping: in units of an eigenvalue of C: a number, or a schedule of the step. An update that is given `damping=`
        (`curvax.levenberg_marquardt` does) takes that instead.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params=None, *, curvature=None, damping=None)`;
      curvature is a `curvax.solve.Dense`, which averages over micro-batches. State is a `ScaleByLazyNewtonState`.

    Raises:
      ValueError: damping that is not positive.

    Cost: `9 d^3` multiplications for a new curvature, `2 d^2` for a step. Memory: `d^2` floats.

    References: Doikov, Chayti and Jaggi (2023), Second-order optimization with lazy Hessians.
    """
    check_damping(damping)
    check_precision(damping=damping)
    own = damping

    def init(params: Params) -> ScaleByLazyNewtonState:
        check_params(params)
        count, number = lambda: jnp.zeros([], jnp.int32), lambda: jnp.zeros([], jnp.float32)
        info = LazyNewtonInfo(number(), number(), number(), count())
        return ScaleByLazyNewtonState(count(), count(), init_eigen(params), info)

    def update(
        updates: PyTree,
        state: ScaleByLazyNewtonState,
        params: Params | None = None,
        *,
        curvature: Dense | None = None,
        damping: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByLazyNewtonState]:
        del params, extra
        good = all_finite(updates)
        held, taken = take_in(state.curvature, curvature, good)
        strength = (
            own(state.count)
            if damping is None and callable(own)
            else own
            if damping is None
            else damping
        )
        num_refreshes = state.num_refreshes + (taken if curvature is not None else 0)
        steps = absolute(held, updates, damping=strength)
        amplitude = jnp.where(
            good, jnp.where(num_refreshes > 0, 1, 0), jnp.nan
        )  # without curvature no step
        steps = jax.tree.map(
            lambda s, u: jnp.where(amplitude == 0, 0, amplitude * s).astype(u.dtype), steps, updates
        )
        bad = state.info.num_nonfinite + ~(good & taken)
        number = lambda x: jnp.asarray(x, jnp.float32)
        info = LazyNewtonInfo(
            number(held.values[0]), number(held.values[-1]), number(strength), bad
        )
        new = ScaleByLazyNewtonState(
            jnp.asarray(optax.safe_increment(state.count)), num_refreshes, held, info
        )
        return steps, keep_unless(
            good, new, state._replace(info=state.info._replace(num_nonfinite=bad))
        )

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def lazy_newton(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    curvature_every: int | Int[Array, ""] = 1,
    matvec_of: Callable[..., Matvec] = hvp,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method for up to some thousand parameters: `params -= learning_rate (|H| + damping I)^-1 g`.

    The Hessian H is formed and decomposed every `curvature_every` steps, and used with fresh gradients in between.
    `estimating(scale_by_lazy_newton(damping), ...)`, then the rate.

    Args:
      learning_rate: number or schedule; 1 is the full step.
      objective: a `curvax.Objective`.
      damping: in units of an eigenvalue of H; number or schedule.
      curvature_every: steps between Hessians; step 0 forms one.
      matvec_of: `curvax.hvp`, or `curvax.ggnvp` for the Gauss-Newton matrix in place of the Hessian; with options by
        `functools.partial`.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: at trace time, as the product and `curvax.estimating`.

    Cost: every `curvature_every` steps d products and `9 d^3` multiplications; `2 d^2` in each. Memory: `d^2` floats.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> tx = curvax.lazy_newton(1.0, objective, damping=1e-6, curvature_every=10)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)
      >>> [round(x, 3) for x in updates.ravel().tolist()]
      [2.0, -1.0]

    References: Doikov, Chayti and Jaggi (2023), Second-order optimization with lazy Hessians.

    Deviates: absolute eigenvalues in place of cubic or quadratic regularization; with the latter:
      `curvax.gradient_regularized_newton(objective, curvature_every=...)`.
    """
    rule = estimating(
        scale_by_lazy_newton(damping), matrix_of(objective, matvec_of), curvature_every
    )
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))


def matrix_of(objective: Objective, matvec_of: Callable[..., Matvec]) -> Callable[..., Dense]:
    """Return the estimator that forms the matrix of `product(objective, params, batch)`, eight columns at a time."""
    return lambda params, batch, key: Dense(
        to_dense(matvec_of(objective, params, batch), params, chunk_size=8)
    )


def init_eigen(params: Params) -> EigenDecomposition:
    """Return the eigendecomposition of no curvature at all."""
    leaves = jax.tree.leaves(params)
    size, dtype = sum(x.size for x in leaves), jnp.result_type(jnp.float32, *leaves)
    return EigenDecomposition(jnp.zeros(size, dtype), jnp.zeros((size, size), dtype))


def take_in(
    held: EigenDecomposition, curvature: Dense | None, good: Array
) -> tuple[EigenDecomposition, Array]:
    """Return the eigendecomposition of a new curvature if there is one and all is finite, else what is held; and
    whether.
    """
    if curvature is None:
        return held, jnp.array(True)
    widened = Dense(curvature.matrix.astype(held.values.dtype))
    taken = good & all_finite(widened)
    fresh = decompose(Dense(jnp.where(taken, widened.matrix, 0)))
    return keep_unless(taken, fresh, held), taken
