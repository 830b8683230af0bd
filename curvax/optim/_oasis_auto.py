"""OASIS without a learning rate: the rate follows how much the gradient changed on the last step.

With D the running diagonal of the Hessian, `Dhat = max(|D|, alpha)`, and norms `|x|_D^2 = x.(D x)`,

  eta_k = min(sqrt(1 + theta_{k-1}) eta_{k-1},
              |w_k - w_{k-1}|_Dhat / (2 |grad f(w_k) - grad f(w_{k-1})|_{Dhat^-1})),
  theta_k = eta_k / eta_{k-1},   w_{k+1} = w_k - eta_k Dhat^-1 g_k,

both gradients of the same mini-batch. The second term is half the inverse of the smoothness along
the last step, in the metric Dhat; the first lets a rate grow slowly.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import (
    check_decay,
    check_no_masked,
    check_params,
    check_positive,
    check_precision,
    params_and_batch,
)
from curvax._trees import inner_product, scaled
from curvax._types import Batch, Count, Params, Scalar, tree_at_least_float32
from curvax.objective import Objective
from curvax.optim._diagonal import (
    divide,
    floored,
    hessian_diagonal,
    wide_zeros,
)
from curvax.optim._estimating import estimating
from curvax.optim._oasis import taking_in_diagonals
from curvax.optim._rule import (
    StepContext,
    StepResult,
    curvature_rule,
    keep_changed,
    zero_count,
    zero_number,
)


class OasisAutoInfo(NamedTuple):
    """Diagnostics of the latest step.

    Attributes:
      secant_rate: the second term of the minimum, half the inverse of the smoothness along the last
        step; infinite where the gradient did not change.
      floored_fraction: the fraction of entries with `|D| < alpha`. Where it is 0, and D exact,
        steps do not depend on the scale of params.
      num_nonfinite: the number of steps so far whose gradient, curvature, or gradient at the params
        before was not finite.
    """

    secant_rate: Scalar
    floored_fraction: Scalar
    num_nonfinite: Int[Array, ""]


class ScaleByOasisAutoState(NamedTuple):
    """State of `scale_by_oasis_auto`.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in; while it is 0 the updates are zero.
      curvature: D, in at least float32.
      params: w of the latest step.
      rate: eta of the latest step; at first, that of the next.
      growth: theta of the latest step, infinite until a first comparison of gradients.
      info: `OasisAutoInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    curvature: PyTree[Array]
    params: Params
    rate: Scalar
    growth: Scalar
    info: OasisAutoInfo


def scale_by_oasis_auto(
    objective: Objective,
    b2: float = 0.99,
    alpha: float = 1e-3,
    first_rate: float | Array = 1e-2,
) -> optax.GradientTransformationExtraArgs:
    """Step by `-eta Dhat^-1 g` with the rate of OASIS, and the curvature diagonal given as data.

    `curvax.oasis_auto` has the equations. The gradients that are compared are computed here, both
    on the batch of the update; the step is that of the gradient which is passed, so that it may be
    an average over micro-batches.

    Args:
      objective: the `curvax.Objective` that is minimized.
      b2: decay of the curvature average; it acts once a refresh.
      alpha: floor of the metric, in units of a curvature.
      first_rate: eta of the first step, which the second forgets. Gradients at params that hardly
        differ differ by rounding.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer (no learning rate comes after it),
      with `update(updates, state, params, *, batch, curvature=None)`. The curvature is a tree like
      params; with None the rule goes on with the average in the state.
      `curvax.optim.curvature_rule` says what happens with numbers that are not finite; where only
      the gradient at the params before is not finite, the rate stays. The state is a
      `ScaleByOasisAutoState`.

    Raises:
      ValueError: The floor or the first rate is not positive; or, at trace time, params or batch
        are missing, or a part of params is masked out.
      TypeError: A hyperparameter arrives in 16 bits.

    Cost: a gradient, at the params before; and one more where the step's own gradient is not in the
      same compiled program. Memory: a tree like params, and one in at least float32.

    Example: the error of a diagonal quadratic halves in each step but the first.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> batch = jnp.array([[1.0, 5.0]]), jnp.zeros((1, 2))
      >>> rule = curvax.optim.scale_by_oasis_auto(objective, first_rate=0.5)
      >>> w, curvature = jnp.array([4.0, -8.0]), jnp.array([1.0, 25.0])
      >>> state = rule.init(w)
      >>> for _ in range(3):
      ...     gradient = jax.grad(objective)(w, batch)
      ...     step, state = rule.update(gradient, state, w, batch=batch, curvature=curvature)
      ...     w = w + step
      >>> w.tolist()
      [0.5, -1.0]

    References: see `curvax.oasis_auto`.
    """
    check_decay(b2=b2)
    check_positive(alpha=alpha, first_rate=first_rate)
    check_precision(b2=b2, alpha=alpha, first_rate=first_rate)

    def init(params: Params) -> ScaleByOasisAutoState:
        check_params(params)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        info = OasisAutoInfo(
            secant_rate=zero_number(),
            floored_fraction=zero_number(),
            num_nonfinite=zero_count(),
        )
        return ScaleByOasisAutoState(
            count=zero_count(),
            num_refreshes=zero_count(),
            curvature=wide_zeros(params),
            params=jax.tree.map(jnp.copy, params),
            # The sum is a fresh buffer, also where the rate is an array of the caller's.
            rate=jnp.asarray(first_rate, dtype) + jnp.zeros([], dtype),
            growth=jnp.full([], jnp.inf, dtype),
            info=info,
        )

    def step(
        state: ScaleByOasisAutoState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        params, batch = _point(context)
        metric, fraction = floored(state.curvature, alpha)
        secant = _secant_rate(objective, batch, params, state.params, metric)

        # There is no step before the first to compare with; its params are those of `init`.
        is_comparable = state.count > 0
        limit = jnp.sqrt(1 + state.growth) * state.rate
        smallest = jnp.minimum(limit, secant).astype(state.rate.dtype)
        # Infinite: the gradient has not changed, and nothing has bounded the rate so far. NaN: the
        # gradient at the params before is not finite. Zero: underflow, from which no rate grows.
        is_rate = is_comparable & jnp.isfinite(smallest) & (smallest > 0)
        rate = jnp.where(is_rate, smallest, state.rate)
        growth = jnp.where(is_rate, rate / state.rate, state.growth)

        # w_{k+1} = w_k - eta_k Dhat^-1 g_k
        steps = scaled(-rate, jax.tree.map(divide, gradient, metric))
        new = state._replace(params=params, rate=rate, growth=growth)
        return StepResult(
            updates=steps,
            state=keep_changed(context.gradient_is_finite, new, state),
            info={"secant_rate": secant, "floored_fraction": fraction},
            is_finite=~jnp.isnan(secant) | ~is_comparable,
        )

    return curvature_rule(init, step, take_in=taking_in_diagonals(b2))


def oasis_auto(
    objective: Objective,
    b2: float = 0.99,
    alpha: float = 1e-3,
    first_rate: float | Array = 1e-2,
    curvature_every: int = 1,
    num_first: int = 10,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """OASIS: steps in the metric of the Hessian's diagonal, with a rate that adapts.

    ```
    D = b2 D + (1 - b2) z * (H z),   Dhat = max(|D|, alpha)         random signs z
    eta = min(sqrt(1 + theta) eta, |w - w_before|_Dhat / (2 |g - g_before|_{Dhat^-1}))
    theta = eta / (eta before),   w -= eta Dhat^-1 g
    ```
    with `|x|_D^2 = x.(D x)`, and both gradients of the mini-batch of the step. D begins with the
    mean of `num_first` probes, theta with infinity. This is
    `estimating(scale_by_oasis_auto(objective), hessian_diagonal(objective))`.

    With the exact diagonal the rate is 1/2 on a quadratic whose Hessian is diagonal, and no step
    depends on the scale of params. A probe adds to an entry what is beside the diagonal in its row,
    in the units of the other params; then neither is exact. On noisy batches the least of
    many secant rates counts, so that rates are low; `curvax.oasis` gets further in as many steps.

    Args:
      objective: the `curvax.Objective` that is minimized.
      b2: decay of the curvature average.
      alpha: floor of the metric, in units of a curvature. Where it is too small, entries of little
        curvature step too far: 1e-4 failed on one of two variational autoencoders.
      first_rate: eta of the first step, which the second forgets. Gradients at params that hardly
        differ differ by rounding.
      curvature_every: number of steps between refreshes.
      num_first: number of probes that the first curvature is the mean of.
      seed: the seed of the probes.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params, batch=batch)` with
      gradients of that batch.

    Raises:
      ValueError, TypeError: As `curvax.optim.scale_by_oasis_auto` and `curvax.estimating` do.

    Cost: at interval 1, about 4 gradients in FLOPs with the step's own, which XLA shares. Memory: a
      tree like params, and one in at least float32.

    Example: `log(1 + e^-x) + x^2 / 20`, whose curvature changes on the way.
      >>> import jax, jax.numpy as jnp, curvax
      >>> loss = curvax.losses.from_function(lambda f, y: jnp.mean(jax.nn.softplus(-f) + f**2 / 20))
      >>> objective = curvax.Objective(lambda w, x: x @ w, loss)
      >>> params, batch = jnp.array([[30.0]]), (jnp.ones((1, 1)), jnp.zeros(1))
      >>> tx = curvax.oasis_auto(objective)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(objective)(w, batch), state, w, batch=batch)
      ...     return w + updates, state
      >>> for _ in range(60):
      ...     params, state = step(params, state)
      >>> bool(abs(jax.grad(objective)(params, batch)) < 1e-4)
      True

    References: Jahani et al. (2021), Doubly adaptive scaled algorithm for machine learning using
      second-order information, https://arxiv.org/abs/2109.05198. The equations were read in a
      reimplementation that names the paper; defaults are ours. The rate is that of Malitsky and
      Mishchenko (2020), Adaptive gradient descent without descent, in the metric Dhat.
    """
    rule = scale_by_oasis_auto(objective, b2, alpha, first_rate)
    return estimating(rule, hessian_diagonal(objective), curvature_every, seed, num_first)


def _point(context: StepContext) -> tuple[Params, Batch]:
    """Return params and batch of an update, or raise and say what is missing."""
    purpose = "the rate comes from gradients at both params"
    params, batch = params_and_batch(context.params, context.extra.get("batch"), purpose)
    check_no_masked(
        params,
        "params",
        purpose="the rate comes from gradients of the whole model",
        advice="With masks and groups use the rule with a fixed rate: curvax.scale_by_oasis, "
        "curvax.oasis.",
    )
    return params, batch


def _secant_rate(
    objective: Objective, batch: Batch, params: Params, before: Params, metric: PyTree[Array]
) -> Scalar:
    """Return `|dw|_Dhat / (2 |dg|_{Dhat^-1})`, infinite where the gradient does not change."""
    gradient_of = jax.grad(objective.value)
    # Both by the same function, on the same batch: noise between batches is no curvature. XLA
    # shares the first with the gradient of the step.
    now, then = gradient_of(params, batch), gradient_of(before, batch)
    dg = optax.tree.sub(tree_at_least_float32(now), tree_at_least_float32(then))
    dw = optax.tree.sub(tree_at_least_float32(params), tree_at_least_float32(before))

    moved = inner_product(dw, jax.tree.map(jnp.multiply, metric, dw))
    changed = inner_product(dg, jax.tree.map(divide, dg, metric))
    # Two params that are equal, or between which the loss is linear, bound no rate: 0/0 and x/0.
    # NaN, of a gradient that is not finite, stays.
    ratio = jnp.sqrt(moved / jnp.where(changed == 0, 1, changed)) / 2
    return jnp.where(changed == 0, jnp.inf, ratio)
