"""What all products share: a matvec that checks its vector, and the same matvec over chunks of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from curvax._batch import check_batch, sum_over_chunks, with_index
from curvax._checks import check_count, check_like, check_params
from curvax._jaxpr import primitives, replacing
from curvax._types import Batch, Matvec, Params
from curvax.objective import Objective, scaled_to_share, total_terms

T = TypeVar("T")

Build: TypeAlias = Callable[[Objective, Params, Batch, Array], Matvec]
"""Linearize an objective on rows of the batch, given with their row numbers."""


def on_params(matvec: Matvec, params: Params) -> Matvec:
    """Return `matvec` as a pytree that checks its vector against `params` and works in the dtypes of `params`.

    The result of one linearization can be passed through `jit` as an argument: `jax.jit(lambda mv, v: mv(v))(mv, v)`.
    """
    check_params(params)
    return Partial(_apply, matvec, params)


def _apply(matvec: Matvec, params: Params, v: Params) -> Params:
    check_like(v, params, "v", "params")
    # The sum with zeros gives v the sharding of params. That they are zeros must be hidden: jaxlib 0.10.2 multiplies
    # wrongly by what it knows to be constant (on CPUs, in the fusion of some matrix products).
    product = matvec(jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype) + 0 * p, v, params))
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda y, x: y.astype(jnp.result_type(x)) if floating(x) else y, product, v)


def over_batch(
    build: Build, objective: Objective, params: Params, batch: Batch, microbatch: int | None
) -> Matvec:
    """Build the matvec on the whole batch, or with `microbatch` as the sum of its chunks' shares.

    With `microbatch` nothing of the linearization is kept: every product runs the forward pass again, a chunk at a time.
    """
    check_params(params)
    check_batch(batch)
    rows = with_index(batch)
    if microbatch is None:
        return on_params(build(objective, params, *rows), params)
    check_count(1, microbatch=microbatch)

    totals = total_terms(objective, params, batch, microbatch)

    def apply(params: Params, rows: tuple[Batch, Array], totals: PyTree, v: Params) -> Params:
        def product(chunk: tuple[Batch, Array]) -> Params:
            return build(scaled_to_share(objective, params, chunk[0], totals), params, *chunk)(v)

        return sum_over_chunks(product, rows, microbatch)

    return on_params(Partial(apply, params, rows, totals), params)


def linearize(
    fun: Callable[[Params], T], params: Params, instead: str
) -> tuple[T, Callable[[Params], T]]:
    """Linearize `fun`, as `jax.linearize`, but keep only what is costly to compute again.

    Kept are matrix products, transcendental functions and reductions; sums, products, casts and moves of entries are
    repeated in every product. The residuals of a transformer's Hessian shrink to a third, for 1% more FLOPs.

    Raises:
      TypeError: forward mode does not pass through `fun`, with the advice `instead`.
    """
    policy = lambda primitive, *_, **__: primitive.name not in _CHEAP
    lean = jax.checkpoint(fun, policy=policy, prevent_cse=False)
    # JAX marks what it keeps by rounding it to its own precision, which hides from the compiler that a gradient beside
    # this linearization computes the same. Take the marks out.
    unmarked = replacing(
        partial(jax.linearize, lean), {"reduce_precision": _unless_to_own_precision}
    )
    refusal = (
        "this model contains a function with only a backward pass (jax.custom_vjp, as many attention kernels are), "
        f"which has no forward-mode derivative. {instead}"
    )
    try:
        result: tuple[T, Callable[[Params], T]] = unmarked(params)
    except (TypeError, NotImplementedError) as error:
        if "Effects not supported" in str(
            error
        ):  # what calls back to the host cannot be computed again: keep all
            return jax.linearize(fun, params)
        if "custom_vjp" in str(error) or "ifferentiation rule" in str(error):
            raise TypeError(refusal) from error
        raise
    if "custom_lin" in primitives(
        result[1], params
    ):  # JAX's stand-in for the missing rule, an error when compiled
        raise TypeError(refusal)
    return result


def _unless_to_own_precision(x: Array, *, exponent_bits: int, mantissa_bits: int) -> Array:
    own = jnp.finfo(x.dtype)
    if (exponent_bits, mantissa_bits) == (own.nexp, own.nmant):
        return x
    return jax.lax.reduce_precision(x, exponent_bits, mantissa_bits)


_CHEAP = {
    "add",
    "add_any",
    "sub",
    "mul",
    "div",
    "neg",
    "abs",
    "sign",
    "max",
    "min",
    "integer_pow",
    "square",
}
_CHEAP |= {
    "eq",
    "ne",
    "ge",
    "gt",
    "le",
    "lt",
    "and",
    "or",
    "not",
    "select_n",
    "convert_element_type",
    "copy",
}
_CHEAP |= {"broadcast_in_dim", "expand_dims", "squeeze", "reshape", "iota", "stop_gradient"}
