"""M-FAC: preconditioning by the inverse Fisher matrix of the last m gradients."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax._checks import (
    check_choice,
    check_damping,
    check_decay,
    check_like,
    check_precision,
    is_masked,
)
from curvax._trees import all_finite, inner_product, keep_unless
from curvax._types import Count, Params, Scalar
from curvax.optim._diagonal import with_decay_and_rate
from curvax.solve._window import (
    DIVISORS,
    Window,
    init_window,
    insert_and_multiply,
    window_inverse,
    window_of,
)


class MfacInfo(NamedTuple):
    """Diagnostics of M-FAC.

    Attributes:
      num_rows: gradients in the window.
      damping: of the latest step.
      shrinkage: `damping g.u / g.g` of the latest gradient g and step u, in (0, 1]: 1 where the window says nothing of g.
      num_nonfinite: gradients (or windows given) that were not finite, so far.
    """

    num_rows: Int[Array, ""]
    damping: Scalar
    shrinkage: Scalar
    num_nonfinite: Int[Array, ""]


class ScaleByMfacState(NamedTuple):
    """State of `scale_by_mfac`.

    Attributes:
      count: steps taken.
      num_refreshes: windows given as curvature; from the first on, gradients are no longer inserted.
      curvature: the window.
      info: `MfacInfo`.
    """

    count: Count
    num_refreshes: Int[Array, ""]
    curvature: Window
    info: MfacInfo


def scale_by_mfac(
    window_size: int,
    damping: optax.ScalarOrSchedule = 1e-5,
    divisor: str = "window",
    blocks: str = "full",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition by the damped inverse Fisher matrix of a window of gradients.

    `u = (damping I + (1/N) sum_i g_i g_i')^-1 g` over the last m gradients, the newest (g itself) among them.

    A gradient that is not finite is not inserted and gives an update of NaN, which `optax.apply_if_finite` sees.

    Args:
      window_size: m.
      damping: number or schedule; in units of an eigenvalue of the Fisher.
      divisor: N. "window": m, as published, so that early on curvature counts less; "count": the gradients so far.
      blocks: "full", or "leaf" for an independent matrix for each leaf.
      dtype: the window is stored in, e.g. `jnp.bfloat16`; None: that of params, but at least float32. Inner products
        are in at least float32, always.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params=None, *, curvature=None, damping=...)`.
      `curvature`: a tree like updates with a leading axis of at most m, to be the window instead, for instance
      `curvax.per_example_grads` of a batch; once it has been given, gradients are no longer inserted.

    Raises:
      ValueError: a window below 1, damping that is not positive, unknown names, curvature or updates unlike the window.

    Cost: two passes over the m d stored numbers and one row written, `m^3 / 3` for the solve. Memory: m d numbers.

    Example: along a gradient that comes again and again, the step is the Newton step of `F = damping + g^2`.
      >>> import jax.numpy as jnp, curvax
      >>> tx = curvax.scale_by_mfac(window_size=2, damping=0.5, divisor="count")
      >>> state = tx.init(jnp.zeros(2))
      >>> u, state = tx.update(jnp.array([2.0, 0.0]), state)
      >>> u, state = tx.update(jnp.array([2.0, 0.0]), state)
      >>> [round(x, 4) for x in u.tolist()]                                              # 2 / (0.5 + 2^2)
      [0.4444, 0.0]

      A window of per-example gradients, renewed every ten steps:
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> rows = lambda params, batch, key: curvax.per_example_grads(objective, params, batch)
      >>> tx = curvax.estimating(curvax.scale_by_mfac(window_size=64, damping=1e-2), rows, curvature_every=10)

    References: Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information, section 3.2.

    Deviates: solves with a Cholesky factor in place of the recurrences, to the same result; damping is at least the
      precision of the floats times the trace of the Fisher.
    """
    check_damping(damping)
    check_precision(damping=damping)
    check_choice("divisor", divisor, DIVISORS)
    init_window(jnp.zeros(1), window_size, blocks=blocks)  # checks both

    def init(params: Params) -> ScaleByMfacState:
        count, number = lambda: jnp.zeros([], jnp.int32), lambda: jnp.zeros([], jnp.float32)
        window = init_window(params, window_size, blocks=blocks, dtype=dtype)
        return ScaleByMfacState(
            count(), count(), window, MfacInfo(count(), number(), number(), count())
        )

    def update(
        updates: PyTree,
        state: ScaleByMfacState,
        params: Params | None = None,
        *,
        curvature: PyTree | None = None,
        damping: Any = damping,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByMfacState]:
        del params, extra
        strength = damping(state.count) if callable(damping) else damping
        good = all_finite(updates)
        if curvature is None:
            inserted = good & (state.num_refreshes == 0)
            steps, window = insert_and_multiply(
                state.curvature, updates, inserted, strength, divisor
            )
            finite, num_refreshes = good, state.num_refreshes
        else:
            given = window_of(
                _rows(curvature, updates), size=window_size, blocks=blocks, dtype=dtype
            )
            finite = good & all_finite(curvature)
            window = keep_unless(finite, given, state.curvature)
            steps = window_inverse(window, strength, divisor=divisor)(updates)
            num_refreshes = state.num_refreshes + finite

        amplitude = jnp.where(good, jnp.where(window.count > 0, 1, 0), jnp.nan)
        steps = jax.tree.map(
            lambda s, u: jnp.where(amplitude == 0, 0, amplitude * s).astype(u.dtype), steps, updates
        )
        squared = inner_product(updates, updates)
        shrinkage = strength * inner_product(updates, steps) / jnp.where(squared > 0, squared, 1)
        latest = lambda new, old: jnp.where(good, jnp.asarray(new, old.dtype), old)
        info = MfacInfo(
            jnp.minimum(window.count, window_size),
            latest(strength, state.info.damping),
            latest(shrinkage, state.info.shrinkage),
            state.info.num_nonfinite + ~finite,
        )
        count = jnp.where(good, optax.safe_increment(state.count), state.count)
        return steps, ScaleByMfacState(count, num_refreshes, window, info)

    return optax.GradientTransformationExtraArgs(
        init, cast(optax.TransformUpdateExtraArgsFn, update)
    )


def mfac(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int = 64,
    damping: optax.ScalarOrSchedule = 1e-5,
    momentum: float | Float[Array, ""] = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    divisor: str = "window",
) -> optax.GradientTransformationExtraArgs:
    """M-FAC: natural gradient with the Fisher matrix of the last m gradients.

    `u = F^-1 g` by `scale_by_mfac`; `mu = momentum mu + (1 - momentum) u`; `params -= learning_rate (mu + weight_decay
    params)`.

    Args:
      learning_rate: number or schedule.
      window_size: m; the published runs take 512 or 1024. Its m d numbers are most of what is kept in memory.
      damping: number or schedule; in units of an eigenvalue of the Fisher, see `scale_by_mfac`.
      momentum: decay of the average of steps.
      weight_decay: decoupled; number or schedule.
      divisor: "window" as published, or "count".

    Returns:
      `optax.GradientTransformationExtraArgs`; needs gradients only: `update(grads, state, params)`.

    Raises:
      ValueError, TypeError: as `scale_by_mfac`.

    Cost: two passes over the m d stored numbers a step, no more gradients. Memory: m d floats.

    Example:
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 100.0]) * w**2) / 2
      >>> params, tx = jnp.ones(2), curvax.mfac(0.5, window_size=8, damping=10.0, divisor="count")
      >>> state = tx.init(params)
      >>> step = jax.jit(lambda w, state: tx.update(jax.grad(loss)(w), state, w))
      >>> for _ in range(200):
      ...     updates, state = step(params, state)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 0.1)  # of 50.5
      True

      Weight decay as published, coupled (it enters the window with the gradient), and the window in bfloat16:
      >>> rule = curvax.scale_by_mfac(window_size=512, dtype=jnp.bfloat16)
      >>> tx = optax.chain(optax.add_decayed_weights(3e-3), rule, optax.scale_by_learning_rate(1e-3))

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, algorithm of section 3.2; the reference code for defaults.

    Deviates: weight decay is decoupled, as everywhere in curvax; the reference code's default of m is 1024.
    """
    check_decay(momentum=momentum)
    still = isinstance(momentum, int | float) and momentum == 0
    rule = scale_by_mfac(window_size, damping, divisor)
    averaged = rule if still else optax.chain(rule, optax.ema(momentum, debias=False))
    return with_decay_and_rate(averaged, weight_decay, learning_rate)


def _rows(curvature: PyTree, updates: PyTree) -> PyTree[Array]:
    """Keep the leaves that the updates hold; check that all have one more, leading axis."""
    number = max((x.shape[0] for x in jax.tree.leaves(curvature) if x.ndim), default=0)
    like = jax.tree.map(lambda u: jax.ShapeDtypeStruct((number, *u.shape), u.dtype), updates)
    check_like(curvature, like, "curvature", "a stack of updates")
    return jax.tree.map(
        lambda u, c: u if is_masked(u) else c, updates, curvature, is_leaf=is_masked
    )
