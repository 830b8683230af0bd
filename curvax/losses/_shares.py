"""The share of a chunk, or of one example, in a mean over terms.

`curvax/objective.py` says why the shares of all chunks sum to the whole.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._batch import map_examples
from curvax._shared import unwrap
from curvax._trees import safe_divide
from curvax._types import Outputs, PRNGKey, Scalar, Targets
from curvax.losses._combine import weighted_sum
from curvax.losses._loss import Loss, count_terms, times


def term_counts(
    loss: Loss,
    outputs: Outputs,
    targets: Targets,
) -> PyTree[Scalar]:
    """Count the terms: a scalar, or for a weighted sum a dict by head."""
    targets = unwrap(targets)
    if not loss.heads:
        return count_terms(loss, outputs, targets)
    # Each head has its own mean: a mask on one says nothing about the others.
    return {name: term_counts(head, outputs[name], targets[name]) for name, _, head in loss.heads}


def share_of(
    loss: Loss,
    counts: PyTree[Scalar],
    totals: PyTree[Scalar],
) -> Loss:
    """Scale `loss`, curvature included, on `counts` terms to its share of a mean over `totals`.

    The shares of all chunks of a batch sum to the loss of the batch.
    """
    if loss.couples_examples:
        raise TypeError(
            "this loss compares the examples of a batch with each other, so that parts of a batch "
            "and single examples have no share in it. What works on them (microbatch=, streamed "
            "products, EK-FAC, curvax.fishervp, gradients of examples) cannot take it; "
            "curvax.ggnvp, curvax.kfac and curvax.gauss_newton on the whole batch can."
        )
    # N_c / N; no term in the whole batch: 0/0 is 0, such a batch has no loss and no curvature.
    return _scaled(loss, jax.tree.map(safe_divide, counts, totals))


def pseudo_gradient_by_example(
    loss: Loss,
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
    index: Array,
) -> Outputs:
    """Draw the rows of a pseudo-gradient one example at a time.

    Row b has the key `fold_in(key, index[b])`: the draws depend on the row's number alone, not on
    the chunk or device where the row lies. Parts of the targets that are `Shared` go to every row.
    """

    def count(row: PyTree) -> PyTree[Scalar]:
        row_outputs, row_targets = row
        return term_counts(loss, row_outputs, row_targets)

    # n_b and N = sum_b n_b: the share of example b is n_b / N.
    counts = map_examples(count, (outputs, targets))
    totals = jax.tree.map(jnp.sum, counts)

    # f, y: outputs and targets of one row; i: [1] its number; n: [1] its terms
    def draw(row: PyTree) -> Outputs:
        f, y, i, n = row
        n_b = jax.tree.map(lambda x: x[0], n)
        row_key = jax.random.fold_in(key, i[0])
        return share_of(loss, n_b, totals).pseudo_gradient(row_key, f, unwrap(y))

    # Numbers and counts lie on one device; adding zeros spreads them as the rows of outputs are.
    first = jax.tree.leaves(outputs)[0]
    column = first[:, *(0,) * (first.ndim - 1)]

    def spread(x: Array) -> Array:
        return x + jnp.zeros_like(column, x.dtype)

    row_numbers, row_counts = jax.tree.map(spread, (index, counts))
    draws = map_examples(draw, (outputs, targets, row_numbers, row_counts))
    # Each draw is a batch of one.
    return jax.tree.map(lambda r: r[:, 0], draws)


def _scaled(loss: Loss, factors: PyTree[Scalar]) -> Loss:
    """Multiply a loss by a factor, or the heads of a weighted sum by one each."""
    if loss.heads:
        heads = {name: (w, _scaled(head, factors[name])) for name, w, head in loss.heads}
        return weighted_sum(heads)

    def value(outputs: Outputs, targets: Targets) -> Scalar:
        return jnp.asarray(times(factors, loss.value(outputs, targets)))

    def curvature_product(
        outputs: Outputs,
        targets: Targets,
        v: Outputs,
    ) -> Outputs:
        return times(factors, loss.curvature_product(outputs, targets, v))

    # r has the second moment E[r r'] = curvature: the root of the factor.
    def pseudo_gradient(
        key: PRNGKey,
        outputs: Outputs,
        targets: Targets,
    ) -> Outputs:
        return times(jnp.sqrt(factors), loss.pseudo_gradient(key, outputs, targets))

    def empirical_gradient(outputs: Outputs, targets: Targets) -> Outputs:
        return times(jnp.sqrt(factors), loss.empirical_gradient(outputs, targets))

    return dataclasses.replace(
        loss,
        value=value,
        curvature_product=curvature_product,
        pseudo_gradient=pseudo_gradient,
        empirical_gradient=empirical_gradient,
    )
