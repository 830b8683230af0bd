"""The outer products whose sum is an example's gradient of a kernel.

An example's gradient of a kernel is `D = sum_t a_t g_t'`, summed over positions t and uses, with a
the input and g the cotangent of the output. Much can be said of D without forming it: `v' D w`,
`D . V`, `D . D`. So the pairs (a, g) are what is passed around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._trees import out_of_range_if_negative
from curvax._types import at_least_float32
from curvax.capture._kernels import Kernel
from curvax.capture._record import PerUseArray

# b: examples, s: stack, t: positions, i: inputs (with the 1 of a bias), o: outputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DensePair:
    """Inputs and cotangents as vectors.

    Attributes:
      a: the inputs, `[b, s, t, i]`.
      g: the cotangents of the outputs, `[b, s, t, o]`.
    """

    a: Float[Array, "b s t i"]
    g: Float[Array, "b s t o"]

    def gradient(
        self,
        shape: tuple[int, int, int],
    ) -> Float[Array, "b s i o"]:
        """Return `D = sum_t a_t g_t'` of every example; `shape` is that of the kernel."""
        # Both sides are at hand; a lookup's are not.
        del shape
        return jnp.einsum("bsti,bsto->bsio", self.a, self.g, precision=lax.Precision.HIGHEST)

    def through(
        self,
        v: Float[Array, "s i o"],
    ) -> Float[Array, "b s t o"]:
        """Return `a_t' V`."""
        return jnp.einsum("bsti,sio->bsto", self.a, v, precision=lax.Precision.HIGHEST)

    def columns(
        self,
        first: Array,
        width: int,
    ) -> Float[Array, "b s t w"]:
        """Return `width` entries of the inputs from `first` on, zero beyond the last."""
        # In the precision of the cotangents, as the gradient is.
        a = self.a.astype(self.g.dtype)
        beyond = -a.shape[-1] % width
        padded = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, beyond)])
        return lax.dynamic_slice_in_dim(padded, first, width, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LookupPair:
    """Inputs that are one-hot, as the numbers of the rows that are looked up.

    Attributes:
      rows: the row numbers, `[b, s, t]`; those out of range are no row.
      g: the cotangents of the outputs, `[b, s, t, o]`.
    """

    rows: Int[Array, "b s t"]
    g: Float[Array, "b s t o"]

    def gradient(
        self,
        shape: tuple[int, int, int],
    ) -> Float[Array, "b s i o"]:
        """Return `D`: in row i the sum of the cotangents of all positions that look it up."""

        def of_slice(
            rows: Int[Array, " t"],
            g: Float[Array, "t o"],
        ) -> Float[Array, "i o"]:
            # Cotangents in the basis of a padded factor have more columns than the kernel.
            columns = g.shape[-1]
            zeros = jnp.zeros((shape[1], columns), g.dtype)
            return zeros.at[rows].add(g, mode="drop")

        # Rows out of range are dropped, as the model's own lookup drops them.
        rows = out_of_range_if_negative(self.rows, shape[1])
        gradients: Float[Array, "b s i o"] = jax.vmap(jax.vmap(of_slice))(rows, self.g)
        return gradients

    def through(
        self,
        v: Float[Array, "s i o"],
    ) -> Float[Array, "b s t o"]:
        """Return `a_t' V`: rows of V, zero for row numbers out of range."""

        def of_slice(
            v: Float[Array, "i o"],
            rows: Int[Array, "b t"],
        ) -> Float[Array, "b t o"]:
            return v.at[rows].get(mode="fill", fill_value=0)

        # Rows out of range have a zero input, and so a zero product.
        rows = out_of_range_if_negative(self.rows, v.shape[1])
        products: Float[Array, "b s t o"] = jax.vmap(
            of_slice,
            (0, 1),
            1,
        )(v, rows)
        return products

    def columns(
        self,
        first: Array,
        width: int,
    ) -> Float[Array, "b s t w"]:
        """Return `width` entries of the one-hot inputs from `first` on."""
        # Rows outside of this range have no 1 in it.
        return jax.nn.one_hot(self.rows - first, width, dtype=self.g.dtype)


GradientPair: TypeAlias = DensePair | LookupPair
"""What the gradient of one use is the sum of outer products of."""


def gradient_pairs(
    kernel: Kernel,
    inputs: Sequence[PerUseArray],
    cotangents: Sequence[PerUseArray],
) -> list[GradientPair]:
    """Return the pair of every use of a kernel; of one behind a mask a pair for all uses.

    Args:
      kernel: the kernel.
      inputs: the inputs of its uses, as captured.
      cotangents: the cotangents of their outputs; they, or the inputs, may have further leading
        axes.
    """
    uses = zip(range(len(kernel.uses)), inputs, cotangents, strict=True)
    pairs = [_pair(kernel, j, a, at_least_float32(g)) for j, a, g in uses]
    mask = kernel.view.mask
    return pairs if mask is None else [_masked(kernel, mask, pairs)]


def _masked(
    kernel: Kernel,
    mask: Bool[np.ndarray, "s i o"],
    pairs: Sequence[GradientPair],
) -> LookupPair:
    """Form `mask * D`, which is no sum over positions; write it as the sum `sum_i e_i d_i'`."""
    # The row of a bias is behind no mask.
    num_biases = int(kernel.bias is not None)
    complete = np.pad(mask, [(0, 0), (0, num_biases), (0, 0)], constant_values=1)
    rows = jnp.arange(kernel.shape[1])
    gradient: Any = 0
    for pair in pairs:
        a = pair.columns(jnp.int32(0), len(rows))
        gradient += jnp.matmul(a.swapaxes(-1, -2), pair.g, precision=lax.Precision.HIGHEST)
    gradient = jnp.where(complete, gradient, 0)
    return LookupPair(jnp.broadcast_to(rows, gradient.shape[:-1]), gradient)


def _pair(
    kernel: Kernel,
    j: int,
    a: PerUseArray,
    g: PerUseArray,
) -> GradientPair:
    """Bring the input and the cotangent of use j to the sides of the kernel where they belong."""
    use, has_bias = kernel.uses[j], kernel.bias is not None
    # The one case that stays sparse: a bias would add a dense input, a transpose a dense side.
    if use.kind == "lookup" and not use.transposed and not has_bias:
        return LookupPair(a[..., 0], g)
    if use.kind == "lookup":
        a = jax.nn.one_hot(
            a[..., 0],
            kernel.view.shape[2 if use.transposed else 1],
            dtype=g.dtype,
        )
    a = a.astype(g.dtype)
    if use.transposed:
        # y = W a: the gradient is g a', and the row of the bias is left alone.
        edge = [(0, 0)] * (g.ndim - 1) + [(0, int(has_bias))]
        return DensePair(jnp.pad(g, edge), a)
    if has_bias:
        # Homogeneous coordinates: the bias is a row of the kernel whose input is 1.
        one = jnp.full(
            (*a.shape[:-1], 1),
            use.one * use.biased,
            g.dtype,
        )
        a = jnp.concatenate([a, one], axis=-1)
    return DensePair(a, g)
