"""Newton's method with a Hessian that is formed, factorized once, and used for several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_params
from curvax._trees import all_finite, dimension
from curvax._types import Batch, Count, Matvec, Params, PRNGKey, Scalar
from curvax.objective import Objective
from curvax.optim._estimating import Estimator, estimating
from curvax.optim._finish import finish
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.products import hvp, to_dense
from curvax.solve import Dense, EigenDecomposition, absolute, decompose

KeepsEigen: TypeAlias = Any
"""A state whose field `curvature` is an `EigenDecomposition`."""


class LazyNewtonInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      smallest: smallest eigenvalue of the curvature in use.
      largest: largest eigenvalue of the curvature in use.
      damping: the damping in effect.
      num_nonfinite: the number of steps so far with a gradient or a curvature that was not finite.
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
      curvature: the eigendecomposition in use.
      info: `LazyNewtonInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    curvature: EigenDecomposition
    info: LazyNewtonInfo


def scale_by_lazy_newton(
    damping: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by `(|C| + damping I)^-1`, with C the last curvature that was passed, as a matrix.

    `|C|` has the absolute eigenvalues of C: the Newton direction where C is positive definite, the
    saddle-free one elsewhere.

    Args:
      damping: in units of an eigenvalue of C: a number, or a schedule of the step. An update that
        is passed `damping=` (`curvax.levenberg_marquardt` does so) uses that instead.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params=None, *,
      curvature=None, damping=None)`. The curvature is a `curvax.solve.Dense`, which averages over
      micro-batches. `curvax.optim.curvature_rule` says what happens with numbers that are not
      finite. The state is a `ScaleByLazyNewtonState`.

    Raises:
      ValueError: The damping is not positive.

    Cost: `9 d^3` multiplications for a new curvature, `2 d^2` for a step. Memory: `d^2` floats.

    References: Doikov, Chayti and Jaggi (2023), Second-order optimization with lazy Hessians,
      https://arxiv.org/abs/2212.00781.
    """

    def init(params: Params) -> ScaleByLazyNewtonState:
        check_params(params)
        info = LazyNewtonInfo(zero_number(), zero_number(), zero_number(), zero_count())
        return ScaleByLazyNewtonState(zero_count(), zero_count(), init_eigen(params), info)

    def step(
        state: ScaleByLazyNewtonState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        # u = V (|lambda| + damping)^-1 V' g, with C = V lambda V'
        direction = absolute(state.curvature, gradient, damping=context.damping)
        values = state.curvature.values
        info = {"smallest": values[0], "largest": values[-1], "damping": context.damping}
        return StepResult(updates=direction, state=state, info=info)

    return curvature_rule(init, step, take_in=take_in_matrix, damping=damping)


def lazy_newton(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    curvature_every: int | Int[Array, ""] = 1,
    matvec_of: Callable[..., Matvec] = hvp,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method on a dense matrix: `params -= learning_rate (|H| + damping I)^-1 g`.

    The Hessian H is formed and decomposed every `curvature_every` steps, and used with fresh
    gradients in between. This is `estimating(scale_by_lazy_newton(damping), ...)`, followed by the
    learning rate.

    Args:
      learning_rate: a number or a schedule; 1 is the full step.
      objective: the `curvax.Objective` that is minimized.
      damping: a number or a schedule, in units of an eigenvalue of H.
      curvature_every: number of steps between Hessians; step 0 forms one.
      matvec_of: `curvax.hvp`, or `curvax.ggnvp` for the Gauss-Newton matrix in place of the
        Hessian; bind options by `functools.partial`.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError, TypeError: At trace time, as `matvec_of` and `curvax.estimating` do.

    Cost: every `curvature_every` steps d products and `9 d^3` multiplications; `2 d^2` in each.
      Memory: `d^2` floats.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> tx = curvax.lazy_newton(1.0, objective, damping=1e-6, curvature_every=10)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> [round(x, 3) for x in updates.ravel().tolist()]
      [2.0, -1.0]

    References: Doikov, Chayti and Jaggi (2023), Second-order optimization with lazy Hessians,
      https://arxiv.org/abs/2212.00781.

    Deviates: absolute eigenvalues in place of cubic or quadratic regularization; with the latter:
      `curvax.gradient_regularized_newton(objective, curvature_every=...)`.
    """
    # Doikov, Chayti and Jaggi (2023): step k uses its own gradient, and the Hessian of the point
    # x_(k - k mod m), with m the interval.
    rule = scale_by_lazy_newton(damping)
    estimated = estimating(rule, matrix_of(objective, matvec_of), curvature_every)
    return finish(estimated, learning_rate)


def matrix_of(objective: Objective, matvec_of: Callable[..., Matvec]) -> Estimator:
    """Return the estimator that forms the matrix of a matvec, eight columns at a time."""

    def estimator(params: Params, batch: Batch, key: PRNGKey) -> Dense:
        del key
        matvec = matvec_of(objective, params, batch)
        # In chunks, for d products side by side would hold d linearized passes in memory.
        return Dense(to_dense(matvec, params, chunk_size=8))

    return estimator


def init_eigen(params: Params) -> EigenDecomposition:
    """Return the eigendecomposition of no curvature at all."""
    # Of zeros: what it gives is never emitted, for the step is zero before the first curvature.
    size = dimension(params)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    return EigenDecomposition(jnp.zeros(size, dtype), jnp.zeros((size, size), dtype))


def take_in_matrix(
    state: KeepsEigen, curvature: Dense, gradient: PyTree[Array]
) -> tuple[KeepsEigen, Bool[Array, ""]]:
    """Return a state with the eigendecomposition of a matrix, and whether the matrix is finite."""
    del gradient
    # Once for each Hessian: with V and lambda a step costs 2 d^2 for any damping.
    matrix = curvature.matrix.astype(state.curvature.values.dtype)
    is_finite = all_finite(matrix)
    # Zeros in its place, for a decomposition of NaN need not end. The builder does not use their
    # result.
    eigen = decompose(Dense(jnp.where(is_finite, matrix, 0)))
    return state._replace(curvature=eigen), is_finite
