"""Quantization: fewer bits where, by the curvature, the loss suffers least (HAWQ, GPTQ)."""

from curvax.apps._prunable import kernels
from curvax.apps.quantization._allocation import Allocation, allocate, pareto
from curvax.apps.quantization._bisection import LargestSet, largest_set
from curvax.apps.quantization._gptq import OutputError, Rounded, gptq
from curvax.apps.quantization._pairwise import Interactions, allocate_pairwise, interactions
from curvax.apps.quantization._quantizers import (
    Scheme,
    layers_by_path,
    perturbations,
    quantize,
    sizes,
)
from curvax.apps.quantization._sensitivity import hawq, hawq_v2, sensitivities

__all__ = [
    "Allocation",
    "Interactions",
    "LargestSet",
    "OutputError",
    "Rounded",
    "Scheme",
    "allocate",
    "allocate_pairwise",
    "gptq",
    "hawq",
    "hawq_v2",
    "interactions",
    "kernels",
    "largest_set",
    "layers_by_path",
    "pareto",
    "perturbations",
    "quantize",
    "sensitivities",
    "sizes",
]
