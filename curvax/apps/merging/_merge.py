"""Merge models in the subspaces that matter to their tasks: `(sum_t F_t) w = sum_t F_t w_t`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from curvax._checks import check_at_least, check_count, check_like, check_params, describe
from curvax._trees import cast_like, norm, safe_divide
from curvax._types import Params, Scalar, tree_at_least_float32
from curvax.apps.merging._curvature import BlockOperators, block_operators, diagonals, kind_of
from curvax.kron import Identity, Layout, block_matrices, with_block_matrices
from curvax.kron._block_operators import FactoredOperator
from curvax.kron._kron_factor import KronFactor, added, matmul, scaled
from curvax.solve import Result, SolveInfo, cg

T = TypeVar("T")

# t: tasks, c_t: weights, F_t: curvature, w_t: params of a model, W_t: the matrix of a block in them
# w_0: the guess; d_t = w_t - w_0: what is solved for is x = w - w_0, (sum c F) x = sum c F d


class MergeInfo(NamedTuple):
    """How the systems of the blocks were solved.

    Attributes:
      blocks: a `curvax.solve.SolveInfo` for each block, by name, whose entries are `[stack]`; a
        closed form takes no steps.
    """

    blocks: dict[str, SolveInfo]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether all systems were solved to the tolerance."""
        codes = [info.code.ravel() for info in self.blocks.values()]
        return jnp.all(jnp.concatenate([*codes, jnp.array([Result.CONVERGED])]) == Result.CONVERGED)


def merge(
    models: Sequence[Params],
    curvatures: Sequence[Any] | None = None,
    layout: Layout | None = None,
    *,
    weights: Any = None,
    init: Params | None = None,
    closed_form: bool = True,
    tol: Any = 1e-5,
    max_steps: int = 100,
) -> tuple[Params, MergeInfo]:
    """Merge models that have one architecture by their curvatures, for the w that minimizes

        sum_t c_t (w - w_t)' F_t (w - w_t) / 2,    (sum_t c_t F_t) w = sum_t c_t F_t w_t.

    What the curvatures F_t are makes the method: None is the average; diagonals give Fisher
    merging; `A_t x I`, the second moments of the inputs of layers, give RegMean; and `A_t x G_t`
    merging in task subspaces. The first three have closed forms. A sum of Kronecker products has
    none: it is solved by conjugate gradients, block by block and slice by slice,

        sum_t c_t A_t W G_t = sum_t c_t A_t W_t G_t.

    Every step of them lowers the error in the norm of `sum_t c_t F_t`, and few of them stay near
    the guess: `max_steps` is a regularizer, to be chosen on held-out data.

    Args:
      models: the params w_t of the models, a list of pytrees of float arrays.
      curvatures: one for each model, all of one kind, at the params of that model and data of its
        task:
        `Factors` (of `curvax.kron_factors` or, streamed over batches, `curvax.kron.fit_factors`;
        `merge_layout` has the layout of each method), or the `EigenFactors` of
        `curvax.kron.fit_moments`;
        the Grams of `curvax.kron.input_factors`, from a forward pass; they say nothing of biases,
        which stay at the guess;
        diagonals, trees like params, whose negative entries count as 0.
      layout: the `Layout` that factors or Grams are of. Its leaves (and entries) in no block are
        merged by their diagonals, or where it says "identity" averaged.
      weights: c_t, at least 0 and not all 0, `[t]`; None stands for ones. Each F_t is that of a
        mean loss already, whatever the size of its data. A model of weight 0 does not count, even
        if it holds NaN.
      init: the guess w_0, a tree like params, such as the pretrained model or another merge; None
        stands for the average, weighted by c_t. Where no model has curvature w stays there.
      closed_form: whether blocks that have a closed form take it. Iterations may be preferred where
        they are to be stopped early.
      tol: a system counts as solved at a residual of tol, relative to the first one.
      max_steps: the largest number of CG steps.

    Returns:
      The merged params, in the dtypes of the first model, and `MergeInfo`. It may be called inside
      `jit`. All of it is computed in at least float32.

    Raises:
      ValueError: there is no model, models differ in paths or shapes (named), there are not as many
        curvatures or weights as models, a block has no factors, or the layout is missing.
      TypeError: params are not float, or the curvatures are of several kinds.

    Cost: two products with each `A_t x G_t` and one step a product; or an eigendecomposition of
      every sum of Grams. Memory: four matrices a block.

    Example: one says w = 1 with curvature 1, the other w = 4 with curvature 2.
      >>> import jax.numpy as jnp, curvax
      >>> models, diagonals = [jnp.ones(1), jnp.full(1, 4.0)], [jnp.ones(1), jnp.full(1, 2.0)]
      >>> merged, info = curvax.apps.merging.merge(models, diagonals)
      >>> merged.tolist(), curvax.apps.merging.merge(models)[0].tolist()
      ([3.0], [2.5])

    References: Tam, Bansal and Raffel (2024), Merging by matching models in task parameter
      subspaces, https://arxiv.org/abs/2312.04339, whose code was read; Matena and Raffel (2022),
      https://arxiv.org/abs/2111.09832; Jin et al. (2023), https://arxiv.org/abs/2212.09849.

    Deviates: it is `w - w_0` that is solved for, which leaves what has no curvature at the guess,
      to rounding. The authors' code clips diagonals below at 1e-8 instead, which averages there.
    """
    weights, curvatures = _checked(models, curvatures, layout, weights, max_steps)
    check_at_least(0, tol=tol)
    wide = []
    for c, model in zip(weights, models, strict=True):
        wide.append(_zero_without_weight(c, tree_at_least_float32(model)))
    average = _average(weights, wide)
    guess = average
    if init is not None:
        check_like(init, models[0], "init", "models[0]")
        guess = tree_at_least_float32(init)

    # Entries in no block: w = w_0 + sum_t c_t F_t d_t / sum_t c_t F_t, entry by entry.
    deviations = [optax.tree.sub(model, guess) for model in wide]
    by_entry = [diagonals(curvature, layout, guess) for curvature in curvatures]
    x = _merge_entries(weights, by_entry, deviations)
    merged = jax.tree.map(jnp.add, guess, x)
    if layout is None or kind_of(curvatures[0]) in ("identity", "diagonal"):
        return cast_like(merged, models[0]), MergeInfo({})

    # Blocks: the same system in matrices.
    first = block_matrices(layout, guess)
    by_task = [block_matrices(layout, deviation) for deviation in deviations]
    matrices, solved = {}, {}
    for block in layout.blocks:
        name = block.name
        operators = [block_operators(curvature, layout, block) for curvature in curvatures]
        of_block = [task[name] for task in by_task]
        solution, solved[name] = _solve_block(
            operators, weights, of_block, tol, closed_form=closed_form, max_steps=max_steps
        )
        matrices[name] = first[name] + solution
    merged = with_block_matrices(layout, matrices, merged)
    return cast_like(merged, models[0]), MergeInfo(solved)


def _checked(
    models: Sequence[Params],
    curvatures: Sequence[Any] | None,
    layout: Layout | None,
    weights: Any,
    max_steps: int,
) -> tuple[Float[Array, " t"], Sequence[Any]]:
    """Check what `merge` is called with; return an array of weights, and curvatures by model."""
    check_count(1, max_steps=max_steps)
    if not isinstance(models, Sequence) or not models:
        raise ValueError(
            f"models must be a list of params with at least one, got {describe(models)}."
        )
    for number, model in enumerate(models):
        check_params(model)
        check_like(model, models[0], f"models[{number}]", "models[0]")
    curvatures = [None] * len(models) if curvatures is None else curvatures
    weights = jnp.ones(len(models)) if weights is None else weights
    for name, values in (("curvatures", curvatures), ("weights", weights)):
        if len(values) != len(models):
            raise ValueError(f"there are {len(models)} models and {len(values)} {name}.")
    for weight in weights:
        check_at_least(0, weights=weight)
    array = jnp.asarray(weights)
    if array.ndim != 1:
        raise ValueError(f"weights must be one number for each model, got {describe(array)}.")
    if not isinstance(array, jax.core.Tracer) and not np.any(array):
        raise ValueError("weights are all 0, which is no merge; give one that is positive.")
    kinds = [kind_of(curvature) for curvature in curvatures]
    if len(set(kinds)) > 1:
        raise TypeError(
            f"curvatures must all be of one kind, got {', '.join(kinds)}: their scales would have "
            "nothing to do with each other."
        )
    if layout is None and kinds[0] in ("kron", "grams"):
        raise ValueError("factors need layout=, the curvax.kron_layout that they are of.")
    return array, curvatures


def _zero_without_weight(c: Scalar, tree: T) -> T:
    """Return the tree, or zeros where the weight is 0: what is not finite there does not count."""
    counted: T = jax.tree.map(lambda x: jnp.where(c == 0, jnp.zeros_like(x), x), tree)
    return counted


def _average(weights: Float[Array, " t"], models: Sequence[Params]) -> Params:
    """Return `sum_t c_t w_t / sum_t c_t`; NaN where all weights are 0, which is no merge."""
    shares = weights / jnp.sum(weights)

    def mean(*leaves: Array) -> Array:
        total = sum(c * x for c, x in zip(shares, leaves, strict=True))
        return jnp.asarray(total, leaves[0].dtype)

    return jax.tree.map(mean, *models)


def _merge_entries(
    weights: Float[Array, " t"],
    by_entry: Sequence[PyTree[Array]],
    deviations: Sequence[Params],
) -> Params:
    """Return `sum_t c_t F_t d_t / sum_t c_t F_t` for diagonal F_t, and 0 where all are 0."""

    def of_leaf(*arrays: Array) -> Array:
        entries, differences = arrays[: len(weights)], arrays[len(weights) :]
        numerators, weighted = [], []
        for c, f, d in zip(weights, entries, differences, strict=True):
            weight = c * _zero_without_weight(c, f)
            weighted.append(weight)
            numerators.append(weight * d)
        quotient = safe_divide(sum(numerators), jnp.asarray(sum(weighted)))
        return quotient.astype(differences[0].dtype)

    return jax.tree.map(of_leaf, *by_entry, *deviations)


Solved: TypeAlias = tuple[Float[Array, "s i o"], SolveInfo]


# Blocks of equal structures and shapes are traced and compiled once.
@partial(jax.jit, static_argnames=("closed_form", "max_steps"))
def _solve_block(
    operators: Sequence[BlockOperators],
    weights: Float[Array, " t"],
    deviations: Sequence[Float[Array, "s i o"]],
    tol: Any,
    *,
    closed_form: bool,
    max_steps: int,
) -> Solved:
    """Solve `(sum_t c_t F_t) X = sum_t c_t F_t D_t` for a block, slice by slice."""
    dtype = deviations[0].dtype
    weights = weights.astype(dtype)
    counted = map(_zero_without_weight, weights, operators)
    operators = list(counted)
    pairs = list(zip(weights, operators, strict=True))
    terms = []
    for (c, products), deviation in zip(pairs, deviations, strict=True):
        terms.append(c * _times(products, deviation))
    b = jnp.asarray(sum(terms), dtype)
    gram = _sum_of_grams(pairs) if closed_form else None
    if gram is not None:
        return _solve_left(gram, b, tol)

    def of_slice(products: Sequence[BlockOperators], b: Float[Array, "i o"]) -> Solved:
        # The classes of factors and operators have a stack's axis: here one of a single slice.
        alone = jax.tree.map(lambda x: x[None], products)

        def matvec(v: Float[Array, "i o"]) -> Float[Array, "i o"]:
            by_task = zip(weights, alone, strict=True)
            total = sum(c * _times(product, v[None])[0] for c, product in by_task)
            return jnp.asarray(total, v.dtype)

        return cg(matvec, b, tol=tol, max_steps=max_steps)

    # Slices are layers, each with a Krylov space of its own, stacked or not.
    solved: Solved = jax.vmap(of_slice)(operators, b)
    return solved


def _times(products: BlockOperators, matrix: Float[Array, "s i o"]) -> Float[Array, "s i o"]:
    """Multiply by the curvature of one model, the sum of its products."""
    total = sum(product.times(matrix) for product in products)
    return jnp.asarray(total, matrix.dtype)


def _sum_of_grams(pairs: Sequence[tuple[Any, BlockOperators]]) -> KronFactor | None:
    """Return `sum_t c_t A_t` if every F_t is `A_t x c I`, by its structure; else None."""
    total: Any = None
    for c, products in pairs:
        for product in products:
            # A sum of `A_t x G_t` has a closed form only where it acts from one side.
            if not isinstance(product, FactoredOperator):
                return None
            if not isinstance(product.right, Identity):
                return None
            gram = scaled(product.left, c * product.right.scale)
            if total is not None and type(total) is not type(gram):
                return None
            total = gram if total is None else added(total, gram)
    gram_or_none: KronFactor | None = total
    return gram_or_none


def _solve_left(gram: KronFactor, b: Float[Array, "s i o"], tol: Any) -> Solved:
    """Return the X of least norm with `(sum_t c_t A_t) X = b`, and how good it is."""
    values, vectors = gram.eigh()
    # Eigenvalues that rounding may have made are those of no input: X stays 0 there.
    largest = jnp.max(values, axis=1, keepdims=True)
    cut = gram.size * jnp.finfo(values.dtype).eps * largest
    inverse = jnp.where(values > cut, safe_divide(1, values), 0)[:, :, None]
    if vectors is None:
        x = inverse * b
    else:
        x = matmul(vectors, inverse * matmul(vectors.swapaxes(1, 2), b))
    norm_of = jax.vmap(norm)
    residual = safe_divide(norm_of(b - gram.left(x)), norm_of(b))
    # What is not in the range of A was cut: `b = sum c A d` is in it, to rounding.
    finite, small = jnp.isfinite(residual), residual <= tol
    code = jnp.where(finite, jnp.where(small, Result.CONVERGED, Result.STALLED), Result.NOT_FINITE)
    return x, SolveInfo(residual, jnp.zeros(len(b), jnp.int32), code.astype(jnp.int32))
