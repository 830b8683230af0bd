"""From Kronecker factors to a linear operator: a power, mostly the inverse, of damped curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._checks import is_masked
from curvax._types import Params, at_least_float32
from curvax.kron._block_operators import (
    BlockOperator,
    BlockSpectrum,
    EigenOperator,
    FactoredOperator,
    outer,
)
from curvax.kron._factors import BlockFactors, Factors, WeightedMean
from curvax.kron._gradient_pairs import Basis
from curvax.kron._kron_factor import (
    Eigen,
    Inverted,
    KronFactor,
    Matrices,
    PerSlice,
    eigh_all,
    invert_all,
    lower_bound_of_largest,
)
from curvax.kron._layout import Block, Layout, Leaf, match_layout, named_leaves
from curvax.kron._moments import EigenFactors, decompose
from curvax.kron._over_time import power_over_time
from curvax.kron._two_products import (
    FactorPair,
    combined_factors,
    damped_factors,
    kron_products,
    pencils,
)


class KronOperator(NamedTuple):
    """A power of damped curvature, which `apply` multiplies by.

    Attributes:
      blocks: the power of every block, by name.
      diagonal: powers of damped diagonal entries, by path.
      spectra: `BlockSpectrum` of the blocks that were made from Kronecker factors, by name.
    """

    blocks: Mapping[str, BlockOperator]
    diagonal: Mapping[str, Array]
    spectra: Mapping[str, BlockSpectrum] = {}


def kron_operator(
    layout: Layout,
    factors: Factors | EigenFactors,
    damping: Any,
    damping_scheme: str = "exact",
    power: float = -1.0,
) -> KronOperator:
    """Raise damped Kronecker-factored curvature to a power; arguments as in `curvax.kron_inverse`.

    Everything that divides by Kronecker factors goes through this function. For a block V:

      "exact": `Q_A ((Q_A' V Q_G) (d_A d_G' + damping)^power) Q_G'` with `A = Q_A diag(d_A) Q_A'`;
      "factored": `(A + pi sqrt(damping) I)^power V (G + sqrt(damping) / pi I)^power`, Martens and
        Grosse (2015), section 6.3;
      EK-FAC: `Q_A ((Q_A' V Q_G) (M + damping)^power) Q_G'` with second moments M, George et al.
        (2018), section 3;
      two products that the layout wants inverted exactly: see `_two_products.pencils`;
      a block over time: see `_over_time`.
    """
    diagonal = diagonal_operator(factors.diagonal, damping, power)
    # EK-FAC: second moments M stand where K-FAC has the products of eigenvalues d_A d_G'.
    if isinstance(factors, EigenFactors):
        blocks: dict[str, BlockOperator] = {}
        for block in layout.blocks:
            name = block.name
            basis = factors.basis[name]
            moments = factors.moments[name]
            amount = damping_of(damping, name)
            blocks[name] = _of_moments(basis, moments, amount, power=power)
        return KronOperator(blocks, diagonal)
    one_product = [block for block in layout.blocks if block.is_one_product]
    build = DAMPING_SCHEMES[damping_scheme]
    built = build(one_product, factors, damping, power)
    # A sum of two products, or of those at all lags, has a formula under both schemes.
    for block in layout.blocks:
        if block.is_over_time:
            amount = shifted_damping(damping, block.name, factors)
            built[block.name] = power_over_time(block, factors.blocks[block.name], amount, power)
        elif block.two_products == "exact":
            built[block.name] = _of_two_products(block, factors, damping, power)
    return KronOperator(
        {name: operator for name, (operator, _) in built.items()},
        diagonal,
        {name: spectrum for name, (_, spectrum) in built.items()},
    )


def diagonal_operator(
    diagonal: Mapping[str, WeightedMean], damping: Any, power: float = -1.0
) -> dict[str, Array]:
    """Raise damped diagonal entries to a power, by path."""
    return {
        path: (entries.mean + damping_of(damping, path)) ** power
        for path, entries in diagonal.items()
    }


def damping_of(damping: Any, name: str) -> Any:
    """Return the damping of a block, or of the leaf of a path."""
    return damping[name] if isinstance(damping, Mapping) else damping


def shifted_damping(damping: Any, name: str, factors: Factors) -> Any:
    """Return the damping of a block with what penalties add, `A x G + (c + damping) I`."""
    shift = factors.blocks[name].shift
    amount = damping_of(damping, name)
    return amount if shift is None else amount + shift.mean


def apply(layout: Layout, operator: KronOperator, v: Params) -> Params:
    """Multiply a tree like params by an operator, but for blocks with a leaf that is masked out.

    A kernel is `[in, out]` here: the block `A x G`, on entries in row-major order, multiplies it as
    `V -> A V G`. The papers have `W [out, in]` and columns on top of each other, so that their
    `A x G` multiplies as `W -> G W A`, the transpose of the same.
    """
    matches = match_layout(layout, v)
    present = {path: at_least_float32(x) for path, x in named_leaves(layout, v).items()}
    # Each leaf's result is the sum of its entries in no block and its parts of blocks.
    results: dict[str, Array] = {}
    for leaf in layout.leaves:
        if leaf.path in present and leaf.outside is not None:
            results[leaf.path] = _outside(layout, leaf, present[leaf.path], operator)
    for block in layout.blocks:
        if not all(path in present for path in block.leaves):
            continue
        of_block = {path: present[path] for path in block.leaves}
        matrix = block.sent(block.matrix(of_block))
        product = block.returned(_times(operator.blocks[block.name], matrix))
        for path, x in scatter(block, product, of_block).items():
            results[path] = results[path] + x if path in results else x
    # Back into the tree of v, in its dtypes, with masks where they were.
    ordered = []
    for names, x in matches:
        ordered.append(x if is_masked(x) else results[names[0]].astype(x.dtype))
    structure = jax.tree.structure(v, is_leaf=is_masked)
    return jax.tree.unflatten(structure, ordered)


def scatter(
    block: Block, matrix: Float[Array, "s i o"], leaves: Mapping[str, Array]
) -> dict[str, Array]:
    """Put a block's entries back to where `Block.matrix` reads them; zeros elsewhere.

    A view moves entries without changing them, so that its transpose is its inverse.
    """
    write = jax.linear_transpose(block.matrix, dict(leaves))
    written: dict[str, Array]
    (written,) = write(matrix.astype(jnp.result_type(*leaves.values())))
    return written


def _outside(layout: Layout, leaf: Leaf, x: Array, operator: KronOperator) -> Array:
    """Multiply the entries of a leaf that are in no block; entries in blocks give 0."""
    product = operator.diagonal[leaf.path] * x if leaf.outside == "diagonal" else x
    if leaf.kind != "kron":
        return product
    return jnp.where(layout.uncovered(leaf.path), product, 0)


# -- blocks ------------------------------------------------------------------------------------
# The functions under `jit` do not know which block they work for: those of equal structures and
# shapes are traced and lowered once, which for 74 blocks takes a third of the time.

Built: TypeAlias = dict[str, tuple[BlockOperator, BlockSpectrum]]


def _factored_blocks(
    blocks: Sequence[Block], factors: Factors, damping: Any, power: float
) -> Built:
    """Raise both damped factors of every block to a power."""
    # All factors in one list, so that off CPUs those of about equal size are one batch.
    damped, traces = [], []
    for block in blocks:
        of_block = factors.blocks[block.name]
        amount = shifted_damping(damping, block.name, factors)
        a, g, trace = _damp(block.structures, of_block, amount)
        damped += [a, g]
        traces.append(trace)
    built: Built = {}
    # An inverse needs no eigenvectors: Cholesky takes about n^3 where they take 10 n^3.
    if power == -1:
        inverses = iter(invert_all(damped))
        for block, trace in zip(blocks, traces, strict=True):
            inverse_a, inverse_g = next(inverses), next(inverses)
            operator = FactoredOperator(inverse_a.inverse, inverse_g.inverse)
            spectrum = _factored_spectrum(trace, inverse_a, inverse_g)
            built[block.name] = operator, spectrum
        return built
    decompositions = iter(eigh_all(damped))
    for block, trace in zip(blocks, traces, strict=True):
        a, g = next(decompositions), next(decompositions)
        operator = FactoredOperator(a.power(power), g.power(power))
        spectrum = eigen_spectrum(a, g, 0.0)  # these eigenvalues are damped already
        built[block.name] = operator, spectrum._replace(trace=trace)
    return built


@partial(jax.jit, static_argnums=0)
def _damp(
    structures: tuple[str, str], factors: BlockFactors, damping: Any
) -> tuple[KronFactor, KronFactor, PerSlice]:
    """Return both damped factors of a block, and the trace of the undamped block."""
    a, g = combined_factors(structures, factors)
    trace = a.trace() * g.trace()  # tr(A x G) = tr A tr G
    damped_a, damped_g = damped_factors(a, g, damping)
    return damped_a, damped_g, trace


@jax.jit
def _factored_spectrum(trace: PerSlice, a: Inverted, g: Inverted) -> BlockSpectrum:
    """Combine what is known of both factors: eigenvalues of `A x G` are products of theirs."""
    return BlockSpectrum(trace, a.largest * g.largest, a.smallest * g.smallest)


def _eigen_blocks(blocks: Sequence[Block], factors: Factors, damping: Any, power: float) -> Built:
    """Raise every block to a power in its Kronecker eigenbasis."""
    built: Built = {}
    for name, (a, g) in decompose(blocks, factors).items():
        amount = shifted_damping(damping, name, factors)
        built[name] = _of_eigen(a, g, amount, power=power)
    return built


@partial(jax.jit, static_argnames="power")
def _of_eigen(
    a: Eigen, g: Eigen, damping: Any, power: float
) -> tuple[EigenOperator, BlockSpectrum]:
    """Return `(A x G + damping I)^power`."""
    # A x G + damping I has the eigenvalues d_A d_G' + damping, in the basis Q_A x Q_G.
    damped = outer(a.values, g.values) + _by_slice(damping)
    operator = EigenOperator(a.vectors, g.vectors, damped**power)
    return operator, eigen_spectrum(a, g, damping)


@jax.jit
def eigen_spectrum(a: Eigen, g: Eigen, damping: Any) -> BlockSpectrum:
    """Return the spectrum of `A x G`, and of `A x G + damping I`."""
    trace_a = jnp.sum(a.values, axis=1)
    trace_g = jnp.sum(g.values, axis=1)
    damped = outer(a.values, g.values) + _by_slice(damping)
    return BlockSpectrum(
        trace=trace_a * trace_g,
        largest=jnp.max(damped, axis=(1, 2)),
        smallest=jnp.min(damped, axis=(1, 2)),
    )


@partial(jax.jit, static_argnames="power")
def _of_moments(basis: Basis, moments: WeightedMean, damping: Any, power: float) -> EigenOperator:
    """Raise a block that is diagonal in a Kronecker eigenbasis to a power."""
    # M + damping in place of d_A d_G' + damping: George et al. (2018), section 3.
    damped = moments.mean + _by_slice(damping)
    return EigenOperator(basis.a, basis.g, damped**power)


def _of_two_products(
    block: Block, factors: Factors, damping: Any, power: float
) -> tuple[EigenOperator, BlockSpectrum]:
    """Invert the sum of two Kronecker products, the second of them damped."""
    if power != -1:
        raise ValueError(
            f'{block.name} has two_products="exact", which gives its inverse only, not the power '
            f'{power}. Use layout.edit("{block.leaves[0]}", two_products="balanced").'
        )
    first, second = kron_products(block.structures, factors.blocks[block.name])
    amount = shifted_damping(damping, block.name, factors)
    inverse, spectrum = _invert_sum(first, second, amount)
    return inverse, spectrum


@jax.jit
def _invert_sum(
    first: FactorPair, second: FactorPair, damping: Any
) -> tuple[EigenOperator, BlockSpectrum]:
    """Return `(A1 x G1 + A2d x G2d)^-1` with the damped factors A2d, G2d of the second product.

    By `pencils` it is `(K_A x K_G) (D_A x D_G + I)^-1 (K_A x K_G)'`.
    """
    (a1, g1), (a2, g2) = first, second
    # 1. Damping makes the second product positive definite.
    damped_a, damped_g = damped_factors(a2, g2, damping)
    # 2. Both products become diagonal together: D_A x D_G, and the identity.
    pencil_a, pencil_g = pencils(first, (damped_a, damped_g))
    scale = 1 / (outer(pencil_a.values, pencil_g.values) + 1)
    # K = vectors diag(scales): the scales of both sides go into the middle.
    if pencil_a.scales is not None:
        scale = scale * pencil_a.scales[:, :, None] ** 2
    if pencil_g.scales is not None:
        scale = scale * pencil_g.scales[:, None, :] ** 2
    inverse = EigenOperator(pencil_a.vectors, pencil_g.vectors, scale)

    # 3. Extreme eigenvalues of the sum and of its inverse, by power iteration.
    def damped_sum(v: Matrices) -> Matrices:
        # (A1 x G1 + A2d x G2d) V = A1 V G1 + A2d V G2d
        return g1.right(a1.left(v)) + damped_g.right(damped_a.left(v))

    diagonal1 = outer(a1.diagonal(), g1.diagonal())
    diagonal2 = outer(damped_a.diagonal(), damped_g.diagonal())
    largest = lower_bound_of_largest(damped_sum, diagonal1 + diagonal2)
    largest_of_inverse = lower_bound_of_largest(inverse.times, inverse.diagonal())
    # tr(A1 x G1 + A2 x G2), the trace of the sum without damping.
    trace1 = a1.trace() * g1.trace()
    trace2 = a2.trace() * g2.trace()
    spectrum = BlockSpectrum(
        trace=trace1 + trace2,
        largest=largest,
        smallest=1 / largest_of_inverse,
    )
    return inverse, spectrum


@jax.jit
def _times(operator: BlockOperator, matrix: Matrices) -> Matrices:
    return operator.times(matrix)


def _by_slice(damping: Any) -> Float[Array, "s 1 1"]:
    """Bring a number, or one for each slice, into the shape of blocks."""
    return jnp.reshape(damping, (-1, 1, 1))


DAMPING_SCHEMES: dict[str, Callable[[Sequence[Block], Factors, Any, float], Built]] = {
    "exact": _eigen_blocks,
    "factored": _factored_blocks,
}
"""How damping enters a block, see `curvax.kron_inverse`."""
