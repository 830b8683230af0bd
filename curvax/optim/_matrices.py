"""The one builder of rules that precondition the gradient of every matrix of a model.

With V `[i, o]` the gradient of a matrix, the rules of this family have a common form:

  L <- b L + (1 - b) V X V',   R <- b R + (1 - b) V' Y V       statistics; X = Y = I, or whitened
  M <- b1 M + (1 - b1) V                                       momentum
  U  = L^-p M R^-p,   or   P ((P' M Q) / D) Q',   or   polar(M)  step; P, Q: eigenvectors of L, R
  u  = s U                                                     s: a scale for each matrix

They differ in these choices, which a `MatrixMethod` states, each for one stack of matrices:

| method       | statistics      | step                 | momentum   | scale        | now |
|--------------|-----------------|----------------------|------------|--------------|-----|
| `shampoo`    | X = I           | p = 1/4              | of V       | Adam's norm  | yes |
| `asgo`       | X = I, one side | p = 1/2              | of V       | RMS 0.2      | yes |
| `soap`       | X = I           | eigenbasis, Adam's D | of P' V Q  | 1            | no  |
| `kl_shampoo` | X = R^-1        | eigenbasis, p = 1/2  | of V       | RMS <= 1.1   | no  |
| `kl_soap`    | X = R^-1        | eigenbasis, Adam's D | of P' V Q  | 1            | no  |
| `muon`       | none            | polar                | of V       | by shape     | yes |
| `newton_muon`| L = A of inputs | polar of L^-1 V      | of L^-1 V  | by shape     | yes |
| `fismo`      | X = R^-1        | polar, whitened      | whitened   | 1            | yes |
| `mkor`       | rank one        | inverse              | afterwards | V's norm     | yes |
| `psgd`       | fitted          | fitted               | of V       | RMS <= 1.1   | yes |

(now: whether the gradient of a step has a part in its own preconditioner.)

Entries in no matrix, vectors for instance, follow an ordinary optax rule, the fallback.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._checks import is_masked
from curvax._trees import all_finite
from curvax._types import Count, Params, tree_at_least_float32
from curvax.kron import Layout, block_matrices, with_block_matrices
from curvax.kron._gradient_layout import gradient_layout
from curvax.kron._layout import Block, check_layout, named_leaves, present
from curvax.kron._match import path_keys
from curvax.kron._matrix_layout import layout_of_shapes
from curvax.optim._refresh import Interval, check_interval, refresh_if
from curvax.optim._rule import (
    StepContext,
    StepResult,
    curvature_rule,
    keep_changed,
    placed_by_compiler,
    resolve_schedule,
    zero_count,
)

Matrices: TypeAlias = Float[Array, "s i o"]
"""A stack of matrices of the gradient, or of anything like it."""

PerMatrix: TypeAlias = Float[Array, "s 1 1"]
"""A number for each matrix of a stack, which multiplies it."""

ByBlock: TypeAlias = dict[str, Any]
"""Something for each block, by the block's name."""


class MatrixBlock(NamedTuple):
    """What a method holds for one block; each field is any pytree of arrays, None for nothing.

    Attributes:
      statistics: averages that a refresh reads, L and R.
      preconditioner: what a refresh computes from them: roots, an eigenbasis and all that has to
        follow it into the next one.
      memory: what a refresh neither reads nor changes: momentum, the state of a scale.
    """

    statistics: Any = None
    preconditioner: Any = None
    memory: Any = None


class MatrixMethod(NamedTuple):
    """What a method does with the gradient V of one stack of matrices.

    Attributes:
      init: `(block, V) -> MatrixBlock`, from the static block and zeros like V.
      average: `(block, state, V, count) -> MatrixBlock`, in every step: statistics take in the
        gradient; `count` is the number of steps before this one.
      step: `(state, V, count) -> (U, MatrixBlock)`, the step, and the state after it.
      refresh: `(layout, statistics, preconditioners) -> preconditioners`, the costly part, at
        intervals, of all blocks together, by name: those of equal size can then share a program.
        None: there is none.
      has_current_gradient: whether V is averaged and refreshed before the step, so that it is in
        its own preconditioner; False does both after the step.
      take_in: `(state, measured) -> MatrixBlock`, for a method that needs more than gradients: what
        an estimator measured of the block, at intervals, before V is averaged. None: gradients are
        all that it needs.
    """

    init: Callable[[Block, Matrices], MatrixBlock]
    average: Callable[[Block, MatrixBlock, Matrices, Count], MatrixBlock]
    step: Callable[[MatrixBlock, Matrices, Count], tuple[Matrices, MatrixBlock]]
    refresh: Callable[[Layout, ByBlock, ByBlock], ByBlock] | None = None
    has_current_gradient: bool = True
    take_in: Callable[[MatrixBlock, Any], MatrixBlock] | None = None


class MatrixInfo(NamedTuple):
    """Diagnostics of a rule on matrices.

    Attributes:
      num_nonfinite: how many gradients were not finite, so far.
      num_failures: for each block, how often its refresh failed; each time it went on with the
        last good one.
    """

    num_nonfinite: Int[Array, ""]
    num_failures: dict[str, Int[Array, ""]]


class ScaleByMatricesState(NamedTuple):
    """State of the rules on matrices.

    Attributes:
      count: steps taken.
      num_refreshes: curvatures taken in, by a method that needs more than gradients.
      blocks: for each block what its method holds, in at least float32.
      fallback_state: state of the rule for entries in no block.
      info: `MatrixInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    blocks: dict[str, MatrixBlock]
    fallback_state: Any
    info: MatrixInfo


def scale_by_matrices(
    layout: Layout | None,
    method: MatrixMethod,
    refresh_every: Interval = 1,
    fallback: optax.GradientTransformation | None = None,
    edit_layout: Callable[[Layout], Layout] = lambda layout: layout,
) -> optax.GradientTransformationExtraArgs:
    """Build a rule from a `MatrixMethod`.

    Args:
      layout: which entries of params are matrices: a `curvax.matrix_layout(params)`, or the layout
        of a model, `curvax.kron_layout(objective, params, batch)`, whose biases are then taken out
        of the blocks. None reads the matrices from the shapes of params, as `matrix_layout` does.
      method: what is done with each.
      refresh_every: number of steps between refreshes, or a schedule of it; step 0 refreshes.
      fallback: the rule for entries in no block; None leaves their gradient as it is.
      edit_layout: what the method changes in a layout: a structure, blocks that it leaves out.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `ScaleByMatricesState`. A gradient
      whose squares overflow gives a zero step, leaves the state as it is and counts as not finite;
      a step that overflows is zero and counts too.
    """
    check_interval(refresh_every=refresh_every)
    layout_of = layout_reader(layout, edit_layout)
    rule_outside = optax.with_extra_args_support(fallback or optax.identity())

    def init(params: Params) -> ScaleByMatricesState:
        here = layout_of(params, "params")
        zeros = block_matrices(here, jax.tree.map(jnp.zeros_like, params))
        blocks = {block.name: method.init(block, zeros[block.name]) for block in here.blocks}
        return ScaleByMatricesState(
            count=zero_count(),
            num_refreshes=zero_count(),
            blocks=blocks,
            fallback_state=rule_outside.init(outside(here, tree_at_least_float32(params))),
            info=MatrixInfo(zero_count(), {block.name: zero_count() for block in here.blocks}),
        )

    def step(
        state: ScaleByMatricesState, gradient: PyTree[Array], context: StepContext
    ) -> StepResult:
        here = layout_of(gradient, "updates")
        V = block_matrices(here, gradient)
        wide = tree_at_least_float32(gradient)
        of_fallback = outside(here, wide)
        # Statistics are sums of squares, and keep an overflow for ever.
        squared = [jnp.sum(x * x) for x in (*V.values(), *jax.tree.leaves(of_fallback))]
        squares_are_finite = all_finite(squared)
        is_finite = context.gradient_is_finite & squares_are_finite

        # 1. Entries in no block.
        params = None if context.params is None else tree_at_least_float32(context.params)
        of_outside = None if params is None else outside(here, params)
        updates, fallback_state = rule_outside.update(of_fallback, state.fallback_state, of_outside)
        fallback_state = keep_changed(is_finite, fallback_state, state.fallback_state)

        # 2. Blocks: statistics and refresh before the step, or after it.
        new = state._replace(fallback_state=fallback_state)
        steps: dict[str, Matrices] = {}
        if not method.has_current_gradient:
            steps, new = stepped(new, V, is_finite)
        new = averaged(here, new, V, is_finite)
        new = refreshed(here, new, is_finite)
        if method.has_current_gradient:
            steps, new = stepped(new, V, is_finite)

        # 3. Both into one tree.
        tree = with_outside(updates, wide)
        step_is_finite = squares_are_finite & all_finite(steps)
        return StepResult(
            updates=with_block_matrices(here, steps, tree),
            state=new,
            info={},
            is_finite=step_is_finite,
            is_accepted=step_is_finite | ~context.gradient_is_finite,
        )

    def averaged(
        here: Layout,
        state: ScaleByMatricesState,
        V: dict[str, Matrices],
        is_finite: Bool[Array, ""],
    ) -> ScaleByMatricesState:
        """Take the gradient into the statistics of every block."""
        blocks = {}
        for block in here.blocks:
            old = state.blocks[block.name]
            new = method.average(block, old, V[block.name], state.count)
            blocks[block.name] = keep_changed(is_finite, new, old)
        return state._replace(blocks=blocks)

    def stepped(
        state: ScaleByMatricesState, V: dict[str, Matrices], is_finite: Bool[Array, ""]
    ) -> tuple[dict[str, Matrices], ScaleByMatricesState]:
        """Return the step of every block, and what it leaves behind."""
        steps, blocks = {}, {}
        for name, matrices in V.items():
            old = state.blocks[name]
            steps[name], new = method.step(old, matrices, state.count)
            blocks[name] = keep_changed(is_finite, new, old)
        return steps, state._replace(blocks=blocks)

    def refreshed(
        here: Layout, state: ScaleByMatricesState, is_finite: Bool[Array, ""]
    ) -> ScaleByMatricesState:
        """Compute the preconditioners anew, where that is due."""
        if method.refresh is None:
            return state
        statistics = {name: block.statistics for name, block in state.blocks.items()}
        current = {name: block.preconditioner for name, block in state.blocks.items()}
        operands = is_finite, statistics, current, state.info.num_failures
        refresh = _last_good(partial(method.refresh, here))
        if isinstance(refresh_every, int) and refresh_every == 1:  # nothing is conditional
            latest, num_failures = refresh(*operands)
        else:
            interval = resolve_schedule(refresh_every, state.count)
            is_due = is_finite & (state.count % interval == 0)
            latest, num_failures = refresh_if(is_due, refresh, _keep, *operands)
        blocks = {}
        for name, block in state.blocks.items():
            blocks[name] = block._replace(preconditioner=latest[name])
        info = state.info._replace(num_failures=num_failures)
        return state._replace(blocks=blocks, info=info)

    def take_in(
        state: ScaleByMatricesState, curvature: Any, gradient: PyTree[Array]
    ) -> tuple[ScaleByMatricesState, Array]:
        """Take what was measured of every block into its state."""
        del gradient
        assert method.take_in is not None
        blocks, failures = {}, {}
        for name, block in state.blocks.items():
            fresh = method.take_in(block, _measured(curvature, name))
            # Finite measurements can overflow in what is computed from them.
            is_good = all_finite(fresh)
            blocks[name] = keep_changed(is_good, fresh, block)
            failures[name] = state.info.num_failures[name] + ~is_good
        info = state.info._replace(num_failures=failures)
        return state._replace(blocks=blocks, info=info), all_finite(curvature)

    rule = curvature_rule(init, step, take_in=take_in if method.take_in else None)
    return placed_by_compiler(rule)


def layout_reader(
    layout: Layout | None, edit_layout: Callable[[Layout], Layout]
) -> Callable[[Params, str], Layout]:
    """Return the function `(tree, name) -> Layout`: the matrices of a tree like params.

    Those that are masked out are missing. Without a layout they are read from shapes.
    """
    matrices = None if layout is None else edit_layout(gradient_layout(layout))

    def layout_of(tree: Params, name: str) -> Layout:
        if matrices is None:
            return _plainly_named(edit_layout(layout_of_shapes(tree)))
        check_layout(matrices, tree, name)
        return present(matrices, tree)

    return layout_of


def _plainly_named(layout: Layout) -> Layout:
    """Name blocks by the keys in their paths alone, as the state knows them.

    `nnx.Optimizer` has one container at `init` and another at `update`, which print other paths.
    """
    names = [".".join(path_keys(block.name)) for block in layout.blocks]
    # Keys with dots in them can make two names alike; then paths have to do.
    if len(set(names)) < len(names):
        return layout
    pairs = zip(layout.blocks, names, strict=True)
    blocks = [dataclasses.replace(block, name=name) for block, name in pairs]
    return dataclasses.replace(layout, blocks=tuple(blocks))


def _measured(curvature: Mapping[str, Any], name: str) -> Any:
    """Return what was measured of a block, or raise if it was not."""
    if name not in curvature:
        raise ValueError(
            f"curvature is of another layout: it has nothing for {name}. Pass the layout of this "
            "rule to the estimator."
        )
    return curvature[name]


def _last_good(refresh: Callable[[ByBlock, ByBlock], ByBlock]) -> Callable[..., Any]:
    """Return `refresh` with the old preconditioner where a new one is not finite, and a count."""

    def refreshed(
        is_usable: Bool[Array, ""], statistics: ByBlock, current: ByBlock, num_failures: ByBlock
    ) -> tuple[ByBlock, ByBlock]:
        fresh = refresh(statistics, current)
        chosen, failures = {}, {}
        for name, old in current.items():
            is_good = all_finite(fresh[name])
            # A bad gradient must leave the state as it was; a bad refresh is counted besides.
            chosen[name] = keep_changed(is_usable & is_good, fresh[name], old)
            failures[name] = num_failures[name] + (is_usable & ~is_good)
        return chosen, failures

    return refreshed


def _keep(
    is_usable: Array, statistics: ByBlock, current: ByBlock, num_failures: ByBlock
) -> tuple[ByBlock, ByBlock]:
    """Stand in for a refresh that is not due."""
    del is_usable, statistics
    return current, num_failures


def outside(layout: Layout, tree: Params) -> Params:
    """Mask out the leaves that lie wholly in blocks, and those whose gradient stays as it is."""
    kinds = {leaf.path: leaf.outside for leaf in layout.leaves}
    chosen = []
    for path, leaf in named_leaves(layout, tree).items():
        chosen.append(leaf if kinds[path] == "diagonal" else optax.MaskedNode())
    return jax.tree.unflatten(jax.tree.structure(tree), chosen)


def with_outside(updates: Params, tree: Params) -> Params:
    """Return `tree` with the leaves of `updates` that are not masked out."""

    def chosen(update: Any, leaf: Array) -> Array:
        return leaf if is_masked(update) else update

    return jax.tree.map(chosen, updates, tree, is_leaf=is_masked)
