"""Dense matrices of matvecs, for tests and tiny models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._checks import check_count, check_params
from curvax._trees import as_vector
from curvax._types import Matvec, Params


def to_dense(matvec: Matvec, params: Params, *, chunk_size: int = 1) -> Float[Array, "d d"]:
    """Form the matrix of `matvec`, column by column: `M[:, i] = matvec(e_i)`.

    Args:
      matvec: the linear map, on trees like params.
      params: pytree of d float numbers in all; rows and columns follow
        `jax.flatten_util.ravel_pytree`.
      chunk_size: number of columns worked on together under `vmap`; memory grows with it.

    Returns:
      An array `[d, d]`.

    Raises:
      ValueError: `chunk_size` is below 1.
      TypeError: params are not float.

    Cost: d products; d^2 numbers, and the memory of `chunk_size` products.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
      >>> matvec = curvax.hvp(lambda p: jnp.sum(p["a"] * p["b"] ** 2), params)
      >>> curvax.to_dense(matvec, params).tolist()
      [[0.0, 2.0], [2.0, 2.0]]
    """
    check_params(params)
    check_count(1, chunk_size=chunk_size)
    flat, to_tree = as_vector(params)

    # M e_i, the i-th column.
    def column(e: Float[Array, " d"]) -> Float[Array, " d"]:
        product, _ = as_vector(matvec(to_tree(e)))
        return product

    identity = jnp.eye(flat.size, dtype=flat.dtype)
    # None: a plain loop, without a `vmap` over one column.
    together = chunk_size if chunk_size > 1 else None
    columns: Array = jax.lax.map(column, identity, batch_size=together)
    return columns.T
