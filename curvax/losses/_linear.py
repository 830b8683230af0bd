"""Losses that are linear in the outputs, for which there is no Gauss-Newton matrix."""

from __future__ import annotations

from curvax._jaxpr import may_depend_on_arguments
from curvax._types import Outputs, Targets
from curvax.losses._loss import Loss


def check_curved(
    loss: Loss,
    outputs: Outputs,
    targets: Targets,
) -> None:
    """Raise if the curvature in the outputs is zero, whatever the outputs are.

    Without this check the Gauss-Newton matrix `J' S J` would be zero without a word, and a step the
    gradient divided by the damping.
    """
    _check(loss, outputs, targets, "this loss is")


def _check(
    loss: Loss,
    outputs: Outputs,
    targets: Targets,
    which: str,
) -> None:
    """Raise if the loss, or one of its heads, has no curvature; `which` begins the message."""
    # A head without curvature would be hidden by those that have some.
    for name, _, head in loss.heads:
        _check(head, outputs[name], targets[name], f"head {name!r} of this loss is")
    if loss.heads:
        return

    def product(v: Outputs) -> Outputs:
        return loss.curvature_product(outputs, targets, v)

    # Where `S v` does not depend on v it is zero: JAX has found that the gradient is constant.
    if may_depend_on_arguments(product, outputs):
        return
    raise TypeError(
        f"{which} linear in the model's outputs, or linear piece by piece, so that its curvature "
        "there and the Gauss-Newton matrix are zero: a step would be the gradient / damping. Take "
        'the empirical Fisher (fisher="empirical" of curvax.kfac, ekfac and kron_factors; '
        "curvax.empirical_fishervp), the Hessian (curvax.newton_cg, curvax.hvp), or state a metric "
        "in the outputs: curvax.losses.from_function(value, curvature_product=...)."
    )
