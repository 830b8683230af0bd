"""A layout from shapes: which matrix a leaf is, by the roles of its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from curvax._checks import check_count, check_params
from curvax._types import Params
from curvax.capture._views import View, leaf_view, reshape, transpose
from curvax.kron._build_layout import structure_of
from curvax.kron._choices import ByPath, Choice, Shapes, by_key, by_path, check_positive
from curvax.kron._gradient_layout import tiled
from curvax.kron._layout import Block, Layout, Leaf, leaf_shapes

ROLES = {"s": "stack", "i": "input", "o": "output"}
"""What an axis of a leaf may be, by its letter, in the order of the axes of a matrix."""

UNCHOSEN = object()
"""Stands for leaves whose axes are read from the shape."""


class Reading(NamedTuple):
    """What a leaf is read as.

    Attributes:
      axes: one letter for each of its axes; None if it is no matrix.
      reason: what says so.
    """

    axes: str | None
    reason: str


def matrix_layout(
    params: Params,
    axes: ByPath[str | None] | None = None,
    max_dim: ByPath[int] = 8192,
    block_size: int | None = None,
) -> Layout:
    """Make a layout of the matrices of params from shapes alone, without an objective.

    It serves optimizers that need gradients only. What a leaf's axes are, a letter for each says:
    `s` stack (layers of a scan, experts, members of an ensemble), `i` input, `o` output. The matrix
    is `[stack, in, out]`, with the axes of one role joined in their order. Without a word of yours,

      two axes are "io", three or more "iio", "iiio" and so on (convolutions, height x width x
      inputs x outputs); scalars and vectors are no matrices.

    A shape does not tell everything: a stack of layers, a projection with heads, and a table of
    embeddings look like a convolution or a matrix. Biases of stacked layers, `[layers, out]`, look
    like a matrix too. Print the layout, and correct it with `axes`; or let
    `curvax.kron_layout(objective, params, batch)` find the matrices that the model uses.

    Args:
      params: pytree of float arrays (or of `jax.ShapeDtypeStruct`).
      axes: what the axes of leaves are, by beginnings of paths (the longest counts, "" begins all):
        "sio" for a stack of layers, "iiio" for a convolution, "ioo" for a projection to heads
        `[in, heads, size]`, "iio" for one from heads `[heads, size, out]`, "sioo" for a stack of
        those; None for no matrix, for instance for embeddings. Where the path goes on behind the
        beginning, leaves with another number of axes are no matrices. Without `axes` all are read
        from their shapes.
      max_dim: factors with more rows than this are diagonal; may be a dict by path, too.
      block_size: longest side of a tile, see `curvax.kron.tiled`; None for no tiles.

    Returns:
      A `Layout`, whose table says how each matrix was read. Leaves that are no matrices have kind
      "diagonal". It has no uses: K-FAC cannot do with it.

    Raises:
      ValueError: a path or a letter does not exist; letters and axes differ in number, or there is
        no "i" or no "o" among them; no leaf is a matrix.
      TypeError: params are not float; axes are not text.

    Cost: static work alone.

    Example: a scan over layers with a projection to heads, and a norm.
      >>> import jax.numpy as jnp, curvax
      >>> layers = {"q": jnp.ones((6, 8, 2, 4)), "norm": jnp.ones((6, 8))}
      >>> params = {"layers": layers, "head": jnp.ones((8, 3))}
      >>> layout = curvax.kron.matrix_layout(params, axes={"['layers']": "sioo"})
      >>> {block.name: block.shape for block in layout.blocks}
      {"['head']": (1, 8, 3), "['layers']['q']": (6, 8, 8)}
      >>> layout.leaves[1].reason
      'as chosen: sioo is for 4 axes'
    """
    layout = layout_of_shapes(params, axes, max_dim, block_size)
    _check_any(layout.leaves)
    return layout


def layout_of_shapes(
    params: Params,
    axes: ByPath[str | None] | None = None,
    max_dim: ByPath[int] = 8192,
    block_size: int | None = None,
) -> Layout:
    """Do as `matrix_layout`, for a group of params without any matrix too."""
    check_params(params)
    if block_size is not None:
        check_count(1, block_size=block_size)
    shapes = leaf_shapes(params)
    # Where a mask takes every leaf out there is nothing to choose.
    if not shapes:
        return Layout((), ())
    largest = by_key("max_dim", max_dim, shapes)
    check_positive("max_dim", largest)
    max_dims = by_path(largest, shapes, 8192)
    blocks, leaves = [], []
    for path, reading in _readings(axes, shapes).items():
        shape = shapes[path]
        leaves.append(_leaf(path, shape, reading))
        if reading.axes is not None:
            view = matrix_view(path, shape, reading.axes)
            blocks.append(_block(path, view, reading.reason, max_dims[path].value, block_size))
    layout = Layout(tuple(blocks), tuple(leaves))
    return layout if block_size is None else tiled(layout, block_size)


def matrix_view(path: str, shape: tuple[int, ...], axes: str) -> View:
    """View a leaf as `[stack, in, out]`, by one letter for each of its axes."""
    # Axes of one role are neighbours then, in the order that they have in the leaf.
    order = [k for role in ROLES for k, letter in enumerate(axes) if letter == role]
    sizes = dict.fromkeys(ROLES, 1)
    for size, letter in zip(shape, axes, strict=True):
        sizes[letter] *= size
    return reshape(transpose(leaf_view(path, shape), tuple(order)), tuple(sizes.values()))


def _leaf(path: str, shape: tuple[int, ...], reading: Reading) -> Leaf:
    if reading.axes is None:
        return Leaf(path=path, shape=shape, kind="diagonal", reason=reading.reason)
    return Leaf(path=path, shape=shape, kind="kron")


def _block(path: str, view: View, note: str, max_dim: int, block_size: int | None) -> Block:
    """Make a block of a matrix that nothing is known of but its shape."""
    _, rows, columns = view.shape

    # A side that will be cut has factors of the size of a tile.
    def structure(size: int) -> str:
        return structure_of(size if block_size is None else min(size, block_size), max_dim)

    return Block(
        name=path,
        kernel=view,
        bias=None,
        uses=(),
        a_structure=structure(rows),
        g_structure=structure(columns),
        sharing="expand",
        notes=(note,),
    )


# -- what axes are -----------------------------------------------------------------------------


def _readings(axes: Any, shapes: Shapes) -> dict[str, Reading]:
    """Say for every leaf what its axes are, by choice or by its shape."""
    choices = {} if axes is None else by_key("axes", axes, shapes)
    for value in choices.values():
        _check_letters(value)
    chosen = by_path(choices, shapes, UNCHOSEN)
    _check_lengths(choices, chosen, shapes)
    readings = {}
    for path, shape in shapes.items():
        value = chosen[path].value
        reading = _from_shape(shape) if value is UNCHOSEN else _as_chosen(value, shape)
        # A factor with no rows has no inverse.
        if math.prod(shape) == 0:
            reading = Reading(None, "has no entries")
        readings[path] = reading
    return readings


def _from_shape(shape: tuple[int, ...]) -> Reading:
    """Read a leaf's axes from their number."""
    if len(shape) < 2:
        return Reading(None, "a vector" if shape else "a scalar")
    # Convolutions of all frameworks for JAX are [..., in, out].
    letters = "i" * (len(shape) - 1) + "o"
    return Reading(letters, f"read from its shape as {letters}")


def _as_chosen(letters: str | None, shape: tuple[int, ...]) -> Reading:
    """Read a leaf's axes as chosen, if the choice is for as many axes."""
    if letters is None:
        return Reading(None, "as chosen: no matrix")
    if len(letters) != len(shape):
        return Reading(None, f"as chosen: {letters} is for {len(letters)} axes")
    return Reading(letters, f"as chosen: {letters}")


def _check_letters(letters: Any) -> None:
    """Raise unless a choice is None, or letters that make a matrix."""
    if letters is None:
        return
    if not isinstance(letters, str):
        raise TypeError(
            f'axes must be text with one letter for each axis, such as "sio", or None for no '
            f"matrix; got {letters!r}."
        )
    listed = ", ".join(f"{letter} ({role})" for letter, role in ROLES.items())
    for letter in letters:
        if letter not in ROLES:
            raise ValueError(f"axes: unknown letter {letter!r} in {letters!r}; valid: {listed}.")
    for letter in "io":
        if letter not in letters:
            raise ValueError(
                f"axes: {letters!r} has no {letter} ({ROLES[letter]}), which a matrix needs; None "
                "is for leaves that are no matrices."
            )


def _check_lengths(
    choices: Mapping[str, Any], chosen: Mapping[str, Choice], shapes: Shapes
) -> None:
    """Raise if letters are for a leaf with another number of axes, or fit none of several."""
    for key, letters in choices.items():
        decided = {path: shapes[path] for path, choice in chosen.items() if choice.key == key}
        if letters is None or not decided:
            continue
        # A path that names a leaf means it; the beginning of several means those that it fits.
        meant = {key: decided[key]} if key in decided else decided
        if all(len(shape) != len(letters) for shape in meant.values()):
            listed = ", ".join(f"{path} {list(shape)}" for path, shape in meant.items())
            raise ValueError(
                f"axes: {letters!r} is for {len(letters)} axes, which {listed} does not have; "
                "give one letter for each axis, or None for no matrix."
            )


def _check_any(leaves: Sequence[Leaf]) -> None:
    """Raise if no leaf is a matrix; where a mask takes every leaf out, there is none to be one."""
    if leaves and all(leaf.kind != "kron" for leaf in leaves):
        listed = "\n".join(f"  {leaf.path} {list(leaf.shape)}: {leaf.reason}" for leaf in leaves)
        raise ValueError(
            f"no leaf of params is a matrix:\n{listed}\nSay what the axes of one are, as in "
            'axes={path: "io"}, or use an optimizer that needs no matrices, such as optax.adam.'
        )
