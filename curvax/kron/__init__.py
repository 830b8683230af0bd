"""Kronecker-factored curvature: layout, factors, and inverse."""

from curvax.kron.factors import BlockFactors as BlockFactors
from curvax.kron.factors import Factor as Factor
from curvax.kron.factors import Factors as Factors
from curvax.kron.factors import kron_factors as kron_factors
from curvax.kron.factors import merge as merge
from curvax.kron.factors import moving_average as moving_average
from curvax.kron.inverse import KronPower as KronPower
from curvax.kron.inverse import kron_inverse as kron_inverse
from curvax.kron.layout import Block as Block
from curvax.kron.layout import Layout as Layout
from curvax.kron.layout import Leaf as Leaf
from curvax.kron.layout import kron_layout as kron_layout
from curvax.kron.moments import EigenFactors as EigenFactors
from curvax.kron.moments import kron_basis as kron_basis
from curvax.kron.moments import kron_moments as kron_moments
