"""Newton's method regularized by the norm of the gradient, with the search that finds how much of it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_params
from curvax._trees import all_finite, inner_product, keep_unless, norm
from curvax._types import Batch, Count, Matvec, Params, Scalar
from curvax._xla import fast_convs_in_loops
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._lazy_newton import init_eigen, matrix_of, take_in
from curvax.products import hvp
from curvax.solve import Dense, EigenDecomposition, absolute

# gamma: trust radius, f: the loss, g: its gradient, x: params, s: the step


class GradientRegularizedInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      damping: `|g| / gamma` of the last trial.
      trials: steps that were tried.
      accepted: whether one of them was taken.
      num_rejected: updates so far in which none was.
    """

    damping: Scalar
    trials: Int[Array, ""]
    accepted: Bool[Array, ""]
    num_rejected: Int[Array, ""]


class GradientRegularizedState(NamedTuple):
    """State of `scale_by_gradient_regularized_newton`.

    Attributes:
      count: steps taken.
      gamma: the trust radius with which the next search begins.
      curvature: the eigendecomposition held.
      info: `GradientRegularizedInfo`.
    """

    count: Count
    gamma: Scalar
    curvature: EigenDecomposition
    info: GradientRegularizedInfo


def scale_by_gradient_regularized_newton(
    objective: Objective, gamma: float | Array = 1.0, max_trials: int = 40
) -> optax.GradientTransformationExtraArgs:
    """Search for a step `s = -(|C| + |g| / gamma I)^-1 g` that lowers the loss enough; C is given as a matrix.

    Tried are gamma, gamma / 2, gamma / 4 ... until `f(x) - f(x + s) >= gamma |g(x + s)|^2 / (8 |g|)`; then gamma doubles
    for the next update. Every step satisfies `|s| <= gamma`. Where the loss is flat to rounding (the model predicts less
    than its precision), the search ends, with a step if that lowers the gradient's norm. If no trial succeeds the update is
    zero, and the state stays bitwise what it was, but for gamma, which goes on from where the search ended, and a curvature
    that was given.

    Args:
      objective: a `curvax.Objective`, evaluated at the trial points on the batch of the update.
      gamma: the first trust radius, in the unit of params.
      max_trials: trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer (no rate comes after it), with `update(updates, state,
      params, *, batch, curvature=None)`; curvature is a `curvax.solve.Dense`; None: the last one. State is a
      `GradientRegularizedState`.

    Raises:
      ValueError: gamma that is not positive, max_trials below 1, no params or no batch.

    Cost: a loss and gradient and `2 d^2` multiplications for each trial (one or two as a rule); `9 d^3` for a new
      curvature.

    References: Semenov, Jaggi and Doikov (2025), Gradient-normalized smoothness for optimization with approximate Hessians.
    """
    if isinstance(gamma, int | float) and not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}.")
    check_count(1, max_trials=max_trials)

    def init(params: Params) -> GradientRegularizedState:
        check_params(params)
        count, number = lambda: jnp.zeros([], jnp.int32), lambda: jnp.zeros([], jnp.float32)
        held = init_eigen(params)
        info = GradientRegularizedInfo(number(), count(), jnp.array(False), count())
        return GradientRegularizedState(count(), jnp.full([], gamma, held.values.dtype), held, info)

    def update(
        updates: PyTree,
        state: GradientRegularizedState,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        curvature: Dense | None = None,
        **extra: Any,
    ) -> tuple[PyTree, GradientRegularizedState]:
        del extra
        if params is None or batch is None:
            raise ValueError(
                "a trial of the step needs both: tx.update(grads, state, params, batch=batch)."
            )
        good = all_finite(updates)
        held, _ = take_in(state.curvature, curvature, good)
        search = _Search(objective, params, batch, updates, held)
        found = _search_step(search, state.gamma, max_trials)
        steps = jax.tree.map(
            lambda s, u: jnp.where(found.accepted, s, 0).astype(u.dtype), found.step, updates
        )
        steps = jax.tree.map(lambda s: jnp.where(good, s, jnp.nan).astype(s.dtype), steps)
        rejected = state.info.num_rejected + ~found.accepted
        number = lambda x: jnp.asarray(x, jnp.float32)
        damping = jnp.where(good, number(norm(updates) / found.gamma), state.info.damping)
        info = GradientRegularizedInfo(damping, found.trials, found.accepted, rejected)
        # what ended for rounding, or for want of a gradient, tells nothing of how far the model can be trusted
        after = jnp.where(
            found.accepted,
            2 * found.gamma,
            jnp.where(found.exhausted, state.gamma, found.gamma / 2),
        )
        new = GradientRegularizedState(
            jnp.asarray(optax.safe_increment(state.count)), after, held, info
        )
        return steps, keep_unless(
            found.accepted, new, state._replace(gamma=after, curvature=held, info=info)
        )

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def gradient_regularized_newton(
    objective: Objective,
    curvature_every: int | Int[Array, ""] = 1,
    matvec_of: Callable[..., Matvec] = hvp,
    gamma: float | Array = 1.0,
    max_trials: int = 40,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method regularized by the norm of the gradient: `x -= (|H| + |g| / gamma I)^-1 g`, with gamma by search.

    For full batches (deterministic losses) of up to some thousand parameters. There is no learning rate: the search adapts
    to how smooth the loss is. `estimating(scale_by_gradient_regularized_newton(objective), ...)`.

    Args:
      objective: a `curvax.Objective`.
      curvature_every: steps between Hessians (lazy Hessians); step 0 forms one.
      matvec_of: `curvax.hvp`, or `curvax.ggnvp` or any approximation of the Hessian by `(objective, params, batch) ->
        matvec`.
      gamma: the first trust radius, in the unit of params.
      max_trials: trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)` with gradients of that
      batch.

    Raises:
      ValueError, TypeError: at trace time, as `scale_by_gradient_regularized_newton` and `curvax.estimating`.

    Cost: every `curvature_every` steps d products and `9 d^3` multiplications; a loss and gradient for each trial. Memory:
      `d^2` floats.

    Example: `log(1 + e^-x) + x^2 / 20`, from far away.
      >>> import jax, jax.numpy as jnp, curvax
      >>> loss = curvax.losses.from_function(lambda f, y: jnp.mean(jax.nn.softplus(-f) + f**2 / 20))
      >>> objective = curvax.Objective(lambda w, x: x @ w, loss)
      >>> params, batch = jnp.array([[30.0]]), (jnp.ones((1, 1)), jnp.zeros(1))
      >>> tx = curvax.gradient_regularized_newton(objective)
      >>> state = tx.init(params)
      >>> step = jax.jit(lambda w, state: tx.update(jax.grad(objective)(w, batch), state, w, batch=batch))
      >>> for _ in range(12):
      ...     updates, state = step(params, state)
      ...     params = params + updates
      >>> bool(abs(jax.grad(objective)(params, batch)) < 1e-6)
      True

    References: Semenov, Jaggi and Doikov (2025), Gradient-normalized smoothness for optimization with approximate Hessians;
      Doikov, Chayti and Jaggi (2023), for Hessians that are kept.

    Deviates: absolute eigenvalues, so that steps go down where the Hessian is indefinite; the search ends where rounding
      decides.
    """
    rule = scale_by_gradient_regularized_newton(objective, gamma, max_trials)
    return estimating(rule, matrix_of(objective, matvec_of), curvature_every)


class _Search(NamedTuple):
    objective: Objective
    params: Params
    batch: Batch
    gradient: PyTree[Array]
    curvature: EigenDecomposition


class _Trial(NamedTuple):
    gamma: Scalar
    step: PyTree[Array]
    trials: Int[Array, ""]
    accepted: Bool[Array, ""]
    exhausted: Bool[Array, ""]  # nothing is left to be gained that rounding does not hide


def _search_step(search: _Search, gamma: Scalar, max_trials: int) -> _Trial:
    """Halve gamma until the step is accepted."""
    objective, params, batch, gradient, curvature = search
    value_and_grad = jax.value_and_grad(objective.value)
    before, size = objective.value(params, batch), norm(gradient)
    precision = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)

    def attempt(last: _Trial) -> _Trial:
        gamma = jnp.where(last.trials > 0, last.gamma / 2, last.gamma)
        damping = jnp.maximum(size / gamma, jnp.finfo(gamma.dtype).tiny)
        step = jax.tree.map(
            lambda s, p: (-s).astype(p.dtype),
            absolute(curvature, gradient, damping=damping),
            params,
        )
        after, fresh = value_and_grad(cast(Params, optax.apply_updates(params, step)), batch)
        enough = before - after >= inner_product(fresh, fresh) / (8 * damping)
        flat = -inner_product(gradient, step) / 2 <= precision  # what the model predicts
        accepted = enough | (flat & (norm(fresh) < size))
        return _Trial(gamma, step, last.trials + 1, accepted, flat & ~accepted)

    zeros = jax.tree.map(jnp.zeros_like, params)
    first = _Trial(gamma, zeros, jnp.int32(0), jnp.array(False), ~(jnp.isfinite(size) & (size > 0)))
    going = lambda t: ~t.accepted & ~t.exhausted & (t.trials < max_trials)
    return lax.while_loop(going, fast_convs_in_loops(attempt), first)
