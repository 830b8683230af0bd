"""Inner products of all rows of a Jacobian, formed layer by layer from inputs and output-gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._batch import ENTRIES_AT_A_TIME
from curvax._trees import wide_dtype
from curvax._types import at_least_float32
from curvax.kron._layout import Block, Layout
from curvax.kron._moments import Basis, rotated_pair
from curvax.kron._tapping import Capture, PerUseArray, UseCotangents

# k: cotangents of each example, e: examples, s: stack, t: positions, i: inputs, o: outputs; n = k e: rows


def gram(layout: Layout, recorded: Capture, pulled: UseCotangents) -> Float[Array, "n n"]:
    """Return `u_m . u_n` for all rows `u = J_e' r_ke`: every example's k cotangents of its outputs, pulled back to params.

    No row is formed where each example uses a kernel once at one position: there `u = a g'`, and
    `u . u' = (a . a')(g . g')`. Where there are several positions, rows of one block are formed, a part of its inputs at a
    time; of leaves in no block, all.

    Args:
      layout: with `unmatched="diagonal"`.
      recorded: of `record(..., by_example=True)`.
      pulled: `recorded.pull` of the cotangents, with a leading axis k.

    Cost: n^2 (in / k^2 + out) multiplications a block of the first kind, n^2 in out of the second. Memory: n^2 numbers, and
      parts of rows of at most 64 MB.
    """
    sums = [
        _of_block(block, recorded.inputs[block.name], pulled.blocks[block.name])
        for block in layout.blocks
    ]
    leaves = {leaf.path: leaf for leaf in layout.leaves}
    for path, x in pulled.outside.items():
        rows = jnp.where(layout.uncovered(path), x, 0) if leaves[path].kind == "kron" else x
        flat = at_least_float32(rows).reshape(x.shape[0] * x.shape[1], -1)
        sums.append(_product(flat, flat))
    return jnp.asarray(sum(sums))


def _of_block(
    block: Block, inputs: list[PerUseArray], pulled: list[PerUseArray]
) -> Float[Array, "n n"]:
    pairs = [_pair(block, j, inputs[j], pulled[j]) for j in range(len(inputs))]
    (left, right), k = pairs[0], pulled[0].shape[0]
    if len(pairs) > 1 or left.shape[3] > 1 or jnp.issubdtype(left.dtype, jnp.integer):
        return _of_formed_rows(block, pairs, k)
    n = k * left.shape[1]
    total = jnp.zeros((n, n), wide_dtype(right))
    for s in range(left.shape[2]):
        each = [side[:, :, s, 0].reshape(-1, side.shape[-1]) for side in (left, right)]
        products = [
            _spread(_product(x, x), side.shape[0], k)
            for x, side in zip(each, (left, right), strict=True)
        ]
        total = total + (products[0] * products[1]).reshape(n, n)
    return total


def _spread(products: Float[Array, "m m"], own: int, k: int) -> Float[Array, "p e p e"]:
    """Give products an axis for the cotangents; of what is the same for all of them it has length 1."""
    e = len(products) // own
    return products.reshape(own, e, own, e)


def _pair(block: Block, j: int, inputs: PerUseArray, pulled: PerUseArray) -> tuple[Array, Array]:
    """Return what the rows are outer products of, `[k or 1, e, s, t, i]` and `[k or 1, e, s, t, o]`."""
    of_cotangent = lambda g: rotated_pair(block, j, Basis(None, None), inputs, g)
    axes = (0, None) if block.uses[j].transposed else (None, 0)
    left, right = jax.vmap(of_cotangent, out_axes=axes)(pulled)
    return (left, right[None]) if block.uses[j].transposed else (left[None], right)


def _of_formed_rows(block: Block, pairs: list[tuple[Array, Array]], k: int) -> Float[Array, "n n"]:
    stack, size, columns = block.shape
    n = k * pairs[0][0].shape[1]
    width = max(1, min(size, ENTRIES_AT_A_TIME // (n * stack * columns)))
    dtype = wide_dtype(pairs[0][1])

    def part(total: Float[Array, "n n"], start: Array) -> tuple[Float[Array, "n n"], None]:
        rows = jnp.asarray(
            sum(_outer(_columns(left, start, width, dtype), right) for left, right in pairs)
        )
        rows = jnp.broadcast_to(rows, (k, *rows.shape[1:])).reshape(n, -1)
        return total + _product(rows, rows), None

    zero = jnp.zeros((n, n), dtype)
    if width == size:
        return part(zero, jnp.int32(0))[0]
    return lax.scan(part, zero, jnp.arange(0, size, width))[0]


def _columns(left: Array, start: Array, width: int, dtype: jnp.dtype) -> Float[Array, "k e s t w"]:
    """Return columns `start` to `start + width` of the inputs, zero beyond the last; of a lookup they are one-hot."""
    if jnp.issubdtype(left.dtype, jnp.integer):
        return jax.nn.one_hot(left[..., 0] - start, width, dtype=dtype)
    beyond = -left.shape[-1] % width
    padded = jnp.pad(left.astype(dtype), [(0, 0)] * 4 + [(0, beyond)])
    return lax.dynamic_slice_in_dim(padded, start, width, axis=-1)


def _outer(
    left: Float[Array, "k e s t i"], right: Float[Array, "k e s t o"]
) -> Float[Array, "k e s i o"]:
    return jnp.matmul(
        left.swapaxes(-1, -2), right.astype(left.dtype), precision=lax.Precision.HIGHEST
    )


def _product(x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
    return jnp.matmul(at_least_float32(x), at_least_float32(y).T, precision=lax.Precision.HIGHEST)
