"""The one wrapper that turns `scale_by_M`, which takes curvature as data, into an optimizer that estimates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree, UInt32

from curvax._checks import check_function, check_integer, check_no_masked, check_params
from curvax._types import Batch, Count, Params, PRNGKey
from curvax.optim._refresh import refresh_if

Estimator: TypeAlias = Callable[[Params, Batch, PRNGKey], PyTree[Array]]
"""`(params, batch, key) -> curvature`, a tree that the wrapped transformation takes as `curvature=`."""


class EstimatingState(NamedTuple):
    """State of `estimating`: plain integers, so that checkpoints and `optax.tree` functions see no keys.

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
    curvature_every: int | Int[Array, ""] = 1,
    seed: int | UInt32[Array, ""] = 0,
) -> optax.GradientTransformationExtraArgs:
    """Estimate curvature from `batch=` every `curvature_every` steps, and hand it to `inner` as `curvature=`.

    Step 0 refreshes, and a refreshed curvature is used in the same step. In between, `inner` gets `curvature=None` and
    goes on with what it holds.

    Args:
      inner: a transformation that takes `curvature=`, or any composition of such: `optax.chain`, `optax.partition`,
        `optax.masked` forward it to the groups, which keep their own leaves.
      estimator: `(params, batch, key) -> curvature`.
      curvature_every: steps between refreshes; 1 refreshes unconditionally.
      seed: of the estimator's randomness; may be traced, so that `vmap`-ed members each get their own.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(grads, state, params, *, batch=None, curvature=None,
      model_params=None)`. `curvature`, when given, is used as it is and nothing is estimated (gradient accumulation:
      average gradients and curvature over the micro-batches, then update once). `model_params` are all parameters, for
      use inside a mask, where `params` holds only some. State is an `EstimatingState`.

    Raises:
      ValueError: at trace time: neither `batch` nor `curvature`; no params; params that are masked out; intervals below 1.

    Cost: the estimator's, each `curvature_every` steps; under `vmap` in the steps in which some member refreshes.

    Example: Sophia on one group of parameters, Adam on the others; the curvature is of the whole model.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> objective = curvax.Objective(lambda p, x: x @ p["w"] + p["b"], curvax.losses.squared_error())
      >>> estimator = lambda params, batch, key: curvax.gauss_newton_bartlett(objective, params, batch, key)
      >>> groups = {"s": curvax.scale_by_sophia(), "a": optax.scale_by_adam()}
      >>> tx = curvax.estimating(optax.partition(groups, {"w": "s", "b": "a"}), estimator, curvature_every=10)
      >>> params, batch = {"w": jnp.ones((3, 1)), "b": jnp.zeros(1)}, (jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(objective)(params, batch), state, params, batch=batch)

      Gradient accumulation, with the mean of both over the micro-batches:
      >>> micro = (jnp.ones((2, 4, 3)), jnp.zeros((2, 4, 1)))                      # two micro-batches of four rows
      >>> both = lambda batch: (jax.grad(objective)(params, batch), estimator(params, batch, jax.random.key(1)))
      >>> grads, curvature = jax.tree.map(lambda x: x.mean(0), jax.lax.map(both, micro))
      >>> updates, state = tx.update(grads, state, params, curvature=curvature)
    """
    check_integer(1, 2**31 - 1, curvature_every=curvature_every)
    check_integer(0, 2**32 - 1, seed=seed)
    example = (
        "lambda params, batch, key: curvax.gauss_newton_bartlett(objective, params, batch, key)"
    )
    check_function("estimator", estimator, "(params, batch, key) -> curvature", example)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> EstimatingState:
        check_params(params)
        return EstimatingState(
            jnp.asarray(seed, jnp.uint32), jnp.zeros([], jnp.int32), inner.init(params)
        )

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
            return inner.update(
                grads, inner_state, params, batch=batch, curvature=curvature, **extra
            )

        def keep(grads: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            return go_on(grads, inner_state, None)

        def refresh(grads: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            key = jax.random.fold_in(jax.random.key(state.seed), state.count)
            fresh = estimator(_whole_model(params, model_params), _present(batch), key)
            return go_on(grads, inner_state, fresh)

        if curvature is not None:
            updates, inner_state = go_on(updates, state.inner_state, curvature)
        elif isinstance(curvature_every, int) and curvature_every == 1:
            updates, inner_state = refresh(updates, state.inner_state)
        else:
            due = state.count % curvature_every == 0
            updates, inner_state = refresh_if(due, refresh, keep, updates, state.inner_state)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, EstimatingState(state.seed, count, inner_state)

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def _whole_model(params: Params | None, model_params: Params | None) -> Params:
    chosen = params if model_params is None else model_params
    if chosen is None:
        raise ValueError(
            "the curvature estimate needs params: tx.update(grads, state, params, batch=batch)."
        )
    check_no_masked(chosen)
    check_params(chosen)
    return chosen


def _present(batch: Batch | None) -> Batch:
    if batch is None:
        raise ValueError(
            "the curvature estimate needs the batch: tx.update(grads, state, params, batch=batch)."
        )
    return batch
