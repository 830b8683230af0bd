"""optax transformations: `scale_by_M` takes curvature as data, `M` estimates it from the batch."""

from curvax.optim._adahessian import AdaHessianInfo, adahessian, scale_by_adahessian
from curvax.optim._averaging import block_average, flax_axes, spatial_average
from curvax.optim._cubic_newton import (
    CubicNewtonInfo,
    CubicNewtonState,
    cubic_newton,
    scale_by_cubic_newton,
)
from curvax.optim._diagonal import ScaleByDiagonalState, hessian_diagonal
from curvax.optim._ekfac import EigenBlockState, ekfac, scale_by_ekfac
from curvax.optim._estimating import EstimatingState, estimating
from curvax.optim._fismo import FismoFactors, fismo, scale_by_fismo
from curvax.optim._fraction import on_fraction
from curvax.optim._gradient_regularized import (
    GradientRegularizedInfo,
    GradientRegularizedState,
    gradient_regularized_newton,
    scale_by_gradient_regularized_newton,
)
from curvax.optim._induced_metric import InducedMetricState, induced_metric
from curvax.optim._kfac import kfac, scale_by_kfac
from curvax.optim._kfac_auto import kfac_auto
from curvax.optim._kl_clip import KlClipState, kl_clip
from curvax.optim._kl_shampoo import (
    KlBlock,
    kl_shampoo,
    kl_soap,
    scale_by_kl_shampoo,
    scale_by_kl_soap,
)
from curvax.optim._kronecker import BlockInfo, KronInfo, ScaleByKronState
from curvax.optim._krylov_descent import (
    KrylovDescentInfo,
    KrylovDescentState,
    krylov_descent,
    scale_by_krylov_descent,
)
from curvax.optim._lazy_newton import (
    LazyNewtonInfo,
    ScaleByLazyNewtonState,
    lazy_newton,
    scale_by_lazy_newton,
)
from curvax.optim._levenberg_marquardt import (
    LevenbergMarquardtInfo,
    LevenbergMarquardtState,
    levenberg_marquardt,
)
from curvax.optim._line_search import LineSearchInfo, LineSearchState, line_search
from curvax.optim._matrices import (
    MatrixBlock,
    MatrixInfo,
    MatrixMethod,
    ScaleByMatricesState,
    scale_by_matrices,
)
from curvax.optim._matrix_parts import (
    ScaleRule,
    Sides,
    adam_norm,
    momentum_norm,
    rms_at_most,
    rms_norm,
    shape_norm,
    unscaled,
)
from curvax.optim._mfac import MfacInfo, ScaleByMfacState, mfac, scale_by_mfac
from curvax.optim._mkor import mkor, mkor_h, scale_by_mkor
from curvax.optim._muon import MuonMemory, muon, scale_by_muon
from curvax.optim._newton import (
    NewtonInfo,
    ScaleByNewtonState,
    egn,
    gauss_newton,
    newton_cg,
    saddle_free_newton,
    scale_by_newton,
)
from curvax.optim._newton_muon import newton_muon, scale_by_newton_muon
from curvax.optim._oasis import OasisInfo, ScaleByOasisState, oasis, scale_by_oasis
from curvax.optim._oasis_auto import (
    OasisAutoInfo,
    ScaleByOasisAutoState,
    oasis_auto,
    scale_by_oasis_auto,
)
from curvax.optim._placed_state import pack_state, unpack_state
from curvax.optim._plateau import LossAverages, UntilPlateauState, until_plateau
from curvax.optim._polar import exact_polar, newton_schulz, polar_express
from curvax.optim._psgd import (
    HessianPair,
    PsgdStatistics,
    hessian_pairs,
    psgd,
    psgd_interval,
    scale_by_psgd,
)
from curvax.optim._quadratic_model import QuadraticModelInfo, QuadraticModelState, quadratic_model
from curvax.optim._refresh import Interval, growing_interval, refresh_if
from curvax.optim._relative_damping import RelativeDamping
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.optim._sania import SaniaState, sania, scale_by_sania
from curvax.optim._self_scaled import (
    ScaleBySsbroydenState,
    SsbroydenInfo,
    scale_by_ssbroyden,
    ssbfgs,
    ssbroyden,
)
from curvax.optim._shampoo import (
    ShampooMemory,
    asgo,
    scale_by_asgo,
    scale_by_shampoo,
    shampoo,
)
from curvax.optim._soap import SoapBlock, scale_by_soap, soap
from curvax.optim._sophia import SophiaInfo, scale_by_sophia, sophia_g, sophia_h
from curvax.optim._spring import (
    ScaleBySpringState,
    SpringInfo,
    engd,
    scale_by_spring,
    spring,
)
from curvax.optim._squares import (
    ScaleBySquaresState,
    SquaresInfo,
    scale_by_adagrad_sqr,
    scale_by_adam_sqr,
)
from curvax.optim._state_shardings import state_shardings
from curvax.optim._two_rates import TwoRatesState

__all__ = [
    "AdaHessianInfo",
    "BlockInfo",
    "CubicNewtonInfo",
    "CubicNewtonState",
    "EigenBlockState",
    "EstimatingState",
    "FismoFactors",
    "GradientRegularizedInfo",
    "GradientRegularizedState",
    "HessianPair",
    "InducedMetricState",
    "Interval",
    "KlBlock",
    "KlClipState",
    "KronInfo",
    "KrylovDescentInfo",
    "KrylovDescentState",
    "LazyNewtonInfo",
    "LevenbergMarquardtInfo",
    "LevenbergMarquardtState",
    "LineSearchInfo",
    "LineSearchState",
    "LossAverages",
    "MatrixBlock",
    "MatrixInfo",
    "MatrixMethod",
    "MfacInfo",
    "MuonMemory",
    "NewtonInfo",
    "OasisAutoInfo",
    "OasisInfo",
    "PsgdStatistics",
    "QuadraticModelInfo",
    "QuadraticModelState",
    "RelativeDamping",
    "SaniaState",
    "ScaleByDiagonalState",
    "ScaleByKronState",
    "ScaleByLazyNewtonState",
    "ScaleByMatricesState",
    "ScaleByMfacState",
    "ScaleByNewtonState",
    "ScaleByOasisAutoState",
    "ScaleByOasisState",
    "ScaleBySpringState",
    "ScaleBySquaresState",
    "ScaleBySsbroydenState",
    "ScaleRule",
    "ShampooMemory",
    "Sides",
    "SoapBlock",
    "SophiaInfo",
    "SpringInfo",
    "SquaresInfo",
    "SsbroydenInfo",
    "StepContext",
    "StepResult",
    "TwoRatesState",
    "UntilPlateauState",
    "adahessian",
    "adam_norm",
    "asgo",
    "block_average",
    "cubic_newton",
    "curvature_rule",
    "egn",
    "ekfac",
    "engd",
    "estimating",
    "exact_polar",
    "fismo",
    "flax_axes",
    "gauss_newton",
    "gradient_regularized_newton",
    "growing_interval",
    "hessian_diagonal",
    "hessian_pairs",
    "induced_metric",
    "kfac",
    "kfac_auto",
    "kl_clip",
    "kl_shampoo",
    "kl_soap",
    "krylov_descent",
    "lazy_newton",
    "levenberg_marquardt",
    "line_search",
    "mfac",
    "mkor",
    "mkor_h",
    "momentum_norm",
    "muon",
    "newton_cg",
    "newton_muon",
    "newton_schulz",
    "oasis",
    "oasis_auto",
    "on_fraction",
    "pack_state",
    "polar_express",
    "psgd",
    "psgd_interval",
    "quadratic_model",
    "refresh_if",
    "rms_at_most",
    "rms_norm",
    "saddle_free_newton",
    "sania",
    "scale_by_adagrad_sqr",
    "scale_by_adahessian",
    "scale_by_adam_sqr",
    "scale_by_asgo",
    "scale_by_cubic_newton",
    "scale_by_ekfac",
    "scale_by_fismo",
    "scale_by_gradient_regularized_newton",
    "scale_by_kfac",
    "scale_by_kl_shampoo",
    "scale_by_kl_soap",
    "scale_by_krylov_descent",
    "scale_by_lazy_newton",
    "scale_by_matrices",
    "scale_by_mfac",
    "scale_by_mkor",
    "scale_by_muon",
    "scale_by_newton",
    "scale_by_newton_muon",
    "scale_by_oasis",
    "scale_by_oasis_auto",
    "scale_by_psgd",
    "scale_by_sania",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_sophia",
    "scale_by_spring",
    "scale_by_ssbroyden",
    "shampoo",
    "shape_norm",
    "soap",
    "sophia_g",
    "sophia_h",
    "spatial_average",
    "spring",
    "ssbfgs",
    "ssbroyden",
    "state_shardings",
    "unpack_state",
    "unscaled",
    "until_plateau",
    "zero_count",
    "zero_number",
]
