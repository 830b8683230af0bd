"""curvax: second-order optimization and curvature for JAX.

This page is what a training loop or the first page of a notebook calls. Everything else is one
level down, in `curvax.kron`, `curvax.solve`, `curvax.spectra`, `curvax.optim`, `curvax.apps`,
`curvax.capture` and `curvax.plot`.
"""

from curvax import apps, capture, estimate, kron, losses, optim, products, solve, spectra
from curvax._shared import Shared
from curvax.estimate import (
    Estimate,
    empirical_fisher_diagonal,
    gauss_newton_bartlett,
    ggn_diagonal,
    hutchinson_diagonal,
    hutchinson_trace,
    per_example_grads,
)
from curvax.kron import kron_factors, kron_inverse, kron_layout, matrix_layout
from curvax.objective import Objective, penalty, total
from curvax.optim import (
    adahessian,
    asgo,
    egn,
    ekfac,
    estimating,
    fismo,
    gauss_newton,
    gradient_regularized_newton,
    kfac,
    kfac_auto,
    kl_clip,
    kl_shampoo,
    kl_soap,
    lazy_newton,
    levenberg_marquardt,
    mfac,
    mkor,
    mkor_h,
    muon,
    newton_cg,
    newton_muon,
    on_fraction,
    quadratic_model,
    saddle_free_newton,
    scale_by_adahessian,
    scale_by_asgo,
    scale_by_ekfac,
    scale_by_fismo,
    scale_by_gradient_regularized_newton,
    scale_by_kfac,
    scale_by_kl_shampoo,
    scale_by_kl_soap,
    scale_by_lazy_newton,
    scale_by_mfac,
    scale_by_mkor,
    scale_by_muon,
    scale_by_newton,
    scale_by_newton_muon,
    scale_by_shampoo,
    scale_by_soap,
    scale_by_sophia,
    scale_by_ssbroyden,
    shampoo,
    soap,
    sophia_g,
    sophia_h,
    ssbfgs,
    ssbroyden,
    until_plateau,
)
from curvax.products import empirical_fishervp, fishervp, ggnvp, hvp, streamed, to_dense
from curvax.solve import cg
from curvax.spectra import eigsh, spectral_density

__version__ = "0.1.0"

__all__ = [
    # Objectives
    "Objective",
    "total",
    "penalty",
    "Shared",
    "losses",
    # Products: `v -> C v`, linearized once
    "hvp",
    "ggnvp",
    "fishervp",
    "empirical_fishervp",
    "streamed",
    "to_dense",
    # Estimates of diagonals and traces, gradients of examples
    "Estimate",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "gauss_newton_bartlett",
    "ggn_diagonal",
    "empirical_fisher_diagonal",
    "per_example_grads",
    # Optimizers
    "adahessian",
    "sophia_h",
    "sophia_g",
    "kfac",
    "kfac_auto",
    "ekfac",
    "mfac",
    "gauss_newton",
    "egn",
    "newton_cg",
    "saddle_free_newton",
    "lazy_newton",
    "gradient_regularized_newton",
    # Optimizers that need gradients only, of every matrix of a model
    "shampoo",
    "soap",
    "kl_shampoo",
    "kl_soap",
    "asgo",
    "muon",
    "fismo",
    # Such that measure a little more of the model
    "newton_muon",
    "mkor",
    "mkor_h",
    # For deterministic problems
    "ssbroyden",
    "ssbfgs",
    # Their rules, which take curvature as data
    "scale_by_adahessian",
    "scale_by_sophia",
    "scale_by_kfac",
    "scale_by_ekfac",
    "scale_by_mfac",
    "scale_by_newton",
    "scale_by_lazy_newton",
    "scale_by_gradient_regularized_newton",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_kl_shampoo",
    "scale_by_kl_soap",
    "scale_by_asgo",
    "scale_by_muon",
    "scale_by_newton_muon",
    "scale_by_fismo",
    "scale_by_mkor",
    "scale_by_ssbroyden",
    # Wrappers around rules and optimizers
    "estimating",
    "on_fraction",
    "kl_clip",
    "levenberg_marquardt",
    "quadratic_model",
    "until_plateau",
    # Kronecker-factored curvature
    "kron_layout",
    "matrix_layout",
    "kron_factors",
    "kron_inverse",
    # Solves and spectra
    "cg",
    "eigsh",
    "spectral_density",
    # Packages
    "apps",
    "capture",
    "estimate",
    "kron",
    "optim",
    "products",
    "solve",
    "spectra",
]
