"""Curvature products: each builds a matvec on params, linearized once, reused for every vector."""

from curvax.products._dense import to_dense
from curvax.products._gauss_newton import empirical_fishervp, fishervp, ggnvp
from curvax.products._hessian import hvp
from curvax.products._streamed import streamed

__all__ = [
    "empirical_fishervp",
    "fishervp",
    "ggnvp",
    "hvp",
    "streamed",
    "to_dense",
]
