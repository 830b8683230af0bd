"""The mean loss of a batch as a function that is worked on in chunks, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax._batch import sum_over_chunks
from curvax._checks import check_count
from curvax._types import Batch, Params, Scalar
from curvax.objective import Objective, of_parts, scaled_to_share, total_terms


def mean_loss(
    objective: Objective,
    microbatch: int | None,
) -> Callable[[Params, Any], Scalar]:
    """Return `objective.value`, `microbatch` rows at a time; derivatives of any order are too."""
    if microbatch is None:
        return objective.value
    check_count(1, microbatch=microbatch)

    def of_one_part(params: Params, batch: Batch) -> Scalar:
        totals = total_terms(objective, params, batch, microbatch)

        # The forward pass of a chunk is run again in its backward pass: nothing else of it stays.
        @jax.checkpoint
        def share(params: Params, chunk: Batch) -> Scalar:
            of_chunk = scaled_to_share(objective, params, chunk, totals)
            return of_chunk.value(params, chunk)

        # L = sum_c share_c L_c: see `curvax/objective.py`.
        value: Scalar = sum_over_chunks(lambda chunk: share(params, chunk), batch, microbatch)
        return value

    def of_all_parts(params: Params, batch: Any) -> Scalar:
        values = []
        for _, weight, part in objective.parts:
            # A penalty has no rows, and so no chunks.
            if part.is_penalty:
                values.append(weight * part.value(params, (None, None)))

        def of_part(part: Any, params: Params, rows: Batch) -> Scalar:
            value = mean_loss(part.objective, microbatch)(params, rows)
            return jnp.asarray(part.weight * value)

        values += [value for _, value in of_parts(of_part, objective, params, batch)]
        return jnp.asarray(sum(values))

    return of_all_parts if objective.parts else of_one_part
