"""Newton's method regularized by the norm of the gradient, as much as a search finds needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_params, check_positive
from curvax._trees import inner_product, norm
from curvax._types import Count, Matvec, Params, Scalar
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._lazy_newton import init_eigen, matrix_of, take_in_matrix
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.optim._step_search import Family, search_info, search_step, start_of
from curvax.products import hvp
from curvax.solve import EigenDecomposition, absolute

# gamma: trust radius, C: curvature, f: the loss, g: its gradient, x: params, s: the step


class GradientRegularizedInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      damping: `|g| / gamma` of the last trial.
      trials: how many steps were tried.
      accepted: whether one of them was taken.
      num_rejected: the number of updates so far in which none was.
      num_nonfinite: the number of updates so far with a gradient or a curvature that was not
        finite.
    """

    damping: Scalar
    trials: Int[Array, ""]
    accepted: Bool[Array, ""]
    num_rejected: Int[Array, ""]
    num_nonfinite: Int[Array, ""]


class GradientRegularizedState(NamedTuple):
    """State of `scale_by_gradient_regularized_newton`.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in; while it is 0 the updates are zero.
      gamma: the trust radius with which the next search begins.
      curvature: the eigendecomposition in use.
      info: `GradientRegularizedInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    gamma: Scalar
    curvature: EigenDecomposition
    info: GradientRegularizedInfo


def scale_by_gradient_regularized_newton(
    objective: Objective, gamma: float | Array = 1.0, max_trials: int = 40
) -> optax.GradientTransformationExtraArgs:
    """Search for a step `s = -(|C| + |g| / gamma I)^-1 g` that lowers the loss enough.

    The search tries gamma, gamma / 2, gamma / 4 ... until `f(x) - f(x + s) >= gamma |g(x + s)|^2 /
    (8 |g|)`; then gamma doubles for the next update, unless rounding hides the damping already.
    Every step satisfies `|s| <= gamma`. Where the loss is flat to rounding (the model predicts less
    than its precision), the search ends, with a step if gradients say that it gains, which is a
    success as any other; without one gamma stays. If no trial succeeds, the update is zero and
    the state stays bitwise what it was, except for gamma, which goes on from where the search
    ended, and for a curvature that came with the update.

    Args:
      objective: the `curvax.Objective` that is minimized; it is evaluated at the trial points on
        the batch of the update.
      gamma: the first trust radius, in the unit of params.
      max_trials: the largest number of trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer (no learning rate comes after it),
      with `update(updates, state, params, *, batch, curvature=None)`. The curvature is a
      `curvax.solve.Dense`; with None the last one is used. `curvax.optim.curvature_rule` says what
      happens with numbers that are not finite. The state is a `GradientRegularizedState`.

    Raises:
      ValueError: Gamma is not positive, `max_trials` is below 1, or params or batch are missing.

    Cost: a loss and gradient and `2 d^2` multiplications for each trial (one or two as a rule); `9
      d^3` for a new curvature.

    References: Semenov, Jaggi and Doikov (2025), Gradient-normalized smoothness for optimization
      with approximate Hessians.
    """
    check_positive(gamma=gamma)
    check_count(1, max_trials=max_trials)

    def init(params: Params) -> GradientRegularizedState:
        check_params(params)
        eigen = init_eigen(params)
        info = GradientRegularizedInfo(
            damping=zero_number(),
            trials=zero_count(),
            accepted=jnp.array(False),
            num_rejected=zero_count(),
            num_nonfinite=zero_count(),
        )
        return GradientRegularizedState(
            count=zero_count(),
            num_refreshes=zero_count(),
            gamma=jnp.full([], gamma, eigen.values.dtype),
            curvature=eigen,
            info=info,
        )

    def step(
        state: GradientRegularizedState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        start, gradient_norm = start_of(objective, gradient, context), norm(gradient)

        # s = -(|C| + |g| / gamma I)^-1 g, whose model falls by -g's / 2
        def propose(gamma: Scalar) -> tuple[PyTree[Array], Scalar]:
            direction = absolute(state.curvature, gradient, damping=damping_of(gamma))
            return optax.tree.scale(-1, direction), inner_product(gradient, direction) / 2

        # f(x) - f(x + s) >= gamma |g(x + s)|^2 / (8 |g|)
        def least(gamma: Scalar, decrease: Scalar, fresh_norm: Scalar) -> Scalar:
            del decrease
            return fresh_norm**2 / (8 * damping_of(gamma))

        def damping_of(gamma: Scalar) -> Scalar:
            return jnp.maximum(gradient_norm / gamma, jnp.finfo(gamma.dtype).tiny)

        family = Family(propose, least, shorten=lambda gamma: gamma / 2)
        is_usable = (state.num_refreshes > 0) & jnp.isfinite(gradient_norm) & (gradient_norm > 0)
        last = search_step(start, family, state.gamma, max_trials, is_usable)

        # A damping that rounding hides beside |C| would halve for ever at a minimum.
        gamma = last.parameter
        hidden = jnp.finfo(gamma.dtype).eps * jnp.max(jnp.abs(state.curvature.values))
        doubled = jnp.where(damping_of(gamma) <= hidden, gamma, 2 * gamma)
        # A search that ended for rounding without a step, or for want of a gradient, says nothing
        # of how far the model can be trusted.
        after_rejection = jnp.where(last.is_flat, state.gamma, gamma / 2)
        next_gamma = jnp.where(last.accepted, doubled, after_rejection)
        info = search_info(last, state.info.num_rejected)
        return StepResult(
            updates=last.step,
            state=state._replace(gamma=next_gamma),
            info={"damping": gradient_norm / gamma, **info},
            is_accepted=last.accepted,
        )

    return curvature_rule(init, step, take_in=take_in_matrix)


def gradient_regularized_newton(
    objective: Objective,
    curvature_every: int | Int[Array, ""] = 1,
    matvec_of: Callable[..., Matvec] = hvp,
    gamma: float | Array = 1.0,
    max_trials: int = 40,
) -> optax.GradientTransformationExtraArgs:
    """Gradient-regularized Newton: `x -= (|H| + |g| / gamma I)^-1 g`, with gamma by search.

    For full batches (deterministic losses) of up to some thousand parameters. There is no learning
    rate: the search adapts to how smooth the loss is. This is
    `estimating(scale_by_gradient_regularized_newton(objective), ...)`.

    Args:
      objective: the `curvax.Objective` that is minimized.
      curvature_every: number of steps between Hessians (lazy Hessians); step 0 forms one.
      matvec_of: `curvax.hvp`, or `curvax.ggnvp` or any approximation of the Hessian by `(objective,
        params, batch) -> matvec`.
      gamma: the first trust radius, in the unit of params.
      max_trials: the largest number of trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)` with
      gradients of that batch.

    Raises:
      ValueError, TypeError: At trace time, as `scale_by_gradient_regularized_newton` and
        `curvax.estimating` do.

    Cost: every `curvature_every` steps d products and `9 d^3` multiplications; a loss and gradient
      for each trial. Memory: `d^2` floats.

    Example: `log(1 + e^-x) + x^2 / 20`, from far away.
      >>> import jax, jax.numpy as jnp, curvax
      >>> loss = curvax.losses.from_function(lambda f, y: jnp.mean(jax.nn.softplus(-f) + f**2 / 20))
      >>> objective = curvax.Objective(lambda w, x: x @ w, loss)
      >>> params, batch = jnp.array([[30.0]]), (jnp.ones((1, 1)), jnp.zeros(1))
      >>> tx = curvax.gradient_regularized_newton(objective)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(w, state):
      ...     return tx.update(jax.grad(objective)(w, batch), state, w, batch=batch)
      >>> for _ in range(12):
      ...     updates, state = step(params, state)
      ...     params = params + updates
      >>> bool(abs(jax.grad(objective)(params, batch)) < 1e-6)
      True

    References: Semenov, Jaggi and Doikov (2025), Gradient-normalized smoothness for optimization
      with approximate Hessians; Doikov, Chayti and Jaggi (2023), https://arxiv.org/abs/2212.00781,
      for Hessians that are kept.

    Deviates: absolute eigenvalues, so that steps go down where the Hessian is indefinite; the
      search ends where rounding decides.
    """
    rule = scale_by_gradient_regularized_newton(objective, gamma, max_trials)
    return estimating(rule, matrix_of(objective, matvec_of), curvature_every)
