"""Kronecker-factored curvature: layout, factors, and inverse."""

from curvax.kron._accumulate import kron_factors
from curvax.kron._block_matrices import block_matrices, with_block_matrices
from curvax.kron._block_operators import (
    BlockSpectrum,
    ChainOperator,
    EigenOperator,
    FactoredOperator,
)
from curvax.kron._build_layout import kron_layout
from curvax.kron._build_placement import kron_placement
from curvax.kron._estimator import estimator
from curvax.kron._factors import (
    BlockFactors,
    Factors,
    LagFactors,
    WeightedMean,
    moving_average,
)
from curvax.kron._fit import fit_factors, fit_moments
from curvax.kron._gradient_layout import gradient_layout, tiled
from curvax.kron._gradient_pairs import Basis
from curvax.kron._input_factors import input_factors
from curvax.kron._inverse import kron_inverse
from curvax.kron._kron_factor import Diagonal, Full, Identity, KronFactor
from curvax.kron._layout import Block, Layout, Leaf
from curvax.kron._lookups import without_lookups
from curvax.kron._matrix_layout import matrix_layout
from curvax.kron._mean_vectors import MeanVectors, mean_vectors
from curvax.kron._merging import merge
from curvax.kron._moments import (
    EigenCurvature,
    EigenFactors,
    eigen_curvature,
    kron_basis,
    kron_moments,
)
from curvax.kron._operator import KronOperator, apply, kron_operator
from curvax.kron._placement import Placement
from curvax.kron._storage import Saving
from curvax.kron._vector_layout import vector_layout

__all__ = [
    "Basis",
    "Block",
    "BlockFactors",
    "BlockSpectrum",
    "ChainOperator",
    "Diagonal",
    "EigenCurvature",
    "EigenFactors",
    "EigenOperator",
    "FactoredOperator",
    "Factors",
    "Full",
    "Identity",
    "KronFactor",
    "KronOperator",
    "LagFactors",
    "Layout",
    "Leaf",
    "MeanVectors",
    "Placement",
    "Saving",
    "WeightedMean",
    "apply",
    "block_matrices",
    "eigen_curvature",
    "estimator",
    "fit_factors",
    "fit_moments",
    "gradient_layout",
    "input_factors",
    "kron_basis",
    "kron_factors",
    "kron_inverse",
    "kron_layout",
    "kron_moments",
    "kron_operator",
    "kron_placement",
    "matrix_layout",
    "mean_vectors",
    "merge",
    "moving_average",
    "tiled",
    "vector_layout",
    "with_block_matrices",
    "without_lookups",
]
