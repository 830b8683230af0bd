"""Newton's method regularized by the norm of the gradient, as much as a search finds needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import CALL_WITH_BATCH, check_count, check_params, check_positive
from curvax._trees import inner_product, norm
from curvax._types import Batch, Count, Matvec, Params, Scalar
from curvax._xla import fast_convs_in_loops
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._lazy_newton import decompose_if_finite, init_eigen, matrix_of
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.products import hvp
from curvax.solve import Dense, EigenDecomposition, absolute

# gamma: trust radius, f: the loss, g: its gradient, x: params, s: the step


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
    (8 |g|)`; then gamma doubles for the next update. Every step satisfies `|s| <= gamma`. Where the
    loss is flat to rounding (the model predicts less than its precision), the search ends, with a
    step if that lowers the gradient's norm. If no trial succeeds, the update is zero and the state
    stays bitwise what it was, except for gamma, which goes on from where the search ended, and for
    a curvature that came with the update.

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

    def take_in(
        state: GradientRegularizedState, curvature: Dense, gradient: PyTree[Array]
    ) -> tuple[GradientRegularizedState, Array]:
        del gradient
        eigen, is_finite = decompose_if_finite(curvature, like=state.curvature)
        return state._replace(curvature=eigen), is_finite

    def step(
        state: GradientRegularizedState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        params, batch = context.params, context.extra.get("batch")
        if params is None or batch is None:
            raise ValueError(f"a trial of the step needs both: {CALL_WITH_BATCH}")
        search = _Search(
            objective=objective,
            params=params,
            batch=batch,
            gradient=gradient,
            curvature=state.curvature,
        )
        last = _search_step(search, state.gamma, max_trials, state.num_refreshes > 0)

        # A search that ended for rounding, or for want of a gradient, says nothing of how far the
        # model can be trusted.
        after_rejection = jnp.where(last.exhausted, state.gamma, last.gamma / 2)
        next_gamma = jnp.where(last.accepted, 2 * last.gamma, after_rejection)
        info = {
            "damping": norm(gradient) / last.gamma,
            "trials": last.trials,
            "accepted": last.accepted,
            "num_rejected": state.info.num_rejected + ~last.accepted,
        }
        state = state._replace(gamma=next_gamma)
        return StepResult(
            updates=last.step,
            state=state,
            info=info,
            is_accepted=last.accepted,
        )

    return curvature_rule(init, step, take_in=take_in)


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


class _Search(NamedTuple):
    """The point from which the step is searched, and the model there."""

    objective: Objective
    params: Params
    batch: Batch
    gradient: PyTree[Array]
    curvature: EigenDecomposition


class _Trial(NamedTuple):
    """The latest trial, and how the search stands after it."""

    gamma: Scalar
    step: PyTree[Array]
    trials: Int[Array, ""]
    accepted: Bool[Array, ""]
    exhausted: Bool[Array, ""]  # nothing is to be gained that rounding does not hide


def _search_step(
    search: _Search, gamma: Scalar, max_trials: int, is_ready: Bool[Array, ""]
) -> _Trial:
    """Halve gamma until a step is accepted; nothing is tried without curvature and gradient."""
    objective, params, batch, gradient, curvature = search
    value_and_grad = jax.value_and_grad(objective.value)
    before, gradient_norm = objective.value(params, batch), norm(gradient)
    precision = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)

    def attempt(last: _Trial) -> _Trial:
        # s = -(|C| + |g| / gamma I)^-1 g
        gamma = jnp.where(last.trials > 0, last.gamma / 2, last.gamma)
        damping = jnp.maximum(gradient_norm / gamma, jnp.finfo(gamma.dtype).tiny)
        direction = absolute(curvature, gradient, damping=damping)
        step = jax.tree.map(lambda s, p: (-s).astype(p.dtype), direction, params)
        after, fresh = value_and_grad(cast(Params, optax.apply_updates(params, step)), batch)

        # f(x) - f(x + s) >= gamma |g(x + s)|^2 / (8 |g|)
        is_enough = before - after >= inner_product(fresh, fresh) / (8 * damping)
        # The model predicts a decrease of -g.s / 2; below the precision of f only the gradient can
        # tell.
        is_flat = -inner_product(gradient, step) / 2 <= precision
        accepted = is_enough | (is_flat & (norm(fresh) < gradient_norm))
        return _Trial(
            gamma=gamma,
            step=step,
            trials=last.trials + 1,
            accepted=accepted,
            exhausted=is_flat & ~accepted,
        )

    def is_searching(trial: _Trial) -> Bool[Array, ""]:
        return ~trial.accepted & ~trial.exhausted & (trial.trials < max_trials)

    is_usable = is_ready & jnp.isfinite(gradient_norm) & (gradient_norm > 0)
    first = _Trial(
        gamma=gamma,
        step=jax.tree.map(jnp.zeros_like, params),
        trials=jnp.int32(0),
        accepted=jnp.array(False),
        exhausted=~is_usable,
    )
    return lax.while_loop(is_searching, fast_convs_in_loops(attempt), first)
