"""PSGD: preconditioners that are fitted, on Lie groups, to gradients or to Hessian products."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, UInt32

from curvax._checks import (
    check_at_least,
    check_choice,
    check_count,
    check_decay,
    check_integer,
    check_precision,
    describe,
)
from curvax._trees import select_slices
from curvax._types import Batch, Count, Params, PRNGKey
from curvax.estimate import normal
from curvax.kron import Layout, block_matrices
from curvax.kron._layout import Block
from curvax.kron._vector_layout import with_columns
from curvax.objective import Objective
from curvax.optim._estimating import estimating
from curvax.optim._finish import finish
from curvax.optim._matrices import (
    ByBlock,
    Matrices,
    MatrixBlock,
    MatrixMethod,
    layout_reader,
    scale_by_matrices,
)
from curvax.optim._matrix_parts import (
    Decay,
    ScaleRule,
    average,
    debiased,
    rms_at_most,
    scaled,
)
from curvax.optim._psgd_groups import FitStep, Group, kronecker_group, low_rank_group
from curvax.optim._refresh import Interval
from curvax.optim._rule import zero_count
from curvax.products import hvp

FIT_TO = ("momentum", "gradient", "hessian")
"""What the preconditioner may be fitted to."""

NOISE = 2.0**-11.5
"""The root of float32's precision: how much of the mean of |h| is added to h as noise."""


class HessianPair(NamedTuple):
    """A probe of the Hessian of one block, `[s, i, o]` each.

    Attributes:
      probe: v, standard normal numbers.
      product: the block's part of H v.
    """

    probe: Matrices
    product: Matrices


class PsgdStatistics(NamedTuple):
    """What a fit reads of one block.

    Attributes:
      momentum: the average of gradients, `[s, i, o]`.
      gradient: the latest gradient, if that is fitted to; else None.
      is_zero: whether the latest gradient is zero, `[s]`; None for the fit to Hessian products.
      probe_seed: the seed of the probes; None likewise.
      num_steps: steps before this one; None likewise.
    """

    momentum: Matrices
    gradient: Matrices | None
    is_zero: Bool[Array, " s"] | None
    probe_seed: UInt32[Array, ""] | None
    num_steps: Any


def scale_by_psgd(
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    fit_rate: float | Float[Array, ""] = 0.1,
    refresh_every: Interval | None = None,
    fit_to: str = "momentum",
    rank: int | None = None,
    bound_decay: float = 0.9,
    scale: ScaleRule | None = None,
    seed: int | UInt32[Array, ""] = 0,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by a fitted `P = Q'Q`, `U = P M` for the momentum `M <- b1 M + (1 - b1) V`.

    For every matrix V `[i, o]` of the gradient `Q = Q_left x Q_right` of two upper triangular
    factors, so that `U = Q_left' Q_left M Q_right' Q_right`. A probe v of normal numbers and its h
    move them by one step on `|A|^2 + |B|^2`,

      A = Q_left h Q_right',   B = Q_left^-T v Q_right^-1,
      Q_left  <- Q_left  - fit_rate / L_left  triu(A A' - B B') Q_left,
      Q_right <- Q_right - fit_rate / L_right triu(A'A - B'B) Q_right,

    both from the old ones; the first pair also sets their size, so that `|A| = |B|`. What h is says
    what P becomes, as well as Q can:

    | `fit_to`   | h                                | P                            |
    |------------|----------------------------------|------------------------------|
    | "momentum" | M, free of bias, and noise       | `E[M M']^-1/2`, whitening    |
    | "gradient" | V and noise                      | `E[V V']^-1/2`, whitening    |
    | "hessian"  | `H v`, passed as `curvature=`    | the inverse of `|H|`, Newton |

    The noise is `2^-11.5 mean|h| v`, which limits P where h is zero. With H positive definite, all
    products agree on Q where P is the inverse of H, and fits end there exactly; otherwise they go
    on by `fit_rate` as the probes differ. L bounds the norm of `A A' +
    B B'`: by two steps of power iteration from the largest row, at least 0.7 of the norm in
    practice; for matrices of one column by the trace `|a|^2 + |b|^2`; of diagonal factors by the
    largest entry.

    Args:
      layout: the matrices: `curvax.matrix_layout(params)`, `curvax.kron_layout(objective, params,
        batch)`, or `curvax.kron.vector_layout(params)` for one Q of all params together, triangular
        or diagonal; None reads them from shapes. A diagonal side has a diagonal Q; a side that is
        "identity" has none.
      b1: decay of the momentum M.
      fit_rate: the step of a fit, in (0, 1]. For products with a fixed definite H it may be near 1;
        0.1 averages over about ten probes, as sampled gradients need.
      refresh_every: number of steps between fits, or a schedule of it; step 0 fits. None is
        `curvax.optim.psgd_interval()`. For "hessian" it is the estimator's, and None here.
      fit_to: "momentum", "gradient" or "hessian".
      rank: r, for `Q = (I + U V') diag(d)` with U and V `[i o, r]` in place of the Kronecker
        product: with `curvax.kron.vector_layout(params)` for all params together.
      bound_decay: the decay c in `L <- max(l, c L + (1 - c) l)` over bounds l; 0 takes the latest.
      scale: how long the steps are; by default `curvax.optim.rms_at_most(1.1)`.
      seed: the seed of the probes. Two of these rules in one chain need two seeds; it may be
        traced.
      fallback: the rule for what is in no matrix. By default vectors and scalars have a diagonal Q,
        each of its own, and what a matrix leaves over of a leaf follows `optax.scale_by_adam(b1)`.

    Returns:
      `optax.GradientTransformationExtraArgs`; its state is a `curvax.optim.ScaleByMatricesState`.
      Where a fit fails, the last good Q goes on and `state.info.num_failures` counts. For "hessian"
      `curvature=` is what `curvax.optim.hessian_pairs` returns, and until the first one the updates
      are zero.

    Raises:
      ValueError: A number is out of its range, `fit_to` is unknown, `refresh_every` comes with
        "hessian", or updates or the curvature are of another layout.

    Cost: `2 i o (i + o)` multiplications a matrix and step, and `3 i o (i + o) + i^3 + o^3` for a
      fit. Memory: `i^2 + o^2 + i o` floats a matrix, and `i o` for "gradient"; with a rank `2 (r +
      1) i o`.

    Example: one dense P of all params, fitted to products with the Hessian diag(4, 1/2).
      >>> import jax, jax.numpy as jnp, curvax
      >>> layout, hessian = curvax.kron.vector_layout(jnp.zeros(2)), jnp.array([4.0, 0.5])
      >>> rule = curvax.optim.scale_by_psgd(layout, b1=0.0, fit_rate=0.5, fit_to="hessian")
      >>> def step(state, key):
      ...     v = jax.random.normal(key, (1, 2, 1))
      ...     pair = curvax.optim.HessianPair(v, hessian[:, None] * v)
      ...     updates, state = rule.update(hessian, state, curvature={"params": pair})
      ...     return state, updates
      >>> keys = jax.random.split(jax.random.key(0), 400)
      >>> _, updates = jax.lax.scan(step, rule.init(jnp.zeros(2)), keys)
      >>> [round(x, 3) for x in updates[-1].tolist()]  # g / h
      [1.0, 1.0]

    References: Li (2018), Preconditioned stochastic gradient descent,
      https://arxiv.org/abs/1512.04202; Li (2024), Stochastic Hessian fittings with Lie groups,
      https://arxiv.org/abs/2402.11858; the authors' and the JAX code for defaults.

    Deviates: the two sides are balanced in every fit that takes place, not at random, which changes
      rounding alone; a matrix whose h is zero keeps its Q, which would grow without limit; the
      interval between fits is a function of the step, not a counter; the diagonal of a low-rank Q
      is moved from the left, `Q <- diag(c) Q`, after which U and V are moved, each at every fit.
    """
    check_choice("fit_to", fit_to, FIT_TO)
    check_decay(b1=b1, bound_decay=bound_decay)
    check_precision(b1=b1, fit_rate=fit_rate)
    _check_unit(fit_rate=fit_rate)
    check_integer(0, 2**32 - 1, seed=seed)
    if rank is not None:
        check_count(1, rank=rank)
    if fit_to == "hessian" and refresh_every is not None:
        raise ValueError(
            f"refresh_every={refresh_every!r} is for fits to gradients; one to Hessian products "
            "takes place whenever `curvature=` is passed. Leave it out here, and give the interval "
            "to curvax.estimating(rule, estimator, curvature_every=...)."
        )
    group = kronecker_group() if rank is None else low_rank_group(rank)
    fit_step = FitStep(fit_rate, bound_decay)
    method = _psgd_method(group, fit_step, b1, fit_to, scale or rms_at_most(), seed)
    interval = psgd_interval() if refresh_every is None else refresh_every
    if fallback is not None:
        return scale_by_matrices(layout, method, interval, fallback)
    adam = optax.scale_by_adam(b1)
    return scale_by_matrices(layout, method, interval, adam, edit_layout=with_columns)


def psgd(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective | None = None,
    layout: Layout | None = None,
    b1: float | Float[Array, ""] = 0.9,
    fit_rate: float | Float[Array, ""] = 0.1,
    refresh_every: Interval | None = None,
    rank: int | None = None,
    max_kl: float | None = 1e-3,
    weight_decay: optax.ScalarOrSchedule | None = None,
    seed: int | UInt32[Array, ""] = 0,
) -> optax.GradientTransformationExtraArgs:
    """PSGD: whitened momentum without an objective, steps of Newton's kind with one.

    Without an objective this is `scale_by_psgd(layout, b1, fit_rate, refresh_every)`, then
    decoupled weight decay and the learning rate. With one, P is fitted to products with the
    Hessian,
    ```
    def estimator(params, batch, key):
        return hessian_pairs(objective, params, batch, key, layout)

    estimating(scale_by_psgd(layout, b1, fit_rate, fit_to="hessian"), estimator, refresh_every)
    ```
    in place of that rule, and its steps are limited by `max_kl`.

    Args:
      learning_rate: a number or a schedule. Without an objective a third to a fifth of Adam's; with
        one a fraction of Newton's step, such as 0.1.
      objective: the `curvax.Objective` that is minimized; None whitens gradients.
      layout: the matrices, see `curvax.scale_by_psgd`; None reads them from shapes.
      b1: decay of the momentum.
      fit_rate: the step of a fit, in (0, 1].
      refresh_every: number of steps between fits, or a schedule of it; None is
        `curvax.optim.psgd_interval()`.
      rank: rank of the update of a diagonal Q, in place of Kronecker products.
      max_kl: with an objective, the limit of `learning_rate^2 u' P^-1 u` for a step u, twice its
        curvature term in a quadratic model, see `curvax.kl_clip`; None for no limit.
      weight_decay: decoupled, `params -= learning_rate weight_decay params`; None leaves it out.
      seed: the seed of the probes.

    Returns:
      `optax.GradientTransformationExtraArgs`; call `update(grads, state, params)`, with an
      objective `update(grads, state, params, batch=batch)`.

    Raises:
      ValueError: as `scale_by_psgd` does; or, at trace time, with an objective `batch=` is missing.

    Cost: that of `scale_by_psgd`; with an objective also a Hessian product, about 3 gradients with
      its building, at each fit.

    Example: a saddle is left along negative curvature, since P is the inverse of |H|.
      >>> import jax, jax.numpy as jnp, optax, curvax
      >>> value = curvax.losses.from_function(lambda f, y: jnp.mean(f))
      >>> saddle = lambda w, x: x * (2 * w[0] ** 2 - w[1] ** 2 / 2)
      >>> objective, batch = curvax.Objective(saddle, value), (jnp.ones(1), jnp.ones(1))
      >>> layout = curvax.kron.vector_layout(jnp.zeros(2))
      >>> tx = curvax.optim.psgd(0.1, objective, layout, b1=0.0, max_kl=None)
      >>> w = jnp.array([1.0, 0.1])
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     gradient = jax.grad(objective)(w, batch)
      ...     updates, state = tx.update(gradient, state, w, batch=batch)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(40):
      ...     w, state = step(w, state)
      >>> bool(abs(w[0]) < 0.2), bool(abs(w[1]) > 1)
      (True, True)

    References: see `scale_by_psgd`.
    """
    if objective is None:
        rule = scale_by_psgd(layout, b1, fit_rate, refresh_every, rank=rank, seed=seed)
        # Whitened steps have no quadratic model whose gain could be limited.
        return finish(rule, learning_rate, weight_decay=weight_decay)
    of_hessian = objective

    def estimator(params: Params, batch: Batch, key: PRNGKey) -> dict[str, HessianPair]:
        return hessian_pairs(of_hessian, params, batch, key, layout)

    rule = scale_by_psgd(layout, b1, fit_rate, fit_to="hessian", rank=rank, seed=seed)
    interval = psgd_interval() if refresh_every is None else refresh_every
    rule = estimating(rule, estimator, interval, seed)
    return finish(rule, learning_rate, max_kl=max_kl, weight_decay=weight_decay)


def hessian_pairs(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    layout: Layout | None = None,
    damping: float | Float[Array, ""] = 0.0,
) -> dict[str, HessianPair]:
    """Draw a probe v like params, and return v and `H v + damping v` for each block.

    Args:
      objective: the `curvax.Objective` whose Hessian H is.
      params: pytree of float arrays.
      batch: the batch of the objective.
      key: the key of v, of independent standard normal numbers.
      layout: the layout of the rule `curvax.scale_by_psgd`.
      damping: in the unit of an eigenvalue of H.

    Returns:
      A `HessianPair` for each block, by name, in at least float32. The probe is of all params at
      once, so that h of a block has the other blocks' curvature in it: P of a block is the inverse
      root of a diagonal block of `H^2`.

    Cost: a Hessian product, about 3 gradients with its building.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.zeros((2, 1)))
      >>> (pair,) = curvax.optim.hessian_pairs(objective, w, batch, jax.random.key(0)).values()
      >>> bool(jnp.allclose(pair.product, pair.probe / 2))  # H = I / 2
      True

    References: Li (2018), https://arxiv.org/abs/1512.04202, section III.
    """
    # The blocks of the rule, by the names that it has for them.
    matrices = layout_reader(layout, with_columns)(params, "params")
    probe = normal(key, params)
    probes = block_matrices(matrices, probe)
    products = block_matrices(matrices, hvp(objective, params, batch)(probe))
    pairs = {}
    for name, v in probes.items():
        # Here, where numbers are wide: a small damping would be lost in 16 bits.
        pairs[name] = HessianPair(v, products[name] + damping * v)
    return pairs


def psgd_interval(
    flat: int = 500, decay: float = 0.001, probability: float = 0.03
) -> Callable[[Count], Any]:
    """Return a schedule of intervals between fits that is 1 at first and grows exponentially.

    At step t it is `ceil(1 / p)` with `p = clip(exp(-decay (t - flat)), probability, 1)`: every
    step fits for the first `flat` steps, and by default every 34th from step 4,000 on.

    Args:
      flat: number of steps that all fit.
      decay: how fast p falls.
      probability: the smallest p.

    Returns:
      A schedule for `refresh_every`.

    Raises:
      ValueError: A number is below 0, or the probability is 0 or above 1.

    Example:
      >>> from curvax.optim import psgd_interval
      >>> [int(psgd_interval()(step)) for step in (0, 500, 501, 1500, 10_000)]
      [1, 1, 2, 3, 34]
    """
    check_at_least(0, flat=flat, decay=decay)
    _check_unit(probability=probability)

    def interval(step: Count) -> Any:
        exponent = decay * (jnp.asarray(step, jnp.float32) - flat)
        # 1 / p, by the inverse of both limits; the exponential itself could overflow.
        growth = jnp.exp(jnp.clip(exponent, 0, -math.log(probability)))
        return jnp.ceil(growth).astype(jnp.int32)

    return interval


def draw_probe(seed: Any, count: Count, name: str, like: Matrices) -> Matrices:
    """Draw the probe of a block in one step, which depends on nothing else."""
    # By its name, not by its place among the blocks, which a mask around the rule changes.
    number = zlib.crc32(name.encode())
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), number)
    return jax.random.normal(key, like.shape, like.dtype)


def _psgd_method(
    group: Group, fit_step: FitStep, b1: Decay, fit_to: str, scale: ScaleRule, seed: Any
) -> MatrixMethod:
    """Return what PSGD does with every matrix."""
    is_whitening = fit_to != "hessian"

    def init(block: Block, V: Matrices) -> MatrixBlock:
        number = zlib.crc32(block.name.encode())
        key = jax.random.fold_in(jax.random.key(seed), number)
        statistics = PsgdStatistics(
            momentum=jnp.zeros_like(V),
            gradient=jnp.zeros_like(V) if fit_to == "gradient" else None,
            is_zero=jnp.ones(len(V), bool) if is_whitening else None,
            probe_seed=jnp.array(seed, jnp.uint32) if is_whitening else None,
            num_steps=zero_count() if is_whitening else None,
        )
        return MatrixBlock(statistics, group.init(block, V, key), scale.init(V))

    def average_all(block: Block, state: MatrixBlock, V: Matrices, count: Count) -> MatrixBlock:
        del block
        statistics = state.statistics._replace(
            momentum=average(state.statistics.momentum, V, b1),
            gradient=V if fit_to == "gradient" else None,
            is_zero=jnp.all(V == 0, axis=(1, 2)) if is_whitening else None,
            num_steps=count if is_whitening else None,
        )
        return state._replace(statistics=statistics, memory=scale.average(state.memory, V))

    def refresh(layout: Layout, statistics: ByBlock, current: ByBlock) -> ByBlock:
        fresh = {}
        for block in layout.blocks:
            h, v = noisy_target(block.name, statistics[block.name])
            fresh[block.name] = _fitted(group, current[block.name], h, v, fit_step)
        return fresh

    def noisy_target(name: str, of_block: PsgdStatistics) -> tuple[Matrices, Matrices]:
        """Return h and v for the fit to momentum or to a gradient."""
        target = of_block.gradient
        if target is None:
            target = debiased(of_block.momentum, b1, of_block.num_steps + 1)
        # While gradients are zero the momentum dies away, and a fit would follow it for long.
        is_zero = jnp.asarray(of_block.is_zero)[:, None, None]
        target = jnp.where(is_zero, 0, target)
        v = draw_probe(of_block.probe_seed, of_block.num_steps, name, target)
        # The same v: h = m + delta v is a product with a Hessian that has delta I added.
        delta = NOISE * jnp.mean(jnp.abs(target), axis=(1, 2), keepdims=True)
        return target + delta * v, v

    def take_in(state: MatrixBlock, pair: HessianPair) -> MatrixBlock:
        _check_pair(pair, state.statistics.momentum)
        fresh = _fitted(group, state.preconditioner, pair.product, pair.probe, fit_step)
        return state._replace(preconditioner=fresh)

    def step(state: MatrixBlock, V: Matrices, count: Count) -> tuple[Matrices, MatrixBlock]:
        del V
        M = debiased(state.statistics.momentum, b1, count + 1)
        U = group.apply(state.preconditioner, M)
        return scaled(scale, state.memory, U, M, count + 1), state

    if is_whitening:
        return MatrixMethod(init=init, average=average_all, step=step, refresh=refresh)
    return MatrixMethod(init=init, average=average_all, step=step, take_in=take_in)


def _fitted(group: Group, Q: Any, h: Matrices, v: Matrices, fit_step: FitStep) -> Any:
    """Fit Q to a pair; where h is zero, in all of a matrix, it stays."""
    # Zero says nothing of a scale: with |h| = 0 the fit would make Q larger without limit.
    is_zero = jnp.all(h == 0, axis=(1, 2))
    return select_slices(is_zero, Q, group.fit(Q, h, v, fit_step))


def _check_pair(pair: Any, momentum: Matrices) -> None:
    """Raise unless a pair is one, of the shape of its block."""
    wanted = list(momentum.shape)
    if not isinstance(pair, HessianPair):
        raise TypeError(
            f"curvature has {type(pair).__name__} for a block {wanted}; give it a "
            "curvax.optim.HessianPair(probe, product), as curvax.optim.hessian_pairs does."
        )
    for name, x in pair._asdict().items():
        if jnp.shape(x) != momentum.shape:
            raise ValueError(
                f"curvature: the {name} of a block {wanted} is {describe(x)}. Pass the layout of "
                "this rule to curvax.optim.hessian_pairs."
            )


def _check_unit(**values: Any) -> None:
    """Raise if a named number is concrete and outside (0, 1]."""
    for name, value in values.items():
        if isinstance(value, int | float) and not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value}.")
