"""Taps: which parameter enters which linear map, with what input, and with what cotangent of the output."""

from curvax.taps.find import Entries as Entries
from curvax.taps.find import Findings as Findings
from curvax.taps.find import find_uses as find_uses
from curvax.taps.mixing import mixing_operation as mixing_operation
from curvax.taps.tapped import tapped as tapped
from curvax.taps.tapped import zero_perturbation as zero_perturbation
from curvax.taps.uses import Use as Use
from curvax.taps.views import View as View
from curvax.taps.views import entries as entries
from curvax.taps.views import leaf as leaf
