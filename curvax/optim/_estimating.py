"""The wrapper that estimates curvature for a rule `scale_by_M`, which takes it as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree, UInt32

from curvax._checks import (
    CALL_WITH_BATCH,
    check_count,
    check_function,
    check_integer,
    check_no_masked,
    check_params,
)
from curvax._trees import scaled
from curvax._types import Batch, Count, Params, PRNGKey
from curvax.optim._refresh import Interval, check_interval, refresh_if
from curvax.optim._rule import resolve_schedule, transformation, zero_count

Estimator: TypeAlias = Callable[[Params, Batch, PRNGKey], PyTree[Array]]
"""`(params, batch, key) -> curvature`, what the wrapped rule takes as `curvature=`."""


class EstimatingState(NamedTuple):
    """State of `estimating`: integers, so that checkpoints and `optax.tree` see no keys.

    Attributes:
      seed: uint32; the key of a step is `fold_in(key(seed), count)`.
      count: steps taken.
      inner_state: state of the wrapped transformation.
    """

    seed: UInt32[Array, ""]
    count: Count
    inner_state: Any


def estimating(
    inner: optax.GradientTransformation,
    estimator: Estimator,
    curvature_every: Interval = 1,
    seed: int | UInt32[Array, ""] = 0,
    num_first: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Estimate curvature from `batch=` at intervals, and hand it to `inner` as `curvature=`.

    Step 0 refreshes, and a refreshed curvature is used in the same step. In between, `inner` gets
    `curvature=None` and goes on with the curvature in its state.

    Args:
      inner: a transformation that takes `curvature=`, or any composition of such: `optax.chain`,
        `optax.partition` and `optax.masked` forward it to the groups, each of which selects its
        leaves.
      estimator: the function `(params, batch, key) -> curvature`.
      curvature_every: number of steps between refreshes; 1 refreshes unconditionally. A schedule
        (`curvax.optim.growing_interval`) refreshes in the steps that its value divides.
      seed: the seed of the estimator's randomness; it may be traced, so that each member of a
        `vmap` has another one.
      num_first: number of independent estimates of which step 0 takes the mean, for rules that
        begin with the first curvature and average slowly afterwards. The curvature must then be a
        tree of arrays that can be added.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(grads, state, params, *, batch=None,
      curvature=None, model_params=None)`. A `curvature` that is passed is used as it is and nothing
      is estimated (gradient accumulation: average gradients and curvature over the micro-batches,
      then update once). `model_params` are all parameters, for use inside a mask, where `params`
      holds only a part. The state is an `EstimatingState`.

    Raises:
      ValueError: The interval or `num_first` is below 1; or, at trace time, both `batch` and
        `curvature` are missing, params are missing, or a part of them is masked out.

    Cost: the estimator's, each `curvature_every` steps; under `vmap` in the steps in which any
      member refreshes.

    Example: Sophia on one group of parameters, Adam on the others; the curvature is of the whole
      model.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> model = lambda p, x: x @ p["w"] + p["b"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> def estimator(params, batch, key):
      ...     return curvax.gauss_newton_bartlett(objective, params, batch, key)
      >>> groups = {"s": curvax.scale_by_sophia(), "a": optax.scale_by_adam()}
      >>> rule = optax.partition(groups, {"w": "s", "b": "a"})
      >>> tx = curvax.estimating(rule, estimator, curvature_every=10)
      >>> params = {"w": jnp.ones((3, 1)), "b": jnp.zeros(1)}
      >>> batch = jnp.ones((4, 3)), jnp.zeros((4, 1))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), state, params, batch=batch)

      Gradient accumulation, with the mean of both over the micro-batches:
      >>> micro = jnp.ones((2, 4, 3)), jnp.zeros((2, 4, 1))  # two micro-batches of four rows
      >>> def gradient_and_curvature(batch):
      ...     return jax.grad(objective)(params, batch), estimator(params, batch, jax.random.key(1))
      >>> each = jax.lax.map(gradient_and_curvature, micro)
      >>> grads, curvature = jax.tree.map(lambda x: x.mean(0), each)
      >>> updates, state = tx.update(grads, state, params, curvature=curvature)
    """
    check_interval(curvature_every=curvature_every)
    check_integer(0, 2**32 - 1, seed=seed)
    check_count(1, num_first=num_first)
    example = (
        "lambda params, batch, key: curvax.gauss_newton_bartlett(objective, params, batch, key)"
    )
    check_function("estimator", estimator, "(params, batch, key) -> curvature", example)
    # A mere optax transformation, without curvature, is allowed too: it ignores the keywords.
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> EstimatingState:
        check_params(params)
        return EstimatingState(jnp.asarray(seed, jnp.uint32), zero_count(), inner.init(params))

    def update(
        updates: PyTree,
        state: EstimatingState,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        curvature: PyTree | None = None,
        model_params: Params | None = None,
        **extra: Any,
    ) -> tuple[PyTree, EstimatingState]:
        def go_on(grads: PyTree, inner_state: Any, curvature: PyTree | None) -> tuple[PyTree, Any]:
            # The batch goes along for rules that evaluate the loss once more, such as a search.
            return inner.update(
                grads, inner_state, params, batch=batch, curvature=curvature, **extra
            )

        def keep(grads: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            return go_on(grads, inner_state, None)

        def refresh(grads: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            # The key of a step depends on seed and count alone, so a run that is resumed draws what
            # it would have drawn.
            key = jax.random.fold_in(jax.random.key(state.seed), state.count)
            whole_model = _whole_model(params, model_params)
            fresh = estimator(whole_model, _present_batch(batch), key)
            if num_first > 1:
                fresh = with_first_estimates(fresh, whole_model, key)
            return go_on(grads, inner_state, fresh)

        def with_first_estimates(fresh: PyTree, whole_model: Params, key: PRNGKey) -> PyTree:
            # The estimate of every step stays outside the condition, so that XLA can share its
            # forward pass; step 0 adds the others to it.
            def mean_with_others(fresh: PyTree) -> PyTree:
                def add(i: Array, total: PyTree) -> PyTree:
                    other_key = jax.random.fold_in(key, i)
                    other = estimator(whole_model, _present_batch(batch), other_key)
                    return optax.tree.add(total, other)

                total = lax.fori_loop(1, num_first, add, fresh)
                return scaled(1 / num_first, total)

            return refresh_if(state.count == 0, mean_with_others, lambda fresh: fresh, fresh)

        # Whoever passes a curvature decides on its interval as well.
        if curvature is not None:
            updates, inner_state = go_on(updates, state.inner_state, curvature)
        elif isinstance(curvature_every, int) and curvature_every == 1:
            # Unconditional, so that XLA can share the forward pass with that of the gradient; a
            # branch could not.
            updates, inner_state = refresh(updates, state.inner_state)
        else:
            interval = resolve_schedule(curvature_every, state.count)
            is_due = state.count % interval == 0
            updates, inner_state = refresh_if(is_due, refresh, keep, updates, state.inner_state)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, EstimatingState(state.seed, count, inner_state)

    return transformation(init, update)


def _whole_model(params: Params | None, model_params: Params | None) -> Params:
    """Return all parameters of the model, or raise if a part of them is missing or masked out."""
    chosen = params if model_params is None else model_params
    if chosen is None:
        raise ValueError(
            "the curvature estimate needs params: tx.update(grads, state, params, batch=batch)."
        )
    # The objective is a function of all parameters, so a part of them gives no curvature.
    check_no_masked(
        chosen,
        "params",
        purpose="the curvature estimate needs the whole model",
        advice="Pass all parameters by update(..., batch=batch, model_params=params), or put the "
        "mask inside: curvax.estimating(optax.partition({...}, labels), estimator).",
    )
    check_params(chosen)
    return chosen


def _present_batch(batch: Batch | None) -> Batch:
    """Return the batch, or raise if the update was called without it."""
    if batch is None:
        raise ValueError(f"the curvature estimate needs the batch: {CALL_WITH_BATCH}")
    return batch
