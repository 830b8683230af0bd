"""Sums over examples and positions from which factors are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from curvax._types import at_least_float32
from curvax.capture import PerUseArray, UseKind
from curvax.kron._layout import Block

# e: examples, s: stack, n: positions, i: inputs, o: outputs
Counted = Float[Array, "e s n"]


class Second(NamedTuple):
    """A second moment before division: `mean = total / weight`.

    Attributes:
      total: `[stack, size, size]`, or `[stack, size]` where only the diagonal is kept.
      weight: `[stack]`, how many rows were summed.
    """

    total: Array
    weight: Array


def input_moment(
    block: Block, inputs: list[PerUseArray], counted: list[Counted], transposed: bool
) -> Second:
    """Sum `a a'` of the inputs (with their 1 for a bias) of all uses; positions that do not count are left out."""
    # Of a transposed use, the input is on the output's side, and has no 1.
    structure = block.g_structure if transposed else block.a_structure
    uses = _uses(block, transposed)
    if block.sharing == "expand":
        parts = [
            _expanded_inputs(block, block.members[k], inputs[k], counted[k], structure)
            for k in uses
        ]
        return Second(_sum(total for total, _ in parts), _sum(weight for _, weight in parts))
    sums = [_summed_inputs(block, block.members[k], inputs[k], counted[k]) for k in uses]
    total, count = sum(s for s, _ in sums), sum(m for _, m in sums)  # [e, s, i], [e, s]
    mean = (
        total / jnp.maximum(count, 1)[..., None]
    )  # an example with no position that counts is left out: 0
    examples = jnp.sum(count > 0, axis=0).astype(mean.dtype)
    return Second(second_moment(mean.swapaxes(0, 1), None, structure), examples)


def output_moment(
    block: Block, g: list[PerUseArray], h: list[PerUseArray] | None, transposed: bool
) -> Float[Array, "s ..."]:
    """Sum `g h'` of the outputs' cotangents of all uses."""
    structure = block.a_structure if transposed else block.g_structure
    pick = lambda rows: [at_least_float32(rows[k]) for k in _uses(block, transposed)]
    g, h = pick(g), None if h is None else pick(h)
    if block.sharing == "reduce":
        pooled = lambda rows: [_sum(jnp.sum(x, axis=2, keepdims=True) for x in rows)]
        g, h = pooled(g), None if h is None else pooled(h)
    total = _sum(
        second_moment(_flat(x), None if h is None else _flat(h[k]), structure)
        for k, x in enumerate(g)
    )
    if (
        transposed and block.bias is not None
    ):  # on the inputs' side, where the bias has a row that this use leaves alone
        total = jnp.pad(total, [(0, 0), *[(0, 1)] * (total.ndim - 1)])
    return total


def has_transposed(block: Block) -> bool:
    """Whether some use multiplies by the kernel's transpose."""
    return any(member.transposed for member in block.members)


def _uses(block: Block, transposed: bool) -> list[int]:
    return [k for k, member in enumerate(block.members) if member.transposed == transposed]


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _flat(x: Array) -> Array:
    """Bring examples and positions into one axis: `[stack, rows, ...]`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def counted_positions(g: PerUseArray) -> Counted:
    """Give 1 to positions that have a cotangent at all: padding, and branches not taken, have none."""
    return jnp.any(g != 0, axis=-1).astype(at_least_float32(g).dtype)


# m: 1 where a position counts, 0 where not
def _expanded_inputs(
    block: Block, member: UseKind, a: PerUseArray, m: Counted, structure: str
) -> tuple[Array, Array]:
    weight = jnp.sum(m, axis=(0, 2))
    if member.kind == "lookup":
        counts = _with_one(
            block,
            member,
            _count_rows(_flat(a)[..., 0], _flat(m), _table_rows(block, member)),
            weight,
        )
        if structure != "full":
            return counts, weight
        total = jax.vmap(jnp.diag)(counts)
        if (
            block.bias is not None and not member.transposed and member.biased
        ):  # a row of the table goes with the 1
            total = total.at[:, -1, :-1].set(counts[:, :-1]).at[:, :-1, -1].set(counts[:, :-1])
        return total, weight
    m = _flat(m)
    a = _with_one(block, member, jnp.where(m[..., None] > 0, _flat(a).astype(m.dtype), 0), m)
    return second_moment(a, None, structure), weight


def _summed_inputs(
    block: Block, member: UseKind, a: PerUseArray, m: Counted
) -> tuple[Float[Array, "e s i"], Float[Array, "e s"]]:
    """Sum inputs over the positions of each example, and count them."""
    count = jnp.sum(m, axis=2)
    if member.kind == "lookup":
        total = jax.vmap(lambda ids, m: _count_rows(ids, m, _table_rows(block, member)))(
            a[..., 0], m
        )
    else:
        total = jnp.sum(jnp.where(m[..., None] > 0, a.astype(m.dtype), 0), axis=2)
    return _with_one(block, member, total, count), count


def _with_one(block: Block, member: UseKind, a: Array, one: Array) -> Array:
    """Append the bias's coordinate: `one` where the bias is added, 0 for a use without it, nothing without a bias."""
    if block.bias is None or member.transposed:
        return a
    return jnp.concatenate([a, (one if member.biased else jnp.zeros_like(one))[..., None]], axis=-1)


def _table_rows(block: Block, member: UseKind) -> int:
    return block.kernel.shape[2 if member.transposed else 1]


def _count_rows(ids: Array, m: Float[Array, "s n"], size: int) -> Float[Array, "s i"]:
    """Count how often each row was looked up, slice by slice of the stack; row numbers out of range count nowhere."""
    known = jnp.where(ids < 0, size, ids)  # indexing would count negative numbers from the end
    return jax.vmap(lambda ids, m: jnp.zeros(size, m.dtype).at[ids].add(m, mode="drop"))(known, m)


def second_moment(
    x: Float[Array, "s m i"], y: Float[Array, "s m i"] | None, structure: str
) -> Float[Array, "s ..."]:
    """Sum `x y'` over m, in x's precision: all of it, its diagonal, or (identity) nothing."""
    if structure == "identity":
        return jnp.zeros((x.shape[0], x.shape[2]), x.dtype)
    if structure == "diagonal":
        return jnp.sum(x * (x if y is None else y), axis=1)
    if y is None:
        return _gram(x)
    product = jnp.matmul(x.swapaxes(1, 2), y, precision=lax.Precision.HIGHEST)
    return (product + product.swapaxes(1, 2)) / 2


def _gram(x: Float[Array, "s m i"]) -> Float[Array, "s i i"]:
    """Sum `x x'` over m: on GPUs by the symmetric product of BLAS, which CPUs have none of through XLA.

    (There, leaving out half of the product by strips of rows costs more in copies than it saves in arithmetic.)
    """
    if jax.default_backend() == "gpu":
        nothing = jnp.zeros((x.shape[0], x.shape[-1], x.shape[-1]), x.dtype)
        return jnp.asarray(
            lax.linalg.symmetric_product(x.swapaxes(1, 2), nothing, symmetrize_output=True)
        )
    return jnp.matmul(x.swapaxes(1, 2), x, precision=lax.Precision.HIGHEST)


def summed_rounds(
    number: int, one: Callable[[Array], PyTree[Array]], wrap: Callable[[Any], Any] = lambda fn: fn
) -> PyTree[Array]:
    """Sum `one(k)` over k, one at a time."""
    if number == 1:
        return one(jnp.int32(0))
    step = wrap(one)
    start = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: one(jnp.int32(0)))
    )
    add = lambda total, k: (jax.tree.map(jnp.add, total, step(k)), None)
    total, _ = lax.scan(add, start, jnp.arange(number))
    return total
