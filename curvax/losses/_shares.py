"""The share of a chunk, or of one example, in a mean over terms: what makes chunked work equal the whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._batch import map_examples
from curvax._shared import unwrap
from curvax._types import Outputs, PRNGKey, Scalar, Targets
from curvax.losses._combine import weighted_sum
from curvax.losses._loss import Loss, count_terms, times


def term_counts(loss: Loss, outputs: Outputs, targets: Targets) -> PyTree[Scalar]:
    """Count the terms: a scalar, or for a weighted sum a dict by head, since each head has its own mean."""
    targets = unwrap(targets)
    if loss.heads:
        return {
            name: term_counts(head, outputs[name], targets[name]) for name, _, head in loss.heads
        }
    return count_terms(loss, outputs, targets)


def share_of(loss: Loss, counts: PyTree[Scalar], totals: PyTree[Scalar]) -> Loss:
    """Scale `loss`, curvature included, on a chunk of `counts` terms to its share of a mean over `totals` terms.

    The shares of all chunks of a batch sum to the loss of the batch.
    """
    return _scaled(loss, jax.tree.map(_ratio, counts, totals))


def pseudo_gradient_by_example(
    loss: Loss, key: PRNGKey, outputs: Outputs, targets: Targets, index: Array
) -> Outputs:
    """Draw the rows of a pseudo-gradient one example at a time, row b with the key `fold_in(key, index[b])`.

    The draws depend on the row's number alone, not on the chunk or device where the row lies. Parts of the targets that
    are `Shared` go to every row.
    """
    counts = map_examples(lambda row: term_counts(loss, *row), (outputs, targets))
    totals = jax.tree.map(jnp.sum, counts)

    def draw(row: PyTree) -> Outputs:
        f, y, i, n = row
        of_row = share_of(loss, jax.tree.map(lambda x: x[0], n), totals)
        return of_row.pseudo_gradient(jax.random.fold_in(key, i[0]), f, unwrap(y))

    first = jax.tree.leaves(outputs)[0]
    column = first[:, *(0,) * (first.ndim - 1)]
    spread = lambda x: (
        x + jnp.zeros_like(column, x.dtype)
    )  # over devices, as the rows of outputs are
    rows = map_examples(draw, (outputs, targets, *jax.tree.map(spread, (index, counts))))
    return jax.tree.map(lambda r: r[:, 0], rows)


def _scaled(loss: Loss, factors: PyTree[Scalar]) -> Loss:
    if loss.heads:
        return weighted_sum(
            {name: (w, _scaled(head, factors[name])) for name, w, head in loss.heads}
        )
    return dataclasses.replace(
        loss,
        value=lambda f, y: times(factors, loss.value(f, y)),
        curvature_product=lambda f, y, v: times(factors, loss.curvature_product(f, y, v)),
        pseudo_gradient=lambda key, f, y: times(jnp.sqrt(factors), loss.pseudo_gradient(key, f, y)),
    )


def _ratio(n: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    return n / jnp.where(
        total > 0, total, 1
    )  # no term at all: 0/0 is 0, such a batch has no loss and no curvature
