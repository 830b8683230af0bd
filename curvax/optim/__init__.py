"""optax transformations: `scale_by_M` takes curvature as data, `M` estimates it from the batch."""

from curvax.optim.adahessian import AdaHessianInfo as AdaHessianInfo
from curvax.optim.adahessian import adahessian as adahessian
from curvax.optim.adahessian import scale_by_adahessian as scale_by_adahessian
from curvax.optim.averaging import block_average as block_average
from curvax.optim.averaging import spatial_average as spatial_average
from curvax.optim.diagonal import ScaleByDiagonalState as ScaleByDiagonalState
from curvax.optim.estimating import EstimatingState as EstimatingState
from curvax.optim.estimating import estimating as estimating
from curvax.optim.refresh import refresh_if as refresh_if
from curvax.optim.sophia import SophiaInfo as SophiaInfo
from curvax.optim.sophia import scale_by_sophia as scale_by_sophia
from curvax.optim.sophia import sophia_g as sophia_g
from curvax.optim.sophia import sophia_h as sophia_h
