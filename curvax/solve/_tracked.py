"""Solutions of systems that change a little from step to step, each improved by a few products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from curvax._checks import check_count, check_params, check_positive, describe
from curvax._host import loops_for
from curvax._trees import (
    add_scaled,
    all_finite,
    cast_like,
    keep_unless,
    out_of_range_if_negative,
)
from curvax._types import Count, Matvec, Params, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops
from curvax.solve._cg import cg
from curvax.solve._damped import check_system, damped, finished
from curvax.solve._result import Result, SolveInfo, code_of

# u: the tracked solution; H: the matrix, v: the right-hand side of this step; tau: rate


class TrackedState(NamedTuple):
    """A solution that is carried from step to step.

    Attributes:
      count: updates so far.
      solution: u, a tree like the right-hand side, in at least float32.
      residual: `|v - (H + damping I) u| / |v|` with H and v of the update that made u: the latest,
        or if that left u as it was, the one before.
      code: a `curvax.solve.Result` of the latest update, as int32. MAX_STEPS is the usual one: the
        residual falls over updates, not within one.
    """

    count: Count
    solution: Params
    residual: Scalar
    code: Int[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the latest update met the tolerance."""
        return self.code == Result.CONVERGED


def init_tracked(b: Params) -> TrackedState:
    """Return the state of no update so far, `u = 0`, for right-hand sides like b.

    For many systems: `jax.vmap(curvax.solve.init_tracked)(stacked)`.
    """
    check_params(b)
    zero = optax.tree.zeros_like(tree_at_least_float32(b))
    code = jnp.full([], Result.MAX_STEPS, jnp.int32)
    return TrackedState(jnp.zeros([], jnp.int32), zero, jnp.full([], jnp.inf, jnp.float32), code)


def tracked(
    matvec: Matvec,
    b: Params,
    *,
    state: TrackedState,
    damping: Any = 0.0,
    rate: float | Array | None = None,
    num_steps: int = 1,
    tol: float | Array = 1e-5,
) -> tuple[Params, TrackedState]:
    """Improve a solution of `(H + damping I) u = v` that an earlier step left, by a few products.

    Where H and v change slowly, as the Hessian of an inner problem does over the steps of an outer
    one, a step or two of an iteration from the last solution keep up with them, at a small part of
    the cost of a solve. With a rate they are steps of gradient descent on the quadratic, `u <- u -
    rate ((H + damping I) u - v)`, for products of mini-batches (stochastic gradients); without one
    they are steps of conjugate gradients, which need no rate, and products without noise.

    An update whose result is not finite, and one of conjugate gradients that meets negative
    curvature, leaves the solution and its residual as they were; the code tells.

    Args:
      matvec: `x -> H x` on trees like b; with gradient steps it may be that of a mini-batch.
      b: v, a tree of float arrays.
      state: what `init_tracked` or the last call returned.
      damping: a number or scalar array, at least 0, in units of an eigenvalue of H.
      rate: tau, below `2 / (lambda_max + damping)`. None stands for conjugate gradients.
      num_steps: the number of steps.
      tol: the relative residual at which the code is CONVERGED, and conjugate gradients end.

    Returns:
      u, a tree like b in its dtypes, and the new `TrackedState`, where other solvers return a
      `SolveInfo`. So it is the solver of `curvax.apps.implicit_gradient`, which then returns the
      state.

    Raises:
      ValueError: damping, tol or the rate is negative, num_steps is below 1, or trees do not fit.
      TypeError: the matvec changes dtypes, or the state is none.

    Cost: `num_steps` products and one more for the residual; conjugate gradients two more. Memory:
      one tree over steps, four within one.

    Example: two steps for each of ten updates, on one system.
      >>> import jax.numpy as jnp, curvax
      >>> matvec, b = lambda v: jnp.array([2.0, 1.0]) * v, jnp.array([2.0, 2.0])
      >>> state = curvax.solve.init_tracked(b)
      >>> for _ in range(10):
      ...     u, state = curvax.solve.tracked(matvec, b, state=state, rate=0.5, num_steps=2)
      >>> [round(x, 3) for x in u.tolist()], int(state.count), bool(state.residual < 1e-5)
      ([1.0, 2.0], 10, True)

      Hypergradients of three inner problems that share a hyperparameter, of which two are sampled
      in each step: `min_p (p - a)^2 / 2 + h p^2 / 2` for three numbers a.
      >>> import functools, jax
      >>> inner = lambda p, h, a: (p - a) ** 2 / 2 + h * p**2 / 2
      >>> outer = lambda p, h: p**2 / 2
      >>> def hypergradient(state, p, a):
      ...     solver = functools.partial(curvax.solve.tracked, state=state)
      ...     inner_of_block = lambda p, h: inner(p, h, a)
      ...     return curvax.apps.implicit_gradient(outer, inner_of_block, p, 1.0, solver=solver)
      >>> params = a = jnp.array([2.0, 4.0, 6.0])
      >>> states, sampled = jax.vmap(curvax.solve.init_tracked)(params), jnp.array([0, 2])
      >>> gradients, states = curvax.solve.update_blocks(
      ...     hypergradient, states, sampled, params[sampled] / 2, a[sampled])
      >>> gradients.tolist(), states.count.tolist()  # -p^2 / 2 each
      ([-0.5, -4.5], [1, 0, 1])

    References: the systems are those of bilevel optimization with many blocks, Hu et al. (2023),
      Blockwise stochastic variance-reduced methods with parallel speedup for multi-block bilevel
      optimization, of which only the abstract was read.

    Deviates: plain steps from the last solution, and none of that paper's sampling and recursive
      variance reduction; conjugate gradients are ours.
    """
    if not isinstance(state, TrackedState):
        raise TypeError(
            "state must be a TrackedState, as curvax.solve.init_tracked(b) returns it; got "
            f"{describe(state)}."
        )
    check_count(1, num_steps=num_steps)
    check_system(b, damping, tol, num_steps, state.solution)
    check_positive(rate=rate)
    wide, product = tree_at_least_float32(b), damped(matvec, 0.0, b)
    options = {"damping": damping, "tol": tol, "max_steps": num_steps, "x0": state.solution}
    with loops_for(matvec):
        if rate is None:
            u, info = cg(product, wide, **options)
        else:
            u, info = _descend(product, wide, rate, **options)

    # The last solution is better than a step to nowhere.
    is_bad = (info.code == Result.NOT_FINITE) | (info.code == Result.NEGATIVE_CURVATURE)
    fresh = (u, info.residual.astype(state.residual.dtype))
    last = (state.solution, state.residual)
    u, residual = keep_unless(~is_bad & all_finite(u), fresh, last)
    count = optax.safe_increment(state.count)
    return cast_like(u, b), TrackedState(count, u, residual, info.code)


def update_blocks(
    update: Callable[..., tuple[Any, Any]],
    states: PyTree[Array],
    index: Int[Array, " k"],
    *args: Any,
) -> tuple[Any, PyTree[Array]]:
    """Update the states of some blocks out of many; the others stay as they are.

    Args:
      update: the function `(state, *args) -> (result, state)` of one block.
      states: the states of all n blocks, every array with a leading axis n.
      index: the numbers of the k blocks, all different, from 0 to n - 1, `[k]`. Where it is traced
        nothing checks that: a number outside has the result of some other block, and no state
        changes for it.
      *args: trees with a leading axis k: what belongs to the blocks of the index.

    Returns:
      the results, with a leading axis k, and the states of all n blocks.

    Raises:
      ValueError: a concrete index has a number outside of 0 to n - 1, or has one twice.

    Cost: k updates under one `vmap`.

    Example: counters, of which two are increased.
      >>> import jax.numpy as jnp, curvax
      >>> add = lambda state, x: (state, state + x)
      >>> index, steps = jnp.array([2, 0]), jnp.array([5, 7])
      >>> before, states = curvax.solve.update_blocks(add, jnp.arange(4), index, steps)
      >>> before.tolist(), states.tolist()
      ([2, 0], [7, 1, 7, 3])
    """
    num_blocks = len(jax.tree.leaves(states)[0])
    _check_index(index, num_blocks)
    # A negative number would count from the end.
    safe_index = out_of_range_if_negative(jnp.asarray(index), num_blocks)
    chosen = jax.tree.map(lambda x: x.at[safe_index].get(mode="clip"), states)
    results, fresh = jax.vmap(update)(chosen, *args)

    def replace(x: Array, new: Array) -> Array:
        return x.at[safe_index].set(new, mode="drop")

    return results, jax.tree.map(replace, states, fresh)


def _check_index(index: Int[Array, " k"], num_blocks: int) -> None:
    """Raise if the index is concrete and has a number out of range, or one twice."""
    if isinstance(index, jax.core.Tracer):
        return
    numbers = np.asarray(index)
    outside = numbers[(numbers < 0) | (numbers >= num_blocks)]
    if outside.size:
        raise ValueError(
            f"index has {outside[0]}, but the states are of {num_blocks} blocks; give numbers from "
            f"0 to {num_blocks - 1}."
        )
    if len(np.unique(numbers)) < numbers.size:
        raise ValueError(
            f"index is {numbers.tolist()}, which has a block twice; only one update of a block can "
            "be stored. Give numbers that differ."
        )


def _descend(
    product: Matvec,
    v: Params,
    rate: Any,
    *,
    damping: Any,
    tol: Any,
    max_steps: int,
    x0: Params,
) -> tuple[Params, SolveInfo]:
    """Take steps of gradient descent on `u'(H + damping I)u / 2 - v'u`, all of them."""
    apply = damped(product, damping, v)

    def step(_: Any, u: Params) -> Params:
        # u <- u - tau ((H + damping I) u - v)
        residual = add_scaled(v, -1, apply(u))
        return add_scaled(u, rate, residual)

    u = lax.fori_loop(0, max_steps, fast_convs_in_loops(step), x0)
    _, info = finished(apply, u, v, jnp.int32(max_steps), jnp.int32(Result.CONVERGED), tol)
    # A residual above the tolerance is what one expects of a few steps.
    code = code_of((info.code == Result.STALLED, Result.MAX_STEPS), otherwise=info.code)
    return u, info._replace(code=code)
