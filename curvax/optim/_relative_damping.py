"""Damping as a fraction of the mean eigenvalue of the curvature, for Kronecker methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import optax

from curvax._checks import check_damping
from curvax._types import Count, Scalar
from curvax.kron import Factors, Layout
from curvax.kron._two_products import combined_factors
from curvax.optim._rule import resolve_schedule


@dataclass(frozen=True)
class RelativeDamping:
    """A damping that is a fraction of the mean eigenvalue of the curvature.

    With C the curvature of the d parameters that are not masked out, as the running averages have
    it, the damping of a step
    is `fraction tr C / d`. It does not change when the loss is multiplied by a number; an absolute
    one would have to be multiplied too. Eigenvalues far below that fraction of their mean are
    damped, those above are not.

    A number such as 1e-2 is the better choice where the curvature goes to zero as training goes on,
    as with a loss that vanishes on all data: a fraction follows it there, and steps stay long.

    It is for `scale_by_kfac`, `scale_by_ekfac`, `kfac` and `ekfac`.

    Attributes:
      fraction: a positive number, or a schedule of the step.

    Raises:
      ValueError: The fraction is not positive.

    Example: the same step for a loss and for a hundred times that loss.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.optim import RelativeDamping
      >>> x = jnp.array([[1.0, 2.0], [0.0, 3.0]])
      >>> def first_step(scale):
      ...     loss = curvax.losses.from_function(lambda f, y: scale * jnp.mean((f - y) ** 2))
      ...     objective = curvax.Objective(lambda w, x: x @ w, loss)
      ...     params, batch = jnp.zeros((2, 1)), (x, jnp.ones((2, 1)))
      ...     layout = curvax.kron_layout(objective, params, batch)
      ...     rule = curvax.scale_by_kfac(layout, RelativeDamping(0.1))
      ...     factors = curvax.kron_factors(
      ...         objective, layout, params, batch, jax.random.key(0), fisher="exact")
      ...     gradient = jax.grad(objective)(params, batch)
      ...     return rule.update(gradient, rule.init(params), curvature=factors)[0]
      >>> bool(jnp.allclose(first_step(1.0), first_step(100.0), rtol=1e-4))
      True
    """

    fraction: optax.ScalarOrSchedule

    def __post_init__(self) -> None:
        check_damping(self.fraction)

    def as_schedule(self) -> Callable[[Count], RelativeDamping]:
        """Return the schedule that a rule resolves, as it does every schedule of a damping."""

        def resolved(count: Count) -> RelativeDamping:
            return RelativeDamping(resolve_schedule(self.fraction, count))

        return resolved


def absolute_damping(damping: RelativeDamping | Scalar, layout: Layout, factors: Factors) -> Scalar:
    """Return a damping in units of an eigenvalue of the curvature."""
    if not isinstance(damping, RelativeDamping):
        return jnp.asarray(damping, jnp.result_type(float))
    trace, dimension = jnp.zeros([], jnp.result_type(float)), 0
    for block in layout.blocks:
        _, inputs, outputs = block.shape
        a, g = combined_factors(block.structures, factors.blocks[block.name])
        # tr(A x G) = tr A tr G, slice by slice
        trace += jnp.sum(block.fill * a.trace() * g.trace())
        # A penalty adds c to every eigenvalue of a slice.
        shift = factors.blocks[block.name].shift
        if shift is not None:
            trace += inputs * outputs * jnp.sum(block.fill * shift.mean)
        dimension += inputs * outputs * block.fill.sum()
    for path, entries in factors.diagonal.items():
        # A leaf's diagonal has all its entries; those in blocks have been counted there.
        uncovered = layout.uncovered(path)
        trace += jnp.sum(entries.mean, where=uncovered)
        dimension += int(uncovered.sum())
    mean = trace / max(dimension, 1)
    # Without any curvature (0) there is no scale; by 1 the step is the gradient itself.
    fraction = jnp.asarray(damping.fraction)
    return jnp.where(mean > 0, fraction * mean, 1.0)
