"""Spectra of curvature matrices on pytrees: extreme eigenpairs, densities, traces."""

from curvax.spectra.density import Density as Density
from curvax.spectra.density import DensityInfo as DensityInfo
from curvax.spectra.density import logdet as logdet
from curvax.spectra.density import moments as moments
from curvax.spectra.density import smooth_density as smooth_density
from curvax.spectra.density import spectral_density as spectral_density
from curvax.spectra.density import spectral_sum as spectral_sum
from curvax.spectra.eigsh import EigInfo as EigInfo
from curvax.spectra.eigsh import eigsh as eigsh
from curvax.spectra.functions import absolute_krylov as absolute_krylov
from curvax.spectra.functions import matrix_function as matrix_function
from curvax.spectra.lanczos import Lanczos as Lanczos
from curvax.spectra.lanczos import lanczos as lanczos
from curvax.spectra.layers import By as By
from curvax.spectra.layers import layer_paths as layer_paths
from curvax.spectra.layers import top_eigenvalues_by as top_eigenvalues_by
from curvax.spectra.layers import traces_by as traces_by
from curvax.spectra.layers import traces_over as traces_over
from curvax.spectra.subspace import fraction_in_subspace as fraction_in_subspace
from curvax.spectra.subspace import subspace_overlap as subspace_overlap
from curvax.spectra.trace import hutchpp as hutchpp
from curvax.spectra.trace import xtrace as xtrace
