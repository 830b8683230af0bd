"""Kernels that constants have rearranged or multiplied, brought to kernels of plain entries.

What multiplies in the program is not the leaf V but `M = C * V[index]`, with a constant C and
constant indices. A block is of V, so the constants go to where they are exact, the inputs a and the
cotangents g of the use `y = a'M`:

  C = r c' (scales)            a'M = (r * a)'V * c: a is multiplied by r, and g by c
  C = mask * r c'              the same, and a mask stays with the kernel
  index                        the entries of a and g are put into the order of V, see `_ties`
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from curvax._types import at_least_float32
from curvax.capture._ties import Rearrangement, indices, plain_view, rearrangement
from curvax.capture._uses import Use
from curvax.capture._views import (
    StaticArray,
    View,
    entry_numbers,
    factor_of,
    reshape,
    static,
    take,
    times,
    transpose,
    without_factors,
)

# s: stack, i: inputs, o: outputs, t: positions, k: rounds of tied columns


class Refusal(NamedTuple):
    """Why a kernel cannot be in a block.

    Attributes:
      reason: in words that follow the path of a leaf.
    """

    reason: str


def settled(use: Use) -> Use | Refusal:
    """Bring a use whose kernel constants have changed to a kernel of plain entries."""
    result: Use | Refusal = use
    if use.view.has("times"):
        result = _without_constants(use)
    if isinstance(result, Use) and result.view.repeats:
        return _with_plain_entries(result)
    return result


def with_bias(
    use: Use,
    view: View,
    hidden: int,
    axes: Sequence[int | None],
    spread: Sequence[int],
    output_scale: float,
) -> Use | None:
    """Join a bias to a use; None if what is added does not vary as a bias does.

    Args:
      use: the use to whose output the view is added.
      view: a view with `hidden` first axes for the loops around.
      hidden: the number of those loops.
      axes: for each further axis of the view the place in `spread` along which it runs, None for an
        axis of size 1.
      spread: sizes of the stack and out axes of the output that is added to.
      output_scale: the number that this output has been multiplied by.
    """
    places = sorted(axis for axis in axes if axis is not None)
    # A bias runs along every axis along which the kernel does, and along no other.
    long_places = [i for i, size in enumerate(spread) if size > 1]
    size = math.prod(spread)
    if not use.takes_bias or places != long_places or math.prod(view.shape[hidden:]) != size:
        return None

    def place_of(i: int) -> tuple[bool, int]:
        axis = axes[i]
        return axis is None, axis or 0

    order = sorted(range(len(axes)), key=place_of)
    # In the order of the spread, so that it flattens to [stack, out] as the kernel does.
    ordered = transpose(view, (*range(hidden), *(hidden + i for i in order)))
    stack, _, out = use.view.shape
    bias = reshape(ordered, (stack, out))
    if use.bias_columns is not None:
        # The kernel's columns are in another order.
        numbers = np.arange(stack * out).reshape(stack, out)
        bias = take(bias, numbers[:, use.bias_columns.array])
    use = _with_empty_columns(use)
    one = _bias_input(use, bias, output_scale)
    if one is None:
        return None
    return dataclasses.replace(use, bias=without_factors(bias), one=one)


def _with_empty_columns(use: Use) -> Use:
    """Put columns without entries behind a mask: their outputs are biases alone.

    Without a bias a zero that multiplies their cotangents is better, which leaves them out of G.
    """
    if use.scale is None or use.scale.array.all() or use.bias_columns is not None:
        return use
    scale = use.scale.array
    is_there = scale != 0
    filled = static(_compact(np.where(is_there, scale, scale[is_there][0])))
    after_outputs = []
    for step in use.after_outputs:
        after_outputs.append(_Times(filled) if step == _Times(use.scale) else step)
    mask = use.view.mask
    through = is_there[:, None] if mask is None else mask & is_there[:, None]
    through = np.broadcast_to(through, use.view.shape)
    return dataclasses.replace(
        use,
        view=times(without_factors(use.view), through),
        scale=filled,
        after_outputs=tuple(after_outputs),
    )


def _bias_input(
    use: Use,
    bias: View,
    output_scale: float,
) -> float | None:
    """Return the input of a bias whose kernel's cotangents are multiplied by `use.scale`.

    The bias is added as `c_b b` to `y = z (a'V) * c`, with z the scale of the output: of the
    cotangents `z c g` its gradient is `(c_b / (z c))(z c g)`. None if that is not the same number
    for all entries.
    """
    factor = factor_of(bias) if bias.has("times") else np.ones((1, 1))
    scale = np.ones((1, 1)) if use.scale is None else use.scale.array
    if not factor.all() or not scale.all():
        return None
    ratio = factor / (scale * output_scale)
    one = float(ratio.flat[0])
    is_same = np.allclose(ratio, one, rtol=1e-6, atol=0)
    # The counts of a lookup know of biases with the input 1 only.
    return one if is_same and (use.kind != "lookup" or one == 1) else None


# -- constants that multiply ---------------------------------------------------------------------


class _Split(NamedTuple):
    """Factors of a kernel as `mask * (rows x columns)`.

    Attributes:
      rows: `[s, i]`.
      columns: `[s, o]`.
      mask: `[s, i, o]`, or None where rows and columns have all the zeros.
    """

    rows: Float[np.ndarray, "s i"]
    columns: Float[np.ndarray, "s o"]
    mask: Bool[np.ndarray, "s i o"] | None


def _without_constants(use: Use) -> Use | Refusal:
    """Take the constants out of the kernel, to its inputs and cotangents."""
    factor = factor_of(use.view)
    if not factor.any():
        return Refusal("is multiplied by zero")
    split = _split(factor)
    if split is None:
        return Refusal(
            "is multiplied by a constant that is neither a mask nor a product of one number for "
            "each input and one for each output"
        )
    if use.kind == "lookup" and not np.all(split.rows == 1):
        return Refusal("is multiplied by another constant for each row that is looked up")
    view = without_factors(use.view)
    after_inputs, after_outputs, scale = use.after_inputs, use.after_outputs, None
    if not np.all(split.rows == 1):
        after_inputs += (_Times(static(split.rows)),)
    if not np.all(split.columns == 1):
        scale = static(_compact(split.columns))
        after_outputs += (_Times(scale),)
    return dataclasses.replace(
        use,
        view=view if split.mask is None else times(view, split.mask),
        scale=scale,
        after_inputs=after_inputs,
        after_outputs=after_outputs,
    )


def _split(factor: Float[np.ndarray, "s i o"]) -> _Split | None:
    """Write factors as `mask * (rows x columns)`; None if they are not of that form."""
    mask = factor != 0
    # 1. The first entry of each column that is not zero is the column's number, ...
    first = mask.argmax(axis=1)[:, None]
    columns = np.take_along_axis(factor, first, axis=1)[:, 0]
    divisor = np.where(columns == 0, 1, columns)
    # 2. ... and what remains of the first entry of each row is the row's.
    ratio = factor / divisor[:, None]
    first = mask.argmax(axis=2)[..., None]
    rows = np.take_along_axis(ratio, first, axis=2)[..., 0]
    outer = rows[:, :, None] * columns[:, None, :]
    # Constants are products in the precision of the program.
    if not np.allclose(mask * outer, factor, rtol=1e-6, atol=0):
        return None
    return _Split(rows, columns, None if np.array_equal(outer != 0, mask) else mask)


def _compact(x: Float[np.ndarray, "s o"]) -> Float[np.ndarray, "..."]:
    """Keep one number where all are equal."""
    return x[:1, :1] if np.all(x == x[0, 0]) else x


@dataclass(frozen=True)
class _Times:
    """Multiply the entries of inputs or cotangents, `[s, t, n]`, by numbers `[s, n]`."""

    numbers: StaticArray

    def __call__(self, x: Float[Array, "s t n"]) -> Float[Array, "s t n"]:
        # Constants are exact numbers: bfloat16 would round their products.
        wide = at_least_float32(x)
        return wide * jnp.asarray(self.numbers.array[:, None], wide.dtype)


# -- constant indices ----------------------------------------------------------------------------


def _with_plain_entries(use: Use) -> Use | Refusal:
    """Undo constant indices of a kernel by those of its inputs and cotangents."""
    view = use.view
    entries = entry_numbers(view, view.leaf_shapes)
    # Parts of a leaf may be joined in any order; that alone needs nothing.
    if not view.has("take") and len(np.unique(entries)) == entries.size:
        return use
    order = rearrangement(entries)
    if order is None or (use.kind == "lookup" and order.num_rounds > 1):
        return Refusal("enters one linear map several times, not as the rounds of a convolution do")
    plain = plain_view(order.entries, view)
    if view.has("times"):
        # Of tied entries some may be behind the mask and others not.
        if order.merges or order.num_rounds > 1:
            return Refusal("enters one linear map several times, and is masked")
        rows, columns = order.first_rows, order.first_columns
        mask = factor_of(view)[:, rows][:, :, columns]
        plain = times(plain, mask != 0)
    # A lookup has row numbers for its inputs.
    is_lookup = use.kind == "lookup"
    after_inputs = order.renumbered_rows() if is_lookup else order.rearranged_inputs()
    adapted = dataclasses.replace(
        use,
        view=plain,
        after_inputs=use.after_inputs + after_inputs,
        after_outputs=use.after_outputs + order.rearranged_outputs(),
    )
    return _with_bias_columns(adapted, order)


def _with_bias_columns(
    use: Use,
    order: Rearrangement,
) -> Use:
    """Say which entries of a bias belong to the columns of the kernel, if any do."""
    scale = use.scale
    varies = scale is not None and scale.array.size > 1
    is_tied = order.num_rounds > 1
    # A bias is added to every column by itself: to columns that were added up, there is none.
    if order.merges_columns or (is_tied and varies):
        return dataclasses.replace(use, takes_bias=False)
    if is_tied:
        return _with_bias_of_rounds(use, order)
    first = order.first_columns
    if scale is not None and varies:
        scale = static(scale.array[:, first])
    return dataclasses.replace(
        use,
        scale=scale,
        bias_columns=indices(first),
    )


def _with_bias_of_rounds(
    use: Use,
    order: Rearrangement,
) -> Use:
    """Read axes of the output along which nothing changes but the round as positions.

    A bias runs along the other axes.
    """
    no_bias = dataclasses.replace(use, takes_bias=False)
    # 1. The axes of the output that make the columns are the last ones of the spread.
    of_column = order.of_column
    num_stack = len(use.spread)
    while math.prod(use.spread[num_stack:]) < len(of_column):
        num_stack -= 1
    by_axes_shape = use.spread[num_stack:]
    if math.prod(by_axes_shape) != len(of_column):
        return no_bias
    # 2. Those along which the column of the kernel stays the same count rounds.
    by_axes = of_column.reshape(by_axes_shape)
    rounds = []
    for axis, size in enumerate(by_axes_shape):
        if size > 1 and np.all(by_axes == by_axes.take([0], axis)):
            rounds.append(axis)
    if math.prod(by_axes_shape[axis] for axis in rounds) != order.num_rounds:
        return no_bias
    # 3. Where in the bias each column of the kernel is.
    for axis in reversed(rounds):
        by_axes = by_axes.take(0, axis)
    bias_columns = by_axes.ravel().argsort()
    # 4. The spread without the rounds.
    dropped = {num_stack + axis for axis in rounds}
    others = [place for place in range(len(use.spread)) if place not in dropped]
    axes = [others.index(place) if place in others else None for place in use.axes]
    return dataclasses.replace(
        use,
        axes=tuple(axes),
        spread=tuple(use.spread[place] for place in others),
        bias_columns=indices(bias_columns),
    )
