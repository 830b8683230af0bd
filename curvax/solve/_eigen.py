"""Solves at any damping from one eigendecomposition of a matrix over parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._trees import as_vector
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
    values, vectors = jnp.linalg.eigh(at_least_float32(dense.matrix))
    return EigenDecomposition(values, vectors)


def absolute(
    eigen: EigenDecomposition,
    b: Params,
    *,
    damping: Any,
) -> Params:
    """Return `(|A| + damping I)^-1 b`, where `|A|` has the absolute eigenvalues of A.

    It is a descent direction for any A if b is a gradient; for positive semidefinite A it is the
    damped solve. An eigenvalue whose absolute value and damping are both zero counts as infinite.

    Args:
      eigen: the eigendecomposition of A, as `decompose` returns it.
      b: a tree of d float numbers.
      damping: a number or scalar array, at least 0.

    Returns:
      a tree like b, in at least float32.

    Cost: `2 d^2` multiplications.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> dense = curvax.solve.Dense(jnp.diag(jnp.array([2.0, -1.0])))
      >>> eigen = curvax.solve.decompose(dense)
      >>> curvax.solve.absolute(eigen, jnp.array([4.0, 4.0]), damping=0.0).tolist()
      [2.0, 4.0]

    References: Dauphin et al. (2014), Identifying and attacking the saddle point problem in
      high-dimensional non-convex optimization, https://arxiv.org/abs/1406.2572.
    """
    # x = Q (|L| + damping I)^-1 Q'b, with A = Q L Q'
    coordinates, to_tree = eigen_coordinates(eigen, b)
    damped_values = jnp.abs(eigen.values) + damping
    # 0 / 0 is 0: a direction without curvature and damping has no step.
    return to_tree(coordinates / jnp.where(damped_values > 0, damped_values, jnp.inf))


def eigen_coordinates(
    eigen: EigenDecomposition, b: Params
) -> tuple[Float[Array, " d"], Callable[[Float[Array, " d"]], Params]]:
    """Return `Q'b`, the coordinates of a tree, and `y -> Q y`, a tree in at least float32."""
    flat, to_tree = as_vector(tree_at_least_float32(b))

    def combine(y: Float[Array, " d"]) -> Params:
        return to_tree(_multiply(eigen.vectors, y).astype(flat.dtype))

    return _multiply(eigen.vectors.T, flat.astype(eigen.values.dtype)), combine


def _multiply(
    matrix: Float[Array, "d d"],
    v: Float[Array, " d"],
) -> Float[Array, " d"]:
    return jnp.matmul(matrix, v, precision=lax.Precision.HIGHEST)
