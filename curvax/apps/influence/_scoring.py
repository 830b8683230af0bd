"""Scores of training examples against queries, from the inputs and output-gradients of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from curvax._batch import batch_size, check_batch, map_chunks
from curvax._checks import check_choice, check_count, check_params
from curvax._shared import is_shared
from curvax._stream import on_device
from curvax._types import Batch, Params
from curvax._xla import with_auto_sharding
from curvax.apps.influence._example_gradients import (
    pairs_of_block,
    record_examples,
    share_gradient,
)
from curvax.apps.influence._fitting import Fitted
from curvax.apps.influence._methods import Solve, name_and_solver
from curvax.apps.influence._queries import (
    Measurement,
    Queries,
    QueryInfo,
    flat,
    full_matrices,
    precondition,
)
from curvax.capture import GradientPair
from curvax.kron._gradient_products import (
    LowRank,
    Vectors,
    examples_at_a_time,
    products_by_example,
    products_by_position,
    worth_forming,
)
from curvax.kron._layout import check_layout
from curvax.objective import Objective, for_auto_sharding

BY = {
    "example": "one number",
    "layer": "also a part for each block",
    "token": "also a part for each position",
}

# f_q: measurement of query q, L_b: sum of the losses of example b's terms, N: terms of the training
# set, v_q = (C + damping I)^-1 grad f_q: what `precondition` returns, C: the fitted curvature
# b: examples, q: queries, t: positions


class Influence(NamedTuple):
    """Influence of training examples on queries.

    Attributes:
      change_if_removed: `[queries, examples]`, the predicted change of the query's measurement, in
        its own unit, if the example were removed from the training set (and the model trained
        again); the negative holds for an example that is added once more. If the measurement is a
        loss, positive examples are helpful, negative ones harmful.
      by_layer: the parts of each block, and of each leaf in no block, `[queries, examples]`; they
        sum to `change_if_removed`. None unless asked for.
      by_token: the parts of each position of the training example, `[queries, examples,
        positions]`; None unless asked for.
      elsewhere: the part that belongs to no position (leaves in no block, and blocks used at other
        positions), `[queries, examples]`: with it `by_token` sums to `change_if_removed`.
    """

    change_if_removed: Float[Array, "queries examples"]
    by_layer: dict[str, Array] | None = None
    by_token: Float[Array, "queries examples positions"] | None = None
    elsewhere: Float[Array, "queries examples"] | None = None


class TopK(NamedTuple):
    """The k examples at one end of the scores for every query, the furthest first.

    Attributes:
      change_if_removed: `[queries, k]`.
      examples: the numbers of the examples in the stream, `[queries, k]`.
    """

    change_if_removed: Float[Array, "queries k"]
    examples: Int[Array, "queries k"]


def influence(
    fitted: Fitted,
    objective: Objective,
    params: Params,
    queries: Any,
    train_batches: Iterable[Batch],
    *,
    measurement: Measurement | None = None,
    damping: Any = None,
    method: str | Solve | None = None,
    by: str = "example",
    microbatch: int | None = None,
) -> tuple[Influence, QueryInfo]:
    """Predict how each query's measurement would change if a training example were removed.

    For query q and example b

        change_if_removed = grad f_q . (C + damping I)^-1 grad L_b / N

    with f_q the measurement, L_b the sum of the losses of the example's terms, N the number of
    terms of the training set, and C the fitted curvature of the mean loss: the change to first
    order in 1/N, at the minimum of the training loss.

    Args:
      fitted: the curvature that `fit` or `of_window` returned.
      objective: the `curvax.Objective` of training.
      params: the parameters that were fitted.
      queries: a pytree with a leading axis of queries; for an objective `(inputs, targets)`.
      train_batches: an iterable of `(inputs, targets)` that is read once (with "cg" for every
        product).
      measurement: what is predicted for each query: any function `(params, queries with one row) ->
        scalar`, such as the logit of one token, or an objective, which is its mean loss over the
        query's terms. None: the training objective. `influence.Summed(measurement)` is its sum over
        all queries, as one query.
      damping: a positive number, in units of an eigenvalue of C; or a mapping by block and path,
        such as a multiple of `mean_eigenvalues(fitted)`; None: 0.1 times the mean eigenvalue of
        each block.
      method: None, the method of the fit. A fit of "ekfac" serves "ekfac", "kfac", "cg" (solves
        with the Gauss-Newton matrix of the training set, across blocks) and "identity" (inner
        products of gradients: a ranking, not a prediction). A solver stands for "cg" with options,
        such as `functools.partial(curvax.cg, tol=1e-3, max_steps=50)`.
      by: "example"; "layer", also the parts of each block; "token", also the parts of each position
        of the second axis of the inputs' first array, through the layers that are used as often as
        it is long, in the order in which they are used. (A layer along another axis of the same
        length cannot be told apart: leave it out by `layout.edit(path, kind="identity")`.)
      microbatch: the number of training examples worked on at a time; None: as many as bring the
        work arrays of a block to 64 MB.

    Returns:
      An `Influence`, with columns in the order of the stream; and a `QueryInfo` with the damping
      that was used and how solves ended.

      Where `n_queries x n_examples` numbers are too many, call `precondition`, then `top_k`, or
      `score` batch by batch.

    Raises:
      ValueError: params have other shapes than those fitted (named by path) or belong to another
        model; the fit is not complete or does not serve the method; damping is not positive; there
        is no batch; the model mixes examples.
      TypeError: the measurement of one query is not a scalar.

    Cost: for queries see `precondition`. For every training example a forward pass, a backward pass
      without the gradients of kernels, and for each block `(positions + queries) in out`
      multiplications (for one position `queries in out`). An example's gradient is formed for one
      block at a time only. Memory: the queries' trees, and one batch (with "cg" two).

    Example: the mean of n numbers; without the i-th it moves by `(mean - x_i) / (n - 1)`, to first
      order by `(mean - x_i) / n`.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> model = lambda mean, ones: ones * mean
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0], [2.0], [6.0]])
      >>> params, batch = jnp.array([3.0]), (jnp.ones((3, 1)), x)
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> options = {"fisher": "exact", "progress": False}
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), **options)
      >>> options = {"measurement": lambda mean, query: mean[0], "damping": 1e-6}
      >>> queries = jnp.zeros(1)  # one query, which needs no data
      >>> result, _ = influence.influence(fitted, objective, params, queries, [batch], **options)
      >>> [round(change, 3) for change in result.change_if_removed[0].tolist()]
      [0.667, 0.333, -1.0]

    References: Koh and Liang (2017), Understanding black-box predictions via influence functions,
      https://arxiv.org/abs/1703.04730; Grosse et al. (2023), Studying large language model
      generalization with influence functions, https://arxiv.org/abs/2308.03296, sections 2 and 3.

    Deviates: the sign is that of removal; the papers' influence of adding an example is its
      negative, and without 1/N.
    """
    check_choice("by", by, BY)
    prepared, info = precondition(
        fitted,
        objective,
        params,
        queries,
        measurement=measurement,
        damping=damping,
        method=method,
        train_batches=train_batches if name_and_solver(method)[0] == "cg" else (),
    )
    # Queries are the expensive part and stay; training batches stream past them.
    score_batch = partial(_score, objective, by, microbatch, prepared, params)
    parts = [score_batch(batch) for batch in on_device(train_batches)]
    if not parts:
        raise ValueError("train_batches is empty; give at least one (inputs, targets).")
    joined: Influence = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    return joined, info


def score(
    queries: Queries,
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    by: str = "example",
    microbatch: int | None = None,
) -> Influence:
    """Score one batch of training examples against queries, the second half of `influence`.

    Args:
      queries: the queries that `precondition` returned, perhaps after `compress`.
      objective: the `curvax.Objective` of training.
      params: the parameters that were fitted.
      batch: `(inputs, targets)`.
      by: see `influence`.
      microbatch: see `influence`.

    Returns:
      An `Influence`. The function is pure and may be part of a program under `jit`.

    Raises:
      ValueError, TypeError: see `influence`.

    Cost: see `influence`; for queries of low rank `positions queries rank (in + out)`
      multiplications a block and example, where that is less.

    Example: `change_if_removed = grad f_q . (1/2 + 1/2)^-1 grad L_b / 2`.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> options = {"fisher": "exact", "progress": False}
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), **options)
      >>> queries, _ = influence.precondition(fitted, objective, params, batch, damping=0.5)
      >>> score = jax.jit(lambda queries, batch: influence.score(queries, objective, params, batch))
      >>> abs(score(queries, batch).change_if_removed).round(4).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    check_choice("by", by, BY)
    check_params(params)
    check_layout(queries.layout, params)
    check_batch(batch)
    score_chunks = partial(_score_chunks, queries, objective, params, batch, microbatch)
    if by == "token":
        of_chunk = partial(_scores_by_token, length=_length(batch[0]))
        tokens, elsewhere = score_chunks(of_chunk, by_position=True)
        # the parts of all positions, and what belongs to none
        total = jnp.sum(tokens, axis=2) + elsewhere
        return Influence(change_if_removed=total, by_token=tokens, elsewhere=elsewhere)
    if by == "layer":
        parts = score_chunks(_scores_by_layer)
        return Influence(change_if_removed=jnp.asarray(sum(parts.values())), by_layer=parts)
    return Influence(change_if_removed=score_chunks(_scores_by_example))


def top_k(
    queries: Queries,
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    k: int,
    *,
    microbatch: int | None = None,
) -> tuple[TopK, TopK]:
    """Find for every query the k examples of largest and of smallest `change_if_removed`.

    All examples are read once.

    Args:
      queries: the queries that `precondition` returned, perhaps after `compress`.
      objective: the `curvax.Objective` of training.
      params: the parameters that were fitted.
      batches: an iterable of `(inputs, targets)`; wrap it in `tqdm.tqdm` to see progress.
      k: the number of examples for every query; if there are fewer, all of them.
      microbatch: see `influence`.

    Returns:
      A `TopK` of the largest, and one of the smallest. If the measurement is a loss, these are the
      most helpful and the most harmful examples. Scores that are NaN count as the largest.

    Raises:
      ValueError, TypeError: see `influence`.

    Cost: that of `score`. Memory: 2 k numbers a query.

    Example: a mean, and the numbers that pull it down and up the most.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> model = lambda mean, ones: ones * mean
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0], [2.0], [6.0], [3.0]])
      >>> params, batch, key = jnp.array([3.0]), (jnp.ones((4, 1)), x), jax.random.key(0)
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> fitted = influence.fit(objective, layout, params, [batch], key, progress=False)
      >>> measure = lambda mean, query: mean[0]
      >>> queries, _ = influence.precondition(
      ...     fitted, objective, params, jnp.zeros(1), measurement=measure
      ... )
      >>> down, up = influence.top_k(queries, objective, params, [batch], k=2)
      >>> down.examples.tolist(), up.examples.tolist()
      ([[0, 1]], [[2, 3]])
    """
    check_count(1, k=k)
    num_queries = len(_first(queries))
    no_scores, no_numbers = jnp.zeros((num_queries, 0)), jnp.zeros((num_queries, 0), jnp.int32)
    highest, lowest = TopK(no_scores, no_numbers), TopK(no_scores, no_numbers)
    num_seen = 0  # of examples: the number of a batch's first one
    for batch in on_device(batches):
        scores = _score(objective, "example", microbatch, queries, params, batch).change_if_removed
        numbers = jnp.broadcast_to(num_seen + jnp.arange(scores.shape[1]), scores.shape)
        # The smallest scores are the largest of their negatives.
        highest = _best(highest, scores, numbers, k)
        lowest = _best(lowest, -scores, numbers, k)
        num_seen += scores.shape[1]
    if num_seen == 0:
        raise ValueError("batches is empty; give at least one (inputs, targets).")
    return highest, lowest._replace(change_if_removed=-lowest.change_if_removed)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    objective: Objective,
    by: str,
    microbatch: int | None,
    queries: Queries,
    params: Params,
    batch: Batch,
) -> Influence:
    """Score one batch in a program of its own."""
    return score(queries, objective, params, batch, by=by, microbatch=microbatch)


@partial(jax.jit, static_argnums=3)
def _best(best: TopK, values: Array, numbers: Array, k: int) -> TopK:
    """Update the k largest scores with those of a batch; of equal ones the earlier stays."""
    values = jnp.concatenate([best.change_if_removed.astype(values.dtype), values], axis=1)
    numbers = jnp.concatenate([best.examples, numbers], axis=1)
    largest, places = lax.top_k(values, min(k, values.shape[1]))
    return TopK(largest, jnp.take_along_axis(numbers, places, axis=1))


def _score_chunks(
    queries: Queries,
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatch: int | None,
    scores_of_chunk: Callable[..., Any],
    *,
    by_position: bool = False,
) -> Any:
    """Compute scores chunk by chunk, and bring their axes into the order queries, examples."""
    placed = for_auto_sharding(objective, params, batch)

    def run(queries: Queries, params: Params, batch: Batch) -> Any:
        rows = microbatch
        if rows is None:
            rows = _rows_at_a_time(queries, placed, params, batch[0], by_position)
        check_count(1, microbatch=rows)
        return map_chunks(partial(scores_of_chunk, queries, placed, params), batch, rows)

    scores = with_auto_sharding(run, queries, params, batch)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), scores)


def _scores_by_example(
    queries: Queries,
    objective: Objective,
    params: Params,
    chunk: Batch,
) -> Float[Array, "b q"]:
    """Return `v_q . grad L_b / N`."""
    parts = _scores_by_layer(queries, objective, params, chunk)
    return jnp.asarray(sum(parts.values()))


def _scores_by_layer(
    queries: Queries,
    objective: Objective,
    params: Params,
    chunk: Batch,
) -> dict[str, Float[Array, "b q"]]:
    """Return the parts of `v_q . grad L_b / N` in each block and in each leaf outside."""
    pairs, parts = _pairs_and_outside(queries, objective, params, chunk)
    low_rank: dict[str, Vectors] = {}
    for block in queries.layout.blocks:
        vectors, block_pairs = queries.blocks[block.name], pairs[block.name]
        if isinstance(vectors, LowRank) and worth_forming(vectors, block_pairs):
            vectors = full_matrices(vectors)
        if isinstance(vectors, LowRank):
            # Grosse et al. (2023), section 3.2.2: position by position, without matrices
            low_rank[block.name] = vectors
        else:
            # V . D with D = sum_t a_t g_t' the example's gradient
            parts[block.name] = products_by_example(block, vectors, block_pairs).T
    for name, uses in _products_by_position(low_rank, pairs).items():
        parts[name] = jnp.asarray(sum(jnp.sum(products, axis=2) for products in uses))
    return parts


def _scores_by_token(
    queries: Queries,
    objective: Objective,
    params: Params,
    chunk: Batch,
    length: int,
) -> tuple[Float[Array, "b q t"], Float[Array, "b q"]]:
    """Return the parts of `v_q . grad L_b / N` at each position, and the part at no position.

    The gradient of a layer is a sum over positions, `D = sum_t a_t g_t'`, and so is its score.
    """
    pairs, outside = _pairs_and_outside(queries, objective, params, chunk)
    at_positions, elsewhere = [], list(outside.values())
    # Gradients behind a mask are formed: their rows are not positions.
    masked = {block.name for block in queries.layout.blocks if block.kernel.mask is not None}
    for name, uses in _products_by_position(queries.blocks, pairs).items():
        for products in uses:
            if products.shape[2] == length and name not in masked:
                at_positions.append(products)
            else:
                elsewhere.append(jnp.sum(products, axis=2))
    if not at_positions:
        raise ValueError(
            f'by="token": no block is used at each of the {length} positions of the second axis of '
            "the inputs."
        )
    # with zeros, because all blocks may be used at the positions, and then nothing is elsewhere
    zeros = jnp.zeros((batch_size(chunk), len(_first(queries))), _first(queries).dtype)
    return jnp.asarray(sum(at_positions)), sum(elsewhere, start=zeros)


def _pairs_and_outside(
    queries: Queries,
    objective: Objective,
    params: Params,
    chunk: Batch,
) -> tuple[dict[str, list[GradientPair]], dict[str, Float[Array, "b q"]]]:
    """Return the pairs of every block's gradients, and the scores of leaves outside of blocks."""
    inputs, targets = chunk
    # One forward and one backward pass: grad L_b / N, of kernels only as inputs and cotangents
    capture = record_examples(objective, queries.layout, params, inputs)
    cotangents = capture.pull(share_gradient(objective, capture, targets, queries.terms))
    pairs = {}
    for block in queries.layout.blocks:
        pairs[block.name] = pairs_of_block(block, capture, cotangents)
    scores = {}
    for path, gradients in cotangents.outside.items():
        # A leaf may be the kernel of a block in a part of its entries only.
        name = f"{path}, the rest" if path in pairs else path
        vectors = flat(queries.outside[path])
        scores[name] = jnp.matmul(flat(gradients), vectors.T, precision=lax.Precision.HIGHEST)
    return pairs, scores


def _products_by_position(
    vectors: dict[str, Vectors],
    pairs: dict[str, list[GradientPair]],
) -> dict[str, list[Float[Array, "b q t"]]]:
    """Return `a_t' V_q g_t` of every block's uses; 8 queries at a time bound the memory."""
    if not vectors:
        return {}

    def of_query(vector_of: dict[str, Any]) -> dict[str, list[Array]]:
        products = {}
        for name, vector in vector_of.items():
            products[name] = [products_by_position(vector, pair) for pair in pairs[name]]
        return products

    products = lax.map(of_query, vectors, batch_size=8)  # each [q, b, t]
    by_example: dict[str, list[Array]] = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), products)
    return by_example


def _rows_at_a_time(
    queries: Queries,
    objective: Objective,
    params: Params,
    inputs: Any,
    by_position: bool,
) -> int:
    """Choose how many examples to work on at a time, so that work arrays of a block take 64 MB."""

    def inputs_of_uses() -> dict[str, Any]:
        return record_examples(objective, queries.layout, params, inputs).inputs

    # Shapes tell it: nothing is computed here.
    shapes = jax.eval_shape(inputs_of_uses)
    rows = batch_size(inputs)
    for block in queries.layout.blocks:
        vectors = queries.blocks[block.name]
        fitting = examples_at_a_time(block, vectors, shapes[block.name], by_position)
        rows = min(rows, fitting)
    return rows


def _length(inputs: Any) -> int:
    """Return the length of the second axis of the first array."""
    # values without a batch axis have no positions either
    leaves = jax.tree.leaves(inputs, is_leaf=is_shared)
    shape = next(jnp.shape(x) for x in leaves if not is_shared(x))
    if len(shape) < 2:
        raise ValueError(
            f'by="token" goes by the second axis of the inputs, whose first array is {list(shape)}.'
        )
    return int(shape[1])


def _first(queries: Queries) -> Array:
    # any array with the axis of queries: for their number and dtype
    first: Array = jax.tree.leaves((queries.blocks, queries.outside))[0]
    return first
