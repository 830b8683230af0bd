"""Mean inputs and cotangents of every block: what rank-one curvature is made of."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._batch import check_batch, sum_over_chunks
from curvax._checks import check_count, check_params
from curvax._shared import unwrap
from curvax._trees import safe_divide
from curvax._types import Batch, Outputs, Params, Scalar
from curvax._xla import with_auto_sharding
from curvax.capture import record
from curvax.kron._factors import WeightedMean
from curvax.kron._layout import Block, Layout, check_layout
from curvax.kron._plan import layout_plan
from curvax.kron._statistics import counted_positions, mean_inputs, summed_cotangents
from curvax.losses._shares import share_of, term_counts
from curvax.objective import Objective, Part, for_auto_sharding, of_parts, total_terms


class MeanVectors(NamedTuple):
    """Vectors of one block whose products stand for its curvature, `sum_k (a_k a_k') x (g_k g_k')`.

    Attributes:
      a: a_k, on the inputs' side, `[stack, k, in]`.
      g: g_k, on the outputs' side, `[stack, k, out]`.
    """

    a: Float[Array, "s k i"]
    g: Float[Array, "s k o"]


Sums = dict[tuple[str, bool], tuple[WeightedMean, Array]]
"""Sums over a batch, by name of the block and by whether they are of transposed uses."""


def mean_vectors(
    objective: Objective,
    layout: Layout,
    params: Params,
    batch: Batch,
    *,
    microbatch: int | None = None,
) -> dict[str, MeanVectors]:
    """Return the mean input and the mean cotangent of every block on a batch.

    For a block with inputs a_t of its kernel, and g_t the cotangents of its outputs under the mean
    loss of the batch, over all positions t of all examples:

      `a = mean_t a_t`,  `g = sum_t g_t`.

    Then g is the gradient of the mean loss with respect to a bias, and the mean over examples of
    what each would give alone; `g g'` has the unit of the Kronecker factor G (with several
    positions an example, of that with `sharing="reduce"`), and `a a'` that of A.

    The cotangents are those of the batch's own targets: with targets that the model samples, as
    K-FAC has them, their mean would be noise around zero.

    Args:
      objective: the `curvax.Objective`.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`. Biases have
        no part in the vectors; which positions the mean is over is the block's choice, as for A.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      microbatch: rows worked on at a time; the result is the same, in bounded memory.

    Returns:
      `MeanVectors` of each block, by name, in at least float32, with `k = 1`. A kernel that is used
      transposed too, or in several parts of a `curvax.total`, has a pair for each of its Kronecker
      products (of transposed uses `a_k` is the cotangent and `g_k` the input), all with the first
      pair's ratio of norms. An expert that no position reaches has zeros.

    Raises:
      ValueError: The layout belongs to other params or to another model, or is one of shapes.
      TypeError: Params are not float.

    Cost: one forward and one backward pass without the gradients of kernels. Across devices only
      the vectors are summed.

    Example: the product of both is the gradient where the batch has one example.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 3)), (jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0, 3.0]]))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> vectors = curvax.kron.mean_vectors(objective, layout, params, batch)[""]
      >>> vectors.a.tolist(), vectors.g.tolist()
      ([[[1.0, 2.0]]], [[[0.0, -1.0, -3.0]]])
      >>> bool(jnp.allclose(vectors.a[0].T @ vectors.g[0], jax.grad(objective)(params, batch)))
      True

    References: Mozaffari et al. (2023), MKOR: Momentum-enabled Kronecker-factor-based optimizer
      using rank-1 updates, https://arxiv.org/abs/2306.01685.
    """
    check_params(params)
    check_layout(layout, params)
    if objective.parts:
        return _of_parts(objective, layout, params, batch, microbatch)
    check_batch(batch)
    if microbatch is not None:
        check_count(1, microbatch=microbatch)
    placed = for_auto_sharding(objective, params, batch)
    run = partial(_over_chunks, placed, layout, microbatch)
    sums: Sums = with_auto_sharding(run, params, batch)
    return {block.name: _pairs(block, sums) for block in layout.blocks}


def _over_chunks(
    objective: Objective, layout: Layout, microbatch: int | None, params: Params, batch: Batch
) -> Sums:
    """Sum inputs and cotangents over the chunks of a batch."""
    if microbatch is None:
        return _sums(objective, layout, params, None, batch)
    totals = total_terms(objective, params, batch, microbatch)
    of_chunk = partial(_sums, objective, layout, params, totals)
    sums: Sums = sum_over_chunks(of_chunk, batch, microbatch)
    return sums


def _sums(
    objective: Objective,
    layout: Layout,
    params: Params,
    totals: PyTree[Scalar] | None,
    chunk: Batch,
) -> Sums:
    """Sum inputs and cotangents over the positions of a chunk."""
    inputs, targets = chunk
    plan = layout_plan(objective, layout, params, inputs, per_example=False)
    capture = record(plan, params, inputs)
    loss, outputs = objective.loss, capture.outputs
    # A chunk's share of the mean is its own mean times (its terms / all terms).
    if totals is not None:
        loss = share_of(loss, term_counts(loss, outputs, targets), totals)

    def value(f: Outputs) -> Scalar:
        return loss(f, unwrap(targets))

    cotangents = capture.pull(jax.grad(value)(outputs)).blocks
    sums: Sums = {}
    for block in layout.blocks:
        name, g = block.name, cotangents[block.name]
        counted = counted_positions(block, g)
        for transposed in sorted({use.transposed for use in block.uses}):
            a = mean_inputs(block, capture.inputs[name], capture.chunks[name], counted, transposed)
            sums[name, transposed] = a, summed_cotangents(block, g, transposed)
    return sums


def _pairs(block: Block, sums: Sums) -> MeanVectors:
    """Return the pair of the uses of a block, and that of its transposed uses."""
    in_side, out_side = [], []
    if (block.name, False) in sums:
        a, g = sums[block.name, False]
        in_side.append(a.mean)
        out_side.append(g)
    # Of transposed uses, cotangents are on the inputs' side, and inputs on the outputs'.
    if (block.name, True) in sums:
        a, g = sums[block.name, True]
        in_side.append(g)
        out_side.append(a.mean)
    vectors_a = jnp.stack(in_side, axis=1)
    vectors_g = jnp.stack(out_side, axis=1)
    return _with_ratio_of_first(vectors_a, vectors_g)


def _of_parts(
    objective: Objective, layout: Layout, params: Params, batch: Batch, microbatch: int | None
) -> dict[str, MeanVectors]:
    """Return the pairs of all parts of an objective, side by side."""

    def of_part(part: Part, params: Params, rows: Batch) -> dict[str, MeanVectors]:
        of_layout = layout.of_part(part.name)
        return mean_vectors(part.objective, of_layout, params, rows, microbatch=microbatch)

    in_side: dict[str, list[Array]] = {block.name: [] for block in layout.blocks}
    out_side: dict[str, list[Array]] = {block.name: [] for block in layout.blocks}
    for part, vectors in of_parts(of_part, objective, params, batch):
        # Curvature is linear in the weight w_p of a part, and the product quadratic in g.
        root = jnp.sqrt(part.weight)
        for name, (a, g) in vectors.items():
            in_side[name].append(a)
            out_side[name].append((root * g).astype(g.dtype))
    result = {}
    for name, vectors_a in in_side.items():
        a = jnp.concatenate(vectors_a, axis=1)
        g = jnp.concatenate(out_side[name], axis=1)
        result[name] = _with_ratio_of_first(a, g)
    return result


def _with_ratio_of_first(a: Float[Array, "s k i"], g: Float[Array, "s k o"]) -> MeanVectors:
    """Scale pairs, `a_k t_k` and `g_k / t_k`, so that all have the ratio `|a| / |g|` of the first.

    The product `(a_k a_k') x (g_k g_k')` is the same for every t_k, but sums by side are not.
    """
    if a.shape[1] == 1:
        return MeanVectors(a, g)
    norms_a = jnp.linalg.norm(a, axis=2, keepdims=True)
    norms_g = jnp.linalg.norm(g, axis=2, keepdims=True)
    # t_k^2 = (|a_1| |g_k|) / (|g_1| |a_k|); a pair with a zero vector (0/0) stays as it is.
    squares = safe_divide(norms_a[:, :1] * norms_g, norms_g[:, :1] * norms_a)
    t = jnp.where(squares > 0, jnp.sqrt(squares), 1)
    return MeanVectors(a * t, g / t)
