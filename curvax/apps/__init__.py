"""What people do with curvature."""

from curvax.apps import pruning as pruning
from curvax.apps import quantization as quantization
