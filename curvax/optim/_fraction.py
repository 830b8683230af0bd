"""Estimate curvature on a part of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, PyTree

from curvax._batch import batch_size, map_rows
from curvax._types import Batch, Params, PRNGKey
from curvax.optim._estimating import Estimator


def on_fraction(estimator: Estimator, fraction: float) -> Estimator:
    """Return an estimator that sees a fraction of the rows of every batch.

    The rows are at equal distances, so that a batch that is sharded over devices stays so where the
    distance is an integer; shuffled data makes them a random sample. Curvature is that of a mean,
    so its scale stays.

    Args:
      estimator: `(params, batch, key) -> curvature`.
      fraction: the fraction of the rows, in (0, 1]; at least one row is used.

    Raises:
      ValueError: The fraction is outside (0, 1].

    Cost: that fraction of the estimator's; but a forward pass that is shared with the gradient's no
      longer is.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> rows = lambda params, batch, key: batch[0]
      >>> curvax.on_fraction(rows, 0.25)(None, (jnp.arange(8), jnp.arange(8)), None).tolist()
      [0, 4]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}.")

    def estimator_of_fraction(params: Params, batch: Batch, key: PRNGKey) -> PyTree[Array]:
        return estimator(params, _fraction_of(batch, fraction), key)

    return estimator_of_fraction


def _fraction_of(batch: Any, fraction: float) -> Any:
    """Select that fraction of the rows of a batch, or of each part's."""
    # Of an objective with several parts: a dict of batches, None for a penalty.
    if isinstance(batch, Mapping):
        return {
            name: None if rows is None else _fraction_of(rows, fraction)
            for name, rows in batch.items()
        }
    size = batch_size(batch)
    number = max(1, round(fraction * size))
    # A strided slice where the distance is an integer: that keeps a sharded batch sharded, a gather
    # does not.
    rows: Any = np.arange(number) * size // number
    if size % number == 0:
        rows = slice(None, None, size // number)
    return map_rows(lambda x: x[rows], batch)
