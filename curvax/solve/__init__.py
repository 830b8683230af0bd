"""Solves with curvature on pytrees."""

from curvax.solve.collect import fisher_window as fisher_window
from curvax.solve.elements import Whitened as Whitened
from curvax.solve.elements import inverse_diagonal as inverse_diagonal
from curvax.solve.elements import inverse_element as inverse_element
from curvax.solve.elements import map_inverse_blocks as map_inverse_blocks
from curvax.solve.elements import whiten as whiten
from curvax.solve.window import Window as Window
from curvax.solve.window import empty_window as empty_window
from curvax.solve.window import insert as insert
from curvax.solve.window import window_inverse as window_inverse
from curvax.solve.window import window_of as window_of
