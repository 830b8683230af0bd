"""Scores of training examples against queries, from the inputs and output-gradients of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from curvax._batch import batch_size, check_batch, map_chunks
from curvax._checks import check_choice, check_count, check_params
from curvax._shared import is_shared, unwrap
from curvax._stream import on_device
from curvax._types import Batch, Params, Scalar, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.apps.influence._fitting import Fitted
from curvax.apps.influence._queries import Measurement, Queries, QueryInfo, precondition
from curvax.capture import Capture, gradient_pairs, record
from curvax.kron._gradient_products import (
    LowRank,
    examples_at_a_time,
    products_by_example,
    products_by_position,
    worth_forming,
)
from curvax.kron._layout import check_layout
from curvax.kron._plan import kernel_of, layout_plan
from curvax.losses._shares import share_of, term_counts
from curvax.objective import Objective
from curvax.solve import SolveInfo, cg

BY = {
    "example": "one number",
    "layer": "also a part for each block",
    "token": "also a part for each position",
}


class Influence(NamedTuple):
    """Influence of training examples on queries.

    Attributes:
      change_if_removed: `[queries, examples]`, the predicted change of the query's measurement, in its own unit, if the
        example were removed from the training set (and the model trained again); its negative is that for an example which
        is added once more. If the measurement is a loss, positive examples are helpful, negative ones harmful.
      by_layer: the parts of each block, and of each leaf in no block, `[queries, examples]`; they sum to the whole. None
        unless asked for.
      by_token: the parts of each position of the training example, `[queries, examples, positions]`; None unless asked for.
      rest: what belongs to no position (leaves in no block, and blocks used at other positions), `[queries, examples]`:
        with it `by_token` sums to the whole.
    """

    change_if_removed: Float[Array, "queries examples"]
    by_layer: dict[str, Array] | None = None
    by_token: Float[Array, "queries examples positions"] | None = None
    rest: Float[Array, "queries examples"] | None = None


class TopK(NamedTuple):
    """The examples at one end for every query, the furthest first.

    Attributes:
      change_if_removed: `[queries, k]`.
      examples: `[queries, k]`, their numbers in the stream.
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
    method: str | None = None,
    by: str = "example",
    microbatch: int | None = None,
    solver: Callable[..., tuple[Params, SolveInfo]] = cg,
) -> tuple[Influence, QueryInfo]:
    """Predict how each query's measurement would change if a training example were removed.

    For query q and example b `change_if_removed = grad f_q . (C + damping I)^-1 grad L_b / N`, with f_q the measurement,
    L_b the sum of the losses of the example's terms, N the number of terms of the training set, and C the fitted curvature
    of the mean loss: the change to first order in 1/N, at the minimum of the training loss.

    Args:
      fitted: of `fit`, or of `of_window`.
      objective: a `curvax.Objective`, that of training.
      params: that were fitted.
      queries: pytree with a leading axis of queries; for an objective `(inputs, targets)`.
      train_batches: iterable of `(inputs, targets)`, gone through once (with "cg" for every product).
      measurement: what is predicted for each query: any function `(params, queries with one row) -> scalar`, such as the
        logit of one token, or an objective, its mean loss over the query's terms. None: the training objective.
      damping: positive number, in units of an eigenvalue of C; a mapping by block and path, such as a multiple of
        `mean_eigenvalues(fitted)`; None: 0.1 times the mean eigenvalue of each block.
      method: None, that of the fit. A fit of "ekfac" serves "ekfac", "kfac", "cg" (solves with the Gauss-Newton matrix of
        the training set, across blocks) and "identity" (inner products of gradients: no prediction, a ranking).
      by: "example"; "layer", also the parts of each block; "token", also the parts of each position of the second axis of
        the inputs' first array, through the layers that are used as often as it is long, in the order in which they are (a
        layer along another axis of the same length cannot be told apart: `layout.edit(path, kind="identity")`).
      microbatch: training examples worked on at a time; None: as many as bring the work arrays of a block to 64 MB.
      solver: of "cg", such as `functools.partial(curvax.cg, tol=1e-3, max_steps=50)`.

    Returns:
      `Influence`, columns in the order of the stream; `QueryInfo` with the damping in use and how solves ended.

      Where `n_queries x n_examples` numbers are too many: `precondition`, then `top_k`, or `score` batch by batch.

    Raises:
      ValueError: params of other shapes than those fitted (by path), or another model; a fit that is not complete; a method
        that it does not serve; damping that is not positive; no batch; a model that mixes examples.
      TypeError: a measurement that is not a scalar for one query.

    Cost: for queries see `precondition`. For every training example a forward pass, a backward pass without the gradients
      of kernels, and for each block `(positions + queries) in out` multiplications (one position: `queries in out`). No
      example's gradient is formed but of one block at a time. Memory: the queries' trees, one batch (with "cg" two).

    Example: the mean of numbers; without the i-th of n it is `(mean - x_i) / (n - 1)` further on.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda mean, ones: ones * mean, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0], [2.0], [6.0]])
      >>> params, batch = jnp.array([3.0]), (jnp.ones((3, 1)), x)
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), fisher="exact", progress=False)
      >>> measure = lambda mean, query: mean[0]
      >>> result, _ = influence.influence(fitted, objective, params, jnp.zeros(1), [batch], measurement=measure, damping=1e-6)
      >>> [round(change, 3) for change in result.change_if_removed[0].tolist()]         # to first order: over n, not n - 1
      [0.667, 0.333, -1.0]

    References: Koh and Liang (2017), Understanding black-box predictions via influence functions; Grosse et al. (2023),
      Studying large language model generalization with influence functions, sections 2 and 3.

    Deviates: the sign is that of removal; the papers' influence of adding an example is its negative, and without 1/N.
    """
    check_choice("by", by, BY)
    prepared, info = precondition(
        fitted,
        objective,
        objective if measurement is None else measurement,
        params,
        queries,
        damping=damping,
        method=method,
        train_batches=train_batches if method == "cg" else (),
        solver=solver,
    )
    parts = [
        _score(objective, by, microbatch, prepared, params, batch)
        for batch in on_device(train_batches)
    ]
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
    """Score one batch of training examples against preconditioned queries, the second half of `influence`.

    Args:
      queries: of `precondition`, perhaps after `compress`.
      objective: that of training.
      params: that were fitted.
      batch: `(inputs, targets)`.
      by: as in `influence`.
      microbatch: as in `influence`.

    Returns:
      `Influence`. Pure: it may be part of a program under `jit`.

    Raises:
      As `influence`.

    Cost: see `influence`; of queries of low rank `positions queries rank (in + out)` multiplications a block and example,
      where that is less.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), fisher="exact", progress=False)
      >>> queries, _ = influence.precondition(fitted, objective, objective, params, batch, damping=0.5)
      >>> score = jax.jit(lambda queries, params, batch: influence.score(queries, objective, params, batch))
      >>> abs(score(queries, params, batch).change_if_removed).round(4).tolist()                  # (1/2 + 1/2)^-1 / 2
      [[0.5, 0.0], [0.0, 0.5]]
    """
    check_choice("by", by, BY)
    check_params(params)
    check_layout(queries.layout, params)
    check_batch(batch)
    length = _length(batch[0]) if by == "token" else None

    def run(queries: Queries, params: Params, batch: Batch) -> PyTree[Array]:
        auto = lambda: _rows_at_a_time(queries, objective, params, batch[0], by == "token")
        rows = auto() if microbatch is None else microbatch
        check_count(1, microbatch=rows)
        return map_chunks(
            lambda chunk: _parts(queries, objective, params, chunk, by, length), batch, rows
        )

    parts = jax.tree.map(
        lambda x: x.swapaxes(0, 1), with_auto_sharding(run, queries, params, batch)
    )
    if by == "token":
        return Influence(
            jnp.sum(parts["tokens"], axis=2) + parts["rest"], None, parts["tokens"], parts["rest"]
        )
    return Influence(jnp.asarray(sum(parts.values())), parts if by == "layer" else None)


def top_k(
    queries: Queries,
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    k: int,
    *,
    microbatch: int | None = None,
) -> tuple[TopK, TopK]:
    """Find for every query the k examples with the largest and with the smallest `change_if_removed`, in one pass.

    Args:
      queries: of `precondition`, perhaps after `compress`.
      objective: that of training.
      params: that were fitted.
      batches: iterable of `(inputs, targets)`; wrap it in `tqdm.tqdm` to see progress.
      k: examples to keep for every query; all of them, if there are fewer.
      microbatch: as in `influence`.

    Returns:
      `TopK` of the largest, and of the smallest. If the measurement is a loss, those are the most helpful and the most
      harmful examples. Scores that are NaN count as the largest.

    Raises:
      As `influence`.

    Cost: as `score`. Memory: 2 k numbers a query.

    Example: a mean, and the numbers that pull it down and up the most.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda mean, ones: ones * mean, curvax.losses.squared_error())
      >>> params, batch = jnp.array([3.0]), (jnp.ones((4, 1)), jnp.array([[1.0], [2.0], [6.0], [3.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), progress=False)
      >>> queries, _ = influence.precondition(fitted, objective, lambda mean, _: mean[0], params, jnp.zeros(1))
      >>> down, up = influence.top_k(queries, objective, params, [batch], k=2)
      >>> down.examples.tolist(), up.examples.tolist()
      ([[0, 1]], [[2, 3]])
    """
    check_count(1, k=k)
    size = len(_first(queries))
    empty = TopK(jnp.zeros((size, 0)), jnp.zeros((size, 0), jnp.int32))
    highest, lowest, first = empty, empty, 0
    for batch in on_device(batches):
        found = _score(objective, "example", microbatch, queries, params, batch).change_if_removed
        numbers = jnp.broadcast_to(first + jnp.arange(found.shape[1]), found.shape)
        highest, lowest = _best(highest, found, numbers, k), _best(lowest, -found, numbers, k)
        first += found.shape[1]
    if first == 0:
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
    return score(queries, objective, params, batch, by=by, microbatch=microbatch)


@partial(jax.jit, static_argnums=3)
def _best(held: TopK, values: Array, numbers: Array, k: int) -> TopK:
    values = jnp.concatenate([held.change_if_removed.astype(values.dtype), values], axis=1)
    best, places = lax.top_k(values, min(k, values.shape[1]))
    return TopK(
        best, jnp.take_along_axis(jnp.concatenate([held.examples, numbers], axis=1), places, axis=1)
    )


def _parts(
    queries: Queries,
    objective: Objective,
    params: Params,
    chunk: Batch,
    by: str,
    length: int | None,
) -> dict[str, Array]:
    """Return the parts of the scores, `[examples, queries]`: by layer, all together, or by position with the rest."""
    layout, vectors = queries.layout, queries.blocks
    plan = layout_plan(objective, layout, params, chunk[0], per_example=True)
    recorded = record(plan, params, chunk[0])
    pulled = recorded.pull(share_gradient(objective, recorded, chunk[1], queries.terms))
    pairs = {
        b.name: gradient_pairs(kernel_of(b), recorded.inputs[b.name], pulled.blocks[b.name])
        for b in layout.blocks
    }
    parts = {}
    for path, x in pulled.outside.items():
        name = f"{path}, the rest" if path in pairs else path
        parts[name] = jnp.matmul(
            flat(x), flat(queries.outside[path]).T, precision=lax.Precision.HIGHEST
        )
    others = {}
    for block in layout.blocks:
        own = vectors[block.name]
        if by != "token" and isinstance(own, LowRank) and worth_forming(own, pairs[block.name]):
            own = jnp.matmul(own.left, own.right, precision=lax.Precision.HIGHEST)
        if by == "token" or isinstance(own, LowRank):
            others[block.name] = own
        else:
            parts[block.name] = products_by_example(block, own, pairs[block.name]).T
    positions: list[Array] = []
    if others:
        by_position = lambda one: {
            name: [products_by_position(one[name], p) for p in pairs[name]] for name in others
        }
        for name, uses in lax.map(
            by_position, others, batch_size=8
        ).items():  # each [queries, examples, positions]
            moved = [jnp.moveaxis(x, 0, 1) for x in uses]
            positions += [x for x in moved if x.shape[2] == length]
            parts[name] = jnp.asarray(
                sum(jnp.sum(x, axis=2) for x in moved if x.shape[2] != length)
            )
    if by == "layer":
        return parts
    nothing = jnp.zeros(
        (len(jax.tree.leaves(recorded.outputs)[0]), len(_first(queries))), _first(queries).dtype
    )
    if by == "example":
        return {"": sum(parts.values(), start=nothing)}
    if not positions:
        raise ValueError(
            f'by="token": no block is used at each of the {length} positions of the second axis of the inputs.'
        )
    return {"rest": sum(parts.values(), start=nothing), "tokens": jnp.asarray(sum(positions))}


def _rows_at_a_time(
    queries: Queries, objective: Objective, params: Params, inputs: Any, by_position: bool
) -> int:
    """Choose how many examples to work on at a time."""
    plan = layout_plan(objective, queries.layout, params, inputs, per_example=True)
    recorded = jax.eval_shape(lambda: record(plan, params, inputs).inputs)
    names = {block: block.name for block in queries.layout.blocks}
    few = [
        examples_at_a_time(block, queries.blocks[n], recorded[n], by_position)
        for block, n in names.items()
    ]
    return min([batch_size(inputs), *few])


def share_gradient(
    objective: Objective, recorded: Capture, targets: Any, totals: PyTree[Scalar]
) -> Any:
    """Return the gradient in the outputs of every example's part of the training loss, `L_b / N`."""
    counts = term_counts(objective.loss, recorded.outputs, targets)
    loss = share_of(objective.loss, counts, totals)
    return jax.grad(lambda outputs: loss(outputs, unwrap(targets)))(recorded.outputs)


def _length(inputs: Any) -> int:
    """Return the length of the second axis of the first array."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs, is_leaf=is_shared) if not is_shared(x)]
    if len(shapes[0]) < 2:
        raise ValueError(
            f'by="token" goes by the second axis of the inputs, whose first array is {list(shapes[0])}.'
        )
    return int(shapes[0][1])


def _first(queries: Queries) -> Array:
    first: Array = jax.tree.leaves((queries.blocks, queries.outside))[0]
    return first


def flat(x: Array) -> Float[Array, "n d"]:
    return at_least_float32(x).reshape(len(x), -1)
