"""The layout: which entries of params are in which Kronecker block, as static facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr
from jaxtyping import Array, Bool, Float

from curvax._checks import check_choice, is_masked
from curvax._types import Params
from curvax.capture import UseKind, View, entry_numbers
from curvax.kron._kron_factor import STRUCTURES
from curvax.kron._layout_table import layout_table
from curvax.kron._match import Match, match_leaves

UNMATCHED = ("error", "diagonal", "identity")
OVER_TIME = ("time_symmetric", "time_infinite")
SHARING = ("expand", "reduce", *OVER_TIME)
POSITIONS = ("active", "all")
TWO_PRODUCTS = ("balanced", "exact")
CHANGES = {
    "a_structure": tuple(STRUCTURES),
    "g_structure": tuple(STRUCTURES),
    "sharing": SHARING,
    "positions": POSITIONS,
    "two_products": TWO_PRODUCTS,
    # A leaf that is taken out of its block by choice is no error.
    "kind": UNMATCHED[1:],
}
"""What `Layout.edit` changes, with the choices."""


@dataclass(frozen=True)
class Block:
    """A stack of kernels whose curvature is a Kronecker product, `A x G` for every slice.

    A kernel is `[in, out]`, and the block multiplies it as `V -> A V G`. The papers have
    `W [out, in]`, and so `W -> G W A`.

    Attributes:
      name: the leaves of its kernel; unique.
      kernel: view `[stack, in, out]` of leaves.
      bias: view `[stack, out]`, a further input that is 1, or None.
      uses: where the kernel enters linear maps.
      a_structure: structure of A, which has `in` (+ 1 with a bias) rows: "full", "diagonal" or
        "identity".
      g_structure: structure of G, which has `out` rows.
      sharing: how positions of one example are taken together: "expand", "reduce",
        "time_symmetric" or "time_infinite".
      two_products: what becomes of the sum of two Kronecker products that a kernel has which is
        used transposed too, or in two parts of an objective: "balanced", approximated by one;
        "exact", inverted as it is.
      positions: which positions A is a mean over: "active", those with a cotangent that is not
        zero; "all".
      parts: for an objective of several parts, what the uses are in each part that has any, by the
        name of the part; together they are `uses`.
      is_penalized: whether a penalty on params is a part of the objective.
      is_lookup: whether all uses look rows up, as those of a table of embeddings do that is not the
        head too.
      notes: how the matrix was read, where its uses do not say it: in layouts for gradients alone.
    """

    name: str
    kernel: View
    bias: View | None
    uses: tuple[UseKind, ...]
    a_structure: str
    g_structure: str
    sharing: str
    two_products: str = "balanced"
    positions: str = "active"
    parts: tuple[tuple[str, tuple[UseKind, ...]], ...] = ()
    is_penalized: bool = False
    is_lookup: bool = False
    notes: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths of all leaves with entries in the block."""
        # A leaf that holds kernel and bias in one array counts once.
        return tuple(dict.fromkeys((*self.kernel.leaves, *(self.bias.leaves if self.bias else ()))))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Stack, rows (inputs, and one more for a bias) and columns (outputs)."""
        stack, rows, columns = self.kernel.shape
        # A bias is the weight of one more input, 1: Martens and Grosse (2015), section 2.
        return stack, rows + (self.bias is not None), columns

    @property
    def is_joined(self) -> bool:
        """Whether the stack is of slices of several blocks."""
        return False

    @property
    def fill(self) -> Float[np.ndarray, " s"]:
        """Which share of the entries of every slice there is: all, but where slices are padded."""
        return np.ones(self.shape[0])

    def matrix(self, leaves: Mapping[str, Any]) -> Float[Array, "s i o"]:
        """Read the kernel, with its bias as a last row, out of leaves by path."""
        kernel: Array = self.kernel.read(leaves)
        if self.bias is None:
            return kernel
        # V = [kernel; bias], as inputs are [a; 1]: Martens and Grosse (2015), section 2.
        bias = self.bias.read(leaves)[:, None]
        return jnp.concatenate([kernel, bias], axis=1)

    def sent(self, matrix: Float[Array, "s i o"]) -> Float[Array, "s i o"]:
        """Send a matrix to where it is multiplied: here, but where a placement says otherwise."""
        return matrix

    def returned(self, product: Float[Array, "s i o"]) -> Float[Array, "s i o"]:
        """Bring a product back from there."""
        return product

    @property
    def structures(self) -> tuple[str, str]:
        """Structures of A and G."""
        return self.a_structure, self.g_structure

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the arrays in which A and G accumulate."""
        stack, rows, columns = self.shape
        a_structure, g_structure = (STRUCTURES[name] for name in self.structures)
        return a_structure.moment_shape(stack, rows), g_structure.moment_shape(stack, columns)

    @property
    def has_transposed_uses(self) -> bool:
        """Whether some use multiplies by the kernel's transpose."""
        return any(use.transposed for use in self.uses)

    @property
    def num_products(self) -> int:
        """How many Kronecker products the curvature of the block is the sum of."""
        # In each part one of the uses as they are, and one of the transposed ones.
        uses_by_part = [uses for _, uses in self.parts] or [self.uses]
        return sum(len({use.transposed for use in uses}) for uses in uses_by_part)

    @property
    def has_second_product(self) -> bool:
        """Whether factors of two products are accumulated, and not of one."""
        return self.has_transposed_uses or self.two_products == "exact"

    @property
    def is_over_time(self) -> bool:
        """Whether positions are times, and the moments of a time with the next are measured."""
        return self.sharing in OVER_TIME

    @property
    def is_one_product(self) -> bool:
        """Whether the curvature of the block is inverted as one Kronecker product."""
        return self.two_products == "balanced" and not self.is_over_time

    def of_part(self, name: str) -> Block | None:
        """Return the block as one part of an objective has it; None if it has no use there."""
        uses = dict(self.parts).get(name)
        if uses is None:
            return None
        return dataclasses.replace(
            self, uses=uses, parts=(), two_products="balanced", is_lookup=are_lookups(uses)
        )


def are_lookups(uses: Sequence[UseKind]) -> bool:
    """Tell whether all uses of a kernel look up its rows, by one-hot inputs."""
    # The cotangent of a transposed lookup is one-hot, and its input is not.
    return all(use.kind == "lookup" and not use.transposed for use in uses)


@dataclass(frozen=True)
class Leaf:
    """One leaf of params.

    Attributes:
      path: as `jax.tree_util.keystr` prints it.
      shape: shape of the leaf.
      kind: "kron" if any of it is in a block, else "diagonal" or "identity".
      unmatched: for the entries of a "kron" leaf that are in no block, "diagonal" or "identity";
        None if there are none.
      reason: why it is not, or not wholly, in a block.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    unmatched: str | None = None
    reason: str = ""

    @property
    def outside(self) -> str | None:
        """What is done with entries in no block; None if all are in one."""
        return self.unmatched if self.kind == "kron" else self.kind


@dataclass(frozen=True)
class Layout:
    """Static facts of Kronecker-factored curvature.

    A layout is hashable, and holds no arrays, programs or batch sizes.

    Attributes:
      blocks: the Kronecker blocks.
      leaves: all leaves of params, in order.
    """

    blocks: tuple[Block, ...]
    leaves: tuple[Leaf, ...]

    def __str__(self) -> str:
        """One line for each leaf, and what the factors take."""
        return layout_table(self)

    def labels(self, params: Params) -> Any:
        """Return a tree like params of the leaves' kinds, for `optax.partition`."""
        kinds = {leaf.path: leaf.kind for leaf in self.leaves}
        ordered = [kinds[path] for path in named_leaves(self, params)]
        return jax.tree.unflatten(jax.tree.structure(params), ordered)

    def uncovered(self, path: str) -> Bool[np.ndarray, "..."]:
        """Return which entries of a leaf are in no block."""
        return self._uncovered[path]

    @cached_property
    def _uncovered(self) -> dict[str, np.ndarray]:
        """For every leaf which entries are in no block, from the numbers of entries in views."""
        # In NumPy: what is cached under a trace of JAX would be its tracers, and leak.
        shapes = {leaf.path: leaf.shape for leaf in self.leaves}
        # Only leaves that lie in blocks in part need their entries numbered.
        masks = {}
        for leaf in self.leaves:
            if leaf.kind != "kron" or leaf.unmatched is None:
                masks[leaf.path] = np.broadcast_to(leaf.kind != "kron", leaf.shape)
                continue
            mask = np.ones(leaf.shape, bool)
            for block in self.blocks:
                for view in filter(None, (block.kernel, block.bias)):
                    if leaf.path in view.leaves:
                        # The leaf comes first, so that numbers below its size are its own.
                        others = {path: shapes[path] for path in view.leaves}
                        numbers = entry_numbers(view, {leaf.path: leaf.shape} | others)
                        mask.ravel()[numbers[numbers < mask.size]] = False
            masks[leaf.path] = mask
        return masks

    def of_part(self, name: str) -> Layout:
        """Return the layout of one part of an objective: the blocks with a use there."""
        if not all(block.parts for block in self.blocks):
            raise ValueError(
                "the layout is of an objective without parts. Make it for the total: "
                "curvax.kron_layout(objective, params, batch)."
            )
        blocks = (block.of_part(name) for block in self.blocks)
        return Layout(tuple(block for block in blocks if block is not None), self.leaves)

    def edit(self, path: str, **changes: str) -> Layout:
        """Return a layout with other choices for the block (or leaf) of `path`.

        Args:
          path: the leaf's path, as the printed layout shows it.
          **changes: of a block `a_structure`, `g_structure` ("full", "diagonal", "identity"),
            `sharing` ("expand", "reduce", and for a recurrent kernel "time_symmetric",
            "time_infinite"), `positions` ("active", "all"), or `two_products` ("balanced", "exact")
            where the kernel is used transposed too, or in two parts of the objective, see
            `curvax.kron_inverse`; or `kind` ("diagonal", "identity"), which takes the leaf, and all
            that share a block with it, out of blocks.

        Raises:
          ValueError: the path or the choice does not exist; the message lists those that do. Or the
            block cannot be over time: the message says why.
        """
        check_choice("path", path, dict.fromkeys(leaf.path for leaf in self.leaves))
        for name, value in changes.items():
            check_choice("change", name, CHANGES)
            check_choice(name, value, dict.fromkeys(CHANGES[name]))
        # All blocks with an entry of the leaf change; of several, `kind` cannot take out one alone.
        edited = [block for block in self.blocks if path in block.leaves]
        if "kind" in changes:
            if len(changes) > 1:
                raise ValueError(
                    f"kind takes {path} out of its block; {sorted(changes)} cannot be changed "
                    "together with it."
                )
            return self._without(path, edited, changes["kind"])
        if not edited:
            raise ValueError(
                f"{path} is in no block, so that only its kind can be changed, not "
                f"{sorted(changes)}."
            )
        for block in edited:
            if changes.get("two_products") == "exact" and block.num_products != 2:
                raise ValueError(
                    f"the curvature of {block.name} is the sum of {block.num_products} Kronecker "
                    "product(s), one for each part of the objective that uses it, and one more if "
                    'it is used transposed: two_products="exact" is for two.'
                )
        # Structures and sharing move no entry in or out of a block: the leaves stay as they are.
        choices: dict[str, Any] = dict(changes)
        blocks = [
            dataclasses.replace(block, **choices) if block in edited else block
            for block in self.blocks
        ]
        for block in blocks:
            check_over_time(block)
        return Layout(tuple(blocks), self.leaves)

    def _without(self, path: str, edited: list[Block], kind: str) -> Layout:
        """Take blocks out, and give another kind to all leaves that were in them."""
        # A block is one matrix: a leaf leaves it together with all others in it.
        removed = {path, *(other for block in edited for other in block.leaves)}
        blocks = tuple(block for block in self.blocks if not removed.intersection(block.leaves))
        # More blocks went than were meant, since a leaf of theirs went.
        if len(blocks) + len(edited) < len(self.blocks):
            raise ValueError(
                f"{path} shares leaves with several blocks; edit each of "
                f"{[block.name for block in edited]}."
            )
        leaves = [
            dataclasses.replace(leaf, kind=kind, unmatched=None, reason="by choice")
            if leaf.path in removed
            else leaf
            for leaf in self.leaves
        ]
        return Layout(blocks, tuple(leaves))


def check_over_time(block: Block) -> None:
    """Raise if positions of a block are to be times, and its statistics cannot be those of times.

    What the model's program says of the positions is checked where it is known, in `layout_plan`.
    """
    if not block.is_over_time:
        return
    reason = _no_times(block)
    if reason is not None:
        raise ValueError(
            f'sharing="{block.sharing}" is of kernels that are used at every time of a sequence: '
            f'{block.name} {reason}. Use sharing="expand" for it, '
            f'layout.edit("{block.leaves[0]}", sharing="expand").'
        )


def _no_times(block: Block) -> str | None:
    """Say why no moments between times are measured for a block; None if they are."""
    kinds = sorted({use.kind for use in block.uses if use.kind != "dot"})
    # One transition matrix on each side is the model: a second product would need a second pair.
    if not block.uses:
        return "is of a layout for gradients alone, which knows no positions"
    if block.parts or block.is_penalized:
        return "is of an objective of several parts"
    if block.has_second_product:
        return "has the curvature of two Kronecker products, of the kernel and of its transpose"
    if kinds:
        return f"is used by a {' and a '.join(kinds)}, and not by matrix products alone"
    # A_1 is no diagonal matrix where A_0 is, so that both have to be full.
    if block.structures != ("full", "full"):
        return f"has {block.a_structure} and {block.g_structure} factors, not two full ones"
    return None


def leaf_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the leaves, by path."""
    return {keystr(path): tuple(np.shape(x)) for path, x in jax.tree.leaves_with_path(params)}


def match_layout(layout: Layout, tree: Any, name: str = "params") -> list[Match]:
    """Match the leaves and masked parts of `tree` with the layout's leaves, as `match_leaves`."""
    return match_leaves({leaf.path: leaf.shape for leaf in layout.leaves}, tree, name)


def named_leaves(layout: Layout, tree: Any, name: str = "params") -> dict[str, Any]:
    """Return the leaves of `tree`, in its order, by their paths in the layout.

    Leaves that are masked out are missing. Raises as `match_leaves` does.
    """
    leaves = {}
    for match in match_layout(layout, tree, name):
        if not is_masked(match.leaf):
            (path,) = match.names
            leaves[path] = match.leaf
    return leaves


def check_layout(layout: Layout, tree: Any, name: str = "params") -> None:
    """Raise unless `tree` has the layout's leaves; those that are masked out may be missing."""
    match_layout(layout, tree, name)


def present(layout: Layout, tree: Any) -> Layout:
    """Drop the blocks and leaves that `optax.masked` or `optax.partition` removed from `tree`."""
    # A block is one matrix: it is kept or dropped as a whole.
    removed = {leaf.path for leaf in layout.leaves} - named_leaves(layout, tree).keys()
    if not removed:
        return layout
    blocks = tuple(block for block in layout.blocks if not removed.intersection(block.leaves))
    for block in layout.blocks:
        here = [path for path in block.leaves if path not in removed]
        if block not in blocks and here and block.is_joined:
            raise ValueError(
                f"a mask or partition removes {', '.join(removed.intersection(block.leaves))}, "
                f"which the placement joins with {', '.join(here)}. Make the placement, rule and "
                f'estimator of a layout without them: layout.edit("...", kind="identity").'
            )
        if block not in blocks and here:
            raise ValueError(
                f"a mask or partition separates {', '.join(here)} from "
                f"{', '.join(removed.intersection(block.leaves))}, which are in one Kronecker "
                "block. Put them into one group, as layout.labels(params) does, or take them out "
                f'of blocks: layout.edit("{here[0]}", kind="diagonal").'
            )
    return Layout(blocks, tuple(leaf for leaf in layout.leaves if leaf.path not in removed))


def parts_of_equal_work(layout: Layout, number: int) -> list[Layout]:
    """Divide the blocks into parts of equal work: the next largest goes to the smallest part."""
    # Graham (1969): by this rule the largest part is at most 4/3 of what is possible.
    parts: list[list[Block]] = [[] for _ in range(number)]
    for block in sorted(layout.blocks, key=_work, reverse=True):
        least = min(parts, key=lambda part: sum(map(_work, part)))
        least.append(block)
    return [Layout(tuple(part), layout.leaves) for part in parts if part]


def _work(block: Block) -> int:
    """Return the multiplications of an inversion, `s (i^3 + o^3)`."""
    stack, inputs, outputs = block.shape
    return stack * (inputs**3 + outputs**3)
