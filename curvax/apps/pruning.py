"""Pruning: scores of weights, patterns of what is removed, and the correction of what stays (optimal brain surgeon)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from curvax._checks import check_count, check_damping, check_like, check_params
from curvax._types import Batch, Params, at_least_float32
from curvax.estimate import empirical_fisher_diagonal
from curvax.objective import Objective
from curvax.products import hvp
from curvax.solve import Window, fisher_window, inverse_diagonal, map_inverse_blocks

Masks: TypeAlias = PyTree[Bool[Array, "..."]]
"""A tree like params: True where a weight stays."""

Pattern: TypeAlias = Callable[[Params, Masks, Any], Masks]
"""`(scores, masks, sparsity) -> masks`: keep the weights of high score, among those that are still there."""

Prunable: TypeAlias = Callable[[str, Array], bool]
"""`(path, leaf) -> whether weights of this leaf may be removed`."""


class Pruned(NamedTuple):
    """A pruned model.

    Attributes:
      params: zero where a weight was removed, and corrected elsewhere.
      masks: True where a weight stays.
      increase: of the loss, as the quadratic model predicts it, summed over the rounds.
    """

    params: Params
    masks: Masks
    increase: Float[Array, ""]


def kernels(path: str, leaf: Array) -> bool:
    """Leaves of two or more axes: kernels, not biases or scales."""
    del path
    return leaf.ndim >= 2


# Scores: trees like params; the lowest are removed first.


def magnitude(params: Params) -> Params:
    """Score by `w^2`."""
    return jax.tree.map(lambda w: at_least_float32(w) ** 2, params)


def diagonal_fisher(objective: Objective, params: Params, batch: Batch) -> Params:
    """Score by `F_qq w_q^2 / 2`, with the diagonal of the empirical Fisher (LeCun, Denker and Solla, 1990)."""
    diagonal = empirical_fisher_diagonal(objective, params, batch)
    return jax.tree.map(lambda w, f: f * at_least_float32(w) ** 2 / 2, params, diagonal)


def surgeon(
    params: Params, window: Window, damping: Any, *, block_size: int | None = 128
) -> Params:
    """Score by `w_q^2 / (2 [F^-1]_qq)`, the increase of the loss if q goes and the others make up for it.

    With F the damped Fisher of a window of gradients, in blocks of `block_size` entries (None: without blocks).

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.apps import pruning
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0], [0.0, 0.0]]))  # F = 0.5 + diag(2, 0)
      >>> [round(x, 6) for x in pruning.surgeon(jnp.array([2.0, 2.0]), window, 0.5).tolist()]
      [5.0, 1.0]

    References: Hassibi and Stork (1992), Optimal brain surgeon; Frantar, Kurtic and Alistarh (2021), M-FAC, section 4.
    """
    diagonal = inverse_diagonal(window, damping, block_size=block_size)
    return jax.tree.map(lambda w, f: at_least_float32(w) ** 2 / (2 * f), params, diagonal)


def apoptosis(objective: Objective, params: Params, batch: Batch) -> Params:
    """Score by `|w_q (H w)_q|`, with all cross terms: `sum_q w_q (H w)_q = w'Hw`. One product with the Hessian.

    References: Sun et al. (2025), Optimal Brain Apoptosis, the variant with one Hessian-vector product.
    """
    products = hvp(objective.value, params, batch)(params)
    return jax.tree.map(
        lambda w, h: jnp.abs(at_least_float32(w) * at_least_float32(h)), params, products
    )


# Patterns: what may be removed together.


@functools.cache
def unstructured(prunable: Prunable = kernels) -> Pattern:
    """Remove single weights, the lowest scores of all prunable leaves together."""

    def pattern(scores: Params, masks: Masks, sparsity: Any) -> Masks:
        chosen = [x for path, x in _paths(scores) if prunable(path, x)]
        total = sum(x.size for x in chosen)
        still = [
            m
            for (path, x), m in zip(_paths(scores), jax.tree.leaves(masks), strict=True)
            if prunable(path, x)
        ]
        present = [
            jnp.where(m, x, -jnp.inf).ravel() for x, m in zip(chosen, still, strict=True)
        ]  # what is gone goes first
        flat = _ranks(jnp.concatenate(present) if present else jnp.zeros(0)) >= jnp.round(
            sparsity * total
        )
        parts = iter(
            jnp.split(flat, list(itertools.accumulate(x.size for x in chosen))[:-1])
            if chosen
            else []
        )
        keep = lambda path, x, m: next(parts).reshape(x.shape) & m if prunable(path, x) else m
        return _map(keep, scores, masks)

    return pattern


def n_of_m(n: int, m: int, axis: int = -2, prunable: Prunable = kernels) -> Pattern:
    """Keep n of every m consecutive weights along an axis (2 of 4 for sparse tensor cores); sparsity follows, 1 - n/m.

    Args:
      n: weights that stay of each group.
      m: weights in a group.
      axis: of the leaf; -2 is the input axis of Flax's kernels.
      prunable: which leaves.

    Raises:
      ValueError: an axis whose length m does not divide, by path; n outside [1, m].
    """
    check_count(1, n=n, m=m)
    if n > m:
        raise ValueError(f"n must be at most m, got {n} of {m}.")

    def own(path: str, x: Array, mask: Array) -> Array:
        if not prunable(path, x):
            return mask
        if x.shape[axis] % m:
            raise ValueError(
                f"{m} does not divide axis {axis} of {path}, which has {x.shape[axis]} entries."
            )
        groups = jnp.moveaxis(jnp.where(mask, x, -jnp.inf), axis, -1)
        split = groups.reshape(*groups.shape[:-1], -1, m)
        return jnp.moveaxis((_ranks(split) >= m - n).reshape(groups.shape), -1, axis) & mask

    return lambda scores, masks, sparsity: _map(own, scores, masks)


def whole(axis: int = -1, prunable: Prunable = kernels) -> Pattern:
    """Remove whole slices of an axis (-1: output units of Flax's kernels), the lowest sums of scores leaf by leaf."""

    def pattern(scores: Params, masks: Masks, sparsity: Any) -> Masks:
        def own(path: str, x: Array, mask: Array) -> Array:
            if not prunable(path, x):
                return mask
            others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
            alive, sums = jnp.any(mask, axis=others), jnp.sum(jnp.where(mask, x, 0), axis=others)
            keep = _ranks(jnp.where(alive, sums, -jnp.inf)) >= jnp.round(sparsity * len(sums))
            return jnp.expand_dims(keep, others) & mask

        return _map(own, scores, masks)

    return pattern


def remove(
    params: Params, masks: Masks, window: Window, damping: Any, *, block_size: int = 128
) -> tuple[Params, Float[Array, ""]]:
    """Set weights to zero and correct the others so that the loss grows least.

    With Q the weights where `masks` is False, and F the damped Fisher in blocks of `block_size` entries, exactly for the
    whole set: `dw = -F^-1 E (E'F^-1 E)^-1 w_Q`, where E selects Q; the quadratic model grows by
    `w_Q' (E'F^-1 E)^-1 w_Q / 2`.

    Args:
      params: pytree of float arrays.
      masks: True where a weight stays.
      window: of gradients at params.
      damping: positive.
      block_size: k.

    Returns:
      the corrected params, and the increase that the quadratic model predicts.

    Cost: two decompositions of `[k, k]` for every block: `d k^2` multiplications.

    Example: the second weight makes up for the first, with which it is correlated.
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.apps import pruning
      >>> window = curvax.solve.window_of(jnp.array([[1.0, 1.0]]))                # F = 1 + [[1, 1], [1, 1]]
      >>> params, increase = pruning.remove(jnp.array([1.0, 1.0]), jnp.array([False, True]), window, 1.0)
      >>> [round(x, 6) for x in params.tolist()], round(float(increase), 6)
      ([0.0, 1.5], 0.75)

    References: Hassibi and Stork (1992); Singh and Alistarh (2020), WoodFisher, for groups.
    """
    check_like(masks, params, "masks", "params")
    wide = jax.tree.map(lambda w: at_least_float32(w), params)
    gone = jax.tree.map(lambda m, w: (~m).astype(w.dtype), masks, wide)

    def multipliers(
        inverse: Array, w: Array, q: Array
    ) -> Array:  # (E'F^-1 E)^-1 w_Q, and zero elsewhere
        system = jnp.outer(q, q) * inverse + jnp.diag(1 - q)
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system, lower=True), q * w)

    corrected = lambda inverse, w, q: (1 - q) * (w - inverse @ multipliers(inverse, w, q))
    increase = lambda inverse, w, q: w * q * multipliers(inverse, w, q) / 2
    apply = lambda fn: map_inverse_blocks(fn, window, damping, block_size, wide, gone)
    rest = jax.tree.map(lambda w, x: x.astype(w.dtype), params, apply(corrected))
    return rest, jnp.asarray(optax.tree.sum(apply(increase)))


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
    """Prune by optimal brain surgeon with M-FAC's Fisher: score, remove, correct; in several rounds if asked.

    Before each round gradients are collected at the params as they are; of removed weights they count as zero. Density
    goes from what it is to `1 - sparsity` in equal ratios.

    Args:
      objective: a `curvax.Objective`.
      params: trained.
      batches: iterable of `(inputs, targets)`, at least `window_size` for every round.
      sparsity: share of the prunable weights to remove in all, in [0, 1).
      window_size: gradients in each round's Fisher.
      damping: positive.
      block_size: entries of a block of the Fisher.
      recomputations: rounds; the published code takes 16.
      pattern: `unstructured()` (default), `n_of_m(2, 4)`, `whole()`.
      masks: of an earlier pruning: what is gone stays gone.

    Returns:
      `Pruned`.

    Raises:
      ValueError: a sparsity outside [0, 1); a stream that ends; what `fisher_window` and the pattern raise.

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

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, section 4; their code for defaults.

    Deviates: the correction is exact for all of a block's weights that go together; the published code adds up those of
      single weights.
    """
    check_params(params)
    check_damping(damping)
    check_count(1, recomputations=recomputations)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}.")
    pattern = unstructured() if pattern is None else pattern
    held = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params) if masks is None else masks
    stream, increase = iter(batches), jnp.zeros([])
    for step in range(1, recomputations + 1):
        window = fisher_window(objective, params, stream, window_size)
        target = 1 - (1 - sparsity) ** (step / recomputations)
        params, held, grown = _round(params, held, window, damping, target, block_size, pattern)
        increase = increase + grown
    return Pruned(params, held, increase)


def apply_masks(params: Params, masks: Masks) -> Params:
    """Set what is removed to zero."""
    return jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, masks)


def keep_pruned(masks: Masks) -> optax.GradientTransformation:
    """Leave removed weights alone: last in a chain, it keeps them zero in fine-tuning.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from curvax.apps import pruning
      >>> masks = {"w": jnp.array([True, False])}
      >>> tx = optax.chain(optax.adam(1e-3), pruning.keep_pruned(masks))
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.zeros(2)}))
      >>> updates["w"].tolist()[1]
      0.0
    """
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, m: jnp.where(m, u, 0), updates, masks)
    )


def density(masks: Masks, prunable: Prunable = kernels) -> float:
    """Return the share of prunable weights that stay."""
    chosen = [m for path, m in _paths(masks) if prunable(path, m)]
    return float(sum(jnp.sum(m) for m in chosen)) / max(sum(m.size for m in chosen), 1)


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
    own = window._replace(rows=jax.tree.map(lambda g, m: g * m, window.rows, masks))
    masks = pattern(surgeon(params, own, damping, block_size=block_size), masks, sparsity)
    params, grown = remove(params, masks, own, damping, block_size=block_size)
    return params, masks, grown


def _ranks(x: Float[Array, "... n"]) -> Array:
    """Place of each entry in ascending order of the last axis; of equal ones, the first is lower."""
    return jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1)


def _paths(tree: PyTree) -> list[tuple[str, Array]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree)]


def _map(fn: Callable[[str, Array, Array], Array], scores: Params, masks: Masks) -> Masks:
    check_like(masks, scores, "masks", "scores")
    return jax.tree.map_with_path(
        lambda path, x, m: fn(jax.tree_util.keystr(path), x, m), scores, masks
    )
