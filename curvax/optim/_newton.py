"""Newton-type methods that solve a linear system with the curvature of the batch in every step."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import check_damping, check_function, check_params, check_precision, is_masked
from curvax._trees import all_finite, keep_unless
from curvax._types import Count, Params, Scalar
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.products import ggnvp, hvp
from curvax.solve import Solver, cg, direct, sample_space
from curvax.spectra import absolute_krylov


class NewtonInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      residual: of the solve, relative to the gradient.
      steps: products it took.
      code: a `curvax.solve.Result`; `Result(int(code)).message` says what to do.
      damping: in effect.
      num_nonfinite: steps with a gradient or a curvature that was not finite, so far.
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

    A gradient that is not finite gives an update of NaN, which `optax.apply_if_finite` sees. Curvature that is not gives
    what the solve had until then, or zero.

    Args:
      solver: `(curvature, b, *, damping) -> (x, SolveInfo)`; with options by `functools.partial(curvax.cg, max_steps=20)`.
      damping: in units of an eigenvalue of C: a number, or a schedule of the step. An update that is given `damping=`
        (`curvax.levenberg_marquardt` does) takes that instead.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params=None, *, curvature, damping=None)`;
      curvature is what the solver takes, in every step: a matvec such as `curvax.ggnvp(...)` (a pytree, so it may cross
      `jit`), or what `curvax.solve.sample_space` returns. Nothing of it is kept: it belongs to one batch. What is kept over steps
      is a matrix, in `curvax.scale_by_lazy_newton`. State is a `ScaleByNewtonState`.

    Raises:
      ValueError: damping that is not positive; no curvature; gradients that are masked out.

    Cost: the solver's.

    Example: Newton-MINRES, a step with line search.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> fun = lambda w: jnp.sum(jnp.cosh(w))
      >>> rule = curvax.estimating(curvax.scale_by_newton(curvax.solve.minres), lambda w, batch, key: curvax.hvp(fun, w))
      >>> tx = optax.chain(rule, optax.scale(-1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=10))
      >>> w = jnp.array([1.0, -2.0])
      >>> value, g = jax.value_and_grad(fun)(w)
      >>> value_fn = lambda w, batch: fun(w)
      >>> updates, state = tx.update(g, tx.init(w), w, batch=(), value=value, grad=g, value_fn=value_fn)
      >>> bool(fun(w + updates) < 2.7)                                                          # of 5.3; the minimum is 2
      True

    References: Nocedal and Wright (2006), Numerical optimization, chapter 7.
    """
    check_function(
        "solver",
        solver,
        "(curvature, b, *, damping) -> (x, SolveInfo)",
        "curvax.cg or curvax.solve.minres",
    )
    check_damping(damping)
    check_precision(damping=damping)
    own = damping

    def init(params: Params) -> ScaleByNewtonState:
        check_params(params)
        count, number = lambda: jnp.zeros([], jnp.int32), lambda: jnp.zeros([], jnp.float32)
        return ScaleByNewtonState(
            count(), NewtonInfo(number(), count(), count(), number(), count())
        )

    def update(
        updates: PyTree,
        state: ScaleByNewtonState,
        params: Params | None = None,
        *,
        curvature: Any = None,
        damping: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByNewtonState]:
        del params, extra
        _check_curvature(curvature, updates)
        strength = (
            own(state.count)
            if damping is None and callable(own)
            else own
            if damping is None
            else damping
        )
        good = all_finite(updates)
        steps, solved = solver(curvature, updates, damping=strength)
        steps = jax.tree.map(
            lambda s, u: jnp.where(good, s, jnp.nan).astype(u.dtype), steps, updates
        )
        bad = state.info.num_nonfinite + ~(good & jnp.isfinite(solved.residual))
        number = lambda x: jnp.asarray(x, jnp.float32)
        info = NewtonInfo(number(solved.residual), solved.steps, solved.code, number(strength), bad)
        new = ScaleByNewtonState(jnp.asarray(optax.safe_increment(state.count)), info)
        return steps, keep_unless(
            good, new, state._replace(info=state.info._replace(num_nonfinite=bad))
        )

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def gauss_newton(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    tol: float = 1e-2,
    max_steps: int = 50,
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton: `params -= learning_rate (F + damping I)^-1 g`, by conjugate gradients on products with F.

    F is the Gauss-Newton matrix of the batch, never formed. `estimating(scale_by_newton(cg), ggnvp)`, then the rate.

    Args:
      learning_rate: number or schedule; 1 is the full step.
      objective: a `curvax.Objective`.
      damping: in units of an eigenvalue of F; number or schedule.
      tol: relative residual at which a solve ends; early ends save products and cost little of the step.
      max_steps: products in a step, at most.
      microbatch: rows worked on at a time in a product; bounded memory.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. `NewtonInfo` in the state.

    Raises:
      ValueError, TypeError: at trace time, as `curvax.ggnvp`, `curvax.cg` and `curvax.estimating`.

    Cost: a linearization and up to `max_steps` + 1 Gauss-Newton products a step. Memory: five trees like params, none kept.

    Example: one step solves a linear least-squares problem; with Levenberg-Marquardt damping no step that raises the loss
      is taken.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, x @ jnp.array([[2.0], [-1.0]]))
      >>> tx = curvax.gauss_newton(1.0, objective, damping=1e-6, tol=1e-6)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)
      >>> [round(x, 3) for x in updates.ravel().tolist()], optax.tree.get(state, "info").steps.item()
      ([2.0, -1.0], 2)
      >>> tx = curvax.levenberg_marquardt(tx, objective, damping=1.0, every=1)
      >>> tx = optax.chain(tx, optax.trace(0.5))                                                # momentum

    References: Schraudolph (2002), Fast curvature matrix-vector products; Martens (2010), Deep learning via Hessian-free
      optimization.
    """
    solver = partial(cg, tol=tol, max_steps=max_steps)
    matvec = lambda params, batch, key: ggnvp(objective, params, batch, microbatch=microbatch)
    return _finished(solver, matvec, damping, learning_rate)


def newton_cg(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    tol: float = 1e-2,
    max_steps: int = 50,
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Truncated Newton: `params -= learning_rate u`, u from conjugate gradients on `(H + damping I) u = g`.

    H is the Hessian of the batch. Where a search direction has negative curvature the solve ends with what it has found,
    which is a direction of descent (in the first step the gradient).

    Args:
      learning_rate: number or schedule; 1 is the full step.
      objective: a `curvax.Objective`.
      damping: in units of an eigenvalue of H; number or schedule.
      tol: relative residual at which a solve ends.
      max_steps: products in a step, at most.
      microbatch: rows worked on at a time in a product; bounded memory.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. `NewtonInfo` in the state.

    Raises:
      ValueError, TypeError: at trace time, as `curvax.hvp`, `curvax.cg` and `curvax.estimating`.

    Cost: a linearized gradient and up to `max_steps` + 1 Hessian products a step. Memory: five trees like params.

    Example: Newton's method on a quartic, `w <- 2/3 w`.
      >>> import jax, jax.numpy as jnp, curvax
      >>> quartic = curvax.losses.from_function(lambda f, y: jnp.mean(jnp.sum((f - y) ** 4, axis=-1)))
      >>> objective = curvax.Objective(lambda w, x: x @ w, quartic)
      >>> params, batch = jnp.array([[3.0]]), (jnp.ones((1, 1)), jnp.zeros((1, 1)))
      >>> tx = curvax.newton_cg(1.0, objective, damping=1e-6)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)
      >>> round((params + updates).item(), 3)
      2.0

      With damping that adapts to how well the Hessian predicts the loss:
      >>> tx = curvax.levenberg_marquardt(tx, objective, damping=1.0, every=1, matvec_of=curvax.hvp)

    References: Steihaug (1983), The conjugate gradient method and trust regions in large scale optimization; Nocedal and
      Wright (2006), section 7.1.
    """
    solver = partial(cg, tol=tol, max_steps=max_steps)
    matvec = lambda params, batch, key: hvp(objective, params, batch, microbatch=microbatch)
    return _finished(solver, matvec, damping, learning_rate)


def egn(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Exact Gauss-Newton: `params -= learning_rate (F + damping I)^-1 g`, solved directly.

    By Cholesky in the space of examples and outputs, or of parameters if those are fewer; see `curvax.solve.sample_space`.

    Args:
      learning_rate: number or schedule; 1 is the Levenberg-Marquardt step.
      objective: a `curvax.Objective`.
      damping: in units of an eigenvalue of F; number or schedule.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. `NewtonInfo` in the state.

    Raises:
      ValueError, TypeError: at trace time, as `curvax.solve.sample_space`, `curvax.solve.direct` and `curvax.estimating`.

    Cost: with n outputs in the batch `n^3 / 3` multiplications, `n^2` for each unit of a dense layer, and a backward pass
      for each output of an example. Memory: `n^2` floats.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]])
      >>> params, batch = jnp.zeros((3, 1)), (x, x @ jnp.array([[2.0], [-1.0], [0.0]]))
      >>> tx = curvax.egn(1.0, objective, damping=1e-6)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)
      >>> bool(objective(params + updates, batch) < 1e-9)                           # two examples, fitted exactly
      True

    References: Korbit et al. (2024), Exact Gauss-Newton optimization for training deep neural networks.

    Deviates: the system is made symmetric, see `curvax.solve.sample_space`; momentum and line search come from optax.
    """
    space = lambda params, batch, key: sample_space(objective, params, batch)
    return _finished(direct, space, damping, learning_rate)


def saddle_free_newton(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    damping: optax.ScalarOrSchedule = 1e-3,
    num_steps: int = 20,
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Saddle-free Newton: `params -= learning_rate (|H| + damping I)^-1 g`, in a Krylov space of the Hessian from g.

    `|H|` has the absolute eigenvalues of H, so negative curvature is gone down along, not up.

    Args:
      learning_rate: number or schedule.
      objective: a `curvax.Objective`.
      damping: positive; in units of an eigenvalue of H; number or schedule.
      num_steps: dimension of the Krylov space; at d, all directions.
      microbatch: rows worked on at a time in a product; bounded memory.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)`. `NewtonInfo` in the state.

    Raises:
      ValueError, TypeError: at trace time, as `curvax.hvp`, `curvax.spectra.absolute_krylov` and `curvax.estimating`.

    Cost: a linearized gradient and `num_steps` Hessian products a step. Memory: `num_steps` trees like params, none kept.

    Example: near the saddle of `(x^2 - y^2) / 2` Newton's method jumps onto it; this halves x and moves y away.
      >>> import jax, jax.numpy as jnp, curvax
      >>> saddle = curvax.losses.from_function(lambda f, y: jnp.mean(f[:, 0] ** 2 - f[:, 1] ** 2) / 2)
      >>> objective = curvax.Objective(lambda w, x: x * w, saddle)
      >>> params, batch = jnp.array([1.0, 1e-3]), (jnp.ones((1, 2)), jnp.zeros(1))
      >>> tx = curvax.saddle_free_newton(0.5, objective, damping=1e-6)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), tx.init(params), params, batch=batch)
      >>> [round(x, 4) for x in (params + updates).tolist()]
      [0.5, 0.0015]

    References: Dauphin et al. (2014), Identifying and attacking the saddle point problem in high-dimensional non-convex
      optimization.

    Deviates: damping is a number, a schedule or Levenberg-Marquardt's, in place of a grid search in every step.
    """
    solver = partial(absolute_krylov, num_steps=num_steps)
    matvec = lambda params, batch, key: hvp(objective, params, batch, microbatch=microbatch)
    return _finished(solver, matvec, damping, learning_rate)


def _finished(
    solver: Solver,
    estimator: Any,
    damping: optax.ScalarOrSchedule,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    rule = estimating(scale_by_newton(solver, damping), estimator)
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))


def _check_curvature(curvature: Any, updates: PyTree) -> None:
    if curvature is None:
        raise ValueError(
            "a solve needs curvature in every step: tx.update(grads, state, params, curvature=matvec), or "
            "curvax.estimating(rule, estimator) with curvature_every=1. To use one curvature over several steps: "
            "curvax.lazy_newton."
        )
    for path, leaf in jax.tree.leaves_with_path(updates, is_leaf=is_masked):
        if is_masked(leaf):
            raise ValueError(
                f"a solve is of all parameters together, but updates{jax.tree_util.keystr(path)} is masked out. Keep what "
                "is not trained out of params (close over it), and make the objective one of the rest."
            )
