"""Rounding that makes up for its errors: GPTQ, by the second moments of a kernel's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._checks import check_damping, check_params, describe
from curvax._types import Params, at_least_float32, tree_at_least_float32
from curvax._xla import one_after_another
from curvax.apps.quantization._quantizers import (
    Scheme,
    grid_of,
    nearest,
    quantize,
    widths_by_path,
)
from curvax.kron import Block, Factors, Layout, WeightedMean, block_matrices, with_block_matrices
from curvax.kron._kron_factor import matmul

# W: weights of a block [s, i, o], Q: rounded ones, A: second moment of the inputs [s, i, i]

InputMoments: TypeAlias = Factors | Mapping[str, WeightedMean]
"""`Factors`, or the means that `curvax.kron.input_factors` returns."""


class OutputError(NamedTuple):
    """The mean squared change of a block's outputs, `tr((W - Q)' A (W - Q))`, over its stack.

    Attributes:
      nearest: of rounding to nearest.
      rounded: of the weights that were returned; never larger.
    """

    nearest: Float[Array, ""]
    rounded: Float[Array, ""]


class Rounded(NamedTuple):
    """Quantized params.

    Attributes:
      params: a tree like params, in its dtypes.
      errors: the `OutputError` of every block that was rounded by its inputs, by name. Leaves in no
        such block are rounded to nearest.
    """

    params: Params
    errors: dict[str, OutputError]


class _Entries(NamedTuple):
    """What is known of every entry of a block's matrix, each `[s, i, o]`.

    Attributes:
      w: the weight.
      step: the distance of two levels.
      last: the number L of the last level; -1 for an entry that stays in full precision; 0 for
        one that a constant mask hides, which is zero.
    """

    w: Array
    step: Array
    last: Array


def gptq(
    params: Params,
    layout: Layout,
    factors: InputMoments,
    bits: int | Array | Mapping[str, int | Array],
    scheme: Scheme | None = None,
    *,
    damping: Any = 0.01,
    by_activation: bool = False,
) -> Rounded:
    """Round weights input by input, and let those not rounded yet make up for the error so far.

    The outputs of a kernel change by `tr((W - Q)' A (W - Q))`, the mean of `|W'a - Q'a|^2` over
    inputs a with `A = mean a a'`. Row i is rounded to its nearest levels, with error
    `e = w_i - q_i`, and later rows become what makes the quadratic least with all rounded rows
    fixed. With the Cholesky factor of the damped inverse, `A^-1 = U'U`, that is

        w_j -> w_j - U_ij / U_ii e,   j > i.

    The levels are those of `quantize` on the weights as they come. An output whose plain rounding
    turns out to have the smaller error is rounded so.

    Args:
      params: a pytree of float arrays.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`: it says which
        axes of which leaves are inputs, for convolutions, stacked, headed and fused kernels too.
      factors: the moments A by block: of `curvax.kron.input_factors`, whose results over batches
        add up by `jax.tree.map(jnp.add, x, y)`; or the `Factors` of `curvax.kron_factors` or
        `curvax.kron.fit_factors`. Those have a row for the bias, and then a bias in full precision
        makes up for errors too.
      bits: as for `quantize`.
      scheme: scales, layers and leaves; None: `Scheme()`.
      damping: what is added to the diagonal of A, as a fraction of the mean of that diagonal.
      by_activation: whether rows go in order of falling `A_ii`, and not as they come. Entries in
        full precision go last either way.

    Returns:
      A `Rounded`. Blocks whose A is not full, of tables that are only looked up, of kernels used
      transposed too, and leaves in no block are rounded to nearest. So are blocks whose inputs were
      all zero, and those whose A is not finite, whose errors then are NaN.

    Raises:
      ValueError: the factors lack a block or have one of another shape (named), the damping is not
        positive, the layout belongs to other params, or `quantize` raises.

    Cost: `i^3 / 2 + i^2 o` multiplications for a kernel `[i, o]`, in i steps one after another.

    Example: the second input is the first one again, and its weight makes up for the first error.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import quantization
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> w, x = jnp.array([[0.4], [0.4], [1.0]]), jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
      >>> batch, key = (x, jnp.zeros((2, 1))), jax.random.key(0)
      >>> layout = curvax.kron_layout(objective, w, batch)
      >>> factors = curvax.kron.input_factors(objective, layout, w, batch, key)
      >>> rounded = quantization.gptq(w, layout, factors, bits=2)
      >>> quantization.quantize(w, 2).ravel().tolist(), rounded.params.ravel().tolist()
      ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
      >>> [round(float(x), 4) for x in rounded.errors[""]]
      [0.32, 0.02]

    References: Frantar, Ashkboos, Hoefler and Alistarh (2023), GPTQ,
      https://arxiv.org/abs/2210.17323, algorithm 1; Frantar, Singh and Alistarh (2022), Optimal
      brain compression, https://arxiv.org/abs/2208.11580, section 3. Both from memory; the update
      is checked against the constrained minimum.

    Deviates: kernels are `[in, out]`, so that our rows are the paper's columns. A is a mean, the
      paper's H is `2 A n`: the damping is relative to the diagonal, and the result is the same.
      Levels are symmetric, one grid for all of a scale. All kernels are rounded by the inputs of
      the same params; the paper takes inputs of layers that are rounded already: for that, call it
      with `bits={layer: width}` in the order of layers, with the factors of the params so far.
      Rows of dead inputs keep their nearest levels, and are not set to zero. Outputs that were
      better off with plain rounding get that, and biases take part.
    """
    check_params(params)
    check_damping(damping)
    if not isinstance(factors, Factors | Mapping):
        raise TypeError(
            "factors must be those of curvax.kron_factors or curvax.kron.input_factors, got "
            f"{describe(factors)}."
        )
    scheme = scheme or Scheme()
    widths = widths_by_path(params, bits, scheme)
    steps, lasts = _grids(params, widths, scheme)
    trees = _Entries(w=params, step=steps, last=lasts)
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    # The matrices of all blocks, read from the leaves of the three trees alike.
    w, step, last = (block_matrices(layout, tree) for tree in trees)
    # What is in no block, or in one without moments, is rounded to nearest.
    plain = quantize(params, bits, scheme)
    matrices, errors = block_matrices(layout, plain), {}
    for block in layout.blocks:
        # Blocks that are masked out of params have no matrix.
        if block.name not in w or not _is_rounded_by_inputs(block, widths):
            continue
        moment = _moment_of(block, factors)
        entries = _Entries(w[block.name], step[block.name], last[block.name])
        # The coarsest dtype of its leaves is what an error is to be made up for in.
        dtypes = [leaves[path].dtype for path in block.leaves]
        dtype = min(dtypes, key=lambda dtype: jnp.finfo(dtype).nmant)
        result = _rounded_block(entries, moment, damping, by_activation, dtype)
        matrices[block.name], errors[block.name] = result
    return Rounded(with_block_matrices(layout, matrices, plain), errors)


def _grids(
    params: Params, widths: Mapping[str, int | Array], scheme: Scheme
) -> tuple[Params, Params]:
    """Return two trees like params: steps, and numbers L of last levels (-1 where there are none).

    They are as large as params, so that views of leaves read them as they read weights.
    """
    flat, structure = jax.tree.flatten_with_path(tree_at_least_float32(params))
    steps, lasts = [], []
    for keys, wide in flat:
        path = jax.tree_util.keystr(keys)
        step, last = jnp.zeros([], wide.dtype), jnp.full([], -1, wide.dtype)
        if path in widths:
            step, last = grid_of(path, wide, widths[path], scheme)
        steps.append(jnp.broadcast_to(step, wide.shape))
        lasts.append(jnp.broadcast_to(last, wide.shape))
    return jax.tree.unflatten(structure, steps), jax.tree.unflatten(structure, lasts)


def _is_rounded_by_inputs(block: Block, widths: Mapping[str, Any]) -> bool:
    """Tell whether errors of one row can be made up for by others."""
    # Without entries beside the diagonal of A, rounding to nearest is the minimum.
    is_coupled = block.a_structure == "full" and not block.is_lookup
    # What a transposed use does with an error is not in A.
    return (
        is_coupled
        and not block.has_transposed_uses
        and any(path in widths for path in block.leaves)
    )


def _moment_of(block: Block, factors: InputMoments) -> Array:
    """Return A of a block, `[s, i, i]` or with a row and a column for the bias."""
    means: Mapping[str, Any] = factors.blocks if isinstance(factors, Factors) else factors
    factor = means.get(block.name)
    moment = None
    if factor is not None:
        moment = (factor.a if isinstance(factors, Factors) else factor).mean
    stack, inputs, _ = block.kernel.shape
    shapes = [(stack, size, size) for size in (inputs, block.shape[1])]
    if moment is None or moment.shape not in shapes:
        got = "none" if moment is None else describe(moment)
        raise ValueError(
            f"factors: block {block.name} needs a second moment of inputs "
            f"{list(shapes[0])}, got {got}; give what curvax.kron.input_factors or "
            "curvax.kron_factors returns for this layout."
        )
    return at_least_float32(moment)


def _rounded_block(
    entries: _Entries, moment: Array, damping: Any, by_activation: bool, dtype: Any
) -> tuple[Array, OutputError]:
    """Round the matrices of a block, as a dtype stores them, and say what it did to outputs."""
    limits = jnp.finfo(dtype)

    # As params hold it; XLA may leave out a cast there and back.
    def stored(x: Array) -> Array:
        return lax.reduce_precision(x, limits.nexp, limits.nmant)

    # Without a row for the bias in A, the bias does not take part.
    inputs = moment.shape[-1]
    kernel = _Entries(*(x[:, :inputs] for x in entries))
    moment = moment.astype(kernel.w.dtype)
    is_free = kernel.last < 0
    plain = stored(jnp.where(is_free, kernel.w, nearest(*kernel)))
    order = _order(moment, is_free, by_activation)
    # Rows of everything in that order, and columns of A too.
    in_order = _Entries(*(_rows(x, order) for x in kernel))
    sorted_moment = _rows(_rows(moment, order).swapaxes(1, 2), order)
    corrected = _rounded_rows(in_order, _coefficients(sorted_moment, damping), stored)
    corrected = _rows(corrected, jnp.argsort(order, axis=1))
    # |W'a - Q'a|^2 by output, [s, o]
    before, after = (_output_errors(kernel.w - q, moment) for q in (plain, corrected))
    # NaN, of moments that are not finite, is not better.
    is_better = after < before
    chosen = jnp.where(is_better[:, None], corrected, plain)
    least = jnp.where(is_better, after, before)
    result = jnp.concatenate([chosen, entries.w[:, inputs:]], axis=1)
    return result, OutputError(jnp.sum(before), jnp.sum(least))


def _order(moment: Array, is_free: Bool[Array, "s i o"], by_activation: bool) -> Int[Array, "s i"]:
    """Return numbers of rows in the order of rounding: those in full precision last."""
    last = jnp.any(is_free, axis=-1)
    activity = jnp.diagonal(moment, axis1=1, axis2=2)
    second = -activity if by_activation else jnp.zeros_like(activity)
    # lexsort is stable, with its last key first
    return jnp.lexsort((second, last), axis=-1)


def _rows(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, order[:, :, None], axis=1)


def _coefficients(moment: Array, damping: Any) -> Float[Array, "s i i"]:
    """Return `U_ij / U_ii` above the diagonal, else 0, with `A^-1 = U'U` and U upper triangular.

    With J the matrix that reverses rows, `J A J = L L'` gives `U = J L^-1 J`.
    """
    size = moment.shape[-1]
    mean_diagonal = jnp.trace(moment, axis1=1, axis2=2) / size
    # Inputs that were all zero (0/0): the identity, by which no row makes up for another.
    ridge = jnp.where(mean_diagonal > 0, damping * mean_diagonal, 1)
    identity = jnp.eye(size, dtype=moment.dtype)
    # Rounding of A is of the order of eps trace(A), which a smaller ridge would not cover.
    floor = jnp.finfo(moment.dtype).eps * size * mean_diagonal
    damped = moment + jnp.maximum(ridge, floor)[:, None, None] * identity
    inverse_root = one_after_another(_inverse_of_lower_root)(damped[:, ::-1, ::-1])
    upper = inverse_root[:, ::-1, ::-1]
    diagonal = jnp.diagonal(upper, axis1=1, axis2=2)
    return jnp.triu(upper / diagonal[:, :, None], 1)


def _inverse_of_lower_root(matrix: Array) -> Array:
    """Return `L^-1` of `matrix = L L'`."""
    lower = lax.linalg.cholesky(matrix)
    identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def _rounded_rows(
    entries: _Entries,
    coefficients: Float[Array, "s i i"],
    stored: Callable[[Array], Array],
) -> Array:
    """Round row after row, each after what the errors of the rows before it ask of it."""
    # w_j - sum_(i < j) (U_ij / U_ii) e_i: errors of rows to come are zero yet.
    product = partial(jnp.einsum, "si,sio->so", precision=lax.Precision.HIGHEST)

    def round_row(errors: Array, j: Array) -> tuple[Array, Array]:
        w, step, last = (x[:, j] for x in entries)
        target = w - product(coefficients[:, :, j], errors)
        rounded = stored(jnp.where(last < 0, target, nearest(target, step, last)))
        return errors.at[:, j].set(target - rounded), rounded

    numbers = jnp.arange(entries.w.shape[1])
    _, rows = lax.scan(round_row, jnp.zeros_like(entries.w), numbers)
    return rows.swapaxes(0, 1)


def _output_errors(change: Float[Array, "s i o"], moment: Array) -> Float[Array, "s o"]:
    # d'A d of every column d
    return jnp.sum(change * matmul(moment, change), axis=1)
