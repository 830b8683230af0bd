"""Solves with curvature on pytrees."""

from curvax.solve.window import Window as Window
from curvax.solve.window import empty_window as empty_window
from curvax.solve.window import insert as insert
from curvax.solve.window import window_inverse as window_inverse
from curvax.solve.window import window_of as window_of
