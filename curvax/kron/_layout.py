"""The layout: which entries of params are in which Kronecker block, as static facts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.tree_util import keystr

from curvax._batch import check_batch
from curvax._checks import check_choice, check_params, is_masked
from curvax._types import Batch, Params
from curvax.capture import Kernel, UseKind, View, entry_numbers, find_kernels
from curvax.objective import Objective

T = TypeVar("T")

ByPath: TypeAlias = T | Mapping[str, T]
"""A choice for all leaves, or by path: the longest key with which a leaf's path begins counts; "" begins all."""

UNMATCHED = ("error", "diagonal", "identity")
SHARING = ("expand", "reduce")
STRUCTURES = ("full", "diagonal", "identity")


@dataclass(frozen=True)
class Block:
    """A stack of kernels whose curvature is a Kronecker product, `A x G` for every slice.

    Attributes:
      name: the leaves of its kernel; unique.
      kernel: view `[stack, in, out]` of leaves.
      bias: view `[stack, out]`, a further input that is 1, or None.
      members: the uses of the kernel.
      a_structure: structure of A, `[in (+ 1 with a bias)]` squared: "full", "diagonal" or "identity".
      g_structure: structure of G, `[out]` squared.
      sharing: how positions of one example are taken together: "expand" or "reduce".
    """

    name: str
    kernel: View
    bias: View | None
    members: tuple[UseKind, ...]
    a_structure: str
    g_structure: str
    sharing: str

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths of all leaves with entries in the block."""
        return tuple(dict.fromkeys((*self.kernel.leaves, *(self.bias.leaves if self.bias else ()))))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Stack, rows (inputs, and one more for a bias) and columns (outputs)."""
        stack, rows, columns = self.kernel.shape
        return stack, rows + (self.bias is not None), columns

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and G."""
        stack, rows, columns = self.shape
        side = lambda size, structure: (stack, size, size) if structure == "full" else (stack, size)
        return side(rows, self.a_structure), side(columns, self.g_structure)


@dataclass(frozen=True)
class Leaf:
    """One leaf of params.

    Attributes:
      path: as `jax.tree_util.keystr` prints it.
      shape: of the leaf.
      kind: "kron" if any of it is in a block, else "diagonal" or "identity".
      rest: for the entries of a "kron" leaf that are in no block, "diagonal" or "identity"; None if there are none.
      reason: why it is not, or not wholly, in a block.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    rest: str | None = None
    reason: str = ""

    @property
    def outside(self) -> str | None:
        """What is done with entries in no block; None if all are in one."""
        return self.rest if self.kind == "kron" else self.kind


@dataclass(frozen=True)
class Layout:
    """Static facts of Kronecker-factored curvature: hashable, with no arrays, programs or batch sizes inside.

    Attributes:
      blocks: the Kronecker blocks.
      leaves: all leaves of params, in order.
    """

    blocks: tuple[Block, ...]
    leaves: tuple[Leaf, ...]

    def __str__(self) -> str:
        """One line for each leaf, and what the factors take."""
        return _table(self)

    def labels(self, params: Params) -> Any:
        """Return a tree like params of the leaves' kinds, for `optax.partition`."""
        check_layout(self, params)
        return jax.tree.unflatten(jax.tree.structure(params), [leaf.kind for leaf in self.leaves])

    def edit(self, path: str, **changes: str) -> Layout:
        """Return a layout with other choices for the block (or leaf) of `path`.

        Args:
          path: a leaf, as printed.
          **changes: of a block `a_structure`, `g_structure` ("full", "diagonal", "identity") or `sharing` ("expand", "reduce");
            or `kind` ("diagonal", "identity"), which takes the leaf, and all that share a block with it, out of blocks.

        Raises:
          ValueError: a path or a choice that does not exist; the lists of those that do are in the message.
        """
        check_choice("path", path, dict.fromkeys(leaf.path for leaf in self.leaves))
        choices = {
            "a_structure": STRUCTURES,
            "g_structure": STRUCTURES,
            "sharing": SHARING,
            "kind": UNMATCHED[1:],
        }
        for name, value in changes.items():
            check_choice("change", name, choices)
            check_choice(name, value, dict.fromkeys(choices[name]))
        ours = [block for block in self.blocks if path in block.leaves]
        if "kind" in changes:
            if len(changes) > 1:
                raise ValueError(
                    f"kind takes {path} out of its block; {sorted(changes)} cannot be changed together with it."
                )
            gone = {path, *(other for block in ours for other in block.leaves)}
            blocks = tuple(block for block in self.blocks if not gone.intersection(block.leaves))
            if any(gone.intersection(block.leaves) for block in self.blocks if block not in ours):
                raise ValueError(
                    f"{path} shares leaves with several blocks; edit each of {[b.name for b in ours]}."
                )
            out = {
                p: dataclasses.replace(leaf, kind=changes["kind"], rest=None, reason="by choice")
                for p, leaf in _by_path(self)
            }
            return Layout(
                blocks, tuple(out[leaf.path] if leaf.path in gone else leaf for leaf in self.leaves)
            )
        if not ours:
            raise ValueError(
                f"{path} is in no block, so that only its kind can be changed, not {sorted(changes)}."
            )
        change = lambda block: dataclasses.replace(block, **changes) if block in ours else block
        return dataclasses.replace(self, blocks=tuple(map(change, self.blocks)))


def kron_layout(
    objective: Objective,
    params: Params,
    batch: Batch,
    unmatched: ByPath[str] = "diagonal",
    sharing: ByPath[str] = "expand",
    max_dim: ByPath[int] = 8192,
) -> Layout:
    """Find the Kronecker blocks of a model by following every leaf to the linear maps that it enters.

    A leaf (or a slice, a permutation, a concatenation of leaves) that is contracted with an input by a matrix product, a
    convolution or a lookup is the kernel of a block; what is added straight to the result is its bias. It does not matter
    which library made the model; `jit`, remat, `scan`, `cond` and `vmap` are looked into.

    Args:
      objective: a `curvax.Objective`.
      params: pytree of float arrays (or of `jax.ShapeDtypeStruct`).
      batch: `(inputs, targets)`, arrays or shapes; the layout holds for any batch size.
      unmatched: for leaves in no block: "diagonal", a diagonal Fisher; "identity", their gradient is left as it is;
        "error", raise and list them.
      sharing: for positions of one example (time, space): "expand", taken as independent, exact where every position has
        its own loss; "reduce", summed over first, exact where they are pooled before the loss.
      max_dim: sides longer than this get a diagonal factor.

      Each of the three may be a dict by path: the longest key with which a leaf's path begins counts, "" begins them all.
      For a block that is the longest among all its leaves.

    Returns:
      A `Layout`; print it. It can be changed with `layout.edit(path, ...)`.

    Raises:
      ValueError: `unmatched="error"` and leaves in no block, each with its reason; unknown choices or paths.
      TypeError: params that are not float.

    Cost: one trace of the model; no data is read and nothing is computed on a device.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) * p["scale"]
      >>> objective = curvax.Objective(model, curvax.losses.squared_error())
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3), "scale": jnp.ones(3)}
      >>> layout = curvax.kron_layout(objective, params, (jnp.ones((8, 4)), jnp.ones((8, 3))))
      >>> [(leaf.path, leaf.kind) for leaf in layout.leaves]
      [("['b']", 'kron'), ("['scale']", 'diagonal'), ("['w']", 'kron')]
      >>> layout.leaves[1].reason
      'enters `mul`'

    References: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature;
      Eschenhagen et al. (2023), Kronecker-factored approximate curvature for modern neural network architectures.
    """
    check_params(params)
    check_batch(batch)
    shapes = leaf_shapes(params)
    choose = {
        "unmatched": _by_path_choice("unmatched", unmatched, shapes, UNMATCHED),
        "sharing": _by_path_choice("sharing", sharing, shapes, SHARING),
        "max_dim": _by_path_choice("max_dim", max_dim, shapes, None),
    }
    kernels, reasons = find_kernels(objective, params, batch[0])
    names = unique_names(list(kernels))
    blocks = tuple(
        _block(name, kernel, choose) for name, kernel in zip(names, kernels, strict=True)
    )
    covered = _covered(blocks, shapes)
    leaves = tuple(_leaf(path, shapes, covered, reasons, choose["unmatched"]) for path in shapes)
    left = [leaf for leaf in leaves if leaf.outside == "error"]
    if left:
        lines = "\n".join(f"  {leaf.path} {list(leaf.shape)}: {leaf.reason}" for leaf in left)
        raise ValueError(
            f'leaves in no Kronecker block, with unmatched="error":\n{lines}\n'
            'Choose for them: unmatched="diagonal" or "identity", for all or in a dict by path.'
        )
    return Layout(blocks, leaves)


def leaf_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves, by path."""
    return {keystr(path): tuple(np.shape(x)) for path, x in jax.tree.leaves_with_path(params)}


def check_layout(layout: Layout, tree: Any, name: str = "params") -> None:
    """Raise unless `tree` has the leaves that the layout was made for, naming the first path that differs.

    Leaves that are masked out are let through.
    """
    mine, theirs = {leaf.path: leaf.shape for leaf in layout.leaves}, leaf_shapes(tree)
    for path in _masked(tree, mine):
        theirs[path] = mine[path]
    for path in (*mine, *theirs):
        if path not in theirs or path not in mine:
            there, absent = ("the layout", name) if path in mine else (name, "the layout")
            raise ValueError(
                f"the layout is of other params: {there} has a leaf {path}, {absent} has not."
            )
        if mine[path] != theirs[path]:
            raise ValueError(
                f"the layout is of other params: {path} is {list(mine[path])} there, in {name} {list(theirs[path])}."
            )


def present(layout: Layout, tree: Any) -> Layout:
    """Keep what of a layout lies wholly in leaves of `tree` that are not masked out."""
    gone = set(_masked(tree, [leaf.path for leaf in layout.leaves]))
    if not gone:
        return layout
    blocks = tuple(block for block in layout.blocks if not gone.intersection(block.leaves))
    for block in layout.blocks:
        here = [path for path in block.leaves if path not in gone]
        if block not in blocks and here:
            raise ValueError(
                f"a mask or partition separates {', '.join(here)} from {', '.join(gone.intersection(block.leaves))}, which "
                "are in one Kronecker block. Put them into one group, as layout.labels(params) does, or take them out of "
                f'blocks: layout.edit("{here[0]}", kind="diagonal").'
            )
    return Layout(blocks, tuple(leaf for leaf in layout.leaves if leaf.path not in gone))


def _masked(tree: Any, paths: Iterable[str]) -> list[str]:
    nodes = [
        keystr(path)
        for path, x in jax.tree.leaves_with_path(tree, is_leaf=is_masked)
        if is_masked(x)
    ]
    return [path for path in paths if any(path.startswith(node) for node in nodes)]


def _by_path(layout: Layout) -> list[tuple[str, Leaf]]:
    return [(leaf.path, leaf) for leaf in layout.leaves]


def _by_path_choice(
    name: str, choice: Any, shapes: Mapping[str, Any], allowed: Sequence[Any] | None
) -> Mapping[str, tuple[str, Any]]:
    """Resolve a choice for every path: the key that counts, and the choice."""
    given = choice if isinstance(choice, Mapping) else {"": choice}
    defaults = {"unmatched": "diagonal", "sharing": "expand", "max_dim": 8192}
    for key, value in given.items():
        if not any(path.startswith(key) for path in shapes):
            raise ValueError(
                f"{name}: no leaf's path begins with {key!r}; the paths are {', '.join(shapes)}."
            )
        if allowed is not None:
            check_choice(name, value, dict.fromkeys(allowed))
        elif not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    keys = sorted(given, key=len, reverse=True)
    return {
        path: next(((k, given[k]) for k in keys if path.startswith(k)), ("", defaults[name]))
        for path in shapes
    }


def unique_names(kernels: Sequence[Kernel]) -> list[str]:
    """Name kernels by their views, with a number where two have the same text."""
    texts = [str(kernel.view) for kernel in kernels]
    return [
        text if texts[:i].count(text) == 0 else f"{text} #{texts[:i].count(text) + 1}"
        for i, text in enumerate(texts)
    ]


def _block(name: str, kernel: Kernel, choose: Mapping[str, Mapping[str, tuple[str, Any]]]) -> Block:
    leaves = (*kernel.view.leaves, *(kernel.bias.leaves if kernel.bias else ()))
    chosen = lambda what: max(
        (choose[what][path] for path in leaves), key=lambda pair: len(pair[0])
    )[1]
    _, rows, columns = kernel.view.shape
    longest = chosen("max_dim")
    side = lambda size: "full" if size <= longest else "diagonal"
    only_lookups = all(member.kind == "lookup" and not member.transposed for member in kernel.uses)
    return Block(
        name=name,
        kernel=kernel.view,
        bias=kernel.bias,
        members=kernel.uses,
        a_structure="diagonal" if only_lookups else side(rows + (kernel.bias is not None)),
        g_structure=side(columns),
        sharing=chosen("sharing"),
    )


def _covered(blocks: Sequence[Block], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Count the entries of every leaf that are in blocks."""
    covered = dict.fromkeys(shapes, 0)
    for block in blocks:
        for view in (block.kernel, block.bias):
            if view is None:
                continue
            sizes = {path: math.prod(shapes[path]) for path in view.leaves}
            if math.prod(view.shape) == sum(sizes.values()):
                counts = sizes
            else:
                ends = np.cumsum(list(sizes.values()))
                which = np.searchsorted(
                    ends, entry_numbers(view, {p: shapes[p] for p in sizes}).ravel(), side="right"
                )
                counts = dict(
                    zip(sizes, np.bincount(which, minlength=len(ends)).tolist(), strict=True)
                )
            for path, count in counts.items():
                covered[path] += count
    return covered


def _leaf(
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    covered: Mapping[str, int],
    reasons: Mapping[str, str],
    unmatched: Mapping[str, tuple[str, str]],
) -> Leaf:
    _, choice = unmatched[path]
    shape, size = shapes[path], math.prod(shapes[path])
    if covered[path] == 0:
        return Leaf(path, shape, choice, None, reasons.get(path, "does not influence the outputs"))
    if covered[path] == size:
        return Leaf(path, shape, "kron")
    return Leaf(
        path,
        shape,
        "kron",
        choice,
        f"{size - covered[path]} of {size} entries are in no linear map",
    )


def _table(layout: Layout) -> str:
    head = ("leaf", "shape", "block", "A x G", "stack", "uses", "factors", "note")
    rows = [head, *(_row(layout, leaf) for leaf in layout.leaves)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = sum(_floats(block) for block in layout.blocks)
    total += sum(math.prod(leaf.shape) for leaf in layout.leaves if leaf.outside == "diagonal")
    return "\n".join(
        [
            *lines,
            f"{len(layout.blocks)} block{'s' * (len(layout.blocks) != 1)}, factors of {_memory(total)} in float32",
        ]
    )


def _row(layout: Layout, leaf: Leaf) -> tuple[str, ...]:
    blocks = [block for block in layout.blocks if leaf.path in block.leaves]
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    if not blocks:
        floats = math.prod(leaf.shape) if leaf.kind == "diagonal" else 0
        return (
            leaf.path,
            shape,
            leaf.kind,
            "",
            "",
            "",
            _memory(floats) if floats else "",
            leaf.reason,
        )
    rest = [f"{leaf.reason}: {leaf.rest}"] if leaf.reason else []
    own = [
        block for block in blocks if block.leaves[0] == leaf.path
    ]  # a block is shown once, with its first leaf
    others = [block for block in blocks if block not in own]
    role = lambda block: "part of" if leaf.path in block.kernel.leaves else "bias of"
    notes = [block.name for block in own if block.name != leaf.path]
    notes += [block.sharing for block in own if block.sharing != "expand"]
    notes += [f"{role(block)} {block.leaves[0]}" for block in others]
    listed = lambda texts: ", ".join(dict.fromkeys(texts))
    return (
        leaf.path,
        shape,
        "kron",
        listed(f"{b.a_structure} {b.shape[1]} x {b.g_structure} {b.shape[2]}" for b in own),
        listed(str(block.shape[0]) for block in own if block.shape[0] > 1),
        str(sum(len(block.members) for block in own)) if own else "",
        _memory(sum(map(_floats, own))) if own else "",
        "; ".join(dict.fromkeys(notes + rest)),
    )


def _floats(block: Block) -> int:
    pairs = 1 + any(member.transposed for member in block.members)
    return pairs * sum(math.prod(shape) for shape in block.factor_shapes)


def _memory(floats: int) -> str:
    size = 4.0 * floats
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
