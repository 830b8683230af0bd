"""Curvature by layer: traces and top eigenvalues of the diagonal blocks, over one batch or a stream of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from curvax._checks import check_count, check_params, describe
from curvax._host import OnHost, loops_for
from curvax._trees import inner_product
from curvax._types import Batch, Matvec, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops, pin_to_iteration
from curvax.estimate._hutchinson import Estimate, rademacher
from curvax.objective import Objective, scaled_to_share, total_terms
from curvax.products import empirical_fishervp, hvp
from curvax.solve._damped import checked
from curvax.spectra._eigsh import EigInfo, eigsh
from curvax.spectra._lanczos import draw
from curvax.spectra._trace import estimate_of

By: TypeAlias = int | Callable[[str], str | None] | None
"""What a layer is: None: every leaf, by its path as `jax.tree_util.keystr` prints it; an integer: leaves whose paths share
so many leading entries; a function of the path string: leaves for which it returns the same name (None: in no layer)."""

MatvecOf: TypeAlias = Callable[[Objective, Params, Batch], Matvec]
"""`(objective, params, batch) -> matvec`: `curvax.hvp`, `curvax.ggnvp`."""


def layer_paths(params: PyTree, by: By = None) -> dict[str, list[str]]:
    """Return the paths of each layer's leaves, by the layer's name.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import layer_paths
      >>> params = {"dense": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "scale": jnp.ones(2)}
      >>> layer_paths(params, by=1)
      {"['dense']": ["['dense']['b']", "['dense']['w']"], "['scale']": ["['scale']"]}
    """
    found: dict[str, list[str]] = {}
    for path, _ in jax.tree.leaves_with_path(params):
        name = _name(path, by)
        if name is not None:
            found.setdefault(name, []).append(jax.tree_util.keystr(path))
    if not found:
        raise ValueError("by puts no leaf of params into a layer.")
    return found


def _name(path: Any, by: By) -> str | None:
    full = jax.tree_util.keystr(path)
    if by is None:
        return full
    if not callable(by):
        check_count(1, by=by)
        return jax.tree_util.keystr(path[:by])
    name = by(full)
    if not isinstance(name, str | None):
        raise TypeError(
            f"by must return a layer's name as a string (or None), got {describe(name)} for {full}."
        )
    return name


def traces_by(
    matvec: Matvec, params: Params, num_probes: int, key: PRNGKey, *, by: By = None
) -> dict[str, Estimate]:
    """Estimate the trace of every layer's diagonal block by Hutchinson's method: `tr(H_l) = E[z_l' (H z)_l]`.

    One product serves all layers. With Rademacher probes the one-probe variance is that of `curvax.hutchinson_trace` on the
    block, `2 sum_{i != j} H_ij^2` over i, j in the layer, and `sum H_ij^2` over i in it and j in another one.

    Args:
      matvec: `v -> H v` on trees like params.
      params: pytree of float arrays.
      key: JAX key.
      num_probes: n.
      by: what a layer is: None, an integer or a function of the path; see `curvax.spectra.layer_paths`.

    Returns:
      `Estimate(mean, sem)` of scalars by layer, in at least float32.

    Raises:
      ValueError, TypeError: `num_probes` below 1; a `by` that gives no name.

    Cost: n products, one at a time. Memory: one product.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import traces_by
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
      >>> matvec = curvax.hvp(lambda p: jnp.sum(p["a"] ** 3) + jnp.sum(p["b"] ** 2), params)
      >>> {name: trace.mean.item() for name, trace in traces_by(matvec, params, 2, jax.random.key(0)).items()}
      {"['a']": 18.0, "['b']": 2.0}

    References: Hutchinson (1990); Dong et al. (2020), HAWQ-V2, for layers.
    """
    return _estimates(_values(matvec, params, key, num_probes, by))


def traces_over(
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    num_probes: int,
    key: PRNGKey,
    *,
    by: By = None,
    matvec_of: MatvecOf = hvp,
) -> dict[str, Estimate]:
    """Estimate as `traces_by` over a stream of batches, as if they were one; it is read once, and may be a generator.

    Every batch sees the same probes and counts by its number of terms, so mean and standard error are those of the
    concatenated batches: the randomness of the probes, not that of the data. (`traces_by` of a `curvax.streamed` matvec is
    the same, and reads the data for every probe.)

    Args:
      objective: a `curvax.Objective`.
      params: pytree of float arrays.
      batches: iterable of `(inputs, targets)`, arrays of NumPy, JAX or PyTorch. Wrap it in `tqdm.tqdm` to see progress.
      key: JAX key.
      num_probes: n.
      by: what a layer is.
      matvec_of: `curvax.hvp`, `curvax.ggnvp`, or another `(objective, params, batch) -> matvec` that is linear in the loss,
        such as `functools.partial(curvax.ggnvp, microbatch=32)`; not `curvax.empirical_fishervp`, which is quadratic.

    Returns:
      as `traces_by`.

    Raises:
      ValueError: an empty stream; what `traces_by` raises.
      TypeError: `curvax.empirical_fishervp` as matvec_of.

    Cost: n products for each batch (with a `weighted_sum`, n for each head). Memory: one batch. Compiled once for each
      shape of batch.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import traces_over
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> batches = [(jnp.full((n, 1), x), jnp.zeros((n, 1))) for n, x in ((1, 2.0), (3, 4.0))]
      >>> traces_over(objective, jnp.zeros(1), batches, 2, jax.random.key(0))[""].mean.item()     # (4 + 3 16) / 4
      13.0

    References: Dong et al. (2020), HAWQ-V2.
    """
    if getattr(matvec_of, "func", matvec_of) is empirical_fishervp:
        raise TypeError(
            "traces_over adds up batches by their shares of the loss, in which the empirical Fisher is not linear; take "
            "traces_by(curvax.streamed(curvax.empirical_fishervp, objective, params, batches), ...)."
        )
    total = None
    for batch in batches:
        arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), batch)
        of_batch = _of_batch(objective, params, arrays, key, num_probes, by, matvec_of)
        total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
    if total is None:
        raise ValueError("batches is empty: it gave no (inputs, targets).")
    counts, values = total
    share_of_head = lambda n: 1 / jnp.where(n > 0, n, 1)  # a head without terms has no curvature
    return _estimates(
        jax.tree.map(lambda v: jnp.tensordot(share_of_head(counts).astype(v.dtype), v, 1), values)
    )


def top_eigenvalues_by(
    matvec: Matvec, params: Params, key: PRNGKey, *, by: By = None, **options: Any
) -> tuple[dict[str, Scalar], dict[str, EigInfo]]:
    """Compute the largest eigenvalue of every layer's diagonal block, by Lanczos on the matvec restricted to it.

    Args:
      matvec: `v -> H v` on trees like params, H symmetric.
      params: pytree of float arrays.
      key: JAX key.
      by: what a layer is: None, an integer or a function of the path; see `curvax.spectra.layer_paths`.
      **options: of `curvax.eigsh`.

    Returns:
      eigenvalues by layer, and what `curvax.eigsh` tells of each.

    Cost: the products of `curvax.eigsh` for every layer: each is one with the whole matrix. Under `jit` a program is
      compiled for every layer; with a matvec of `curvax.streamed` the product is compiled once for all.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import top_eigenvalues_by
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
      >>> matvec = curvax.hvp(lambda p: jnp.sum(p["a"] ** 3) * jnp.sum(p["b"] ** 2), params)
      >>> values, info = top_eigenvalues_by(matvec, params, jax.random.key(0), by=lambda path: "a" if "a" in path else None)
      >>> {name: round(value.item(), 3) for name, value in values.items()}
      {'a': 108.0}

    References: Dong et al. (2019), HAWQ, by power iteration.
    """
    check_params(params)
    values, info = {}, {}
    for number, layer in enumerate(layer_paths(params, by)):
        inside = [_name(path, by) == layer for path, _ in jax.tree.leaves_with_path(params)]
        block = [leaf for own, leaf in zip(inside, jax.tree.leaves(params), strict=True) if own]
        restricted = restrict(matvec, params, inside)
        (top, _), info[layer] = eigsh(
            restricted, block, 1, jax.random.fold_in(key, number), **options
        )
        values[layer] = top[0]
    return values, info


def restrict(matvec: Matvec, params: Params, inside: list[bool]) -> Matvec:
    """Return the product with a diagonal block, on the list of its leaves: those of params that are inside."""
    leaves, structure = jax.tree.flatten(tree_at_least_float32(params))

    def apply(matvec: Matvec, block: list[Array]) -> list[Array]:
        given = iter(block)
        # Not zeros_like: where XLA on CPUs (jaxlib 0.10.2) fuses the broadcast of a scalar into a matrix product, it reads
        # beyond it, and returns garbage.
        whole = [next(given) if own else 0 * leaf for own, leaf in zip(inside, leaves, strict=True)]
        product = jax.tree.leaves(matvec(jax.tree.unflatten(structure, whole)))
        return [x for own, x in zip(inside, product, strict=True) if own]

    if isinstance(matvec, Partial):  # so that a loop's round can be tied to its arrays
        return Partial(apply, matvec)
    of_block = functools.partial(apply, matvec)
    return OnHost(of_block) if isinstance(matvec, OnHost) else of_block


def _values(
    matvec: Matvec, params: Params, key: PRNGKey, num_probes: int, by: By
) -> dict[str, Float[Array, " n"]]:
    """Return each probe's `z_l' (H z)_l`, by layer."""
    check_params(params)
    check_count(1, num_probes=num_probes)
    paths = layer_paths(params, by)

    def probe(i: Array) -> dict[str, Scalar]:
        z = draw(rademacher, jax.random.fold_in(key, i), params)
        product = jax.tree.leaves(checked(pin_to_iteration(matvec, i), z))
        pairs = zip(jax.tree.leaves_with_path(z), product, strict=True)
        each = {jax.tree_util.keystr(path): inner_product(x, y) for (path, x), y in pairs}
        return {layer: jnp.asarray(sum(each[path] for path in own)) for layer, own in paths.items()}

    with loops_for(matvec):
        values: dict[str, Array] = lax.map(fast_convs_in_loops(probe), jnp.arange(num_probes))
    return values


def _estimates(values: dict[str, Float[Array, " n"]]) -> dict[str, Estimate]:
    return {name: estimate_of(x) for name, x in values.items()}


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _of_batch(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    num_probes: int,
    by: By,
    matvec_of: MatvecOf,
) -> tuple[Float[Array, " heads"], dict[str, Float[Array, "heads n"]]]:
    """Return numbers of terms, and probes' values of the sums over terms, by head of the loss (one, if it has none)."""
    counts, structure = jax.tree.flatten(total_terms(objective, params, batch, None))

    def of_head(head: Array) -> dict[str, Array]:
        divisors = [jnp.where(head == i, 1, jnp.inf).astype(n.dtype) for i, n in enumerate(counts)]
        own = scaled_to_share(objective, params, batch, jax.tree.unflatten(structure, divisors))
        return _values(matvec_of(own, params, batch), params, key, num_probes, by)

    return jnp.stack(counts), lax.map(fast_convs_in_loops(of_head), jnp.arange(len(counts)))
