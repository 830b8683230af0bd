"""Hessian products, forward over reverse or reverse over reverse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.tree_util import Partial
from jaxtyping import Array

from curvax._checks import check_params, check_scalar, look_up
from curvax._types import Batch, Matvec, Params, Scalar
from curvax.objective import Objective
from curvax.products._linear import linearize, on_params, over_batch, product_of_parts


def hvp(
    fun: Callable[..., Scalar],
    params: Params,
    *args: Any,
    mode: str = "fwd_over_rev",
    microbatch: int | None = None,
) -> Matvec:
    """Build the product with the Hessian of `fun(params, *args)`, `v -> H v`.

    H is `d^2 fun / d params^2`. The gradient is linearized once, here; each call of the result
    costs only the linear part.

    Args:
      fun: the function `(params, *args) -> scalar`; a `curvax.Objective` (with or without aux) or
        any other.
      params: pytree of float arrays. To hold part of the model fixed, close over it.
      *args: passed on to `fun`; for an Objective, the batch.
      mode: "fwd_over_rev", or "rev_over_rev" for models whose kernels define only a backward pass
        (as many attention kernels do); it needs that backward pass to be differentiable.
      microbatch: rows worked on at a time, for an Objective; the same result in bounded memory.
        Models that mix examples (BatchNorm in training) then see chunks in place of the batch.

    Returns:
      `matvec(v) -> tree like v`, which is linear, self-adjoint, differentiable, and a pytree that
      may be passed through `jit`. v is cast to the dtypes of params.

    Raises:
      ValueError: the mode is unknown, `microbatch` is below 1, or v is unlike params (the first
        differing path is named).
      TypeError: params are not float, `fun` is not scalar, `microbatch` comes with a `fun` that is
        no Objective, whose chunks could not be weighted, or a kernel has a backward pass only and
        the mode is forward.

    Cost: building: one gradient and its linearization, whose residuals stay in memory. Each
      product: about 2 gradients in FLOPs. With `microbatch`: about 3 gradients a product, and the
      residuals of one chunk.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> w = jnp.array([1.0, 2.0])
      >>> matvec = curvax.hvp(lambda w: jnp.sum(w**4), w)                 # Hessian diag(12 w^2)
      >>> matvec(jnp.array([1.0, 1.0])).tolist()
      [12.0, 48.0]

    References: Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    differentiate = look_up(
        "mode", mode, {"fwd_over_rev": _fwd_over_rev, "rev_over_rev": _rev_over_rev}
    )
    if microbatch is None:
        check_params(params)
        # An objective with aux returns a pair; its value alone has a Hessian.
        value = fun.value if isinstance(fun, Objective) else fun

        def scalar(p: Params) -> Scalar:
            return check_scalar(value(p, *args), "fun")

        return on_params(differentiate(scalar, params), params)
    if not isinstance(fun, Objective) or len(args) != 1:
        raise TypeError(
            "microbatch needs fun to be a curvax.Objective and one batch: only the objective says "
            "how many terms the mean of a chunk is over. Wrap the model and loss: "
            "curvax.hvp(curvax.Objective(model, loss), params, batch)."
        )
    if fun.parts:
        of_part = partial(hvp, mode=mode, microbatch=microbatch)
        return product_of_parts(of_part, fun, params, args[0])

    # H = sum_c H_c, with H_c the Hessian of the share of chunk c in the mean.
    def build(
        objective: Objective,
        params: Params,
        chunk: Batch,
        index: Array,
    ) -> Matvec:
        del index
        return differentiate(lambda p: objective.value(p, chunk), params)

    return over_batch(build, fun, params, args[0], microbatch)


def _fwd_over_rev(fun: Callable[[Params], Scalar], params: Params) -> Matvec:
    # H v = d/dt grad fun(params + t v) at t = 0
    instead = (
        'Use curvax.hvp(..., mode="rev_over_rev"), which differentiates the backward pass in '
        "reverse."
    )
    _, product = linearize(jax.grad(fun), params, instead)
    return product


def _rev_over_rev(fun: Callable[[Params], Scalar], params: Params) -> Matvec:
    # v' (d grad fun / d params), the transposed product; H is symmetric.
    _, product = jax.vjp(jax.grad(fun), params)
    return Partial(_backward, product)


def _backward(product: Callable[[Params], tuple[Params]], v: Params) -> Params:
    (cotangent,) = product(v)
    return cotangent
