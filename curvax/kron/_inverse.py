"""Damped inverses, and other powers, of Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, keystr
from jaxtyping import Array, Bool, Float

from curvax._checks import check_choice, check_damping, describe, is_masked
from curvax._types import Matvec, Params, at_least_float32
from curvax.kron._factors import Factors, WeightedMean
from curvax.kron._gradient_pairs import Basis
from curvax.kron._layout import Block, Layout, Leaf, check_layout
from curvax.kron._moments import EigenFactors
from curvax.kron._sides import (
    Eigen,
    Inverse,
    KronFactor,
    add_to_diagonal,
    combined_factors,
    eigens,
    inverses,
    multiply_left,
    multiply_right,
    trace,
)

DAMPINGS = {"exact": None, "factored": None}


class FactoredPower(NamedTuple):
    """A power of a block that is a Kronecker product itself, `V -> left V right`.

    Attributes:
      left: `[stack, in, in]`, or `[stack, in]` if diagonal.
      right: `[stack, out, out]`, or `[stack, out]` if diagonal.
    """

    left: Array
    right: Array


class EigenPower(NamedTuple):
    """A power of a block in its eigenbasis, `V -> left (left' V right * scale) right'`.

    Attributes:
      left: eigenvectors of A, `[stack, in, in]`, or None for the identity.
      right: eigenvectors of G, `[stack, out, out]`, or None for the identity.
      scale: powers of damped eigenvalues, `[stack, in, out]`.
    """

    left: Array | None
    right: Array | None
    scale: Array


BlockPower: TypeAlias = FactoredPower | EigenPower


class KronPower(NamedTuple):
    """A power of damped curvature, ready to be applied by `apply_power`.

    Attributes:
      blocks: for each block.
      diagonal: powers of damped diagonal entries, by path.
    """

    blocks: Mapping[str, BlockPower]
    diagonal: dict[str, Array]


def kron_inverse(
    layout: Layout,
    factors: Factors | EigenFactors,
    damping: Any,
    *,
    damping_scheme: str = "exact",
    power: float = -1.0,
) -> Matvec:
    """Build the product with the damped inverse of Kronecker-factored curvature, `v -> (A x G + damping I)^-1 v`.

    Args:
      layout: of `kron_layout`.
      factors: of `kron_factors`, or the `EigenFactors` of `kron_moments`: then second moments in the eigenbasis take the
        place of products of eigenvalues (EK-FAC).
      damping: positive scalar, in units of an eigenvalue of the curvature; may be traced. With a positive `power` also 0.
        Or a mapping with one for each block by name (a number, or `[stack]`) and for each leaf in `factors.diagonal`.
      damping_scheme: "exact", `A x G + damping I` by eigendecompositions; "factored", the cheaper
        `(A + pi sqrt(damping) I) x (G + sqrt(damping) / pi I)` by Cholesky, with
        `pi^2 = (tr A / dim A) / (tr G / dim G)`, which damps some directions more.
      power: of the damped curvature; -1/2 and 1/2 are square roots, 1 is the product with the curvature itself.

    Returns:
      `matvec(v) -> tree like v` (a tree like params), self-adjoint and positive definite, that may be passed through
      `jit`. Entries in no block are divided by damped diagonal entries, or left as they are (identity).

    Raises:
      ValueError: damping that is zero or negative, or lacks a block; unknown schemes; v unlike the layout's params.
      TypeError: factors of another kind.

    Cost: building: an eigendecomposition of every full side (about 10 n^3), or a Cholesky inverse (n^3). Each product:
      `in out (in + out)` multiplications a block, in the eigenbasis twice that.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)                     # curvature diag(1/2, 9/2)
      >>> factors = curvax.kron_factors(objective, layout, params, batch, jax.random.key(0), fisher="exact")
      >>> inverse = curvax.kron_inverse(layout, factors, damping=0.5)
      >>> [round(x, 6) for x in inverse(jnp.ones((2, 1))).ravel().tolist()]
      [1.0, 0.2]

    References: Martens and Grosse (2015), section 6.3; George et al. (2018).

    Deviates: damping is not factored where a side has one row, or is the identity: all of it then goes to the other
      side, which is exact. Damping of a side is at least its trace times the precision of its floats.
    """
    if not isinstance(factors, Factors | EigenFactors):
        raise TypeError(
            "kron_inverse takes the Factors of curvax.kron_factors or the EigenFactors of "
            f"curvax.kron.kron_moments, got {describe(factors)}."
        )
    check_choice("damping_scheme", damping_scheme, DAMPINGS)
    _check_dampings(layout, factors, damping, power)
    if isinstance(factors, EigenFactors):
        moments = factors.moments
        blocks: Mapping[str, BlockPower] = {
            name: eigen_power(basis, moments[name], damping_of(damping, name), power)
            for name, basis in factors.basis.items()
        }
    else:
        blocks = kron_power(layout, factors, damping, damping_scheme, power)
    made = KronPower(blocks, diagonal_power(factors.diagonal, damping, power))
    return Partial(partial(apply_power, layout), made)


def kron_power(
    layout: Layout, factors: Factors, damping: Any, damping_scheme: str, power: float
) -> dict[str, BlockPower]:
    """Compute a power of the damped factors of every block, see `kron_inverse`."""
    if damping_scheme == "factored" and power == -1:
        return {
            name: FactoredPower(a.side, g.side)
            for name, (a, g) in factored_inverses(layout, factors, damping).items()
        }
    pairs = {
        block.name: combined_factors(block, factors.blocks[block.name]) for block in layout.blocks
    }
    if damping_scheme == "factored":
        damped = [
            damped_sides(b, *pairs[b.name], damping_of(damping, b.name)) for b in layout.blocks
        ]
        roots = iter(
            _root(side, power) for side in eigens([side for pair in damped for side in pair])
        )
        return {name: FactoredPower(next(roots), next(roots)) for name in pairs}
    spectra = iter(eigens([side for pair in pairs.values() for side in pair]))
    return {
        name: _spectral(next(spectra), next(spectra), damping_of(damping, name), power)
        for name in pairs
    }


def factored_inverses(
    layout: Layout, factors: Factors, damping: Any
) -> dict[str, tuple[Inverse, Inverse]]:
    """Invert both damped sides of every block."""
    damped = [
        damped_sides(b, *combined_factors(b, factors.blocks[b.name]), damping_of(damping, b.name))
        for b in layout.blocks
    ]
    done = iter(inverses([side for pair in damped for side in pair]))
    return {block.name: (next(done), next(done)) for block in layout.blocks}


def eigen_power(basis: Basis, moments: WeightedMean, damping: Any, power: float) -> EigenPower:
    """Compute a power of a block that is diagonal in an eigenbasis."""
    return EigenPower(basis.a, basis.g, (moments.mean + _by_slice(damping)) ** power)


def diagonal_power(
    diagonal: Mapping[str, WeightedMean], damping: Any, power: float
) -> dict[str, Array]:
    """Compute a power of damped diagonal entries, by path."""
    return {
        path: (factor.mean + damping_of(damping, path)) ** power
        for path, factor in diagonal.items()
    }


def damping_of(damping: Any, name: str) -> Any:
    """Return the damping of a block, or of the leaf of a path."""
    return damping[name] if isinstance(damping, Mapping) else damping


def apply_power(layout: Layout, made: KronPower, v: Params) -> Params:
    """Multiply a tree like params by a power of curvature. Blocks with a leaf that is masked out are left out."""
    leaves = {keystr(path): x for path, x in jax.tree.leaves_with_path(v, is_leaf=is_masked)}
    present = {path: at_least_float32(x) for path, x in leaves.items() if not is_masked(x)}
    check_layout(layout, v)
    kept = [leaf for leaf in layout.leaves if leaf.path in present and leaf.outside is not None]
    results = {leaf.path: _outside(layout, leaf, present[leaf.path], made) for leaf in kept}
    for block in layout.blocks:
        if not all(path in present for path in block.leaves):
            continue
        own = {path: present[path] for path in block.leaves}
        product = _apply(made.blocks[block.name], block_matrix(block, own))
        for path, x in _scatter(block, product, own).items():
            results[path] = results[path] + x if path in results else x
    ordered = [x if is_masked(x) else results[path].astype(x.dtype) for path, x in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(v, is_leaf=is_masked), ordered)


def block_matrix(block: Block, leaves: Mapping[str, Array]) -> Float[Array, "s i o"]:
    """Read a block's kernel, with its bias as a last row, out of leaves by path."""
    kernel = block.kernel.read(leaves)
    return (
        kernel
        if block.bias is None
        else jnp.concatenate([kernel, block.bias.read(leaves)[:, None]], axis=1)
    )


def _scatter(
    block: Block, matrix: Float[Array, "s i o"], leaves: Mapping[str, Array]
) -> dict[str, Array]:
    """Put a block's entries back to where `block_matrix` reads them; zeros elsewhere."""
    dtype = jnp.result_type(*leaves.values())
    moved: dict[str, Array]
    (moved,) = jax.linear_transpose(partial(block_matrix, block), dict(leaves))(
        matrix.astype(dtype)
    )
    return moved


def _outside(layout: Layout, leaf: Leaf, x: Array, made: KronPower) -> Array:
    """Treat the entries of a leaf that are in no block; entries in blocks give 0."""
    done = made.diagonal[leaf.path] * x if leaf.outside == "diagonal" else x
    return done if leaf.kind != "kron" else jnp.where(in_no_block(layout, leaf), done, 0)


def in_no_block(layout: Layout, leaf: Leaf) -> Bool[Array, "..."]:
    """Tell which entries of a leaf are in no block."""
    blocks = [block for block in layout.blocks if leaf.path in block.leaves]
    shapes = {other.path: jnp.zeros(other.shape) for other in layout.leaves}
    own = lambda block: {path: shapes[path] for path in block.leaves}
    covered = sum(_scatter(block, jnp.ones(block.shape), own(block))[leaf.path] for block in blocks)
    return jnp.broadcast_to(covered == 0, leaf.shape)


def _apply(made: BlockPower, matrix: Float[Array, "s i o"]) -> Float[Array, "s i o"]:
    if isinstance(made, FactoredPower):
        return multiply_right(multiply_left(made.left, matrix), made.right)
    rotated = (
        multiply_right(multiply_left(made.left, matrix, transpose=True), made.right) * made.scale
    )
    return multiply_right(multiply_left(made.left, rotated), made.right, transpose=True)


def damped_sides(
    block: Block, left: KronFactor, right: KronFactor, damping: Any
) -> tuple[KronFactor, KronFactor]:
    """Damp both sides by factored damping; where one is a number or the identity, exactly, on the other."""
    if left.shape[1] == 1:
        return jnp.ones_like(left), _damp(
            left.reshape(-1, *[1] * (right.ndim - 1)) * right, damping
        )
    if right.shape[1] == 1:
        return _damp(right.reshape(-1, *[1] * (left.ndim - 1)) * left, damping), jnp.ones_like(
            right
        )
    if block.a_structure == "identity":  # perhaps times a number, where a tied block was balanced
        return jnp.ones_like(left), _damp(
            left[:, 0].reshape(-1, *[1] * (right.ndim - 1)) * right, damping
        )
    if block.g_structure == "identity":
        return _damp(
            right[:, 0].reshape(-1, *[1] * (left.ndim - 1)) * left, damping
        ), jnp.ones_like(right)
    mean_left, mean_right = trace(left) / left.shape[1], trace(right) / right.shape[1]
    both = (mean_left > 0) & (mean_right > 0)  # without curvature in one of them, both get the same
    pi = jnp.sqrt(jnp.where(both, mean_left, 1) / jnp.where(both, mean_right, 1))
    return _damp(left, pi * damping**0.5), _damp(right, damping**0.5 / pi)


def _damp(side: KronFactor, amount: Any) -> KronFactor:
    least = jnp.finfo(side.dtype).eps * trace(side)
    return add_to_diagonal(side, jnp.maximum(jnp.asarray(amount, side.dtype), least))


def _root(side: Eigen, power: float) -> KronFactor:
    """Raise a positive definite side to a power."""
    raised = side.values**power
    if side.vectors is None:
        return raised
    return multiply_right(side.vectors * raised[:, None, :], side.vectors, transpose=True)


def _spectral(left: Eigen, right: Eigen, damping: Any, power: float) -> EigenPower:
    values = left.values[:, :, None] * right.values[:, None, :]
    return EigenPower(left.vectors, right.vectors, (values + _by_slice(damping)) ** power)


def _by_slice(damping: Any) -> Float[Array, "s 1 1"]:
    """Bring a number, or one for each slice, into the shape of blocks."""
    return jnp.reshape(damping, (-1, 1, 1))


def _check_dampings(
    layout: Layout, factors: Factors | EigenFactors, damping: Any, power: float
) -> None:
    if not isinstance(damping, Mapping):
        check_damping(damping, allow_zero=power > 0)
        return
    stacks = {block.name: (block.shape[0],) for block in layout.blocks}
    names = [*stacks, *factors.diagonal]
    for name in names:
        if name not in damping:
            raise ValueError(
                f"damping has no entry for {name}; it needs one for each of {', '.join(names)}."
            )
        if jnp.shape(damping[name]) not in ((), stacks.get(name, ())):
            shape = stacks.get(name, ())
            raise ValueError(
                f"damping of {name} must be a number or {list(shape)}, got {describe(damping[name])}."
            )
        check_damping(damping[name], allow_zero=power > 0)
