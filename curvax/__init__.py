"""curvax: second-order optimization and curvature for JAX. This page is the whole public surface."""

from curvax import estimate as estimate
from curvax import kron as kron
from curvax import losses as losses
from curvax import optim as optim
from curvax import products as products
from curvax._batch import Shared as Shared
from curvax.estimate import Estimate as Estimate
from curvax.estimate import empirical_fisher_diagonal as empirical_fisher_diagonal
from curvax.estimate import gauss_newton_bartlett as gauss_newton_bartlett
from curvax.estimate import ggn_diagonal as ggn_diagonal
from curvax.estimate import hutchinson_diagonal as hutchinson_diagonal
from curvax.estimate import hutchinson_trace as hutchinson_trace
from curvax.estimate import per_example_grads as per_example_grads
from curvax.kron import Layout as Layout
from curvax.kron import eigen_curvature as eigen_curvature
from curvax.kron import kron_basis as kron_basis
from curvax.kron import kron_factors as kron_factors
from curvax.kron import kron_inverse as kron_inverse
from curvax.kron import kron_layout as kron_layout
from curvax.kron import kron_moments as kron_moments
from curvax.kron import merge as merge
from curvax.objective import Objective as Objective
from curvax.optim import adahessian as adahessian
from curvax.optim import block_average as block_average
from curvax.optim import ekfac as ekfac
from curvax.optim import estimating as estimating
from curvax.optim import kfac as kfac
from curvax.optim import kl_clip as kl_clip
from curvax.optim import levenberg_marquardt as levenberg_marquardt
from curvax.optim import on_fraction as on_fraction
from curvax.optim import quadratic_model as quadratic_model
from curvax.optim import scale_by_adahessian as scale_by_adahessian
from curvax.optim import scale_by_ekfac as scale_by_ekfac
from curvax.optim import scale_by_kfac as scale_by_kfac
from curvax.optim import scale_by_sophia as scale_by_sophia
from curvax.optim import sophia_g as sophia_g
from curvax.optim import sophia_h as sophia_h
from curvax.optim import spatial_average as spatial_average
from curvax.products import empirical_fishervp as empirical_fishervp
from curvax.products import fishervp as fishervp
from curvax.products import ggnvp as ggnvp
from curvax.products import hvp as hvp
from curvax.products import to_dense as to_dense

__version__ = "0.1.0"
