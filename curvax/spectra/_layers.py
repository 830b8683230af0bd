"""Curvature by layer: traces and top eigenvalues of diagonal blocks, of a batch or a stream."""

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
from curvax._trees import by_path, inner_product, safe_divide
from curvax._types import Batch, Matvec, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax._xla import fast_convs_in_loops, pin_to_iteration
from curvax.estimate._hutchinson import Estimate, rademacher
from curvax.objective import Objective, scaled_to_share, total_terms
from curvax.products import hvp
from curvax.solve._damped import checked
from curvax.spectra._eigsh import EigInfo, eigsh
from curvax.spectra._lanczos import draw
from curvax.spectra._trace import estimate_of

# k: probes

By: TypeAlias = int | Callable[[str], str | None] | None
"""What a layer is. None: every leaf, by its path as `jax.tree_util.keystr` prints it. An integer:
leaves whose paths share so many leading entries. A function of the path string: leaves for which it
returns the same name (None: in no layer)."""

MatvecOf: TypeAlias = Callable[[Objective, Params, Batch], Matvec]
"""`(objective, params, batch) -> matvec`: `curvax.hvp`, `curvax.ggnvp`."""


def layer_paths(
    params: PyTree,
    by: By = None,
) -> dict[str, list[str]]:
    """Return the paths of each layer's leaves, by the layer's name.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import layer_paths
      >>> params = {"dense": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "scale": jnp.ones(2)}
      >>> layer_paths(params, by=1)
      {"['dense']": ["['dense']['b']", "['dense']['w']"], "['scale']": ["['scale']"]}
    """
    layers: dict[str, list[str]] = {}
    for path, _ in jax.tree.leaves_with_path(params):
        name = _layer_of(path, by)
        if name is not None:
            layers.setdefault(name, []).append(jax.tree_util.keystr(path))
    if not layers:
        raise ValueError("by puts no leaf of params into a layer.")
    return layers


def _layer_of(path: Any, by: By) -> str | None:
    """Return the name of the layer that a leaf belongs to."""
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
    matvec: Matvec,
    params: Params,
    num_probes: int,
    key: PRNGKey,
    *,
    by: By = None,
) -> dict[str, Estimate]:
    """Estimate the trace of every layer's diagonal block by Hutchinson's method.

    `tr(H_l) = E[z_l' (H z)_l]`, so that one product serves all layers. With Rademacher probes the
    one-probe variance is that of `curvax.hutchinson_trace` on the block, `2 sum_{i != j} H_ij^2`
    over i, j in the layer, and `sum H_ij^2` over i in it and j in another one.

    Args:
      matvec: `v -> H v` on trees like params.
      params: a pytree of float arrays.
      num_probes: k.
      key: a JAX key.
      by: None, an integer or a function of the path: it says what a layer is, as `By` describes.

    Returns:
      `Estimate(mean, sem)` of scalars by layer, in at least float32.

    Raises:
      ValueError, TypeError: `num_probes` is below 1, or `by` gives no name.

    Cost: k products, one at a time. Memory: one product.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import traces_by
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
      >>> matvec = curvax.hvp(lambda p: jnp.sum(p["a"] ** 3) + jnp.sum(p["b"] ** 2), params)
      >>> traces = traces_by(matvec, params, 2, jax.random.key(0))
      >>> {name: trace.mean.item() for name, trace in traces.items()}
      {"['a']": 18.0, "['b']": 2.0}

    References: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix;
      Dong et al. (2020), HAWQ-V2, https://arxiv.org/abs/1911.03852, for layers.
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
    """Estimate as `traces_by` over a stream of batches, as if they were one.

    The stream is read once, and may be a generator. Every batch sees the same probes and counts by
    its number of terms, so mean and standard error are those of the concatenated batches: the
    randomness of the probes, not that of the data. (`traces_by` of a `curvax.streamed` matvec gives
    the same, and reads the data for every probe.)

    Args:
      objective: the `curvax.Objective` whose curvature is meant.
      params: a pytree of float arrays.
      batches: an iterable of `(inputs, targets)`, arrays of NumPy, JAX or PyTorch. Wrap it in
        `tqdm.tqdm` to see progress.
      num_probes: k.
      key: a JAX key.
      by: None, an integer or a function of the path: it says what a layer is, as `By` describes.
      matvec_of: `curvax.hvp`, `curvax.ggnvp`, or another `(objective, params, batch) -> matvec`
        of the mean loss, such as `functools.partial(curvax.ggnvp, microbatch=32)` or
        `curvax.empirical_fishervp`.

    Returns:
      the estimates that `traces_by` returns.

    Raises:
      ValueError: the stream is empty; and as `traces_by`.

    Cost: k products for each batch (with a `weighted_sum`, k for each head). Memory: one batch. It
      is compiled once for each shape of batch.

    Example: `(4 + 3 16) / 4`.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import traces_over
      >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
      >>> batches = [(jnp.full((n, 1), x), jnp.zeros((n, 1))) for n, x in ((1, 2.0), (3, 4.0))]
      >>> traces = traces_over(objective, jnp.zeros(1), batches, 2, jax.random.key(0))
      >>> traces[""].mean.item()
      13.0

    References: Dong et al. (2020), HAWQ-V2, https://arxiv.org/abs/1911.03852.
    """
    total = None
    for batch in batches:
        # `jit` takes no arrays of PyTorch, but those of NumPy.
        arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), batch)
        sums = _sums_of_batch(objective, params, arrays, key, num_probes, by, matvec_of)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("batches is empty: it gave no (inputs, targets).")

    # Sums over terms become means, head by head; a head without terms has no curvature.
    counts, values = total
    weights = safe_divide(1, counts)

    def mean_over_terms(v: Float[Array, "heads k"]) -> Float[Array, " k"]:
        return jnp.tensordot(weights.astype(v.dtype), v, axes=1)

    return _estimates(jax.tree.map(mean_over_terms, values))


def top_eigenvalues_by(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    *,
    by: By = None,
    **options: Any,
) -> tuple[dict[str, Scalar], dict[str, EigInfo]]:
    """Compute the largest eigenvalue of every layer's diagonal block.

    It is that of Lanczos on the matvec restricted to the block.

    Args:
      matvec: `v -> H v` on trees like params, H symmetric.
      params: a pytree of float arrays.
      key: a JAX key.
      by: None, an integer or a function of the path: it says what a layer is, as `By` describes.
      **options: options of `curvax.eigsh`.

    Returns:
      the eigenvalues by layer, and the `EigInfo` of each.

    Cost: the products of `curvax.eigsh` for every layer: each is one with the whole matrix. Under
      `jit` a program is compiled for every layer; with a matvec of `curvax.streamed` the product is
      compiled once for all.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import top_eigenvalues_by
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
      >>> matvec = curvax.hvp(lambda p: jnp.sum(p["a"] ** 3) * jnp.sum(p["b"] ** 2), params)
      >>> by = lambda path: "a" if "a" in path else None
      >>> values, info = top_eigenvalues_by(matvec, params, jax.random.key(0), by=by)
      >>> {name: round(value.item(), 3) for name, value in values.items()}
      {'a': 108.0}

    References: Dong et al. (2019), HAWQ, https://arxiv.org/abs/1905.03696, by power iteration.
    """
    check_params(params)
    layer_of_leaf = [_layer_of(path, by) for path, _ in jax.tree.leaves_with_path(params)]
    values, info = {}, {}
    for number, layer in enumerate(layer_paths(params, by)):
        inside = [name == layer for name in layer_of_leaf]
        block = _selected(jax.tree.leaves(params), inside)
        layer_key = jax.random.fold_in(key, number)
        restricted = restrict(matvec, params, inside)
        (top, _), info[layer] = eigsh(restricted, block, 1, layer_key, **options)
        values[layer] = top[0]
    return values, info


def _selected(
    leaves: list[Array],
    inside: list[bool],
) -> list[Array]:
    return [leaf for leaf, is_inside in zip(leaves, inside, strict=True) if is_inside]


def restrict(
    matvec: Matvec,
    params: Params,
    inside: list[bool],
) -> Matvec:
    """Return the product with a diagonal block, on the list of those leaves that are inside it."""
    leaves, structure = jax.tree.flatten(tree_at_least_float32(params))

    def apply(
        matvec: Matvec,
        block: list[Array],
    ) -> list[Array]:
        # Not zeros_like: where XLA on CPUs (jaxlib 0.10.2) fuses the broadcast of a scalar into a
        # matrix product, it reads beyond it, and returns garbage.
        padded = [0 * leaf for leaf in leaves]
        places = [i for i, is_inside in enumerate(inside) if is_inside]
        for i, x in zip(places, block, strict=True):
            padded[i] = x
        product = matvec(jax.tree.unflatten(structure, padded))
        return _selected(jax.tree.leaves(product), inside)

    # A `Partial` stays one, so that a round of a loop can be tied to its arrays.
    if isinstance(matvec, Partial):
        return Partial(apply, matvec)
    of_block = functools.partial(apply, matvec)
    return OnHost(of_block) if isinstance(matvec, OnHost) else of_block


def _values(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int,
    by: By,
) -> dict[str, Float[Array, " k"]]:
    """Return the `z_l' (H z)_l` of each probe, by layer."""
    check_params(params)
    check_count(1, num_probes=num_probes)
    paths = layer_paths(params, by)

    def probe(i: Array) -> dict[str, Scalar]:
        z = draw(rademacher, jax.random.fold_in(key, i), params)
        product = checked(pin_to_iteration(matvec, i), z)
        by_leaf = by_path(jax.tree.map(inner_product, z, product))
        by_layer = {}
        for layer, leaf_paths in paths.items():
            by_layer[layer] = jnp.asarray(sum(by_leaf[path] for path in leaf_paths))
        return by_layer

    with loops_for(matvec):
        values: dict[str, Array] = lax.map(fast_convs_in_loops(probe), jnp.arange(num_probes))
    return values


def _estimates(values: dict[str, Float[Array, " k"]]) -> dict[str, Estimate]:
    return {name: estimate_of(x) for name, x in values.items()}


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _sums_of_batch(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    num_probes: int,
    by: By,
    matvec_of: MatvecOf,
) -> tuple[Float[Array, " heads"], dict[str, Float[Array, "heads k"]]]:
    """Return what a batch adds to the stream's sums over terms, by head of the loss.

    Returns:
      the number of terms of each head (of one, if the loss has no heads); by layer, what each probe
      gives of the sum over these terms.
    """
    counts, structure = jax.tree.flatten(total_terms(objective, params, batch, None))

    def of_head(head: Array) -> dict[str, Array]:
        # Of this head the sum over terms (divided by 1), of the others nothing (divided by inf).
        divisors = [jnp.where(head == i, 1, jnp.inf).astype(n.dtype) for i, n in enumerate(counts)]
        totals = jax.tree.unflatten(structure, divisors)
        head_objective = scaled_to_share(objective, params, batch, totals)
        matvec = matvec_of(head_objective, params, batch)
        return _values(matvec, params, key, num_probes, by)

    values = lax.map(fast_convs_in_loops(of_head), jnp.arange(len(counts)))
    return jnp.stack(counts), values
