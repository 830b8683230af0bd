"""The rows `U' = R'J` of a batch as an array, by reverse passes through single examples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._batch import ENTRIES_AT_A_TIME, map_examples, sum_over_chunks
from curvax._trees import as_vector, dimension
from curvax._types import Outputs, Params, at_least_float32
from curvax.objective import Objective

# b: examples of the batch, c: outputs of an example, k: columns of the root, d: parameters


def jacobian_rows(
    objective: Objective,
    params: Params,
    inputs: Any,
    roots: Float[Array, "b c k"],
) -> Float[Array, "k b d"]:
    """Return `J_b' R_b e_k` for every example and column, one reverse pass for each.

    Examples run by themselves under `vmap`, so the model must keep them apart.
    """

    def of_example(row: tuple[Any, Float[Array, "1 c k"]]) -> Float[Array, "k d"]:
        inputs, root = row
        outputs, pull = jax.vjp(lambda p: objective.outputs(p, inputs), params)

        def of_column(column: Float[Array, " c"]) -> Float[Array, " d"]:
            # One pass through a differential operator, however many directions it has inside.
            (gradient,) = pull(_like_outputs(column, outputs))
            return at_least_float32(as_vector(gradient)[0])

        return jax.vmap(of_column, in_axes=1)(root[0])

    by_example: Float[Array, "b k d"] = map_examples(of_example, (inputs, roots))
    return by_example.swapaxes(0, 1)


def sum_of_outer_products(
    objective: Objective,
    params: Params,
    inputs: Any,
    roots: Float[Array, "b c k"],
) -> Float[Array, "d d"]:
    """Return `U U'`, the sum over rows of their outer products, some examples at a time."""
    num_examples, _, num_columns = roots.shape
    at_a_time = ENTRIES_AT_A_TIME // (num_columns * dimension(params))
    microbatch = min(max(at_a_time, 1), num_examples)

    def of_chunk(chunk: tuple[Any, Array]) -> Float[Array, "d d"]:
        rows = jacobian_rows(objective, params, *chunk)
        flat = rows.reshape(-1, rows.shape[2])
        return jnp.matmul(flat.T, flat, precision=lax.Precision.HIGHEST)

    matrix: Float[Array, "d d"] = sum_over_chunks(of_chunk, (inputs, roots), microbatch)
    return matrix


def _like_outputs(
    column: Float[Array, " c"],
    like: Outputs,
) -> Outputs:
    """Return a vector over the outputs of one example as a tree like these."""
    _, to_tree = as_vector(like)
    wide = jnp.result_type(*jax.tree.leaves(like))
    return to_tree(column.astype(wide))
