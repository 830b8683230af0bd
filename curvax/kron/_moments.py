"""EK-FAC: second moments of gradients in the eigenbasis of the Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from curvax._shared import is_shared
from curvax._types import Batch, Params, PRNGKey
from curvax._xla import spec_of_rows, with_auto_sharding
from curvax.capture import Capture, PerUseArray, UseCotangents
from curvax.kron._accumulate import (
    PassOptions,
    Reduction,
    TermCounts,
    accumulate,
    factor_sums,
    make_factors,
)
from curvax.kron._eigenbasis import TrackedBasis, tracked_bases
from curvax.kron._factors import Factors, WeightedMean
from curvax.kron._gradient_pairs import Basis, block_moments
from curvax.kron._kron_factor import Eigen, KronFactor, eigh_all, matmul
from curvax.kron._layout import Block, Layout
from curvax.kron._packing import pack_factors
from curvax.kron._parts import (
    by_part,
    join_rows,
    mean_of_block,
    penalties_by_path,
    shifted,
    sum_of_diagonals,
    sum_of_factors,
)
from curvax.kron._placement import Placement, check_placement
from curvax.kron._row_sums import RowSums, by_device, collect_factors, factor_specs, together
from curvax.kron._statistics import diagonal_sums
from curvax.kron._two_products import combined_factors
from curvax.objective import Objective, Part, for_auto_sharding


class EigenFactors(NamedTuple):
    """Curvature as EK-FAC gives it: diagonal in a Kronecker eigenbasis.

    Attributes:
      basis: the eigenbasis of every block.
      moments: for each block the second moments of gradients in that basis,
        `[stack, in (+ 1), out]`.
      diagonal: for leaves with entries in no block the diagonal of the Fisher, by path.
    """

    basis: dict[str, Basis]
    moments: dict[str, WeightedMean]
    diagonal: dict[str, WeightedMean]


def kron_basis(layout: Layout, factors: Factors) -> dict[str, Basis]:
    """Return the eigenbases of Kronecker factors, `A = Q_A D_A Q_A'` and `G = Q_G D_G Q_G'`.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      factors: the `Factors` of `curvax.kron_factors`.

    Returns:
      For each block a `Basis`, in the dtype of the factors. It is computed on the host, in float64;
      where the function is traced (`jit`, `vmap`), in the program and in the factors' precision.

    Raises:
      ValueError: a block has `two_products="exact"`, or is over time.

    Cost: one eigendecomposition for every full factor.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params = jnp.zeros((2, 3))
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 3))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> factors = curvax.kron_factors(
      ...     objective, layout, params, batch, jax.random.key(0), fisher="exact")
      >>> abs(curvax.kron.kron_basis(layout, factors)[""].a[0]).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    decompositions = decompose(layout.blocks, factors)
    return {name: Basis(a.vectors, g.vectors) for name, (a, g) in decompositions.items()}


def decompose(blocks: Sequence[Block], factors: Factors) -> dict[str, tuple[Eigen, Eigen]]:
    """Decompose A and G of every block."""
    check_one_product(blocks)
    # All factors in one list, so that those of equal size can be decomposed as one batch.
    decompositions = iter(eigh_all(_combined(tuple(blocks), factors)))
    return {block.name: (next(decompositions), next(decompositions)) for block in blocks}


def track(
    blocks: Sequence[Block],
    factors: Factors,
    bases: Mapping[str, Basis],
    tolerance: float,
    method: str,
) -> dict[str, tuple[TrackedBasis, TrackedBasis]]:
    """Turn the eigenbases of every block to those of A and G, see `tracked_basis`."""
    check_one_product(blocks)
    pairs = [bases[block.name] for block in blocks]
    sides = [side for pair in pairs for side in pair]
    combined = _combined(tuple(blocks), factors)
    results = iter(tracked_bases(combined, sides, tolerance, method=method))
    return {block.name: (next(results), next(results)) for block in blocks}


def check_one_product(blocks: Sequence[Block]) -> None:
    """Raise if the curvature of a block is no single Kronecker product."""
    for block in blocks:
        if block.two_products == "exact":
            raise ValueError(
                f'{block.name} has two_products="exact": a sum of two Kronecker products has no '
                "Kronecker eigenbasis, which EK-FAC needs. "
                f'Use layout.edit("{block.leaves[0]}", two_products="balanced").'
            )
        if block.is_over_time:
            raise ValueError(
                f'{block.name} has sharing="{block.sharing}": a sum over lags has no Kronecker '
                "eigenbasis, which EK-FAC needs; its moments are of gradients of examples, which "
                "depend on all lags as they are. "
                f'Use layout.edit("{block.leaves[0]}", sharing="expand").'
            )


# One program for all blocks, where this is not part of a program anyway.
@partial(jax.jit, static_argnums=0)
def _combined(blocks: tuple[Block, ...], factors: Factors) -> list[KronFactor]:
    """Return A and G of every block, one after the other."""
    pairs: list[KronFactor] = []
    for block in blocks:
        pairs += combined_factors(block.structures, factors.blocks[block.name])
    return pairs


def kron_moments(
    objective: Objective,
    layout: Layout,
    basis: dict[str, Basis],
    params: Params,
    batch: Batch,
    key: PRNGKey,
    *,
    fisher: str = "mc",
    num_samples: int = 1,
    microbatch: int | None = None,
) -> EigenFactors:
    """Estimate the second moments `sum_b (Q_A' D_b Q_G)^2` of gradients in a Kronecker eigenbasis.

    D_b is the gradient of example b under a pseudo-gradient, summed over positions and uses. Of all
    matrices that are diagonal in this basis, the one with these moments is nearest to the Fisher in
    Frobenius norm, and has its trace.

    Args:
      objective: the `curvax.Objective` whose curvature is estimated.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      basis: the eigenbases returned by `kron_basis(layout, factors)`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      key: JAX key, for "mc".
      fisher: "mc", "exact" or "empirical", as in `kron_factors`.
      num_samples: number of samples for each term, with "mc".
      microbatch: rows worked on at a time.

    Returns:
      `EigenFactors`, for `kron_inverse(layout, eigen_factors, damping)`.

    Raises:
      As `kron_factors`; examples are always told apart.

    Cost: as `kron_factors`, with `in * out` multiplications for each example in place of
      `in^2 + out^2`, and as many for each position where an example has several. It never holds a
      matrix for each example of the batch, only for a few.

    References: George et al. (2018), Fast approximate natural gradient descent in a
      Kronecker-factored eigenbasis, section 3, https://arxiv.org/abs/1806.03884.
    """
    if objective.parts:
        estimate = partial(
            kron_moments,
            basis=basis,
            fisher=fisher,
            num_samples=num_samples,
            microbatch=microbatch,
        )
        results = by_part(estimate, objective, layout, params, batch, key)
        return _sum_of_moments(layout, basis, results, penalties_by_path(objective, layout, params))
    _check_examples(objective)
    # Squares are of sums over one example's positions, so that examples must be told apart.
    options = PassOptions(
        fisher=fisher, num_samples=num_samples, microbatch=microbatch, by_example=True
    )
    reduction = moment_sums(layout, basis)
    sums, terms = accumulate(
        objective, layout, params, batch, key, reduction=reduction, options=options
    )
    return EigenFactors(basis, *make_moments(sums, terms))


def _sum_of_moments(
    layout: Layout,
    basis: dict[str, Basis],
    results: Sequence[tuple[Part, EigenFactors]],
    penalties: Mapping[str, Array] | None,
) -> EigenFactors:
    """Add the second moments of the parts of an objective: all are diagonals in one basis."""
    moments = sum_of_diagonals([(part.weight, x.moments) for part, x in results], None)
    diagonal = sum_of_diagonals([(part.weight, x.diagonal) for part, x in results], penalties)
    if penalties is not None:
        # c I is c I in every basis.
        for block in layout.blocks:
            shift = mean_of_block(block, penalties)
            moments[block.name] = shifted(moments[block.name], shift[:, None, None])
    return EigenFactors(basis, moments, diagonal)


def moment_sums(layout: Layout, basis: dict[str, Basis]) -> Reduction:
    """Build the reduction whose sums `make_moments` turns into moments and a diagonal."""

    def contribution(
        basis: dict[str, Basis], capture: Capture, u: UseCotangents, v: UseCotangents | None
    ) -> PyTree[Array]:
        # (Q_A' D_b Q_G)^2, summed over examples: George et al. (2018), section 3
        moments = {}
        for block in layout.blocks:
            name = block.name
            h = None if v is None else v.blocks[name]
            moments[name] = block_moments(
                block, basis[name], capture.inputs[name], u.blocks[name], h
            )
        others = None if v is None else v.outside
        return moments, diagonal_sums((), (u.outside, others))

    def finish(capture: Capture, sums: PyTree[Array]) -> PyTree[Array]:
        # No mean over positions is taken, unlike for A: the sums are final as they are.
        del capture
        return sums

    return Reduction(Partial(contribution, basis), Partial(finish))


def make_moments(
    sums: Any, terms: TermCounts
) -> tuple[dict[str, WeightedMean], dict[str, WeightedMean]]:
    """Turn sums over a batch into moments by block, and the diagonal by path."""
    # Both are curvature of the mean loss, and so weigh as the batch has terms.
    moments, diagonal = jax.tree.map(terms.factor, sums)
    return moments, diagonal


class EigenCurvature(NamedTuple):
    """Curvature of a batch as data for `scale_by_ekfac`.

    It has factors, and the rows of which moments in any basis are made. Rows do not average: of two
    batches (or micro-batches), `curvax.kron.merge` the curvatures.

    Attributes:
      factors: Kronecker factors.
      inputs: for each block the inputs of its uses, `[examples, stack, positions, in]`.
      cotangents: for each block the cotangents of its uses, `[examples, stack, positions, out]`.
      terms: number of terms of the mean.
      paired: with "exact" the second cotangents of the pairs (u, v), whose first are `cotangents`;
        None where both are equal.
    """

    factors: Factors
    inputs: dict[str, list[PerUseArray]]
    cotangents: dict[str, list[PerUseArray]]
    terms: Array
    paired: dict[str, list[PerUseArray]] | None = None


def eigen_curvature(
    objective: Objective,
    layout: Layout,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    *,
    fisher: str = "mc",
    placement: Placement | None = None,
) -> EigenCurvature:
    """Estimate what EK-FAC needs of a batch.

    That is `kron_factors` (of one sample), and what `kron_moments` is made of.

    Args:
      objective: the `curvax.Objective` whose curvature is estimated.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      key: JAX key, for "mc".
      fisher: "mc", "exact" or "empirical", as in `kron_factors`.
      placement: as in `kron_factors`.

    Raises:
      As `kron_moments`.

    Cost: as `kron_factors`. Memory: inputs and cotangents of all uses; with "exact" once for every
      entry of one example's outputs.
    """
    if objective.parts:
        estimate = partial(eigen_curvature, fisher=fisher)
        results = by_part(estimate, objective, layout, params, batch, key)
        joined = _joined(layout, results, penalties_by_path(objective, layout, params))
        if placement is None:
            return joined
        return joined._replace(factors=pack_factors(placement, joined.factors))
    _check_examples(objective)
    if placement is not None:
        check_placement(placement, layout)
    # No microbatch: chunks add up, which rows must not.
    options = PassOptions(
        fisher=fisher, num_samples=1, microbatch=None, by_example=True, stack_rounds=True
    )

    objective = for_auto_sharding(objective, params, batch)

    def curvature(params: Params, batch: Batch, key: PRNGKey) -> EigenCurvature:
        over_rows = together if placement is None else by_device(placement.batch, True)
        reduction = _sums_and_rows(layout, over_rows)
        (sums, inputs, (cotangents, paired)), terms = accumulate(
            objective, layout, params, batch, key, reduction=reduction, options=options
        )
        factors = make_factors(sums[0], sums[1], sums[2], terms)
        return EigenCurvature(
            factors=factors if placement is None else collect_factors(placement, factors),
            inputs=inputs,
            cotangents=cotangents,
            terms=terms.of_batch,
            paired=paired,
        )

    # Rows stay where those of the batch are; what all examples share has none.
    leaves = jax.tree.leaves(batch, is_leaf=is_shared)
    by_row = [x for x in leaves if not is_shared(x)]
    rows: Any = spec_of_rows(by_row)
    everywhere: Any = PartitionSpec()
    specs = EigenCurvature(
        factors=everywhere if placement is None else factor_specs(placement),
        inputs=rows,
        cotangents=rows,
        terms=everywhere,
        paired=rows,
    )
    return with_auto_sharding(curvature, params, batch, key, like=specs)


def _sums_and_rows(layout: Layout, over_rows: RowSums) -> Reduction:
    """Build the reduction that gives the sums of `factor_sums`, inputs, and cotangents (u, v)."""
    of_factors = factor_sums(layout, over_rows)

    def contribution(capture: Capture, u: UseCotangents, v: UseCotangents | None) -> PyTree[Array]:
        return of_factors.contribution(capture, u, v), (u.blocks, None if v is None else v.blocks)

    # k: rounds, b: examples
    def finish(capture: Capture, by_round: PyTree[Array]) -> PyTree[Array]:
        factor_parts, cotangents = by_round
        sums = jax.tree.map(lambda x: x.sum(axis=0), factor_parts)
        num_rounds = jax.tree.leaves(cotangents)[0].shape[0]

        # A round is to moments what more examples are: [k, b, ...] to [b k, ...]. Those of one
        # example stay together, on the device that has it.
        def joined(x: Array) -> Array:
            return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        def for_every_round(x: Array) -> Array:
            return jnp.repeat(x, num_rounds, axis=0)

        rows = jax.tree.map(joined, cotangents)
        inputs = jax.tree.map(for_every_round, capture.inputs)
        return of_factors.finish(capture, sums), inputs, rows

    return Reduction(Partial(contribution), Partial(finish))


def _check_examples(objective: Objective) -> None:
    """Raise if the loss compares examples, whose gradients then are no sum over examples."""
    if objective.loss.couples_examples:
        raise TypeError(
            "this loss compares the examples of a batch with each other, so that the Fisher is no "
            "sum over examples, of which EK-FAC takes second moments; use curvax.kfac "
            "(kron_factors, scale_by_kfac)."
        )


def _joined(
    layout: Layout,
    results: Sequence[tuple[Part, EigenCurvature]],
    penalties: Mapping[str, Array] | None,
) -> EigenCurvature:
    """Join the curvature of the parts of an objective, with the rows of all their examples."""
    of_factors = [(part, curvature.factors) for part, curvature in results]
    factors = sum_of_factors(layout, of_factors, penalties)
    inputs, cotangents, paired = join_rows(layout, results)
    terms = jnp.asarray(sum(curvature.terms for _, curvature in results))
    return EigenCurvature(
        factors=factors,
        inputs=inputs,
        cotangents=cotangents,
        terms=terms,
        paired=paired,
    )


def moments_in(block: Block, basis: Basis, curvature: EigenCurvature) -> Float[Array, "s i o"]:
    """Return the second moments of a block that the rows of a curvature have in a basis."""
    inputs, g = curvature.inputs[block.name], curvature.cotangents[block.name]
    # Where the pairs of cotangents are not symmetric: (Q_A' D_b Q_G) * (Q_A' E_b Q_G).
    h = None if curvature.paired is None else curvature.paired[block.name]
    # George et al. (2018), algorithm 1: M = sum_b (Q_A' D_b Q_G)^2, with D_b = a_b g_b'.
    moments = block_moments(block, basis, inputs, g, h)
    shift = curvature.factors.blocks[block.name].shift
    # The c I of a penalty is c I in every basis.
    return moments if shift is None else moments + shift.mean[:, None, None]


def carried_moments(old: Basis, new: Basis, moments: WeightedMean) -> WeightedMean:
    """Express second moments in a new basis.

    They become the diagonal there of the matrix that is diagonal in the old basis: with
    `R = new' old` for each factor `(R_A * R_A) moments (R_G * R_G)'`. The sum, which is the trace,
    stays.
    """
    # diag(R diag(m) R') = (R * R) m, and R = R_A x R_G acts on m by side.
    total = moments.total
    # A diagonal factor has the basis I, in the old and in the new one: R = I.
    if old.a is not None and new.a is not None:
        rotation = matmul(new.a.swapaxes(1, 2), old.a)
        total = matmul(jnp.square(rotation), total)
    if old.g is not None and new.g is not None:
        rotation = matmul(new.g.swapaxes(1, 2), old.g)
        total = matmul(total, jnp.square(rotation).swapaxes(1, 2))
    return WeightedMean(total, moments.weight)
