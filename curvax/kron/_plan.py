"""The plan of what Kronecker factors record of a model."""

from __future__ import annotations

from typing import Any

from curvax._types import Params
from curvax.capture import Kernel, Plan, plan
from curvax.kron._lags import check_times
from curvax.kron._layout import Block, Layout, named_leaves
from curvax.objective import Objective


def layout_plan(
    objective: Objective,
    layout: Layout,
    params: Params,
    inputs: Any,
    per_example: bool,
) -> Plan:
    """Plan the capture of all blocks of a layout, and of the leaves that get a diagonal.

    Args:
      objective: the `curvax.Objective`.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      params: pytree of float arrays.
      inputs: the inputs of a batch.
      per_example: run every row by itself; otherwise the batch is one "example" with all positions.

    Raises:
      ValueError: as `curvax.capture.plan`; the layout is for gradients alone; or, per example, the
        positions of a block over time are no times.
    """
    for block in layout.blocks:
        if not block.uses:
            raise ValueError(
                "the layout was made from shapes (or for gradients alone): it does not say where "
                f"the model uses {block.name}. K-FAC, and what else captures the inputs and "
                "cotangents of layers, needs curvax.kron_layout(objective, params, batch)."
            )
    kernels = {block.name: kernel_of(block) for block in layout.blocks}
    # Leaves that are the identity outside of blocks need no gradient.
    leaves = [leaf.path for leaf in layout.leaves if leaf.outside == "diagonal"]
    # Containers of params may have changed since the layout was made, and paths with them.
    paths = tuple(named_leaves(layout, params))
    planned = plan(objective, params, inputs, kernels, leaves, per_example, paths)
    # In the program of one example positions are its own, and a batch has no axis among them.
    if per_example:
        for block, (_, uses) in zip(layout.blocks, planned.uses, strict=True):
            if block.is_over_time:
                check_times(block, uses)
    return planned


def kernel_of(block: Block) -> Kernel:
    """Return a block's kernel, as capture knows it."""
    return Kernel(block.kernel, block.bias, block.uses)
