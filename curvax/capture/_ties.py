"""Kernels that constant indices gather, with the inputs and cotangents of plain entries.

The kernel in the program is `M = V[index]`; what undoes the indices in `y = a'M`:

  rows in another order        the entries of a are put into that of V
  equal rows                   `a_1 v + a_2 v = (a_1 + a_2) v`: their inputs are added
  equal columns                `y_1 = y_2 = a'v`: their cotangents are added
  columns of the same entries  in round k, `y_k = (P_k a)'V` with a permutation P_k: positions that
  in other orders              share V, as those of a convolution do; such are convolutions over a
                               group, Cohen and Welling (2016)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from curvax._types import at_least_float32
from curvax.capture._uses import ToMatrices
from curvax.capture._views import (
    StaticArray,
    View,
    concatenate,
    leaf_view,
    reshape,
    static,
    take,
    transpose,
)

# s: stack, i: inputs, o: outputs, t: positions, k: rounds


class _Order(NamedTuple):
    """Rows (or columns) of a matrix, each once, in the order of their entries.

    Attributes:
      first: for each of them where it is first.
      place: for each row of the matrix which of them it is.
    """

    first: Int[np.ndarray, " n"]
    place: Int[np.ndarray, " m"]

    @property
    def merges(self) -> bool:
        """Whether some rows are equal."""
        return len(self.first) < len(self.place)


class _Ties(NamedTuple):
    """Columns that are permutations of each other.

    Attributes:
      rows: for each round and each row of the first round the row with the same entries.
      columns: for each round and each column of the first round that column.
      of_column: for each column of the matrix which of the first round's columns it is.
    """

    rows: Int[np.ndarray, "k i"]
    columns: Int[np.ndarray, "k o"]
    of_column: Int[np.ndarray, " m"]


class Rearrangement(NamedTuple):
    """How a kernel is made of plain entries.

    Attributes:
      entries: the numbers of the plain kernel's entries.
      rows: the rows of the kernel in the program, each once.
      columns: its columns, each once.
      by_row: the order in which the plain kernel has these rows.
      by_column: the order in which it has the columns of one round.
      ties: the rounds.
    """

    entries: Int[np.ndarray, "s i o"]
    rows: _Order
    columns: _Order
    by_row: Int[np.ndarray, " i"]
    by_column: Int[np.ndarray, " o"]
    ties: _Ties

    @property
    def num_rounds(self) -> int:
        """How often the plain kernel is used."""
        return len(self.ties.rows)

    @property
    def merges_columns(self) -> bool:
        """Whether some columns are equal."""
        return self.columns.merges

    @property
    def merges(self) -> bool:
        """Whether some rows or columns are equal."""
        return self.rows.merges or self.columns.merges

    @property
    def first_rows(self) -> Int[np.ndarray, " i"]:
        """For each row of the plain kernel one of the program's, in the first round."""
        rows: Int[np.ndarray, " i"] = self.rows.first[self.by_row]
        return rows

    @property
    def first_columns(self) -> Int[np.ndarray, " o"]:
        """For each column of the plain kernel one of the program's, in the first round."""
        first_round = self.columns.first[self.ties.columns[0]]
        columns: Int[np.ndarray, " o"] = first_round[self.by_column]
        return columns

    @property
    def of_column(self) -> Int[np.ndarray, " m"]:
        """For each column of the program's kernel that of the plain one."""
        place = self.by_column.argsort()
        of_columns: Int[np.ndarray, " m"] = place[self.ties.of_column[self.columns.place]]
        return of_columns

    def rearranged_inputs(self) -> tuple[ToMatrices, ...]:
        """Bring inputs to the order of the plain kernel's rows, in every round."""
        return _rearranged(self.rows, self.ties.rows[:, self.by_row])

    def rearranged_outputs(self) -> tuple[ToMatrices, ...]:
        """Bring cotangents to the order of the plain kernel's columns, in every round."""
        return _rearranged(self.columns, self.ties.columns[:, self.by_column])

    def renumbered_rows(self) -> tuple[ToMatrices, ...]:
        """Bring row numbers of a lookup to those of the plain table."""
        place = self.by_row.argsort()
        return (_Renumber(indices(place[self.rows.place])),)


def rearrangement(entries: Int[np.ndarray, "s i o"]) -> Rearrangement | None:
    """Find plain entries in a kernel of which some entries may be the same; None if in vain."""
    # 1. Equal rows and columns, once each.
    rows = _order(entries.swapaxes(0, 1))
    columns = _order(np.moveaxis(entries, 2, 0))
    unique = entries[:, rows.first][:, :, columns.first]
    # 2. Columns of the same entries in other orders are rounds of the same map.
    ties = _no_ties(unique) if _are_distinct(unique) else _ties(unique)
    if ties is None:
        return None
    base = unique[:, :, ties.columns[0]]
    # 3. The entries in the order that they have in their leaves.
    by_row, by_column = base[0, :, 0].argsort(), base[0, 0].argsort()
    base = base[:, by_row][:, :, by_column]
    if not _are_distinct(base):
        return None
    return Rearrangement(
        entries=base,
        rows=rows,
        columns=columns,
        by_row=by_row,
        by_column=by_column,
        ties=ties,
    )


# -- order and ties ------------------------------------------------------------------------------


def _order(rows: Int[np.ndarray, "m ..."]) -> _Order:
    """Put the rows of numbers into the order of their entries; equal ones once."""
    flat = rows.reshape(len(rows), -1)
    # One entry of each is enough if they differ there; to sort all of a large kernel is slow.
    keys = flat[:, 0] if len(np.unique(flat[:, 0])) == len(flat) else flat
    _, first, place = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return _Order(first, place.ravel())


def indices(x: Int[np.ndarray, "..."]) -> StaticArray:
    return static(x.astype(np.int32))


def _are_distinct(entries: Int[np.ndarray, "..."]) -> bool:
    return len(np.unique(entries)) == entries.size


def _no_ties(entries: Int[np.ndarray, "s i o"]) -> _Ties:
    """One round, of all columns as they are."""
    _, num_rows, num_columns = entries.shape
    columns = np.arange(num_columns)
    return _Ties(np.arange(num_rows)[None], columns[None], columns)


def _ties(entries: Int[np.ndarray, "s i o"]) -> _Ties | None:
    """Find the rounds in which columns repeat with permuted entries; None if there are none."""
    # 1. Columns with the same entries are one column, in several rounds.
    ordered = np.sort(entries, axis=1)
    if np.any(ordered[:, 1:] == ordered[:, :-1]):
        return None
    classes = _order(np.moveaxis(ordered, 2, 0))
    # 2. For every column the permutation against the first of its class.
    sorting = entries[0].argsort(axis=0)  # [i, o]
    base = classes.first[classes.place]
    rounds: dict[bytes, dict[int, int]] = {}
    for column, first in enumerate(base):
        permutation = np.empty_like(sorting[:, 0])
        permutation[sorting[:, first]] = sorting[:, column]
        if np.any(entries[:, permutation, column] != entries[:, :, first]):
            return None
        members = rounds.setdefault(permutation.tobytes(), {})
        if classes.place[column] in members:
            return None
        members[int(classes.place[column])] = column
    # 3. Every round must have all columns.
    num_classes = len(classes.first)
    if any(len(members) < num_classes for members in rounds.values()):
        return None
    rows = [np.frombuffer(permutation, sorting.dtype) for permutation in rounds]
    columns = [[members[c] for c in range(num_classes)] for members in rounds.values()]
    return _Ties(np.array(rows), np.array(columns), classes.place)


def plain_view(entries: Int[np.ndarray, "s i o"], view: View) -> View:
    """View entries by their numbers, as a transpose of their leaf if they are one."""
    shapes = view.leaf_shapes
    leaves = [leaf_view(path, shape) for path, shape in shapes.items()]
    if len(leaves) == 1 and entries.size == math.prod(leaves[0].shape):
        (leaf,) = leaves
        numbers = np.arange(entries.size).reshape(leaf.shape)
        for permutation in itertools.permutations(range(len(leaf.shape))):
            if np.array_equal(numbers.transpose(permutation).ravel(), entries.ravel()):
                return reshape(transpose(leaf, permutation), entries.shape)
    flat = [reshape(leaf, (math.prod(leaf.shape),)) for leaf in leaves]
    return take(concatenate(tuple(flat), 0), entries)


# -- what inputs and cotangents go through -------------------------------------------------------


def _rearranged(order: _Order, index: Int[np.ndarray, "k n"]) -> tuple[ToMatrices, ...]:
    """Bring the entries of inputs or cotangents to the order of the plain kernel's."""
    if order.merges:
        return _Add(indices(order.place), len(order.first)), _Pick(indices(index))
    picked = order.first[index]
    # In their order already.
    if len(picked) == 1 and np.array_equal(picked[0], np.arange(len(order.place))):
        return ()
    return (_Pick(indices(picked)),)


@dataclass(frozen=True)
class _Pick:
    """Pick entries `[k, n]` of inputs or cotangents; the rounds k are further positions."""

    index: StaticArray

    def __call__(self, x: Float[Array, "s t m"]) -> Float[Array, "s kt n"]:
        picked = x[..., self.index.array]  # [s, t, k, n]
        return picked.reshape(x.shape[0], -1, picked.shape[-1])


@dataclass(frozen=True)
class _Add:
    """Add entries of inputs or cotangents that belong to one row or column."""

    place: StaticArray
    size: int

    def __call__(self, x: Float[Array, "s t m"]) -> Float[Array, "s t n"]:
        wide = at_least_float32(x)
        zeros = jnp.zeros((*x.shape[:-1], self.size), wide.dtype)
        return zeros.at[..., self.place.array].add(wide)


@dataclass(frozen=True)
class _Renumber:
    """Bring row numbers of a lookup, `[s, t, 1]`, to the order of the plain table's rows."""

    place: StaticArray

    def __call__(self, rows: Int[Array, "s t 1"]) -> Int[Array, "s t 1"]:
        # Numbers out of range stay out of range: they are no row.
        size = len(self.place.array)
        known = jnp.asarray(self.place.array, rows.dtype)[jnp.clip(rows, 0, size - 1)]
        return jnp.where((rows >= 0) & (rows < size), known, size)
