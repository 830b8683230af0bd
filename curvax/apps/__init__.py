"""What people do with curvature: attribution, pruning, quantization, hypergradients, sharpness."""

from curvax.apps import influence, pruning, quantization
from curvax.apps._hypergradient import implicit_gradient
from curvax.apps._sharpness import HeavyBall, SharpnessReport, heavy_ball, sharpness_report

__all__ = [
    "HeavyBall",
    "SharpnessReport",
    "heavy_ball",
    "implicit_gradient",
    "influence",
    "pruning",
    "quantization",
    "sharpness_report",
]
