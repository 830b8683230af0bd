"""Gradients of single examples."""

from __future__ import annotations

import jax
from jaxtyping import Array, PyTree

from curvax._batch import batch_size, check_batch, map_chunks, map_examples
from curvax._checks import check_count, check_params
from curvax._types import Batch, Params, Scalar
from curvax.objective import Objective, Part, of_parts, scaled_to_share, total_terms


def per_example_grads(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    microbatch: int | None = None,
) -> PyTree[Array]:
    """Return the gradient `g_b` of every example, scaled so that their mean is the gradient.

    With N terms in the batch (examples, or unmasked positions) and `L_b` the sum over the terms of
    example b, `g_b = B/N grad L_b`; then `1/B sum_b g_b = grad objective` and the empirical Fisher
    of the mean loss is `1/N sum_b (grad L_b)(grad L_b)' = N/B^2 sum_b g_b g_b'`.

    Args:
      objective: the `curvax.Objective` whose gradients are meant.
      params: pytree of float arrays.
      batch: the pair `(inputs, targets)`, of B rows.
      microbatch: rows worked on at a time; it bounds the activations in memory, not the result,
        which is B trees like params.

    Returns:
      A tree like params with a leading axis B, in the order of the batch. Of a `curvax.total` a
      dict of them by part, without the weights: the examples of two parts have nothing in common.

    Raises:
      ValueError: `microbatch` is below 1, or leading axes disagree.
      TypeError: params are not float.

    Cost: one gradient in FLOPs, without the sharing of weights between rows; memory B d numbers.
      Sums over examples that need no B d numbers: `curvax.estimate.empirical_fisher_diagonal`,
      `curvax.empirical_fishervp`.

    Deviates: every example is evaluated alone, so models that mix examples (BatchNorm in training)
      see a batch of one.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([2.0, 1.0]))
      >>> curvax.per_example_grads(objective, jnp.zeros(2), batch).tolist()
      [[-2.0, -0.0], [-0.0, -3.0]]
    """
    check_params(params)
    if objective.parts:
        return _grads_by_part(objective, params, batch, microbatch)
    check_batch(batch)
    size = batch_size(batch)
    chunk = size if microbatch is None else microbatch
    check_count(1, microbatch=chunk)
    totals = total_terms(objective, params, batch, microbatch)

    # Row b: grad of the share of example b in the mean, 1/N grad L_b = g_b / B.
    def shares_of(rows: Batch) -> PyTree[Array]:
        return gradient_shares(objective, params, rows, totals)

    shares = map_chunks(shares_of, batch, chunk)
    return jax.tree.map(lambda g: size * g, shares)


def _grads_by_part(
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatch: int | None,
) -> dict[str, PyTree[Array]]:
    """Return the gradients of the examples of every part, each scaled as by itself."""

    def of_part(part: Part, params: Params, rows: Batch) -> PyTree[Array]:
        return per_example_grads(part.objective, params, rows, microbatch=microbatch)

    return {part.name: rows for part, rows in of_parts(of_part, objective, params, batch)}


def gradient_shares(
    objective: Objective,
    params: Params,
    rows: Batch,
    totals: PyTree[Scalar],
) -> PyTree[Array]:
    """Return each row's share of the gradient; over all rows of the batch they sum to it.

    The result is a tree like params with a leading axis.
    """

    # `totals` of the whole batch, which `rows` may be a chunk of.
    def share(row: Batch) -> PyTree[Array]:
        of_row = scaled_to_share(objective, params, row, totals)
        return jax.grad(of_row.value)(params, row)

    return map_examples(share, rows)
