"""Diagonals of Gauss-Newton and Fisher matrices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from curvax._batch import check_batch, map_examples, sum_over_chunks
from curvax._checks import check_choice, check_count, check_params
from curvax._shared import unwrap
from curvax._trees import cast_like
from curvax._types import Batch, Outputs, Params, PRNGKey, at_least_float32, tree_at_least_float32
from curvax.losses import pseudo_gradient
from curvax.losses._linear import check_curved
from curvax.losses._terms import GROUPS, apart_by_term
from curvax.objective import Objective, scaled_to_share, sum_over_parts, total_terms


def gauss_newton_bartlett(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKey,
) -> PyTree[Array]:
    """Estimate the diagonal of the Gauss-Newton matrix by one backward pass, `(J' r)^2`.

    r is a pseudo-gradient, `E[r r'] = S`, so that `E[(J' r)^2] = diag(J' S J)`. The estimate is
    unbiased because the examples' sampled scores are independent with mean zero. The factor B of
    the paper is inside r.

    Args:
      objective: the `curvax.Objective` whose curvature is meant; its loss must sample.
      params: pytree of float arrays.
      batch: the pair `(inputs, targets)`; targets say which terms count.
      key: JAX key.

    Returns:
      A tree like params, nonnegative, in at least float32.

    Raises:
      TypeError: params are not float, or the loss cannot sample.

    Cost: one gradient.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2))
      >>> def draw(key):
      ...     return curvax.gauss_newton_bartlett(objective, jnp.zeros(2), batch, key)
      >>> draws = jax.vmap(draw)(jax.random.split(jax.random.key(0), 10_000))
      >>> diagonal = jnp.array([0.5, 4.5])                                # of x'x / 2
      >>> bool(jnp.allclose(draws.mean(0), diagonal, rtol=0.05))
      True

    References: Liu et al. (2023), Sophia: a scalable stochastic second-order optimizer for
      language model pre-training, algorithm 2, https://arxiv.org/abs/2305.14342.
    """
    check_params(params)
    if objective.parts:
        return sum_over_parts(gauss_newton_bartlett, objective, params, batch, key)
    check_batch(batch)
    inputs, targets = batch

    def model(p: Params) -> Outputs:
        return objective.outputs(p, inputs)

    outputs, pull = jax.vjp(model, params)
    r = pseudo_gradient(objective.loss, key, outputs, unwrap(targets))
    # J' r; a cotangent has the dtype of the output it belongs to.
    (gradient,) = pull(cast_like(r, outputs))
    return jax.tree.map(jnp.square, tree_at_least_float32(gradient))


def ggn_diagonal(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    microbatch: int = 8,
) -> PyTree[Array]:
    """Compute the exact diagonal of the Gauss-Newton matrix.

    Its entry i is `sum_b sum_cc' S_b[c, c'] J_b[c, i] J_b[c', i]`.

    Args:
      objective: the `curvax.Objective` whose curvature is meant; its outputs for one example should
        have few entries C (time steps counted).
      params: pytree of d float numbers in all.
      batch: the pair `(inputs, targets)`, of B rows.
      microbatch: rows worked on at a time.

    Returns:
      A tree like params, in at least float32.

    Raises:
      ValueError: `microbatch` is below 1.
      TypeError: params are not float, or the loss is linear in the outputs.

    Cost: C backward passes; memory `microbatch` C d numbers. For a large C use
      `gauss_newton_bartlett`, or `hutchinson_diagonal` of `ggnvp`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2))
      >>> curvax.estimate.ggn_diagonal(objective, jnp.zeros(2), batch).tolist()
      [0.5, 4.5]
    """
    check_params(params)
    if objective.parts:
        of_part = partial(ggn_diagonal, microbatch=microbatch)
        return sum_over_parts(of_part, objective, params, batch)
    check_batch(batch)
    check_count(1, microbatch=microbatch)
    totals = total_terms(objective, params, batch, microbatch)

    # f: [C] outputs of one example, S: [C, C] its output-space curvature, J: leaves [C, ...]
    def diagonal_of_row(row: Batch) -> PyTree[Array]:
        """Return one example's share of the diagonal."""
        inputs, targets = row
        loss = scaled_to_share(objective, params, row, totals).loss
        outputs = objective.outputs(params, inputs)
        check_curved(loss, outputs, unwrap(targets))
        f, unravel = ravel_pytree(outputs)

        # S e_c, row c of S, which is symmetric.
        def curvature_row(e: Array) -> Array:
            product = loss.curvature_product(outputs, unwrap(targets), unravel(e))
            flat_product, _ = ravel_pytree(product)
            return flat_product

        def flat_outputs(p: Params) -> Array:
            flat, _ = ravel_pytree(objective.outputs(p, inputs))
            return flat

        S = at_least_float32(jax.vmap(curvature_row)(jnp.eye(f.size, dtype=f.dtype)))
        J = tree_at_least_float32(jax.jacrev(flat_outputs)(params))

        # sum_c J[c, i] (S J)[c, i], the diagonal of J' S J.
        def diagonal(j: Array) -> Array:
            return jnp.sum(j * jnp.tensordot(S, j, 1, precision="highest"), axis=0)

        return jax.tree.map(diagonal, J)

    # Each row has its share of the mean, so that diagonals add up.
    def diagonal_of_chunk(rows: Batch) -> PyTree[Array]:
        diagonals = map_examples(diagonal_of_row, rows)
        return jax.tree.map(lambda x: x.sum(0), diagonals)

    return sum_over_chunks(diagonal_of_chunk, batch, microbatch)


def empirical_fisher_diagonal(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    by: str = "example",
    microbatch: int = 8,
) -> PyTree[Array]:
    """Compute the diagonal of the empirical Fisher, `1/N sum_b g_b^2` or `1/N sum_n g_n^2`.

    `g_n` is the gradient of term n of the loss, of N, and `g_b` the sum of those of example b; see
    `curvax.empirical_fishervp`, whose diagonal this is.

    Args:
      objective: the `curvax.Objective` whose gradients are meant.
      params: pytree of d float numbers in all.
      batch: the pair `(inputs, targets)`, of B rows.
      by: "example" or "term", of which squares are taken.
      microbatch: rows worked on at a time.

    Returns:
      A tree like params, in at least float32.

    Raises:
      ValueError: `by` is unknown, or `microbatch` is below 1.
      TypeError: params are not float, or the loss compares examples with each other.

    Cost: one gradient in FLOPs, by term as many as an example has terms; memory `microbatch` d
      numbers.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([2.0, 1.0])
      >>> batch = (x, y)                                                  # g: (-2, 0), (0, -3)
      >>> diagonal = curvax.estimate.empirical_fisher_diagonal(objective, jnp.zeros(2), batch)
      >>> diagonal.round(4).tolist()
      [2.0, 4.5]
    """
    check_params(params)
    if objective.parts:
        of_part = partial(empirical_fisher_diagonal, microbatch=microbatch, by=by)
        return sum_over_parts(of_part, objective, params, batch)
    check_batch(batch)
    check_choice("by", by, GROUPS)
    check_count(1, microbatch=microbatch)
    totals = total_terms(objective, params, batch, microbatch)

    # J_b'r_b = g_b / sqrt(N), with r_b the row of b in the pseudo-gradient at the targets.
    def squares_of_row(row: Batch) -> PyTree[Array]:
        """Return one example's part of the diagonal."""
        inputs, targets = row
        loss = scaled_to_share(objective, params, row, totals).loss

        def model(p: Params) -> Outputs:
            return objective.outputs(p, inputs)

        outputs, pull = jax.vjp(model, params)
        r = loss.empirical_gradient(outputs, unwrap(targets))

        def square(r: Outputs) -> PyTree[Array]:
            (gradient,) = pull(cast_like(r, outputs))
            return jax.tree.map(jnp.square, tree_at_least_float32(gradient))

        if by == "example":
            return square(r)
        # One term after another: their cotangents on a leading axis, zero at other terms.
        of_terms = apart_by_term(loss, r, unwrap(targets))
        by_term = jax.lax.map(square, of_terms)
        return jax.tree.map(lambda x: x.sum(axis=0), by_term)

    def squares(rows: Batch) -> PyTree[Array]:
        return jax.tree.map(lambda x: x.sum(axis=0), map_examples(squares_of_row, rows))

    return sum_over_chunks(squares, batch, microbatch)
