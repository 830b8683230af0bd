"""Descent in the Krylov space of the gradient: Newton's method in a few dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_params
from curvax._trees import all_finite, combine_rows, norm, safe_divide
from curvax._types import Batch, Count, Matvec, Params, PRNGKey, Scalar
from curvax.objective import Objective
from curvax.optim._cubic_newton import cubic_family, next_regularization
from curvax.optim._estimating import estimating
from curvax.optim._newton import check_curvature
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.optim._step_search import search_info, search_step, start_of
from curvax.products import hvp
from curvax.solve import CubicInfo, Dense, EigenDecomposition, cubic_step, decompose
from curvax.spectra import Lanczos
from curvax.spectra._functions import krylov_space
from curvax.spectra._lanczos import tridiagonal

# t: order; C: curvature, g: gradient; V: [t + 1, d], the basis, rows orthonormal; T = V C V';
# theta: eigenvalues of T (Ritz values); M: regularization


class KrylovDescentInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      smallest: smallest Ritz value of the curvature in the Krylov space.
      largest: largest Ritz value.
      shift: `M r / 2` of the last trial; 0 for the minimum of the quadratic model itself.
      trials: how many steps were tried.
      accepted: whether one of them was taken.
      num_rejected: the number of updates so far in which none was.
      num_nonfinite: the number of updates so far with a gradient or a curvature that was not
        finite.
    """

    smallest: Scalar
    largest: Scalar
    shift: Scalar
    trials: Int[Array, ""]
    accepted: Bool[Array, ""]
    num_rejected: Int[Array, ""]
    num_nonfinite: Int[Array, ""]


class KrylovDescentState(NamedTuple):
    """State of `scale_by_krylov_descent`.

    Attributes:
      count: steps taken.
      regularization: M of the next cubic term; 0 while none was needed.
      info: `KrylovDescentInfo`.
    """

    count: Count
    regularization: Scalar
    info: KrylovDescentInfo


def scale_by_krylov_descent(
    objective: Objective, order: int = 5, max_trials: int = 40
) -> optax.GradientTransformationExtraArgs:
    """Minimize the quadratic model of the loss over `span{g, C g, ..., C^order g}`.

    Where C is positive definite on that space, the step is tried that minimizes `g's + s'C s / 2`
    there. Where it is not, so that the model has no minimum, or where that step does not lower the
    loss by a tenth of what the model does, the steps are those that minimize the model with `M / 6
    |s|^3` added, for M, 2 M, 4 M ... The first M of all is `L^2 / |g|`, with L the largest absolute
    Ritz value, which shifts the eigenvalues by about L / 3; after a step with a cubic term M halves
    for the next one. If no trial succeeds, the update is zero and the state stays bitwise what it
    was, except for M, which goes on from where the search ended. Where `g = 0` there is no Krylov
    space, and no step.

    Args:
      objective: the `curvax.Objective` that is minimized; it is evaluated at the trial points on
        the batch of the update.
      order: the number of products in a step; above d - 1 it is cut to that.
      max_trials: the largest number of trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer (no learning rate comes after it),
      with `update(updates, state, params, *, batch, curvature)`. Every update needs the curvature,
      a matvec such as `curvax.hvp(...)`. `curvax.optim.curvature_rule` says what happens with
      numbers that are not finite. The state is a `KrylovDescentState`.

    Raises:
      ValueError: The order is negative, `max_trials` is below 1, the curvature, params or batch are
        missing, or gradients are masked out.

    Cost: `order` + 1 products, a loss and gradient for each trial. Memory: `order` + 4 trees like
      params.

    References: as for `curvax.krylov_descent`.
    """
    check_count(0, order=order)
    check_count(1, max_trials=max_trials)

    def init(params: Params) -> KrylovDescentState:
        check_params(params)
        info = KrylovDescentInfo(
            smallest=zero_number(),
            largest=zero_number(),
            shift=zero_number(),
            trials=zero_count(),
            accepted=jnp.array(False),
            num_rejected=zero_count(),
            num_nonfinite=zero_count(),
        )
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        return KrylovDescentState(zero_count(), jnp.zeros([], dtype), info)

    def step(
        state: KrylovDescentState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        check_curvature(context.curvature, gradient)
        start = start_of(objective, gradient, context)
        krylov, length = krylov_space(context.curvature, gradient, order + 1)
        eigen, is_finite = _ritz_pairs(krylov)
        # The basis begins with g / |g|: V g = |g| e_1.
        coordinates = jnp.zeros_like(eigen.values).at[0].set(length)

        def model_step(M: Scalar) -> tuple[PyTree[Array], CubicInfo]:
            y, info = cubic_step(eigen, coordinates, regularization=M)
            return combine_rows(y, krylov.basis), info

        # The first M is in its unit, [f / x^2]^2 / [f / x]; later ones are known from searches.
        theta, eps = eigen.values, jnp.finfo(eigen.values.dtype).eps
        size = jnp.max(jnp.abs(theta))
        natural = safe_divide(size**2, length)
        known = jnp.where(state.regularization > 0, state.regularization, natural)

        # Without a cubic term first, if the model has a minimum.
        is_definite = theta[0] > len(theta) * eps * size
        first = jnp.where(is_definite, 0, known)
        family = cubic_family(model_step, shorten=lambda M: jnp.where(M > 0, 2 * M, known))
        is_usable = context.gradient_is_finite & is_finite & (length > 0)
        last = search_step(start, family, first, max_trials, is_usable)

        M = next_regularization(last, theta, state.regularization)
        fresh = jnp.where(last.parameter > 0, M, state.regularization)
        info = {
            "smallest": theta[0],
            "largest": theta[-1],
            "shift": last.parameter * norm(last.step) / 2,
            **search_info(last, state.info.num_rejected),
        }
        return StepResult(
            updates=last.step,
            state=state._replace(regularization=fresh),
            info=info,
            is_finite=is_finite,
            is_accepted=last.accepted,
        )

    return curvature_rule(init, step)


def krylov_descent(
    objective: Objective,
    order: int = 5,
    matvec_of: Callable[..., Matvec] = hvp,
    max_trials: int = 40,
) -> optax.GradientTransformationExtraArgs:
    """Descent in Krylov spaces: `x += argmin g's + s'H s / 2` over `span{g, H g, ..., H^order g}`.

    H is the Hessian of the batch, never formed. Order 0 is gradient descent with the best rate for
    the model, order d - 1 Newton's method; an order between them acts on the large eigenvalues as
    Newton's method does. Steps that do not lower the loss, and models without a minimum, get a
    cubic term. There is no learning rate. This is
    `estimating(scale_by_krylov_descent(objective, order), ...)`.

    Args:
      objective: the `curvax.Objective` that is minimized.
      order: the largest power of H.
      matvec_of: `curvax.hvp` or `curvax.ggnvp`, or any approximation of the Hessian by `(objective,
        params, batch) -> matvec`; bind options, such as `microbatch=`, by `functools.partial`.
      max_trials: the largest number of trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)` with
      gradients of that batch.

    Raises:
      ValueError, TypeError: At trace time, as `scale_by_krylov_descent` and `curvax.estimating` do.

    Cost: a linearized gradient, `order` + 1 products, and a loss and gradient for each trial.
      Memory: `order` + 4 trees like params.

    Example: a quadratic loss of two parameters, solved in one step of order 1.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> tx = curvax.krylov_descent(objective, order=1)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> [round(x, 3) for x in updates.ravel().tolist()]
      [2.0, -1.0]

    References: Doikov and Rodomanov (2023), Polynomial preconditioning for gradient methods, of
      which only the abstract was read: a Krylov step is its adaptive preconditioner; the step is
      from general knowledge. Carmon and Duchi (2018), Analysis of Krylov subspace solutions of
      regularized nonconvex quadratic problems, for cubic models in Krylov spaces.

    Deviates: for a curvature that is not fixed, as the paper's is, but that of every step; with a
      search, and a cubic term where the model has no minimum, which are ours. On a positive
      definite Hessian the first trial is what `curvax.newton_cg` with `order` + 1 products does.
    """

    def matvec(params: Params, batch: Batch, key: PRNGKey) -> Matvec:
        del key
        return matvec_of(objective, params, batch)

    return estimating(scale_by_krylov_descent(objective, order, max_trials), matvec)


def _ritz_pairs(krylov: Lanczos) -> tuple[EigenDecomposition, Bool[Array, ""]]:
    """Return the eigendecomposition of T, and whether T is finite.

    Rows that follow an invariant subspace are zero. Their zeros on the diagonal of T would pass for
    eigenvalues of the curvature; the largest entry takes their place, in which g has no part.
    """
    is_finite = all_finite((krylov.diagonal, krylov.off_diagonal))
    # A zero beside the diagonal ends the space that g reaches.
    ends = jnp.cumprod(krylov.off_diagonal[:-1] > 0) == 0
    is_beyond = jnp.concatenate([jnp.zeros(1, bool), ends])
    T = tridiagonal(krylov.diagonal, krylov.off_diagonal)
    filler = jnp.max(jnp.abs(T))
    T = jnp.where(jnp.diag(is_beyond), filler, T)
    # Zeros in place of NaN, of which a decomposition need not end; the step is not used then.
    return decompose(Dense(jnp.where(is_finite, T, 0))), is_finite
