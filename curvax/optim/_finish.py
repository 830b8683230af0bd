"""From a rule to an optimizer: limit of the step, momentum, weight decay, learning rate."""

from __future__ import annotations

from typing import Any

import optax

from curvax._checks import check_decay
from curvax.optim._kl_clip import kl_clip


def finish(
    rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    max_kl: float | None = None,
    momentum: Any = 0.0,
    weight_decay: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Finish a rule: `m = momentum m + u`, `params -= learning_rate (m + weight_decay params)`.

    Args:
      rule: the preconditioned gradient u.
      learning_rate: a number or a schedule.
      max_kl: the limit of `curvax.kl_clip` on u; None for no limit.
      momentum: the decay of the sum of past steps. The number 0 leaves out the buffer.
      weight_decay: decoupled from the curvature; None leaves it out.
    """
    check_decay(momentum=momentum)
    parts = [rule if max_kl is None else kl_clip(rule, learning_rate, max_kl)]
    if not (isinstance(momentum, int | float) and momentum == 0):
        parts.append(optax.trace(momentum))
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
