"""What K-FAC and EK-FAC share: running averages of factors, a refresh of what is costly, guards, diagnostics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_damping, check_decay, check_integer, check_precision
from curvax._trees import all_finite, keep_unless
from curvax._types import Count, Params, Scalar
from curvax.kron._factors import Factors, init_factors, moving_average
from curvax.kron._layout import Layout, check_layout, present
from curvax.kron._operator import BlockSpectrum, KronOperator, apply
from curvax.optim._refresh import refresh_if

BlockStates: TypeAlias = dict[str, Any]
"""For each block, by name, what a method holds besides the factors: an inverse, an eigenbasis."""


class KronRule(NamedTuple):
    """How a Kronecker method gets from averaged factors to its step.

    Attributes:
      factors: `curvature -> Factors`, what of the given curvature is averaged.
      start: `(layout, params) -> block_state`, before the first curvature.
      refresh: `(layout, factors, block_state, damping) -> (block_state, spectra)`, the costly part, for the blocks of `layout`.
      finish: `(layout, block_state, curvature) -> block_state`, with every curvature, after the refresh; or None.
      power: `(layout, factors, block_state, damping) -> KronOperator`, the inverse to apply.
    """

    factors: Callable[[Any], Factors]
    start: Callable[[Layout, Params], BlockStates]
    refresh: Callable[
        [Layout, Factors, BlockStates, Scalar], tuple[BlockStates, dict[str, BlockSpectrum]]
    ]
    finish: Callable[[Layout, BlockStates, Any], BlockStates] | None
    power: Callable[[Layout, Factors, BlockStates, Scalar], KronOperator]


class BlockInfo(NamedTuple):
    """Diagnostics of one block.

    Attributes:
      trace: of its curvature, undamped.
      largest: eigenvalue of the damped block.
      smallest: eigenvalue of the damped block.
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
      damping: of the latest step.
      num_nonfinite: gradients or curvatures that were not finite, so far.
      num_failures: for each block, how often its factorization failed; each time it went on with the last good one.
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
      block_state: for each block its inverse (K-FAC), or its eigenbasis and second moments there (EK-FAC).
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
    damping: optax.ScalarOrSchedule,
    inverse_every: int | Int[Array, ""],
    decay: float | Array,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Build a transformation from a `Method`; arguments as in `scale_by_kfac`.

    A gradient that is not finite gives an update of NaN (seen by `optax.apply_if_finite`) and leaves the state as it was;
    a curvature that is not finite is not taken in.
    """
    check_damping(damping)
    check_precision(damping=damping, decay=decay)
    check_decay(decay=decay)
    check_integer(1, 2**31 - 1, inverse_every=inverse_every)
    if stagger:
        check_count(1, inverse_every=inverse_every)

    def init(params: Params) -> ScaleByKronState:
        check_layout(layout, params)
        own = present(layout, params)
        count, number = lambda: jnp.zeros([], jnp.int32), lambda: jnp.zeros([], jnp.float32)
        blocks = {
            block.name: BlockInfo(number(), number(), number(), number(), count())
            for block in own.blocks
        }
        info = KronInfo(
            blocks,
            jnp.zeros([], jnp.result_type(float)),
            count(),
            {block.name: count() for block in own.blocks},
        )
        return ScaleByKronState(
            count(), count(), count(), init_factors(own, params), method.start(own, params), info
        )

    def update(
        updates: PyTree,
        state: ScaleByKronState,
        params: Params | None = None,
        *,
        curvature: Any = None,
        damping: Any = damping,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByKronState]:
        del params, extra
        check_layout(layout, updates, "updates")
        own = present(layout, updates)
        strength = jnp.asarray(
            damping(state.count) if callable(damping) else damping, jnp.result_type(float)
        )
        good = finite = all_finite(updates)
        factors, block_state, info = (
            state.curvature,
            state.block_state,
            state.info,
        )  # each changes only where `good` holds
        if curvature is not None:
            new = _own_factors(method.factors(curvature), factors)
            finite = good & _finite(new)
            factors = keep_unless(finite, moving_average(factors, new, decay), factors)
        num_refreshes = state.num_refreshes + (finite if curvature is not None else 0)
        known = num_refreshes > 0

        info = info._replace(
            blocks={
                name: block._replace(age=block.age + good) for name, block in info.blocks.items()
            }
        )
        age = state.inverse_age + good
        first = (state.num_refreshes == 0) & known
        if stagger:
            for share, some in enumerate(_shares(own, cast(int, inverse_every))):
                due = good & known & (first | (state.count % inverse_every == share))
                block_state, info = _refresh(
                    method, some, due, good, factors, block_state, info, strength
                )
        elif curvature is not None:  # without a new one an inversion would repeat the last
            always = isinstance(inverse_every, int) and inverse_every == 1
            due = None if always else good & known & (first | (age >= inverse_every))
            block_state, info = _refresh(
                method, own, due, good, factors, block_state, info, strength
            )
            age = jnp.where(good if due is None else due, 0, age)
        if curvature is not None and method.finish is not None:
            finished = method.finish(own, block_state, curvature)
            finite &= all_finite(finished)
            block_state = keep_unless(finite, finished, block_state)

        steps = apply(own, method.power(own, factors, block_state, strength), updates)
        amplitude = jnp.where(good, jnp.where(known, 1, 0), jnp.nan)
        steps = jax.tree.map(
            lambda s: jnp.where(amplitude == 0, 0, amplitude.astype(s.dtype) * s), steps
        )
        info = info._replace(
            damping=jnp.where(good, strength, info.damping),
            num_nonfinite=state.info.num_nonfinite + ~finite,
        )
        count = jnp.where(good, optax.safe_increment(state.count), state.count)
        return steps, ScaleByKronState(count, num_refreshes, age, factors, block_state, info)

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def _refresh(
    method: KronRule,
    some: Layout,
    due: Array | None,
    usable: Array,
    factors: Factors,
    block_state: BlockStates,
    info: KronInfo,
    strength: Scalar,
) -> tuple[BlockStates, KronInfo]:
    """Refresh some blocks' block_state if it is due (None: always) and usable; where that fails, the last good piece stays."""
    names = [block.name for block in some.blocks]
    held = {name: block_state[name] for name in names}, {name: info.blocks[name] for name in names}
    failures = {name: info.num_failures[name] for name in names}

    def fresh(usable: Array, factors: Factors, held: Any, failures: Any, strength: Scalar) -> Any:
        made, spectra = method.refresh(some, factors, held[0], strength)
        good = {name: all_finite(made[name]) for name in names}
        age = jnp.zeros([], jnp.int32)
        infos = {name: BlockInfo(*s, s.largest / s.smallest, age) for name, s in spectra.items()}
        infos = jax.tree.map(lambda new, old: new.astype(old.dtype), infos, held[1])
        kept = tuple(
            {n: keep_unless(usable & good[n], new[n], old[n]) for n in names}
            for new, old in zip((made, infos), held, strict=True)
        )
        return kept, {name: failures[name] + (usable & ~good[name]) for name in names}

    keep = lambda usable, factors, held, failures, strength: (held, failures)
    operands = (usable, factors, held, failures, strength)
    (made, infos), failures = (
        fresh(*operands) if due is None else refresh_if(due, fresh, keep, *operands)
    )
    blocks, num_failures = info.blocks | infos, info.num_failures | failures
    return block_state | made, info._replace(blocks=blocks, num_failures=num_failures)


def _shares(layout: Layout, number: int) -> list[Layout]:
    """Divide the blocks into shares of about equal work."""
    work = lambda block: block.shape[0] * (block.shape[1] ** 3 + block.shape[2] ** 3)
    shares: list[list[Any]] = [[] for _ in range(number)]
    for block in sorted(layout.blocks, key=work, reverse=True):
        min(shares, key=lambda share: sum(map(work, share))).append(block)
    return [Layout(tuple(share), layout.leaves) for share in shares if share]


def _finite(factors: Factors) -> Bool[Array, ""]:
    """Whether all is finite. A sum of `x x'` shows on its diagonal what is not, and that is n entries, not n^2."""
    of_full = lambda x: jnp.diagonal(x, axis1=1, axis2=2) if x.ndim == 3 else x
    blocks = jax.tree.map(of_full, factors.blocks)
    return all_finite((blocks, factors.diagonal))


def _own_factors(new: Factors, held: Factors) -> Factors:
    """Keep what the state holds (a mask or partition may have taken some out)."""
    missing = [
        *(held.blocks.keys() - new.blocks.keys()),
        *(held.diagonal.keys() - new.diagonal.keys()),
    ]
    if missing:
        raise ValueError(
            f"curvature is of another layout: it has no factors of {', '.join(sorted(missing))}."
        )
    blocks = {name: new.blocks[name] for name in held.blocks}
    own = Factors(blocks, {path: new.diagonal[path] for path in held.diagonal})
    if jax.tree.map(jnp.shape, own) != jax.tree.map(jnp.shape, held):
        raise ValueError(
            "curvature is of another layout: shapes of its factors differ from those of the state."
        )
    return own
