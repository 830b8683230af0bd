"""What K-FAC and EK-FAC share: running averages of factors, and a refresh at intervals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_decay, check_precision
from curvax._trees import all_finite, finite_slices, select_slices
from curvax._types import Count, Params, Scalar
from curvax.kron._block_operators import BlockSpectrum
from curvax.kron._factors import Factors, init_factors, moving_average
from curvax.kron._layout import Block, Layout, check_layout, parts_of_equal_work, present
from curvax.kron._operator import KronOperator, apply
from curvax.kron._owner_operators import for_everyone
from curvax.kron._packing import on_owners, packed, place_factors, place_states
from curvax.kron._placement import Placement, check_placement, parts_of_placement
from curvax.optim._refresh import Interval, check_interval, refresh_if
from curvax.optim._relative_damping import RelativeDamping, absolute_damping
from curvax.optim._rule import (
    StepContext,
    StepResult,
    curvature_rule,
    keep_changed,
    placed_by_compiler,
    resolve_schedule,
    zero_count,
    zero_number,
)

BlockStates: TypeAlias = dict[str, Any]
"""For each block, by name, what a method holds besides the factors: an inverse, an eigenbasis."""

Refreshed: TypeAlias = tuple[BlockStates, dict[str, BlockSpectrum]]


class KronRule(NamedTuple):
    """What a Kronecker method does differently, from averaged factors to its step.

    Attributes:
      factors: `curvature -> Factors`, the part of the curvature whose running average is taken.
      init_block_state: `(layout, params) -> block_state`, before the first curvature.
      refresh: `(layout, factors, block_state, damping) -> (block_state, spectra)`, the costly part,
        for the blocks of `layout`.
      average_block_state: `(layout, block_state, curvature) -> block_state`, with every curvature,
        after the refresh; or None.
      power: `(layout, factors, block_state, damping) -> KronOperator`, the inverse to apply.
      place: `block_state -> block_state` where it belongs; the rule puts in what a placement says.
    """

    factors: Callable[[Any], Factors]
    init_block_state: Callable[[Layout, Params], BlockStates]
    refresh: Callable[[Layout, Factors, BlockStates, Scalar], Refreshed]
    average_block_state: Callable[[Layout, BlockStates, Any], BlockStates] | None
    power: Callable[[Layout, Factors, BlockStates, Scalar], KronOperator]
    place: Callable[[BlockStates], BlockStates] = lambda block_state: block_state


class BlockInfo(NamedTuple):
    """Diagnostics of one block.

    Attributes:
      trace: trace of its curvature, undamped.
      largest: largest eigenvalue of the damped block.
      smallest: smallest eigenvalue of the damped block.
      condition: their ratio.
      age: steps since its inverse (or eigenbasis) was computed.
    """

    trace: Scalar
    largest: Scalar
    smallest: Scalar
    condition: Scalar
    age: Int[Array, ""]


class KronInfo(NamedTuple):
    """Diagnostics of a Kronecker method.

    Attributes:
      blocks: for each block, by name.
      damping: the damping of the latest step.
      num_nonfinite: how many gradients or curvatures were not finite, so far.
      num_failures: for each block, how often its factorization failed; each time it went on with
        the last good one.
    """

    blocks: dict[str, BlockInfo]
    damping: Scalar
    num_nonfinite: Int[Array, ""]
    num_failures: dict[str, Int[Array, ""]]


class ScaleByKronState(NamedTuple):
    """State of `scale_by_kfac` and `scale_by_ekfac`.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in; while it is 0 the updates are zero.
      inverse_age: steps since inverses were last computed.
      curvature: running averages of factors, in at least float32.
      block_state: for each block its inverse (K-FAC), or its eigenbasis and second moments there
        (EK-FAC).
      info: `KronInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    inverse_age: Int[Array, ""]
    curvature: Factors
    block_state: BlockStates
    info: KronInfo


def scale_by_kron(
    layout: Layout,
    method: KronRule,
    damping: optax.ScalarOrSchedule | RelativeDamping,
    inverse_every: Interval,
    decay: float | Array,
    stagger: bool = False,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Build a rule from a `KronRule`; the arguments are those of `scale_by_kfac`."""
    if placement is not None:
        check_placement(placement, layout)
        # From here on owner blocks stand for the blocks whose slices they have.
        layout = placement.layout
        method = method._replace(
            refresh=on_owners(placement, method.refresh), place=partial(place_states, placement)
        )
    check_precision(decay=decay)
    check_decay(decay=decay)
    check_interval(inverse_every=inverse_every)
    damping_of_rule: Any = damping
    if isinstance(damping, RelativeDamping):
        damping_of_rule = damping.as_schedule()
    if stagger:
        # Blocks get their turns at trace time, so the period has to be known there.
        check_count(1, inverse_every=inverse_every)  # raises for a schedule

    def init(params: Params) -> ScaleByKronState:
        check_layout(layout, params)
        unmasked = present(layout, params)
        curvature = init_factors(unmasked, params)
        block_state = method.init_block_state(unmasked, params)
        if placement is not None:
            curvature = place_factors(placement, curvature)
        return ScaleByKronState(
            count=zero_count(),
            num_refreshes=zero_count(),
            inverse_age=zero_count(),
            curvature=curvature,
            block_state=method.place(block_state),
            info=_init_info(unmasked),
        )

    def take_in(
        state: ScaleByKronState, curvature: Any, gradient: PyTree[Array]
    ) -> tuple[ScaleByKronState, Array]:
        del gradient
        # Martens and Grosse (2015), section 5: A <- decay A + (1 - decay) A_new, and likewise G.
        factors = method.factors(curvature)
        if placement is not None:
            factors = packed(placement, factors)
        factors = _matching(factors, state.curvature)
        averages = moving_average(state.curvature, factors, decay)
        if placement is not None:
            averages = place_factors(placement, averages)
        return state._replace(curvature=averages), _factors_are_finite(factors)

    def step(state: ScaleByKronState, gradient: PyTree[Array], context: StepContext) -> StepResult:
        check_layout(layout, gradient, "updates")
        unmasked = present(layout, gradient)
        damping = absolute_damping(context.damping, unmasked, state.curvature)
        is_finite = context.gradient_is_finite

        # 1. One step older; then the inverses or eigenbases that are due.
        state = _older(state, is_finite)
        state = refresh_due(state, unmasked, context, damping)

        # 2. Second moments in the eigenbasis, with every curvature, in the basis that is now in
        # use.
        moments_are_finite: Array | bool = True
        if context.curvature is not None and method.average_block_state is not None:
            averages = method.average_block_state(unmasked, state.block_state, context.curvature)
            moments_are_finite = all_finite(averages)
            is_usable = context.curvature_is_new & moments_are_finite
            averages = keep_changed(is_usable, averages, state.block_state)
            state = state._replace(block_state=method.place(averages))

        # 3. The step itself: A^-1 V G^-1 for each block V of the gradient.
        inverse = method.power(unmasked, state.curvature, state.block_state, damping)
        steps = apply(*for_everyone(unmasked, inverse), gradient)
        return StepResult(
            updates=steps,
            state=state,
            info={"damping": damping},
            is_finite=moments_are_finite,
        )

    def refresh_due(
        state: ScaleByKronState, unmasked: Layout, context: StepContext, damping: Scalar
    ) -> ScaleByKronState:
        """Refresh the blocks that are due: by turns, or all at once by age."""
        is_finite = context.gradient_is_finite
        # Before the first inversion there is nothing to apply, so all blocks take part in that one.
        is_first = context.curvature_is_new & (state.num_refreshes == 1)
        is_ready = is_finite & (state.num_refreshes > 0)
        if stagger:
            period = cast(int, inverse_every)
            if placement is None:
                parts = parts_of_equal_work(unmasked, period)
            else:
                parts = parts_of_placement(placement, unmasked, period)
            for turn, part in enumerate(parts):
                is_due = is_ready & (is_first | (state.count % period == turn))
                state = _refresh(method, part, is_due, is_finite, state, damping)
            return state
        if context.curvature is None:  # without a new one an inversion would repeat the last
            return state
        if isinstance(inverse_every, int) and inverse_every == 1:  # nothing is conditional
            state = _refresh(method, unmasked, None, is_finite, state, damping)
            return state._replace(inverse_age=jnp.where(is_finite, 0, state.inverse_age))
        interval = resolve_schedule(inverse_every, state.count)
        is_due = is_ready & (is_first | (state.inverse_age >= interval))
        state = _refresh(method, unmasked, is_due, is_finite, state, damping)
        return state._replace(inverse_age=jnp.where(is_due, 0, state.inverse_age))

    rule = curvature_rule(init, step, take_in=take_in, damping=damping_of_rule)
    return placed_by_compiler(rule)


def _init_info(layout: Layout) -> KronInfo:
    """Return diagnostics of zeros, each in a buffer of its own."""
    blocks, num_failures = {}, {}
    for block in layout.blocks:
        blocks[block.name] = BlockInfo(
            trace=zero_number(),
            largest=zero_number(),
            smallest=zero_number(),
            condition=zero_number(),
            age=zero_count(),
        )
        num_failures[block.name] = zero_count()
    return KronInfo(blocks, jnp.zeros([], jnp.result_type(float)), zero_count(), num_failures)


def _older(state: ScaleByKronState, is_finite: Bool[Array, ""]) -> ScaleByKronState:
    """Add one to the ages of all inverses, where the gradient is finite."""
    # A gradient that is not finite must leave the whole state as it was, ages too.
    blocks = {}
    for name, block in state.info.blocks.items():
        blocks[name] = block._replace(age=block.age + is_finite)
    info = state.info._replace(blocks=blocks)
    return state._replace(info=info, inverse_age=state.inverse_age + is_finite)


class _BlockRecord(NamedTuple):
    """What a refresh of one block changes."""

    block_state: Any
    info: BlockInfo
    num_failures: Array


def _refresh(
    method: KronRule,
    layout: Layout,
    is_due: Bool[Array, ""] | None,
    is_usable: Bool[Array, ""],
    state: ScaleByKronState,
    damping: Scalar,
) -> ScaleByKronState:
    """Refresh blocks if that is due (None: always); one that fails keeps its last good state."""
    # Only what a refresh changes is returned by its branches; the averages of factors, which are
    # large, are operands alone.
    records = {}
    for block in layout.blocks:
        records[block.name] = _BlockRecord(
            state.block_state[block.name],
            state.info.blocks[block.name],
            state.info.num_failures[block.name],
        )

    def refresh(
        is_usable: Array, factors: Factors, records: dict[str, _BlockRecord], damping: Scalar
    ) -> dict[str, _BlockRecord]:
        block_states = {name: record.block_state for name, record in records.items()}
        fresh, spectra = method.refresh(layout, factors, block_states, damping)
        chosen = {}
        for block in layout.blocks:
            name, old = block.name, records[block.name]
            # The one selection of these arrays: a failure and a gradient that is not finite
            # together. Of a stack that a placement has joined, every slice fails for itself.
            if block.is_joined:
                good_slices = finite_slices(fresh[name])
                is_good = jnp.all(good_slices)
                is_new = is_usable & good_slices
                block_state = select_slices(is_new, fresh[name], old.block_state)
            else:
                is_good = all_finite(fresh[name])
                block_state = keep_changed(is_usable & is_good, fresh[name], old.block_state)
            new_info = _info_of_block(block, spectra[name], old.info)
            info = keep_changed(is_usable & is_good, new_info, old.info)
            num_failures = old.num_failures + (is_usable & ~is_good)
            chosen[name] = _BlockRecord(block_state, info, num_failures)
        return chosen

    operands = is_usable, state.curvature, records, damping
    if is_due is None:
        latest = refresh(*operands)
    else:
        latest = refresh_if(is_due, refresh, _keep_records, *operands)

    block_state, blocks = dict(state.block_state), dict(state.info.blocks)
    num_failures = dict(state.info.num_failures)
    for name, record in latest.items():
        block_state[name], blocks[name] = record.block_state, record.info
        num_failures[name] = record.num_failures
    info = state.info._replace(blocks=blocks, num_failures=num_failures)
    return state._replace(block_state=method.place(block_state), info=info)


def _keep_records(
    is_usable: Array, factors: Factors, records: dict[str, _BlockRecord], damping: Scalar
) -> dict[str, _BlockRecord]:
    """Stand in for `refresh` where it is not due."""
    del is_usable, factors, damping
    return records


def _info_of_block(block: Block, spectrum: BlockSpectrum, old: BlockInfo) -> BlockInfo:
    """Return the diagnostics of a fresh block over all slices, in the dtypes of the old ones."""
    # Slices that a placement leaves empty have no eigenvalues, and what it pads has no trace.
    is_slice = block.fill > 0
    largest = jnp.max(spectrum.largest, where=is_slice, initial=0)
    smallest = jnp.min(spectrum.smallest, where=is_slice, initial=jnp.inf)
    # The damped block has no eigenvalue of zero, which its condition is divided by.
    fresh = BlockInfo(
        trace=jnp.sum(block.fill * spectrum.trace),
        largest=largest,
        smallest=smallest,
        condition=largest / smallest,
        age=jnp.zeros([], jnp.int32),
    )
    info: BlockInfo = jax.tree.map(lambda new, old: new.astype(old.dtype), fresh, old)
    return info


def _factors_are_finite(factors: Factors) -> Bool[Array, ""]:
    """Tell whether all factors are finite."""

    # A sum of `x x'` that is not finite shows it on its diagonal, and that is n entries, not n^2.
    def diagonal(x: Array) -> Array:
        return jnp.diagonal(x, axis1=1, axis2=2) if x.ndim == 3 else x

    return all_finite((jax.tree.map(diagonal, factors.blocks), factors.diagonal))


def _matching(factors: Factors, averages: Factors) -> Factors:
    """Select the factors of which the state has averages; a mask may have removed some."""
    # More factors than averages is a mask or a partition at work; fewer can only be a mistake.
    missing = averages.blocks.keys() - factors.blocks.keys()
    missing |= averages.diagonal.keys() - factors.diagonal.keys()
    if missing:
        raise ValueError(
            "curvature is of another layout: it has no factors of "
            f"{', '.join(sorted(missing))}. Pass the layout of this rule to the estimator."
        )
    blocks = {name: factors.blocks[name] for name in averages.blocks}
    diagonal = {path: factors.diagonal[path] for path in averages.diagonal}
    selected = Factors(blocks, diagonal)
    if jax.tree.map(jnp.shape, selected) != jax.tree.map(jnp.shape, averages):
        raise ValueError(
            "curvature is of another layout: shapes of its factors differ from those of the state. "
            "Pass the layout of this rule to the estimator."
        )
    return selected
