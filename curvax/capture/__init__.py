"""Capture: which parameter enters which linear map, with what inputs and output-cotangents.

The path, step by step:
  1. `kernels, reasons = find_kernels(objective, params, inputs)`: follow every leaf of params;
  2. `planned = plan(objective, params, inputs, names_of_kernels, leaves, per_example)`: static;
  3. `capture = record(planned, params, inputs)`: one forward pass, with `capture.inputs` a;
  4. `cotangents = capture.pull(r)`: one backward pass, with `cotangents.blocks` g.
  5. `gradient_pairs(kernel, a, g)`: what each example's gradient `sum_t a_t g_t'` is made of.
"""

from curvax.capture._chunks import ChunkedInputs
from curvax.capture._gradient_pairs import (
    DensePair,
    GradientPair,
    LookupPair,
    gradient_pairs,
)
from curvax.capture._gram import gram
from curvax.capture._join import join_examples, joined_captures
from curvax.capture._kernels import Kernel, UseKind
from curvax.capture._plan import Plan, are_examples_apart, find_kernels, plan, uses_in_part
from curvax.capture._record import Capture, PerUseArray, UseCotangents, record
from curvax.capture._views import View, entry_numbers, leaf_view, uncovered

__all__ = [
    "Plan",
    "plan",
    "find_kernels",
    "are_examples_apart",
    "uses_in_part",
    "Kernel",
    "UseKind",
    "View",
    "leaf_view",
    "entry_numbers",
    "uncovered",
    "record",
    "Capture",
    "ChunkedInputs",
    "UseCotangents",
    "PerUseArray",
    "gradient_pairs",
    "GradientPair",
    "DensePair",
    "LookupPair",
    "gram",
    "join_examples",
    "joined_captures",
]
