"""The loss at the params of an update: passed as `value=`, or computed from the batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from curvax._checks import describe, params_and_batch
from curvax._types import Batch, Params, Scalar, at_least_float32
from curvax.objective import Objective


def loss_of_update(
    value: Any, objective: Objective | None, params: Params | None, batch: Batch | None
) -> Scalar:
    """Return the loss of an update in at least float32; where it was not passed, compute it.

    The compiler shares this forward pass with that of the gradient, where both are in one program.
    """
    if value is None:
        value = _computed(objective, params, batch)
    if jnp.shape(value) != ():
        raise ValueError(
            f"value= is the loss at params, one number; got {describe(value)}. Reduce it with "
            "jnp.mean."
        )
    return at_least_float32(jnp.asarray(value))


def _computed(objective: Objective | None, params: Params | None, batch: Batch | None) -> Scalar:
    """Evaluate the objective, or raise and say what is missing for it."""
    if objective is None:
        raise ValueError(
            "the loss is missing: tx.update(grads, state, params, value=loss), or give the wrapper "
            "the objective, from which it computes the loss of the batch."
        )
    params, batch = params_and_batch(params, batch, "the loss is computed from both")
    return objective.value(params, batch)
