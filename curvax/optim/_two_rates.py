"""Two learning rates: one for the matrices of a layout, one for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import optax
from jaxtyping import Array, PyTree

from curvax._types import Params
from curvax.kron import Layout, block_matrices, with_block_matrices
from curvax.optim._matrices import layout_reader
from curvax.optim._rule import transformation


class TwoRatesState(NamedTuple):
    """State of two learning rates.

    Attributes:
      matrices: of the rate for matrices.
      fallback: of the rate for everything else.
    """

    matrices: Any
    fallback: Any


def finish_with_two_rates(
    rule: optax.GradientTransformation,
    layout: Layout | None,
    learning_rate: optax.ScalarOrSchedule,
    fallback_learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule | None = None,
    edit_layout: Callable[[Layout], Layout] = lambda layout: layout,
) -> optax.GradientTransformationExtraArgs:
    """Finish a rule: `params -= rate (u + weight_decay params)`, with a rate for each place.

    Args:
      rule: the steps u.
      layout: the matrices, as the rule has them; None reads them from shapes.
      learning_rate: of entries in matrices; a number or a schedule.
      fallback_learning_rate: of all other entries; a number or a schedule.
      weight_decay: decoupled; each part decays with its rate. None leaves it out.
      edit_layout: what the rule changes in a layout.
    """
    parts = [rule]
    # As in `finish`: after the rule, which has no part in it, and before the rates.
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay))
    rates = _scale_by_two_rates(layout, learning_rate, fallback_learning_rate, edit_layout)
    return optax.chain(*parts, rates)


def _scale_by_two_rates(
    layout: Layout | None,
    learning_rate: optax.ScalarOrSchedule,
    fallback_learning_rate: optax.ScalarOrSchedule,
    edit_layout: Callable[[Layout], Layout],
) -> optax.GradientTransformationExtraArgs:
    """Multiply matrices by minus one rate, and everything else by minus another."""
    layout_of = layout_reader(layout, edit_layout)
    of_matrices = optax.scale_by_learning_rate(learning_rate)
    of_others = optax.scale_by_learning_rate(fallback_learning_rate)

    def init(params: Params) -> TwoRatesState:
        # A number has no state, a schedule counts steps.
        return TwoRatesState(of_matrices.init(params), of_others.init(params))

    def update(
        updates: PyTree, state: TwoRatesState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, TwoRatesState]:
        del params, extra
        here = layout_of(updates, "updates")
        steps, matrices_state = of_matrices.update(block_matrices(here, updates), state.matrices)
        others, others_state = of_others.update(updates, state.fallback)
        # A leaf may be in a matrix in part: its other entries keep what the fallback's rate made.
        stepped = with_block_matrices(here, cast(dict[str, Array], steps), others)
        return stepped, TwoRatesState(matrices_state, others_state)

    return transformation(init, update)
