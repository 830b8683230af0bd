"""Curvature products: each builds a matvec on params, linearized once, reused for every vector."""

from curvax.products.dense import to_dense as to_dense
from curvax.products.gauss_newton import empirical_fishervp as empirical_fishervp
from curvax.products.gauss_newton import fishervp as fishervp
from curvax.products.gauss_newton import ggnvp as ggnvp
from curvax.products.hessian import hvp as hvp
from curvax.products.streamed import streamed as streamed
