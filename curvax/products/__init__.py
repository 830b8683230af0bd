"""Curvature products: each builds a matvec on params.

The model is linearized once, when the matvec is built; every vector reuses that. All are products
with the curvature of the mean loss over the batch, whatever the `microbatch`.
"""

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
