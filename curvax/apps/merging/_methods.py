"""Which curvature a merge is weighted by, as choices of a layout."""

from __future__ import annotations

import dataclasses

from curvax._checks import look_up
from curvax.kron import Layout


def merge_layout(layout: Layout, method: str) -> Layout:
    """Return a layout whose factors weigh the models of `merge` by the curvature of a method.

    A layout says what curvature is measured, so that one fit serves all methods,
    `curvax.kron.fit_factors(objective, merge_layout(layout, method), params, batches, key)`:

      "average":   F = I for all leaves;
      "fisher":    the diagonal of the Fisher for all leaves;
      "regmean":   A x I, the second moment of the inputs of a layer at all positions, with the 1 of
                   its bias; leaves in no block are averaged;
      "subspace":  A x G, and for leaves in no block what the layout says of them, the diagonal
                   ("diagonal") or the average ("identity").

    Args:
      layout: the `Layout` of `curvax.kron_layout(objective, params, batch)`.
      method: one of the names above.

    Returns:
      A `Layout` of the same leaves, for `fit_factors` and for `merge`.

    Raises:
      ValueError: the method is unknown.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> layout = curvax.kron_layout(objective, jnp.zeros((2, 3)), (jnp.eye(2), jnp.zeros((2, 3))))
      >>> curvax.apps.merging.merge_layout(layout, "regmean").blocks[0].structures
      ('full', 'identity')

    References: Matena and Raffel (2022), Merging models with Fisher-weighted averaging,
      https://arxiv.org/abs/2111.09832; Jin et al. (2023), Dataless knowledge fusion by merging
      weights of language models, https://arxiv.org/abs/2212.09849 (RegMean); Tam, Bansal and Raffel
      (2024), Merging by matching models in task parameter subspaces,
      https://arxiv.org/abs/2312.04339. Of these the authors' code of the last was read.

    Deviates: in RegMean biases are averaged, and off-diagonal entries of A are scaled by about 0.9.
      Here a bias is the weight of an input that is 1, and A is as it is; the Grams of
      `curvax.kron.input_factors` leave biases to the average.
    """
    edit = look_up("method", method, METHODS)
    return edit(layout)


def _average(layout: Layout) -> Layout:
    return _without_blocks(layout, "identity")


def _fisher(layout: Layout) -> Layout:
    return _without_blocks(layout, "diagonal")


def _regmean(layout: Layout) -> Layout:
    """Replace G by the identity, take A over all positions, and average what is in no block."""
    blocks = []
    for block in layout.blocks:
        grams = dataclasses.replace(block, g_structure="identity", positions="all")
        blocks.append(grams)
    leaves = []
    for leaf in layout.leaves:
        # Of a leaf that lies in blocks in part, it is the remaining entries that are averaged.
        if leaf.kind != "kron":
            leaf = dataclasses.replace(leaf, kind="identity")
        elif leaf.outside is not None:
            leaf = dataclasses.replace(leaf, unmatched="identity")
        leaves.append(leaf)
    return Layout(tuple(blocks), tuple(leaves))


def _subspace(layout: Layout) -> Layout:
    return layout


def _without_blocks(layout: Layout, kind: str) -> Layout:
    """Give all leaves one kind, and dissolve all blocks."""
    leaves = []
    for leaf in layout.leaves:
        alone = dataclasses.replace(leaf, kind=kind, unmatched=None, reason="by choice")
        leaves.append(alone)
    return Layout((), tuple(leaves))


METHODS = {
    "average": _average,
    "fisher": _fisher,
    "regmean": _regmean,
    "subspace": _subspace,
}
"""What a layout becomes for each method."""
