"""Newton-type methods that solve a linear system with the curvature of the batch in every step."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import check_function, check_no_masked, check_params
from curvax._types import Batch, Count, Matvec, Params, PRNGKey, Scalar
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.products import ggnvp, hvp
from curvax.solve import Solver, cg, direct, sample_space
from curvax.spectra import absolute_krylov


class NewtonInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      residual: the residual of the solve, relative to the gradient.
      steps: how many products it took.
      code: a `curvax.solve.Result`; `Result(int(code)).message` says what to do.
      damping: the damping in effect.
      num_nonfinite: the number of steps so far with a gradient or a curvature that was not finite.
    """

    residual: Scalar
    steps: Int[Array, ""]
    code: Int[Array, ""]
    damping: Scalar
    num_nonfinite: Int[Array, ""]


class ScaleByNewtonState(NamedTuple):
    """State of `scale_by_newton`.

    Attributes:
      count: steps taken.
      info: `NewtonInfo`.
    """

    count: Count
    info: NewtonInfo


def scale_by_newton(
    solver: Solver = cg, damping: optax.ScalarOrSchedule = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Solve `(C + damping I) u = g` for the update u, with curvature C given as data.

    A gradient that is not finite gives an update of NaN, which `optax.apply_if_finite` sees. With a
    curvature that is not finite the update is the solver's last finite iterate, or zero; both are
    counted.

    Args:
      solver: `(curvature, b, *, damping) -> (x, SolveInfo)`; bind options by
        `functools.partial(curvax.cg, max_steps=20)`.
      damping: in units of an eigenvalue of C: a number, or a schedule of the step. An update that
        is passed `damping=` (`curvax.levenberg_marquardt` does so) uses that instead.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params=None, *,
      curvature, damping=None)`. Every update needs the curvature that the solver takes: a matvec
      such as `curvax.ggnvp(...)` (a pytree, so it may cross `jit`), or what
      `curvax.solve.sample_space` returns. The state keeps nothing of it, for it belongs to one
      batch; a matrix that is kept over steps is the subject of `curvax.scale_by_lazy_newton`. The
      state is a `ScaleByNewtonState`.

    Raises:
      ValueError: The damping is not positive, the curvature is missing, or gradients are masked
        out.

    Cost: the solver's.

    Example: Newton-MINRES, a step with line search.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> fun = lambda w: jnp.sum(jnp.cosh(w))
      >>> newton = curvax.scale_by_newton(curvax.solve.minres)
      >>> rule = curvax.estimating(newton, lambda w, batch, key: curvax.hvp(fun, w))
      >>> search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=10)
      >>> tx = optax.chain(rule, optax.scale(-1.0), search)
      >>> w = jnp.array([1.0, -2.0])
      >>> value, g = jax.value_and_grad(fun)(w)
      >>> value_fn = lambda w, batch: fun(w)
      >>> at_w = {"batch": (), "value": value, "grad": g, "value_fn": value_fn}
      >>> updates, state = tx.update(g, tx.init(w), w, **at_w)
      >>> bool(fun(w + updates) < 2.7)  # of 5.3; the minimum is 2
      True

    References: Nocedal and Wright (2006), Numerical optimization, chapter 7.
    """
    check_function(
        "solver",
        solver,
        "(curvature, b, *, damping) -> (x, SolveInfo)",
        "curvax.cg or curvax.solve.minres",
    )

    def init(params: Params) -> ScaleByNewtonState:
        check_params(params)
        info = NewtonInfo(
            residual=zero_number(),
            steps=zero_count(),
            code=zero_count(),
            damping=zero_number(),
            num_nonfinite=zero_count(),
        )
        return ScaleByNewtonState(zero_count(), info)

    def step(
        state: ScaleByNewtonState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        check_curvature(context.curvature, gradient)
        # (C + damping I) u = g. The curvature is a function, so only the residual tells whether it
        # is finite.
        direction, solved = solver(context.curvature, gradient, damping=context.damping)
        info = {
            "residual": solved.residual,
            "steps": solved.steps,
            "code": solved.code,
            "damping": context.damping,
        }
        return StepResult(
            updates=direction,
            state=state,
            info=info,
            is_finite=jnp.isfinite(solved.residual),
        )

    return curvature_rule(init, step, damping=damping)


def gauss_newton(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    tol: float = 1e-2,
    max_steps: int = 50,
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton by conjugate gradients: `params -= learning_rate (F + damping I)^-1 g`.

    F is the Gauss-Newton matrix of the batch, never formed. `estimating(scale_by_newton(cg),
    ggnvp)`, then the rate.

    Args:
      learning_rate: a number or a schedule; 1 is the full step.
      objective: the `curvax.Objective` that is minimized.
      damping: a number or a schedule, in units of an eigenvalue of F.
      tol: relative residual at which a solve ends; ending early saves products and costs little of
        the step.
      max_steps: the largest number of products in a step.
      microbatch: number of rows worked on at a time in a product, which bounds memory.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. The
      state holds a `NewtonInfo`.

    Raises:
      ValueError, TypeError: At trace time, as `curvax.ggnvp`, `curvax.cg` and `curvax.estimating`
        do: the Gauss-Newton matrix of a loss that is linear in the outputs is zero.

    Cost: a linearization and up to `max_steps` + 1 Gauss-Newton products a step. Memory: five trees
      like params, none kept.

    Example: one step solves a linear least-squares problem; with Levenberg-Marquardt damping no
      step that raises the loss is taken.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> tx = curvax.gauss_newton(1.0, objective, damping=1e-6, tol=1e-6)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> num_products = optax.tree.get(state, "info").steps.item()
      >>> [round(x, 3) for x in updates.ravel().tolist()], num_products
      ([2.0, -1.0], 2)
      >>> tx = curvax.levenberg_marquardt(tx, objective, damping=1.0, every=1)
      >>> tx = optax.chain(tx, optax.trace(0.5))  # momentum

    References: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
      descent; Martens (2010), Deep learning via Hessian-free optimization.
    """

    def matvec(params: Params, batch: Batch, key: PRNGKey) -> Matvec:
        # Schraudolph (2002): F v = J' S J v, with S the Hessian of the loss in the outputs.
        return ggnvp(objective, params, batch, microbatch=microbatch)

    # Martens (2010), section 4: F is that of one batch, so a solve to many digits is wasted.
    rule = scale_by_newton(partial(cg, tol=tol, max_steps=max_steps), damping)
    return finish(estimating(rule, matvec), learning_rate)


def newton_cg(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    tol: float = 1e-2,
    max_steps: int = 50,
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Truncated Newton: `params -= learning_rate u` with `(H + damping I) u = g` by CG.

    H is the Hessian of the batch. Where a search direction has negative curvature the solve ends
    with its iterate, which is a direction of descent (in the first step the gradient).

    Args:
      learning_rate: a number or a schedule; 1 is the full step.
      objective: the `curvax.Objective` that is minimized.
      damping: a number or a schedule, in units of an eigenvalue of H.
      tol: relative residual at which a solve ends.
      max_steps: the largest number of products in a step.
      microbatch: number of rows worked on at a time in a product, which bounds memory.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. The
      state holds a `NewtonInfo`.

    Raises:
      ValueError, TypeError: At trace time, as `curvax.hvp`, `curvax.cg` and `curvax.estimating` do.

    Cost: a linearized gradient and up to `max_steps` + 1 Hessian products a step. Memory: five
      trees like params.

    Example: Newton's method on a quartic, `w <- 2/3 w`.
      >>> import jax, jax.numpy as jnp, curvax
      >>> loss = lambda f, y: jnp.mean(jnp.sum((f - y) ** 4, axis=-1))
      >>> quartic = curvax.losses.from_function(loss)
      >>> objective = curvax.Objective(lambda w, x: x @ w, quartic)
      >>> params, batch = jnp.array([[3.0]]), (jnp.ones((1, 1)), jnp.zeros((1, 1)))
      >>> tx = curvax.newton_cg(1.0, objective, damping=1e-6)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> round((params + updates).item(), 3)
      2.0

      With damping that adapts to how well the Hessian predicts the loss:
      >>> tx = curvax.levenberg_marquardt(tx, objective, damping=1.0, every=1, matvec_of=curvax.hvp)

    References: Steihaug (1983), The conjugate gradient method and trust regions in large scale
      optimization; Nocedal and Wright (2006), section 7.1.
    """

    def matvec(params: Params, batch: Batch, key: PRNGKey) -> Matvec:
        # Nocedal and Wright (2006), section 7.1: CG needs H only through its products H v.
        return hvp(objective, params, batch, microbatch=microbatch)

    # H may be indefinite as it is: `cg` ends at negative curvature, as in Steihaug (1983).
    rule = scale_by_newton(partial(cg, tol=tol, max_steps=max_steps), damping)
    return finish(estimating(rule, matvec), learning_rate)


def egn(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Exact Gauss-Newton: `params -= learning_rate (F + damping I)^-1 g`, solved directly.

    By Cholesky in the space of examples and outputs, or of parameters if those are fewer; see
    `curvax.solve.sample_space`.

    Args:
      learning_rate: a number or a schedule; 1 is the Levenberg-Marquardt step.
      objective: the `curvax.Objective` that is minimized.
      damping: a number or a schedule, in units of an eigenvalue of F.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. The
      state holds a `NewtonInfo`.

    Raises:
      ValueError, TypeError: At trace time, as `curvax.solve.sample_space`, `curvax.solve.direct`
        and `curvax.estimating` do.

    Cost: with n outputs in the batch `n^3 / 3` multiplications, `n^2` for each unit of a dense
      layer, and a backward pass for each output of an example. Memory: `n^2` floats.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]])
      >>> params, batch = jnp.zeros((3, 1)), (x, x @ jnp.array([[2.0], [-1.0], [0.0]]))
      >>> tx = curvax.egn(1.0, objective, damping=1e-6)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> bool(objective(params + updates, batch) < 1e-9)  # two examples, fitted exactly
      True

    References: Korbit et al. (2024), Exact Gauss-Newton optimization for training deep neural
      networks.

    Deviates: the system is made symmetric, see `curvax.solve.sample_space`; momentum is that of
      optax or of `curvax.spring`, line search that of optax or `curvax.line_search`.
    """

    def space(params: Params, batch: Batch, key: PRNGKey) -> Any:
        # F = U U' has the nonzero eigenvalues of U'U, which is of the size of the batch's outputs,
        # so the solve can be with the smaller of the two.
        return sample_space(objective, params, batch)

    return finish(estimating(scale_by_newton(direct, damping), space), learning_rate)


def saddle_free_newton(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    num_steps: int = 20,
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Saddle-free Newton in a Krylov space: `params -= learning_rate (|H| + damping I)^-1 g`.

    `|H|` has the absolute eigenvalues of H, so the step goes down along negative curvature, not up.

    Args:
      learning_rate: a number or a schedule.
      objective: the `curvax.Objective` that is minimized.
      damping: a positive number or a schedule, in units of an eigenvalue of H.
      num_steps: dimension of the Krylov space; with d of them it holds all directions.
      microbatch: number of rows worked on at a time in a product, which bounds memory.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. The
      state holds a `NewtonInfo`.

    Raises:
      ValueError, TypeError: At trace time, as `curvax.hvp`, `curvax.spectra.absolute_krylov` and
        `curvax.estimating` do.

    Cost: a linearized gradient and `num_steps` Hessian products a step. Memory: `num_steps` trees
      like params, none kept.

    Example: near the saddle of `(x^2 - y^2) / 2` Newton's method jumps onto it; this halves x and
      moves y away.
      >>> import jax, jax.numpy as jnp, curvax
      >>> loss = lambda f, y: jnp.mean(f[:, 0] ** 2 - f[:, 1] ** 2) / 2
      >>> saddle = curvax.losses.from_function(loss)
      >>> objective = curvax.Objective(lambda w, x: x * w, saddle)
      >>> params, batch = jnp.array([1.0, 1e-3]), (jnp.ones((1, 2)), jnp.zeros(1))
      >>> tx = curvax.saddle_free_newton(0.5, objective, damping=1e-6)
      >>> gradient = jax.grad(objective)(params, batch)
      >>> updates, state = tx.update(gradient, tx.init(params), params, batch=batch)
      >>> [round(x, 4) for x in (params + updates).tolist()]
      [0.5, 0.0015]

    References: Dauphin et al. (2014), Identifying and attacking the saddle point problem in
      high-dimensional non-convex optimization, https://arxiv.org/abs/1406.2572.

    Deviates: damping is a number, a schedule or Levenberg-Marquardt's, in place of a grid search in
      every step.
    """

    def matvec(params: Params, batch: Batch, key: PRNGKey) -> Matvec:
        # The Hessian: a Gauss-Newton matrix has no negative curvature by which to leave a saddle.
        return hvp(objective, params, batch, microbatch=microbatch)

    # Dauphin et al. (2014), algorithm 1: u = V (|V' H V| + damping I)^-1 V' g, V a basis of the
    # Krylov space of H and g. It holds g, so -u goes down.
    rule = scale_by_newton(partial(absolute_krylov, num_steps=num_steps), damping)
    return finish(estimating(rule, matvec), learning_rate)


def check_curvature(curvature: Any, updates: PyTree) -> None:
    """Raise if there is no curvature to solve with, or if a part of params is masked out."""
    if curvature is None:
        raise ValueError(
            "a solve needs curvature in every step: tx.update(grads, state, params, "
            "curvature=matvec), or curvax.estimating(rule, estimator) with curvature_every=1. "
            "To use one curvature over several steps: curvax.lazy_newton."
        )
    # The products are with trees like all of params, which a gradient with holes is not.
    check_no_masked(
        updates,
        "updates",
        purpose="a solve is of all parameters together",
        advice="Keep what is not trained out of params (close over it), and make the objective a "
        "function of the others.",
    )
