"""Kronecker factors: second moments of every block's inputs and output-cotangents, that average and merge."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from curvax._batch import check_batch, sum_over_chunks, with_index
from curvax._checks import check_count, check_decay, check_params
from curvax._trees import by_path
from curvax._types import Batch, Params, PRNGKey, Scalar, at_least_float32
from curvax._xla import fast_convs_in_loops, with_auto_sharding
from curvax.capture import Capture, PerUseArray, UseCotangents, record
from curvax.capture._cotangents import check_fisher, empirical, exact, sampled
from curvax.kron._layout import Block, Layout, check_layout
from curvax.kron._plan import layout_plan
from curvax.kron._statistics import (
    Second,
    counted_positions,
    has_transposed,
    input_moment,
    output_moment,
    summed_rounds,
)
from curvax.losses._shares import share_of, term_counts
from curvax.objective import Objective, total_terms

T = TypeVar("T")


class WeightedMean(NamedTuple):
    """A mean that is kept as sum and weight, so that means of two batches average and merge.

    Attributes:
      total: the sum.
      weight: what to divide by; `[stack]` (each slice counts its own rows) or scalar.
    """

    total: Array
    weight: Array

    @property
    def mean(self) -> Array:
        """The factor itself; where nothing has been counted, zeros."""
        weight = jnp.where(self.weight > 0, self.weight, 1)
        return self.total / weight.reshape(*weight.shape, *[1] * (self.total.ndim - weight.ndim))


class BlockFactors(NamedTuple):
    """Factors of one block, `[stack, size, size]` each, or `[stack, size]` for a diagonal one.

    Attributes:
      a: A, the mean over positions (or examples) of `a a'`.
      g: G, the sum over positions (or examples) of `g g'`, as curvature of the mean loss.
      transposed: the same two of the uses that multiply by the kernel's transpose: their `a` is on the outputs' side,
        their `g` on the inputs'. None if there are no such uses.
    """

    a: WeightedMean
    g: WeightedMean
    transposed: tuple[WeightedMean, WeightedMean] | None


class Factors(NamedTuple):
    """Curvature in the form that a layout gives it.

    Attributes:
      blocks: by the blocks' names.
      diagonal: for leaves with entries in no block the diagonal of the Fisher, by path.
    """

    blocks: dict[str, BlockFactors]
    diagonal: dict[str, WeightedMean]


class Reduction(NamedTuple):
    """What is summed over a batch; both are a `Partial`, so that arrays that they hold are known as such.

    Attributes:
      contribution: `(recorded, u, v) -> tree` of one round of cotangents; summed over rounds.
      finish: `(recorded, sums) -> tree` of one chunk of the batch; summed over chunks.
    """

    contribution: Partial
    finish: Partial


def kron_factors(
    objective: Objective,
    layout: Layout,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    *,
    fisher: str = "mc",
    num_samples: int = 1,
    microbatch: int | None = None,
) -> Factors:
    """Estimate the Kronecker factors of the Fisher (or Gauss-Newton) matrix of the mean loss over a batch.

    For a block with inputs a, and g the cotangent of its output under a pseudo-gradient r (`E[r r'] =` curvature of the
    mean loss in output space), over positions t of examples b:

      expand: `A = mean_bt a a'`, `G = sum_bt g g'`;
      reduce: `A = mean_b (mean_t a)(mean_t a)'`, `G = sum_b (sum_t g)(sum_t g)'`.

    Positions whose cotangent is exactly zero (padding, masked terms, branches not taken) are left out of A.

    Args:
      objective: a `curvax.Objective`.
      layout: of `kron_layout(objective, params, batch)`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      key: JAX key, for "mc".
      fisher: "mc", targets sampled from the model; "exact", every entry of one example's outputs in turn, the
        expectation of "mc" (a use without batch axis, such as a learned query, is then counted once for each example);
        "empirical", the batch's own targets.
      num_samples: samples for each term, with "mc".
      microbatch: rows worked on at a time; A and exact G as without it, in bounded memory.

    Returns:
      `Factors`, in at least float32.

    Raises:
      ValueError: a layout of other params or of another model; unknown fisher; a model that gives no row of outputs
        for one row of inputs, where examples must be told apart (reduce, "exact", "empirical").
      TypeError: params that are not float; "mc" with a loss that cannot sample.

    Cost: "mc": one forward and one backward pass without the gradients of kernels, and `n (in^2 + out^2) / 2`
      multiplications for n positions. "exact": two backward passes and the products for G, as often as one example's
      outputs have entries. Memory: inputs and cotangents of all uses.

    Example: a linear model, where `A x G` is the Gauss-Newton matrix.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 3)), (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 3)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> factors = curvax.kron_factors(objective, layout, params, batch, jax.random.key(0), fisher="exact")
      >>> block = factors.blocks[""]
      >>> block.a.mean[0].tolist(), block.g.mean[0].tolist()
      ([[0.5, 0.0], [0.0, 4.5]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    References: Martens and Grosse (2015), sections 3 and 5; Grosse and Martens (2016), A Kronecker-factored approximate
      Fisher matrix for convolution layers; Eschenhagen et al. (2023), sections 3.1 and 3.2.
    """
    by_example = fisher != "mc" or any(block.sharing == "reduce" for block in layout.blocks)
    sums, terms = accumulate(
        objective,
        layout,
        params,
        batch,
        key,
        factor_sums(layout),
        PassOptions(fisher, num_samples, microbatch, by_example),
    )
    inputs, products, squares = sums
    return make_factors(inputs, products, squares, terms)


def factor_sums(layout: Layout) -> Reduction:
    """Say what is summed for `make_factors`."""

    def contribution(recorded: Capture, u: UseCotangents, v: UseCotangents | None) -> PyTree[Array]:
        del recorded
        other = u if v is None else v
        products = {block.name: _products(block, u, v) for block in layout.blocks}
        squares = {path: _sum_of_products(x, other.outside[path]) for path, x in u.outside.items()}
        return products, squares, jax.tree.map(counted_positions, other.blocks)

    def finish(recorded: Capture, sums: PyTree[Array]) -> PyTree[Array]:
        products, squares, times_counted = sums
        counted = jax.tree.map(lambda n: jnp.minimum(n, 1), times_counted)
        inputs = {
            b.name: _inputs(b, recorded.inputs[b.name], counted[b.name]) for b in layout.blocks
        }
        return inputs, products, squares

    return Reduction(Partial(contribution), Partial(finish))


def make_factors(inputs: Any, products: Any, squares: Any, terms: TermCounts) -> Factors:
    """Put sums over a batch together; curvature of the mean loss weighs as much as the batch has terms."""
    blocks = {}
    for name, (own, transposed) in inputs.items():
        outputs = [terms.factor(g) for g in products[name]]
        blocks[name] = BlockFactors(
            WeightedMean(*own), outputs[0], transposed and (WeightedMean(*transposed), outputs[1])
        )
    return Factors(blocks, {path: terms.factor(x) for path, x in squares.items()})


def moving_average(held: T, new: T, decay: float | Array) -> T:
    """Take `new` into an exponential moving average, `decay * held + (1 - decay) * new` for sums and weights alike.

    Started from zeros, the means need no bias correction: their weights decay with them. A block that was not used (an
    expert, a branch) adds no weight and keeps its mean of inputs.
    """
    check_decay(decay=decay)
    averaged: T = jax.tree.map(
        lambda h, n: (decay * h + (1 - decay) * n).astype(h.dtype), held, new
    )
    return averaged


def init_factors(layout: Layout, params: Params) -> Factors:
    """Return factors of no data at all."""
    leaves = by_path(params)

    def block(block: Block) -> BlockFactors:
        dtype = jnp.result_type(jnp.float32, *(leaves[path] for path in block.leaves))
        (a, g), stack = block.factor_shapes, block.shape[0]
        zeros = lambda shape, weight: WeightedMean(
            jnp.zeros(shape, dtype), jnp.zeros(weight, dtype)
        )
        transposed = (zeros(g, (stack,)), zeros(a, ())) if has_transposed(block) else None
        return BlockFactors(zeros(a, (stack,)), zeros(g, ()), transposed)

    zero = lambda x: jnp.zeros_like(at_least_float32(x))
    diagonal = {
        leaf.path: WeightedMean(zero(leaves[leaf.path]), zero(leaves[leaf.path].ravel()[0]))
        for leaf in layout.leaves
        if leaf.outside == "diagonal"
    }
    return Factors({b.name: block(b) for b in layout.blocks}, diagonal)


class PassOptions(NamedTuple):
    """How a batch is gone through.

    Attributes:
      fisher: "mc", "exact" or "empirical".
      num_samples: with "mc".
      microbatch: rows worked on at a time, or None.
      by_example: tell the examples apart.
    """

    fisher: str
    num_samples: int
    microbatch: int | None
    by_example: bool


class StreamPosition(NamedTuple):
    """Where a batch stands in a stream.

    Attributes:
      first: number of its first row there; draws by example depend on the number.
      totals: terms of the whole stream, as `total_terms` counts them; None: the mean loss is that of the batch by itself.
        (By themselves batches merge exactly but for weighted sums of heads, and "empirical", with other shares of terms.)
      examples: rows of the whole stream, where totals are given.
    """

    first: Any
    totals: PyTree[Scalar] | None = None
    examples: Any = None


class TermCounts(NamedTuple):
    """Numbers of terms.

    Attributes:
      of_mean: of the mean loss whose curvature is summed.
      of_batch: of the batch, its weight among others.
    """

    of_mean: Scalar
    of_batch: Scalar

    def factor(self, x: Array) -> WeightedMean:
        """Weigh a part of the curvature of the mean loss by the batch's terms."""
        return WeightedMean(self.of_mean * x, self.of_batch)


def accumulate(
    objective: Objective,
    layout: Layout,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    statistic: Reduction,
    how: PassOptions,
    part: StreamPosition | None = None,
) -> tuple[PyTree[Array], TermCounts]:
    """Sum a statistic over rounds of cotangents and chunks of a batch, which may be part of a stream."""
    part = StreamPosition(0) if part is None else part
    check_params(params)
    check_layout(layout, params)
    check_batch(batch)
    check_fisher(how.fisher, how.num_samples)
    if how.microbatch is not None:
        check_count(1, microbatch=how.microbatch)

    def run(
        params: Params, batch: Batch, key: PRNGKey, statistic: Reduction, part: StreamPosition
    ) -> tuple[PyTree[Array], TermCounts]:
        rows, totals, examples = with_index(batch, part.first), part.totals, part.examples
        if totals is None:
            examples = rows[1].size
            # Of a batch in one piece the mean is over its own terms, which its outputs tell.
            if how.microbatch is not None:
                totals = total_terms(objective, params, batch, how.microbatch)

        def of_chunk(chunk: tuple[Batch, Array]) -> tuple[PyTree[Array], PyTree[Scalar]]:
            return _of_chunk(
                objective, layout, params, chunk, key, statistic, how, totals, examples
            )

        sums, terms = (
            of_chunk(rows)
            if how.microbatch is None
            else sum_over_chunks(of_chunk, rows, how.microbatch)
        )
        of_mean, of_batch = (
            jnp.asarray(sum(jax.tree.leaves(counts)))
            for counts in (terms if totals is None else totals, terms)
        )
        return sums, TermCounts(of_mean, of_batch)

    return with_auto_sharding(run, params, batch, key, statistic, part)


def _of_chunk(
    objective: Objective,
    layout: Layout,
    params: Params,
    chunk: tuple[Batch, Array],
    key: PRNGKey,
    statistic: Reduction,
    how: PassOptions,
    totals: PyTree[Scalar] | None,
    total_size: Any,
) -> tuple[PyTree[Array], PyTree[Scalar]]:
    """Sum a statistic over one chunk, and count its terms by the outputs that are recorded."""
    (inputs, targets), index = chunk
    plan = layout_plan(objective, layout, params, inputs, how.by_example)
    recorded = record(plan, params, inputs)
    loss, outputs = objective.loss, recorded.outputs
    terms = term_counts(loss, outputs, targets)
    if totals is not None:
        loss = share_of(loss, terms, totals)
    if how.fisher == "mc":
        if not how.by_example and how.microbatch is not None:
            key = jax.random.fold_in(key, index[0])
        rounds = sampled(
            loss, key, outputs, targets, index if how.by_example else None, how.num_samples
        )
    elif how.fisher == "exact":
        rounds = exact(loss, outputs, targets)
    else:
        rounds = empirical(loss, outputs, targets, total_size)

    def one(k: Array) -> PyTree[Array]:
        u, v = rounds.pair(k)
        return statistic.contribution(
            recorded, recorded.pull(u), None if v is None else recorded.pull(v)
        )

    sums = statistic.finish(recorded, summed_rounds(rounds.number, one, fast_convs_in_loops))
    return sums, terms


def _products(
    block: Block, u: UseCotangents, v: UseCotangents | None
) -> list[Float[Array, "s ..."]]:
    """G of the block's uses, and if there are any, of those of the transpose."""
    g, h = u.blocks[block.name], None if v is None else v.blocks[block.name]
    return [
        output_moment(block, g, h, transposed)
        for transposed in (False, True)[: 1 + has_transposed(block)]
    ]


def _inputs(
    block: Block, inputs: list[PerUseArray], counted: list[Array]
) -> tuple[Second, Second | None]:
    transposed = input_moment(block, inputs, counted, True) if has_transposed(block) else None
    return input_moment(block, inputs, counted, False), transposed


def _sum_of_products(x: Array, y: Array) -> Array:
    return jnp.sum(at_least_float32(x) * at_least_float32(y), axis=0)
