"""Elements of a window's inverse Fisher matrix: single ones, the diagonal, and blocks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jaxtyping import Array, Float, PyTree

from curvax._checks import check_count, check_damping, check_like
from curvax._trees import by_path
from curvax._types import Params
from curvax.solve._window import Window, block_of, map_blocks, num_rows, row_like, window_solve

# m: rows of the window; d: parameters; k: entries of a block, n: entries of a leaf
# G: [m, d], the rows; N: what the sum over them is divided by; F = G'G / N


class Whitened(NamedTuple):
    """Rows V with `(F + damping I)^-1 = (I - V'V) / damping`: m multiplications give an element.

    Attributes:
      rows: V, a tree like params with a leading axis m.
      damping: the damping in effect, `[1]`, or `[leaves]` where each leaf has its own matrix.
    """

    rows: PyTree[Array]
    damping: Float[Array, " blocks"]


def whiten(
    window: Window,
    damping: Any,
    *,
    divisor: str = "window",
) -> Whitened:
    """Return `V = L^-1 G` with `L L' = N damping I + G G'`, for `inverse_element`.

    Args:
      window: a `Window` of m gradients, such as `curvax.solve.fisher_window` returns.
      damping: a positive number, as in `curvax.solve.window_inverse`.
      divisor: N, likewise.

    Cost: `m^2 d` multiplications. Memory: m d numbers.

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, https://arxiv.org/abs/2107.03356,
      section 3.1, where V comes from a recurrence.
    """
    solve = window_solve(window, damping, divisor)
    return Whitened(map_blocks(_whitened, solve.factor, window.rows), solve.damping)


def inverse_element(
    whitened: Whitened, one: Sequence[Any], other: Sequence[Any]
) -> Float[Array, ""]:
    """Return the element of the damped inverse Fisher between two parameters.

    Args:
      whitened: the `Whitened` rows that `whiten` returns.
      one: a parameter: the path of its leaf as `jax.tree_util.keystr` prints it, and its index, as
        in `("['w']", 0, 3)`.
      other: a parameter likewise.

    Raises:
      ValueError: there is no leaf at a path; the message lists those that there are.

    Cost: m multiplications.

    Example: `F = damping + diag(2, 0)`.
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.solve import inverse_element, whiten
      >>> window = curvax.solve.window_of({"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])})
      >>> whitened = whiten(window, damping=0.5)
      >>> element = lambda i, j: inverse_element(whitened, ("['w']", i), ("['w']", j))
      >>> [round(float(element(i, j)), 6) for i, j in ((0, 0), (1, 1), (0, 1))]
      [0.4, 2.0, 0.0]
    """
    leaves = by_path(whitened.rows)
    (path, *index), (other_path, *other_index) = one, other
    for name in (path, other_path):
        if name not in leaves:
            raise ValueError(f"there is no leaf {name}; the leaves are {', '.join(leaves)}.")

    number = list(leaves).index(path)
    damping = whitened.damping[block_of(number, whitened.damping)]
    if path != other_path and len(whitened.damping) > 1:  # between two blocks
        return jnp.zeros_like(damping)
    # (I - V'V)_ij / damping = (delta_ij - v_i . v_j) / damping, with v_i a column of V
    column, other_column = leaves[path][:, *index], leaves[other_path][:, *other_index]
    overlap = jnp.vdot(column, other_column, precision=lax.Precision.HIGHEST)
    delta = 1 if (path, index) == (other_path, other_index) else 0
    return (delta - overlap) / damping


def inverse_diagonal(
    window: Window,
    damping: Any,
    *,
    divisor: str = "window",
    block_size: int | None = None,
) -> Params:
    """Return the diagonal of the damped inverse Fisher, a tree like params.

    Args:
      window: a `Window` of m gradients.
      damping: a positive number.
      divisor: N: "window" or "count".
      block_size: k, for the Fisher that has blocks of k consecutive entries of each flattened leaf
        and no entries outside of them. None stands for all entries (or, if the window says so,
        those of each leaf).

    Cost: `m^2 d` multiplications, or `(m k + k^2) d` with blocks. Memory: that of a strip of 1,024
      entries, or of a block (on other devices than CPUs: of 64 of them).

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0], [0.0, 0.0]]))
      >>> [round(x, 6) for x in curvax.solve.inverse_diagonal(window, damping=0.5).tolist()]
      [0.4, 2.0]

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, https://arxiv.org/abs/2107.03356,
      section 3.1.
    """
    if block_size is not None:
        return map_inverse_blocks(jnp.diagonal, window, damping, block_size, divisor=divisor)
    solve = window_solve(window, damping, divisor)

    def leaf_diagonal(lower: Array, damping: Array, rows: Array) -> Array:
        # The diagonal of (I - V'V) / damping, a strip of columns of V = L^-1 G at a time
        def strip_diagonal(columns: Array) -> Array:
            return (1 - jnp.sum(_whitened(lower, columns) ** 2, axis=0)) / damping

        flat = rows.reshape(len(rows), -1)
        return _map_strips(strip_diagonal, 1024, flat).reshape(rows.shape[1:])

    leaves, structure = jax.tree.flatten(window.rows)
    diagonals = []
    for i, rows in enumerate(leaves):
        block = block_of(i, solve.damping)
        diagonals.append(leaf_diagonal(solve.factor[block], solve.damping[block], rows))
    return jax.tree.unflatten(structure, diagonals)


def map_inverse_blocks(
    fn: Callable[..., Float[Array, " k"]],
    window: Window,
    damping: Any,
    block_size: int,
    *trees: Params,
    divisor: str = "window",
) -> Params:
    """Apply `fn(inverse [k, k], *values [k]) -> [k]` to every block of a block-diagonal inverse.

    Blocks of the Fisher are k consecutive entries of each flattened leaf (the last of a leaf may be
    shorter). Each takes one Cholesky decomposition, on other devices than CPUs 64 at a time.

    Args:
      fn: the function of a block of the damped inverse, and of the values that `trees` have there.
      window: a `Window` of m gradients.
      damping: a positive number.
      block_size: k.
      *trees: trees like params.
      divisor: N: "window" or "count".

    Returns:
      a tree like params.
    """
    check_damping(damping)
    check_count(1, block_size=block_size)
    for tree in trees:
        check_like(tree, row_like(window), "tree", "a row of the window")
    number = num_rows(window, divisor)

    def map_block(
        columns: Float[Array, "m k"],
        *values: Float[Array, " k"],
    ) -> Float[Array, " k"]:
        # (F_kk + damping I)^-1, F_kk = G_k'G_k / N; damping at least what rounding makes of zero
        columns = columns.astype(window.gram.dtype)
        identity = jnp.eye(columns.shape[1], dtype=columns.dtype)
        fisher = jnp.matmul(columns.T, columns, precision=lax.Precision.HIGHEST) / number
        least = jnp.finfo(columns.dtype).eps * jnp.trace(fisher)
        damped_fisher = fisher + jnp.maximum(damping, least) * identity
        lower = lax.linalg.cholesky(damped_fisher, symmetrize_input=False)
        return fn(jax.scipy.linalg.cho_solve((lower, True), identity), *values)

    def map_leaf(rows: Array, *values: Array) -> Array:
        flat_values = [v.ravel() for v in values]
        flat_rows = rows.reshape(len(rows), -1)
        return _map_strips(map_block, block_size, flat_rows, *flat_values).reshape(rows.shape[1:])

    return jax.tree.map(map_leaf, window.rows, *trees)


def _map_strips(
    fn: Callable[..., Array],
    width: int,
    rows: Float[Array, "m n"],
    *values: Float[Array, " n"],
) -> Array:
    """Apply `fn` to strips of columns (and of vectors), and join the vectors that it returns.

    On CPUs strips come one by one: batched products of small matrices, in loops that run at the
    same time, make XLA wait for itself forever there. Elsewhere 64 come at a time.
    """
    strips_at_a_time = None if jax.default_backend() == "cpu" else 64
    size = rows.shape[1]
    num_strips = size // width
    end = num_strips * width

    def map_strip(i: Array) -> Array:
        def cut(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, i * width, width, axis=x.ndim - 1)

        return fn(cut(rows), *map(cut, values))

    parts = []
    if num_strips:
        strips = lax.map(map_strip, jnp.arange(num_strips), batch_size=strips_at_a_time)
        parts.append(strips.ravel())
    if size > end:  # the last strip is narrower
        parts.append(fn(rows[:, end:], *[v[end:] for v in values]))
    return jnp.concatenate(parts)


def _whitened(
    lower: Float[Array, "m m"],
    rows: Float[Array, "m ..."],
) -> Float[Array, "m ..."]:
    flat = rows.reshape(len(rows), -1).astype(lower.dtype)
    solution = lax.linalg.triangular_solve(lower, flat, left_side=True, lower=True)
    return solution.reshape(rows.shape)
