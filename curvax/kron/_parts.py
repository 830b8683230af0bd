"""Kronecker curvature of an objective of several parts, from that of each part.

The curvature of a block is `C = sum_p w_p A_p x G_p` over the parts p with a use of it. Where one
product has to stand for the sum it is the one with the same partial traces,

    A x G = (tr_o C x tr_i C) / tr C,
    tr_o C = sum_p w_p tr(G_p) A_p,    tr_i C = sum_p w_p tr(A_p) G_p,

so that it is exact where all A_p are multiples of each other, or all G_p, and has the trace of C.
On the three layers of `examples/pinn.py` it is 0.00 to 0.17 of |C| away from C; A as the mean over
all positions beside the sum of the w_p G_p, 0.18 to 0.79; sums by side after balancing the traces
of the products, as for tied weights, 0.09 to 0.22.
Kept as a mean A of inputs and a sum G of cotangents it reads, with `tr A` the trace of that mean,

    A = sum_p c_p A_p,  c_p = w_p tr G_p / sum_q w_q tr G_q,    G = sum_p w_p (tr A_p / tr A) G_p.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._trees import safe_divide
from curvax._types import Batch, Params, PRNGKey, at_least_float32
from curvax._xla import spec_of_rows, with_auto_sharding
from curvax.capture import PerUseArray, join_examples
from curvax.kron._factors import BlockFactors, Factors, WeightedMean
from curvax.kron._kron_factor import STRUCTURES
from curvax.kron._layout import Block, Layout, check_layout, named_leaves
from curvax.objective import Objective, Part, of_parts, penalty_diagonal


class Product(NamedTuple):
    """One Kronecker product in the curvature of a block.

    Attributes:
      weight: w_p, the weight of its part.
      a: A_p, the factor on the inputs' side.
      g: G_p, the factor on the outputs' side.
    """

    weight: Any
    a: WeightedMean
    g: WeightedMean


def by_part(
    estimate: Callable[..., Any],
    objective: Objective,
    layout: Layout,
    params: Params,
    batch: Any,
    key: PRNGKey,
) -> list[tuple[Part, Any]]:
    """Return each part but penalties with what `estimate` finds for it, in the part's layout."""
    check_layout(layout, params)

    def of_part(part: Part, params: Params, rows: Batch, part_key: PRNGKey) -> Any:
        of_layout = layout.of_part(part.name)
        return estimate(part.objective, of_layout, params=params, batch=rows, key=part_key)

    return of_parts(of_part, objective, params, batch, key)


def penalties_by_path(
    objective: Objective, layout: Layout, params: Params
) -> dict[str, Array] | None:
    """Return the diagonal curvature of penalties on params by the layout's paths, or None."""
    diagonal = penalty_diagonal(objective, params)
    return None if diagonal is None else named_leaves(layout, diagonal)


def sum_of_factors(
    layout: Layout,
    results: Sequence[tuple[Part, Factors]],
    penalties: Mapping[str, Array] | None,
) -> Factors:
    """Add the factors of the parts of an objective, and the diagonal of its penalties.

    Args:
      layout: the layout of the whole objective.
      results: each part with its factors, which are of `layout.of_part(name)`.
      penalties: what `penalties_by_path` returns.
    """
    blocks = {}
    for block in layout.blocks:
        shift = None
        # A penalty adds c I where its curvature is c throughout; else c is its mean.
        if penalties is not None:
            shift = mean_of_block(block, penalties)
        of_block = []
        for part, factors in results:
            if block.name in factors.blocks:
                of_block.append((part, factors.blocks[block.name]))
        blocks[block.name] = _sum_of_block(block, of_block, shift)
    diagonals = []
    for part, factors in results:
        diagonals.append((part.weight, factors.diagonal))
    return Factors(blocks, sum_of_diagonals(diagonals, penalties))


def sum_of_diagonals(
    terms: Sequence[tuple[Any, dict[str, WeightedMean]]],
    penalties: Mapping[str, Array] | None,
) -> dict[str, WeightedMean]:
    """Add the diagonals of the parts, by path or by block, and those of penalties by path."""
    by_name: dict[str, list[tuple[Any, WeightedMean]]] = {}
    for weight, diagonal in terms:
        # A block has moments in those parts only that have a use of it.
        for name, mean in diagonal.items():
            by_name.setdefault(name, []).append((weight, mean))
    total = {name: sum_of_means(means) for name, means in by_name.items()}
    if penalties is None:
        return total
    return {name: shifted(mean, penalties[name]) for name, mean in total.items()}


def sum_of_means(terms: Sequence[tuple[Any, WeightedMean]]) -> WeightedMean:
    """Return `sum_p w_p x_p` of means x_p; it weighs as much as all of them have terms."""
    weight = _sum(x.weight for _, x in terms)
    mean = _sum(w * x.mean for w, x in terms)
    return WeightedMean(weight * mean, weight)


def shifted(mean: WeightedMean, amount: Array) -> WeightedMean:
    """Add to a mean."""
    return WeightedMean(mean.total + mean.weight * amount, mean.weight)


def _sum_of_block(
    block: Block, of_block: Sequence[tuple[Part, BlockFactors]], shift: Array | None
) -> BlockFactors:
    """Add the Kronecker products of a block, into one or into the two that are kept apart."""
    # Uses as they are, and those of the transpose, are products apart in every part.
    straight, transposed = [], []
    uses_of = dict(block.parts)
    for part, factors in of_block:
        if not all(use.transposed for use in uses_of[part.name]):
            straight.append(Product(part.weight, factors.a, factors.g))
        if factors.second is not None:
            transposed.append(Product(part.weight, *factors.second))
    groups = [straight, transposed] if transposed else [straight]
    # What is to be inverted exactly is two products: each is by itself.
    if block.two_products == "exact":
        groups = [[product] for product in (*straight, *transposed)]
    (a, g), *others = (_as_one(block, group) for group in groups)
    mean_shift = None if shift is None else WeightedMean(g.weight * shift, g.weight)
    return BlockFactors(a=a, g=g, second=others[0] if others else None, shift=mean_shift)


def _as_one(
    block: Block,
    products: Sequence[Product],
) -> tuple[WeightedMean, WeightedMean]:
    """Return A and G with the partial traces of a sum of products; see the head of this module."""
    a_structure, g_structure = (STRUCTURES[name] for name in block.structures)
    traces_a, traces_g = [], []
    for w, a, g in products:
        trace_a = a_structure.from_moment(a.mean).trace()
        trace_g = g_structure.from_moment(g.mean).trace()
        traces_a.append(trace_a)
        traces_g.append(w * trace_g)
    weight_a = _sum(product.a.weight for product in products)
    weight_g = _sum(product.g.weight for product in products)

    # A = sum_p c_p A_p and tr A = sum_p c_p tr A_p, with c_p = w_p tr G_p / sum_q w_q tr G_q
    sum_of_traces_g = _sum(traces_g)
    terms_of_a, terms_of_trace = [], []
    for (_, a, _), trace_a, trace_g in zip(products, traces_a, traces_g, strict=True):
        by_trace = safe_divide(trace_g, sum_of_traces_g)
        # Where all G vanish (0/0), a part has as large a share as it has positions.
        by_positions = safe_divide(a.weight, weight_a)
        share = jnp.where(sum_of_traces_g > 0, by_trace, by_positions)
        terms_of_a.append(_by_slice(share, a.mean))
        terms_of_trace.append(share * trace_a)
    mean_a = _sum(terms_of_a)
    trace_of_a = _sum(terms_of_trace)

    # G = sum_p w_p (tr A_p / tr A) G_p
    terms_of_g = []
    for (w, _, g), trace_a in zip(products, traces_a, strict=True):
        relative = safe_divide(trace_a, trace_of_a)
        terms_of_g.append(_by_slice(w * relative, g.mean))
    mean_g = _sum(terms_of_g)
    return (
        WeightedMean(_by_slice(weight_a, mean_a), weight_a),
        WeightedMean(_by_slice(weight_g, mean_g), weight_g),
    )


def join_rows(
    layout: Layout, results: Sequence[tuple[Part, Any]]
) -> tuple[
    dict[str, list[PerUseArray]], dict[str, list[PerUseArray]], dict[str, list[PerUseArray]] | None
]:
    """Join the inputs and cotangents of the parts of an objective to those of all their examples.

    The last are the second cotangents of pairs, or None where no part has pairs.

    Every part has uses of its own, which have zero cotangents in the rows of the others: there the
    gradient `sum a g'` of an example gets nothing from them. Cotangents of a part are scaled by the
    root of its weight, for second moments are squares of theirs.

    Args:
      layout: the layout of the whole objective.
      results: each part with its `EigenCurvature`.
    """
    names = [block.name for block in layout.blocks]
    inputs, cotangents, paired, sizes = [], [], [], []
    for part, rows in results:
        inputs.append(rows.inputs)
        root = jnp.sqrt(part.weight)
        cotangents.append(_scaled(root, rows.cotangents))
        # Without pairs, u u' is the pair of a cotangent with itself.
        partners = rows.cotangents if rows.paired is None else rows.paired
        paired.append(_scaled(root, partners))
        # A part without a use of any block has no examples here.
        arrays = jax.tree.leaves(rows.inputs)
        sizes.append(len(arrays[0]) if arrays else 0)
    has_pairs = any(rows.paired is not None for _, rows in results)

    def join(*batches: Any) -> Any:
        return tuple(join_examples(arrays, sizes, names) for arrays in batches)

    # Rows of several batches, each sharded explicitly, remain so.
    batches = inputs, cotangents, *([paired] if has_pairs else [])
    joined = with_auto_sharding(join, *batches, like=spec_of_rows(batches))
    return joined if has_pairs else (*joined, None)


def _scaled(factor: Array, tree: PyTree[Array]) -> Any:
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def mean_of_block(block: Block, leaves: Mapping[str, Array]) -> Array:
    """Return the mean over the entries of a block, kernel and bias, for every slice."""
    views = [block.kernel]
    if block.bias is not None:
        views.append(block.bias)
    stack, rows, columns = block.shape
    sums = []
    for view in views:
        entries = at_least_float32(view.read(leaves))
        sums.append(jnp.sum(entries.reshape(stack, -1), axis=1))
    return _sum(sums) / (rows * columns)


def _by_slice(factor: Array, x: Array) -> Array:
    """Multiply each slice of a stack by a number."""
    return factor.reshape(-1, *[1] * (x.ndim - 1)) * x


def _sum(arrays: Any) -> Array:
    total: Array = functools.reduce(jnp.add, arrays)
    return total
