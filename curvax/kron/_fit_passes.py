"""The passes over a data set that a fit of Kronecker-factored curvature consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from curvax._batch import batch_size
from curvax._types import Batch, Params, PRNGKey, Scalar
from curvax.kron._accumulate import (
    PassOptions,
    Reduction,
    StreamPosition,
    TermCounts,
    accumulate,
    factor_sums,
    make_factors,
)
from curvax.kron._factors import Factors, WeightedMean, init_factors
from curvax.kron._gradient_pairs import Basis
from curvax.kron._layout import Layout, named_leaves
from curvax.kron._moments import (
    EigenFactors,
    check_one_product,
    kron_basis,
    make_moments,
    moment_sums,
)
from curvax.objective import Objective

T = TypeVar("T")


class FitResults(NamedTuple):
    """The results of the completed passes of a fit; a field is None until its pass is complete.

    Attributes:
      examples: the number of examples, if a `TermCountPass` counts it before the curvature.
      terms: the number of terms that the mean loss is over; of a `weighted_sum` a dict by head.
      factors: the Kronecker factors.
      basis: the basis of every block in which second moments are taken.
      eigen: the second moments in that basis.
    """

    examples: Int[Array, ""] | None = None
    terms: PyTree[Scalar] | None = None
    factors: Factors | None = None
    basis: dict[str, Basis] | None = None
    eigen: EigenFactors | None = None

    def stream_position(self, first: Array) -> StreamPosition:
        """Return the position of a batch whose first row has the number `first` in the data set."""
        # Without totals a batch's curvature is that of its own mean, weighted by its own terms.
        if self.examples is None:
            return StreamPosition(first)
        return StreamPosition(first, self.terms)

    def require_factors(self) -> Factors:
        """Return the Kronecker factors, or raise if no pass has computed them."""
        return _require(self.factors, CovariancePass)

    def require_basis(self) -> dict[str, Basis]:
        """Return the eigenbases, or raise if no pass has computed them."""
        return _require(self.basis, EigenbasisPass)

    def require_eigen(self) -> EigenFactors:
        """Return the second moments with their basis, or raise if no pass has computed them."""
        return _require(self.eigen, MomentPass)


def _require(value: T | None, one_pass: type) -> T:
    if value is None:
        raise ValueError(
            f"the fit has no {one_pass.__name__} where its result is needed. Put one before it in "
            "the list of passes."
        )
    return value


@runtime_checkable
class DataPass(Protocol):
    """A pass whose result is a sum over the batches of a data set.

    A pass is a frozen dataclass of static, hashable facts: it is an argument of `jax.jit`, and two
    equal passes share one compiled program. All arrays are in `FitResults`.
    """

    @property
    def name(self) -> str:
        """The name of the pass in the folder, on the progress bar, and in messages."""

    @property
    def objective(self) -> Objective:
        """The `curvax.Objective` whose terms are counted along."""

    @property
    def options(self) -> PassOptions:
        """The estimator, the number of samples, and the microbatch size."""

    def init(self, params: Params) -> PyTree[Array]:
        """Return the zeros that the sum starts from."""

    def contribution(
        self, results: FitResults, params: Params, batch: Batch, key: PRNGKey, first: Array
    ) -> PyTree[Array]:
        """Return what a batch adds, given the results of earlier passes; traced by `jax.jit`."""

    def put(self, results: FitResults, value: Any) -> FitResults:
        """Return the results with the sum over all batches put in its place."""


@runtime_checkable
class DerivedPass(Protocol):
    """A pass that needs no data: its result follows from those of earlier passes."""

    @property
    def name(self) -> str:
        """The name of the pass in the folder and in messages."""

    def shapes(self, params: Params) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes of the result, by which a saved one is read."""

    def derive(self, results: FitResults) -> PyTree[Array]:
        """Compute the result from those of earlier passes; not traced, so that the host may."""

    def put(self, results: FitResults, value: Any) -> FitResults:
        """Return the results with this one put in its place."""


# The names of passes are those of Grosse et al. (2023): "covariances" are the Kronecker factors,
# "eigenvalues" the second moments that correct those of the factors.
FitPass: TypeAlias = DataPass | DerivedPass


@dataclass(frozen=True)
class TermCountPass:
    """Count examples and terms, before a pass in which every batch takes its share of the whole.

    Attributes:
      objective: the `curvax.Objective` whose terms are counted.
      options: only its `microbatch` matters here.
    """

    objective: Objective
    options: PassOptions

    name = "terms"

    def init(self, params: Params) -> Int[Array, ""]:
        return jnp.zeros([], jnp.int32)

    def contribution(
        self, results: FitResults, params: Params, batch: Batch, key: PRNGKey, first: Array
    ) -> Int[Array, ""]:
        # Terms are counted along with every pass, so that only examples are left to count.
        return jnp.asarray(batch_size(batch), jnp.int32)

    def put(self, results: FitResults, value: Any) -> FitResults:
        return results._replace(examples=value)


@dataclass(frozen=True)
class CovariancePass:
    """Add up the Kronecker factors A and G of all batches (see `kron_factors`).

    Attributes:
      objective: the `curvax.Objective` whose curvature is fitted.
      layout: the `Layout` of the objective.
      options: the estimator, the number of samples, and the microbatch size.
    """

    objective: Objective
    layout: Layout
    options: PassOptions

    name = "covariances"

    def init(self, params: Params) -> Factors:
        return init_factors(self.layout, params)

    def contribution(
        self, results: FitResults, params: Params, batch: Batch, key: PRNGKey, first: Array
    ) -> Factors:
        # inputs: sums of a a' over positions; products: sums of g g'; squares: sums of the squared
        # gradients of entries in no block.
        position = results.stream_position(first)
        sums, terms = _accumulated(self, factor_sums(self.layout), params, batch, key, position)
        inputs, products, squares = sums
        return make_factors(inputs, products, squares, terms)

    def put(self, results: FitResults, value: Any) -> FitResults:
        return results._replace(factors=value)


@dataclass(frozen=True)
class EigenbasisPass:
    """Decompose the factors of a `CovariancePass`: `A = Q_A L_A Q_A'`, `G = Q_G L_G Q_G'`.

    Attributes:
      layout: the `Layout` of the factors.
    """

    layout: Layout

    name = "eigenbases"

    def shapes(self, params: Params) -> dict[str, Basis]:
        # The decomposition is only traced: nothing is computed, and no factors are allocated.
        shapes: dict[str, Basis] = jax.eval_shape(
            lambda params: kron_basis(self.layout, init_factors(self.layout, params)), params
        )
        return shapes

    def derive(self, results: FitResults) -> dict[str, Basis]:
        # On the host, in float64. The sums over all devices are replicated, and so is the basis.
        return kron_basis(self.layout, results.require_factors())

    def put(self, results: FitResults, value: Any) -> FitResults:
        return results._replace(basis=value)


@dataclass(frozen=True)
class MomentPass:
    """Add up `sum_b (Q_A' D_b Q_G)^2`, the second moments of the examples' gradients D_b.

    (George et al., 2018, section 3; see `kron_moments`.)

    Attributes:
      objective: the `curvax.Objective` whose curvature is fitted.
      layout: the `Layout` of the objective.
      options: the estimator, the number of samples, and the microbatch size.
      in_eigenbasis: whether the moments are taken in the basis of an earlier `EigenbasisPass`. If
        not, Q_A and Q_G are identities, and the moments are the diagonal of the Fisher.
    """

    objective: Objective
    layout: Layout
    options: PassOptions
    in_eigenbasis: bool = True

    name = "eigenvalues"

    def init(self, params: Params) -> tuple[dict[str, WeightedMean], dict[str, WeightedMean]]:
        moments, leaves = {}, named_leaves(self.layout, params)
        for block in self.layout.blocks:
            # The dtype of the block's factors (`init_factors`).
            dtype = jnp.result_type(jnp.float32, *(leaves[path] for path in block.leaves))
            moments[block.name] = WeightedMean(jnp.zeros(block.shape, dtype), jnp.zeros([], dtype))
        return moments, init_factors(self.layout, params).diagonal

    def contribution(
        self, results: FitResults, params: Params, batch: Batch, key: PRNGKey, first: Array
    ) -> tuple[dict[str, WeightedMean], dict[str, WeightedMean]]:
        # A position's gradient is a g', so that Q_A' D_b Q_G = sum_t (Q_A' a_t) (Q_G' g_t)'.
        reduction = moment_sums(self.layout, self.basis(results))
        position = results.stream_position(first)
        sums, terms = _accumulated(self, reduction, params, batch, key, position)
        return make_moments(sums, terms)

    def put(self, results: FitResults, value: Any) -> FitResults:
        # moments: by block; diagonal: by leaf, for entries in no block, which need no basis.
        moments, diagonal = value
        return results._replace(eigen=EigenFactors(self.basis(results), moments, diagonal))

    def basis(self, results: FitResults) -> dict[str, Basis]:
        """Return the basis in which the moments are taken."""
        if self.in_eigenbasis:
            return results.require_basis()
        # None stands for the identity, as for a diagonal factor, whose eigenvectors are the axes.
        return {block.name: Basis(None, None) for block in self.layout.blocks}


def _accumulated(
    one_pass: CovariancePass | MomentPass,
    reduction: Reduction,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    position: StreamPosition,
) -> tuple[PyTree[Array], TermCounts]:
    """Sum a reduction over a batch that is part of a data set."""
    return accumulate(
        one_pass.objective,
        one_pass.layout,
        params,
        batch,
        key,
        reduction=reduction,
        options=one_pass.options,
        position=position,
    )


def fit_options(fisher: str, microbatch: int | None) -> PassOptions:
    """Return the options of a fit: one sample for each term, and examples told apart."""
    # By example, a row's draws follow its number in the data set, whatever batch it is in.
    return PassOptions(fisher=fisher, num_samples=1, microbatch=microbatch, by_example=True)


def counting_passes(
    objective: Objective, layout: Layout, options: PassOptions
) -> tuple[FitPass, ...]:
    """Return the pass that counts terms."""
    return (TermCountPass(objective, options),)


def factor_passes(
    objective: Objective, layout: Layout, options: PassOptions
) -> tuple[FitPass, ...]:
    """Return the passes that fit Kronecker factors."""
    return (*_totals_first(objective, options), CovariancePass(objective, layout, options))


def moment_passes(
    objective: Objective, layout: Layout, options: PassOptions
) -> tuple[FitPass, ...]:
    """Return the passes that fit second moments in the eigenbasis of the Kronecker factors."""
    # Now, and not only after the pass that the eigenbases are computed from.
    check_one_product(layout.blocks)
    moments = MomentPass(objective, layout, options)
    return (*factor_passes(objective, layout, options), EigenbasisPass(layout), moments)


def diagonal_passes(
    objective: Objective, layout: Layout, options: PassOptions
) -> tuple[FitPass, ...]:
    """Return the passes that fit the diagonal of the Fisher matrix."""
    moments = MomentPass(objective, layout, options, in_eigenbasis=False)
    return (*_totals_first(objective, options), moments)


def _totals_first(objective: Objective, options: PassOptions) -> tuple[FitPass, ...]:
    """Return the pass that counts terms, where the shares of batches must be known beforehand.

    A batch's own curvature, weighted by the batch's terms, adds up to that of the whole, except for
    a `weighted_sum`, whose heads may have other shares of the terms in each batch.
    """
    return (TermCountPass(objective, options),) if objective.loss.heads else ()
