"""Losses made of losses: a weighted sum over named heads, and a mask over positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._checks import describe
from curvax._trees import safe_divide
from curvax._types import PRNGKey, Scalar
from curvax.losses._loss import Loss, as_loss, by_head, from_function, times

Heads = dict[str, Any]
"""Outputs, targets or vectors, by the name of the head."""

Weights = Float[Array, " positions"]


def weighted_sum(heads: Mapping[str, tuple[Any, Any]]) -> Loss:
    """Add the losses of several heads, `L = sum_h w_h L_h`, each a mean over its own terms.

    Args:
      heads: `{name: (weight, loss)}`; a weight is a number or scalar array, at least 0.

    Returns:
      A `Loss` for outputs and targets that are dicts with the names of the heads. Its curvature is
      block-diagonal over heads, its pseudo-gradient `sqrt(w_h) r_h` with independent draws.

    Raises:
      ValueError: there is no head, a weight is negative, or outputs or targets have other names
        than the heads.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.weighted_sum({
      ...     "label": (1.0, curvax.losses.softmax_cross_entropy()),
      ...     "box": (0.5, curvax.losses.squared_error()),
      ... })
      >>> outputs = {"label": jnp.zeros((3, 2)), "box": jnp.zeros((3, 4))}
      >>> targets = {"label": jnp.zeros(3, int), "box": jnp.ones((3, 4))}
      >>> round(loss(outputs, targets).item(), 4)                         # log 2 + 0.5 * 2
      1.6931
    """
    if not heads:
        raise ValueError("weighted_sum needs at least one head: {name: (weight, loss)}.")
    for name, (weight, _) in heads.items():
        # Arrays may be traced and are not looked at; `not >=` also refuses NaN.
        if isinstance(weight, int | float) and not weight >= 0:
            raise ValueError(f"the weight of head {name!r} must be at least 0, got {weight}.")
    parts = tuple((name, weight, as_loss(loss)) for name, (weight, loss) in heads.items())

    def check(outputs: Heads, targets: Heads) -> None:
        for what, tree in (("outputs", outputs), ("targets", targets)):
            names = sorted(tree) if isinstance(tree, Mapping) else describe(tree)
            if names != sorted(heads):
                raise ValueError(f"weighted_sum needs {what} by head {sorted(heads)}, got {names}.")

    # L = sum_h w_h L_h
    def value(outputs: Heads, targets: Heads) -> Scalar:
        check(outputs, targets)
        total = sum(w * loss(outputs[name], targets[name]) for name, w, loss in parts)
        return jnp.asarray(total)

    # S v = (w_h S_h v_h)_h: no head's loss sees the outputs of another.
    def curvature_product(
        outputs: Heads,
        targets: Heads,
        v: Heads,
    ) -> Heads:
        """Multiply each head's vector by its curvature and weight."""
        check(outputs, targets)
        products = {}
        for name, w, loss in parts:
            product = loss.curvature_product(outputs[name], targets[name], v[name])
            products[name] = times(w, product)
        weighted: Heads = by_head(outputs, products)
        return weighted

    # Head i draws with the key `fold_in(key, i)`, so that heads are independent.
    def sample(
        key: PRNGKey,
        outputs: Heads,
        targets: Heads,
    ) -> Heads:
        check(outputs, targets)
        drawn = {}
        for i, (name, _, loss) in enumerate(parts):
            head_key = jax.random.fold_in(key, i)
            drawn[name] = loss.sample(head_key, outputs[name], targets[name])
        return drawn

    # r = (sqrt(w_h) r_h)_h has E[r r'] = blockdiag_h(w_h S_h), since the r_h have mean zero.
    def pseudo_gradient(
        key: PRNGKey,
        outputs: Heads,
        targets: Heads,
    ) -> Heads:
        """Draw each head's pseudo-gradient, scaled by the root of its weight."""
        check(outputs, targets)
        draws = {}
        for i, (name, w, loss) in enumerate(parts):
            head_key = jax.random.fold_in(key, i)
            r = loss.pseudo_gradient(head_key, outputs[name], targets[name])
            draws[name] = times(jnp.sqrt(w), r)
        r_by_head: Heads = by_head(outputs, draws)
        return r_by_head

    # The same root of the weight, at the targets of the data.
    def empirical_gradient(outputs: Heads, targets: Heads) -> Heads:
        check(outputs, targets)
        gradients = {}
        for name, w, loss in parts:
            r = loss.empirical_gradient(outputs[name], targets[name])
            gradients[name] = times(jnp.sqrt(w), r)
        r_by_head: Heads = by_head(outputs, gradients)
        return r_by_head

    sum_of_heads = from_function(
        value,
        curvature_product=curvature_product,
        sample=sample,
        pseudo_gradient=pseudo_gradient,
        empirical_gradient=empirical_gradient,
        couples_examples=any(loss.couples_examples for _, _, loss in parts),
    )
    return dataclasses.replace(sum_of_heads, heads=parts)


def masked(loss: Any) -> Loss:
    """Weight the positions of a loss by a mask that comes with the targets.

    Every position is a term: `L = sum_i m_i L_i / sum_i m_i`, where `L_i` is `loss` at the single
    position i. A position with m = 0 takes no part in value, curvature or sampling, whatever its
    outputs and targets hold (NaN included); fractional m are weights. A label that `loss` itself
    ignores still counts as a term here, of value 0: mask it too.

    Args:
      loss: a `Loss` (or what `as_loss` takes) that is defined on one position: outputs `[1, ...]`,
        targets `[1, ...]`.

    Returns:
      A `Loss` whose targets are `(targets, mask)`, with mask `[batch]` or `[batch, time]` (bool or
      nonnegative), and whose outputs and targets have the mask's axes first.

    Raises:
      ValueError: the loss compares examples with each other, or outputs or targets lack the mask's
        axes (at trace time).

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.masked(curvax.losses.squared_error())
      >>> f, y = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4)).at[:, 2].set(jnp.nan)
      >>> mask = jnp.array([[1, 1, 0], [1, 0, 0]])
      >>> loss(f, (y.at[1, 1].set(7.0), mask)).item()       # 1/2 * 4 at each of three positions
      2.0
    """
    inner = as_loss(loss)
    if inner.couples_examples:
        raise ValueError(
            "masked weighs single positions, and this loss compares the examples of a batch with "
            "each other: leave rows out of the batch, or set them apart in the model."
        )

    # Positions become rows, each a batch of one for `inner`. m: [positions] weights
    def read(outputs: PyTree, targets: PyTree) -> tuple[PyTree, PyTree, Weights]:
        """Return outputs and targets by row, with zeros where the mask is 0, and the weights."""
        y, mask = _check_mask(outputs, targets)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(outputs))
        m = jnp.asarray(mask, dtype).reshape(-1)

        # Zeros where m = 0: 0 * NaN would be NaN, in the value and in its derivatives.
        def rows(x: Array) -> Array:
            flat = jnp.asarray(x).reshape(m.size, 1, *x.shape[mask.ndim :])
            return jnp.where(_over_rows(m, flat) > 0, flat, jnp.zeros_like(flat))

        return jax.tree.map(rows, outputs), jax.tree.map(rows, y), m

    # m_i / sum_i m_i, the share of a position; where nothing counts, all shares are zero.
    def shares(m: Weights) -> Weights:
        return safe_divide(m, m.sum())

    def weighted_like(
        outputs: PyTree,
        m: Weights,
        rows: PyTree,
    ) -> PyTree:
        """Multiply row i by m_i, and give the rows the shapes of the outputs."""

        def weighted(row: Array, f: Array) -> Array:
            product = _over_rows(m, row) * row
            return product.astype(row.dtype).reshape(f.shape)

        return jax.tree.map(weighted, rows, outputs)

    def value(outputs: PyTree, targets: PyTree) -> Scalar:
        f, y, m = read(outputs, targets)
        return jnp.sum(shares(m) * jax.vmap(inner)(f, y))

    # S = blockdiag_i(share_i S_i)
    def curvature_product(
        outputs: PyTree,
        targets: PyTree,
        v: PyTree,
    ) -> PyTree:
        f, y, m = read(outputs, targets)
        u, _, _ = read(v, targets)
        products = jax.vmap(inner.curvature_product)(f, y, u)
        return weighted_like(outputs, shares(m), products)

    def draw(
        method: Callable[..., PyTree],
        key: PRNGKey,
        f: PyTree,
        y: PyTree,
    ) -> PyTree:
        # A key of its own for every position.
        num_positions = jax.tree.leaves(f)[0].shape[0]
        return jax.vmap(method)(jax.random.split(key, num_positions), f, y)

    def sample(
        key: PRNGKey,
        outputs: PyTree,
        targets: PyTree,
    ) -> PyTree:
        f, y, _ = read(outputs, targets)
        mask = targets[1]

        # [positions, 1, ...] to [*mask.shape, ...]
        def by_position(rows: Array) -> Array:
            return rows.reshape(*jnp.shape(mask), *rows.shape[2:])

        return jax.tree.map(by_position, draw(inner.sample, key, f, y)), mask

    # r = (sqrt(share_i) r_i)_i has E[r r'] = S.
    def pseudo_gradient(
        key: PRNGKey,
        outputs: PyTree,
        targets: PyTree,
    ) -> PyTree:
        f, y, m = read(outputs, targets)
        r = draw(inner.pseudo_gradient, key, f, y)
        return weighted_like(outputs, jnp.sqrt(shares(m)), r)

    def empirical_gradient(outputs: PyTree, targets: PyTree) -> PyTree:
        f, y, m = read(outputs, targets)
        r = jax.vmap(inner.empirical_gradient)(f, y)
        return weighted_like(outputs, jnp.sqrt(shares(m)), r)

    def num_terms(outputs: PyTree, targets: PyTree) -> Scalar:
        _, _, m = read(outputs, targets)
        return m.sum()

    def term_axes(outputs: PyTree, targets: PyTree) -> int:
        _, mask = _check_mask(outputs, targets)
        return mask.ndim

    # A position's block, or the blocks that `inner` has in it; for `inner` it is a batch of one.
    def block_axes(outputs: PyTree, targets: PyTree) -> int:
        f, y, _ = read(outputs, targets)
        position = jax.tree.map(lambda x: x[0], (f, y))
        return term_axes(outputs, targets) + inner.block_axes(*position) - 1

    return from_function(
        value,
        curvature_product=curvature_product,
        sample=sample,
        num_terms=num_terms,
        pseudo_gradient=pseudo_gradient,
        empirical_gradient=empirical_gradient,
        term_axes=term_axes,
        block_axes=block_axes,
    )


def _check_mask(outputs: PyTree, targets: PyTree) -> tuple[PyTree, Array]:
    """Return targets and mask, or raise unless outputs and targets have the mask's axes first."""
    if not isinstance(targets, tuple | list) or len(targets) != 2:
        raise TypeError(f"masked needs targets (targets, mask), got {describe(targets)}.")
    y, mask = targets[0], jnp.asarray(targets[1])
    for name, tree in (("outputs", outputs), ("targets", y)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if jnp.shape(leaf)[: mask.ndim] != mask.shape:
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} is {describe(leaf)}; "
                    f"its first axes must be those of the mask {describe(mask)}."
                )
    return y, mask


def _over_rows(m: Weights, rows: Array) -> Array:
    """Give a number for each row the number of axes that the rows have."""
    return m.reshape(-1, *(1,) * (rows.ndim - 1))
