"""Losses made of losses: a weighted sum over named heads, and a mask over positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._checks import describe
from curvax._types import PRNGKey, Scalar
from curvax.losses._loss import Loss, as_loss, from_function, times


def weighted_sum(heads: Mapping[str, tuple[Any, Any]]) -> Loss:
    """Add the losses of several heads, `L = sum_h w_h L_h`, each a mean over its own terms.

    Args:
      heads: `{name: (weight, loss)}`; a weight is a number or scalar array, at least 0.

    Returns:
      A `Loss` for outputs and targets that are dicts with the names of the heads. Its curvature is block-diagonal over
      heads, its pseudo-gradient `sqrt(w_h) r_h` with independent draws.

    Raises:
      ValueError: no head, a negative weight, or outputs or targets whose names are not those of the heads.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.weighted_sum({
      ...     "label": (1.0, curvax.losses.softmax_cross_entropy()),
      ...     "box": (0.5, curvax.losses.squared_error()),
      ... })
      >>> outputs = {"label": jnp.zeros((3, 2)), "box": jnp.zeros((3, 4))}
      >>> round(loss(outputs, {"label": jnp.zeros(3, int), "box": jnp.ones((3, 4))}).item(), 4)   # log 2 + 0.5 * 2
      1.6931
    """
    if not heads:
        raise ValueError("weighted_sum needs at least one head: {name: (weight, loss)}.")
    for name, (weight, _) in heads.items():
        if isinstance(weight, int | float) and not weight >= 0:
            raise ValueError(f"the weight of head {name!r} must be at least 0, got {weight}.")
    parts = tuple((name, weight, as_loss(loss)) for name, (weight, loss) in heads.items())

    def check(outputs: Any, targets: Any) -> None:
        for what, tree in (("outputs", outputs), ("targets", targets)):
            names = sorted(tree) if isinstance(tree, Mapping) else describe(tree)
            if names != sorted(heads):
                raise ValueError(f"weighted_sum needs {what} by head {sorted(heads)}, got {names}.")

    def like(outputs: Any, by_name: dict[str, Any]) -> dict[str, Any]:
        """Put the parts into a container of the outputs' own kind."""
        is_head = lambda x: x is not outputs
        container: dict[str, Any] = jax.tree.map_with_path(
            lambda path, _: by_name[path[0].key], outputs, is_leaf=is_head
        )
        return container

    def value(outputs: dict[str, Any], targets: dict[str, Any]) -> Scalar:
        check(outputs, targets)
        return jnp.asarray(sum(w * loss(outputs[name], targets[name]) for name, w, loss in parts))

    def curvature_product(
        outputs: dict[str, Any], targets: dict[str, Any], v: dict[str, Any]
    ) -> dict[str, Any]:
        check(outputs, targets)
        return like(
            outputs,
            {
                name: times(w, loss.curvature_product(outputs[name], targets[name], v[name]))
                for name, w, loss in parts
            },
        )

    def sample(key: PRNGKey, outputs: dict[str, Any], targets: dict[str, Any]) -> dict[str, Any]:
        check(outputs, targets)
        return {
            name: loss.sample(jax.random.fold_in(key, i), outputs[name], targets[name])
            for i, (name, _, loss) in enumerate(parts)
        }

    def pseudo_gradient(
        key: PRNGKey, outputs: dict[str, Any], targets: dict[str, Any]
    ) -> dict[str, Any]:
        check(outputs, targets)
        draw = lambda i, name, loss: loss.pseudo_gradient(
            jax.random.fold_in(key, i), outputs[name], targets[name]
        )
        return like(
            outputs,
            {
                name: times(jnp.sqrt(w), draw(i, name, loss))
                for i, (name, w, loss) in enumerate(parts)
            },
        )

    whole = from_function(
        value, curvature_product=curvature_product, sample=sample, pseudo_gradient=pseudo_gradient
    )
    return dataclasses.replace(whole, heads=parts)


def masked(loss: Any) -> Loss:
    """Weight the positions of a loss by a mask that comes with the targets: every position is a term.

    `L = sum_i m_i L_i / sum_i m_i`, where `L_i` is `loss` at the single position i. A position with m = 0 takes no part in
    value, curvature or sampling, whatever its outputs and targets hold (NaN included); fractional m are weights. A label
    that `loss` itself ignores still counts as a term here, of value 0: mask it too.

    Args:
      loss: a `Loss` (or what `as_loss` takes) that is defined on one position: outputs `[1, ...]`, targets `[1, ...]`.

    Returns:
      A `Loss` whose targets are `(targets, mask)`, with mask `[batch]` or `[batch, time]` (bool or nonnegative), and
      whose outputs and targets have the mask's axes first.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.masked(curvax.losses.squared_error())
      >>> f, y = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4)).at[:, 2].set(jnp.nan)
      >>> mask = jnp.array([[1, 1, 0], [1, 0, 0]])
      >>> loss(f, (y.at[1, 1].set(7.0), mask)).item()                     # 1/2 * 4 at each of three positions
      2.0
    """
    inner = as_loss(loss)

    # Positions become rows; each is a batch of one for `inner`. weights: [positions]
    def read(outputs: PyTree, targets: PyTree) -> tuple[PyTree, PyTree, Float[Array, " positions"]]:
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
        weights = jnp.asarray(
            mask, jnp.result_type(jnp.float32, *jax.tree.leaves(outputs))
        ).reshape(-1)

        def rows(x: Array) -> Array:
            flat = jnp.asarray(x).reshape(weights.size, 1, *x.shape[mask.ndim :])
            on = weights.reshape(-1, *(1,) * (flat.ndim - 1)) > 0
            return jnp.where(on, flat, jnp.zeros_like(flat))

        return jax.tree.map(rows, outputs), jax.tree.map(rows, y), weights

    like = lambda rows, outputs: jax.tree.map(lambda r, f: r.reshape(f.shape), rows, outputs)
    by_row = lambda weights, rows: jax.tree.map(
        lambda r: (weights.reshape(-1, *(1,) * (r.ndim - 1)) * r).astype(r.dtype), rows
    )
    shares = lambda weights: (
        weights / jnp.where(weights.sum() > 0, weights.sum(), 1)
    )  # nothing counts: all zero

    def value(outputs: PyTree, targets: PyTree) -> Scalar:
        f, y, weights = read(outputs, targets)
        return jnp.sum(shares(weights) * jax.vmap(inner)(f, y))

    def curvature_product(outputs: PyTree, targets: PyTree, v: PyTree) -> PyTree:
        f, y, weights = read(outputs, targets)
        u, _, _ = read(v, targets)
        return like(by_row(shares(weights), jax.vmap(inner.curvature_product)(f, y, u)), outputs)

    def draw(key: PRNGKey, f: PyTree, y: PyTree, method: Any) -> PyTree:
        keys = jax.random.split(key, jax.tree.leaves(f)[0].shape[0])
        return jax.vmap(method)(keys, f, y)

    def sample(key: PRNGKey, outputs: PyTree, targets: PyTree) -> PyTree:
        f, y, _ = read(outputs, targets)
        drawn = draw(key, f, y, inner.sample)
        lead = jnp.shape(targets[1])
        return jax.tree.map(lambda d: d.reshape(*lead, *d.shape[2:]), drawn), targets[1]

    def pseudo_gradient(key: PRNGKey, outputs: PyTree, targets: PyTree) -> PyTree:
        f, y, weights = read(outputs, targets)
        r = draw(key, f, y, inner.pseudo_gradient)
        return like(by_row(jnp.sqrt(shares(weights)), r), outputs)

    def num_terms(outputs: PyTree, targets: PyTree) -> Scalar:
        return read(outputs, targets)[2].sum()

    return from_function(
        value,
        curvature_product=curvature_product,
        sample=sample,
        num_terms=num_terms,
        pseudo_gradient=pseudo_gradient,
    )
