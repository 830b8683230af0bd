"""What all products share: linearization, the check of the vector, and the sum over chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from curvax._batch import check_batch, sum_over_chunks, with_index
from curvax._checks import check_count, check_like, check_params
from curvax._jaxpr import primitives, replacing
from curvax._types import Batch, Matvec, Params, PRNGKey, at_least_float32
from curvax.objective import (
    Objective,
    Part,
    of_parts,
    penalty_diagonal,
    scaled_to_share,
    total_terms,
)

T = TypeVar("T")

Build: TypeAlias = Callable[[Objective, Params, Batch, Array], Matvec]
"""Linearize an objective on rows of the batch, which come with their row numbers."""

Rows: TypeAlias = tuple[Batch, Array]
"""Rows of the batch, and their numbers."""


def on_params(matvec: Matvec, params: Params) -> Matvec:
    """Return `matvec` as a pytree that checks its vector, and works in the dtypes of `params`.

    The result of one linearization can be passed through `jit` as an argument:
    `jax.jit(lambda mv, v: mv(v))(mv, v)`.
    """
    check_params(params)
    return Partial(_apply, matvec, params)


def _apply(matvec: Matvec, params: Params, v: Params) -> Params:
    """Apply a matvec to a vector whose leaves may have other dtypes than params."""
    check_like(v, params, "v", "params")

    # The sum with zeros gives v the sharding of params. That they are zeros must be hidden: jaxlib
    # 0.10.2 multiplies wrongly by what it knows to be constant (on CPUs, in the fusion of some
    # matrix products).
    def on_leaf(x: Any, p: Array) -> Array:
        return jnp.asarray(x, p.dtype) + 0 * p

    product = matvec(jax.tree.map(on_leaf, v, params))
    return jax.tree.map(in_dtype_of, v, product)


def in_dtype_of(v: Any, product: Array) -> Array:
    """Cast a product to the dtype of its vector, unless that holds integers."""
    dtype = jnp.result_type(v)
    return product.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else product


def over_batch(
    build: Build,
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatch: int | None,
) -> Matvec:
    """Build the matvec on the whole batch, or with `microbatch` as the sum of its chunks' shares.

    With `microbatch` no linearization stays in memory: every product runs the forward pass again,
    a chunk at a time.
    """
    check_params(params)
    check_batch(batch)
    rows = with_index(batch)
    if microbatch is None:
        return on_params(build(objective, params, *rows), params)
    check_count(1, microbatch=microbatch)

    totals = total_terms(objective, params, batch, microbatch)

    # C v = sum_c C_c v, with C_c the curvature of the share of chunk c in the mean.
    def apply(
        params: Params,
        rows: Rows,
        totals: PyTree,
        v: Params,
    ) -> Params:
        """Add the products of all chunks, one chunk at a time."""

        def product(chunk_rows: Rows) -> Params:
            chunk, index = chunk_rows
            share = scaled_to_share(objective, params, chunk, totals)
            return build(share, params, chunk, index)(v)

        return sum_over_chunks(product, rows, microbatch)

    # Arrays go in as operands of the `Partial`, not by closure: it is a pytree.
    return on_params(Partial(apply, params, rows, totals), params)


def product_of_parts(
    matvec_of: Callable[..., Matvec],
    objective: Objective,
    params: Params,
    batch: Any,
    key: PRNGKey | None = None,
) -> Matvec:
    """Build the product with the curvature of several parts, `v -> sum_p w_p C_p v`.

    Args:
      matvec_of: `(objective, params, batch[, key]) -> matvec`, called for every part.
      objective: the result of `curvax.total`.
      params: pytree of float arrays.
      batch: the batches by part.
      key: JAX key, from which each part gets one, where `matvec_of` takes one.
    """

    def of_part(part: Part, *args: Any) -> Matvec:
        return matvec_of(part.objective, *args)

    terms = []
    for part, matvec in of_parts(of_part, objective, params, batch, key):
        terms.append((part.weight, matvec))
    # Weights and matvecs are operands of the `Partial`, not in a closure: it is a pytree.
    return on_params(Partial(_weighted_sum, terms, penalty_diagonal(objective, params)), params)


def _weighted_sum(
    terms: list[tuple[Any, Matvec]],
    diagonal: PyTree[Array] | None,
    v: Params,
) -> Params:
    """Return `sum_p w_p C_p v`, and h v for the diagonal h of penalties, if there are any."""
    products = []
    for weight, matvec in terms:
        products.append(jax.tree.map(lambda x, w=weight: w * at_least_float32(x), matvec(v)))
    if diagonal is not None:
        products.append(jax.tree.map(lambda h, x: h * at_least_float32(x), diagonal, v))
    # The sum is rounded once, to the dtypes of v.
    return jax.tree.map(lambda x, *y: sum(y).astype(x.dtype), v, *products)


def linearize(
    fun: Callable[[Params], T], params: Params, instead: str
) -> tuple[T, Callable[[Params], T]]:
    """Linearize `fun`, as `jax.linearize`, but keep only what is costly to compute again.

    Results of matrix products, transcendental functions and reductions stay in memory; sums,
    products, casts and moves of entries are repeated in every product. The residuals of a
    transformer's Hessian shrink to a third, for 1% more FLOPs.

    Raises:
      TypeError: forward mode does not pass through `fun`; the error ends with the advice `instead`.
    """

    def is_residual(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name not in _CHEAP

    lean = jax.checkpoint(fun, policy=is_residual, prevent_cse=False)
    # JAX marks what it keeps by rounding it to its own precision, which hides from the compiler
    # that a gradient beside this linearization computes the same. Take the marks out.
    unmarked = replacing(
        partial(jax.linearize, lean), {"reduce_precision": _unless_to_its_precision}
    )
    refusal = (
        "this model contains a function with only a backward pass (jax.custom_vjp, as many "
        f"attention kernels are), which has no forward-mode derivative. {instead}"
    )
    try:
        result: tuple[T, Callable[[Params], T]] = unmarked(params)
    except (TypeError, NotImplementedError) as error:
        message = str(error)
        # What calls back to the host cannot be computed again: all residuals stay in memory.
        # So it is with complex values inside a model, to which JAX cannot put its marks.
        if "Effects not supported" in message or "reduce_precision" in message:
            return jax.linearize(fun, params)
        if "custom_vjp" in message or "ifferentiation rule" in message:
            raise TypeError(refusal) from error
        raise
    # Some versions of JAX put a stand-in for the missing rule, which fails only when compiled.
    _, linear = result
    if "custom_lin" in primitives(linear, params):
        raise TypeError(refusal)
    return result


def _unless_to_its_precision(x: Array, *, exponent_bits: int, mantissa_bits: int) -> Array:
    """Round x to a precision, unless it has that precision already."""
    info = jnp.finfo(x.dtype)
    if (exponent_bits, mantissa_bits) == (info.nexp, info.nmant):
        return x
    return jax.lax.reduce_precision(x, exponent_bits, mantissa_bits)


# One pass over memory each, which costs no more than to read the residual that it saves.
_ARITHMETIC = {"add", "add_any", "sub", "mul", "div", "neg", "integer_pow", "square"}
_COMPARISONS = {"abs", "sign", "max", "min", "eq", "ne", "ge", "gt", "le", "lt", "select_n"}
_LOGIC = {"and", "or", "not"}
_MOVES = {"broadcast_in_dim", "expand_dims", "squeeze", "reshape", "copy"}
_CHEAP = _ARITHMETIC | _COMPARISONS | _LOGIC | _MOVES
_CHEAP |= {"convert_element_type", "iota", "stop_gradient"}
