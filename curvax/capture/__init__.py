"""Taps: which parameter enters which linear map, with what input, and with what cotangent of the output."""

from curvax.capture._find import Findings, HoldsView, find_uses
from curvax.capture._grouping import Member
from curvax.capture._mixing import mixing_operation
from curvax.capture._tapped import tapped, zero_perturbation
from curvax.capture._uses import Use
from curvax.capture._views import View, entry_numbers, leaf_view

__all__ = [
    "Findings",
    "HoldsView",
    "Member",
    "Use",
    "View",
    "entry_numbers",
    "find_uses",
    "leaf_view",
    "mixing_operation",
    "tapped",
    "zero_perturbation",
]
