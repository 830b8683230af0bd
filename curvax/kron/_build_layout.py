"""Build a layout: trace a model, find the uses of its params, and make them blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from curvax._checks import check_choice, check_params
from curvax._types import Batch, Params
from curvax._xla import with_auto_sharding
from curvax.capture import Kernel, View, entry_numbers, find_kernels, uses_in_part
from curvax.kron._choices import ByPath, Choice, Shapes, by_key, by_path, check_positive
from curvax.kron._layout import (
    POSITIONS,
    SHARING,
    UNMATCHED,
    Block,
    Layout,
    Leaf,
    are_lookups,
    check_over_time,
    leaf_shapes,
)
from curvax.kron._plan import layout_plan
from curvax.objective import Objective, checked_inputs, for_auto_sharding


class Choices(NamedTuple):
    """The choices for all leaves, by path.

    Attributes:
      unmatched: "error", "diagonal" or "identity".
      sharing: "expand", "reduce", "time_symmetric" or "time_infinite".
      max_dim: longest side with a full factor.
      positions: "active" or "all".
    """

    unmatched: Mapping[str, Choice]
    sharing: Mapping[str, Choice]
    max_dim: Mapping[str, Choice]
    positions: Mapping[str, Choice]


DEFAULTS: Mapping[str, Any] = {
    "unmatched": "diagonal",
    "sharing": "expand",
    "max_dim": 8192,
    "positions": "active",
}
"""What counts for all leaves, or for those that no key of a dict matches."""


def kron_layout(
    objective: Objective,
    params: Params,
    batch: Batch,
    unmatched: ByPath[str] = "diagonal",
    sharing: ByPath[str] = "expand",
    max_dim: ByPath[int] = 8192,
    positions: ByPath[str] = "active",
) -> Layout:
    """Find the Kronecker blocks of a model by following every leaf to the linear maps it enters.

    A leaf (or a slice, a permutation, a concatenation of leaves) that is contracted with an input
    by a matrix product, a convolution or a lookup is the kernel of a block; what is added straight
    to the result is its bias. It does not matter which library made the model; `jit`, remat,
    `scan`, `cond` and `vmap` are looked into.

    What constants of the model do to a kernel is followed too: indices (an order is undone; entries
    that are tied as a convolution over a group ties them share positions), numbers that multiply
    it, masks, and what is added without a derivative of its own (straight-through estimators). Rows
    of a table that are added, such as those of positions, are a lookup. A block behind a mask is
    that of the kernel without it, `V -> mask * A (mask * V) G`, and so is its inverse: entries that
    are not there get zero.

    Args:
      objective: the `curvax.Objective` whose curvature the layout is for.
      params: pytree of float arrays (or of `jax.ShapeDtypeStruct`).
      batch: `(inputs, targets)`, arrays or shapes; the layout serves any batch size.
      unmatched: for leaves in no block: "diagonal", a diagonal Fisher; "identity", their gradient
        is left as it is; "error", raise and list them.
      sharing: for positions of one example (time, space): "expand", taken as independent, exact
        where every position has its own loss; "reduce", summed over first, exact where they are
        pooled before the loss. For kernels of recurrent networks "time_symmetric" or
        "time_infinite": the positions are times, dependent as in a chain, see
        `curvax.kron_inverse`. Times are the positions of one example in their order: of a `scan`,
        of the axis of a sequence (one axis only), or the uses of an unrolled loop.
      max_dim: factors with more rows than this are diagonal.
      positions: which positions A is a mean over: "active", those whose output has a cotangent;
        "all", those without one too (padding, masked terms, dead or unpooled units), see
        `curvax.kron_factors`.

      Each of the four may be a dict by path: the longest key with which a leaf's path begins
      counts, "" begins them all. For a block that is the longest among all its leaves.

    Returns:
      A `Layout`; print it. It can be changed with `layout.edit(path, ...)`. For a `curvax.total`
      the uses of a kernel in all parts are one block; a leaf that can be in no block in one of the
      parts is in none, and the table says in which part it is not.

    Raises:
      ValueError: there are leaves in no block, with `unmatched="error"`, listed with the reasons; a
        choice or a path is unknown; a block that is to be over time is not used at times, or has
        no full factors, or a second product.
      TypeError: params are not float.

    Cost: one trace of the model; no data is read and nothing is computed on a device.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) * p["scale"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3), "scale": jnp.ones(3)}
      >>> batch = jnp.ones((8, 4)), jnp.ones((8, 3))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> [(leaf.path, leaf.kind) for leaf in layout.leaves]
      [("['b']", 'kron'), ("['scale']", 'diagonal'), ("['w']", 'kron')]
      >>> layout.leaves[1].reason
      'enters `mul`'

    References: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored
      approximate curvature, https://arxiv.org/abs/1503.05671; Eschenhagen et al. (2023),
      Kronecker-factored approximate curvature for modern neural network architectures,
      https://arxiv.org/abs/2311.00636; Martens, Ba and Johnson (2018), Kronecker-factored curvature
      approximations for recurrent neural networks, https://openreview.net/forum?id=HyMTkQZAb.
    """
    check_params(params)
    inputs = checked_inputs(objective, batch)
    shapes = leaf_shapes(params)
    choices = Choices(
        unmatched=_choices("unmatched", unmatched, shapes, UNMATCHED),
        sharing=_choices("sharing", sharing, shapes, SHARING),
        max_dim=_choices("max_dim", max_dim, shapes, None),
        positions=_choices("positions", positions, shapes, POSITIONS),
    )
    # A use is where a leaf enters a linear map; those of one kernel make a block.
    kernels, reasons = find_kernels(objective, params, inputs)
    names = unique_names(list(kernels))
    blocks = [_block(name, kernel, choices) for name, kernel in zip(names, kernels, strict=True)]
    if objective.parts:
        blocks = _with_parts(blocks, list(kernels), objective, params, inputs)
        reasons = _reasons_by_part(reasons, objective, params, inputs)
    # A leaf may lie in blocks wholly, in part, or not at all.
    covered = covered_entries(blocks, shapes)
    leaves = []
    for path, shape in shapes.items():
        # A leaf that the trace never meets has no reason of its own.
        reason = reasons.get(path, "does not influence the outputs")
        leaves.append(_leaf(path, shape, covered[path], reason, choices.unmatched[path].value))
    _refuse_errors(leaves)
    layout = Layout(tuple(blocks), tuple(leaves))
    for block in blocks:
        check_over_time(block)
    # Which positions are times shows in the program of one example, which the plan looks at.
    if any(block.is_over_time for block in blocks):
        placed = for_auto_sharding(objective, params, batch)

        def check(params: Params, inputs: Any) -> tuple[()]:
            layout_plan(placed, layout, params, inputs, per_example=True)
            return ()

        # One row of a batch cannot be sharded as the model says that all are.
        jax.eval_shape(partial(with_auto_sharding, check), params, inputs)
    return layout


def _refuse_errors(leaves: Sequence[Leaf]) -> None:
    """Raise if there are leaves in no block for which the choice is "error"."""
    lines = []
    for leaf in leaves:
        if leaf.outside == "error":
            lines.append(f"  {leaf.path} {list(leaf.shape)}: {leaf.reason}")
    if lines:
        listed = "\n".join(lines)
        raise ValueError(
            f'leaves in no Kronecker block, with unmatched="error":\n{listed}\n'
            'Choose for them: unmatched="diagonal" or "identity", for all or in a dict by path.'
        )


def _choices(
    name: str, choice: Any, shapes: Shapes, allowed: Sequence[str] | None
) -> Mapping[str, Choice]:
    """Resolve a choice for every path; `allowed` is None for a positive integer."""
    choices = by_key(name, choice, shapes)
    if allowed is None:
        check_positive(name, choices)
    else:
        for value in choices.values():
            check_choice(name, value, dict.fromkeys(allowed))
    return by_path(choices, shapes, DEFAULTS[name])


def unique_names(kernels: Sequence[Kernel]) -> list[str]:
    """Name kernels by their views, with a number where two have the same text."""
    names: list[str] = []
    texts: list[str] = []
    for kernel in kernels:
        text = str(kernel.view)
        texts.append(text)
        count = texts.count(text)
        names.append(text if count == 1 else f"{text} #{count}")
    return names


def _block(name: str, kernel: Kernel, choices: Choices) -> Block:
    """Make a block of the uses of one kernel."""
    leaves = (*kernel.view.leaves, *(kernel.bias.leaves if kernel.bias else ()))

    # Among the leaves of the block, the choice by the longest key counts.
    def chosen(by_path: Mapping[str, Choice]) -> Any:
        return max((by_path[path] for path in leaves), key=lambda choice: len(choice.key)).value

    max_dim = chosen(choices.max_dim)

    _, rows, columns = kernel.view.shape
    # Inputs of lookups are one-hot: A is diagonal, exactly.
    is_lookup = are_lookups(kernel.uses)
    a_structure = structure_of(rows + (kernel.bias is not None), max_dim)
    return Block(
        name=name,
        kernel=kernel.view,
        bias=kernel.bias,
        uses=kernel.uses,
        a_structure="diagonal" if is_lookup else a_structure,
        g_structure=structure_of(columns, max_dim),
        sharing=chosen(choices.sharing),
        positions=chosen(choices.positions),
        is_lookup=is_lookup,
    )


def structure_of(size: int, max_dim: int) -> str:
    """Return the structure of a factor with so many rows, of which `max_dim` may be full."""
    # A full factor of n rows takes n^2 memory and about n^3 time: too much beyond max_dim.
    return "full" if size <= max_dim else "diagonal"


def _with_parts(
    blocks: Sequence[Block],
    kernels: Sequence[Kernel],
    objective: Objective,
    params: Params,
    inputs: Mapping[str, Any],
) -> list[Block]:
    """Note in which parts of an objective every block is used, and how."""
    uses: list[list[tuple[str, Any]]] = [[] for _ in blocks]
    is_penalized = any(part.objective.is_penalty for part in objective.parts)
    for name, _, part in objective.parts:
        if part.is_penalty:
            continue
        # The kernels are those of all parts together: one may have its bias in another part only.
        for of_block, kinds in zip(
            uses, uses_in_part(part, params, inputs[name], kernels), strict=True
        ):
            if kinds:
                of_block.append((name, kinds))
    return [
        dataclasses.replace(block, parts=tuple(of_block), is_penalized=is_penalized)
        for block, of_block in zip(blocks, uses, strict=True)
    ]


def _reasons_by_part(
    reasons: Mapping[str, str], objective: Objective, params: Params, inputs: Mapping[str, Any]
) -> dict[str, str]:
    """Say for every leaf in no block in which part of an objective the reason is."""
    named = dict(reasons)
    for name, _, part in objective.parts:
        if part.is_penalty:
            continue
        _, of_part = find_kernels(part, params, inputs[name])
        for path, reason in of_part.items():
            # The first part that has one: what is a kernel elsewhere does not help.
            if path in named and named[path] == reasons[path]:
                named[path] = f"{reason}, in part {name}"
    return named


def covered_entries(blocks: Sequence[Block], shapes: Shapes) -> dict[str, int]:
    """Count the entries of every leaf that are in blocks."""
    covered = dict.fromkeys(shapes, 0)
    for block in blocks:
        for view in filter(None, (block.kernel, block.bias)):
            for path, count in _entries_by_leaf(view, shapes).items():
                covered[path] += count
    return covered


def _entries_by_leaf(view: View, shapes: Shapes) -> dict[str, int]:
    """Count how many entries a view has of each of its leaves."""
    sizes = {path: math.prod(shapes[path]) for path in view.leaves}
    if math.prod(view.shape) == sum(sizes.values()):
        return sizes  # all entries, without numbering them
    numbers = entry_numbers(view, {path: shapes[path] for path in sizes}).ravel()
    ends = np.cumsum(list(sizes.values()))
    # Entry number k is of the first leaf that ends beyond k.
    which = np.searchsorted(ends, numbers, side="right")
    counts = np.bincount(which, minlength=len(ends)).tolist()
    return dict(zip(sizes, counts, strict=True))


def _leaf(path: str, shape: tuple[int, ...], covered: int, reason: str, choice: str) -> Leaf:
    """Say what becomes of a leaf of which so many entries are in blocks."""
    size = math.prod(shape)
    if covered == 0:
        return Leaf(path=path, shape=shape, kind=choice, reason=reason)
    if covered == size:
        return Leaf(path=path, shape=shape, kind="kron")
    # Slices that enter no linear map are treated as a leaf in no block would be.
    partial = f"{size - covered} of {size} entries are in no linear map"
    return Leaf(path=path, shape=shape, kind="kron", unmatched=choice, reason=partial)
