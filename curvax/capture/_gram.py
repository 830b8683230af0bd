"""Inner products of all rows of a Jacobian, formed layer by layer from inputs and cotangents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from curvax._batch import ENTRIES_AT_A_TIME
from curvax._trees import wide_dtype
from curvax._types import at_least_float32
from curvax.capture._gradient_pairs import DensePair, GradientPair, gradient_pairs
from curvax.capture._kernels import Kernel
from curvax.capture._record import Capture, PerUseArray, UseCotangents

# k: cotangents of each example, b: examples, s: stack, t: positions, i: inputs, o: outputs;
# n = k b: rows


def gram(
    kernels: Mapping[str, Kernel],
    masks: Mapping[str, Bool[np.ndarray, "..."]],
    capture: Capture,
    cotangents: UseCotangents,
) -> Float[Array, "n n"]:
    """Return `u_m . u_n` for all rows `u = J_b' r_kb`, every example's k cotangents pulled back.

    No row is formed where each example uses a kernel once, at one position: there `u = a g'`, and
    `u . u' = (a . a')(g . g')`. Where there are several positions, the rows of one kernel are
    formed, a part of its inputs at a time; of leaves in no kernel, all.

    Args:
      kernels: the kernels, by the names of the plan.
      masks: for each leaf of the plan, which of its entries are in no kernel.
      capture: what `record` has captured with a plan per example.
      cotangents: `capture.pull` of the cotangents, with a leading axis k.

    Cost: `n^2 (in / k^2 + out)` multiplications for a kernel of the first kind, `n^2 in out` of the
      second. Memory: n^2 numbers, and parts of rows of at most 64 MB.
    """
    products = []
    for name, kernel in kernels.items():
        products.append(_of_kernel(kernel, capture.inputs[name], cotangents.blocks[name]))
    for path, x in cotangents.outside.items():
        # Entries of the leaf that are in kernels have been counted there.
        rows = (
            x
            if masks[path].all()
            else jnp.where(
                masks[path],
                x,
                0,
            )
        )
        flat = at_least_float32(rows).reshape(x.shape[0] * x.shape[1], -1)
        products.append(_product(flat, flat))
    return jnp.asarray(sum(products))


def _of_kernel(
    kernel: Kernel, inputs: Sequence[PerUseArray], cotangents: Sequence[PerUseArray]
) -> Float[Array, "n n"]:
    """Return the inner products of what the rows have in one kernel."""
    k = cotangents[0].shape[0]
    # Inputs are the same for all cotangents: they get a leading axis of length 1.
    pairs = gradient_pairs(kernel, [a[None] for a in inputs], cotangents)
    pair = pairs[0]
    if len(pairs) > 1 or not isinstance(pair, DensePair) or pair.g.shape[3] > 1:
        return _of_formed_rows(kernel, pairs, k)
    n = k * pair.g.shape[1]
    # Slices of a stack are further entries of the rows: their products add up.
    total = jnp.zeros((n, n), wide_dtype(pair.g))
    for s in range(pair.g.shape[2]):
        # (a . a')(g . g'), each for the k cotangents only where it depends on them.
        a, g = (_slice_products(x[:, :, s, 0]) for x in (pair.a, pair.g))
        total = total + (a * g).reshape(n, n)
    return total


def _slice_products(x: Float[Array, "m b size"]) -> Float[Array, "m b m b"]:
    """Return the inner products of vectors; m is k, or 1 where they are the same for all k."""
    m, b, size = x.shape
    flat = x.reshape(m * b, size)
    return _product(flat, flat).reshape(m, b, m, b)


def _of_formed_rows(
    kernel: Kernel,
    pairs: Sequence[GradientPair],
    k: int,
) -> Float[Array, "n n"]:
    """Form the rows `sum_t a_t g_t'`, some of their inputs at a time, and multiply them."""
    stack, size, columns = kernel.shape
    # As many inputs at a time as keep the rows formed below 2^24 entries.
    n = k * pairs[0].g.shape[1]
    width = max(1, min(size, ENTRIES_AT_A_TIME // (n * stack * columns)))
    dtype = wide_dtype(pairs[0].g)

    def add(
        total: Float[Array, "n n"],
        first: Array,
    ) -> tuple[Float[Array, "n n"], None]:
        rows = jnp.asarray(sum(_outer(pair.columns(first, width), pair.g) for pair in pairs))
        # Rows that do not depend on the cotangent (k is 1) are those of all cotangents.
        rows = jnp.broadcast_to(rows, (k, *rows.shape[1:])).reshape(n, -1)
        return total + _product(rows, rows), None

    zero = jnp.zeros((n, n), dtype)
    if width == size:
        return add(zero, jnp.int32(0))[0]
    return lax.scan(add, zero, jnp.arange(0, size, width))[0]


def _outer(
    a: Float[Array, "k b s t i"],
    g: Float[Array, "k b s t o"],
) -> Float[Array, "k b s i o"]:
    return jnp.matmul(
        a.swapaxes(-1, -2),
        g.astype(a.dtype),
        precision=lax.Precision.HIGHEST,
    )


def _product(
    x: Float[Array, "m d"],
    y: Float[Array, "n d"],
) -> Float[Array, "m n"]:
    return jnp.matmul(
        at_least_float32(x),
        at_least_float32(y).T,
        precision=lax.Precision.HIGHEST,
    )
