"""Lanczos with full re-orthogonalization: a large symmetric matrix as a small tridiagonal one."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

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
    safe_divide,
    wide_dtype,
)
from curvax._types import Matvec, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops, pin_to_iteration
from curvax.estimate._hutchinson import Sampler
from curvax.solve._damped import checked
from curvax.solve._rows import put_row, sharded_zeros, zero_rows

# m: steps, which is rows of the basis; d: parameters
# V: [m, d], the basis, rows orthonormal; T: [m, m], tridiagonal, a on its diagonal and b beside it

NOT_FINITE = (
    "the matrix-vector product is not finite, and neither are the results. "
    "Look for inf or NaN in params, batch and loss."
)


class Lanczos(NamedTuple):
    """The result of m steps of Lanczos: `A V' = V' T + residual e_m'` with T tridiagonal.

    Attributes:
      diagonal: the diagonal a of T.
      off_diagonal: the entries b beside it. Entry j couples rows j and j + 1 of the basis; the last
        one is the norm of the residual. An entry is zero where the rows up to it span an invariant
        subspace.
      basis: V, a tree with a leading axis m, in at least float32.
      residual: a tree like one row, orthogonal to all of them.
    """

    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m"]
    basis: PyTree[Array]
    residual: Params


def lanczos(
    matvec: Matvec,
    start: Params,
    num_steps: int,
    key: PRNGKey | None = None,
) -> Lanczos:
    """Build an orthonormal basis of the Krylov space of A and a vector, in which A is tridiagonal.

    `b_{j+1} v_{j+1} = A v_j - a_j v_j - b_j v_{j-1}`, with `v_0 = start / |start|`. Every vector is
    made orthogonal to all those before it, twice. Where the right-hand side is zero (the rows so
    far span an invariant subspace) the basis goes on with a random vector orthogonal to it and
    `b = 0`: T is then block diagonal, repeated eigenvalues appear, and `start` has no part in what
    follows.

    Args:
      matvec: `v -> A v` on trees like start, A symmetric. It gets vectors of at least float32.
      start: a tree of d float numbers, not all zero.
      num_steps: m, at most d.
      key: the JAX key of the random vectors. With None, everything that would follow an invariant
        subspace is zero, in the basis and in T.

    Returns:
      a `Lanczos`.

    Raises:
      ValueError: `num_steps` lies outside [1, d], or the matvec returns a tree of another kind.
      TypeError: start is not float, or the matvec changes dtypes.

    Cost: m products and `4 m^2 d` multiplications, which is four passes over the basis in a step.
      Memory: m + 3 trees; m + 5 with a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax.spectra import lanczos
      >>> matvec = lambda v: jnp.array([1.0, 2.0, 2.0]) * v
      >>> result = lanczos(matvec, jnp.ones(3), 3, jax.random.key(0))
      >>> [round(x, 4) for x in result.diagonal.tolist()]
      [1.6667, 1.3333, 2.0]
      >>> [round(abs(x), 4) for x in result.off_diagonal.tolist()]
      [0.4714, 0.0, 0.0]

    References: Golub and Van Loan (2013), Matrix computations, section 10.3; Giraud, Langou,
      Rozloznik and van den Eshof (2005), for orthogonalizing twice.
    """
    check_params(start)
    check_steps(start, num_steps=num_steps)

    def step(
        krylov: Krylov,
        j: Array,
    ) -> tuple[Krylov, tuple[Array, Array]]:
        krylov, coefficients, length = extend(matvec, krylov, j, key)
        return krylov, (coefficients[j], length)

    with loops_for(matvec):
        last, (diagonal, off_diagonal) = lax.scan(
            fast_convs_in_loops(step), init_krylov(start, num_steps), jnp.arange(num_steps)
        )
    # b_m v_m: the part of A v_{m-1} outside of the basis
    residual = _times(off_diagonal[-1], last.next_row)
    return Lanczos(diagonal, off_diagonal, last.basis, residual)


def tridiagonal(diagonal: Float[Array, " m"], off_diagonal: Float[Array, " m"]) -> Array:
    """Return the matrix T; the last entry beside the diagonal, for a next row, is left out."""
    beside = jnp.diag(off_diagonal[:-1], 1)
    return jnp.diag(diagonal) + beside + beside.T


class Krylov(NamedTuple):
    """An orthonormal basis that grows by one row at a time.

    Attributes:
      basis: V; rows that are not filled yet are zero.
      next_row: the unit vector orthogonal to them that comes next; zero if it is lost.
      lost: whether the rows span an invariant subspace, so that a random row comes next.
      scale: the largest entry of `V A V'` so far.
    """

    basis: PyTree[Array]
    next_row: Params
    lost: Bool[Array, ""]
    scale: Scalar


@partial(compiled, static=(1,))
def init_krylov(start: Params, num_rows: int) -> Krylov:
    """Return a basis with room for some rows, the first of which will be `start / |start|`."""
    length = norm(start)
    unit = _times(1 / length, tree_at_least_float32(start))
    basis = zero_rows(unit, num_rows)
    return Krylov(basis, unit, lost=jnp.array(False), scale=jnp.zeros_like(length))


def extend(
    matvec: Matvec,
    krylov: Krylov,
    j: Array,
    key: PRNGKey | None,
) -> tuple[Krylov, Float[Array, " m"], Scalar]:
    """Do one step of Lanczos: fill row j of the basis, multiply it by A, and find the next row.

    Returns:
      the basis with the row; the coefficients `V A v_j`, zero after j; and `b_{j+1}`, the norm of
      the part of `A v_j` outside of the basis, zero if that part is nothing but rounding.
    """
    row = krylov.next_row if key is None else _row_or_random(krylov, jax.random.fold_in(key, j))
    product = checked(pin_to_iteration(matvec, j), row)
    return _orthogonalized(krylov, row, product, j)


@compiled
def _row_or_random(krylov: Krylov, key: PRNGKey) -> Params:
    """Return the next row, or where it is lost, a random unit vector orthogonal to the basis."""

    def random_row() -> Params:
        row, _ = reject(krylov.basis, draw(_uniform, key, krylov.next_row))
        # The length is 0 where the basis is complete: the row is then zero.
        return _times(safe_divide(1, norm(row)), row)

    return lax.cond(krylov.lost, random_row, lambda: krylov.next_row)


@partial(compiled, donate=(0,))
def _orthogonalized(
    krylov: Krylov, row: Params, product: Params, j: Array
) -> tuple[Krylov, Float[Array, " m"], Scalar]:
    """Put v_j into the basis, and split `A v_j` into its part along the basis and the next row.

    Row j itself is not in the basis yet, so that its own coefficient is taken here, once before and
    once after the rejection of the other rows.
    """
    # a_j = v_j'A v_j, and r = A v_j - sum_{i <= j} (v_i'A v_j) v_i
    along_row = inner_product(row, product)
    residual, coefficients = reject(krylov.basis, add_scaled(product, -along_row, row))
    correction = inner_product(row, residual)
    residual = add_scaled(residual, -correction, row)
    coefficients = coefficients.at[j].set(along_row + correction)

    # b_{j+1} = |r|, v_{j+1} = r / b_{j+1}; below the rounding of A v_j it says nothing
    length = norm(residual)
    scale = jnp.maximum(krylov.scale, jnp.max(jnp.abs(coefficients)))
    lost = length <= 10 * jnp.finfo(length.dtype).eps * scale
    next_row = _times(jnp.where(lost, 0, 1 / jnp.where(lost, 1, length)), residual)

    # The write needs the length, so that it comes after all reads of the basis: else XLA copies it.
    # (A length is never negative; NaN in it is in the row too.)
    row = jax.tree.map(lambda x: jnp.where(length >= 0, x, jnp.nan), row)
    basis = put_row(krylov.basis, row, j)
    length = jnp.where(lost, 0, length)
    return Krylov(basis, next_row, lost, jnp.maximum(scale, length)), coefficients, length


def reject(
    basis: PyTree[Array],
    v: Params,
) -> tuple[Params, Float[Array, " m"]]:
    """Remove from v its part along the basis, by classical Gram-Schmidt done twice.

    Returns:
      the part of v orthogonal to the basis; the coordinates `V v` of the part along it.
    """
    first = row_products(basis, v)
    v = add_scaled(v, -1, combine_rows(first, basis))
    # The angle between rows that stays is the rounding of these products: the second time they are
    # sums and no matrix product, which on CPUs adds up a million terms one after the other and
    # loses half the digits of float32. There a batched sum does so too (200,000 terms on JAX 0.12:
    # 6e-6 remain of an angle; row by row 5e-8, in the same time). Elsewhere sums are trees.
    if jax.default_backend() == "cpu":
        second = lax.map(lambda row: inner_product(row, v), basis)
    else:
        second = jax.vmap(inner_product, (0, None))(basis, v)
    return add_scaled(v, -1, combine_rows(second, basis)), first + second


def draw(
    sampler: Sampler,
    key: PRNGKey,
    like: Params,
) -> Params:
    """Draw a probe like a tree, in at least float32 and with its shardings."""
    probe = sampler(key, tree_at_least_float32(like))
    return jax.tree.map(lambda z, x: z + sharded_zeros(x, wide_dtype(x)), probe, like)


def check_steps(params: Params, **values: int) -> None:
    """Raise unless a named number of steps, or of vectors, is from 1 to the entries of params."""
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
