"""Search for a step that lowers the loss enough, by methods that need no learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import params_and_batch
from curvax._trees import inner_product, norm
from curvax._types import Batch, Params, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.objective import Objective
from curvax.optim._rule import StepContext

# f: the loss, g: its gradient, x: params, s: the step


class Start(NamedTuple):
    """The point from which a step is searched."""

    objective: Objective
    params: Params
    batch: Batch
    gradient: PyTree[Array]


class Family(NamedTuple):
    """The steps among which a method searches, by a parameter that makes them shorter or longer.

    Attributes:
      propose: `parameter -> (s, decrease)`, the step and how much the model falls by it.
      least: `(parameter, decrease, |g(x + s)|) -> number`, by how much f must fall.
      shorten: the parameter of a trial, from that of the one before it that failed.
    """

    propose: Callable[[Scalar], tuple[PyTree[Array], Scalar]]
    least: Callable[[Scalar, Scalar, Scalar], Scalar]
    shorten: Callable[[Scalar], Scalar]


class Trial(NamedTuple):
    """The latest trial, and how the search stands after it.

    Attributes:
      parameter: that of the trial.
      step: s, in the dtypes of params.
      trials: how many steps were tried.
      accepted: whether s is to be taken.
      is_flat: whether the model falls by less than the precision of f, so that gradients decided.
    """

    parameter: Scalar
    step: PyTree[Array]
    trials: Int[Array, ""]
    accepted: Bool[Array, ""]
    is_flat: Bool[Array, ""]


def start_of(objective: Objective, gradient: PyTree[Array], context: StepContext) -> Start:
    """Return the point of an update, or raise if it came without params or batch."""
    purpose = "a trial of the step needs both"
    params, batch = params_and_batch(context.params, context.extra.get("batch"), purpose)
    return Start(objective, params, batch, gradient)


def search_step(
    start: Start,
    family: Family,
    first: Scalar,
    max_trials: int,
    is_usable: Bool[Array, ""],
) -> Trial:
    """Try shorter and shorter steps until one lowers f enough; where unusable, none is tried."""
    objective, params, batch, gradient = start
    value_and_grad = jax.value_and_grad(objective.value)
    before, gradient_norm = objective.value(params, batch), norm(gradient)
    precision = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    # With a loss that is no number no trial could succeed, and the parameter would run away.
    is_usable &= jnp.isfinite(before)

    def attempt(last: Trial) -> Trial:
        shorter = family.shorten(last.parameter)
        parameter = jnp.where(last.trials > 0, shorter, last.parameter)
        wide_step, decrease = family.propose(parameter)
        step = jax.tree.map(lambda s, p: s.astype(p.dtype), wide_step, params)
        moved = jax.tree.map(rounded, cast(Params, optax.apply_updates(params, step)))
        after, fresh = value_and_grad(moved, batch)

        fresh_norm = norm(fresh)
        least = family.least(parameter, decrease, fresh_norm)
        is_enough = before - after >= least
        # Where the model falls by less than the precision of f, only gradients can tell: f(x) -
        # f(x + s) is -(g + g(x + s))'s / 2 up to third order, without the rounding of f. (In 16
        # bits x may have moved by less than s.)
        is_flat = decrease <= precision
        displacement = optax.tree.sub(tree_at_least_float32(moved), tree_at_least_float32(params))
        by_gradients = -inner_product(optax.tree.add(gradient, fresh), displacement) / 2
        is_better = (by_gradients >= least) | (fresh_norm < gradient_norm)
        # A model that cannot fall, at a minimum, asks for nothing, and no step is enough for that.
        accepted = (is_enough | (is_flat & is_better)) & (decrease > 0)
        return Trial(
            parameter=parameter,
            step=step,
            trials=last.trials + 1,
            accepted=accepted,
            is_flat=is_flat,
        )

    def is_searching(trial: Trial) -> Bool[Array, ""]:
        # Shorter steps gain even less than one whose gain rounding hides.
        return ~trial.accepted & ~trial.is_flat & (trial.trials < max_trials)

    unused = Trial(
        parameter=first,
        step=jax.tree.map(jnp.zeros_like, params),
        trials=jnp.int32(0),
        accepted=jnp.array(False),
        is_flat=~is_usable,
    )
    return lax.while_loop(is_searching, fast_convs_in_loops(attempt), unused)


def rounded(x: Array) -> Array:
    """Return x as its dtype holds it."""
    # Inside of a program XLA keeps more digits of 16-bit floats than an array will have, and would
    # evaluate the loss at a point at which params never are.
    limits = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, limits.nexp, limits.nmant) if limits.bits < 32 else x


def search_info(last: Trial, num_rejected: Int[Array, ""]) -> Mapping[str, Any]:
    """Return what the Info of every search tells, from the number of rejections so far."""
    return {
        "trials": last.trials,
        "accepted": last.accepted,
        "num_rejected": num_rejected + ~last.accepted,
    }
