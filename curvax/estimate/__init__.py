"""Estimates of what a curvature matrix holds: diagonals, traces, per-example gradients."""

from curvax.estimate._diagonals import (
    empirical_fisher_diagonal,
    gauss_newton_bartlett,
    ggn_diagonal,
)
from curvax.estimate._hutchinson import (
    Estimate,
    hutchinson_diagonal,
    hutchinson_trace,
    normal,
    rademacher,
)
from curvax.estimate._per_example import per_example_grads

__all__ = [
    "Estimate",
    "empirical_fisher_diagonal",
    "gauss_newton_bartlett",
    "ggn_diagonal",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "normal",
    "per_example_grads",
    "rademacher",
]
