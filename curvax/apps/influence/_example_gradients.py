"""Gradients of training examples, kept as inputs and output-gradients of layers."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import PyTree

from curvax._shared import unwrap
from curvax._types import Params, Scalar
from curvax.capture import Capture, GradientPair, UseCotangents, record
from curvax.kron._gradient_pairs import Basis, rotated_pairs
from curvax.kron._layout import Block, Layout
from curvax.kron._plan import layout_plan
from curvax.losses._shares import share_of, term_counts
from curvax.objective import Objective

# b: example, t: position, a_t: input of a layer, g_t: gradient in its output, L_b / N: the part of
# the training loss that belongs to example b


def record_examples(objective: Objective, layout: Layout, params: Params, inputs: Any) -> Capture:
    """Run the model on every example by itself, recording the inputs of all layers."""
    plan = layout_plan(objective, layout, params, inputs, per_example=True)
    return record(plan, params, inputs)


def pairs_of_block(
    block: Block,
    capture: Capture,
    cotangents: UseCotangents,
    basis: Basis | None = None,
) -> list[GradientPair]:
    """Return the pairs whose outer products sum to every example's gradient, in a basis."""
    basis = Basis(None, None) if basis is None else basis
    inputs, g = capture.inputs[block.name], cotangents.blocks[block.name]
    return rotated_pairs(block, basis, inputs, g)


def share_gradient(
    objective: Objective,
    capture: Capture,
    targets: Any,
    totals: PyTree[Scalar],
) -> Any:
    """Return the gradient in the outputs of every example's part `L_b / N` of the training loss."""
    counts = term_counts(objective.loss, capture.outputs, targets)
    loss = share_of(objective.loss, counts, totals)
    # Examples do not mix: one gradient of their sum is that of each of them.
    return jax.grad(lambda outputs: loss(outputs, unwrap(targets)))(capture.outputs)
