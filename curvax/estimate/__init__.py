"""Estimates of what a curvature matrix holds: diagonals, traces, per-example gradients."""

from curvax.estimate.diagonals import empirical_fisher_diagonal as empirical_fisher_diagonal
from curvax.estimate.diagonals import gauss_newton_bartlett as gauss_newton_bartlett
from curvax.estimate.diagonals import ggn_diagonal as ggn_diagonal
from curvax.estimate.hutchinson import Estimate as Estimate
from curvax.estimate.hutchinson import hutchinson_diagonal as hutchinson_diagonal
from curvax.estimate.hutchinson import hutchinson_trace as hutchinson_trace
from curvax.estimate.hutchinson import normal as normal
from curvax.estimate.hutchinson import rademacher as rademacher
from curvax.estimate.per_example import per_example_grads as per_example_grads
