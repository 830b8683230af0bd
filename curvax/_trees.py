"""Linear algebra of pytrees as vectors, and of stacks of them (a leading axis) as matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._types import Params, Scalar, at_least_float32
from curvax._xla import with_auto_sharding

T = TypeVar("T")


def inner_product(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    """Sum the products of all entries, in at least float32."""

    # Not a product of flattened leaves, which would gather those that are sharded.
    def of_leaves(x: Array, y: Array) -> Array:
        return jnp.sum(at_least_float32(x) * at_least_float32(y))

    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    total = sum(of_leaves(x, y) for x, y in leaves)
    return jnp.asarray(total)


def norm(a: PyTree[Array]) -> Scalar:
    """Return the Euclidean norm of all entries together, in at least float32."""
    return jnp.sqrt(inner_product(a, a))


def add_scaled(
    a: PyTree[Array],
    factor: Any,
    b: PyTree[Array],
) -> PyTree[Array]:
    """Return `a + factor b` in the dtypes of a."""
    # The sum is rounded once: a 16-bit `factor * y` would lose what a wider factor holds.
    return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)


def scaled(factor: Any, tree: PyTree[Array]) -> PyTree[Array]:
    """Return `factor tree` in the dtypes of the tree."""
    # A factor of float32 would otherwise widen 16-bit leaves.
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def cast_like(tree: PyTree[Array], like: PyTree[Any]) -> PyTree[Array]:
    """Cast every leaf of `tree` to the dtype of the leaf of `like` that stands in its place."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def safe_divide(x: Any, y: Array) -> Array:
    """Return `x / y`, and 0 where y is 0; derivatives are finite there too."""
    # The division itself must not see the zero: its derivative would be 0 * inf = NaN.
    is_zero = y == 0
    return jnp.where(is_zero, 0, x / jnp.where(is_zero, 1, y))


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return a power of two within a factor of 2 of `|x|`, or 1 where x is 0 or not finite.

    As a unit it brings numbers of any size to about 1, and dividing by it rounds nothing.
    """
    # A float without the bits of its mantissa. It has no derivative of use.
    rounded = lax.reduce_precision(jnp.abs(lax.stop_gradient(x)), jnp.finfo(x.dtype).nexp, 0)
    return jnp.where((rounded > 0) & jnp.isfinite(rounded), rounded, 1)


def select_slices(condition: Any, new: T, old: T) -> T:
    """Return `new` in the slices of a stack where the condition `[s]` holds, else `old`.

    Every array of both trees begins with the stack's axis; a scalar belongs to all slices, and is
    that of `new`.
    """
    condition = jnp.asarray(condition)

    def selected(x: Array, y: Array) -> Array:
        if x.ndim == 0:
            return x
        return jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    tree: T = jax.tree.map(selected, new, old)
    return tree


def out_of_range_if_negative(ids: Int[Array, "..."], size: int) -> Int[Array, "..."]:
    """Replace negative numbers by `size`, the first that is out of range.

    Indexing counts negative numbers from the end, so that a wrong one would silently fetch some
    other entry; numbers past the end go where the lookup's `mode` sends them.
    """
    # In 8 or 16 bits `size` itself could wrap around to a number in range.
    wide = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    return jnp.where(wide < 0, size, wide)


def row_products(rows: PyTree[Array], v: Params) -> Float[Array, " m"]:
    """Return the inner products of m rows with v, in at least float32; one pass over the rows."""

    def products(rows: list[Array], v: list[Array]) -> Array:
        total = sum(leaf_products(x, y) for x, y in zip(rows, v, strict=True))
        return jnp.asarray(total)

    return with_auto_sharding(products, jax.tree.leaves(rows), jax.tree.leaves(v))


def combine_rows(coefficients: Float[Array, " m"], rows: PyTree[Array]) -> Params:
    """Return `sum_i c_i row_i`, in at least float32; one pass over the rows."""
    return jax.tree.map(lambda x: leaf_combination(coefficients, x), rows)


def leaf_products(rows: Float[Array, "m ..."], v: Float[Array, "..."]) -> Float[Array, " m"]:
    """Do `row_products` for one leaf."""
    if rows.dtype == wide_dtype(rows):
        return jnp.tensordot(rows, v.astype(rows.dtype), v.ndim, precision=lax.Precision.HIGHEST)
    # A matrix product would first widen all rows in memory; a sum of products widens as it reads.
    entries = tuple(range(1, rows.ndim))
    products = at_least_float32(rows) * at_least_float32(v)
    return jnp.sum(products, axis=entries)


def leaf_combination(c: Float[Array, " m"], rows: Float[Array, "m ..."]) -> Float[Array, "..."]:
    """Do `combine_rows` for one leaf."""
    dtype = wide_dtype(rows)
    # c' R, where nothing has to be widened.
    if rows.dtype == dtype:
        return jnp.tensordot(c.astype(dtype), rows, 1, precision=lax.Precision.HIGHEST)

    # Row by row, so that only one row at a time is wide in memory.
    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
        coefficient, row_bits = term
        row = lax.bitcast_convert_type(row_bits, rows.dtype)
        return total + coefficient.astype(dtype) * row.astype(dtype), None

    zeros = jnp.zeros(rows.shape[1:], dtype)
    combination, _ = lax.scan(add, zeros, (c, bits(rows)))
    return combination


def bits(x: Array) -> Array:
    """Return 16-bit floats as integers, and anything else as it is.

    To slice or update 16-bit floats, XLA on CPUs widens the whole array to float32.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def wide_dtype(x: Any) -> Any:
    """Return the dtype of x, or float32 if that has more bits."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dimension(params: Params) -> int:
    """Return the number of entries of all leaves."""
    return sum(x.size for x in jax.tree.leaves(params))


def as_vector(tree: Params) -> tuple[Float[Array, " d"], Callable[[Float[Array, " d"]], Params]]:
    """Return all entries as one vector, and the map from such vectors to trees like this one.

    As `jax.flatten_util.ravel_pytree`. Of leaves that are sharded explicitly, whose entries have no
    common sharding as one axis, the vector is replicated; the map shards its trees as they are.
    """

    def flatten(tree: Params) -> Array:
        return ravel_pytree(tree)[0]

    def unflatten(v: Array, tree: Params) -> Params:
        return ravel_pytree(tree)[1](v)

    def to_tree(v: Float[Array, " d"]) -> Params:
        return with_auto_sharding(unflatten, v, tree, like=tree)

    return with_auto_sharding(flatten, tree), to_tree


def by_path(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by path, as `jax.tree_util.keystr` prints it."""
    leaves = jax.tree.leaves_with_path(tree)
    return {keystr(path): x for path, x in leaves}


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Tell whether every entry is a finite number."""
    by_leaf = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, by_leaf, jnp.array(True))


def finite_slices(tree: PyTree) -> Bool[Array, " s"]:
    """Tell of which slices of a stack every entry is finite, in all arrays of a tree."""
    by_leaf = []
    for x in jax.tree.leaves(tree):
        axes = tuple(range(1, x.ndim))
        by_leaf.append(jnp.all(jnp.isfinite(x), axis=axes))
    return functools.reduce(jnp.logical_and, by_leaf)


def keep_unless(
    good: Bool[Array, ""],
    new: T,
    old: T,
) -> T:
    """Return `new` if it is good, else `old`."""
    # A selection by leaf: NaN in what is not chosen does no harm.
    chosen: T = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    return chosen
