"""SPRING: Gauss-Newton steps that stay near the last one where the batch says nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import check_decay, check_params, check_positive, check_precision
from curvax._trees import keep_unless, scaled
from curvax._types import Batch, Count, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._newton import check_curvature
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.solve import Result, direct, sample_space
from curvax.solve._rows import sharded_zeros

# g: the gradient, F = U U': the Gauss-Newton matrix, phi: the direction, mu: the momentum


class SpringInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      residual: the residual of the solve, relative to its right-hand side.
      code: a `curvax.solve.Result`; `Result(int(code)).message` says what to do.
      damping: the damping in effect.
      num_fallbacks: the number of steps so far for which Cholesky failed, and which the
        pseudo-inverse took.
      num_nonfinite: the number of steps so far with a gradient or a curvature that was not finite.
    """

    residual: Scalar
    code: Int[Array, ""]
    damping: Scalar
    num_fallbacks: Int[Array, ""]
    num_nonfinite: Int[Array, ""]


class ScaleBySpringState(NamedTuple):
    """State of `scale_by_spring`.

    Attributes:
      count: steps taken.
      info: `SpringInfo`.
      direction: phi, like params in at least float32; None without momentum.
    """

    count: Count
    info: SpringInfo
    direction: PyTree[Array] | None


def scale_by_spring(
    damping: optax.ScalarOrSchedule = 1e-3,
    momentum: float | Array = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Solve for a direction near the last one, `(F + damping I) phi = g + damping mu phi_0`.

    With `F = U U'` and `g = U q` of a batch, phi minimizes `|U'phi - q|^2 + damping |phi - mu
    phi_0|^2`, where phi_0 is the direction of the step before. In sample space that is

      phi = mu phi_0 + U (U'U + damping I)^-1 (q - mu U'phi_0).

    So along what the rows of this batch determine, phi is their solution, and along all else it
    is mu times the last direction. Zero momentum leaves the damped Gauss-Newton step.

    Args:
      damping: a number or a schedule, in units of an eigenvalue of F. An update that is passed
        `damping=` uses that instead.
      momentum: mu, in [0, 1). The number 0 leaves out the buffer.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params=None, *,
      curvature, damping=None)`; the curvature is what `curvax.solve.sample_space` returns. It
      emits phi: the learning rate and limits of the step come after, and have no part in phi_0.
      The state is a `ScaleBySpringState`. A gradient that is not finite gives NaN, which
      `optax.apply_if_finite` sees; a curvature that is not finite gives zero and leaves phi.

    Raises:
      ValueError: the damping is not positive, the momentum is outside [0, 1), the curvature is
        missing, or gradients are masked out.

    Cost: that of `curvax.solve.direct`, and a product with the rows. Memory: a tree like params.

    Example: the second row is not in the second batch, and half of what was learned of it stays.
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> w, rule = jnp.zeros(2), curvax.scale_by_spring(damping=1e-6, momentum=0.5)
      >>> def step(x, y, g, state):
      ...     space = curvax.solve.sample_space(objective, w, (x, y), space="samples")
      ...     return rule.update(g, state, w, curvature=space)
      >>> phi, state = step(jnp.eye(2), -jnp.ones(2), jnp.ones(2) / 2, rule.init(w))
      >>> phi, state = step(jnp.eye(2)[:1], -jnp.ones(1), jnp.array([1.0, 0.0]), state)
      >>> [round(x, 4) for x in phi.tolist()]
      [1.0, 0.5]

    References: Goldshlager, Abrahamsen and Lin (2024), A Kaczmarz-inspired approach to accelerate
      the optimization of neural network wavefunctions, https://arxiv.org/abs/2401.10190; the
      recurrence was read in the sources of vmcnet and rla-pinns, and its form over parameters is
      derived (both are tested against each other).
    """
    check_decay(momentum=momentum)
    check_precision(momentum=momentum)
    has_momentum = not (isinstance(momentum, int | float) and momentum == 0)

    def init(params: Params) -> ScaleBySpringState:
        check_params(params)
        info = SpringInfo(
            residual=zero_number(),
            code=zero_count(),
            damping=zero_number(),
            num_fallbacks=zero_count(),
            num_nonfinite=zero_count(),
        )
        direction = jax.tree.map(sharded_zeros, params) if has_momentum else None
        return ScaleBySpringState(zero_count(), info, direction)

    def step(
        state: ScaleBySpringState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        check_curvature(context.curvature, gradient)
        g = tree_at_least_float32(gradient)
        # mu phi_0, from which phi departs as far as the batch asks.
        center = scaled(momentum, state.direction) if has_momentum else None
        phi, solved = direct(
            context.curvature, g, damping=context.damping, center=center, pseudo_inverse=True
        )
        is_finite = (solved.code != Result.NOT_FINITE) & jnp.isfinite(solved.residual)
        if has_momentum:
            is_kept = context.gradient_is_finite & is_finite
            state = state._replace(direction=keep_unless(is_kept, phi, state.direction))
        info = {
            "residual": solved.residual,
            "code": solved.code,
            "damping": context.damping,
            "num_fallbacks": state.info.num_fallbacks + (solved.code == Result.PSEUDO_INVERSE),
        }
        return StepResult(updates=phi, state=state, info=info, is_finite=is_finite)

    return curvature_rule(init, step, damping=damping)


def spring(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    momentum: float | Array = 0.9,
    max_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SPRING: `params -= min(learning_rate, max_norm / |phi|) phi`, with momentum in sample space.

    `(F + damping I) phi = g + damping momentum phi_0`, as `curvax.scale_by_spring` says, with F the
    Gauss-Newton matrix of the batch, exactly. It is for few rows and residuals that can all be
    zero: physics-informed networks, whose points and conditions are parts of a `curvax.total`, and
    wavefunctions. Over parameters, where these are fewer than rows.

    Args:
      learning_rate: a number or a schedule; 1 with `curvax.line_search` around it.
      objective: the `curvax.Objective` that is minimized.
      damping: a number or a schedule, in units of an eigenvalue of F.
      momentum: mu, in [0, 1). With 1 directions that no batch asks for would stay for ever.
      max_norm: the largest norm of a step; None for no limit. The papers' constant C is its square.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. The
      state holds a `SpringInfo`.

    Raises:
      ValueError, TypeError: At trace time, as `curvax.scale_by_spring`, `curvax.solve.sample_space`
        and `curvax.estimating` do; `max_norm` is not positive.

    Cost: that of `curvax.egn`, and a product with the rows. Memory: a tree like params.

    Example: one of two conditions at a time; the momentum brings what each knows together.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x, y = jnp.array([[1.0, 1.0], [1.0, 0.5]]), jnp.array([0.0, 1.0])      # w = (2, -2)
      >>> def error(momentum):
      ...     w, tx = jnp.zeros(2), curvax.spring(1.0, objective, 1e-4, momentum)
      ...     state = tx.init(w)
      ...     for i in range(8):
      ...         batch = x[i % 2 :][:1], y[i % 2 :][:1]
      ...         updates, state = tx.update(jax.grad(objective)(w, batch), state, w, batch=batch)
      ...         w += updates
      ...     return jnp.linalg.norm(w - jnp.array([2.0, -2.0])).item()
      >>> error(momentum=0.5) < error(momentum=0.0)
      True

    References: Goldshlager, Abrahamsen and Lin (2024), https://arxiv.org/abs/2401.10190; Guzmán-
      Cordero et al. (2025), Improving energy natural gradient descent through Woodbury, momentum
      and randomization, https://arxiv.org/abs/2505.12149. Constants: their codes use momentum 0.99
      and damping 1e-3, tuned runs on Poisson's equation 0.83 and 7e-10, the rest is ours.
    """
    if max_norm is not None:
        check_positive(max_norm=max_norm)

    def space(params: Params, batch: Batch, key: PRNGKey) -> Any:
        return sample_space(objective, params, batch)

    tx = finish(estimating(scale_by_spring(damping, momentum), space), learning_rate)
    # phi is stored before the rate and the limit, in all three codes.
    return tx if max_norm is None else optax.chain(tx, optax.clip_by_global_norm(max_norm))


def engd(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Energy natural gradient descent: `params -= learning_rate (F + damping I)^-1 g`.

    For residuals the energy's metric is the Gauss-Newton matrix F, `F = sum_k w_k J_k'J_k / n_k`
    over point sets k. It is solved with directly, over parameters or, if those are more, over
    points (ENGD-W). It is `curvax.spring` without momentum.

    Args:
      learning_rate: a number or a schedule; 1 with `curvax.line_search` around it, as published.
      objective: the `curvax.Objective` that is minimized, with a `curvax.total` for several sets.
      damping: a number or a schedule, in units of an eigenvalue of F. In float64 and with a line
        search, 1e-8 to 1e-13.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. The
      state holds a `SpringInfo`.

    Raises:
      ValueError, TypeError: At trace time, as `curvax.spring` does.

    Cost: that of `curvax.egn`.

    Example: u' = 1 with u(0) = 2, for `u = w_0 + w_1 t`: residuals that are linear take one step.
      >>> import jax, jax.numpy as jnp, curvax
      >>> error = curvax.losses.squared_error()
      >>> slope = curvax.Objective(lambda w, t: w[1] + 0 * t, error)
      >>> value = curvax.Objective(lambda w, t: w[0] + w[1] * t, error)
      >>> objective = curvax.total({"equation": slope, "start": value})
      >>> t = jnp.linspace(0, 1, 5)
      >>> batch = {"equation": (t, jnp.ones(5)), "start": (jnp.zeros(1), 2 * jnp.ones(1))}
      >>> w, tx = jnp.zeros(2), curvax.engd(1.0, objective, damping=1e-6)
      >>> tx = curvax.line_search(tx, objective)
      >>> updates, _ = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
      >>> [round(x, 3) for x in (w + updates).tolist()]
      [2.0, 1.0]

    References: Müller and Zeinhofer (2023), Achieving high accuracy with PINNs via energy natural
      gradient descent, https://arxiv.org/abs/2302.13163, read with its code.

    Deviates: the loss has the factor 1/2 here, so that the Gauss-Newton step is at rate 1, not 1/2;
      the paper's code solves by least squares on F, without damping.
    """
    return spring(learning_rate, objective, damping, momentum=0.0)
