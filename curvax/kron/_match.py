"""Which leaf of a tree is which leaf of a layout, whatever the containers call them.

A layout names leaves by their paths. Between `init` and `update` frameworks change the containers
and with them the paths: `nnx.Optimizer` shows one `['w'].value`, the other `['w']`. So the text of
a path is for people, and leaves are matched as follows.

1. By the keys in their paths, whatever container prints them: `.w`, `['w']` and `['w'].value` are
   the same. Then leaves may come in another order, and a part that is masked out stands for all
   leaves below it.
2. Where no key path agrees, by their order, and by their shapes.

What agrees in part is neither: a leaf that only one of the two has is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.tree_util import keystr

from curvax._checks import is_masked

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes of a layout's leaves by path, in order."""


class Match(NamedTuple):
    """A leaf of a tree, or a part of it that is masked out.

    Attributes:
      names: the paths in the layout that it stands for: of a leaf one, of a masked part any number.
      leaf: the array, or an `optax.MaskedNode`.
    """

    names: Sequence[str]
    leaf: Any


def match_leaves(shapes: Shapes, tree: Any, name: str) -> list[Match]:
    """Match every leaf and masked part of a tree, in the tree's order, with leaves of a layout.

    Args:
      shapes: the layout's leaves.
      tree: a tree like params; parts of it may be masked out.
      name: what an error calls the tree.

    Raises:
      ValueError: one of the two has a leaf that the other has not, or of another shape.
    """
    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_masked)
    paths = [keystr(path) for path, _ in nodes]
    leaves = [x for _, x in nodes]
    names = _by_keys(shapes, paths, leaves)
    # No leaf has a name of the layout: all are renamed, and keep their order.
    if not any(names):
        names = _by_order(shapes, leaves) or names
    matches = [Match(*pair) for pair in zip(names, leaves, strict=True)]
    _check(shapes, paths, matches, name)
    return matches


def _by_keys(shapes: Shapes, paths: Sequence[str], leaves: Sequence[Any]) -> list[list[str]]:
    """Return for every leaf of a tree the leaves of the layout whose keys it has."""
    names: list[list[str]] = [[] for _ in paths]
    # The usual case, where nothing has changed.
    if paths == list(shapes):
        return [[path] for path in paths]
    number_at = {path_keys(path): number for number, path in enumerate(paths)}
    for path in shapes:
        keys = path_keys(path)
        # The leaf itself, or a masked part that it lies in: one at a beginning of its keys.
        for length in range(len(keys), -1, -1):
            number = number_at.get(keys[:length])
            if number is not None and (length == len(keys) or is_masked(leaves[number])):
                names[number].append(path)
                break
    return names


def _by_order(shapes: Shapes, leaves: Sequence[Any]) -> list[list[str]] | None:
    """Return for every leaf of a tree the one in its place in the layout; None if none is."""
    if len(leaves) == len(shapes):
        return [[path] for path in shapes]
    # Masked parts stand for none of the leaves, in a layout without those that are masked out.
    if sum(not is_masked(x) for x in leaves) == len(shapes):
        unused = iter(shapes)
        return [[] if is_masked(x) else [next(unused)] for x in leaves]
    return None


def path_keys(path: str) -> tuple[str, ...]:
    """Return the keys in a path, without the marks of the containers that they are of."""
    # A final `.value` is that of a box around an array, such as `nnx.Param`.
    words = re.split(r"[\[\]'\"./]+", path.removesuffix(".value"))
    return tuple(filter(None, words))


def _check(shapes: Shapes, paths: Sequence[str], matches: Sequence[Match], name: str) -> None:
    """Raise at the first leaf that is missing, too much, or of another shape."""
    matched = {path for match in matches for path in match.names}
    for path in shapes:
        if path not in matched:
            raise ValueError(
                f"the layout is of other params: the layout has a leaf {path}, {name} has not."
            )
    for here, match in zip(paths, matches, strict=True):
        if is_masked(match.leaf):
            continue
        if not match.names:
            raise ValueError(
                f"the layout is of other params: {name} has a leaf {here}, the layout has not."
            )
        (there,) = match.names
        shape = np.shape(match.leaf)
        if shape != shapes[there]:
            renamed = f", at {here}" if here != there else ""
            raise ValueError(
                f"the layout is of other params: {there} is {list(shapes[there])} there, in {name} "
                f"{list(shape)}{renamed}."
            )
