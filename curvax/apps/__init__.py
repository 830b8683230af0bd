"""What people do with curvature: attribution, pruning, merging, penalties, and more."""

from curvax.apps import influence, merging, penalties, pruning, quantization
from curvax.apps._hypergradient import implicit_gradient
from curvax.apps._sharpness import HeavyBall, SharpnessReport, heavy_ball, sharpness_report

__all__ = [
    "HeavyBall",
    "SharpnessReport",
    "heavy_ball",
    "implicit_gradient",
    "influence",
    "merging",
    "penalties",
    "pruning",
    "quantization",
    "sharpness_report",
]
