"""Sums over times of which the factors of a recurrent kernel are made: of a time and the next.

Martens, Ba and Johnson (2018) take the inputs a_t and cotangents g_t of a kernel that is used at
every time for chains, whose moments `A_k = E[a_(t+k) a_t']` follow from those of lag 0 and lag 1.
Times are the positions of one example in their order: those of a `scan` over time or of the axis of
a sequence, or, of a loop that Python has unrolled, the uses of the kernel one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._types import at_least_float32
from curvax.capture import PerUseArray
from curvax.capture._uses import Use
from curvax.kron._factors import WeightedMean
from curvax.kron._kron_factor import matmul
from curvax.kron._layout import Block
from curvax.kron._statistics import Counted, PerUse, flat, with_one

# b: examples, s: stack, t: times, i: inputs (with the 1 of a bias), o: outputs


class InputLags(NamedTuple):
    """What the inputs of a block over time say beside A.

    Attributes:
      moment: the sum over times of `a_(t+1) a_t'`, `[s, i, i]`.
      length: how many times of an example count, as a mean over examples, `[s]`.
    """

    moment: Array
    length: WeightedMean


def input_lags(block: Block, inputs: PerUse, counted: list[Counted]) -> InputLags:
    """Sum `a_(t+1) a_t'` over the times of every example, and count them.

    Args:
      block: the block, over time.
      inputs: the inputs of its uses.
      counted: which times count; a pair does if both of its times do.
    """
    rows = []
    for use, a, m in zip(block.uses, inputs, counted, strict=True):
        # `where`, not a product: inputs that do not count may be infinite.
        counting = jnp.where(m[..., None] > 0, a.astype(m.dtype), 0)
        rows.append(with_one(block, use, counting, m))
    sequence = jnp.concatenate(rows, axis=2)
    # An example of which no time counts, such as a row of padding, has no length.
    lengths = jnp.sum(jnp.concatenate(counted, axis=2), axis=2)
    number = jnp.sum(lengths > 0, axis=0).astype(lengths.dtype)
    length = WeightedMean(jnp.sum(lengths, axis=0), number)
    return InputLags(_lag_moment(sequence, sequence), length)


def output_lags(g: PerUse, h: PerUse | None) -> Float[Array, "s o o"]:
    """Sum `g_(t+1) h_t'` of the cotangents of a block over the times of every example."""
    later = _joined(g)
    # Pairs u_k, v_k with `S = sum_k u_k v_k'` have `sum_k J_(t+1)' u_k v_k' J_t` for their sum: no
    # symmetric part is to be taken, as of lag 0, since the lag is not symmetric.
    earlier = later if h is None else _joined(h)
    return _lag_moment(later, earlier)


def check_times(block: Block, uses: Sequence[Use]) -> None:
    """Raise unless the positions of one example are times, in their order.

    Args:
      block: the block, over time.
      uses: its uses in the program of the model for one example.
    """
    problem = _not_times(uses)
    if problem is None:
        return
    raise ValueError(
        f'{block.name} has sharing="{block.sharing}", for which the positions of one example must '
        f"be the times of a sequence: it is {problem}. Use "
        f'layout.edit("{block.leaves[0]}", sharing="expand").'
    )


def _not_times(uses: Sequence[Use]) -> str | None:
    """Say why the positions of uses are no times; None if they are."""
    if any(_rearranges(use) for use in uses):
        return "behind groups or tied constants that count positions which are no times"
    axes = [[size for size in use.position_sizes if size > 1] for use in uses]
    first, *others = axes
    # A loop that is unrolled has a use for every time, each with one position.
    if others and any(axes):
        shapes = " and ".join(map(str, axes))
        return f"used {len(uses)} times, at positions {shapes}, which is no one sequence"
    if not others and not first:
        return "used at one position of an example only, which has no next"
    if not others and len(first) > 1:
        return f"used at positions {first} of an example, and which axis is time is not known"
    return None


def _rearranges(use: Use) -> bool:
    """Tell whether a use has other positions than the axes of its output say."""
    if use.perturb is not None:
        return True
    raw = jax.ShapeDtypeStruct((*use.lengths, *use.output.shape), use.output.dtype)
    _, num_positions, _ = jax.eval_shape(use.outputs, raw).shape
    return bool(num_positions != math.prod(use.position_sizes))


def _lag_moment(later: PerUseArray, earlier: PerUseArray) -> Float[Array, "s n n"]:
    """Sum `x_(t+1) y_t'` over times and examples."""
    after = flat(later[:, :, 1:])
    before = flat(earlier[:, :, :-1])
    return matmul(after.swapaxes(1, 2), before)


def _joined(rows: PerUse) -> PerUseArray:
    """Bring the uses of an unrolled loop into one sequence."""
    return jnp.concatenate([at_least_float32(x) for x in rows], axis=2)
