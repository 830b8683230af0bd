"""Dense matrices of matvecs, for tests and tiny models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from curvax._checks import check_count, check_params
from curvax._types import Matvec, Params


def to_dense(matvec: Matvec, params: Params, *, chunk_size: int = 1) -> Float[Array, "d d"]:
    """Form the matrix of `matvec`, column by column: `M[:, i] = matvec(e_i)`.

    Args:
      matvec: linear map on trees like params.
      params: pytree of d float numbers in all; rows and columns follow `jax.flatten_util.ravel_pytree`.
      chunk_size: columns worked on together under `vmap`; memory grows with it.

    Returns:
      `[d, d]` array.

    Cost: d products; d^2 numbers, and the memory of `chunk_size` products.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
      >>> curvax.to_dense(curvax.hvp(lambda p: jnp.sum(p["a"] * p["b"] ** 2), params), params).tolist()
      [[0.0, 2.0], [2.0, 2.0]]
    """
    check_params(params)
    check_count(1, chunk_size=chunk_size)
    flat, unravel = ravel_pytree(params)
    column = lambda e: ravel_pytree(matvec(unravel(e)))[0]
    together = chunk_size if chunk_size > 1 else None
    columns: Array = jax.lax.map(column, jnp.eye(flat.size, dtype=flat.dtype), batch_size=together)
    return columns.T
