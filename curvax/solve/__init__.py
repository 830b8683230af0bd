"""Solves with curvature on pytrees: each returns a solution and a `SolveInfo`."""

from curvax.solve._cg import cg
from curvax.solve._collect import fisher_window
from curvax.solve._cubic import CubicInfo, cubic_step
from curvax.solve._damped import check_symmetric
from curvax.solve._direct import Dense, SampleSpace, direct
from curvax.solve._eigen import EigenDecomposition, absolute, decompose
from curvax.solve._elements import (
    Whitened,
    inverse_diagonal,
    inverse_element,
    map_inverse_blocks,
    whiten,
)
from curvax.solve._lineax_adapter import from_lineax, to_lineax
from curvax.solve._minres import minres
from curvax.solve._neumann import neumann
from curvax.solve._polynomial import PowerTraces, power_traces, symmetric_polynomial
from curvax.solve._result import Result, SolveInfo, Solver
from curvax.solve._sample_space import sample_space
from curvax.solve._tracked import TrackedState, init_tracked, tracked, update_blocks
from curvax.solve._window import (
    Window,
    init_window,
    insert,
    window_inverse,
    window_of,
    window_product,
)
from curvax.solve._woodbury import woodbury

__all__ = [
    "CubicInfo",
    "Dense",
    "EigenDecomposition",
    "PowerTraces",
    "Result",
    "SampleSpace",
    "SolveInfo",
    "Solver",
    "TrackedState",
    "Whitened",
    "Window",
    "absolute",
    "cg",
    "check_symmetric",
    "cubic_step",
    "decompose",
    "direct",
    "fisher_window",
    "from_lineax",
    "init_tracked",
    "init_window",
    "insert",
    "inverse_diagonal",
    "inverse_element",
    "map_inverse_blocks",
    "minres",
    "neumann",
    "power_traces",
    "sample_space",
    "symmetric_polynomial",
    "to_lineax",
    "tracked",
    "update_blocks",
    "whiten",
    "window_inverse",
    "window_of",
    "window_product",
    "woodbury",
]
