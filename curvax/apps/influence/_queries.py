"""Gradients of queries, divided by the damped curvature once for any number of examples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from curvax._batch import batch_size, map_chunks, map_examples, sum_over_chunks
from curvax._checks import check_count, check_params, check_scalar
from curvax._explicit import without_placement
from curvax._types import Batch, Params, Scalar, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.apps.influence._fitting import Fitted
from curvax.apps.influence._methods import (
    Curvature,
    Solve,
    check_fitted,
    dampings,
    divisor_of,
    inverse,
    name_and_solver,
    solve_each,
    without_fixed,
)
from curvax.kron._gradient_products import LowRank, Vectors
from curvax.kron._layout import Block, Layout, check_layout, named_leaves
from curvax.kron._operator import kron_operator
from curvax.objective import Objective, for_auto_sharding
from curvax.solve import SolveInfo, Window

MeasurementOfOne: TypeAlias = Objective | Callable[[Params, Any], Scalar]
"""A measurement of a single query: an objective, or `(params, batch of one query) -> scalar`."""

ByBlock: TypeAlias = tuple[dict[str, Any], dict[str, Array]]
"""Trees like params with a leading axis, cut into matrices of blocks and leaves outside."""

# f_q: measurement of query q, C: fitted curvature of the mean loss,
# q: queries, s: stack, i: inputs (with the bias's 1), o: outputs, r: rank


@dataclass(frozen=True)
class Summed:
    """The sum of a measurement over all queries, as one query.

    Influence is linear in the measurement: the scores are the sums over queries of those that the
    measurement would have by itself, at the cost of one query.

    Attributes:
      measurement: a measurement as `influence` takes it; None: the training objective.

    Example: what all queries together owe to each training example.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> options = {"fisher": "exact", "progress": False}
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), **options)
      >>> args = fitted, objective, params, batch, [batch]
      >>> scores, _ = influence.influence(*args, measurement=influence.Summed(), damping=0.5)
      >>> scores.change_if_removed.round(4).tolist()
      [[0.5, 0.5]]
    """

    measurement: MeasurementOfOne | None = None


Measurement: TypeAlias = MeasurementOfOne | Summed
"""What is asked of a model: of every query, or of all together."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Queries:
    """Gradients of measurements, divided by the damped curvature, by block; a pytree.

    Attributes:
      blocks: for each block `[queries, stack, in (+ 1), out]`, or the two factors of it.
      outside: for each leaf with entries in no block `[queries, *leaf]`, by path.
      terms: N, the number of terms of the training loss.
      layout: the layout that the curvature was fitted with.
    """

    blocks: dict[str, Vectors]
    outside: dict[str, Array]
    terms: PyTree[Scalar]
    layout: Layout = field(metadata={"static": True})


class QueryInfo(NamedTuple):
    """How queries were divided by the curvature.

    Attributes:
      damping: the damping that was used: a number, or by block and path; None with "identity".
      solves: with "cg" the `SolveInfo` of every query, else None.
    """

    damping: Any
    solves: SolveInfo | None


class Compression(NamedTuple):
    """The relative truncation errors of a low-rank compression, in Frobenius norm.

    Attributes:
      rank: the rank that was asked for.
      error: the error of each query over all blocks, `[queries]`.
      by_layer: the errors in each block, `[queries]`.
    """

    rank: int
    error: Float[Array, " queries"]
    by_layer: dict[str, Float[Array, " queries"]]


def precondition(
    fitted: Fitted,
    objective: Objective,
    params: Params,
    queries: Any,
    *,
    measurement: Measurement | None = None,
    damping: Any = None,
    method: str | Solve | None = None,
    train_batches: Iterable[Batch] = (),
    chunk_size: int = 8,
) -> tuple[Queries, QueryInfo]:
    """Compute `(C + damping I)^-1 grad f_q` for every query q.

    C is the fitted curvature and f_q the query's measurement. This is the first half of
    `influence`, for queries that are used again: with `compress`, `score`, `top_k`.

    Args:
      fitted: the curvature that `fit` or `of_window` returned.
      objective: the `curvax.Objective` of training.
      params: the parameters that were fitted.
      queries: see `influence`.
      measurement: see `influence`; None: the training objective.
      damping: see `influence`.
      method: see `influence`.
      train_batches: for "cg" only, the data of its Gauss-Newton matrix, read for every product.
      chunk_size: the number of queries worked on at a time.

    Returns:
      `Queries`, which take as much memory as one tree like params for each query; and a
      `QueryInfo`.

    Raises:
      ValueError, TypeError: see `influence`.

    Cost: a gradient for each query; `2 in out (in + out)` multiplications a block. With "cg" a
      solve for each.

    Example: see `score` and `top_k`.
    """
    measurement, is_summed = _unpacked(measurement, objective)
    name, solver = name_and_solver(method)
    method = check_fitted(fitted, name)
    check_params(params)
    check_layout(fitted.layout, params)
    check_count(1, chunk_size=chunk_size, num_queries=batch_size(queries))
    check_measurement(measurement)
    # (C + damping I)^-1 grad f_q: by a matrix at hand, or with "cg" by a solve for each query
    damping = None if method == "identity" else dampings(fitted, method, damping)
    layout, solves = fitted.layout, None
    if method == "cg":
        # A solver in the whole space needs all gradients as trees first.
        gradients = _gradients(measurement, is_summed, layout, chunk_size, params, queries)
        solved, solves = solve_each(
            fitted, objective, params, train_batches, gradients, damping, solver
        )
        blocks, outside = jax.jit(_cut, static_argnums=0)(layout, solved)
    else:
        divisor = divisor_of(fitted, method)
        options = measurement, is_summed, layout, chunk_size
        blocks, outside = _divided(*options, divisor, params, queries, damping)
    prepared = Queries(blocks=blocks, outside=outside, terms=fitted.terms, layout=layout)
    return prepared, QueryInfo(damping, solves)


def compress(queries: Queries, rank: int) -> tuple[Queries, Compression]:
    """Keep the `rank` largest singular values of every query's matrix of every block.

    Scores then cost `rank (in + out)` multiplications for a query and position in place of `in
    out`, and queries take that much less memory. Blocks for which that would save nothing are not
    changed.

    Args:
      queries: the queries that `precondition` returned.
      rank: the rank r, at least 1.

    Returns:
      `Queries`, and a `Compression` with the errors.

    Cost: a singular value decomposition for each query and slice of a block.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((4, 4)), (jnp.eye(4), jnp.ones((4, 4)))
      >>> layout, key = curvax.kron_layout(objective, params, batch), jax.random.key(0)
      >>> fitted = influence.fit(objective, layout, params, [batch], key, progress=False)
      >>> prepared, _ = influence.precondition(fitted, objective, params, batch)  # of rank 1
      >>> _, info = influence.compress(prepared, rank=1)
      >>> bool(info.error.max() < 1e-6)
      True

    References: Grosse et al. (2023), Studying large language model generalization with influence
      functions, https://arxiv.org/abs/2308.03296, section 3.2.2.
    """
    check_count(1, rank=rank)
    blocks: dict[str, Vectors] = {}
    squares, lost_squares = {}, {}
    for name, vectors in queries.blocks.items():
        matrices = full_matrices(vectors)
        squares[name] = jnp.sum(matrices**2, axis=(1, 2, 3))
        num_rows, num_columns = matrices.shape[2:]
        if rank * (num_rows + num_columns) >= num_rows * num_columns:
            blocks[name], lost_squares[name] = vectors, jnp.zeros_like(squares[name])
            continue
        # The best approximation of rank r keeps the r largest singular values (Grosse et al.
        # (2023), section 3.2.2); the squares of the others are its squared error.
        u, s, vh = jnp.linalg.svd(matrices, full_matrices=False)
        blocks[name] = LowRank(u[..., :rank] * s[..., None, :rank], vh[..., :rank, :])
        lost_squares[name] = jnp.sum(s[..., rank:] ** 2, axis=(1, 2))
    # Leaves in no block lose nothing, but count in the norm of a query.
    outside = sum(jnp.sum(flat(x) ** 2, axis=1) for x in queries.outside.values())
    error = _ratio(sum(lost_squares.values()), sum(squares.values()) + outside)
    by_layer = {name: _ratio(lost_squares[name], squares[name]) for name in blocks}
    compressed = Queries(
        blocks=blocks, outside=queries.outside, terms=queries.terms, layout=queries.layout
    )
    return compressed, Compression(rank, error, by_layer)


def full_matrices(vectors: Vectors) -> Float[Array, "q s i o"]:
    """Return the vectors of a block as matrices; those of low rank are multiplied out."""
    if isinstance(vectors, LowRank):
        return jnp.matmul(vectors.left, vectors.right, precision=lax.Precision.HIGHEST)
    return vectors


def flat(x: Array) -> Float[Array, "n d"]:
    """Return the rows of an array as vectors, in at least float32."""
    return at_least_float32(x).reshape(len(x), -1)


def _ratio(lost_squares: Any, squares: Any) -> Array:
    # 0/0: a query that is zero loses nothing
    return jnp.sqrt(lost_squares / jnp.where(squares > 0, squares, 1))


def check_measurement(measurement: Any) -> None:
    """Raise unless the measurement of one query can be a static argument of a program."""
    if not isinstance(measurement, Hashable) or not callable(measurement):
        raise TypeError(
            f"measurement must be hashable, an Objective or a function; got {measurement!r}."
        )


def _unpacked(
    measurement: Measurement | None, objective: Objective
) -> tuple[MeasurementOfOne, bool]:
    """Return the measurement of one query, and whether it is summed over queries."""
    is_summed = isinstance(measurement, Summed)
    of_one = measurement.measurement if isinstance(measurement, Summed) else measurement
    return objective if of_one is None else of_one, is_summed


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradients(
    measurement: MeasurementOfOne,
    is_summed: bool,
    layout: Layout,
    chunk_size: int,
    params: Params,
    queries: Any,
) -> Params:
    """Return `grad f_q` for every query, trees with a leading axis."""
    measure = measure_for_auto_sharding(measurement, params, queries)

    def run(params: Params, queries: Any) -> Params:
        of_chunk = partial(gradients_of_rows, measure, layout, params)
        if is_summed:
            return _summed_gradient(measure, layout, chunk_size, params, queries)
        gradients: Params = map_chunks(of_chunk, queries, chunk_size)
        return gradients

    return with_auto_sharding(run, params, queries)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _divided(
    measurement: MeasurementOfOne,
    is_summed: bool,
    layout: Layout,
    chunk_size: int,
    divisor: Curvature | None,
    params: Params,
    queries: Any,
    damping: Any,
) -> ByBlock:
    """Return `(C + damping I)^-1 grad f_q` for every query."""
    measure = measure_for_auto_sharding(measurement, params, queries)

    def run(divisor: Any, params: Params, queries: Any, damping: Any) -> ByBlock:
        def of_chunk(rows: Any) -> ByBlock:
            gradients = gradients_of_rows(measure, layout, params, rows)
            return divided_by(layout, divisor, damping, gradients)

        if is_summed:
            total = _summed_gradient(measure, layout, chunk_size, params, queries)
            return divided_by(layout, divisor, damping, total)
        divided: ByBlock = map_chunks(of_chunk, queries, chunk_size)
        return divided

    return with_auto_sharding(run, divisor, params, queries, damping)


def divided_by(
    layout: Layout,
    divisor: Curvature | None,
    damping: Any,
    gradients: Params,
) -> ByBlock:
    """Return `(C + damping I)^-1 g` for trees g with a leading axis, block by block."""
    if divisor is None:
        return _cut(layout, gradients)
    if isinstance(divisor, Window):
        # The curvature of a window goes across blocks.
        return _cut(layout, jax.vmap(inverse(layout, divisor, damping))(gradients))
    operator = kron_operator(layout, divisor, damping)
    blocks, outside = _cut(layout, gradients)
    divided: dict[str, Vectors] = {}
    for name, matrices in blocks.items():
        divided[name] = jax.vmap(operator.blocks[name].times)(matrices)
    return divided, {path: operator.diagonal[path] * x for path, x in outside.items()}


def gradients_of_rows(
    measurement: MeasurementOfOne,
    layout: Layout,
    params: Params,
    rows: Any,
) -> Params:
    """Return the gradient of every row's measurement, zero where the layout holds entries fixed.

    Gradients are in at least float32.
    """

    def of_row(row: Any) -> Params:
        gradient = jax.grad(partial(_measured, measurement))(params, row)
        # Widened before any division: a 16-bit gradient would lose digits in the eigenbasis.
        return without_fixed(layout, jax.tree.map(at_least_float32, gradient))

    gradients: Params = map_examples(of_row, rows)
    return gradients


def _summed_gradient(
    measurement: MeasurementOfOne,
    layout: Layout,
    chunk_size: int,
    params: Params,
    queries: Any,
) -> Params:
    """Return the gradient of the sum of all measurements, a tree with a leading axis of one."""

    # One backward pass for a chunk: no query's own gradient is formed.
    def of_chunk(rows: Any) -> Params:
        def total(params: Params) -> Scalar:
            return jnp.sum(map_examples(partial(_measured, measurement, params), rows))

        return jax.tree.map(at_least_float32, jax.grad(total)(params))

    gradient = without_fixed(layout, sum_over_chunks(of_chunk, queries, chunk_size))
    summed: Params = jax.tree.map(lambda x: x[None], gradient)
    return summed


def measure_for_auto_sharding(
    measurement: MeasurementOfOne, params: Params, rows: Any
) -> MeasurementOfOne:
    """Return a measurement fit for `with_auto_sharding`, see `for_auto_sharding`."""
    if isinstance(measurement, Objective):
        return for_auto_sharding(measurement, params, rows)
    return without_placement(measurement, params, rows)


def _measured(measurement: MeasurementOfOne, params: Params, row: Any) -> Scalar:
    """Measure one query, which must give a scalar."""
    value = measurement.value if isinstance(measurement, Objective) else measurement
    name = "the measurement of one query, given as a batch of one,"
    return check_scalar(value(params, row), name)


def _cut(
    layout: Layout,
    vectors: Params,
) -> ByBlock:
    """Cut trees into the matrices of blocks, and the leaves with entries in no block."""
    # Every leaf has an axis of queries, which the layout does not know.
    leaves = jax.vmap(partial(named_leaves, layout))(vectors)

    def matrices(block: Block) -> Float[Array, "q s i o"]:
        leaves_of_block = {path: leaves[path] for path in block.leaves}
        return jax.vmap(block.matrix)(leaves_of_block)

    blocks: dict[str, Vectors] = {block.name: matrices(block) for block in layout.blocks}
    outside = {}
    for leaf in layout.leaves:
        # kinds: "identity" is held fixed, None is in blocks with all of its entries
        if leaf.outside == "diagonal":
            # Entries in blocks are zero here, so that no entry counts twice.
            uncovered = layout.uncovered(leaf.path)
            outside[leaf.path] = jnp.where(uncovered, leaves[leaf.path], 0)
    return blocks, outside
