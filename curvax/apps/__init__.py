"""What people do with curvature."""

from curvax.apps import influence as influence
from curvax.apps import pruning as pruning
from curvax.apps import quantization as quantization
from curvax.apps.hypergradient import implicit_gradient as implicit_gradient
from curvax.apps.sharpness import SharpnessReport as SharpnessReport
from curvax.apps.sharpness import sharpness_report as sharpness_report
