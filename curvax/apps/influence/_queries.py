"""Gradients of the queries' measurements, divided by the damped curvature once, for any number of training examples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from curvax._batch import batch_size, map_chunks, map_examples
from curvax._checks import check_count, check_params, check_scalar
from curvax._trees import by_path
from curvax._types import Batch, Params, Scalar, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.apps.influence._fitting import Fitted
from curvax.apps.influence._methods import (
    check_fitted,
    dampings,
    inverse,
    solve_each,
    without_fixed,
)
from curvax.kron._gradient_products import LowRank, Vectors
from curvax.kron._layout import Layout, check_layout
from curvax.kron._operator import block_matrix
from curvax.objective import Objective
from curvax.solve import SolveInfo, cg

Measurement: TypeAlias = Objective | Callable[[Params, Any], Scalar]
"""What is asked of a model: an objective, or `(params, batch of one query) -> scalar`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Queries:
    """Gradients of measurements, divided by the damped curvature, as the layout's blocks; a pytree.

    Attributes:
      blocks: by block `[queries, stack, in (+ 1), out]`, or the two factors of it.
      outside: for leaves with entries in no block `[queries, *leaf]`, by path.
      terms: N of the training loss.
      layout: that the curvature was fitted with.
    """

    blocks: dict[str, Vectors]
    outside: dict[str, Array]
    terms: PyTree[Scalar]
    layout: Layout = field(metadata={"static": True})


class QueryInfo(NamedTuple):
    """How queries were divided by the curvature.

    Attributes:
      damping: in use: a number, or by block and path; None with "identity".
      solves: with "cg" the `SolveInfo` of every query, else None.
    """

    damping: Any
    solves: SolveInfo | None


class Compression(NamedTuple):
    """How much of the queries a low rank leaves out: relative errors in Frobenius norm.

    Attributes:
      rank: that was asked for.
      error: of each query over all blocks, `[queries]`.
      by_layer: of each block, `[queries]`.
    """

    rank: int
    error: Float[Array, " queries"]
    by_layer: dict[str, Float[Array, " queries"]]


def precondition(
    fitted: Fitted,
    objective: Objective,
    query_objective: Measurement,
    params: Params,
    queries: Any,
    *,
    damping: Any = None,
    method: str | None = None,
    train_batches: Iterable[Batch] = (),
    solver: Callable[..., tuple[Params, SolveInfo]] = cg,
    chunk_size: int = 8,
) -> tuple[Queries, QueryInfo]:
    """Compute `(C + damping I)^-1 grad f_q` for every query, C the fitted curvature, f_q the query's measurement.

    The first half of `influence`, for queries that are used again: with `compress`, `score`, `top_k`.

    Args:
      fitted: of `fit`, or of `of_window`.
      objective: a `curvax.Objective`, that of training.
      query_objective: as in `influence`.
      params: that were fitted.
      queries: as in `influence`.
      damping: as in `influence`.
      method: as in `influence`.
      train_batches: for "cg" only, the data of its Gauss-Newton matrix; gone through for every product.
      solver: of "cg".
      chunk_size: queries worked on at a time.

    Returns:
      `Queries`, of as many trees like params as there are queries; `QueryInfo`.

    Raises:
      As `influence`.

    Cost: a gradient for each query; `2 in out (in + out)` multiplications a block. With "cg" a solve for each.

    Example: see `score` and `top_k`.
    """
    method = check_fitted(fitted, method)
    check_params(params)
    check_layout(fitted.layout, params)
    check_count(1, chunk_size=chunk_size, num_queries=batch_size(queries))
    if not isinstance(query_objective, Hashable):
        raise TypeError(
            f"query_objective must be hashable, an Objective or a function; got {query_objective!r}."
        )
    used = None if method == "identity" else dampings(fitted, method, damping)
    if method == "cg":
        gradients = _gradients(query_objective, fitted.layout, chunk_size, params, queries)
        products, solves = solve_each(
            fitted, objective, params, train_batches, gradients, used, solver
        )
    else:
        products, solves = (
            _divided(query_objective, method, chunk_size, fitted, params, queries, used),
            None,
        )
    blocks, outside = _as_blocks(fitted.layout, products)
    return Queries(blocks, outside, fitted.terms, fitted.layout), QueryInfo(used, solves)


def compress(queries: Queries, rank: int) -> tuple[Queries, Compression]:
    """Keep the `rank` largest singular values of every query's matrix of every block.

    Scores then cost `rank (in + out)` multiplications for a query and position in place of `in out`, and queries take that
    much less memory. Blocks for which that would be no saving stay as they are.

    Args:
      queries: of `precondition`.
      rank: at least 1.

    Returns:
      `Queries`; `Compression` says what was left out.

    Cost: a singular value decomposition for each query and slice of a block.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((4, 4)), (jnp.eye(4), jnp.ones((4, 4)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), progress=False)
      >>> prepared, _ = influence.precondition(fitted, objective, objective, params, batch)      # gradients of rank 1
      >>> _, info = influence.compress(prepared, rank=1)
      >>> bool(info.error.max() < 1e-6)
      True

    References: Grosse et al. (2023), section 3.2.2.
    """
    check_count(1, rank=rank)
    made, squares, left_out = {}, {}, {}
    for name, v in queries.blocks.items():
        whole = (
            jnp.matmul(v.left, v.right, precision=lax.Precision.HIGHEST)
            if isinstance(v, LowRank)
            else v
        )
        squares[name] = jnp.sum(whole**2, axis=(1, 2, 3))
        if rank * sum(whole.shape[2:]) >= whole.shape[2] * whole.shape[3]:
            made[name], left_out[name] = v, jnp.zeros_like(squares[name])
            continue
        u, s, vh = jnp.linalg.svd(whole, full_matrices=False)
        made[name] = LowRank(u[..., :rank] * s[..., None, :rank], vh[..., :rank, :])
        left_out[name] = jnp.sum(s[..., rank:] ** 2, axis=(1, 2))
    ratio = lambda rest, of: jnp.sqrt(rest / jnp.where(of > 0, of, 1))
    outside = sum(
        jnp.sum(at_least_float32(x).reshape(len(x), -1) ** 2, axis=1)
        for x in queries.outside.values()
    )
    error = ratio(sum(left_out.values()), sum(squares.values()) + outside)
    by_layer = {name: ratio(left_out[name], squares[name]) for name in made}
    return Queries(made, queries.outside, queries.terms, queries.layout), Compression(
        rank, error, by_layer
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gradients(
    measurement: Measurement, layout: Layout, chunk_size: int, params: Params, queries: Any
) -> Params:
    def run(params: Params, queries: Any) -> Params:
        found: Params = map_chunks(
            partial(_of_rows, measurement, layout, params), queries, chunk_size
        )
        return found

    return with_auto_sharding(run, params, queries)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _divided(
    measurement: Measurement,
    method: str,
    chunk_size: int,
    fitted: Fitted,
    params: Params,
    queries: Any,
    damping: Any,
) -> Params:
    def run(fitted: Fitted, params: Params, queries: Any, damping: Any) -> Params:
        divide = inverse(fitted, method, damping)
        own = lambda rows: jax.vmap(divide)(_of_rows(measurement, fitted.layout, params, rows))
        found: Params = map_chunks(own, queries, chunk_size)
        return found

    return with_auto_sharding(run, fitted, params, queries, damping)


def _of_rows(measurement: Measurement, layout: Layout, params: Params, rows: Any) -> Params:
    """Return the gradient of every row's measurement, in at least float32, zero where the layout holds entries fixed."""
    value = measurement.value if isinstance(measurement, Objective) else measurement

    def own(row: Any) -> Params:
        measured = lambda p: check_scalar(
            value(p, row), "the measurement of one query, given as a batch of one,"
        )
        return without_fixed(layout, jax.tree.map(at_least_float32, jax.grad(measured)(params)))

    gradients: Params = map_examples(own, rows)
    return gradients


@partial(jax.jit, static_argnums=0)
def _as_blocks(layout: Layout, vectors: Params) -> tuple[dict[str, Vectors], dict[str, Array]]:
    leaves, own = by_path(vectors), {leaf.path: leaf for leaf in layout.leaves}
    matrix = lambda block: jax.vmap(partial(block_matrix, block))(
        {path: leaves[path] for path in block.leaves}
    )
    outside = {
        path: jnp.where(layout.uncovered(path), x, 0)
        for path, x in leaves.items()
        if own[path].outside == "diagonal"
    }
    return {block.name: matrix(block) for block in layout.blocks}, outside
