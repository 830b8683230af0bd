"""Uses: the linear maps that parameters enter, each brought to matrices.

A use is `output = input @ kernel`, for each slice of a stack, in matrices `[s, t, i] @ [s, i, o]`;
a `dot_general`, a convolution and a lookup in a table differ only in how their raw operands become
such matrices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from curvax.capture._views import View, reshape, transpose

ToMatrices: TypeAlias = Callable[[Array], Array]
"""From a raw input or output, in one round of the loops, to `[s, t, i]` or `[s, t, o]`."""


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

    def inputs(
        self,
        raw: Shaped[Array, "*loops_and_input"],
    ) -> Shaped[Array, "s t i"]:
        """Bring the recorded input, with leading axes for the loops, to matrices."""
        return self._through_loops(self.to_inputs, raw)

    def outputs(
        self,
        raw: Float[Array, "*loops_and_output"],
    ) -> Float[Array, "s t o"]:
        """Bring the output, or a cotangent of it, to matrices."""
        return self._through_loops(self.to_outputs, raw)

    def _through_loops(self, to_matrices: ToMatrices, raw: Array) -> Array:
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


def of_conv(kernel: View, hidden: int, eqn: Any) -> Use:
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
        to_inputs=_Patches(
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


def of_lookup(table: View, hidden: int, eqn: Any) -> Use:
    """Read a `gather` of slices along one axis of a table: a product with one-hot inputs."""
    numbers = eqn.params["dimension_numbers"]
    (axis,) = numbers.start_index_map
    # Every axis but the one that is indexed.
    columns = _other_axes(len(table.shape) - hidden, [axis])
    output = eqn.outvars[0].aval
    out_axes = tuple(numbers.offset_dims)
    place = {out_axis: i for i, out_axis in enumerate(out_axes)}
    positions = _other_axes(len(output.shape), out_axes)
    return Use(
        kind="lookup",
        view=_matrices(table, hidden, [], [axis], columns),
        operand=1,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(place.get(i) for i in range(len(output.shape))),
        spread=tuple(output.shape[out_axis] for out_axis in out_axes),
        to_inputs=_RowNumbers(table.shape[hidden + axis], "CLIP" in str(eqn.params["mode"])),
        to_outputs=_Flatten(((), tuple(positions), out_axes)),
    )


def is_lookup(eqn: Any) -> bool:
    """Tell whether a `gather` reads slices along one axis, each of them complete."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    # One index for each slice, and the axis gone from the result.
    axes = numbers.start_index_map
    if len(axes) != 1 or numbers.collapsed_slice_dims != axes or numbers.operand_batching_dims:
        return False
    return all(sizes[i] == shape[i] for i in _other_axes(len(shape), axes))


def with_bias(
    use: Use,
    view: View,
    hidden: int,
    axes: Sequence[int | None],
) -> Use | None:
    """Join a bias to a use; None if what is added does not vary as a bias does.

    Args:
      use: the use to whose output the view is added.
      view: a view with `hidden` first axes for the loops around.
      hidden: the number of those loops.
      axes: for each further axis of the view the place in `use.spread` along which it runs, None
        for an axis of size 1.
    """
    places = sorted(axis for axis in axes if axis is not None)
    # A bias runs along every axis along which the kernel does, and along no other.
    long_places = [i for i, size in enumerate(use.spread) if size > 1]
    if places != long_places or math.prod(view.shape[hidden:]) != math.prod(use.spread):
        return None

    def place_of(i: int) -> tuple[bool, int]:
        axis = axes[i]
        return axis is None, axis or 0

    order = sorted(range(len(axes)), key=place_of)
    # In the order of the spread, so that it flattens to [stack, out] as the kernel does.
    ordered = transpose(view, (*range(hidden), *(hidden + i for i in order)))
    stack, _, out = use.view.shape
    return dataclasses.replace(use, bias=reshape(ordered, (stack, out)))


@dataclass(frozen=True)
class _Patches:
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
    """Bring the indices of a lookup to `[s, t, 1]`; those out of range as the lookup reads them."""

    rows: int
    clip: bool

    def __call__(
        self,
        indices: Int[Array, "..."],
    ) -> Int[Array, "1 t 1"]:
        # As the lookup does; in all other modes what is out of range reads no row.
        if self.clip:
            indices = jnp.clip(indices, 0, self.rows - 1)
        return indices.reshape(1, -1, 1)


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
