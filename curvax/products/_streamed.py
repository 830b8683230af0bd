"""Products over data that do not fit in one batch: a loop on the host over batches, one compiled program for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._batch import batch_size
from curvax._checks import check_like, check_params
from curvax._host import OnHost
from curvax._stream import check_rereadable, on_device
from curvax._trees import wide_dtype
from curvax._types import Batch, Matvec, Params, PRNGKey, Scalar
from curvax.objective import Objective, scaled_to_share, total_terms
from curvax.products._gauss_newton import empirical_fishervp, fishervp, ggnvp
from curvax.products._hessian import hvp

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
    """Build the product with the curvature of the mean loss over all batches, which are read anew for every vector.

    The result is `matvec_of` on the concatenated batches: every batch counts by its number of terms, so that a ragged last
    batch and masked terms have their due share.

    Args:
      matvec_of: `curvax.hvp`, `ggnvp`, `fishervp` or `empirical_fishervp`.
      objective: a `curvax.Objective`.
      params: pytree of float arrays.
      batches: iterable of `(inputs, targets)` that can be gone through again and again, with the same data: a list, a
        PyTorch DataLoader; arrays of NumPy, JAX or PyTorch. The order may change.
      **options: of `matvec_of`, such as `mode="rev_over_rev"` and `microbatch=`. For `fishervp` the key: every batch draws
        with its own, by its place in the iteration, so keep the order then.

    Returns:
      `matvec(v) -> tree like v`, which runs on the host and cannot be traced. `curvax.cg`, `eigsh`, `spectral_density` and
      the like run their loops in Python when they are handed one, and are then called outside of `jit`.

    Raises:
      ValueError: no batch; batches that have run out, or are other in number than the first time; v unlike params.
      TypeError: an unknown product; an iterator, which can be gone through but once; a call under `jit`, `vmap` or `grad`.

    Cost: building: a pass over the data, which counts terms. Each product: a pass over the data, with `matvec_of` built for
      every batch: a forward pass more than a product by itself. One program for each shape of batch. Memory: two batches
      (the next one is fetched while one is worked on), and a tree like params.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batches = [(jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2)), (jnp.array([[3.0, 0.0]]), jnp.zeros(1))]
      >>> matvec = curvax.streamed(curvax.ggnvp, objective, jnp.zeros(2), batches)              # x'x / 3
      >>> [round(x, 4) for x in matvec(jnp.ones(2)).tolist()]
      [3.3333, 3.0]
    """
    if matvec_of not in PRODUCTS:
        names = ", ".join(f"curvax.{p.__name__}" for p in PRODUCTS)
        raise TypeError(
            f"matvec_of must be one of {names}, whose batches can be weighted; got {matvec_of!r}. Give its options to streamed."
        )
    check_params(params)
    check_rereadable(batches)
    totals, rows, number = None, 0, 0
    for batch in on_device(batches):
        rows, number = rows + batch_size(batch), number + 1
        counts = _count(objective, params, batch)
        totals = counts if totals is None else jax.tree.map(jnp.add, totals, counts)
    if totals is None:
        raise ValueError("batches is empty; give at least one (inputs, targets).")
    key = options.pop("key", None)
    what = (matvec_of, objective, tuple(sorted(options.items())))

    def matvec(v: Params) -> Params:
        check_like(v, params, "v", "params")
        total, seen = jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), params), 0
        for batch in on_device(batches):
            jax.block_until_ready(
                total
            )  # one batch is worked on while the next one is fetched, no more
            drawn = None if key is None else jax.random.fold_in(key, seen)
            total, seen = (
                _add(what, total, params, batch, drawn, (totals, float(rows)), v),
                seen + 1,
            )
        if seen != number:
            raise ValueError(
                f"batches gave {number} the first time and {seen} now; every product must go through the same data. Give a "
                "list, a DataLoader, or an object whose __iter__ begins anew."
            )
        return jax.tree.map(_in_dtype_of, v, total)

    return OnHost(matvec)


@partial(jax.jit, static_argnums=0)
def _count(objective: Objective, params: Params, batch: Batch) -> PyTree[Scalar]:
    return total_terms(objective, params, batch, None)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(
    what: tuple[MatvecOf, Objective, Options],
    total: PyTree[Array],
    params: Params,
    batch: Batch,
    key: PRNGKey | None,
    whole: tuple[PyTree[Scalar], float],
    v: Params,
) -> PyTree[Array]:
    """Add the share of a batch in the product with the whole, of which terms and rows are given."""
    (matvec_of, objective, options), (totals, rows) = what, whole
    own = dict(options) if key is None else {**dict(options), "key": key}
    part = matvec_of(scaled_to_share(objective, params, batch, totals), params, batch, **own)(v)
    # Of all products this one is quadratic in the loss, and multiplies by the rows it is given: those of the batch.
    factor = rows / batch_size(batch) if matvec_of is empirical_fishervp else 1
    return jax.tree.map(lambda t, x: t + (factor * x).astype(t.dtype), total, part)


def _in_dtype_of(v: Any, x: Array) -> Array:
    dtype = jnp.result_type(v)
    return x.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else x
