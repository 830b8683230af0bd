"""Uses: the linear maps that parameters enter, each brought to matrices.

A use is `output = input @ kernel`, for each slice of a stack, in matrices `[s, t, i] @ [s, i, o]`;
a `dot_general`, a convolution and a lookup in a table differ only in how their raw operands become
such matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from curvax.capture._views import StaticArray, View, reshape, static, transpose

ToMatrices: TypeAlias = Callable[[Array], Array]
"""From a raw input or output, in one round of the loops, to `[s, t, i]` or `[s, t, o]`."""

Perturb: TypeAlias = Callable[[Sequence[Any], Array, Array], Array]
"""`(operands, output, zeros) -> output + zeros`, with the zeros where their cotangent is wanted."""


@dataclass(frozen=True)
class Use:
    """One linear map of a program whose kernel is made of parameters.

    Attributes:
      kind: "dot", "conv" or "lookup".
      view: the kernel, a view `[stack, in, out]` of parameters.
      operand: which operand of the equation is the input.
      output: shape and dtype of the equation's output, in one round of the loops around it.
      axes: for each axis of the output its place in `spread`, or None for a position.
      spread: sizes of the stack and out axes, in the order that the kernel has them.
      to_inputs: from the raw input to `[s, t, i]` (of a lookup to row numbers, `[s, t, 1]`).
      to_outputs: from the raw output to `[s, t, o]`.
      bias: view `[stack, out]` of what is added to the output, or None.
      site: the index of the equation in its program, after those of the programs around it.
      lengths: trip counts of the loops around the equation, outermost first.
      stacked: for each of these loops, whether every round has a kernel slice to itself.
      after_inputs: what is done with `[s, t, i]` after that, where constants change the kernel.
      after_outputs: what is done with `[s, t, o]`.
      scale: what `after_outputs` multiplies cotangents by, `[s, o]`, or None.
      takes_bias: whether what is added to the output may be a bias.
      bias_columns: for each column of the kernel where it is in the bias; None if where it is.
      one: the input of the bias.
      perturb: how a perturbation of the shape `output` enters; None if it is added.
    """

    kind: str
    view: View
    operand: int
    output: jax.ShapeDtypeStruct
    axes: tuple[int | None, ...]
    spread: tuple[int, ...]
    to_inputs: ToMatrices
    to_outputs: ToMatrices
    bias: View | None = None
    site: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    stacked: tuple[bool, ...] = ()
    after_inputs: tuple[ToMatrices, ...] = ()
    after_outputs: tuple[ToMatrices, ...] = ()
    scale: StaticArray | None = None
    takes_bias: bool = True
    bias_columns: StaticArray | None = None
    one: float = 1.0
    perturb: Perturb | None = None

    @property
    def position_sizes(self) -> tuple[int, ...]:
        """Sizes of the axes that are positions: loops that share the kernel, then of the output."""
        loops = zip(self.lengths, self.stacked, strict=True)
        shared = [length for length, is_stack in loops if not is_stack]
        axes = zip(self.output.shape, self.axes, strict=True)
        inner = [size for size, place in axes if place is None]
        return (*shared, *inner)

    def inputs(
        self,
        raw: Shaped[Array, "*loops_and_input"],
    ) -> Shaped[Array, "s t i"]:
        """Bring the recorded input, with leading axes for the loops, to matrices."""
        return _in_turn(self.after_inputs, self._through_loops(self.to_inputs, raw))

    def outputs(
        self,
        raw: Float[Array, "*loops_and_output"],
    ) -> Float[Array, "s t o"]:
        """Bring the output, or a cotangent of it, to matrices."""
        return _in_turn(self.after_outputs, self._through_loops(self.to_outputs, raw))

    def _through_loops(
        self,
        to_matrices: ToMatrices,
        raw: Array,
    ) -> Array:
        """Count loops that slice the kernel as stack, and all others as positions."""
        # The raw array has an axis for every loop, outermost first.
        for _ in self.lengths:
            to_matrices = jax.vmap(to_matrices)
        matrices = to_matrices(raw)  # [*loops, s, t, size]
        n = len(self.lengths)
        loops_of_stack = [i for i in range(n) if self.stacked[i]]
        loops_of_positions = [i for i in range(n) if not self.stacked[i]]
        return _flat(
            matrices,
            [*loops_of_stack, n],
            [*loops_of_positions, n + 1],
            [n + 2],
        )


@dataclass(frozen=True)
class _Flatten:
    """Bring the axes of an array into groups: stack, positions, inputs or outputs."""

    groups: tuple[tuple[int, ...], ...]

    def __call__(self, x: Array) -> Array:
        return _flat(x, *self.groups)


def of_dot(
    kernel: View,
    hidden: int,
    which: int,
    eqn: Any,
) -> Use:
    """Read a `dot_general` whose operand number `which` is the kernel.

    The `hidden` first axes of the kernel's view belong to the loops around.
    """
    contracting, batch = eqn.params["dimension_numbers"]
    other = 1 - which
    num_batch = len(batch[0])
    # 1. What is neither contracted nor batch is free: outputs on our side, positions on the other.
    k_ndim, a_ndim = len(kernel.shape) - hidden, len(eqn.invars[other].aval.shape)
    k_free = _other_axes(k_ndim, contracting[which], batch[which])
    # Of the input: whatever is neither contracted nor batch counts positions.
    a_free = _other_axes(a_ndim, contracting[other], batch[other])
    # 2. The output has the batch axes first, then the free ones of the left operand, then of the
    #    right.
    k_first = num_batch if which == 0 else num_batch + len(a_free)
    a_first = num_batch if which == 1 else num_batch + len(k_free)
    out_axes = range(k_first, k_first + len(k_free))
    position_axes = range(a_first, a_first + len(a_free))
    # 3. The kernel runs along its batch and free axes.
    output = eqn.outvars[0].aval
    spread_axes = (*range(num_batch), *out_axes)
    place = {axis: i for i, axis in enumerate(spread_axes)}
    return Use(
        kind="dot",
        view=_matrices(kernel, hidden, batch[which], contracting[which], k_free),
        operand=other,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(place.get(i) for i in range(len(output.shape))),
        spread=tuple(output.shape[axis] for axis in spread_axes),
        to_inputs=_Flatten((tuple(batch[other]), tuple(a_free), tuple(contracting[other]))),
        to_outputs=_Flatten((tuple(range(num_batch)), tuple(position_axes), tuple(out_axes))),
    )


def of_conv(
    kernel: View,
    hidden: int,
    eqn: Any,
) -> Use:
    """Read a `conv_general_dilated` whose right operand is the kernel.

    Its positions are the places of the window, its inputs the entries of a patch, and its groups of
    channels a stack.
    """
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, in_axis, *space = numbers.rhs_spec
    # 1. The kernel as [*loops, groups, outputs of a group, window x channels of a group].
    order = (out_axis, *space, in_axis)
    channels = transpose(kernel, (*range(hidden), *(hidden + i for i in order)))
    out, *window, inputs = channels.shape[hidden:]
    loops = channels.shape[:hidden]
    grouped = reshape(channels, (*loops, groups, out // groups, math.prod(window) * inputs))
    # 2. The features are the only axis of the output along which the kernel runs.
    output = eqn.outvars[0].aval
    feature_axis = numbers.out_spec[1]
    axes = [0 if i == feature_axis else None for i in range(len(output.shape))]
    return Use(
        kind="conv",
        view=_matrices(grouped, hidden, [0], [2], [1]),
        operand=0,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(axes),
        spread=(out,),
        to_inputs=Patches(
            order=_channels_last(numbers.lhs_spec),
            window=tuple(window),
            groups=groups,
            padding=tuple(map(tuple, eqn.params["padding"])),
            strides=tuple(eqn.params["window_strides"]),
            input_dilation=tuple(eqn.params["lhs_dilation"]),
            window_dilation=tuple(eqn.params["rhs_dilation"]),
        ),
        to_outputs=_Features(_channels_last(numbers.out_spec), groups),
    )


def of_lookup(
    table: View,
    hidden: int,
    eqn: Any,
) -> Use:
    """Read a `gather` of the rows of a table: a product with one-hot inputs.

    Batch axes, along which every index reads a table of its own, are a stack.
    """
    numbers = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    output = eqn.outvars[0].aval
    ndim = len(eqn.invars[1].aval.shape) - 1
    # 1. Of the table: batch axes, those that are indexed, and the columns.
    batch = tuple(numbers.operand_batching_dims)
    rows = _row_axes(eqn)
    columns = _other_axes(len(shape), batch, rows)
    # 2. Of the output: the axes of complete slices are those of the table, in its order; the others
    #    are those of the indices.
    sliced = _other_axes(len(shape), batch, numbers.collapsed_slice_dims)
    place_of = dict(zip(sliced, numbers.offset_dims, strict=True))
    out_axes = tuple(place_of[axis] for axis in columns)
    of_indices = _other_axes(len(output.shape), numbers.offset_dims)
    stack = tuple(of_indices[axis] for axis in numbers.start_indices_batching_dims)
    positions = _other_axes(len(output.shape), out_axes, stack)
    # 3. The table runs along the stack and the columns.
    spread_axes = (*stack, *out_axes)
    place = {axis: i for i, axis in enumerate(spread_axes)}
    return Use(
        kind="lookup",
        view=_matrices(table, hidden, batch, rows, columns),
        operand=1,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(place.get(i) for i in range(len(output.shape))),
        spread=tuple(output.shape[axis] for axis in spread_axes),
        to_inputs=_RowNumbers(
            sizes=tuple(shape[axis] for axis in rows),
            components=tuple(numbers.start_index_map.index(axis) for axis in rows),
            batch=tuple(numbers.start_indices_batching_dims),
            ndim=ndim,
            clip="CLIP" in str(eqn.params["mode"]),
        ),
        to_outputs=_Flatten((stack, tuple(positions), out_axes)),
    )


def is_lookup(eqn: Any) -> bool:
    """Tell whether a `gather` reads rows: one number along some axes, and the others complete."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    rows = _row_axes(eqn)
    complete = _other_axes(len(shape), rows, numbers.operand_batching_dims)
    if not rows or any(sizes[axis] != 1 for axis in rows):
        return False
    # Along a complete axis an index has nothing to choose; out of range it reads nothing.
    indexed = set(numbers.start_index_map).intersection(complete)
    safe = not indexed or any(mode in str(eqn.params["mode"]) for mode in ("CLIP", "PROMISE"))
    return safe and all(sizes[axis] == shape[axis] for axis in complete)


def of_added_rows(
    table: View,
    rows: np.ndarray,
    feature_axis: int,
    which: int,
    eqn: Any,
) -> Use:
    """Read an `add` of rows of a table, such as embeddings of positions: a lookup by constants.

    Args:
      table: view `[stack, rows, columns]`.
      rows: the row number for each axis of the output but that of the columns; of size 1 along axes
        on which it does not depend.
      feature_axis: the axis of the output along which the columns are.
      which: the operand to which the rows are added.
      eqn: the equation.
    """
    output = eqn.outvars[0].aval
    ndim = len(output.shape)
    positions = _other_axes(ndim, [feature_axis])
    return Use(
        kind="lookup",
        view=table,
        operand=which,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(0 if axis == feature_axis else None for axis in range(ndim)),
        spread=(output.shape[feature_axis],),
        to_inputs=_ConstantRows(
            static(rows.astype(np.int32)),
            tuple(output.shape[axis] for axis in positions),
        ),
        to_outputs=_Flatten(((), tuple(positions), (feature_axis,))),
    )


def of_ragged(
    kernel: View,
    hidden: int,
    eqn: Any,
) -> Use:
    """Read a `ragged_dot` `[t, i], [s, i, o], [s] -> [t, o]`, whose rows are in groups one after
    the other: a stack of experts, to each of which the rows of its group belong.

    Every expert has all rows for its inputs, and cotangents of zero where they are not its own.
    """
    output = eqn.outvars[0].aval
    num_experts = kernel.shape[hidden]
    return Use(
        kind="dot",
        view=_matrices(kernel, hidden, [0], [1], [2]),
        operand=0,
        output=jax.ShapeDtypeStruct((num_experts, *output.shape), output.dtype),
        axes=(None, None),
        spread=(num_experts, output.shape[1]),
        to_inputs=_ForEvery(num_experts),
        to_outputs=_Flatten(((0,), (1,), (2,))),
        takes_bias=False,
        perturb=_by_group,
    )


def is_ragged(eqn: Any) -> bool:
    """Tell whether a `ragged_dot_general` is a `ragged_dot`, of rows in groups."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    is_plain = tuple(map(tuple, contracting)) == ((1,), (1,)) and tuple(map(tuple, batch)) == (
        (),
        (),
    )
    groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    return is_plain and groups == ((0,), (0,))


def _by_group(
    operands: Sequence[Any],
    output: Array,
    zeros: Array,
) -> Array:
    """Add to each row of the output the zeros of its expert."""
    sizes = operands[2]
    ends = jnp.cumsum(sizes)
    row = jnp.arange(len(output))
    # Rows beyond the last group belong to nobody.
    is_own = (row >= (ends - sizes)[:, None]) & (row < ends[:, None])  # [s, t]
    return output + jnp.sum(jnp.where(is_own[..., None], zeros, 0), axis=0)


@dataclass(frozen=True)
class Patches:
    """Cut the windows that a convolution sees, as rows `[s, t, i]` of window x channels.

    Attributes:
      order: axes of the raw input as `[batch, *space, channels]`.
      window: sizes of the window.
      groups: number of groups of channels.
      padding: what is added before and after each axis of space.
      strides: steps of the window along each axis.
      input_dilation: distance at which the entries of the input are put apart.
      window_dilation: distance at which the entries of the window read.
    """

    order: tuple[int, ...]
    window: tuple[int, ...]
    groups: int
    padding: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    input_dilation: tuple[int, ...]
    window_dilation: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        """Cut one strided slice for each place in the window.

        That is twice as fast on CPUs as `lax.conv_general_dilated_patches`, a convolution.
        """
        # 1. Pad, outside and between the entries: [b, *space, channels].
        x = x.transpose(self.order)
        edges = zip(self.padding, self.input_dilation, strict=True)
        space = [(low, high, step - 1) for (low, high), step in edges]
        x = lax.pad(
            x,
            jnp.zeros([], x.dtype),
            [(0, 0, 0), *space, (0, 0, 0)],
        )
        # 2. A slice for each place in the window.
        steps = zip(self.window, self.window_dilation, strict=True)
        offsets = itertools.product(*(range(0, n * step, step) for n, step in steps))
        patches = jnp.stack([self._slice(x, offset) for offset in offsets], axis=-2)
        # 3. [b, *out_space, window, groups, channels of a group] -> [s, t, i].
        patches = patches.reshape(*patches.shape[:-1], self.groups, -1)
        n = patches.ndim
        return _flat(
            patches,
            [n - 2],
            range(n - 3),
            [n - 3, n - 1],
        )

    def _slice(
        self,
        x: Array,
        offset: tuple[int, ...],
    ) -> Array:
        """Return what one place of the window sees in all of its steps."""
        bounds = [slice(None)]
        for axis, start in enumerate(offset):
            # From the first place of the window to the last.
            reach = (self.window[axis] - 1) * self.window_dilation[axis]
            stop = x.shape[axis + 1] - reach + start
            bounds.append(slice(start, stop, self.strides[axis]))
        return x[tuple(bounds)]


@dataclass(frozen=True)
class _Features:
    """Bring the output of a convolution to `[s, t, o]`, its groups as a stack."""

    order: tuple[int, ...]
    groups: int

    def __call__(self, x: Array) -> Array:
        x = x.transpose(self.order)
        x = x.reshape(*x.shape[:-1], self.groups, -1)
        return _flat(
            x,
            [x.ndim - 2],
            range(x.ndim - 2),
            [x.ndim - 1],
        )


@dataclass(frozen=True)
class _RowNumbers:
    """Bring the indices of a lookup to `[s, t, 1]`; those out of range as the lookup reads them.

    Attributes:
      sizes: sizes of the axes of the table that are indexed; together they are its rows.
      components: for each of them which component of an index it is.
      batch: axes of the indices that are a stack.
      ndim: the number of axes of the indices, without that of the components.
      clip: whether indices out of range read the last row; else they read none.
    """

    sizes: tuple[int, ...]
    components: tuple[int, ...]
    batch: tuple[int, ...]
    ndim: int
    clip: bool

    def __call__(
        self,
        indices: Int[Array, "..."],
    ) -> Int[Array, "s t 1"]:
        """Join the components of every index to the number of a row."""
        rows: Any = 0
        is_row: Any = True
        for size, component in zip(self.sizes, self.components, strict=True):
            index = indices[..., component]
            # As the lookup does; in all other modes what is out of range reads no row.
            if self.clip:
                index = jnp.clip(index, 0, size - 1)
            is_row &= (index >= 0) & (index < size)
            rows = rows * size + index
        # One axis says itself that it is out of range; of several the product might not.
        if len(self.sizes) > 1:
            rows = jnp.where(is_row, rows, math.prod(self.sizes))
        return _flat(rows, self.batch, _other_axes(self.ndim, self.batch), [])


@dataclass(frozen=True)
class _ConstantRows:
    """Row numbers `[s, t, 1]` of rows that are added, the same whatever they are added to.

    Attributes:
      rows: the row numbers, of size 1 along axes of the positions where they repeat.
      positions: sizes of the axes of the positions.
    """

    rows: StaticArray
    positions: tuple[int, ...]

    def __call__(
        self,
        raw: Float[Array, "..."],
    ) -> Int[Array, "1 t 1"]:
        del raw
        return jnp.broadcast_to(self.rows.array, self.positions).reshape(1, -1, 1)


@dataclass(frozen=True)
class _ForEvery:
    """Give every expert of a stack all rows."""

    num_experts: int

    def __call__(
        self,
        x: Float[Array, "t i"],
    ) -> Float[Array, "s t i"]:
        return jnp.broadcast_to(x, (self.num_experts, *x.shape))


def _row_axes(eqn: Any) -> tuple[int, ...]:
    """Return the axes of a table along which a `gather` reads one of several entries."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    # An axis that is read as a whole may have an index too, which is zero.
    chosen = [axis for axis in numbers.start_index_map if sizes[axis] < shape[axis]]
    collapsed = [axis for axis in numbers.collapsed_slice_dims if axis not in chosen]
    return tuple(sorted((*chosen, *collapsed)))


def _in_turn(
    steps: Sequence[ToMatrices],
    x: Array,
) -> Array:
    for step in steps:
        x = step(x)
    return x


def _channels_last(spec: tuple[int, ...]) -> tuple[int, ...]:
    """Order the axes of a convolution's operand as `[batch, *space, channels]`."""
    batch, channels, *space = spec
    return (batch, *space, channels)


def _other_axes(ndim: int, *groups: Sequence[int]) -> list[int]:
    """Return the axes that are in none of the groups."""
    return sorted(set(range(ndim)).difference(*groups))


def _matrices(
    view: View,
    hidden: int,
    stack: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> View:
    """View `[s, i, o]`: loops and `stack`, then the contracted axes, then the free ones."""
    order = [*range(hidden), *(hidden + i for i in (*stack, *inputs, *outputs))]
    groups = [[*range(hidden), *(hidden + i for i in stack)]]
    groups += [[hidden + i for i in axes] for axes in (inputs, outputs)]
    shape = tuple(math.prod(view.shape[i] for i in group) for group in groups)
    return reshape(transpose(view, tuple(order)), shape)


def _flat(x: Array, *groups: Sequence[int]) -> Array:
    """Bring the axes of `x` into groups, each flattened into one axis."""
    order = list(itertools.chain(*groups))
    sizes = [math.prod(x.shape[axis] for axis in group) for group in groups]
    return x.transpose(order).reshape(sizes)
