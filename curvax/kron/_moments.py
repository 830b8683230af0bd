"""EK-FAC: second moments of gradients in the eigenbasis of the Kronecker factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from curvax._types import Batch, Params, PRNGKey, at_least_float32
from curvax.capture import Capture, PerUseArray, UseCotangents
from curvax.kron._factors import (
    Factors,
    PassOptions,
    Reduction,
    TermCounts,
    WeightedMean,
    accumulate,
    factor_sums,
    make_factors,
)
from curvax.kron._gradient_pairs import Basis, block_moments
from curvax.kron._layout import Layout
from curvax.kron._sides import combined_factors, eigens, multiply_left, multiply_right
from curvax.objective import Objective


class EigenFactors(NamedTuple):
    """Curvature as EK-FAC gives it: diagonal in a Kronecker eigenbasis.

    Attributes:
      basis: for each block.
      moments: for each block the second moments of gradients in that basis, `[stack, in (+ 1), out]`.
      diagonal: for leaves with entries in no block the diagonal of the Fisher, by path.
    """

    basis: dict[str, Basis]
    moments: dict[str, WeightedMean]
    diagonal: dict[str, WeightedMean]


def kron_basis(layout: Layout, factors: Factors) -> dict[str, Basis]:
    """Return the eigenbases of Kronecker factors.

    Cost: one eigendecomposition for every full side.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 3)), (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 3)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> factors = curvax.kron_factors(objective, layout, params, batch, jax.random.key(0), fisher="exact")
      >>> abs(curvax.kron.kron_basis(layout, factors)[""].a[0]).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    pairs = [combined_factors(block, factors.blocks[block.name]) for block in layout.blocks]
    vectors = iter([done.vectors for done in eigens([side for pair in pairs for side in pair])])
    return {block.name: Basis(next(vectors), next(vectors)) for block in layout.blocks}


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
    """Estimate the second moments `sum_b (Q_A' D_b Q_G)^2` of the examples' gradients D_b in a Kronecker eigenbasis.

    D_b is the gradient of example b under a pseudo-gradient, summed over positions and uses. Of all matrices that are
    diagonal in this basis, the one with these moments is nearest to the Fisher in Frobenius norm, and has its trace.

    Args:
      objective: a `curvax.Objective`.
      layout: of this objective and params.
      basis: of `kron_basis(layout, factors)`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      key: JAX key, for "mc".
      fisher: "mc", "exact" or "empirical", as in `kron_factors`.
      num_samples: samples for each term, with "mc".
      microbatch: rows worked on at a time.

    Returns:
      `EigenFactors`, for `kron_inverse(layout, eigen_factors, damping)`.

    Raises:
      As `kron_factors`; examples are always told apart.

    Cost: as `kron_factors`, with `in * out` multiplications for each example in place of `in^2 + out^2`, and as many for
      each position where an example has several. Never holds a matrix for each example of the batch, only for a few.

    References: George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored eigenbasis.
    """
    sums, terms = accumulate(
        objective,
        layout,
        params,
        batch,
        key,
        moment_sums(layout, basis),
        PassOptions(fisher, num_samples, microbatch, by_example=True),
    )
    return EigenFactors(basis, *make_moments(sums, terms))


def moment_sums(layout: Layout, basis: dict[str, Basis]) -> Reduction:
    """Say what is summed for `make_moments`."""

    def contribution(
        basis: dict[str, Basis], recorded: Capture, u: UseCotangents, v: UseCotangents | None
    ) -> PyTree[Array]:
        second = {}
        for block in layout.blocks:
            other = None if v is None else v.blocks[block.name]
            rows = recorded.inputs[block.name], u.blocks[block.name], other
            second[block.name] = block_moments(block, basis[block.name], *rows)
        rest = (u if v is None else v).outside
        squares = {
            path: jnp.sum(at_least_float32(x * rest[path]), axis=0) for path, x in u.outside.items()
        }
        return second, squares

    return Reduction(Partial(contribution, basis), Partial(lambda recorded, sums: sums))


def make_moments(
    sums: Any, terms: TermCounts
) -> tuple[dict[str, WeightedMean], dict[str, WeightedMean]]:
    """Put sums over a batch together: moments by block, and the diagonal by path."""
    moments, diagonal = jax.tree.map(terms.factor, sums)
    return moments, diagonal


class EigenCurvature(NamedTuple):
    """Curvature of a batch as data for `scale_by_ekfac`: factors, and the rows of which moments in any basis are made.

    PerUseArray do not average: of two batches (or micro-batches), `curvax.kron.merge` the curvatures.

    Attributes:
      factors: Kronecker factors.
      inputs: for each block what its uses were given, `[examples, stack, positions, in]`.
      cotangents: for each block the uses' cotangents, `[examples, stack, positions, out]`.
      terms: number of terms of the mean.
    """

    factors: Factors
    inputs: dict[str, list[PerUseArray]]
    cotangents: dict[str, list[PerUseArray]]
    terms: Array


def eigen_curvature(
    objective: Objective, layout: Layout, params: Params, batch: Batch, key: PRNGKey
) -> EigenCurvature:
    """Sample what EK-FAC needs of a batch: `kron_factors` (of one sample), and what `kron_moments` is made of.

    Args:
      objective: a `curvax.Objective`.
      layout: of this objective and params.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      key: JAX key.

    Raises:
      As `kron_moments`.

    Cost: as `kron_factors`.
    """
    sums = factor_sums(layout)

    def contribution(recorded: Capture, u: UseCotangents, v: UseCotangents | None) -> PyTree[Array]:
        return sums.contribution(recorded, u, v), u.blocks

    def finish(recorded: Capture, found: PyTree[Array]) -> PyTree[Array]:
        return sums.finish(recorded, found[0]), recorded.inputs, found[1]

    (found, inputs, cotangents), terms = accumulate(
        objective,
        layout,
        params,
        batch,
        key,
        Reduction(Partial(contribution), Partial(finish)),
        PassOptions("mc", 1, None, by_example=True),
    )
    of_inputs, products, squares = found
    return EigenCurvature(
        make_factors(of_inputs, products, squares, terms), inputs, cotangents, terms.of_batch
    )


def carried_moments(old: Basis, new: Basis, moments: WeightedMean) -> WeightedMean:
    """Express second moments in a new basis: the diagonal there of the matrix that is diagonal in the old one.

    With `R = new' old` for each side it is `(R_A * R_A) moments (R_G * R_G)'`; its sum, the trace, stays.
    """
    squares = lambda old, new: (
        None if old is None else jnp.square(multiply_left(new, old, transpose=True))
    )
    total = multiply_left(squares(old.a, new.a), moments.total)
    return WeightedMean(
        multiply_right(total, squares(old.g, new.g), transpose=True), moments.weight
    )
