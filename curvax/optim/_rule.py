"""The one builder of rules: a method states its mathematics, what all rules share is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from curvax._checks import check_damping, check_precision
from curvax._trees import all_finite
from curvax._types import Params
from curvax._xla import with_auto_sharding

T = TypeVar("T")
Flag = Bool[Array, ""] | bool


class StepContext(NamedTuple):
    """What one call of `update` brings along, besides the gradient and the state.

    Attributes:
      params: the parameters, or None where the caller passed none.
      curvature: the argument `curvature=` of this update, or None.
      damping: the damping in effect, or None for a rule without damping.
      gradient_is_finite: whether the gradient is finite. Where it is not, the state must stay as it
        is.
      curvature_is_new: whether a curvature was taken in in this update.
      extra: every other keyword argument of this update, for instance `batch`.
    """

    params: Params | None
    curvature: Any
    damping: Any
    gradient_is_finite: Bool[Array, ""]
    curvature_is_new: Bool[Array, ""]
    extra: Mapping[str, Any]


class StepResult(NamedTuple):
    """What the `step` of a rule returns.

    Attributes:
      updates: the step, a tree like the gradient; the builder casts it to the gradient's dtypes.
      state: the state after the step. The builder takes it as it is, so that no large array is
        selected twice: a step that changes it changes it only where `context.gradient_is_finite`
        holds.
      info: the fields of the state's Info that this step measured. The builder casts them, and
        keeps the old ones where the gradient is not finite.
      is_finite: False counts this update as not finite, for instance because a solve ended in NaN.
      is_accepted: where it is False, the update is zero and the step is not counted.
      is_ready: whether there is curvature to step with; None stands for "a curvature has been taken
        in".
    """

    updates: PyTree[Array]
    state: Any
    info: Mapping[str, Any]
    is_finite: Flag = True
    is_accepted: Flag = True
    is_ready: Flag | None = None


def curvature_rule(
    init: Callable[[Params], Any],
    step: Callable[[Any, PyTree[Array], StepContext], StepResult],
    *,
    average: Callable[[Any, PyTree[Array]], Any] | None = None,
    take_in: Callable[[Any, Any, PyTree[Array]], tuple[Any, Flag]] | None = None,
    damping: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Build an optax transformation from the mathematics of a method.

    An update runs `average(state, gradient)`, then, if it brings a curvature, `take_in(state,
    curvature, gradient)`, then `step(state, gradient, context)`. Around these the builder does what
    every rule needs:

    | gradient   | curvature   | step emitted      | taken in     | counters that go up  |
    |------------|-------------|-------------------|--------------|----------------------|
    | finite     | finite      | with the new one  | both         | count, num_refreshes |
    | finite     | not finite  | with the last one | the gradient | count, num_nonfinite |
    | finite     | not passed  | with the last one | the gradient | count                |
    | finite     | none so far | zero              | the gradient | count                |
    | not finite | any         | NaN               | nothing      | num_nonfinite        |

    "Nothing" means that every array of the state but `num_nonfinite` is bitwise what it was.

    `optax.apply_if_finite` sees the NaN. (It restores the state and with it `num_nonfinite`, and
    keeps a count of its own.)

    Args:
      init: `params -> state`. The state is a `NamedTuple` of fresh arrays with the fields `count`
        (int32, steps taken), `info` (a `NamedTuple` of diagnostics with an int32 field
        `num_nonfinite`) and whatever the method holds; with `take_in` also `num_refreshes` (int32,
        curvatures taken in). `zero_count()` and `zero_number()` make such fields.
      step: `(state, gradient, context) -> StepResult`; it may be any function of the gradient.
        `state.count` is the number of steps before this one, `state.num_refreshes` includes the
        curvature of this update.
      average: `(state, gradient) -> state`, averages of gradients or of functions of them. The
        builder selects once, between the arrays that this function changed and the old ones.
      take_in: `(state, curvature, gradient) -> (state, is_finite)`, the state with a curvature in
        it, and whether that curvature is finite. The builder selects as for `average`. Without this
        function there is nothing to wait for: the first update is a step already.
      damping: a number, a schedule of the step, or None for a method without damping. An update
        that is passed `damping=` uses that instead; None there stands for this one.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params=None, *,
      curvature=None, damping=None)`.

    Raises:
      ValueError: The damping is not positive.
      TypeError: The damping arrives in 16 bits.

    Cost: one pass over the gradient to see whether it is finite, and one selection of each array
      that changes.

    Example: signs of the gradient, as a rule without curvature.
      >>> import jax, jax.numpy as jnp
      >>> from typing import Any, NamedTuple
      >>> from curvax.optim import StepResult, curvature_rule, zero_count
      >>> class Diagnostics(NamedTuple):
      ...     num_nonfinite: Any
      >>> class Held(NamedTuple):
      ...     count: Any
      ...     info: Diagnostics
      >>> def step(state, gradient, context):
      ...     return StepResult(jax.tree.map(jnp.sign, gradient), state, info={})
      >>> def init(params):
      ...     return Held(zero_count(), Diagnostics(zero_count()))
      >>> rule = curvature_rule(init, step)
      >>> updates, state = rule.update(jnp.array([3.0, -2.0]), rule.init(jnp.zeros(2)))
      >>> updates.tolist(), state.count.item()
      ([1.0, -1.0], 1)
    """
    if damping is not None:
        check_damping(damping)
        check_precision(damping=damping)
    damping_of_rule = damping

    def update(
        updates: PyTree,
        state: Any,
        params: Params | None = None,
        *,
        curvature: Any = None,
        damping: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        # An outer transformation that adapts the damping goes before the schedule of the rule.
        if damping is None:
            damping = resolve_schedule(damping_of_rule, state.count)
        gradient_is_finite = all_finite(updates)
        count, num_nonfinite = state.count, state.info.num_nonfinite
        is_finite, curvature_is_new = gradient_is_finite, jnp.array(False)

        # The gradient enters the averages, then the curvature does.
        if average is not None:
            state = keep_changed(gradient_is_finite, average(state, updates), state)
        if take_in is not None and curvature is not None:
            fresh, curvature_is_finite = take_in(state, curvature, updates)
            # A bad gradient turns away a good curvature too, so that the state stays as it was.
            is_finite = curvature_is_new = gradient_is_finite & curvature_is_finite
            state = keep_changed(curvature_is_new, fresh, state)
            state = state._replace(num_refreshes=state.num_refreshes + curvature_is_new)

        context = StepContext(
            params=params,
            curvature=curvature,
            damping=damping,
            gradient_is_finite=gradient_is_finite,
            curvature_is_new=curvature_is_new,
            extra=extra,
        )
        result = step(state, updates, context)

        # NaN for a gradient that is not finite; zero for a step without curvature or one that was
        # rejected.
        is_ready = result.is_ready
        if is_ready is None:
            # Before the first curvature nothing says how far to step.
            is_ready = True if take_in is None else state.num_refreshes > 0
        is_emitted = gradient_is_finite & is_ready & result.is_accepted
        emitted = _emit(is_emitted, gradient_is_finite, result.updates, updates)

        # Counters and diagnostics change last.
        is_counted = gradient_is_finite & result.is_accepted
        info = result.state.info
        latest = {name: _cast_to(new, getattr(info, name)) for name, new in result.info.items()}
        info = keep_changed(gradient_is_finite, info._replace(**latest), info)
        # After the selection, for it is the one number that a bad gradient does change.
        info = info._replace(num_nonfinite=num_nonfinite + ~(is_finite & result.is_finite))
        count = jnp.where(is_counted, optax.safe_increment(count), count)
        return emitted, result.state._replace(count=count, info=info)

    return transformation(init, update)


def placed_by_compiler(
    rule: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Return a rule whose update leaves the placement of its matrices to the compiler.

    It is for rules that join and multiply parts of several leaves: where leaves are sharded
    explicitly (`AxisType.Explicit`), each of these operations would have to say how its result is.
    Updates come back sharded as the gradients, the new state as the old one. Elsewhere the rule
    stays as it is.
    """

    def update(
        updates: PyTree, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        # Functions and names among the extra arguments cannot be passed as arrays.
        arrays: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, x in extra.items():
            of_arrays = not callable(x) and jax.tree.all(jax.tree.map(_is_array, x))
            (arrays if of_arrays else others)[name] = x

        def run(updates: PyTree, state: Any, params: Params | None, arrays: Any) -> Any:
            return rule.update(updates, state, params, **arrays, **others)

        result: tuple[PyTree, Any] = with_auto_sharding(
            run, updates, state, params, arrays, like=(updates, state)
        )
        return result

    return transformation(rule.init, update)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def transformation(
    init: Callable[[Params], Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """Return the pair as optax's type, whose protocol cannot state the keywords that we name."""
    return optax.GradientTransformationExtraArgs(
        cast(optax.TransformInitFn, init), cast(optax.TransformUpdateExtraArgsFn, update)
    )


def resolve_schedule(value: Any, count: Any) -> Any:
    """Return the value of a schedule at this step; anything else is returned as it is."""
    return value(count) if callable(value) else value


def zero_count() -> Array:
    """Return a fresh int32 zero, for a counter of a state (buffers of a state are never shared)."""
    return jnp.zeros([], jnp.int32)


def zero_number() -> Array:
    """Return a fresh float32 zero, for a diagnostic of an Info."""
    return jnp.zeros([], jnp.float32)


def keep_changed(pred: Flag, new: T, old: T) -> T:
    """Return `new` where `pred` holds, else `old`; arrays that are in both are not selected."""
    # Identity is known at trace time: what a method left alone, a window or a basis, is not copied.
    chosen: T = jax.tree.map(lambda n, o: o if n is o else _select(pred, n, o), new, old)
    return chosen


# Compiled inside: a tree has many leaves of few shapes, and each shape is traced once.
_select = jax.jit(jnp.where)


@jax.jit
def _emit_leaf(is_emitted: Array, filler: Array, step: Array, gradient: Array) -> Array:
    return jnp.where(is_emitted, step, filler).astype(gradient.dtype)


def _emit(is_emitted: Flag, gradient_is_finite: Array, steps: PyTree, gradient: PyTree) -> PyTree:
    """Return the steps in the gradient's dtypes, or zeros, or NaN."""
    # NaN, for zeros would hide the bad gradient from `optax.apply_if_finite`.
    filler = jnp.where(gradient_is_finite, 0.0, jnp.nan)
    return jax.tree.map(lambda s, g: _emit_leaf(is_emitted, filler, s, g), steps, gradient)


def _cast_to(new: Any, old: Array) -> Array:
    """Return a measured number in the dtype in which the Info holds it."""
    return jnp.asarray(new, old.dtype)
