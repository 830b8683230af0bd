"""Quantization: fewer bits where, by the curvature, the loss suffers least (HAWQ, HAWQ-V2)."""

from curvax.apps._prunable import kernels
from curvax.apps.quantization._allocation import Allocation, allocate, pareto
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
    "Scheme",
    "allocate",
    "hawq",
    "hawq_v2",
    "kernels",
    "layers_by_path",
    "pareto",
    "perturbations",
    "quantize",
    "sensitivities",
    "sizes",
]
