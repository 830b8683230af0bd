"""A window of m gradients as a low-rank Fisher matrix: insert one, multiply by its inverse."""

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

# m: rows of the window; d: parameters; blocks: of the matrix, 1 or one for each leaf
# G: [m, d], the rows g_i; S = G G', their Gram matrix; N: what the sum over rows is divided by
# F = (1/N) sum_i g_i g_i' = G'G / N
Gram = Float[Array, "blocks m m"]
Coefficients = Float[Array, "blocks m"]

BLOCKS = {"full": "one block", "leaf": "a block for each leaf"}
DIVISORS = {"window": "rows of the window, empty ones too", "count": "gradients that it holds"}


class Window(NamedTuple):
    """The last m gradients, and their inner products; empty rows are zero.

    Attributes:
      rows: G, a tree like params with a leading axis m, in the dtype that they are stored in.
      gram: `S = G G'` of the stored rows, `[1, m, m]`, or `[leaves, m, m]` of each leaf by itself;
        in at least float32.
      count: the number of gradients inserted so far; the next one goes to row `count % m`.
    """

    rows: PyTree[Array]
    gram: Gram
    count: Count


def init_window(
    params: Params,
    size: int,
    *,
    blocks: str = "full",
    dtype: Any = None,
) -> Window:
    """Return a window without gradients, for `size` trees like `params`, sharded as they are.

    Args:
      params: a pytree of float arrays, of which only shapes, dtypes and shardings matter.
      size: the number of rows m.
      blocks: "full", or "leaf" for a matrix without entries between leaves.
      dtype: the dtype of the stored rows, e.g. `jnp.bfloat16`. None stands for that of params, but
        at least float32.
    """
    check_params(params)
    check_count(1, window_size=size)
    check_choice("blocks", blocks, BLOCKS)
    leaves = jax.tree.leaves(params)
    num_blocks = 1 if blocks == "full" else len(leaves)
    gram = jnp.zeros((num_blocks, size, size), jnp.result_type(jnp.float32, *leaves))
    return Window(zero_rows(params, size, dtype), gram, jnp.zeros([], jnp.int32))


def window_of(
    rows: PyTree[Array],
    *,
    size: int | None = None,
    blocks: str = "full",
    dtype: Any = None,
) -> Window:
    """Return a window of gradients that exist already, such as `curvax.per_example_grads` returns.

    Args:
      rows: k gradients, a tree with a leading axis k; `F = (1/N) sum_i g_i g_i'`.
      size: m, at least k; None stands for k. Rows beyond k are empty.
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
    count = max(len(x) for x in jax.tree.leaves(rows))
    check_count(count, window_size=count if size is None else size)
    gram_dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(rows))

    def store(x: Array) -> Array:
        num_empty = (size or len(x)) - len(x)
        padding = [(0, num_empty)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).astype(wide_dtype(x) if dtype is None else dtype)

    def build(rows: PyTree[Array]) -> Window:
        stored = jax.tree.map(store, rows)
        by_leaf = jnp.stack([_gram(x).astype(gram_dtype) for x in jax.tree.leaves(stored)])
        gram = by_leaf if blocks == "leaf" else jnp.sum(by_leaf, axis=0, keepdims=True)
        return Window(stored, gram, jnp.int32(count))

    return with_auto_sharding(build, rows)


def insert(window: Window, gradient: Params) -> Window:
    """Put a gradient in the place of the oldest one.

    A gradient that is not finite, or whose squared norm is not, is left out. The Gram matrix takes
    one pass over the rows, and one row is written.
    """
    stored = _in_stored_dtype(window, gradient)
    products = inner_products(window, stored)
    good = all_finite((products, _squares(window, stored)))
    after = _with_products(window, stored, products, good)
    return _with_row(window, stored, after, good)


def insert_and_multiply(
    window: Window,
    gradient: Params,
    pred: Bool[Array, ""],
    damping: Any,
    divisor: str,
) -> tuple[Params, Window]:
    """Insert a gradient where `pred` holds, and multiply it by the damped inverse.

    The rows are read twice in all. If the product is not finite, the gradient is left out.

    Returns:
      the product, like gradient, in at least float32; the window.
    """
    stored = _in_stored_dtype(window, gradient)
    slot = _next_slot(window)
    products = inner_products(window, stored)
    after = _with_products(window, stored, products, pred)  # its rows still lack the gradient
    solve = window_solve(after, damping, divisor)

    # Where v = g is inserted at slot e, it is a row: v = G'e. As F = G'G / N, the identity
    #   (damping I + G'G / N) G' = G' (N damping I + G G') / N
    # gives (damping I + F)^-1 v = N G' (N damping I + S)^-1 e: a combination of rows and no more.
    # Woodbury's form (v - G' (N damping I + S)^-1 G v) / damping would take from v its projection
    # onto rows of which it is one; for a small damping next to nothing of v remains, and the
    # division by damping magnifies the rounding of the difference.
    is_slot = jnp.arange(window.gram.shape[-1]) == slot
    inserted_right = solve.number * is_slot.astype(solve.factor.dtype)
    # Where it is not inserted, Woodbury's form is what there is.
    other_right = -products / solve.damping[:, None]
    weights = _solve(after.gram, solve, jnp.where(pred, inserted_right, other_right))

    # The row at the slot is still the oldest gradient: v itself stands in for it.
    weights_of_rows = jnp.where(pred & is_slot, 0, weights)
    weight_of_v = jnp.where(pred, weights[:, slot], 1 / solve.damping)
    combination = combine(window, weights_of_rows)
    product = map_blocks(lambda c, v, x: c * v + x, weight_of_v, stored, combination)

    # The condition makes the row's write wait for all reads; without that XLA copies the window.
    good = pred & all_finite(product)
    return product, _with_row(window, stored, after, good)


def _in_stored_dtype(window: Window, gradient: Params) -> Params:
    check_like(gradient, row_like(window), "gradient", "a row of the window")
    return jax.tree.map(lambda rows, g: g.astype(rows.dtype), window.rows, gradient)


def _next_slot(window: Window) -> Count:
    return window.count % window.gram.shape[-1]


def _squares(window: Window, v: Params) -> Float[Array, " blocks"]:
    """Return the squared norm of a vector, block by block."""
    by_leaf = [jnp.sum(at_least_float32(x) ** 2) for x in jax.tree.leaves(v)]
    by_leaf = [x.astype(window.gram.dtype) for x in by_leaf]
    if len(window.gram) > 1:
        return jnp.stack(by_leaf)
    return sum(by_leaf, start=jnp.zeros(1, window.gram.dtype))


def _with_products(
    window: Window,
    stored: Params,
    products: Coefficients,
    pred: Bool[Array, ""],
) -> Window:
    """Return the window as if a gradient were inserted where `pred` holds, all but its row.

    S changes in one row and one column, to the products of the gradient with all rows and, where
    these two cross, its squared norm.
    """

    def cross(
        gram: Gram,
        products: Coefficients,
        squares: Array,
        slot: Array,
        pred: Array,
    ) -> Gram:
        update = lax.dynamic_update_index_in_dim
        products = update(products, squares, slot, axis=1)
        crossed = update(gram, products, slot, axis=1)
        crossed = update(crossed, products, slot, axis=2)
        return jnp.where(pred, crossed, gram)

    squares = _squares(window, stored)
    gram = with_auto_sharding(cross, window.gram, products, squares, _next_slot(window), pred)
    count = jnp.where(pred, optax.safe_increment(window.count), window.count)
    return Window(window.rows, gram, count)


def _with_row(
    window: Window,
    stored: Params,
    after: Window,
    pred: Bool[Array, ""],
) -> Window:
    """Return `after` with the gradient's row written, where `pred` holds; else `window`."""
    # A row beyond the last is dropped. Written so, and not as a slice, a window whose rows are
    # spread over devices is written by the one that has the row, and none is sent.
    slot = jnp.where(pred, _next_slot(window), window.gram.shape[-1])

    def write(rows: PyTree[Array], stored: Params, slot: Array) -> PyTree[Array]:
        def of_leaf(x: Array, g: Array) -> Array:
            # Only one row is written, as bits: the buffer of the window is reused.
            stored_bits = bits(x).at[slot].set(bits(g), mode="drop")
            return lax.bitcast_convert_type(stored_bits, x.dtype)

        written: PyTree[Array] = jax.tree.map(of_leaf, rows, stored)
        return written

    rows = with_auto_sharding(write, window.rows, stored, slot, like=window.rows)
    gram, count = keep_unless(pred, (after.gram, after.count), (window.gram, window.count))
    return Window(rows, gram, count)


def window_inverse(
    window: Window,
    damping: Any,
    *,
    divisor: str = "window",
) -> Matvec:
    """Return `v -> (damping I + (1/N) sum_i g_i g_i')^-1 v`, the damped inverse Fisher of a window.

    With `S = G G'` it is `(v - G' (N damping I + S)^-1 G v) / damping`, by Cholesky of the m x m
    matrix.

    Args:
      window: a `Window`, such as `curvax.solve.fisher_window` or the state of `curvax.mfac` holds.
      damping: a positive number, in units of an eigenvalue of the Fisher. Where it is below the
        precision of the floats, it is raised to their epsilon times the trace of the Fisher:
        nothing smaller can be told from rounding.
      divisor: N. "window" stands for m, as published, so that curvature counts less while the
        window fills; "count" for the number of gradients in it.

    Returns:
      a matvec on trees like params, in their dtypes. It is a `jax.tree_util.Partial` of arrays, so
      it may cross `jit`.

    Raises:
      ValueError: damping is not positive, the divisor is unknown, or v is unlike the window's rows
        (the message names the path).

    Cost: building takes `m^3 / 3` multiplications for each block of the matrix. Each product takes
      two passes over the m d stored numbers.

    Example: two gradients along the axes, `F = diag(2, 8)`, and a direction that they do not span.
      >>> import jax.numpy as jnp, curvax
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
      >>> matvec = curvax.solve.window_inverse(window, damping=0.5)
      >>> [round(x, 6) for x in matvec(jnp.ones(3)).tolist()]
      [0.4, 0.117647, 2.0]

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, https://arxiv.org/abs/2107.03356,
      equations 4 to 6, here by Woodbury's identity in place of their recurrences.
    """
    solve = window_solve(window, damping, divisor)
    return Partial(_multiply_by_inverse, window, solve)


def window_product(window: Window, *, divisor: str = "window") -> Matvec:
    """Return `v -> (1/N) sum_i g_i (g_i . v)`, the product with the Fisher matrix of a window.

    Args:
      window: a `Window`, such as `curvax.solve.fisher_window` or the state of `curvax.mfac` holds.
      divisor: N, as in `window_inverse`.

    Returns:
      a matvec on trees like params, in their dtypes. It is a `jax.tree_util.Partial` of arrays, so
      it may cross `jit`.

    Cost: two passes over the m d stored numbers.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0], [0.0, 4.0]]))
      >>> curvax.solve.window_product(window)(jnp.ones(2)).tolist()
      [2.0, 8.0]
    """
    return Partial(_multiply, window, 1 / num_rows(window, divisor))


def num_rows(window: Window, divisor: str) -> Float[Array, ""]:
    """Return N, at least 1."""
    check_choice("divisor", divisor, DIVISORS)
    size = window.gram.shape[-1]
    number = size if divisor == "window" else jnp.clip(window.count, 1, size)
    return jnp.asarray(number, window.gram.dtype)


class WindowSolve(NamedTuple):
    """The part of a damped inverse that does not depend on the vector.

    Attributes:
      number: N.
      damping: the damping in effect, `[blocks]`.
      factor: the Cholesky factor L of `N damping I + S = L L'`.
    """

    number: Float[Array, ""]
    damping: Float[Array, " blocks"]
    factor: Gram


def window_solve(window: Window, damping: Any, divisor: str) -> WindowSolve:
    """Factorize the m x m system of `window_inverse`."""
    check_damping(damping)
    size, dtype = window.gram.shape[-1], window.gram.dtype
    number = num_rows(window, divisor)
    # tr F = tr S / N: rounding in a sum over rows is about epsilon times it.
    trace = jnp.trace(window.gram, axis1=1, axis2=2) / number
    damping = jnp.maximum(jnp.asarray(damping, dtype), jnp.finfo(dtype).eps * trace)
    ridge = (number * damping)[:, None, None] * jnp.eye(size, dtype=dtype)
    factor = jnp.asarray(lax.linalg.cholesky(window.gram + ridge, symmetrize_input=False))
    return WindowSolve(number, damping, factor)


def inner_products(window: Window, v: Params) -> Coefficients:
    """Return `G v`, leaf by leaf summed into blocks; one pass over the rows."""

    def products(
        rows: list[Array],
        v: list[Array],
    ) -> Coefficients:
        by_leaf = [leaf_products(x, y) for x, y in zip(rows, v, strict=True)]
        by_block = jnp.stack([x.astype(window.gram.dtype) for x in by_leaf])
        if len(window.gram) > 1:
            return by_block
        return jnp.sum(by_block, axis=0, keepdims=True)

    return with_auto_sharding(products, jax.tree.leaves(window.rows), jax.tree.leaves(v))


def combine(window: Window, coefficients: Coefficients) -> Params:
    """Return `G' c`, a tree like params, in at least float32; one pass over the rows."""
    return map_blocks(leaf_combination, coefficients, window.rows)


def _gram(rows: Float[Array, "m ..."]) -> Float[Array, "m m"]:
    axes = tuple(range(1, rows.ndim))
    return jnp.tensordot(
        rows,
        rows,
        axes=(axes, axes),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide_dtype(rows),
    )


def _solve(gram: Gram, solve: WindowSolve, right: Coefficients) -> Coefficients:
    """Solve `(N damping I + S) c = right`, block by block.

    One step of iterative refinement recovers most of what rounding took from the factor.
    """

    def solve_block(
        gram: Array,
        ridge: Array,
        lower: Array,
        right: Array,
    ) -> Array:
        c = jax.scipy.linalg.cho_solve((lower, True), right)
        gram_c = jnp.matmul(gram, c, precision=lax.Precision.HIGHEST)
        residual = (right - ridge * c) - gram_c
        return c + jax.scipy.linalg.cho_solve((lower, True), residual)

    return jax.vmap(solve_block)(gram, solve.number * solve.damping, solve.factor, right)


def _multiply_by_inverse(window: Window, solve: WindowSolve, v: Params) -> Params:
    """Return `(v - G' (N damping I + S)^-1 G v) / damping`, by Woodbury's identity."""
    check_like(v, row_like(window), "v", "a row of the window")
    coefficients = _solve(window.gram, solve, inner_products(window, v))
    projection = combine(window, coefficients)

    def divided(damping: Array, x: Array, y: Array) -> Array:
        return ((x - y) / damping).astype(x.dtype)

    return map_blocks(divided, solve.damping, v, projection)


def _multiply(window: Window, share: Array, v: Params) -> Params:
    check_like(v, row_like(window), "v", "a row of the window")
    product = combine(window, share * inner_products(window, v))
    return jax.tree.map(lambda x, y: y.astype(x.dtype), v, product)


def map_blocks(
    fn: Callable[..., Array],
    values: Float[Array, "blocks ..."],
    *trees: Params,
) -> Params:
    """Map over leaves, with the value of each one's block first."""
    leaves, structures = zip(*map(jax.tree.flatten, trees), strict=True)
    of_leaf = [values[block_of(i, values)] for i in range(len(leaves[0]))]
    return jax.tree.unflatten(structures[0], list(map(fn, of_leaf, *leaves)))


def block_of(leaf: int, values: Array) -> int:
    """Return the block that the leaf of this number belongs to."""
    return leaf if len(values) > 1 else 0


def row_like(window: Window) -> PyTree:
    """Return shapes and dtypes of a row."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), window.rows)
