"""One forward pass that records the inputs of all uses, and pulls cotangents of the outputs back to theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from curvax._batch import map_rows
from curvax._checks import describe
from curvax._jaxpr import trace_model
from curvax._shared import is_shared
from curvax._trees import by_path
from curvax._types import Outputs, Params
from curvax.capture import Use, mixing_operation, tapped, zero_perturbation
from curvax.capture._grouping import group_uses
from curvax.kron._layout import Block, Layout, leaf_shapes, trace_uses
from curvax.objective import Objective

PerUseArray = Shaped[Array, "examples stack positions size"]


class UseCotangents(NamedTuple):
    """A cotangent of the outputs, pulled back.

    Attributes:
      blocks: for each block its uses' cotangents, `[examples, stack, positions, out]`.
      outside: gradients `[examples, *leaf]` of the leaves with entries in no block, by path.
    """

    blocks: dict[str, list[PerUseArray]]
    outside: dict[str, Array]


class Capture(NamedTuple):
    """A model's outputs on a batch, and what its uses were given.

    Attributes:
      outputs: of the model, with the batch's leading axis.
      inputs: for each block what its uses were given, `[examples, stack, positions, in]` (of a lookup row numbers,
        `in` 1).
      pull: `cotangent of outputs -> Pulled`.
    """

    outputs: Outputs
    inputs: dict[str, list[PerUseArray]]
    pull: Callable[[Outputs], UseCotangents]


def record(
    objective: Objective, layout: Layout, params: Params, inputs: Any, by_example: bool
) -> Capture:
    """Run the model, recording all uses that the layout has in blocks.

    Args:
      objective: a `curvax.Objective`.
      layout: of this objective and params.
      params: pytree of float arrays.
      inputs: of the batch.
      by_example: run every row by itself, as a batch of one; else the batch is one "example" with all positions in it.

    Raises:
      ValueError: a layout of another model; by example, outputs that have no row for each example.

    Cost: a forward pass; each `pull`: a backward pass without the gradients of the blocks' kernels.
    """
    row = jax.eval_shape(lambda: map_rows(lambda x: x[:1], inputs)) if by_example else inputs
    closed, shapes, uses, reasons = trace_uses(objective, params, row)
    chosen = _match(layout, uses, reasons, params)
    numbers = [number for members in chosen.values() for number in members]
    run = tapped(closed, [uses[number] for number in numbers])
    outside = {path: x for path, x in by_path(params).items() if _is_outside(layout, path)}
    if by_example:
        _check_rows(shapes)
        _check_unmixed(objective, params, inputs)

    def forward(
        inputs: Any, perturbations: list[Array], added: dict[str, Array]
    ) -> tuple[Outputs, list[Array]]:
        leaves = {
            path: x + added[path] if path in added else x for path, x in by_path(params).items()
        }
        results, taken = run([*leaves.values(), *jax.tree.leaves(inputs)], perturbations)
        return jax.tree.unflatten(jax.tree.structure(shapes), results), taken

    zeros = [zero_perturbation(uses[number]) for number in numbers]
    nothing = {path: jnp.zeros_like(x) for path, x in outside.items()}
    if by_example:
        axes = jax.tree.map(lambda x: None if is_shared(x) else 0, inputs, is_leaf=is_shared)
        one_row = lambda row, *rest: forward(map_rows(lambda x: x[None], row), *rest)
        size = next(
            x.shape[0] for x in jax.tree.leaves(inputs, is_leaf=is_shared) if not is_shared(x)
        )
        zeros, nothing = jax.tree.map(
            lambda x: jnp.zeros((size, *x.shape), x.dtype), (zeros, nothing)
        )
        every_row = jax.vmap(one_row, in_axes=(axes, 0, 0))
        outputs, pull, taken = jax.vjp(
            lambda *zeros: every_row(inputs, *zeros), zeros, nothing, has_aux=True
        )
        outputs = jax.tree.map(lambda x: x[:, 0], outputs)
    else:
        outputs, pull, taken = jax.vjp(
            lambda *zeros: forward(inputs, *zeros), zeros, nothing, has_aux=True
        )

    each = (lambda fn: jax.vmap(fn)) if by_example else (lambda fn: lambda x: fn(x)[None])
    place = {number: i for i, number in enumerate(numbers)}

    def pull_back(cotangent: Outputs) -> UseCotangents:
        raw, leaves = pull(
            jax.tree.map(lambda x: x[:, None], cotangent) if by_example else cotangent
        )
        matrices = {
            name: [each(uses[number].outputs)(raw[place[number]]) for number in members]
            for name, members in chosen.items()
        }
        return UseCotangents(
            matrices, leaves if by_example else {path: x[None] for path, x in leaves.items()}
        )

    given = {
        name: [each(uses[number].inputs)(taken[place[number]]) for number in members]
        for name, members in chosen.items()
    }
    return Capture(outputs, given, pull_back)


def _match(
    layout: Layout, uses: list[Use], reasons: dict[str, str], params: Params
) -> dict[str, tuple[int, ...]]:
    """Find the uses of every block of the layout."""
    groups, _ = group_uses(uses, reasons, leaf_shapes(params))
    found = {(group.kernel, group.bias, group.members): group.numbers for group in groups}
    matched = {}
    for block in layout.blocks:
        key = (block.kernel, block.bias, block.uses)
        if key not in found:
            raise ValueError(
                f"the layout is of another model: there, {_describe(block)} is used by "
                f"{len(block.uses)} linear map(s) as a block of its own, here it is not. Make it again for this batch: "
                "curvax.kron_layout(objective, params, batch); if it is of this one, the model takes another path for a "
                "single row, and cannot be worked through by example."
            )
        matched[block.name] = found[key]
    return matched


def _describe(block: Block) -> str:
    return f"{block.name} with bias {block.bias}" if block.bias else block.name


def _is_outside(layout: Layout, path: str) -> bool:
    return next(leaf for leaf in layout.leaves if leaf.path == path).outside == "diagonal"


def _check_unmixed(objective: Objective, params: Params, inputs: Any) -> None:
    closed, _ = trace_model(
        lambda params, inputs: objective.outputs(params, inputs), params, inputs
    )
    rows = [
        not is_shared(x)
        for x in jax.tree.leaves(inputs, is_leaf=is_shared)
        for _ in jax.tree.leaves(x)
    ]
    mixing = mixing_operation(closed, [False] * len(jax.tree.leaves(params)) + rows)
    if mixing is not None:
        raise ValueError(
            f"the model mixes examples: its `{mixing}` runs over the batch axis (as BatchNorm in training does): no "
            'example has a gradient of its own. Work by example (sharing="reduce", EK-FAC, fisher "exact" and '
            '"empirical") is not defined for it; K-FAC with sharing="expand" and fisher="mc" is.'
        )


def _check_rows(shapes: PyTree) -> None:
    for path, x in jax.tree.leaves_with_path(shapes):
        if x.shape[:1] != (1,):
            raise ValueError(
                f"for one row of inputs, outputs{jax.tree_util.keystr(path)} is {describe(x)}; work by example "
                '(sharing="reduce", EK-FAC, fisher "exact", "empirical") needs a row of outputs for each row of inputs.'
            )
