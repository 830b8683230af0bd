"""Kronecker-factored curvature: layout, factors, and inverse."""

from curvax.kron._block_matrices import block_matrices, with_block_matrices
from curvax.kron._estimator import estimator
from curvax.kron._factors import BlockFactors, Factors, WeightedMean, kron_factors, moving_average
from curvax.kron._inverse import EigenPower, FactoredPower, KronPower, kron_inverse
from curvax.kron._layout import Block, Layout, Leaf, kron_layout
from curvax.kron._merging import merge
from curvax.kron._moments import (
    Basis,
    EigenCurvature,
    EigenFactors,
    eigen_curvature,
    kron_basis,
    kron_moments,
)
from curvax.kron._sample_space import sample_space

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
    "block_matrices",
    "eigen_curvature",
    "estimator",
    "kron_basis",
    "kron_factors",
    "kron_inverse",
    "kron_layout",
    "kron_moments",
    "merge",
    "moving_average",
    "sample_space",
    "with_block_matrices",
]
