"""The state of a placed K-FAC or EK-FAC as that of the rule without a placement, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from curvax._xla import with_auto_sharding
from curvax.kron._block_operators import EigenOperator, FactoredOperator
from curvax.kron._factors import WeightedMean
from curvax.kron._gradient_pairs import Basis
from curvax.kron._kron_factor import Identity, KronFactor, Squares
from curvax.kron._owner_operators import cut_operator
from curvax.kron._packing import pack_factors, place_states, stacked, unpack_factors
from curvax.kron._placement import Member, OwnerBlock, Placement
from curvax.optim._ekfac import EigenBlockState
from curvax.optim._kronecker import BlockInfo, KronInfo, ScaleByKronState

T = TypeVar("T")


def unpack_state(placement: Placement, state: optax.OptState) -> optax.OptState:
    """Return the state of an optimizer as it is without the placement, block by block.

    That is the form for checkpoints: it does not depend on the number of devices, while the stacks
    of owners have as many slices for each.

    Args:
      placement: the placement of the rules in the optimizer.
      state: the state of an optimizer with `placement=`, in any chain or wrapper.

    Returns:
      The state of the same optimizer with `placement=None`. Diagnostics of an owner block are those
      of each of its blocks, until the next refresh.

    Cost: the blocks are sent to wherever the result is sharded, as by `jax.jit(...,
      out_shardings=...)`.

    Example: eight devices write a checkpoint, and four go on from it.
      >>> import functools, jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((8, 4)), (jnp.ones((2, 8)), jnp.ones((2, 4)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> def place(num_devices):
      ...     mesh = jax.make_mesh((num_devices,), ("data",), devices=jax.devices()[:num_devices])
      ...     return curvax.kron_placement(layout, mesh, min_size=1)
      >>> before, after = place(1), place(1)
      >>> state = curvax.scale_by_kfac(layout, placement=before).init(params)
      >>> saved = jax.jit(functools.partial(curvax.unpack_state, before))(state)
      >>> restored = jax.jit(functools.partial(curvax.pack_state, after))(saved)
      >>> jax.tree.structure(restored) == jax.tree.structure(state)
      True
    """

    def unpacked(x: Any) -> Any:
        # Slices of a stack that is sharded explicitly would each have to say how they are.
        return with_auto_sharding(of_rule, x) if _is_placed(placement, x) else x

    def of_rule(x: ScaleByKronState) -> ScaleByKronState:
        block_state, infos = dict(x.block_state), dict(x.info.blocks)
        failures = dict(x.info.num_failures)
        for block in placement.blocks:
            if block.name not in block_state:  # a mask has removed it
                continue
            joined, info = block_state.pop(block.name), infos.pop(block.name)
            num_failures = failures.pop(block.name)
            for member, of_member in block.split(joined):
                name = member.block.name
                block_state[name] = _cut_state(member, of_member)
                infos[name], failures[name] = info, num_failures
        return x._replace(
            curvature=unpack_factors(placement, x.curvature),
            block_state=block_state,
            info=x.info._replace(blocks=infos, num_failures=failures),
        )

    result: optax.OptState = jax.tree.map(unpacked, state, is_leaf=_is_kron_state)
    return result


def pack_state(placement: Placement, state: optax.OptState) -> optax.OptState:
    """Return the state of an optimizer with a placement, of that without; `unpack_state` undone.

    Args:
      placement: the placement of the rules in the optimizer that goes on.
      state: what `unpack_state` returned, or the state of the optimizer without a placement.

    Raises:
      ValueError: a state is packed already, or of other blocks.

    Cost: each block is sent to its owner.
    """

    def packed(x: Any) -> Any:
        if not _is_kron_state(x):
            return x
        _check_named(placement, x)
        block_state, infos = dict(x.block_state), dict(x.info.blocks)
        failures = dict(x.info.num_failures)
        for block in placement.blocks:
            names = [member.block.name for member in block.members]
            states = [block_state.pop(name) for name in names]
            block_state[block.name] = _join_states(block, states)
            infos[block.name] = _join_infos([infos.pop(name) for name in names])
            failures[block.name] = _largest([failures.pop(name) for name in names])
        return x._replace(
            curvature=pack_factors(placement, x.curvature),
            block_state=place_states(placement, block_state),
            info=KronInfo(infos, x.info.damping, x.info.num_nonfinite, failures),
        )

    result: optax.OptState = jax.tree.map(packed, state, is_leaf=_is_kron_state)
    return result


def _is_kron_state(x: Any) -> bool:
    return isinstance(x, ScaleByKronState)


def _is_placed(placement: Placement, x: Any) -> bool:
    """Tell whether this is the state of a rule with the placement."""
    return _is_kron_state(x) and any(b.name in x.block_state for b in placement.blocks)


def _check_named(placement: Placement, state: ScaleByKronState) -> None:
    """Raise unless a state has all blocks that the placement joins."""
    names = [member.block.name for block in placement.blocks for member in block.members]
    missing = [name for name in names if name not in state.block_state]
    if missing:
        raise ValueError(
            f"the state has no block {', '.join(missing)}, but {', '.join(state.block_state)}: it "
            "is of another layout, or packed for a placement already. Unpack it with the placement "
            "that it was made with: curvax.unpack_state(placement, state)."
        )


# -- from owner blocks to named ones -----------------------------------------------------------


def _cut_state(member: Member, state: Any) -> Any:
    """Cut out what is held of a member: an inverse, or a basis with its moments."""
    if isinstance(state, FactoredOperator):
        return cut_operator(member, state)
    if isinstance(state, EigenOperator):
        basis, scale = _cut_basis(member, Basis(state.left, state.right), state.scale)
        return EigenOperator(*basis, scale)
    basis, moments = _cut_basis(member, state.basis, state.moments.total)
    # All slices of a block have the weight of its batches.
    return EigenBlockState(basis, WeightedMean(moments, state.moments.weight[0]))


def _cut_basis(member: Member, basis: Basis, middle: Array) -> tuple[Basis, Array]:
    """Drop the eigenvectors of padding, and what belongs to them in the middle `[s, i, o]`."""
    sides: list[Array | None] = []
    for axis, (vectors, size) in enumerate(zip(basis, member.sides, strict=True), start=1):
        if vectors is None:
            sides.append(None)
            middle = jnp.take(middle, jnp.arange(size), axis=axis)
            continue
        order = _columns_first(vectors, size)
        rows = vectors[:, :size]
        sides.append(jnp.take_along_axis(rows, order[:, None, :], axis=2))
        index = order[:, :, None] if axis == 1 else order[:, None, :]
        middle = jnp.take_along_axis(middle, index, axis=axis)
    if member.is_swapped:
        middle = middle.swapaxes(1, 2)
    return Basis(*member.oriented((sides[0], sides[1]))), middle


def _columns_first(vectors: Squares, size: int) -> Int[Array, "s n"]:
    """Return the numbers of the eigenvectors with entries in the first `size` rows, in order."""
    # An eigenvector of blockdiag(F, c I) has all its entries in one of the two parts.
    is_padding = jnp.sum(jnp.square(vectors[:, size:]), axis=1) > 0.5
    return jnp.argsort(is_padding, axis=1, stable=True)[:, :size]


# -- from named blocks to owner blocks ---------------------------------------------------------


def _join_states(block: OwnerBlock, states: Sequence[Any]) -> Any:
    """Join what is held of the members of an owner block."""
    _, rows, columns = block.shape
    first = states[0]
    if isinstance(first, FactoredOperator):
        pairs = [(state.left, state.right) for state in states]
        left, right = _sides(block, pairs)
        return FactoredOperator(
            _join_factors(block, left, rows), _join_factors(block, right, columns)
        )
    if isinstance(first, EigenOperator):
        pairs = [(state.left, state.right) for state in states]
        basis = _join_bases(block, pairs)
        return EigenOperator(*basis, block.joined([state.scale for state in states]))
    basis = _join_bases(block, [tuple(state.basis) for state in states])
    moments = block.joined([state.moments.total for state in states])
    weights = []
    for member, state in zip(block.members, states, strict=True):
        weights.append(jnp.broadcast_to(state.moments.weight, member.block.shape[:1]))
    return EigenBlockState(basis, WeightedMean(moments, stacked(weights, block.shape[0])))


def _sides(block: OwnerBlock, pairs: Sequence[tuple[T, T]]) -> tuple[list[T], list[T]]:
    """Return what the members have on the first and on the second side of the owner block."""
    first, second = [], []
    for member, pair in zip(block.members, pairs, strict=True):
        x, y = member.oriented(pair)
        first.append(x)
        second.append(y)
    return first, second


def _join_factors(block: OwnerBlock, factors: Sequence[KronFactor], size: int) -> KronFactor:
    """Join factors of one structure into a stack."""
    stack = block.shape[0]
    if isinstance(factors[0], Identity):
        return Identity(stacked([factor.mean_eigenvalue() for factor in factors], stack), size)
    kind = type(factors[0])
    arrays = []
    for factor in factors:
        (array,) = jax.tree.leaves(factor)
        arrays.append(kind.padded_moment(array, size))
    return kind.from_moment(stacked(arrays, stack))


def _join_bases(block: OwnerBlock, pairs: Sequence[tuple[Any, Any]]) -> Basis:
    """Join eigenbases; those of padding are unit vectors, which come last."""
    stack, rows, columns = block.shape

    def joined(bases: Sequence[Array | None], size: int) -> Array | None:
        padded = [_with_identity(x, size) for x in bases if x is not None]
        return stacked(padded, stack) if padded else None

    first, second = _sides(block, pairs)
    return Basis(joined(first, rows), joined(second, columns))


def _with_identity(vectors: Squares, size: int) -> Squares:
    """Return `blockdiag(vectors, I)`."""
    missing = size - vectors.shape[-1]
    padded = jnp.pad(vectors, ((0, 0), (0, missing), (0, missing)))
    is_new = jnp.arange(size) >= size - missing
    return padded + jnp.diag(is_new.astype(vectors.dtype))


def _join_infos(infos: Sequence[BlockInfo]) -> BlockInfo:
    """Return the diagnostics of blocks together."""
    largest = _largest([info.largest for info in infos])
    smallest = -_largest([-info.smallest for info in infos])
    return BlockInfo(
        trace=jnp.sum(jnp.stack([info.trace for info in infos])),
        largest=largest,
        smallest=smallest,
        condition=jnp.where(smallest > 0, largest / smallest, 0),  # before the first refresh
        age=_largest([info.age for info in infos]),
    )


def _largest(numbers: Sequence[Array]) -> Array:
    return jnp.max(jnp.stack(numbers))
