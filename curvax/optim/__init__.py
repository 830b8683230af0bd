"""optax transformations: `scale_by_M` takes curvature as data, `M` estimates it from the batch."""

from curvax.optim.adahessian import AdaHessianInfo as AdaHessianInfo
from curvax.optim.adahessian import adahessian as adahessian
from curvax.optim.adahessian import scale_by_adahessian as scale_by_adahessian
from curvax.optim.averaging import block_average as block_average
from curvax.optim.averaging import spatial_average as spatial_average
from curvax.optim.diagonal import ScaleByDiagonalState as ScaleByDiagonalState
from curvax.optim.ekfac import ekfac as ekfac
from curvax.optim.ekfac import scale_by_ekfac as scale_by_ekfac
from curvax.optim.estimating import EstimatingState as EstimatingState
from curvax.optim.estimating import estimating as estimating
from curvax.optim.fraction import on_fraction as on_fraction
from curvax.optim.gradient_regularized import GradientRegularizedInfo as GradientRegularizedInfo
from curvax.optim.gradient_regularized import gradient_regularized_newton as gradient_regularized_newton
from curvax.optim.gradient_regularized import (
    scale_by_gradient_regularized_newton as scale_by_gradient_regularized_newton,
)
from curvax.optim.kfac import kfac as kfac
from curvax.optim.kfac import scale_by_kfac as scale_by_kfac
from curvax.optim.kl_clip import kl_clip as kl_clip
from curvax.optim.kronecker import BlockInfo as BlockInfo
from curvax.optim.kronecker import KronInfo as KronInfo
from curvax.optim.kronecker import ScaleByKronState as ScaleByKronState
from curvax.optim.lazy_newton import LazyNewtonInfo as LazyNewtonInfo
from curvax.optim.lazy_newton import ScaleByLazyNewtonState as ScaleByLazyNewtonState
from curvax.optim.lazy_newton import lazy_newton as lazy_newton
from curvax.optim.lazy_newton import scale_by_lazy_newton as scale_by_lazy_newton
from curvax.optim.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from curvax.optim.mfac import MfacInfo as MfacInfo
from curvax.optim.mfac import ScaleByMfacState as ScaleByMfacState
from curvax.optim.mfac import mfac as mfac
from curvax.optim.mfac import scale_by_mfac as scale_by_mfac
from curvax.optim.newton import NewtonInfo as NewtonInfo
from curvax.optim.newton import ScaleByNewtonState as ScaleByNewtonState
from curvax.optim.newton import Solver as Solver
from curvax.optim.newton import egn as egn
from curvax.optim.newton import gauss_newton as gauss_newton
from curvax.optim.newton import newton_cg as newton_cg
from curvax.optim.newton import saddle_free_newton as saddle_free_newton
from curvax.optim.newton import scale_by_newton as scale_by_newton
from curvax.optim.quadratic_model import quadratic_model as quadratic_model
from curvax.optim.refresh import refresh_if as refresh_if
from curvax.optim.sophia import SophiaInfo as SophiaInfo
from curvax.optim.sophia import scale_by_sophia as scale_by_sophia
from curvax.optim.sophia import sophia_g as sophia_g
from curvax.optim.sophia import sophia_h as sophia_h
