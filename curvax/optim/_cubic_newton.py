"""Newton's method with a cubic term, as large as a search finds needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._checks import check_count, check_params, check_positive
from curvax._trees import norm
from curvax._types import Count, Matvec, Params, Scalar
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._lazy_newton import init_eigen, matrix_of, take_in_matrix
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.optim._step_search import Family, Trial, search_info, search_step, start_of
from curvax.products import hvp
from curvax.solve import CubicInfo, EigenDecomposition, cubic_step

# M: regularization, C: curvature, f: the loss, g: its gradient, x: params, s: the step, r = |s|

# Cartis, Gould and Toint (2011) take a step that gains this share of what the model predicts.
SHARE = 0.1


class CubicNewtonInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      shift: `M r / 2` of the last trial, which is added to the eigenvalues.
      smallest: smallest eigenvalue of the curvature in use.
      trials: how many steps were tried.
      accepted: whether one of them was taken.
      num_rejected: the number of updates so far in which none was.
      num_nonfinite: the number of updates so far with a gradient or a curvature that was not
        finite.
    """

    shift: Scalar
    smallest: Scalar
    trials: Int[Array, ""]
    accepted: Bool[Array, ""]
    num_rejected: Int[Array, ""]
    num_nonfinite: Int[Array, ""]


class CubicNewtonState(NamedTuple):
    """State of `scale_by_cubic_newton`.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in; while it is 0 the updates are zero.
      regularization: M with which the next search begins.
      curvature: the eigendecomposition in use.
      info: `CubicNewtonInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    regularization: Scalar
    curvature: EigenDecomposition
    info: CubicNewtonInfo


def scale_by_cubic_newton(
    objective: Objective, regularization: float | Array = 1.0, max_trials: int = 40
) -> optax.GradientTransformationExtraArgs:
    """Search for M such that the minimum of the cubic model lowers the loss enough.

    The step minimizes `m(s) = g's + s'C s / 2 + M / 6 |s|^3` over all s, by
    `curvax.solve.cubic_step`. The search tries M, 2 M, 4 M ... until the loss falls by a tenth of
    what the model does; then M halves for the next update, unless rounding hides the cubic term
    already. If no trial succeeds, the update is zero and the state stays bitwise what it was,
    except for M, which goes on from where the search ended, and for a curvature that came with the
    update. Where the model falls by less than the precision of the loss, the search ends, with a
    step if gradients say that it gains.

    Args:
      objective: the `curvax.Objective` that is minimized; it is evaluated at the trial points on
        the batch of the update.
      regularization: the first M: the largest rate at which the Hessian changes over a distance in
        params.
      max_trials: the largest number of trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer (no learning rate comes after it),
      with `update(updates, state, params, *, batch, curvature=None)`. The curvature is a
      `curvax.solve.Dense`; with None the last one is used. `curvax.optim.curvature_rule` says what
      happens with numbers that are not finite. The state is a `CubicNewtonState`.

    Raises:
      ValueError: The regularization is not positive, `max_trials` is below 1, or params or batch
        are missing.

    Cost: a loss and gradient and `4 d^2` multiplications for each trial (one or two as a rule); `9
      d^3` for a new curvature.

    References: as for `curvax.cubic_newton`.
    """
    check_positive(regularization=regularization)
    check_count(1, max_trials=max_trials)

    def init(params: Params) -> CubicNewtonState:
        check_params(params)
        eigen = init_eigen(params)
        info = CubicNewtonInfo(
            shift=zero_number(),
            smallest=zero_number(),
            trials=zero_count(),
            accepted=jnp.array(False),
            num_rejected=zero_count(),
            num_nonfinite=zero_count(),
        )
        return CubicNewtonState(
            count=zero_count(),
            num_refreshes=zero_count(),
            regularization=jnp.full([], regularization, eigen.values.dtype),
            curvature=eigen,
            info=info,
        )

    def step(state: CubicNewtonState, gradient: PyTree[Array], context: StepContext) -> StepResult:
        start = start_of(objective, gradient, context)

        def model_step(M: Scalar) -> tuple[PyTree[Array], CubicInfo]:
            return cubic_step(state.curvature, gradient, regularization=M)

        # At a saddle g is 0, and the step not: a vanishing gradient ends no search.
        is_usable = (state.num_refreshes > 0) & context.gradient_is_finite
        family = cubic_family(model_step, shorten=lambda M: 2 * M)
        last = search_step(start, family, state.regularization, max_trials, is_usable)

        fresh = next_regularization(last, state.curvature.values, state.regularization)
        info = {
            "shift": last.parameter * norm(last.step) / 2,
            "smallest": state.curvature.values[0],
            **search_info(last, state.info.num_rejected),
        }
        return StepResult(
            updates=last.step,
            state=state._replace(regularization=fresh),
            info=info,
            is_accepted=last.accepted,
        )

    return curvature_rule(init, step, take_in=take_in_matrix)


def cubic_newton(
    objective: Objective,
    curvature_every: int | Int[Array, ""] = 1,
    matvec_of: Callable[..., Matvec] = hvp,
    regularization: float | Array = 1.0,
    max_trials: int = 40,
) -> optax.GradientTransformationExtraArgs:
    """Cubic Newton with lazy Hessians: `x += argmin_s g's + s'H s / 2 + M / 6 |s|^3`, M by search.

    H is the Hessian of the last step in which one was due, g the gradient of this one. Steps are
    bounded whatever H is, and leave saddle points, along the lowest eigenvector even where the
    gradient is zero. For full batches (deterministic losses) of up to some thousand parameters.
    There is no learning rate. This is `estimating(scale_by_cubic_newton(objective), ...)`.

    Args:
      objective: the `curvax.Objective` that is minimized.
      curvature_every: number of steps between Hessians; step 0 forms one. The paper finds d, the
        number of parameters, best for the work as a whole.
      matvec_of: `curvax.hvp`, or any approximation of the Hessian by `(objective, params, batch) ->
        matvec`.
      regularization: the first M.
      max_trials: the largest number of trials in one update.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)` with
      gradients of that batch.

    Raises:
      ValueError, TypeError: At trace time, as `scale_by_cubic_newton` and `curvax.estimating` do.

    Cost: every `curvature_every` steps d products and `9 d^3` multiplications; a loss and gradient
      and `4 d^2` multiplications for each trial. Memory: `d^2` floats.

    Example: from the saddle of `x^2 / 2 - y^2 / 2 + y^4 / 4`, where the gradient is zero, to the
      minimum at y = 1 or -1.
      >>> import jax, jax.numpy as jnp, curvax
      >>> fun = lambda f, _: jnp.mean(f[:, 0] ** 2 - f[:, 1] ** 2 + f[:, 1] ** 4 / 2) / 2
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.from_function(fun))
      >>> params, batch = jnp.zeros(2), (jnp.ones((1, 2)), jnp.zeros(1))
      >>> tx = curvax.cubic_newton(objective, curvature_every=2)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(w, state):
      ...     return tx.update(jax.grad(objective)(w, batch), state, w, batch=batch)
      >>> for _ in range(20):
      ...     updates, state = step(params, state)
      ...     params = params + updates
      >>> [round(x, 3) for x in abs(params).tolist()]
      [0.0, 1.0]

    References: Nesterov and Polyak (2006), Cubic regularization of Newton method and its global
      performance; Doikov, Chayti and Jaggi (2023), Second-order optimization with lazy Hessians,
      https://arxiv.org/abs/2212.00781, for Hessians that are kept (the scheme is from general
      knowledge of it, its constants were not read); Cartis, Gould and Toint (2011), Adaptive cubic
      regularisation methods for unconstrained optimization, part I.

    Deviates: M adapts in place of the paper's multiple of a Lipschitz constant, by a rule of ours:
      it doubles until the loss falls by a tenth of what the model predicts, and halves after a
      success. The search ends where rounding decides.
    """
    rule = scale_by_cubic_newton(objective, regularization, max_trials)
    return estimating(rule, matrix_of(objective, matvec_of), curvature_every)


def cubic_family(
    model_step: Callable[[Scalar], tuple[PyTree[Array], CubicInfo]],
    shorten: Callable[[Scalar], Scalar],
) -> Family:
    """Return the minima of cubic models by M, of which a share of their decrease is asked."""

    def propose(M: Scalar) -> tuple[PyTree[Array], Scalar]:
        s, info = model_step(M)
        return s, info.decrease

    def least(M: Scalar, decrease: Scalar, fresh_norm: Scalar) -> Scalar:
        del M, fresh_norm
        return SHARE * decrease

    return Family(propose, least, shorten)


def next_regularization(last: Trial, eigenvalues: Float[Array, " d"], before: Scalar) -> Scalar:
    """Return M for the next update, from the last trial of this one and M before it."""
    M, length = last.parameter, norm(last.step)
    # A shift M r / 2 that rounding hides beside |C| would halve for ever on a quadratic loss.
    eps = jnp.finfo(eigenvalues.dtype).eps
    is_hidden = M * length / 2 <= eps * jnp.max(jnp.abs(eigenvalues))
    halved = jnp.where(is_hidden, M, M / 2)
    # A search that ended for rounding says nothing of how far the model can be trusted.
    after_rejection = jnp.where(last.is_flat, before, 2 * M)
    return jnp.where(last.accepted, halved, after_rejection)
