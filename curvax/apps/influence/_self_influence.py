"""Self-influence: how much each training example's own loss hangs on the example."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._batch import ENTRIES_AT_A_TIME, check_batch, map_chunks, map_examples
from curvax._checks import check_count, check_params
from curvax._shared import unwrap
from curvax._stream import on_device
from curvax._trees import dimension
from curvax._types import Batch, Params, Scalar
from curvax._xla import with_auto_sharding
from curvax.apps.influence._example_gradients import (
    pairs_of_block,
    record_examples,
    share_gradient,
)
from curvax.apps.influence._fitting import Fitted
from curvax.apps.influence._methods import (
    Curvature,
    check_fitted,
    dampings,
    divisor_of,
)
from curvax.apps.influence._queries import (
    ByBlock,
    MeasurementOfOne,
    check_measurement,
    divided_by,
    flat,
    gradients_of_rows,
    measure_for_auto_sharding,
)
from curvax.capture import Capture
from curvax.kron._block_operators import EigenOperator
from curvax.kron._gradient_pairs import Basis, gradient_of
from curvax.kron._gradient_products import squares_by_example
from curvax.kron._layout import Layout, check_layout
from curvax.kron._operator import KronOperator, kron_operator
from curvax.losses._shares import term_counts
from curvax.objective import Objective, for_auto_sharding
from curvax.solve import Window

# P = (C + damping I)^-1 with C the fitted curvature, f_b: mean loss of example b, L_b: the sum over
# its n_b terms, N: terms of the training set, J: Jacobian of the example's outputs in params


def self_influence(
    fitted: Fitted,
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    *,
    measurement: MeasurementOfOne | None = None,
    damping: Any = None,
    method: str | None = None,
    microbatch: int | None = None,
) -> Float[Array, " examples"]:
    """Predict the change of each training example's own mean loss if the example were removed.

    It is the diagonal of `influence` with the training examples as queries, computed in one pass.
    It is large where only memory of the example explains it: wrong labels, outliers.

    Args:
      fitted: the curvature that `fit` returned.
      objective: the `curvax.Objective` of training.
      params: the parameters that were fitted.
      batches: an iterable of `(inputs, targets)`; wrap it in `tqdm.tqdm` to see progress.
      measurement: what is predicted in place of the example's mean loss, such as the margin of its
        label: a function `(params, batch of one example) -> scalar`, or an objective.
      damping: see `influence`.
      method: None, the method of the fit; or "ekfac", "kfac", "diagonal" or "identity"; with a
        measurement also "mfac".
      microbatch: the number of examples worked on at a time; None: as many as bring the gradients
        of a block to 64 MB (with a measurement, those of all params).

    Returns:
      `[examples]`, in the order of the stream.

    Raises:
      ValueError, TypeError: see `influence`.

    Cost: for every example a forward and a backward pass (two for a `weighted_sum`); for each block
      `in^2 + out^2` multiplications a position, and `in out`, for each position where there are
      several. With a measurement: its gradient and `2 in out (in + out)` multiplications a block.

    Example: of two examples that share a direction, and one that is alone in its own.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, jnp.ones((3, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)  # F = diag(2/3, 1/3)
      >>> options = {"fisher": "exact", "progress": False}
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), **options)
      >>> scores = influence.self_influence(fitted, objective, params, [batch], damping=1e-6)
      >>> scores.round(2).tolist()
      [0.5, 0.5, 1.0]

    References: Koh and Liang (2017), Understanding black-box predictions via influence functions,
      https://arxiv.org/abs/1703.04730, section 5.4, which finds wrong labels by it.
    """
    method = check_fitted(fitted, method)
    check_params(params)
    check_layout(fitted.layout, params)
    layout = fitted.layout
    if measurement is None:
        operator = _operator(fitted, method, damping)
        score_batch = partial(
            _score_batch, objective, layout, microbatch, operator, fitted.terms, params
        )
    else:
        check_measurement(measurement)
        divisor = divisor_of(fitted, _without_solves(method))
        damping = None if method == "identity" else dampings(fitted, method, damping)
        options = objective, measurement, layout, microbatch
        score_batch = partial(_measure_batch, *options, divisor, damping, fitted.terms, params)
    scores = list(map(score_batch, on_device(batches)))
    if not scores:
        raise ValueError("batches is empty; give at least one (inputs, targets).")
    return jnp.concatenate(scores)


def _operator(fitted: Fitted, method: str, damping: Any) -> KronOperator:
    """Build P with each block in its eigenbasis, where `D . P D` is a weighted sum of squares."""
    layout = fitted.layout
    if method == "identity":
        ones = {b.name: EigenOperator(None, None, jnp.ones(b.shape)) for b in layout.blocks}
        paths = [leaf.path for leaf in layout.leaves if leaf.outside == "diagonal"]
        return KronOperator(ones, dict.fromkeys(paths, jnp.ones([])))
    divisor = divisor_of(fitted, _without_solves(method))
    if divisor is None or isinstance(divisor, Window):
        raise _no_such_method(method)
    damping = dampings(fitted, method, damping)
    # (A x G + damping I)^-1, or of EK-FAC's moments in the eigenbasis: diagonal in it, both.
    return kron_operator(layout, divisor, damping)


def _without_solves(method: str) -> str:
    """Return the method, or raise if it solves a system for every gradient."""
    if method == "cg":
        raise _no_such_method(method)
    return method


def _no_such_method(method: str) -> ValueError:
    return ValueError(
        "self_influence goes by the methods 'ekfac', 'kfac', 'diagonal' and 'identity', "
        f"got {method!r}. Call influence with the training examples as queries: its diagonal "
        "is their self-influence."
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _score_batch(
    objective: Objective,
    layout: Layout,
    microbatch: int | None,
    inverse: KronOperator,
    terms: PyTree[Scalar],
    params: Params,
    batch: Batch,
) -> Array:
    """Score one batch, in chunks of bounded memory."""
    check_batch(batch)
    # The largest gradient of a block is the largest work array of an example.
    largest = max((math.prod(block.shape) for block in layout.blocks), default=1)
    rows = _rows_at_a_time(microbatch, largest)

    placed = for_auto_sharding(objective, params, batch)

    def run(inverse: KronOperator, terms: PyTree[Scalar], params: Params, batch: Batch) -> Any:
        score = _scores_of_heads if objective.loss.heads else _scores_of_loss
        return map_chunks(partial(score, placed, layout, inverse, terms, params), batch, rows)

    scores: Array = with_auto_sharding(run, inverse, terms, params, batch)
    return scores


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _measure_batch(
    objective: Objective,
    measurement: MeasurementOfOne,
    layout: Layout,
    microbatch: int | None,
    divisor: Curvature | None,
    damping: Any,
    terms: PyTree[Scalar],
    params: Params,
    batch: Batch,
) -> Array:
    """Return `grad m_b . P grad L_b / N` of one batch, m_b the measurement of example b."""
    check_batch(batch)
    # An example's gradients are trees like params.
    rows = _rows_at_a_time(microbatch, dimension(params))
    placed = for_auto_sharding(objective, params, batch)
    measure = measure_for_auto_sharding(measurement, params, batch)

    def run(
        divisor: Any,
        damping: Any,
        terms: PyTree[Scalar],
        params: Params,
        batch: Batch,
    ) -> Any:
        def of_chunk(chunk: Batch) -> Float[Array, " examples"]:
            gradients = gradients_of_rows(measure, layout, params, chunk)
            v = divided_by(layout, divisor, damping, gradients)
            return _products_with_examples(placed, layout, v, terms, params, chunk)

        return map_chunks(of_chunk, batch, rows)

    scores: Array = with_auto_sharding(run, divisor, damping, terms, params, batch)
    return scores


def _rows_at_a_time(microbatch: int | None, entries: int) -> int:
    """Return how many examples with a work array of so many entries are worked on at a time."""
    rows = max(1, ENTRIES_AT_A_TIME // max(1, entries)) if microbatch is None else microbatch
    check_count(1, microbatch=rows)
    return rows


def _products_with_examples(
    objective: Objective,
    layout: Layout,
    vectors: ByBlock,
    terms: PyTree[Scalar],
    params: Params,
    chunk: Batch,
) -> Float[Array, " examples"]:
    """Return `v_b . grad L_b / N`, the product of each example's gradient with a vector of it."""
    inputs, targets = chunk
    capture = record_examples(objective, layout, params, inputs)
    cotangents = capture.pull(share_gradient(objective, capture, targets, terms))
    blocks, outside = vectors
    parts = []
    for path, gradients in cotangents.outside.items():
        parts.append(jnp.sum(flat(gradients) * flat(outside[path]), axis=1))
    for block in layout.blocks:
        gradients = gradient_of(block, pairs_of_block(block, capture, cotangents))
        parts.append(jnp.sum(flat(gradients) * flat(blocks[block.name]), axis=1))
    return jnp.asarray(sum(parts))


def _scores_of_loss(
    objective: Objective,
    layout: Layout,
    inverse: KronOperator,
    terms: Scalar,
    params: Params,
    chunk: Batch,
) -> Float[Array, " examples"]:
    """Return `grad f_b . P grad L_b / N` of a loss that is one mean over terms."""
    inputs, targets = chunk
    capture = record_examples(objective, layout, params, inputs)
    v = share_gradient(objective, capture, targets, terms)
    # f_b = L_b / n_b is N / n_b of the part L_b / N: with v its gradient in the outputs,
    # grad f_b . P grad L_b / N = (N / n_b) |J'v|_P^2.
    counts = map_examples(lambda row: term_counts(objective.loss, *row), (capture.outputs, targets))
    scores: Array = _squared_norms(layout, inverse, capture, v) * terms / jnp.maximum(counts, 1)
    return scores


def _scores_of_heads(
    objective: Objective,
    layout: Layout,
    inverse: KronOperator,
    terms: PyTree[Scalar],
    params: Params,
    chunk: Batch,
) -> Float[Array, " examples"]:
    """Return `grad f_b . P grad L_b / N` of a weighted sum of losses.

    Each head has an N of its own, so that the two gradients are not multiples of each other.
    """
    inputs, targets = chunk
    capture = record_examples(objective, layout, params, inputs)
    v = share_gradient(objective, capture, targets, terms)  # of L_b / N

    def gradient_of_row(row: Any) -> Any:
        outputs, targets = row
        return jax.grad(lambda f: objective.loss(f, unwrap(targets)))(outputs)

    # u is the gradient of f_b over N: of the size of v, so that rounding spares the difference.
    size = sum(jax.tree.leaves(terms))
    gradients = map_examples(gradient_of_row, (capture.outputs, targets))
    u = jax.tree.map(lambda x, like: (x[:, 0] / size).astype(like.dtype), gradients, v)
    # Both gradients are J'u and J'v, and only squared norms are at hand. P is symmetric, so that
    #   |J'(u + v)|_P^2 = |J'u|_P^2 + |J'v|_P^2 + 2 J'u . P J'v,
    #   |J'(u - v)|_P^2 = |J'u|_P^2 + |J'v|_P^2 - 2 J'u . P J'v:
    # their difference is 4 J'u . P J'v (polarization identity).
    plus = jax.tree.map(jnp.add, u, v)
    minus = jax.tree.map(jnp.subtract, u, v)
    norms_of_plus = _squared_norms(layout, inverse, capture, plus)
    norms_of_minus = _squared_norms(layout, inverse, capture, minus)
    return size * (norms_of_plus - norms_of_minus) / 4


def _squared_norms(
    layout: Layout,
    inverse: KronOperator,
    capture: Capture,
    cotangent: Any,
) -> Float[Array, " examples"]:
    """Return `|J'c|_P^2 = J'c . P J'c` for every example's cotangent c of the outputs."""
    cotangents = capture.pull(cotangent)
    parts = []
    for path, gradients in cotangents.outside.items():
        # P is diagonal here, and zero where entries are in blocks.
        weights = jnp.where(layout.uncovered(path), inverse.diagonal[path], 0)
        parts.append(jnp.sum(flat(gradients) ** 2 * weights.ravel(), axis=1))
    for block in layout.blocks:
        # In the eigenbasis of the block P is diagonal, too (George et al., 2018).
        power = inverse.blocks[block.name]
        if not isinstance(power, EigenOperator):
            raise TypeError(
                f"{block.name} is not diagonal in a Kronecker eigenbasis, which self-influence "
                f'needs; fit with layout.edit("{block.leaves[0]}", sharing="expand").'
            )
        pairs = pairs_of_block(block, capture, cotangents, Basis(power.left, power.right))
        parts.append(squares_by_example(block, power, pairs))
    return jnp.asarray(sum(parts))
