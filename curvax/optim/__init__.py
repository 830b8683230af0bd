"""optax transformations: `scale_by_M` takes curvature as data, `M` estimates it from the batch."""

from curvax.optim._adahessian import AdaHessianInfo, adahessian, scale_by_adahessian
from curvax.optim._averaging import block_average, flax_axes, spatial_average
from curvax.optim._diagonal import ScaleByDiagonalState
from curvax.optim._ekfac import EigenBlockState, ekfac, scale_by_ekfac
from curvax.optim._estimating import EstimatingState, estimating
from curvax.optim._fraction import on_fraction
from curvax.optim._gradient_regularized import (
    GradientRegularizedInfo,
    GradientRegularizedState,
    gradient_regularized_newton,
    scale_by_gradient_regularized_newton,
)
from curvax.optim._kfac import kfac, scale_by_kfac
from curvax.optim._kfac_auto import kfac_auto
from curvax.optim._kl_clip import KlClipState, kl_clip
from curvax.optim._kronecker import BlockInfo, KronInfo, ScaleByKronState
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
from curvax.optim._mfac import MfacInfo, ScaleByMfacState, mfac, scale_by_mfac
from curvax.optim._newton import (
    NewtonInfo,
    ScaleByNewtonState,
    egn,
    gauss_newton,
    newton_cg,
    saddle_free_newton,
    scale_by_newton,
)
from curvax.optim._quadratic_model import QuadraticModelInfo, QuadraticModelState, quadratic_model
from curvax.optim._refresh import Interval, growing_interval, refresh_if
from curvax.optim._relative_damping import RelativeDamping
from curvax.optim._rule import StepContext, StepResult, curvature_rule, zero_count, zero_number
from curvax.optim._sophia import SophiaInfo, scale_by_sophia, sophia_g, sophia_h

__all__ = [
    "AdaHessianInfo",
    "BlockInfo",
    "EigenBlockState",
    "EstimatingState",
    "GradientRegularizedInfo",
    "GradientRegularizedState",
    "Interval",
    "KlClipState",
    "KronInfo",
    "LazyNewtonInfo",
    "LevenbergMarquardtInfo",
    "LevenbergMarquardtState",
    "MfacInfo",
    "NewtonInfo",
    "QuadraticModelInfo",
    "QuadraticModelState",
    "RelativeDamping",
    "ScaleByDiagonalState",
    "ScaleByKronState",
    "ScaleByLazyNewtonState",
    "ScaleByMfacState",
    "ScaleByNewtonState",
    "SophiaInfo",
    "StepContext",
    "StepResult",
    "adahessian",
    "block_average",
    "curvature_rule",
    "egn",
    "ekfac",
    "estimating",
    "flax_axes",
    "gauss_newton",
    "gradient_regularized_newton",
    "growing_interval",
    "kfac",
    "kfac_auto",
    "kl_clip",
    "lazy_newton",
    "levenberg_marquardt",
    "mfac",
    "newton_cg",
    "on_fraction",
    "quadratic_model",
    "refresh_if",
    "saddle_free_newton",
    "scale_by_adahessian",
    "scale_by_ekfac",
    "scale_by_gradient_regularized_newton",
    "scale_by_kfac",
    "scale_by_lazy_newton",
    "scale_by_mfac",
    "scale_by_newton",
    "scale_by_sophia",
    "sophia_g",
    "sophia_h",
    "spatial_average",
    "zero_count",
    "zero_number",
]
