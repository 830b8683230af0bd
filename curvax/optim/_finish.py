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
    # Ba, Grosse and Martens (2017), section 5: the divergence is `lr^2 g.u`, of the gradient and
    # its own step u, so the limit comes before older steps are mixed in.
    parts = [rule if max_kl is None else kl_clip(rule, learning_rate, max_kl)]
    # Only the number 0 leaves out the buffer: whether a traced one is 0 is not known here.
    if not (isinstance(momentum, int | float) and momentum == 0):
        parts.append(optax.trace(momentum))
    # Loshchilov and Hutter (2019), algorithm 2: after curvature and momentum, which have no part in
    # it; and before the rate, which multiplies it.
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
