"""Linear algebra of pytrees as vectors, and of stacks of them (a tree with a leading axis) as matrices."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr
from jaxtyping import Array, Bool, Float, PyTree

from curvax._types import Params, Scalar, at_least_float32
from curvax._xla import with_auto_sharding

T = TypeVar("T")


def inner_product(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    """Sum the products of all entries, in at least float32."""
    # Not a product of flattened leaves, which would gather those that are sharded.
    each = [
        jnp.sum(at_least_float32(x) * at_least_float32(y))
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    ]
    return jnp.asarray(sum(each))


def norm(a: PyTree[Array]) -> Scalar:
    """Return the Euclidean norm of all entries together, in at least float32."""
    return jnp.sqrt(inner_product(a, a))


def add_scaled(a: PyTree[Array], factor: Any, b: PyTree[Array]) -> PyTree[Array]:
    """Return `a + factor b` in the dtypes of a."""
    return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)


def row_products(rows: PyTree[Array], v: Params) -> Float[Array, " m"]:
    """Return the inner products of m rows with v, in at least float32; one pass over the rows."""

    def products(rows: list[Array], v: list[Array]) -> Array:
        return jnp.asarray(sum(leaf_products(x, y) for x, y in zip(rows, v, strict=True)))

    return with_auto_sharding(products, jax.tree.leaves(rows), jax.tree.leaves(v))


def combine_rows(coefficients: Float[Array, " m"], rows: PyTree[Array]) -> Params:
    """Return `sum_i c_i row_i`, in at least float32; one pass over the rows."""
    return jax.tree.map(lambda x: leaf_combination(coefficients, x), rows)


def leaf_products(rows: Float[Array, "m ..."], v: Float[Array, "..."]) -> Float[Array, " m"]:
    """Do `row_products` for one leaf."""
    if rows.dtype == wide_dtype(rows):
        return jnp.tensordot(rows, v.astype(rows.dtype), v.ndim, precision=lax.Precision.HIGHEST)
    # A matrix product would first widen all rows in memory; a sum of products widens as it reads.
    return jnp.sum(at_least_float32(rows) * at_least_float32(v), axis=tuple(range(1, rows.ndim)))


def leaf_combination(c: Float[Array, " m"], rows: Float[Array, "m ..."]) -> Float[Array, "..."]:
    """Do `combine_rows` for one leaf."""
    if rows.dtype == wide_dtype(rows):
        return jnp.tensordot(c.astype(rows.dtype), rows, 1, precision=lax.Precision.HIGHEST)

    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:  # row by row, likewise
        row = lax.bitcast_convert_type(term[1], rows.dtype)
        return total + term[0].astype(total.dtype) * row.astype(total.dtype), None

    return lax.scan(add, jnp.zeros(rows.shape[1:], wide_dtype(rows)), (c, bits(rows)))[0]


def bits(x: Array) -> Array:
    """Return 16-bit floats as integers: to slice or update those, XLA on CPUs widens the whole array to float32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def wide_dtype(x: Any) -> Any:
    """Return the dtype of x, or float32 if that has more bits."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dimension(params: Params) -> int:
    """Return the number of entries of all leaves."""
    return sum(x.size for x in jax.tree.leaves(params))


def by_path(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by path, as `jax.tree_util.keystr` prints it."""
    return {keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def safe_divide(x: Any, y: Array) -> Array:
    """Return `x / y` for y of at least 0, and x itself where y is 0."""
    return jnp.asarray(x / jnp.where(y > 0, y, 1))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every entry is a finite number."""
    return functools.reduce(
        jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)], jnp.array(True)
    )


def keep_unless(good: Bool[Array, ""], new: T, old: T) -> T:
    """Return `new` if it is good, else `old`."""
    kept: T = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    return kept
