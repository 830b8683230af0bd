"""Sum a statistic over rounds of cotangents and chunks of a batch; the Kronecker factors are one.

Chunks. The loss is a mean over terms, and a chunk of a batch has some of them. The chunk's share of
the mean is its own mean times (its terms / all terms), `objective.scaled_to_share`. The shares of
all chunks sum to the mean, for any partition and down to single examples, masked terms and heads
with counts of their own included. A pseudo-gradient of a share therefore is the chunk's part of one
of the whole batch, and sums of products of output-cotangents over chunks are the sum over the
batch: no chunk is reweighed afterwards, and with the totals of a data set in place of those of a
batch the same holds for batches of a stream.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from curvax._batch import check_batch, sum_over_chunks, with_index
from curvax._checks import check_count, check_params
from curvax._types import Batch, Outputs, Params, PRNGKey, Scalar, Targets
from curvax._xla import fast_convs_in_loops, with_auto_sharding
from curvax.capture import Capture, UseCotangents, record
from curvax.capture._cotangents import (
    CotangentPairs,
    check_fisher,
    empirical,
    empirical_by_term,
    exact,
    sampled,
)
from curvax.kron._factors import BlockFactors, Factors, LagFactors, WeightedMean
from curvax.kron._lags import input_lags, output_lags
from curvax.kron._layout import Block, Layout, check_layout
from curvax.kron._packing import pack_factors
from curvax.kron._parts import by_part, penalties_by_path, sum_of_factors
from curvax.kron._placement import Placement, check_placement
from curvax.kron._plan import layout_plan
from curvax.kron._row_sums import RowSums, by_device, collect_factors, factor_specs, together
from curvax.kron._statistics import (
    Chunks,
    counted_positions,
    diagonal_sums,
    input_moments,
    output_moments,
)
from curvax.losses import Loss
from curvax.losses._shares import share_of, term_counts
from curvax.objective import Objective, for_auto_sharding, total_terms


class Reduction(NamedTuple):
    """What is summed over a batch: two functions.

    They are `Partial`s, so that arrays that they hold are traced as arguments.

    Attributes:
      contribution: `(capture, u, v) -> tree` of one round of cotangents; summed over rounds.
      finish: `(capture, sums) -> tree` of one chunk of the batch; summed over chunks.
    """

    contribution: Partial
    finish: Partial


class PassOptions(NamedTuple):
    """How to go through a batch.

    Attributes:
      fisher: one of `curvax.capture._cotangents.ESTIMATORS`.
      num_samples: number of samples for each term, with "mc" and "empirical_by_term".
      microbatch: rows worked on at a time, or None for all.
      by_example: whether to tell the examples apart.
      stack_rounds: whether the reduction finishes with the contributions of all rounds, on a new
        leading axis, and not with their sum.
    """

    fisher: str
    num_samples: int
    microbatch: int | None
    by_example: bool
    stack_rounds: bool = False


class StreamPosition(NamedTuple):
    """Where a batch stands in a stream of batches.

    Attributes:
      first: number of its first row there; draws by example depend on the number.
      totals: terms of the whole stream, as `total_terms` counts them. With None the mean loss is
        that of the batch alone. (Batches alone merge exactly but for weighted sums of heads, whose
        shares of terms differ.)
    """

    first: Any
    totals: PyTree[Scalar] | None = None


class TermCounts(NamedTuple):
    """Numbers of terms.

    Attributes:
      of_mean: terms of the mean loss whose curvature is summed.
      of_batch: terms of the batch, its weight among others.
    """

    of_mean: Scalar
    of_batch: Scalar

    def factor(self, x: Array) -> WeightedMean:
        """Weigh a part of the curvature of the mean loss by the batch's terms."""
        return WeightedMean(self.of_mean * x, self.of_batch)


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
    placement: Placement | None = None,
) -> Factors:
    """Estimate the Kronecker factors of the Fisher (or Gauss-Newton) matrix of the mean loss.

    For a block with inputs a, and g the cotangent of its output under a pseudo-gradient r
    (`E[r r'] =` curvature of the mean loss in output space), over positions t of examples b:

      expand: `A = mean_bt a a'`, `G = sum_bt g g'`;
      reduce: `A = mean_b (mean_t a)(mean_t a)'`, `G = sum_b (sum_t g)(sum_t g)'`;
      time_symmetric, time_infinite: A and G as expand, and beside them those of a time and the
        next, `A1 = mean_bt a_(t+1) a_t'` and `G1 = sum_bt g_(t+1) g_t'`, with zeros after the last.

    Positions whose cotangent is exactly zero are left out of A: padding, masked terms, units that
    are dead or not pooled, the first query under causal attention, branches not taken. They are in
    no term of the Fisher matrix `sum_n (a_n a_n') x (g_n g_n')`, to which the product of factors is
    nearer without them (on a convolutional network, relative error .54 against .61 with "reduce",
    .45 against .50 of EK-FAC). `kron_layout(..., positions="all")` keeps them, as kronfluence does,
    and so does `layout.edit(path, positions="all")` for one block.

    Of a `curvax.total` every part p has products `A_p x G_p`, whose sum with its weights is
    approximated by the one product that has the same traces over inputs and over outputs:
    `A = sum_p w_p tr(G_p) A_p / sum_p w_p tr G_p`, `G = sum_p w_p (tr A_p / tr A) G_p`. It is exact
    where the A_p, or the G_p, are multiples of each other. Two products are kept apart with
    `layout.edit(path, two_products="exact")`. A `curvax.penalty` adds to the damping of a block
    the mean of its curvature over the block's entries.

    Args:
      objective: the `curvax.Objective` whose curvature is estimated.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      key: JAX key, for what samples.
      fisher: "mc", targets sampled from the model; "exact", every entry of one example's outputs in
        turn, the expectation of "mc" (a use without batch axis, such as a learned query, is then
        counted once for each example); "empirical", the batch's own targets, with products of
        gradients of examples; "empirical_by_term", the same with products of gradients of single
        terms, which differ where an example has several (every term gets a random sign). All have
        the unit of the Fisher: r is `sqrt(N)` times the gradient at N terms' targets.
      num_samples: number of samples for each term, with "mc" and "empirical_by_term".
      microbatch: rows worked on at a time; A and exact G are the same as without it, in bounded
        memory.
      placement: a `curvax.kron_placement` of the layout: every device sums over its rows, and owner
        blocks get the sums on their owners. None means that the compiler says where.

    Returns:
      `Factors`, in at least float32; with a placement they are of its owner blocks.

    Raises:
      ValueError: the layout belongs to other params or to another model; `fisher` is unknown; the
        model gives no row of outputs for one row of inputs, where examples must be told apart
        (reduce, "exact", "empirical").
      TypeError: params are not float; "mc" is asked of a loss that cannot sample.

    Cost: "mc": one forward and one backward pass without the gradients of kernels, and
      `n (in^2 + out^2) / 2` multiplications for n positions. "exact": two backward passes and the
      products for G, as often as one example's outputs have entries. Memory: inputs and cotangents
      of all uses, but patches of convolutions by chunks only. A use in a loop has them for every
      round, `jax.checkpoint` or not: a solver of differential equations that differentiates through
      room for 4,096 steps has 4,096 rounds, which its `max_steps` makes fewer.

    Example: a linear model, where `A x G` is the Gauss-Newton matrix.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params = jnp.zeros((2, 3))
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 3))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> factors = curvax.kron_factors(
      ...     objective, layout, params, batch, jax.random.key(0), fisher="exact")
      >>> block = factors.blocks[""]
      >>> block.a.mean[0].tolist(), block.g.mean[0].tolist()
      ([[0.5, 0.0], [0.0, 4.5]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    References: Martens and Grosse (2015), sections 3 and 5, https://arxiv.org/abs/1503.05671;
      Grosse and Martens (2016), A Kronecker-factored approximate Fisher matrix for convolution
      layers, https://arxiv.org/abs/1602.01407; Eschenhagen et al. (2023), sections 3.1 and 3.2,
      https://arxiv.org/abs/2311.00636.
    """
    if objective.parts:
        estimate = partial(
            kron_factors, fisher=fisher, num_samples=num_samples, microbatch=microbatch
        )
        results = by_part(estimate, objective, layout, params, batch, key)
        penalties = penalties_by_path(objective, layout, params)
        total = sum_of_factors(layout, results, penalties)
        return total if placement is None else pack_factors(placement, total)
    # Reduce pools the positions of one example and lags are between them, and only "mc" draws for a
    # whole batch at once.
    needs_examples = any(block.sharing != "expand" for block in layout.blocks)
    by_example = needs_examples or fisher != "mc"
    options = PassOptions(
        fisher=fisher, num_samples=num_samples, microbatch=microbatch, by_example=by_example
    )
    if placement is not None:
        check_placement(placement, layout)

    objective = for_auto_sharding(objective, params, batch)

    def factors(params: Params, batch: Batch, key: PRNGKey) -> Factors:
        over_rows = together if placement is None else by_device(placement.batch, by_example)
        reduction = factor_sums(layout, over_rows)
        sums, terms = accumulate(
            objective, layout, params, batch, key, reduction=reduction, options=options
        )
        inputs, outputs, squares = sums
        result = make_factors(inputs, outputs, squares, terms)
        return result if placement is None else collect_factors(placement, result)

    # One passage out of the compiler's placement: sums by device do not leave it.
    specs = PartitionSpec() if placement is None else factor_specs(placement)
    return with_auto_sharding(factors, params, batch, key, like=specs)


def factor_sums(layout: Layout, over_rows: RowSums = together) -> Reduction:
    """Build the reduction whose sums `make_factors` turns into `Factors`.

    Args:
      layout: the layout.
      over_rows: where sums over rows are taken.
    """

    def contribution(capture: Capture, u: UseCotangents, v: UseCotangents | None) -> PyTree[Array]:
        del capture
        outputs = {}
        for block in layout.blocks:
            # G = sum g h': u and v pulled back to the block's outputs, with h = g for v None.
            g, h = u.blocks[block.name], None if v is None else v.blocks[block.name]
            outputs[block.name] = over_rows(partial(_output_sums, block), (g, h))
        # With exact, u is a unit vector for every example alike: only v = S u is 0 at masked terms.
        blocks = (u if v is None else v).blocks
        counted = {
            block.name: counted_positions(block, blocks[block.name]) for block in layout.blocks
        }
        others = None if v is None else v.outside
        squares = over_rows(diagonal_sums, (), (u.outside, others))
        return outputs, squares, counted

    def finish(capture: Capture, sums: PyTree[Array]) -> PyTree[Array]:
        outputs, squares, rounds_counted = sums
        # A position counts once, however many rounds gave it a cotangent.
        counted = jax.tree.map(lambda n: jnp.minimum(n, 1), rounds_counted)
        inputs = {}
        for block in layout.blocks:
            chunks = capture.chunks[block.name]
            # A use in chunks has its inputs there.
            a = [
                x if c is None else None
                for x, c in zip(capture.inputs[block.name], chunks, strict=True)
            ]
            rows = [None if c is None else c.rows for c in chunks]
            of_block = partial(_input_sums, block, chunks)
            inputs[block.name] = over_rows(of_block, (a, counted[block.name]), rows)
        return inputs, outputs, squares

    return Reduction(Partial(contribution), Partial(finish))


def _output_sums(block: Block, of_uses: Any, by_row: Any) -> Any:
    """Return the sums of `g h'` of a block, and those of neighbors in time."""
    del by_row
    g, h = of_uses
    lag = output_lags(g, h) if block.is_over_time else None
    return output_moments(block, g, h), lag


def _input_sums(block: Block, chunks: Chunks, of_uses: Any, by_row: Any) -> Any:
    """Return A of a block, as `input_moments` does, and the sums of neighbors in time."""
    a, m = of_uses
    here = [
        c if c is None else c._replace(rows=rows) for c, rows in zip(chunks, by_row, strict=True)
    ]
    lags = input_lags(block, a, m) if block.is_over_time else None
    return *input_moments(block, a, here, m), lags


def make_factors(inputs: Any, outputs: Any, squares: Any, terms: TermCounts) -> Factors:
    """Turn sums over a batch into factors.

    A weighs as much as it has positions, curvature of the mean loss as the batch has terms.
    """
    blocks = {}
    for name, (a, transposed_a, lags_a) in inputs.items():
        moments_g, lag_g = outputs[name]
        # G carries the scale of the loss and A has none: A x G is curvature of the mean loss.
        g, *transposed_g = [terms.factor(moment) for moment in moments_g]
        # Of transposed uses, cotangents are on the inputs' side, and inputs on the outputs'.
        second = None if transposed_a is None else (*transposed_g, transposed_a)
        lags = None
        if lags_a is not None:
            # By the weights of lag 0: moments of both lags together stay positive semidefinite.
            lag_a = WeightedMean(lags_a.moment, a.weight)
            lags = LagFactors(lag_a, terms.factor(lag_g), lags_a.length)
        blocks[name] = BlockFactors(a=a, g=g, second=second, lags=lags)
    return Factors(blocks, {path: terms.factor(x) for path, x in squares.items()})


def check_one_part(objective: Objective) -> None:
    """Raise if an objective has several parts, where work goes over one batch."""
    if objective.parts:
        raise TypeError(
            "a curvax.total has a batch for each part, which streaming fits and influence do not "
            "take: fit each part by itself, with layout.of_part(name)."
        )


def accumulate(
    objective: Objective,
    layout: Layout,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    *,
    reduction: Reduction,
    options: PassOptions,
    position: StreamPosition | None = None,
) -> tuple[PyTree[Array], TermCounts]:
    """Sum a reduction over rounds of cotangents and chunks of a batch, which may be of a stream."""
    check_one_part(objective)
    position = StreamPosition(0) if position is None else position
    check_params(params)
    check_layout(layout, params)
    check_batch(batch)
    check_fisher(options.fisher, options.num_samples)
    if options.microbatch is not None:
        check_count(1, microbatch=options.microbatch)
    run = partial(_over_chunks, for_auto_sharding(objective, params, batch), layout, options)
    return with_auto_sharding(run, params, batch, key, reduction, position)


def _over_chunks(
    objective: Objective,
    layout: Layout,
    options: PassOptions,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    reduction: Reduction,
    position: StreamPosition,
) -> tuple[PyTree[Array], TermCounts]:
    """Sum a reduction over the chunks of a batch, each with its share of the mean loss."""
    # Draws by example depend on a row's number in the stream, not on how batches cut the stream.
    rows = with_index(batch, position.first)
    totals = position.totals
    # A batch in one piece is all of the mean, whose terms its own outputs will tell.
    if totals is None and options.microbatch is not None:
        totals = total_terms(objective, params, batch, options.microbatch)

    def of_chunk(chunk: tuple[Batch, Array]) -> tuple[PyTree[Array], PyTree[Scalar]]:
        return _over_rounds(objective, layout, options, params, chunk, key, reduction, totals)

    if options.microbatch is None:
        sums, terms = of_chunk(rows)
    else:
        sums, terms = sum_over_chunks(of_chunk, rows, options.microbatch)
    # Heads of a weighted sum count their terms apart; together they are a batch's weight.
    of_mean, of_batch = (
        jnp.asarray(sum(jax.tree.leaves(counts)))
        for counts in (terms if totals is None else totals, terms)
    )
    return sums, TermCounts(of_mean, of_batch)


def _over_rounds(
    objective: Objective,
    layout: Layout,
    options: PassOptions,
    params: Params,
    chunk: tuple[Batch, Array],
    key: PRNGKey,
    reduction: Reduction,
    totals: PyTree[Scalar] | None,
) -> tuple[PyTree[Array], PyTree[Scalar]]:
    """Capture a chunk once, sum a reduction over the cotangents of its outputs, count its terms.

    Of the mean over `totals` terms the chunk has its share; without totals it is all of the mean.
    """
    (inputs, targets), index = chunk
    plan = layout_plan(objective, layout, params, inputs, options.by_example)
    capture = record(plan, params, inputs)
    loss, outputs = objective.loss, capture.outputs
    terms = term_counts(loss, outputs, targets)
    # A chunk's share of the mean is its own mean times (its terms / all terms).
    if totals is not None:
        loss = share_of(loss, terms, totals)
    rounds = _rounds(loss, options, key, outputs, targets, index)

    # `sum_k u_k v_k'` is the curvature in output space, with v None for u itself; pulled back to
    # the uses it is that of their outputs.
    def one_round(k: Array) -> PyTree[Array]:
        u, v = rounds.pair(k)
        pulled_v = None if v is None else capture.pull(v)
        return reduction.contribution(capture, capture.pull(u), pulled_v)

    if rounds.number == 1:  # one round needs no loop
        total = one_round(jnp.int32(0))
        if options.stack_rounds:
            total = jax.tree.map(lambda x: x[None], total)
        return reduction.finish(capture, total), terms
    # More rounds are a loop, so that memory is that of one round, and the program too.
    step = fast_convs_in_loops(one_round)
    if options.stack_rounds:
        by_round = lax.map(step, jnp.arange(rounds.number))
        return reduction.finish(capture, by_round), terms
    shapes = jax.eval_shape(lambda: one_round(jnp.int32(0)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add_round(total: PyTree[Array], k: Array) -> tuple[PyTree[Array], None]:
        return jax.tree.map(jnp.add, total, step(k)), None

    total, _ = lax.scan(add_round, zeros, jnp.arange(rounds.number))
    return reduction.finish(capture, total), terms


def _rounds(
    loss: Loss,
    options: PassOptions,
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
    index: Array,
) -> CotangentPairs:
    """Return the cotangents of the outputs that are pulled back, of rows with the numbers index."""
    # Martens and Grosse (2015), section 5: targets that the model samples give the Fisher, those of
    # the data the empirical Fisher, which is another matrix.
    if options.fisher == "exact":
        return exact(loss, outputs, targets)
    if options.fisher == "empirical":
        return empirical(loss, outputs, targets)
    if options.fisher == "empirical_by_term":
        return empirical_by_term(loss, key, outputs, targets, index, options.num_samples)
    # Rows draw one by one, unless they are not told apart or have no loss of their own.
    row_numbers = None if loss.couples_examples or not options.by_example else index
    draws_apart = options.microbatch is not None or loss.couples_examples
    if row_numbers is None and draws_apart:
        key = jax.random.fold_in(key, index[0])  # chunks and batches draw apart, as rows would
    return sampled(loss, key, outputs, targets, row_numbers, options.num_samples)
