"""What people do with curvature: attribution, pruning, merging, penalties, and more."""

from curvax.apps import influence, merging, penalties, pruning, quantization
from curvax.apps._hypergradient import implicit_gradient
from curvax.apps._sharpness import SharpnessReport, sharpness_report

__all__ = [
    "SharpnessReport",
    "implicit_gradient",
    "influence",
    "merging",
    "penalties",
    "pruning",
    "quantization",
    "sharpness_report",
]
