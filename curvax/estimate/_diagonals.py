"""Diagonals of Gauss-Newton and Fisher matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from curvax._batch import batch_size, check_batch, map_examples, sum_over_chunks
from curvax._checks import check_count, check_params
from curvax._shared import unwrap
from curvax._types import Batch, Params, PRNGKey, at_least_float32, tree_at_least_float32
from curvax.estimate._per_example import gradient_shares
from curvax.losses import pseudo_gradient
from curvax.objective import Objective, scaled_to_share, total_terms


def gauss_newton_bartlett(
    objective: Objective, params: Params, batch: Batch, key: PRNGKey
) -> PyTree[Array]:
    """Estimate the diagonal of the Gauss-Newton matrix by one backward pass, `(J' r)^2` with r a pseudo-gradient.

    Unbiased, because the examples' sampled scores are independent with mean zero. The factor B of the paper is inside r.

    Args:
      objective: a `curvax.Objective`; its loss must sample.
      params: pytree of float arrays.
      batch: `(inputs, targets)`; targets say which terms count.
      key: JAX key.

    Returns:
      A tree like params, nonnegative, in at least float32.

    Raises:
      TypeError: params that are not float, or a loss that cannot sample.

    Cost: one gradient.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2))             # diagonal of x'x / 2: 0.5, 4.5
      >>> draw = lambda key: curvax.gauss_newton_bartlett(objective, jnp.zeros(2), batch, key)
      >>> mean = jax.vmap(draw)(jax.random.split(jax.random.key(0), 10_000)).mean(0)
      >>> bool(jnp.allclose(mean, jnp.array([0.5, 4.5]), rtol=0.05))
      True

    References: Liu et al. (2023), Sophia, algorithm 2.
    """
    check_params(params)
    check_batch(batch)
    inputs, targets = batch
    outputs, pull = jax.vjp(lambda p: objective.outputs(p, inputs), params)
    r = pseudo_gradient(objective.loss, key, outputs, unwrap(targets))
    (gradient,) = pull(jax.tree.map(lambda r, f: r.astype(f.dtype), r, outputs))
    return jax.tree.map(jnp.square, tree_at_least_float32(gradient))


def ggn_diagonal(
    objective: Objective, params: Params, batch: Batch, *, microbatch: int = 8
) -> PyTree[Array]:
    """Compute the exact diagonal of the Gauss-Newton matrix, `sum_b sum_cc' S_b[c, c'] J_b[c, :] J_b[c', :]`.

    Args:
      objective: a `curvax.Objective` whose outputs for one example have few entries C (time steps counted).
      params: pytree of d float numbers in all.
      batch: `(inputs, targets)`; B rows.
      microbatch: rows worked on at a time.

    Returns:
      A tree like params, in at least float32.

    Raises:
      ValueError: `microbatch` below 1.
      TypeError: params that are not float.

    Cost: C backward passes; memory `microbatch` C d numbers. For a large C use `gauss_newton_bartlett`, or
    `hutchinson_diagonal` of `ggnvp`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2))
      >>> curvax.estimate.ggn_diagonal(objective, jnp.zeros(2), batch).tolist()
      [0.5, 4.5]
    """
    check_params(params)
    check_batch(batch)
    check_count(1, microbatch=microbatch)
    totals = total_terms(objective, params, batch, microbatch)

    # f: [C] outputs of one example, S: [C, C] its output-space curvature, J: leaves [C, ...]
    def of_row(row: Batch) -> PyTree[Array]:
        inputs, targets = row
        loss = scaled_to_share(objective, params, row, totals).loss
        outputs = objective.outputs(params, inputs)
        f, unravel = ravel_pytree(outputs)
        product = lambda e: ravel_pytree(
            loss.curvature_product(outputs, unwrap(targets), unravel(e))
        )[0]
        S = at_least_float32(jax.vmap(product)(jnp.eye(f.size, dtype=f.dtype)))
        J = tree_at_least_float32(
            jax.jacrev(lambda p: ravel_pytree(objective.outputs(p, inputs))[0])(params)
        )
        return jax.tree.map(
            lambda j: jnp.sum(j * jnp.tensordot(S, j, 1, precision="highest"), axis=0), J
        )

    rows_sum = lambda rows: jax.tree.map(lambda x: x.sum(0), map_examples(of_row, rows))
    return sum_over_chunks(rows_sum, batch, microbatch)


def empirical_fisher_diagonal(
    objective: Objective, params: Params, batch: Batch, *, microbatch: int = 8
) -> PyTree[Array]:
    """Compute the diagonal of the empirical Fisher, `1/B sum_b g_b^2` with g_b the rows of `per_example_grads`.

    Args:
      objective: a `curvax.Objective`.
      params: pytree of d float numbers in all.
      batch: `(inputs, targets)`; B rows.
      microbatch: rows worked on at a time.

    Returns:
      A tree like params, in at least float32.

    Raises:
      ValueError: `microbatch` below 1.
      TypeError: params that are not float.

    Cost: one gradient in FLOPs; memory `microbatch` d numbers.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([2.0, 1.0]))    # g = (-2, 0), (0, -3)
      >>> curvax.estimate.empirical_fisher_diagonal(objective, jnp.zeros(2), batch).tolist()
      [2.0, 4.5]
    """
    check_params(params)
    check_batch(batch)
    check_count(1, microbatch=microbatch)
    size = batch_size(batch)
    totals = total_terms(objective, params, batch, microbatch)

    def squares(rows: Batch) -> PyTree[Array]:
        shares = tree_at_least_float32(gradient_shares(objective, params, rows, totals))  # g_b / B
        return jax.tree.map(lambda g: size * jnp.sum(g**2, axis=0), shares)

    return sum_over_chunks(squares, batch, microbatch)
