"""Pruning: scores of weights, patterns of removal, and the correction of the weights that stay."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import optax
from jaxtyping import Array, Bool, Float, PyTree

from curvax._checks import check_count, check_damping, check_like, check_params
from curvax._trees import by_path
from curvax._types import Batch, Params, at_least_float32, tree_at_least_float32
from curvax.apps._prunable import kernels
from curvax.estimate import empirical_fisher_diagonal
from curvax.objective import Objective
from curvax.products import hvp
from curvax.solve import Window, fisher_window, inverse_diagonal, map_inverse_blocks

__all__ = [
    "Masks",
    "Pattern",
    "Prunable",
    "Pruned",
    "apoptosis",
    "apply_masks",
    "density",
    "diagonal_fisher",
    "keep_pruned",
    "kernels",
    "magnitude",
    "n_of_m",
    "prune",
    "remove",
    "surgeon",
    "unstructured",
    "whole",
]

Masks: TypeAlias = PyTree[Bool[Array, "..."]]
"""A tree like params: True where a weight stays."""

Pattern: TypeAlias = Callable[[Params, Masks, Any], Masks]
"""`(scores, masks, sparsity) -> masks`: keep the highest scores among what still stays."""

Prunable: TypeAlias = Callable[[str, Array], bool]
"""`(path, leaf) -> bool`: tell whether weights of this leaf may be removed."""

# w: weights, q: one weight, Q: the set of weights to remove, E: the columns of I that select Q,
# F: the damped Fisher matrix of a window of gradients


class Pruned(NamedTuple):
    """A pruned model.

    Attributes:
      params: zero where a weight was removed, and corrected elsewhere.
      masks: True where a weight stays.
      increase: how much the loss grows by the quadratic model, summed over the rounds.
    """

    params: Params
    masks: Masks
    increase: Float[Array, ""]


# Scores are trees like params; the weights of lowest score are removed first.


def magnitude(params: Params) -> Params:
    """Score by `w^2`."""
    return jax.tree.map(lambda w: at_least_float32(w) ** 2, params)


def diagonal_fisher(
    objective: Objective,
    params: Params,
    batch: Batch,
) -> Params:
    """Score by `F_qq w_q^2 / 2`, where F is the empirical Fisher of the batch.

    References: LeCun, Denker and Solla (1990), Optimal brain damage, for the score; there with the
      diagonal of the Hessian.
    """
    diagonal = empirical_fisher_diagonal(objective, params, batch)
    return jax.tree.map(lambda w, f: f * at_least_float32(w) ** 2 / 2, params, diagonal)


def surgeon(
    params: Params,
    window: Window,
    damping: Any,
    *,
    block_size: int | None = 128,
) -> Params:
    """Score by `w_q^2 / (2 [F^-1]_qq)`, the increase of the loss if the other weights adapt.

    F is the damped Fisher of a window of gradients, in blocks of `block_size` entries; with None it
    has no blocks.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.apps import pruning
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0], [0.0, 0.0]]))  # F = diag(2.5, .5)
      >>> [round(x, 6) for x in pruning.surgeon(jnp.array([2.0, 2.0]), window, 0.5).tolist()]
      [5.0, 1.0]

    References: Hassibi and Stork (1993), Second order derivatives for network pruning: optimal
      brain surgeon; Frantar, Kurtic and Alistarh (2021), M-FAC, https://arxiv.org/abs/2107.03356,
      section 4.
    """
    diagonal = inverse_diagonal(window, damping, block_size=block_size)
    # min_dw dw'F dw / 2 subject to dw_q = -w_q has this value (Hassibi and Stork, 1993)
    return jax.tree.map(lambda w, f: at_least_float32(w) ** 2 / (2 * f), params, diagonal)


def apoptosis(
    objective: Objective,
    params: Params,
    batch: Batch,
) -> Params:
    """Score by `|w_q (H w)_q|`: all cross terms are in it, for `sum_q w_q (H w)_q = w'Hw`.

    Cost: one product with the Hessian.

    References: Sun et al. (2025), Optimal Brain Apoptosis, the variant with one Hessian-vector
      product.
    """
    products = hvp(objective.value, params, batch)(params)
    scores = optax.tree.mul(tree_at_least_float32(params), tree_at_least_float32(products))
    return jax.tree.map(jnp.abs, scores)


# Patterns say what may be removed together.


@functools.cache
def unstructured(prunable: Prunable = kernels) -> Pattern:
    """Remove single weights, those of lowest score in all prunable leaves together."""

    def pattern(scores: Params, masks: Masks, sparsity: Any) -> Masks:
        """Keep the highest scores of all prunable leaves together."""
        check_like(masks, scores, "masks", "scores")
        candidates = {path: x for path, x in by_path(scores).items() if prunable(path, x)}
        if not candidates:
            return masks
        # Weights that are removed already rank lowest, so that they count towards the sparsity.
        mask_of = by_path(masks)
        present = [_rank_last(x, mask_of[path]).ravel() for path, x in candidates.items()]
        lengths = [len(x) for x in present]
        stays = _ranks(jnp.concatenate(present)) >= jnp.round(sparsity * sum(lengths))
        # Cut the one vector back into leaves.
        pieces = jnp.split(stays, list(itertools.accumulate(lengths))[:-1])
        stays_by_path = dict(zip(candidates, pieces, strict=True))

        def of_leaf(path: str, x: Array, mask: Array) -> Array:
            if path not in stays_by_path:
                return mask
            return stays_by_path[path].reshape(x.shape) & mask

        return _map_leaves(of_leaf, scores, masks)

    return pattern


def n_of_m(
    n: int,
    m: int,
    axis: int = -2,
    prunable: Prunable = kernels,
) -> Pattern:
    """Keep n of every m consecutive weights along an axis; the sparsity is then `1 - n/m`.

    Sparse tensor cores take 2 of 4.

    Args:
      n: the number of weights that stay in each group.
      m: the number of weights in a group.
      axis: the axis of the leaf that is cut into groups; -2 is the input axis of Flax's kernels.
      prunable: a function `(path, leaf) -> bool` that selects leaves.

    Raises:
      ValueError: m does not divide the length of the axis (named by path), or n is not in [1, m].
    """
    check_count(1, n=n, m=m)
    if n > m:
        raise ValueError(f"n must be at most m, got {n} of {m}.")

    def of_leaf(path: str, x: Array, mask: Array) -> Array:
        """Keep the n highest scores of each group of a leaf."""
        if not prunable(path, x):
            return mask
        if x.shape[axis] % m:
            raise ValueError(
                f"{m} does not divide axis {axis} of {path}, which has {x.shape[axis]} entries."
            )
        # Rank the m members of each group, on a last axis of its own.
        columns = jnp.moveaxis(_rank_last(x, mask), axis, -1)
        groups = columns.reshape(*columns.shape[:-1], -1, m)
        stays = _ranks(groups) >= m - n
        return jnp.moveaxis(stays.reshape(columns.shape), -1, axis) & mask

    def pattern(scores: Params, masks: Masks, sparsity: Any) -> Masks:
        del sparsity  # it follows from n and m
        return _map_leaves(of_leaf, scores, masks)

    return pattern


def whole(axis: int = -1, prunable: Prunable = kernels) -> Pattern:
    """Remove whole slices of an axis, those with the lowest sum of scores, leaf by leaf.

    Axis -1 holds the output units of Flax's kernels.
    """

    def pattern(scores: Params, masks: Masks, sparsity: Any) -> Masks:
        """Keep the slices with the highest sums of scores."""

        def of_leaf(path: str, x: Array, mask: Array) -> Array:
            if not prunable(path, x):
                return mask
            others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
            # A slice's score is the sum over its weights; slices without weights rank lowest.
            sums = jnp.sum(jnp.where(mask, x, 0), axis=others)
            ranks = _ranks(_rank_last(sums, jnp.any(mask, axis=others)))
            stays = ranks >= jnp.round(sparsity * len(sums))
            return jnp.expand_dims(stays, others) & mask

        return _map_leaves(of_leaf, scores, masks)

    return pattern


def remove(
    params: Params,
    masks: Masks,
    window: Window,
    damping: Any,
    *,
    block_size: int = 128,
) -> tuple[Params, Float[Array, ""]]:
    """Set weights to zero and correct the others so that the loss grows least.

    With Q the weights where `masks` is False, and F the damped Fisher in blocks of `block_size`
    entries, the correction is exact for the whole set:
    `dw = -F^-1 E (E'F^-1 E)^-1 w_Q`, where E selects Q. The quadratic model of the loss grows by
    `w_Q' (E'F^-1 E)^-1 w_Q / 2`.

    Args:
      params: a pytree of float arrays.
      masks: a tree like params, True where a weight stays.
      window: a window of gradients at params.
      damping: a positive number, in units of an eigenvalue of F.
      block_size: k, the number of entries in a block.

    Returns:
      The corrected params, and the increase that the quadratic model predicts.

    Cost: two decompositions of `[k, k]` for every block, which are `d k^2` multiplications.

    Example: the second weight makes up for the first, with which it is correlated.
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.apps import pruning
      >>> window = curvax.solve.window_of(jnp.array([[1.0, 1.0]]))  # F = 1 + [[1, 1], [1, 1]]
      >>> params, masks = jnp.array([1.0, 1.0]), jnp.array([False, True])
      >>> params, increase = pruning.remove(params, masks, window, 1.0)
      >>> [round(x, 6) for x in params.tolist()], round(float(increase), 6)
      ([0.0, 1.5], 0.75)

    References: Hassibi and Stork (1993), Second order derivatives for network pruning: optimal
      brain surgeon; Singh and Alistarh (2020), WoodFisher, https://arxiv.org/abs/2004.14340, for
      groups.
    """
    check_like(masks, params, "masks", "params")
    wide = jax.tree.map(at_least_float32, params)
    removed = jax.tree.map(lambda mask, w: (~mask).astype(w.dtype), masks, wide)

    # Of one block: its inverse F^-1 [k, k], its weights w [k], and q [k], 1 where a weight goes.
    def multipliers(inverse: Array, w: Array, q: Array) -> Array:
        """Return the Lagrange multipliers `(E'F^-1 E)^-1 w_Q` at the entries of Q, else zero."""
        # Rows and columns out of Q become those of I: then shapes do not depend on the masks.
        system = jnp.outer(q, q) * inverse + jnp.diag(1 - q)
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system, lower=True), q * w)

    def corrected(inverse: Array, w: Array, q: Array) -> Array:
        # w + dw; the factor 1 - q makes the zeros of Q exact
        return (1 - q) * (w - inverse @ multipliers(inverse, w, q))

    def increase(inverse: Array, w: Array, q: Array) -> Array:
        return w * q * multipliers(inverse, w, q) / 2

    weights = map_inverse_blocks(corrected, window, damping, block_size, wide, removed)
    increases = map_inverse_blocks(increase, window, damping, block_size, wide, removed)
    weights = jax.tree.map(lambda w, x: x.astype(w.dtype), params, weights)
    return weights, jnp.asarray(optax.tree.sum(increases))


def prune(
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    sparsity: float,
    *,
    window_size: int = 64,
    damping: float = 1e-5,
    block_size: int = 128,
    recomputations: int = 1,
    pattern: Pattern | None = None,
    masks: Masks | None = None,
) -> Pruned:
    """Prune by optimal brain surgeon with M-FAC's Fisher: score, remove, correct, in rounds.

    Before each round gradients are collected at the current params; the gradients of removed
    weights count as zero. The density goes down to `1 - sparsity` by the same ratio in every round.

    Args:
      objective: the `curvax.Objective` of training.
      params: the trained parameters.
      batches: an iterable of `(inputs, targets)` with at least `window_size` items for every round.
      sparsity: the share of the prunable weights to remove in all, in [0, 1).
      window_size: the number of gradients in each round's Fisher.
      damping: a positive number, in units of an eigenvalue of the Fisher.
      block_size: the number of entries in a block of the Fisher.
      recomputations: the number of rounds; the published code takes 16.
      pattern: `unstructured()` (the default), `n_of_m(2, 4)` or `whole()`.
      masks: the masks of an earlier pruning, whose removed weights stay removed.

    Returns:
      A `Pruned`.

    Raises:
      ValueError: the sparsity is not in [0, 1), the stream ends too early, or `fisher_window` or
        the pattern raise it.

    Cost: for each round `window_size` gradients and `(m k + k^2) d` multiplications.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import pruning
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jax.random.normal(jax.random.key(0), (64, 1, 4))
      >>> params = jnp.array([[1.0], [0.01], [2.0], [0.02]])
      >>> batches = [(row, jnp.zeros((1, 1))) for row in x]
      >>> pruning.prune(objective, params, batches, sparsity=0.5).masks.ravel().tolist()
      [True, False, True, False]

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, https://arxiv.org/abs/2107.03356,
      section 4; their code for defaults.

    Deviates: the correction is exact for all of a block's weights that go together; the published
      code adds up the corrections for single weights.
    """
    check_params(params)
    check_damping(damping)
    check_count(1, recomputations=recomputations)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}.")
    pattern = unstructured() if pattern is None else pattern
    if masks is None:
        masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    stream, total_increase = iter(batches), jnp.zeros([])
    for step in range(1, recomputations + 1):
        window = fisher_window(objective, params, stream, window_size)
        # the density after this round: (1 - sparsity)^(step / rounds)
        target = 1 - (1 - sparsity) ** (step / recomputations)
        params, masks, increase = _round(
            params, masks, window, damping, target, block_size, pattern
        )
        total_increase = total_increase + increase
    return Pruned(params, masks, total_increase)


def apply_masks(params: Params, masks: Masks) -> Params:
    """Set the removed weights to zero."""
    return jax.tree.map(lambda w, mask: jnp.where(mask, w, 0), params, masks)


def keep_pruned(masks: Masks) -> optax.GradientTransformation:
    """Leave removed weights alone; as the last of a chain it keeps them zero in fine-tuning.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax.apps import pruning
      >>> masks = {"w": jnp.array([True, False])}
      >>> tx = optax.chain(optax.adam(1e-3), pruning.keep_pruned(masks))
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.zeros(2)}))
      >>> updates["w"].tolist()[1]
      0.0
    """
    return optax.stateless(lambda updates, params: apply_masks(updates, masks))


def density(masks: Masks, prunable: Prunable = kernels) -> float:
    """Return the share of prunable weights that stay."""
    prunable_masks = [mask for path, mask in by_path(masks).items() if prunable(path, mask)]
    size = sum(mask.size for mask in prunable_masks)
    share: float = float(sum(map(jnp.sum, prunable_masks))) / max(size, 1)
    return share


@functools.partial(jax.jit, static_argnums=(5, 6))
def _round(
    params: Params,
    masks: Masks,
    window: Window,
    damping: Any,
    sparsity: Any,
    block_size: int,
    pattern: Pattern,
) -> tuple[Params, Masks, Array]:
    """Score, remove and correct once, with the Fisher of a window of gradients."""
    # Removed weights do not come back: F has no curvature but the damping there.
    rows = jax.tree.map(lambda g, mask: g * mask, window.rows, masks)
    window = window._replace(rows=rows)
    scores = surgeon(params, window, damping, block_size=block_size)
    masks = pattern(scores, masks, sparsity)
    params, increase = remove(params, masks, window, damping, block_size=block_size)
    return params, masks, increase


def _rank_last(scores: Array, mask: Array) -> Array:
    """Put entries that are removed already below all others."""
    return jnp.where(mask, scores, -jnp.inf)


def _ranks(x: Float[Array, "... n"]) -> Array:
    """Rank entries along the last axis from 0, the lowest; of equal ones the first is lower."""
    return jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1)


def _map_leaves(
    fn: Callable[[str, Array, Array], Array],
    scores: Params,
    masks: Masks,
) -> Masks:
    """Apply `fn(path, scores, mask) -> mask` to every leaf."""
    check_like(masks, scores, "masks", "scores")

    def with_text(path: Any, x: Array, mask: Array) -> Array:
        return fn(jax.tree_util.keystr(path), x, mask)

    return jax.tree.map_with_path(with_text, scores, masks)
