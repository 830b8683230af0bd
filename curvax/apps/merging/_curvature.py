"""The curvature of one model as a merge takes it: operators of blocks, and diagonals of leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._checks import check_like, describe
from curvax._types import Params, at_least_float32
from curvax.kron import (
    EigenFactors,
    EigenOperator,
    FactoredOperator,
    Factors,
    Identity,
    Layout,
    WeightedMean,
    kron_operator,
)
from curvax.kron._kron_factor import STRUCTURES
from curvax.kron._layout import Block, named_leaves
from curvax.kron._two_products import kron_products

BlockOperators: TypeAlias = tuple[FactoredOperator | EigenOperator, ...]
"""What a block of one model's curvature is the sum of."""


def kind_of(curvature: Any) -> str:
    """Tell "kron" (of factors), "grams" (of inputs), "diagonal" and "identity" apart."""
    if curvature is None:
        return "identity"
    if isinstance(curvature, Factors | EigenFactors):
        return "kron"
    is_mapping = isinstance(curvature, Mapping)
    if is_mapping and any(isinstance(x, WeightedMean) for x in curvature.values()):
        return "grams"
    return "diagonal"


def diagonals(curvature: Any, layout: Layout | None, params: Params) -> PyTree[Array]:
    """Return the diagonal for entries in no block, a tree like params: 1 where it is an average."""
    ones = jax.tree.map(jnp.ones_like, params)
    kind = kind_of(curvature)
    if kind == "diagonal":
        check_like(curvature, params, "a curvature that is a tree", "params")
        # An estimate may be negative, and curvature that pushes models apart is no weight.
        return jax.tree.map(lambda x: jnp.maximum(at_least_float32(x), 0), curvature)
    if kind != "kron" or layout is None:
        return ones
    by_path = {}
    for leaf, one in zip(layout.leaves, named_leaves(layout, ones).values(), strict=True):
        by_path[leaf.path] = one
        if leaf.outside == "diagonal":
            _check_present(leaf.path, curvature.diagonal)
            by_path[leaf.path] = curvature.diagonal[leaf.path].mean
    return jax.tree.unflatten(jax.tree.structure(params), list(by_path.values()))


def block_operators(curvature: Any, layout: Layout, block: Block) -> BlockOperators:
    """Return the curvature of a block as products whose sum it is."""
    stack, rows, columns = block.shape
    if isinstance(curvature, EigenFactors):
        # The power 1 of `Q_A (M * .) Q_G'`; nothing is divided by, so that it needs no damping.
        alone = Layout((block,), layout.leaves)
        operator = kron_operator(alone, curvature, 0.0, power=1.0).blocks[block.name]
        assert isinstance(operator, EigenOperator)  # as all blocks of eigenbases are
        return (operator,)
    if isinstance(curvature, Factors):
        _check_present(block.name, curvature.blocks)
        factors = curvature.blocks[block.name]
        # Two products of a tied weight are both there: nothing has to be approximated by one. A
        # block over time enters by its lag 0, which is A x G as of "expand".
        pairs = kron_products(block.structures, factors)
        if factors.shift is not None:
            # A penalty on params adds c I.
            c = jnp.broadcast_to(factors.shift.mean, (stack,))
            pairs.append((Identity(c, rows), Identity(jnp.ones_like(c), columns)))
        return tuple(FactoredOperator(a, g) for a, g in pairs)
    gram = _gram(curvature, block)
    one = jnp.ones(stack, jax.tree.leaves(gram)[0].dtype)
    return (FactoredOperator(gram, Identity(one, columns)),)


def _gram(grams: Mapping[str, WeightedMean], block: Block) -> Any:
    """Return A of the inputs alone, with nothing for a bias; the identity for a table."""
    stack, rows, _ = block.shape
    # Tables that are looked up have no Gram, and those that are tied one of weight 0: averaged.
    if block.is_lookup or block.has_transposed_uses:
        return Identity(jnp.ones(stack), rows)
    _check_present(block.name, grams)
    structure, mean = STRUCTURES[block.a_structure], grams[block.name].mean
    # A bias has no curvature in this form, and stays at the guess.
    padded = mean if block.bias is None else structure.with_zero_row(mean)
    return structure.from_moment(padded)


def _check_present(name: str, curvatures: Any) -> None:
    """Raise unless there is curvature of a block or leaf."""
    if name not in curvatures:
        raise ValueError(
            f"the factors have nothing for {name}, got {', '.join(curvatures) or describe(None)}: "
            "they are of another layout. Fit them with the one that merge gets."
        )
