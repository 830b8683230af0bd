"""Spectra of curvature matrices on pytrees: extreme eigenpairs, densities, traces."""

from curvax.spectra._density import (
    Density,
    DensityInfo,
    logdet,
    moments,
    smooth_density,
    spectral_density,
    spectral_sum,
)
from curvax.spectra._eigsh import EigInfo, eigsh
from curvax.spectra._functions import absolute_krylov, matrix_function
from curvax.spectra._lanczos import Lanczos, lanczos
from curvax.spectra._layers import By, layer_paths, top_eigenvalues_by, traces_by, traces_over
from curvax.spectra._subspace import fraction_in_subspace, subspace_overlap
from curvax.spectra._trace import hutchpp, xtrace

__all__ = [
    "By",
    "Density",
    "DensityInfo",
    "EigInfo",
    "Lanczos",
    "absolute_krylov",
    "eigsh",
    "fraction_in_subspace",
    "hutchpp",
    "lanczos",
    "layer_paths",
    "logdet",
    "matrix_function",
    "moments",
    "smooth_density",
    "spectral_density",
    "spectral_sum",
    "subspace_overlap",
    "top_eigenvalues_by",
    "traces_by",
    "traces_over",
    "xtrace",
]
