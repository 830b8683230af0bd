"""Elements of a window's inverse Fisher matrix: single ones, its diagonal, and whole blocks of a block-diagonal form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jaxtyping import Array, Float, PyTree

from curvax._checks import check_count, check_damping, check_like
from curvax._types import Params
from curvax.solve._window import Window, map_blocks, num_rows, row_like, window_solve

# m: rows of the window, k: entries of a block


class Whitened(NamedTuple):
    """Rows V with `F^-1 = (I - V'V) / damping`, off which an element of the inverse is read by m multiplications.

    Attributes:
      rows: a tree like params with a leading axis m.
      damping: in effect, `[1]`, or `[leaves]` where each leaf has a matrix of its own.
    """

    rows: PyTree[Array]
    damping: Float[Array, " b"]


def whiten(window: Window, damping: Any, *, divisor: str = "window") -> Whitened:
    """Return `V = L^-1 G` with `L L' = N damping I + G G'`, for `inverse_element`.

    Args:
      window: of m gradients, such as `curvax.solve.fisher_window` collects.
      damping: positive, as in `curvax.solve.window_inverse`.
      divisor: N, likewise.

    Cost: `m^2 d` multiplications, and m d numbers.

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, section 3.1, where V comes of a recurrence.
    """
    solve = window_solve(window, damping, divisor)
    return Whitened(map_blocks(_whitened, solve.factor, window.rows), solve.damping)


def inverse_element(
    whitened: Whitened, one: Sequence[Any], other: Sequence[Any]
) -> Float[Array, ""]:
    """Return the element of the damped inverse Fisher between two parameters.

    Args:
      whitened: of `whiten`.
      one: a parameter: the path of its leaf as `jax.tree_util.keystr` prints it, and its index: `("['w']", 0, 3)`.
      other: likewise.

    Raises:
      ValueError: a path that is not there, listing those that are.

    Cost: m multiplications.

    Example: `F = damping + diag(2, 0)`.
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.solve import inverse_element, whiten
      >>> whitened = whiten(curvax.solve.window_of({"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])}), damping=0.5)
      >>> [round(float(inverse_element(whitened, ("['w']", i), ("['w']", j))), 6) for i, j in ((0, 0), (1, 1), (0, 1))]
      [0.4, 2.0, 0.0]
    """
    leaves = {
        jax.tree_util.keystr(path): rows for path, rows in jax.tree.leaves_with_path(whitened.rows)
    }
    (path, *index), (other_path, *other_index) = one, other
    for name in (path, other_path):
        if name not in leaves:
            raise ValueError(f"there is no leaf {name}; the leaves are {', '.join(leaves)}.")
    places = list(leaves)
    damping = whitened.damping[_block(whitened.damping, places.index(path))]
    if path != other_path and len(whitened.damping) > 1:
        return jnp.zeros_like(damping)
    shared = jnp.vdot(
        leaves[path][:, *index],
        leaves[other_path][:, *other_index],
        precision=lax.Precision.HIGHEST,
    )
    same = 1 if (path, index) == (other_path, other_index) else 0
    return (same - shared) / damping


def inverse_diagonal(
    window: Window, damping: Any, *, divisor: str = "window", block_size: int | None = None
) -> Params:
    """Return the diagonal of the damped inverse Fisher, a tree like params.

    Args:
      window: of m gradients.
      damping: positive.
      divisor: N: "window" or "count".
      block_size: k, for the Fisher that has blocks of k consecutive entries of each flattened leaf, and nothing outside;
        None: with all entries (or, as the window says, those of each leaf).

    Cost: `m^2 d` multiplications, or `(m k + k^2) d` with blocks; memory as for a strip of 1,024 entries, or a block (off
      CPUs: for 64 of them).

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0], [0.0, 0.0]]))
      >>> [round(x, 6) for x in curvax.solve.inverse_diagonal(window, damping=0.5).tolist()]
      [0.4, 2.0]

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, section 3.1.
    """
    if block_size is not None:
        return map_inverse_blocks(jnp.diagonal, window, damping, block_size, divisor=divisor)
    solve = window_solve(window, damping, divisor)
    leaves, structure = jax.tree.flatten(window.rows)

    def own(i: int, rows: Array) -> Array:
        lower, scale = (
            solve.factor[_block(solve.factor, i)],
            solve.damping[_block(solve.damping, i)],
        )
        of_strip = lambda columns: (1 - jnp.sum(_whitened(lower, columns) ** 2, axis=0)) / scale
        return _strips(of_strip, 1024, rows.reshape(len(rows), -1)).reshape(rows.shape[1:])

    return jax.tree.unflatten(structure, [own(i, rows) for i, rows in enumerate(leaves)])


def map_inverse_blocks(
    fn: Callable[..., Float[Array, " k"]],
    window: Window,
    damping: Any,
    block_size: int,
    *trees: Params,
    divisor: str = "window",
) -> Params:
    """Apply `fn(inverse [k, k], *values [k]) -> [k]` to every block of the block-diagonal Fisher's damped inverse.

    Blocks are k consecutive entries of each flattened leaf (the last of a leaf may be shorter); one Cholesky
    decomposition each, off CPUs 64 at a time.

    Args:
      fn: what to compute of a block, with the values of `trees` there.
      window: of m gradients.
      damping: positive.
      block_size: k.
      *trees: like params.
      divisor: N: "window" or "count".

    Returns:
      a tree like params.
    """
    check_damping(damping)
    check_count(1, block_size=block_size)
    for tree in trees:
        check_like(tree, row_like(window), "tree", "a row of the window")
    number = num_rows(window, divisor)

    def of_block(columns: Float[Array, "m k"], *values: Float[Array, " k"]) -> Float[Array, " k"]:
        columns = columns.astype(window.gram.dtype)
        identity = jnp.eye(columns.shape[1], dtype=columns.dtype)
        fisher = jnp.matmul(columns.T, columns, precision=lax.Precision.HIGHEST) / number
        least = jnp.finfo(columns.dtype).eps * jnp.trace(fisher)
        lower = lax.linalg.cholesky(
            fisher + jnp.maximum(damping, least) * identity, symmetrize_input=False
        )
        return fn(jax.scipy.linalg.cho_solve((lower, True), identity), *values)

    def own(rows: Array, *values: Array) -> Array:
        flat = _strips(
            of_block, block_size, rows.reshape(len(rows), -1), *(v.ravel() for v in values)
        )
        return flat.reshape(rows.shape[1:])

    return jax.tree.map(own, window.rows, *trees)


def _strips(
    fn: Callable[..., Array], width: int, rows: Float[Array, "m n"], *values: Float[Array, " n"]
) -> Array:
    """Apply `fn` to strips of columns (and of vectors), and join what it returns: on CPUs one by one, else 64 at a time.

    (Batched products of small matrices, in loops that run at the same time, make XLA wait for itself forever on CPUs.)
    """
    together = None if jax.default_backend() == "cpu" else 64
    size = rows.shape[1]
    number = size // width

    def of_strip(i: Array) -> Array:
        cut = lambda x: lax.dynamic_slice_in_dim(x, i * width, width, x.ndim - 1)
        return fn(cut(rows), *map(cut, values))

    parts = [lax.map(of_strip, jnp.arange(number), batch_size=together).ravel()] if number else []
    if size > number * width:
        parts.append(fn(rows[:, number * width :], *(v[number * width :] for v in values)))
    return jnp.concatenate(parts)


def _whitened(lower: Float[Array, "m m"], rows: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
    flat = rows.reshape(len(rows), -1).astype(lower.dtype)
    return lax.linalg.triangular_solve(lower, flat, left_side=True, lower=True).reshape(rows.shape)


def _block(values: Array, i: int) -> int:
    return i if len(values) > 1 else 0
