"""Products over data that do not fit in one batch: a loop on the host over batches.

All batches of one shape run the same compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._checks import check_like, check_params
from curvax._host import OnHost
from curvax._stream import check_rereadable, on_device
from curvax._trees import wide_dtype
from curvax._types import Batch, Matvec, Params, PRNGKey, Scalar
from curvax.objective import Objective, scaled_to_share, total_terms
from curvax.products._gauss_newton import empirical_fishervp, fishervp, ggnvp
from curvax.products._hessian import hvp
from curvax.products._linear import in_dtype_of

MatvecOf: TypeAlias = Callable[..., Matvec]
Options: TypeAlias = tuple[tuple[str, Any], ...]

PRODUCTS = (hvp, ggnvp, fishervp, empirical_fishervp)


def streamed(
    matvec_of: MatvecOf,
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    **options: Any,
) -> Matvec:
    """Build the product with the curvature of the mean loss over all batches.

    The batches are read anew for every vector. The result is `matvec_of` on the concatenated
    batches: every batch counts by its number of terms, so that a ragged last batch and masked terms
    have their due share.

    Args:
      matvec_of: one of `curvax.hvp`, `ggnvp`, `fishervp` and `empirical_fishervp`.
      objective: the `curvax.Objective` whose curvature is meant.
      params: pytree of float arrays.
      batches: iterable of `(inputs, targets)` that can be gone through again and again, with the
        same data: a list, a PyTorch DataLoader; arrays of NumPy, JAX or PyTorch. The order may
        change.
      **options: the options of `matvec_of`, such as `mode="rev_over_rev"` and `microbatch=`. For
        `fishervp` the key: every batch draws with its own, by its place in the iteration, so keep
        the order then.

    Returns:
      `matvec(v) -> tree like v`, which runs on the host and cannot be traced. `curvax.cg`, `eigsh`,
      `spectral_density` and the like run their loops in Python when they are handed one, and are
      then called outside of `jit`.

    Raises:
      ValueError: there is no batch, the batches have run out or are other in number than the first
        time, or v is unlike params.
      TypeError: the product is unknown, `batches` is an iterator, which can be gone through but
        once, or the matvec is called under `jit`, `vmap` or `grad`.

    Cost: building: a pass over the data, which counts terms. Each product: a pass over the data,
      with `matvec_of` built for every batch: a forward pass more than a product by itself. One
      program for each shape of batch. Memory: two batches (the next one is fetched while one is
      worked on), and a tree like params.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> first = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2))
      >>> second = (jnp.array([[3.0, 0.0]]), jnp.zeros(1))
      >>> batches = [first, second]                                       # GGN x'x / 3
      >>> matvec = curvax.streamed(curvax.ggnvp, objective, jnp.zeros(2), batches)
      >>> [round(x, 4) for x in matvec(jnp.ones(2)).tolist()]
      [3.3333, 3.0]
    """
    if matvec_of not in PRODUCTS:
        names = ", ".join(f"curvax.{p.__name__}" for p in PRODUCTS)
        raise TypeError(
            f"matvec_of must be one of {names}, whose batches can be weighted; got {matvec_of!r}. "
            "Give its options to streamed."
        )
    check_params(params)
    check_rereadable(batches)

    # N, the terms of all batches, before the first product: every share is a part of it.
    totals, number = None, 0
    for batch in on_device(batches):
        number += 1
        counts = _count(objective, params, batch)
        totals = counts if totals is None else jax.tree.map(jnp.add, totals, counts)
    if totals is None:
        raise ValueError("batches is empty; give at least one (inputs, targets).")

    # The key differs from batch to batch, and is an operand; what is static makes one program.
    key = options.pop("key", None)
    builder = (matvec_of, objective, tuple(sorted(options.items())))

    # C v = sum_c C_c v, with C_c the curvature of the share of batch c in the mean.
    def matvec(v: Params) -> Params:
        """Add the products of all batches, one batch at a time."""
        check_like(v, params, "v", "params")
        total = jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), params)
        seen = 0
        for batch in on_device(batches):
            # One batch is worked on while the next one is fetched, no more.
            jax.block_until_ready(total)
            batch_key = None if key is None else jax.random.fold_in(key, seen)
            total = _add(builder, total, params, batch, batch_key, totals, v)
            seen += 1
        if seen != number:
            raise ValueError(
                f"batches gave {number} the first time and {seen} now; every product must go "
                "through the same data. Give a list, a DataLoader, or an object whose __iter__ "
                "begins anew."
            )
        return jax.tree.map(in_dtype_of, v, total)

    return OnHost(matvec)


@partial(jax.jit, static_argnums=0)
def _count(objective: Objective, params: Params, batch: Batch) -> PyTree[Scalar]:
    return total_terms(objective, params, batch, None)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(
    builder: tuple[MatvecOf, Objective, Options],
    total: PyTree[Array],
    params: Params,
    batch: Batch,
    key: PRNGKey | None,
    totals: PyTree[Scalar],
    v: Params,
) -> PyTree[Array]:
    """Add the share of a batch in the product; `totals` are the terms of all batches."""
    matvec_of, objective, static_options = builder
    options = dict(static_options)
    if key is not None:
        options["key"] = key
    share = scaled_to_share(objective, params, batch, totals)
    part = matvec_of(share, params, batch, **options)(v)
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, part)
