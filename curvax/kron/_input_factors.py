"""Second moments of the inputs of layers alone, from a forward pass."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from curvax._batch import check_batch, sum_over_chunks
from curvax._checks import check_count, check_params
from curvax._types import Batch, Params, PRNGKey, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.capture import Capture, record
from curvax.kron._factors import WeightedMean
from curvax.kron._layout import Block, Layout, check_layout
from curvax.kron._parts import by_part
from curvax.kron._plan import layout_plan
from curvax.kron._statistics import input_moments
from curvax.objective import Objective, for_auto_sharding


def input_factors(
    objective: Objective,
    layout: Layout,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    *,
    microbatch: int | None = None,
) -> dict[str, WeightedMean]:
    """Compute `A = mean a a'` over the inputs a of every kernel, at all positions.

    It is the Kronecker factor A of `curvax.kron_factors` without what needs a backward pass:
    cotangents, and with them the choice of positions that have any. Inputs have no 1 for a bias.

    Args:
      objective: the `curvax.Objective`.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      key: not used, since nothing is drawn; every estimator has one.
      microbatch: rows worked on at a time; the result is the same.

    Returns:
      For each block, by name, the mean in the form of its `a_structure`, in at least float32, with
      the number of positions as weight. Tables that are only looked up have none. Kernels that are
      used transposed too, as tied tables are, have inputs on both sides: their weight is 0.

    Raises:
      ValueError: the layout belongs to other params or to another model, or is from shapes alone.
      TypeError: params are not float.

    Cost: a forward pass, and `n in^2 / 2` multiplications for n positions.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params = jnp.zeros((2, 3))
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 3))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> factors = curvax.kron.input_factors(objective, layout, params, batch, jax.random.key(0))
      >>> factors[""].mean[0].tolist()
      [[0.5, 0.0], [0.0, 4.5]]
    """
    check_params(params)
    check_layout(layout, params)
    if objective.parts:
        estimate = partial(input_factors, microbatch=microbatch)
        parts = by_part(estimate, objective, layout, params, batch, key)
        return _merged([factors for _, factors in parts])
    check_batch(batch)
    if microbatch is not None:
        check_count(1, microbatch=microbatch)
    placed = for_auto_sharding(objective, params, batch)
    run = partial(_over_chunks, placed, layout, microbatch)
    factors: dict[str, WeightedMean] = with_auto_sharding(run, params, batch[0])
    return factors


def _over_chunks(
    objective: Objective, layout: Layout, microbatch: int | None, params: Params, inputs: Any
) -> dict[str, WeightedMean]:
    """Sum over the chunks of a batch; sums and weights add up."""
    blocks = tuple(block for block in layout.blocks if not block.is_lookup)
    measured = Layout(blocks, layout.leaves)

    def of_chunk(rows: Any) -> dict[str, WeightedMean]:
        # The batch is one example with all positions, since no mean is over one example alone.
        plan = layout_plan(objective, measured, params, rows, per_example=False)
        capture = record(plan, params, rows)
        return {block.name: _moment(block, capture) for block in blocks}

    if microbatch is None:
        return of_chunk(inputs)
    total: dict[str, WeightedMean] = sum_over_chunks(of_chunk, inputs, microbatch)
    return total


def _moment(block: Block, capture: Capture) -> WeightedMean:
    """Sum `a a'` over all positions of a block's uses."""
    inputs = capture.inputs[block.name]
    # Gradients of kernels have no row for a bias, and A goes with them.
    kernel_alone = dataclasses.replace(block, bias=None, sharing="expand")
    dtype = at_least_float32(inputs[0]).dtype
    if block.has_transposed_uses:
        shape = kernel_alone.factor_shapes[0]
        return WeightedMean(jnp.zeros(shape, dtype), jnp.zeros(block.shape[0], dtype))
    counted = [jnp.ones(a.shape[:-1], dtype) for a in inputs]
    moment, _ = input_moments(kernel_alone, inputs, capture.chunks[block.name], counted)
    return moment


def _merged(parts: list[dict[str, WeightedMean]]) -> dict[str, WeightedMean]:
    """Take the positions of all parts of an objective together; a part may not use a kernel."""
    merged: dict[str, WeightedMean] = {}
    for factors in parts:
        for name, factor in factors.items():
            if name in merged:
                factor = jax.tree.map(jnp.add, merged[name], factor)
            merged[name] = factor
    return merged
