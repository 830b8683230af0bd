"""The terms of a loss in the axes of its outputs: products and signs term by term.

Which entries of the outputs belong to one term is what `Loss.term_axes` says: a label of a sequence
has an entry for every class, an example of a regression one for every component.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._types import Outputs, PRNGKey, Targets
from curvax.losses._loss import Loss, TermAxes, by_head

GROUPS = {"example": "all terms of an example together", "term": "each term by itself"}
"""Of what the empirical Fisher takes outer products."""

Samples: TypeAlias = PyTree[Float[Array, "samples batch ..."]]


def outer_products_by_term(
    loss: Loss,
    targets: Targets,
    r: Samples,
    u: Outputs,
) -> Outputs:
    """Apply `1/K sum_k blockdiag_n(r_kn r_kn')` to u, with a block for every term n.

    Args:
      loss: it says where its terms are.
      targets: those of the outputs, with their `Shared` parts unwrapped.
      r: K cotangents of the outputs, a tree like u with an axis of K before the others.
      u: a vector in the space of outputs.
    """
    return _outer_products_of_heads(loss, targets, r, u, lambda head: head.term_axes)


def outer_products_by_block(
    loss: Loss,
    targets: Targets,
    r: Samples,
    u: Outputs,
) -> Outputs:
    """Apply `1/K sum_k blockdiag_n(r_kn r_kn')` to u, with a block n for each of the curvature.

    Of pseudo-gradients r it has the mean that `1/K sum_k r_k r_k'` has, the curvature itself, and
    less variance, since what it leaves out has the mean zero. Arguments as
    `outer_products_by_term`.
    """
    return _outer_products_of_heads(loss, targets, r, u, lambda head: head.block_axes)


def _outer_products_of_heads(
    loss: Loss,
    targets: Targets,
    r: Samples,
    u: Outputs,
    axes_of: Callable[[Loss], TermAxes],
) -> Outputs:
    """Apply the outer products of r, with `axes_of` a head telling its blocks apart, to u."""
    if not loss.heads:
        return outer_products(r, u, axes_of(loss)(u, targets))
    # A term is of one head: other heads' entries for the same example are other terms.
    products = {}
    for name, _, head in loss.heads:
        of_head = targets[name], r[name], u[name]
        products[name] = _outer_products_of_heads(head, *of_head, axes_of)
    return by_head(u, products)


# r: a tree of [k, *term, ...] samples, u: a tree of [*term, ...]; n: all terms
def outer_products(
    r: Samples,
    u: Outputs,
    num_axes: int,
) -> Outputs:
    """Apply `1/K sum_k blockdiag_n(r_kn r_kn')` to u, with n on the first `num_axes` axes of u.

    Products are in at least float32, as r is; the result has the dtypes of u.
    """

    # Sums over axes and no reshapes: the axes of terms may be sharded.
    # r_kn . u_n: [k, *term], over all outputs of a term together.
    def dots_of(x: Array, y: Array) -> Array:
        entries = tuple(range(1 + num_axes, x.ndim))
        return jnp.sum(x * y.astype(x.dtype), axis=entries)

    pairs = zip(jax.tree.leaves(r), jax.tree.leaves(u), strict=True)
    r_dot_u = jnp.asarray(sum(dots_of(x, y) for x, y in pairs))

    # 1/K sum_k r_kn (r_kn . u_n)
    def product(x: Array, y: Array) -> Array:
        entries = tuple(range(1 + num_axes, x.ndim))
        return jnp.mean(jnp.expand_dims(r_dot_u, entries) * x, axis=0).astype(y.dtype)

    products: Outputs = jax.tree.map(product, r, u)
    return products


def apart_by_term(
    loss: Loss,
    r: Outputs,
    targets: Targets,
) -> Outputs:
    """Set the terms of a cotangent apart: `[terms, ...]` on a new axis, each zero elsewhere."""
    if loss.heads:
        # One head after another, with zeros in the others.
        parts = []
        for name, _, head in loss.heads:
            of_head = apart_by_term(head, r[name], targets[name])
            num_terms = jax.tree.leaves(of_head)[0].shape[0]
            part = {other: _zeros(num_terms, r[other]) for other, _, _ in loss.heads}
            parts.append(by_head(r, {**part, name: of_head}))
        return jax.tree.map(lambda *of_heads: jnp.concatenate(of_heads), *parts)
    num_axes = loss.term_axes(r, targets)

    def leaf_apart(x: Array) -> Array:
        num_terms = math.prod(x.shape[:num_axes])
        rows = x.reshape(num_terms, -1)
        diagonal = jnp.eye(num_terms, dtype=x.dtype)[..., None] * rows
        return diagonal.reshape(num_terms, *x.shape)

    return jax.tree.map(leaf_apart, r)


def _zeros(
    number: int,
    tree: Outputs,
) -> Outputs:
    return jax.tree.map(lambda x: jnp.zeros((number, *x.shape), x.dtype), tree)


def signs_by_term(
    loss: Loss,
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
) -> Outputs:
    """Draw 1 or -1 for every term, on all of its entries: a tree like outputs.

    With such signs s, `E[(s * r)(s * r)'] = blockdiag_n(r_n r_n')`: products of different terms
    have mean zero.
    """
    if loss.heads:
        signs = {}
        for i, (name, _, head) in enumerate(loss.heads):
            head_key = jax.random.fold_in(key, i)
            signs[name] = signs_by_term(head, head_key, outputs[name], targets[name])
        return by_head(outputs, signs)
    num_axes = loss.term_axes(outputs, targets)
    first = jax.tree.leaves(outputs)[0]
    by_term = jax.random.rademacher(key, first.shape[:num_axes], jnp.int8)

    def on_entries(x: Array) -> Array:
        column = by_term.reshape(*by_term.shape, *(1,) * (x.ndim - num_axes))
        return jnp.broadcast_to(column, x.shape).astype(x.dtype)

    return jax.tree.map(on_entries, outputs)
