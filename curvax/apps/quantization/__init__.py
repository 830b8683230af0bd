"""Quantization: fewer bits for weights, where the curvature says that the loss minds least (HAWQ, HAWQ-V2)."""

from curvax.apps.quantization.allocation import Allocation as Allocation
from curvax.apps.quantization.allocation import allocate as allocate
from curvax.apps.quantization.allocation import pareto as pareto
from curvax.apps.quantization.quantizers import Scheme as Scheme
from curvax.apps.quantization.quantizers import kernels as kernels
from curvax.apps.quantization.quantizers import layers_by_path as layers_by_path
from curvax.apps.quantization.quantizers import perturbations as perturbations
from curvax.apps.quantization.quantizers import quantize as quantize
from curvax.apps.quantization.quantizers import sizes as sizes
from curvax.apps.quantization.sensitivity import hawq as hawq
from curvax.apps.quantization.sensitivity import hawq_v2 as hawq_v2
from curvax.apps.quantization.sensitivity import sensitivities as sensitivities
