"""Kronecker-factored curvature: layout, factors, and inverse."""

from curvax.kron._estimator import estimator
from curvax.kron._factors import BlockFactors, Factors, WeightedMean, kron_factors, moving_average
from curvax.kron._gradient_pairs import Basis
from curvax.kron._inverse import EigenPower, FactoredPower, KronPower, kron_inverse
from curvax.kron._layout import Block, Layout, Leaf, kron_layout
from curvax.kron._merging import merge
from curvax.kron._moments import (
    EigenCurvature,
    EigenFactors,
    eigen_curvature,
    kron_basis,
    kron_moments,
)

__all__ = [
    "Basis",
    "Block",
    "BlockFactors",
    "EigenCurvature",
    "EigenFactors",
    "EigenPower",
    "FactoredPower",
    "Factors",
    "KronPower",
    "Layout",
    "Leaf",
    "WeightedMean",
    "eigen_curvature",
    "estimator",
    "kron_basis",
    "kron_factors",
    "kron_inverse",
    "kron_layout",
    "kron_moments",
    "merge",
    "moving_average",
]
