"""Regularizers of a loss that are made of its derivatives: flat minima, and domains that agree."""

from curvax.apps.penalties._gradient_norm import gradient_norm
from curvax.apps.penalties._hessian_alignment import hessian_alignment

__all__ = ["gradient_norm", "hessian_alignment"]
