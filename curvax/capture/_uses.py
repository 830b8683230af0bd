"""Uses: the linear maps into which parameters go, each brought to matrices `[stack, positions, in]` and `[..., out]`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from curvax.capture._views import View, reshape, transpose


@dataclass(frozen=True)
class Use:
    """One linear map of a program with a kernel made of parameters: `output = input @ kernel`, slice by slice of a stack.

    Attributes:
      kind: "dot", "conv" or "lookup".
      kernel: view `[stack, in, out]` of parameters.
      bias: view `[stack, out]` of what is added to the output, or None.
      operand: which operand of the equation is the input.
      output: shape and dtype of the equation's output, in one round of the loops around it.
      axes: for each axis of the output, its place in `spread` (stack and out axes), or None for a position.
      spread: sizes of stack and out axes, in the kernel's order.
      to_inputs: raw input to `[stack, positions, in]` (for a lookup `[stack, positions, 1]`, row numbers).
      to_outputs: raw output to `[stack, positions, out]`.
      site: the equation's index in its program, preceded by those of the programs around it.
      lengths: trip counts of the loops around it, outermost first.
      stacked: for each of these loops, whether the kernel has a slice of its own in every round.
    """

    kind: str
    kernel: View
    operand: int
    output: jax.ShapeDtypeStruct
    axes: tuple[int | None, ...]
    spread: tuple[int, ...]
    to_inputs: Callable[[Array], Array]
    to_outputs: Callable[[Array], Array]
    bias: View | None = None
    site: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    stacked: tuple[bool, ...] = ()

    def inputs(
        self, raw: Shaped[Array, "*loops_and_input"]
    ) -> Shaped[Array, "stack positions inputs"]:
        """Bring what the use was given, with leading axes for the loops around it, to matrices."""
        return self._through_loops(self.to_inputs, raw)

    def outputs(
        self, raw: Float[Array, "*loops_and_output"]
    ) -> Float[Array, "stack positions outputs"]:
        """Bring the use's output, or a cotangent of it, to matrices."""
        return self._through_loops(self.to_outputs, raw)

    def _through_loops(self, to_matrices: Callable[[Array], Array], raw: Array) -> Array:
        for _ in self.lengths:
            to_matrices = jax.vmap(to_matrices)
        matrices = to_matrices(raw)  # [*loops, stack, positions, size]
        n = len(self.lengths)
        stacks = [i for i in range(n) if self.stacked[i]] + [n]
        positions = [i for i in range(n) if not self.stacked[i]] + [n + 1]
        return _flat(matrices, stacks, positions, [n + 2])


def of_dot(kernel: View, hidden: int, which: int, eqn: Any) -> Use:
    """Read a `dot_general` whose operand number `which` is the kernel; its `hidden` first axes are of loops around."""
    contracting, batch = eqn.params["dimension_numbers"]
    other = 1 - which
    ndim = len(kernel.shape) - hidden
    free = [i for i in range(ndim) if i not in (*contracting[which], *batch[which])]
    a_ndim = len(eqn.invars[other].aval.shape)
    a_free = [i for i in range(a_ndim) if i not in (*contracting[other], *batch[other])]
    num_batch = len(batch[0])
    # The output's axes: batch, then free of the left operand, then free of the right.
    starts = (num_batch, num_batch + len(free if which == 0 else a_free))
    out_axes = [starts[which] + i for i in range(len(free))]
    position_axes = [starts[other] + i for i in range(len(a_free))]
    labels: dict[int, int] = {axis: i for i, axis in enumerate([*range(num_batch), *out_axes])}
    output = eqn.outvars[0].aval
    return Use(
        kind="dot",
        kernel=_matrices(kernel, hidden, batch[which], contracting[which], free),
        operand=other,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(labels.get(i) for i in range(len(output.shape))),
        spread=tuple(output.shape[axis] for axis in labels),
        to_inputs=lambda a: _flat(a, batch[other], a_free, contracting[other]),
        to_outputs=lambda s: _flat(s, range(num_batch), position_axes, out_axes),
    )


def of_conv(kernel: View, hidden: int, eqn: Any) -> Use:
    """Read a `conv_general_dilated` whose right operand is the kernel; its channel groups are a stack."""
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_feature, in_feature, *space = numbers.rhs_spec
    channels = transpose(
        kernel, (*range(hidden), *(hidden + i for i in (out_feature, *space, in_feature)))
    )
    out, *window, inputs = channels.shape[hidden:]
    split = reshape(
        channels, (*channels.shape[:hidden], groups, out // groups, math.prod(window) * inputs)
    )
    output = eqn.outvars[0].aval
    labels: list[int | None] = [None] * len(output.shape)
    labels[numbers.out_spec[1]] = 0

    def to_inputs(x: Array) -> Array:
        patches = _patches(
            x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]),
            window,
            eqn.params,
        )
        patches = patches.reshape(
            *patches.shape[:-1], groups, inputs
        )  # [batch, *space, window, groups, channels]
        n = patches.ndim
        return _flat(patches, [n - 2], range(n - 3), [n - 3, n - 1])

    def to_outputs(s: Array) -> Array:
        s = s.transpose(numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        s = s.reshape(*s.shape[:-1], groups, out // groups)
        return _flat(s, [s.ndim - 2], range(s.ndim - 2), [s.ndim - 1])

    return Use(
        kind="conv",
        kernel=_matrices(split, hidden, [0], [2], [1]),
        operand=0,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(labels),
        spread=(out,),
        to_inputs=to_inputs,
        to_outputs=to_outputs,
    )


def of_lookup(table: View, hidden: int, eqn: Any) -> Use:
    """Read a `gather` of whole slices along one axis of a table."""
    numbers = eqn.params["dimension_numbers"]
    (axis,) = numbers.start_index_map
    rows = table.shape[hidden + axis]
    free = [i for i in range(len(table.shape) - hidden) if i != axis]
    output = eqn.outvars[0].aval
    positions = [i for i in range(len(output.shape)) if i not in numbers.offset_dims]
    labels = {place: i for i, place in enumerate(numbers.offset_dims)}
    clip = "CLIP" in str(eqn.params["mode"])
    return Use(
        kind="lookup",
        kernel=_matrices(table, hidden, [], [axis], free),
        operand=1,
        output=jax.ShapeDtypeStruct(output.shape, output.dtype),
        axes=tuple(labels.get(i) for i in range(len(output.shape))),
        spread=tuple(output.shape[place] for place in numbers.offset_dims),
        to_inputs=lambda ids: (jnp.clip(ids, 0, rows - 1) if clip else ids).reshape(1, -1, 1),
        to_outputs=lambda s: _flat(s, [], positions, numbers.offset_dims),
    )


def is_lookup(eqn: Any) -> bool:
    """Whether a `gather` takes whole slices along one axis."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    whole = all(
        n == size
        for i, (n, size) in enumerate(zip(sizes, shape, strict=True))
        if (i,) != numbers.start_index_map
    )
    one = (
        len(numbers.start_index_map) == 1
        and numbers.collapsed_slice_dims == numbers.start_index_map
    )
    return one and whole and not numbers.operand_batching_dims


def with_bias(use: Use, view: View, hidden: int, axes: Sequence[int | None]) -> Use | None:
    """Join a bias to a use; None if what is added does not vary as a bias does.

    `axes[i]` is the place in `use.spread` along which axis i of `view` (after `hidden` ones) runs, None for size 1.
    """
    places = [axis for axis in axes if axis is not None]
    needed = [i for i, size in enumerate(use.spread) if size > 1]
    if sorted(places) != needed or math.prod(view.shape[hidden:]) != math.prod(use.spread):
        return None
    order = sorted(range(len(axes)), key=lambda i: (axes[i] is None, axes[i] or 0))
    ordered = transpose(view, (*range(hidden), *(hidden + i for i in order)))
    stack, _, out = use.kernel.shape
    return dataclasses.replace(use, bias=reshape(ordered, (stack, out)))


def _matrices(
    view: View, hidden: int, stack: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> View:
    """View `[stack, in, out]`: loops' axes and `stack`, then the contracted axes, then the free ones."""
    order = [*range(hidden), *(hidden + i for i in (*stack, *inputs, *outputs))]
    size = lambda axes: math.prod(view.shape[hidden + i] for i in axes)
    shape = (math.prod(view.shape[:hidden]) * size(stack), size(inputs), size(outputs))
    return reshape(transpose(view, tuple(order)), shape)


def _flat(x: Array, *groups: Sequence[int]) -> Array:
    """Bring the axes of `x` into groups, each flattened into one axis."""
    order = [axis for group in groups for axis in group]
    return x.transpose(order).reshape(
        [math.prod(x.shape[axis] for axis in group) for group in groups]
    )


# x: [batch, *space, channels] -> [batch, *out_space, window, channels]
def _patches(x: Array, window: Sequence[int], params: Any) -> Array:
    """Cut the windows that a convolution sees, by one strided slice for each place in the window."""
    low_high = [
        (low, high, step - 1)
        for (low, high), step in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = lax.pad(x, jnp.zeros([], x.dtype), [(0, 0, 0), *low_high, (0, 0, 0)])
    steps, strides = params["rhs_dilation"], params["window_strides"]
    reach = [(n - 1) * step for n, step in zip(window, steps, strict=True)]
    places: list[tuple[int, ...]] = [()]
    for n, step in zip(window, steps, strict=True):
        places = [(*place, i * step) for place in places for i in range(n)]
    cut = lambda place: x[
        :,
        *(
            slice(at, x.shape[axis + 1] - reach[axis] + at, stride)
            for axis, (at, stride) in enumerate(zip(place, strides, strict=True))
        ),
    ]
    return jnp.stack([cut(place) for place in places], axis=-2)
