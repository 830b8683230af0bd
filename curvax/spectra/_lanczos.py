"""Lanczos with full re-orthogonalization: a large symmetric matrix as a small tridiagonal one on an orthonormal basis."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from curvax._checks import check_count, check_params
from curvax._host import compiled, loops_for
from curvax._trees import (
    add_scaled,
    combine_rows,
    dimension,
    inner_product,
    norm,
    row_products,
    wide_dtype,
)
from curvax._types import Matvec, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops, pin_to_iteration
from curvax.estimate._hutchinson import Sampler
from curvax.solve._damped import checked

# m: vectors of the basis; V: the basis, its rows orthonormal; d: parameters

NOT_FINITE = "the matrix-vector product is not finite, and neither are the results. Look for inf or NaN in params, batch and loss."


class Lanczos(NamedTuple):
    """What m steps of Lanczos leave: `A V' = V' T + residual e_m'`, T tridiagonal.

    Attributes:
      diagonal: of T.
      off_diagonal: beside it; entry j couples rows j and j + 1 of the basis, the last one is the norm of the residual. Zero
        where the rows so far span an invariant subspace.
      basis: V, a tree with a leading axis m, in at least float32.
      residual: a tree like one row, orthogonal to all of them.
    """

    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m"]
    basis: PyTree[Array]
    residual: Params


def lanczos(matvec: Matvec, start: Params, num_steps: int, key: PRNGKey | None = None) -> Lanczos:
    """Build an orthonormal basis of the Krylov space of A and a vector, in which A is tridiagonal.

    `b_{j+1} v_{j+1} = A v_j - a_j v_j - b_j v_{j-1}`, with `v_0 = start / |start|`; every vector is made orthogonal to all
    before it, twice. Where nothing is left (an invariant subspace) the basis goes on with a random vector orthogonal to it
    and `b = 0`: T is then block diagonal, repeated eigenvalues appear, and `start` keeps no part in what follows.

    Args:
      matvec: `v -> A v` on trees like start, A symmetric. It gets vectors of at least float32.
      start: tree of d float numbers, not all zero.
      num_steps: m, at most d.
      key: JAX key of the random vectors; None: what would follow an invariant subspace is zero, in basis and T.

    Returns:
      `Lanczos`.

    Raises:
      ValueError: `num_steps` outside [1, d]; a matvec that returns another tree than it is given.
      TypeError: start not float; a matvec that changes dtypes.

    Cost: m products and `4 m^2 d` multiplications, four passes over the basis a step. Memory: m + 3 trees; m + 5 with a
      key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax.spectra import lanczos
      >>> found = lanczos(lambda v: jnp.array([1.0, 2.0, 2.0]) * v, jnp.ones(3), 3, jax.random.key(0))
      >>> [round(x, 4) for x in found.diagonal.tolist()], [round(abs(x), 4) for x in found.off_diagonal.tolist()]
      ([1.6667, 1.3333, 2.0], [0.4714, 0.0, 0.0])

    References: Golub and Van Loan (2013), Matrix computations, section 10.3; Giraud, Langou, Rozloznik and van den Eshof
      (2005), for orthogonalizing twice.
    """
    check_params(start)
    check_steps(start, num_steps=num_steps)

    def step(krylov: Krylov, j: Array) -> tuple[Krylov, tuple[Array, Array]]:
        krylov, coefficients, rest = extend(matvec, krylov, j, key)
        return krylov, (coefficients[j], rest)

    with loops_for(matvec):
        last, (diagonal, rests) = lax.scan(
            fast_convs_in_loops(step), first(start, num_steps), jnp.arange(num_steps)
        )
    return Lanczos(diagonal, rests, last.basis, _times(rests[-1], last.following))


class Krylov(NamedTuple):
    """An orthonormal basis that grows by one row at a time.

    Attributes:
      basis: V; rows not yet filled are zero.
      following: unit vector orthogonal to them, the next row; zero if it is lost.
      lost: whether the rows span an invariant subspace, so that a random row comes next.
      scale: largest entry of `V A V'` so far.
    """

    basis: PyTree[Array]
    following: Params
    lost: Bool[Array, ""]
    scale: Scalar


@partial(compiled, static=(1,))
def first(start: Params, size: int) -> Krylov:
    """Return a basis with room for `size` rows, the first to be `start / |start|`."""
    length = norm(start)
    unit = _times(1 / length, tree_at_least_float32(start))
    return Krylov(empty_rows(unit, size), unit, jnp.array(False), jnp.zeros_like(length))


def extend(
    matvec: Matvec, krylov: Krylov, j: Array, key: PRNGKey | None
) -> tuple[Krylov, Float[Array, " m"], Scalar]:
    """Put the next row in place j, multiply it by A, and find the row to follow.

    Returns:
      the grown basis; the coefficients `V A v_j`, zero after j; the norm of the rest of `A v_j`, of which the following row
      is the direction, or zero if nothing was left.
    """
    row = krylov.following if key is None else _found(krylov, jax.random.fold_in(key, j))
    return _orthogonalized(krylov, row, checked(pin_to_iteration(matvec, j), row), j)


@compiled
def _found(krylov: Krylov, key: PRNGKey) -> Params:
    """Return the next row, at random if it is lost."""

    def random() -> Params:
        row, _ = reject(krylov.basis, draw(_uniform, key, krylov.following))
        length = norm(row)
        return _times(
            1 / jnp.where(length == 0, 1, length), row
        )  # zero where the basis is complete

    return lax.cond(krylov.lost, random, lambda: krylov.following)


@partial(compiled, donate=(0,))
def _orthogonalized(
    krylov: Krylov, row: Params, product: Params, j: Array
) -> tuple[Krylov, Float[Array, " m"], Scalar]:
    along = inner_product(row, product)
    rest, coefficients = reject(krylov.basis, add_scaled(product, -along, row))
    again = inner_product(row, rest)
    rest = add_scaled(rest, -again, row)
    coefficients = coefficients.at[j].set(along + again)
    length = norm(rest)
    scale = jnp.maximum(krylov.scale, jnp.max(jnp.abs(coefficients)))
    lost = length <= 10 * jnp.finfo(length.dtype).eps * scale
    following = _times(jnp.where(lost, 0, 1 / jnp.where(lost, 1, length)), rest)
    # The write needs the length, so that it comes after all reads of the basis: else XLA copies it.
    kept = jax.tree.map(lambda x: jnp.where(length >= 0, x, jnp.nan), row)
    length = jnp.where(lost, 0, length)
    basis = put_row(krylov.basis, kept, j)
    return Krylov(basis, following, lost, jnp.maximum(scale, length)), coefficients, length


def empty_rows(like: Params, size: int) -> PyTree[Array]:
    """Return `size` rows of zeros, sharded as `like`, in at least float32."""
    return jax.tree.map(
        lambda p: jnp.broadcast_to(jnp.zeros_like(p, wide_dtype(p))[None], (size, *p.shape)), like
    )


def put_row(rows: PyTree[Array], row: Params, index: Any) -> PyTree[Array]:
    """Write one row."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, index, 0), rows, row)


def reject(basis: PyTree[Array], v: Params) -> tuple[Params, Float[Array, " m"]]:
    """Take from v its part along the basis, by Gram-Schmidt twice; return the rest and the coordinates of that part."""
    first = row_products(basis, v)
    v = add_scaled(v, -1, combine_rows(first, basis))
    # A matrix product on CPUs adds up a million terms one after the other, and loses half the digits of float32. Here that
    # would stay as an angle between rows; a sum keeps them, at half the speed.
    second = jax.vmap(inner_product, (0, None))(basis, v)
    return add_scaled(v, -1, combine_rows(second, basis)), first + second


def draw(sampler: Sampler, key: PRNGKey, like: Params) -> Params:
    """Draw a probe like a tree, in at least float32 and with its shardings."""
    spread = lambda z, x: z + jnp.zeros_like(x, wide_dtype(x))
    return jax.tree.map(spread, sampler(key, tree_at_least_float32(like)), like)


def check_steps(params: Params, **values: int) -> None:
    """Raise unless a named number of steps, or of vectors, lies between 1 and the entries of params."""
    check_count(1, **values)
    for name, value in values.items():
        if value > dimension(params):
            raise ValueError(
                f"{name} must be at most the {dimension(params)} entries of params, got {value}."
            )


def _uniform(key: PRNGKey, like: Params) -> Params:
    return optax.tree.random_like(key, like, partial(jax.random.uniform, minval=-1))


def _times(factor: Scalar, v: Params) -> Params:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, v)
