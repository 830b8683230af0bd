"""A window of m gradients as a low-rank Fisher matrix: insert one, multiply by the damped inverse (M-FAC)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import optax
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PyTree

from curvax._checks import check_choice, check_count, check_damping, check_like, check_params
from curvax._trees import all_finite, bits, keep_unless, leaf_combination, leaf_products, wide_dtype
from curvax._types import Count, Matvec, Params, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.solve._rows import zero_rows

# m: rows of the window, b: blocks of the matrix (1, or one for each leaf), d: parameters
Gram = Float[Array, "b m m"]
Coefficients = Float[Array, "b m"]

BLOCKS = {"full": "one block", "leaf": "a block for each leaf"}
DIVISORS = {"window": "rows of the window, empty ones too", "count": "gradients that it holds"}


class Window(NamedTuple):
    """The last m gradients, and their inner products; empty rows are zero.

    Attributes:
      rows: a tree like params with a leading axis m, in the dtype that they are stored in.
      gram: `S = G G'` of the stored rows, `[1, m, m]`, or `[leaves, m, m]` of each leaf by itself; in at least float32.
      count: gradients inserted so far; the next one goes to row `count % m`.
    """

    rows: PyTree[Array]
    gram: Gram
    count: Count


def init_window(params: Params, size: int, *, blocks: str = "full", dtype: Any = None) -> Window:
    """Return a window without gradients, for `size` trees like `params`, sharded as they are.

    Args:
      params: pytree of float arrays; only shapes, dtypes and shardings matter.
      size: rows m.
      blocks: "full", or "leaf" for a matrix without entries between leaves.
      dtype: of the stored rows, e.g. `jnp.bfloat16`; None: that of params, but at least float32.
    """
    check_params(params)
    check_count(1, window_size=size)
    check_choice("blocks", blocks, BLOCKS)
    leaves = jax.tree.leaves(params)
    rows = zero_rows(params, size, dtype)
    number = 1 if blocks == "full" else len(leaves)
    gram = jnp.zeros((number, size, size), jnp.result_type(jnp.float32, *leaves))
    return Window(rows, gram, jnp.zeros([], jnp.int32))


def window_of(
    rows: PyTree[Array], *, size: int | None = None, blocks: str = "full", dtype: Any = None
) -> Window:
    """Return a window of given gradients: a tree with a leading axis, such as `curvax.per_example_grads`.

    Args:
      rows: k gradients; `F = (1/N) sum_i g_i g_i'`.
      size: m, at least k; None: k. The rest is empty.
      blocks: as in `init_window`.
      dtype: as in `init_window`.

    Cost: `m^2 d / 2` multiplications.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.solve.window_of(jnp.array([[3.0, 4.0], [0.0, 1.0]])).gram[0].tolist()
      [[25.0, 4.0], [4.0, 1.0]]
    """
    check_params(rows)
    check_choice("blocks", blocks, BLOCKS)
    given = {len(x) for x in jax.tree.leaves(rows)}
    check_count(max(given), window_size=max(given) if size is None else size)

    def build(rows: PyTree[Array]) -> Window:
        fill = lambda x: [(0, (size or len(x)) - len(x)), *[(0, 0)] * (x.ndim - 1)]
        stored = jax.tree.map(
            lambda x: jnp.pad(x, fill(x)).astype(wide_dtype(x) if dtype is None else dtype), rows
        )
        leaves = jax.tree.leaves(stored)
        each = jnp.stack(
            [_gram(x).astype(jnp.result_type(jnp.float32, *jax.tree.leaves(rows))) for x in leaves]
        )
        return Window(
            stored,
            each if blocks == "leaf" else jnp.sum(each, axis=0, keepdims=True),
            jnp.int32(max(given)),
        )

    return with_auto_sharding(build, rows)


def insert(window: Window, gradient: Params) -> Window:
    """Put a gradient in the place of the oldest: one pass over the rows for the Gram matrix, and one row is written.

    A gradient that is not finite, or whose squared norm is not, is left out.
    """
    stored = _stored(window, gradient)
    products = inner_products(window, stored)
    good = all_finite((products, _squares(window, stored)))
    return _write(window, stored, _crossed(window, stored, products, good), good)


def insert_and_multiply(
    window: Window, gradient: Params, pred: Bool[Array, ""], damping: Any, divisor: str
) -> tuple[Params, Window]:
    """Insert a gradient where `pred` holds, and multiply it by the damped inverse; the window is read twice in all.

    Where it is inserted, at slot e, the product is `N G' (N damping I + S)^-1 e`: no cancellation of v with its
    projection. If a product that is not finite comes of it, the gradient is left out.

    Returns:
      the product, like gradient, in at least float32; the window.
    """
    stored, slot = _stored(window, gradient), window.count % window.gram.shape[-1]
    products = inner_products(window, stored)
    after = _crossed(window, stored, products, pred)  # its rows are still without the gradient
    number, damping, factor = solve = window_solve(after, damping, divisor)
    is_slot = jnp.arange(window.gram.shape[-1]) == slot
    weights = _solve(
        after.gram,
        solve,
        jnp.where(pred, number * is_slot.astype(factor.dtype), -products / damping[:, None]),
    )
    others = combine(window, jnp.where(pred & is_slot, 0, weights))
    own = jnp.where(pred, weights[:, slot], 1 / damping)
    product = map_blocks(lambda c, v, rest: c * v + rest, own, stored, others)
    # The condition makes the row's write wait for all reads; without that XLA copies the window.
    good = pred & all_finite(product)
    return product, _write(window, stored, after, good)


def _stored(window: Window, gradient: Params) -> Params:
    check_like(gradient, row_like(window), "gradient", "a row of the window")
    return jax.tree.map(lambda rows, g: g.astype(rows.dtype), window.rows, gradient)


def _squares(window: Window, v: Params) -> Float[Array, " b"]:
    """Return the squared norm, block by block."""
    each = [jnp.sum(at_least_float32(x) ** 2).astype(window.gram.dtype) for x in jax.tree.leaves(v)]
    return (
        jnp.stack(each)
        if len(window.gram) > 1
        else sum(each, start=jnp.zeros(1, window.gram.dtype))
    )


def _crossed(
    window: Window, stored: Params, products: Coefficients, pred: Bool[Array, ""]
) -> Window:
    """Put the inner products of a gradient into the Gram matrix, and count it, where `pred` holds."""
    slot = window.count % window.gram.shape[-1]

    def cross(gram: Gram, products: Coefficients, squares: Array, slot: Array, pred: Array) -> Gram:
        products = lax.dynamic_update_index_in_dim(products, squares, slot, 1)
        crossed = lax.dynamic_update_index_in_dim(gram, products, slot, 1)
        return jnp.where(pred, lax.dynamic_update_index_in_dim(crossed, products, slot, 2), gram)

    gram = with_auto_sharding(cross, window.gram, products, _squares(window, stored), slot, pred)
    return Window(
        window.rows, gram, jnp.where(pred, optax.safe_increment(window.count), window.count)
    )


def _write(window: Window, stored: Params, after: Window, pred: Bool[Array, ""]) -> Window:
    """Return `after` with the row written, where `pred` holds; else `window`."""
    slot = window.count % window.gram.shape[-1]

    def write(rows: Array, g: Array) -> Array:
        stored = bits(rows)
        row = jnp.where(pred, bits(g), lax.dynamic_index_in_dim(stored, slot, keepdims=False))
        return lax.bitcast_convert_type(
            lax.dynamic_update_index_in_dim(stored, row, slot, 0), rows.dtype
        )

    gram, count = keep_unless(pred, (after.gram, after.count), (window.gram, window.count))
    return Window(jax.tree.map(write, window.rows, stored), gram, count)


def window_inverse(window: Window, damping: Any, *, divisor: str = "window") -> Matvec:
    """Return `v -> (damping I + (1/N) sum_i g_i g_i')^-1 v`, the damped inverse Fisher of the window's gradients.

    With `S = G G'` it is `(v - G' (N damping I + S)^-1 G v) / damping`, by Cholesky of the m x m matrix.

    Args:
      window: of `curvax.solve.fisher_window`, or a state's.
      damping: positive; in units of an eigenvalue of the Fisher. Where it is below the precision of the floats, it is
        raised to their epsilon times the trace of the Fisher: nothing smaller can be told from rounding.
      divisor: N. "window": m, as published, so that curvature counts less while the window fills; "count": the number of
        gradients in it.

    Returns:
      matvec on trees like params, in their dtypes; a `jax.tree_util.Partial` of arrays, so it may cross `jit`.

    Raises:
      ValueError: damping that is not positive; unknown divisors; v unlike the window's rows (by path).

    Cost: building: `b m^3 / 3`. Each product: two passes over the m d stored numbers.

    Example: two gradients along the axes, `F = diag(2, 8)`, and a direction that they do not span.
      >>> import jax.numpy as jnp, curvax
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
      >>> matvec = curvax.solve.window_inverse(window, damping=0.5)
      >>> [round(x, 6) for x in matvec(jnp.ones(3)).tolist()]
      [0.4, 0.117647, 2.0]

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, equations 4 to 6, here by Woodbury's identity in place of
      their recurrences.
    """
    solve = window_solve(window, damping, divisor)
    return Partial(_multiply, window, solve)


def window_product(window: Window, *, divisor: str = "window") -> Matvec:
    """Return `v -> (1/N) sum_i g_i (g_i . v)`, the product with the Fisher matrix of the window's gradients.

    Args:
      window: of `curvax.solve.fisher_window`, or a state's.
      divisor: N, as in `window_inverse`.

    Returns:
      matvec on trees like params, in their dtypes; a `jax.tree_util.Partial` of arrays, so it may cross `jit`.

    Cost: two passes over the m d stored numbers.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> curvax.solve.window_product(curvax.solve.window_of(jnp.array([[2.0, 0.0], [0.0, 4.0]])))(jnp.ones(2)).tolist()
      [2.0, 8.0]
    """
    return Partial(_product, window, 1 / num_rows(window, divisor))


def num_rows(window: Window, divisor: str) -> Float[Array, ""]:
    """Return N, at least 1."""
    check_choice("divisor", divisor, DIVISORS)
    size = window.gram.shape[-1]
    return jnp.asarray(
        size if divisor == "window" else jnp.clip(window.count, 1, size), window.gram.dtype
    )


class WindowSolve(NamedTuple):
    """What of a damped inverse does not depend on the vector.

    Attributes:
      number: N.
      damping: `[b]`, in effect.
      factor: L of `N damping I + S = L L'`.
    """

    number: Float[Array, ""]
    damping: Float[Array, " b"]
    factor: Gram


def window_solve(window: Window, damping: Any, divisor: str) -> WindowSolve:
    """Factorize the m x m system of `window_inverse`."""
    check_damping(damping)
    size, dtype = window.gram.shape[-1], window.gram.dtype
    number = num_rows(window, divisor)
    least = jnp.finfo(dtype).eps * jnp.trace(window.gram, axis1=1, axis2=2) / number
    damping = jnp.maximum(jnp.asarray(damping, dtype), least)
    ridge = (number * damping)[:, None, None] * jnp.eye(size, dtype=dtype)
    return WindowSolve(
        number,
        damping,
        jnp.asarray(lax.linalg.cholesky(window.gram + ridge, symmetrize_input=False)),
    )


def inner_products(window: Window, v: Params) -> Coefficients:
    """Return `G v`, leaf by leaf summed into blocks; one pass over the rows."""

    def products(rows: list[Array], v: list[Array]) -> Coefficients:
        each = [leaf_products(x, y) for x, y in zip(rows, v, strict=True)]
        parts = jnp.stack([x.astype(window.gram.dtype) for x in each])
        return parts if len(window.gram) > 1 else jnp.sum(parts, axis=0, keepdims=True)

    return with_auto_sharding(products, jax.tree.leaves(window.rows), jax.tree.leaves(v))


def combine(window: Window, coefficients: Coefficients) -> Params:
    """Return `G' c`, a tree like params, in at least float32; one pass over the rows."""
    return map_blocks(leaf_combination, coefficients, window.rows)


def _gram(rows: Float[Array, "m ..."]) -> Float[Array, "m m"]:
    space = tuple(range(1, rows.ndim))
    return jnp.tensordot(
        rows,
        rows,
        (space, space),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide_dtype(rows),
    )


def _solve(gram: Gram, solve: WindowSolve, right: Coefficients) -> Coefficients:
    """Solve `(N damping I + S) c = right`; one step of refinement takes most of what rounding did to the factor."""

    def own(gram: Array, ridge: Array, lower: Array, right: Array) -> Array:
        c = jax.scipy.linalg.cho_solve((lower, True), right)
        rest = (right - ridge * c) - jnp.matmul(gram, c, precision=lax.Precision.HIGHEST)
        return c + jax.scipy.linalg.cho_solve((lower, True), rest)

    return jax.vmap(own)(gram, solve.number * solve.damping, solve.factor, right)


def _multiply(window: Window, solve: WindowSolve, v: Params) -> Params:
    check_like(v, row_like(window), "v", "a row of the window")
    explained = combine(window, _solve(window.gram, solve, inner_products(window, v)))
    return map_blocks(lambda s, x, y: ((x - y) / s).astype(x.dtype), solve.damping, v, explained)


def _product(window: Window, share: Array, v: Params) -> Params:
    check_like(v, row_like(window), "v", "a row of the window")
    return jax.tree.map(
        lambda x, y: y.astype(x.dtype), v, combine(window, share * inner_products(window, v))
    )


def map_blocks(fn: Callable[..., Array], values: Float[Array, "b ..."], *trees: Params) -> Params:
    """Map over leaves, with the value of each one's block first."""
    leaves, structure = zip(*map(jax.tree.flatten, trees), strict=True)
    own = [values[i if len(values) > 1 else 0] for i in range(len(leaves[0]))]
    return jax.tree.unflatten(structure[0], list(map(fn, own, *leaves)))


def row_like(window: Window) -> PyTree:
    """Return shapes and dtypes of a row."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), window.rows)
