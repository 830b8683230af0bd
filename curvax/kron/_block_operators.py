"""What a block is as a linear operator on matrices: one class for each form, and its spectrum."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax.kron._kron_factor import KronFactor, Matrices, PerSlice, matmul


class BlockSpectrum(NamedTuple):
    """What is known of the curvature of every slice of a block, `[stack]` each.

    Attributes:
      trace: sum of the eigenvalues of the undamped block; of one over time, of its lag 0 alone.
      largest: largest eigenvalue of the damped block; a lower bound where power iteration finds it.
      smallest: smallest eigenvalue of the damped block; an upper bound likewise.
    """

    trace: PerSlice
    largest: PerSlice
    smallest: PerSlice


class FactoredOperator(NamedTuple):
    """A block that is a Kronecker product, `V -> left V right`.

    Attributes:
      left: on the inputs' side.
      right: on the outputs' side.
    """

    left: KronFactor
    right: KronFactor

    def times(self, matrix: Matrices) -> Matrices:
        """Multiply matrices by the block."""
        return self.right.right(self.left.left(matrix))


class EigenOperator(NamedTuple):
    """A block that two matrices make diagonal, `V -> left (left' V right * scale) right'`.

    Attributes:
      left: eigenvectors of A, `[stack, in, in]` in columns, or None for the identity.
      right: eigenvectors of G, `[stack, out, out]`, or None for the identity.
      scale: powers of damped eigenvalues, `[stack, in, out]`.
    """

    left: Array | None
    right: Array | None
    scale: Array

    def times(self, matrix: Matrices) -> Matrices:
        """Multiply matrices by the block."""
        # into the basis, `left' V right`
        if self.left is not None:
            matrix = matmul(_t(self.left), matrix)
        if self.right is not None:
            matrix = matmul(matrix, self.right)
        matrix = matrix * self.scale
        # and back
        if self.left is not None:
            matrix = matmul(self.left, matrix)
        if self.right is not None:
            matrix = matmul(matrix, _t(self.right))
        return matrix

    def diagonal(self) -> Matrices:
        """Return the diagonal of the block, `left^2 scale (right^2)'` with squares by entry."""
        diagonal = self.scale
        if self.left is not None:
            diagonal = matmul(jnp.square(self.left), diagonal)
        if self.right is not None:
            diagonal = matmul(diagonal, _t(jnp.square(self.right)))
        return diagonal


class ChainOperator(NamedTuple):
    """The inverse of a block over infinite time, `V -> K_A D K_G' - N_A D N_G'`.

    Here `D = (K_A' V K_G - N_A' V N_G) * scale`, so that the block is symmetric, and positive
    definite where the map from V to D is one to one.

    Attributes:
      left: K_A, `[stack, in, in]`.
      right: K_G, `[stack, out, out]`.
      next_left: N_A, `[stack, in, in]`.
      next_right: N_G, `[stack, out, out]`.
      scale: `[stack, in, out]`.
    """

    left: Array
    right: Array
    next_left: Array
    next_right: Array
    scale: Array

    def times(self, matrix: Matrices) -> Matrices:
        """Multiply matrices by the block."""
        at_time = matmul(matmul(_t(self.left), matrix), self.right)
        at_next = matmul(matmul(_t(self.next_left), matrix), self.next_right)
        d = (at_time - at_next) * self.scale
        back = matmul(matmul(self.left, d), _t(self.right))
        back_next = matmul(matmul(self.next_left, d), _t(self.next_right))
        return back - back_next

    def diagonal(self) -> Matrices:
        """Return the diagonal of the block."""

        # sum_jp scale_jp (K_ij K_op - N_ij N_op)^2 at (i, o), the square multiplied out.
        def sum_of(left: Array, right: Array) -> Matrices:
            return matmul(matmul(left, self.scale), _t(right))

        squares = sum_of(jnp.square(self.left), jnp.square(self.right))
        mixed = sum_of(self.left * self.next_left, self.right * self.next_right)
        squares_next = sum_of(jnp.square(self.next_left), jnp.square(self.next_right))
        return squares - 2 * mixed + squares_next


BlockOperator: TypeAlias = FactoredOperator | EigenOperator | ChainOperator


def outer(x: Float[Array, "s i"], y: Float[Array, "s o"]) -> Float[Array, "s i o"]:
    """Multiply every entry of one vector by every entry of another, slice by slice."""
    return x[:, :, None] * y[:, None, :]


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)
