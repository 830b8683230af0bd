"""Solves at any damping from one eigendecomposition of a matrix over parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from curvax._types import Params, at_least_float32, tree_at_least_float32
from curvax.solve._direct import Dense

# d: parameters


class EigenDecomposition(NamedTuple):
    """Eigendecomposition of a symmetric matrix over all entries of params.

    Attributes:
      values: `[d]`, ascending.
      vectors: `[d, d]`, in columns, in the order of `jax.flatten_util.ravel_pytree`.
    """

    values: Float[Array, " d"]
    vectors: Float[Array, "d d"]


def decompose(dense: Dense) -> EigenDecomposition:
    """Return the eigendecomposition of a matrix, in at least float32.

    Cost: about `9 d^3` multiplications.
    """
    return EigenDecomposition(*jnp.linalg.eigh(at_least_float32(dense.matrix)))


def absolute(eigen: EigenDecomposition, b: Params, *, damping: Any) -> Params:
    """Return `(|A| + damping I)^-1 b`, where `|A|` has the absolute eigenvalues of A: a descent direction for any A.

    For positive semidefinite A it is the damped solve. An eigenvalue whose absolute value and damping are both zero counts
    as infinite.

    Args:
      eigen: of A, by `decompose`.
      b: tree of d float numbers.
      damping: number or scalar array, at least 0.

    Returns:
      a tree like b, in at least float32.

    Cost: `2 d^2` multiplications.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> eigen = curvax.solve.decompose(curvax.solve.Dense(jnp.diag(jnp.array([2.0, -1.0]))))
      >>> curvax.solve.absolute(eigen, jnp.array([4.0, 4.0]), damping=0.0).tolist()
      [2.0, 4.0]

    References: Dauphin et al. (2014), Identifying and attacking the saddle point problem.
    """
    flat, unravel = ravel_pytree(tree_at_least_float32(b))
    multiply = lambda matrix, v: jnp.matmul(matrix, v, precision=lax.Precision.HIGHEST)
    strength = jnp.abs(eigen.values) + damping
    coefficients = multiply(eigen.vectors.T, flat.astype(eigen.values.dtype)) / jnp.where(
        strength > 0, strength, jnp.inf
    )
    x: Params = unravel(multiply(eigen.vectors, coefficients).astype(flat.dtype))
    return x
