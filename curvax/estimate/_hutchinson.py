"""Hutchinson estimates of diagonal and trace from matvecs with random probes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from curvax._checks import check_count, check_function, check_params
from curvax._types import Matvec, Params, PRNGKey, tree_at_least_float32
from curvax._xla import fast_convs_in_loops, pin_to_iteration

Sampler: TypeAlias = Callable[[PRNGKey, Params], Params]
"""Draw a probe z like params with `E[z z'] = I`."""


class Estimate(NamedTuple):
    """A sample mean and its standard error.

    Attributes:
      mean: the average over probes, in at least float32.
      sem: the standard error of that mean, `sqrt(sum (x - mean)^2 / (n - 1) / n)`; infinite for a
        single probe, which tells nothing about its own error.
    """

    mean: PyTree[Array]
    sem: PyTree[Array]


def rademacher(key: PRNGKey, params: Params) -> Params:
    """Draw independent signs, +1 or -1, like params.

    A sign takes one random bit, a tenth of the cost of a uniform number.
    """
    return jax.tree.map(_signs, optax.tree.split_key_like(key, params), params)


def normal(key: PRNGKey, params: Params) -> Params:
    """Draw independent standard normal numbers, like params."""
    return optax.tree.random_like(key, params, jax.random.normal)


def _signs(key: PRNGKey, like: Array) -> Array:
    """Draw the signs of one leaf, 32 from each random word."""
    # Words lie along the last axis: leading axes may be sharded.
    *lead, last = like.shape or (1,)
    num_words = -(-last // 32)
    words = jax.random.bits(key, (*lead, num_words), jnp.uint32)
    places = jnp.arange(32, dtype=jnp.uint32)
    bits_of_words = (words[..., None] >> places) & 1
    bits = bits_of_words.reshape(*lead, 32 * num_words)[..., :last]
    # 0 to +1, 1 to -1.
    signs = 1 - 2 * bits.astype(like.dtype)
    return signs.reshape(like.shape)


def hutchinson_diagonal(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int = 1,
    *,
    sampler: Sampler = rademacher,
    chunk_size: int = 1,
) -> Estimate:
    """Estimate the diagonal of a matrix by `diag(H) = E[z * (H z)]`.

    With Rademacher probes entry i has one-probe variance `sum_{j != i} H_ij^2`: one probe is exact
    for a diagonal matrix.

    Args:
      matvec: the product `v -> H v` on trees like params, such as `curvax.hvp(...)`.
      params: pytree that gives shapes and dtypes of the probes.
      key: JAX key. Probe i depends on key and i only, not on `chunk_size`, not on devices.
      num_probes: the number n of probes.
      sampler: `curvax.estimate.rademacher` (least variance) or `curvax.estimate.normal`.
      chunk_size: number of probes worked on together under `vmap`; memory grows with it.

    Returns:
      `Estimate(mean, sem)`, trees like params, in at least float32.

    Raises:
      ValueError: `num_probes` or `chunk_size` is below 1.
      TypeError: params are not float, or the sampler is no function.

    Cost: n products. Memory: `chunk_size` products and two trees like params, whatever n.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> matvec = curvax.hvp(lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0]))
      >>> curvax.hutchinson_diagonal(matvec, jnp.zeros(2), jax.random.key(0)).mean.tolist()
      [12.0, 48.0]

    References: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix.
    """
    return _mean_over_probes(diagonal_term, matvec, params, key, num_probes, sampler, chunk_size)


def hutchinson_trace(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int = 1,
    *,
    sampler: Sampler = rademacher,
    chunk_size: int = 1,
) -> Estimate:
    """Estimate the trace of a matrix by `tr(H) = E[z' H z]`.

    With Rademacher probes the one-probe variance is `2 sum_{i != j} H_ij^2`, with normal ones
    `2 |H|_F^2`.

    Args:
      matvec: the product `v -> H v` on trees like params.
      params: pytree that gives shapes and dtypes of the probes.
      key: JAX key; what probe i depends on is as in `hutchinson_diagonal`.
      num_probes: the number n of probes.
      sampler: `curvax.estimate.rademacher` or `curvax.estimate.normal`.
      chunk_size: number of probes worked on together under `vmap`; memory grows with it.

    Returns:
      `Estimate(mean, sem)` of scalars, in at least float32.

    Raises:
      ValueError: `num_probes` or `chunk_size` is below 1.
      TypeError: params are not float, or the sampler is no function.

    Cost: n products. Memory: `chunk_size` products.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> matvec = curvax.hvp(lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0]))
      >>> key = jax.random.key(0)
      >>> curvax.hutchinson_trace(matvec, jnp.zeros(2), key, num_probes=3)
      Estimate(mean=Array(60., dtype=float32), sem=Array(0., dtype=float32))

    References: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines.
    """
    return _mean_over_probes(trace_term, matvec, params, key, num_probes, sampler, chunk_size)


def diagonal_term(matvec: Matvec, z: Params) -> PyTree[Array]:
    """Return one probe's `z * (H z)`."""
    return optax.tree.mul(tree_at_least_float32(z), tree_at_least_float32(matvec(z)))


def trace_term(matvec: Matvec, z: Params) -> Array:
    """Return one probe's `z' H z`."""
    return jnp.asarray(optax.tree.sum(diagonal_term(matvec, z)))


def _mean_over_probes(
    term: Callable[[Matvec, Params], PyTree[Array]],
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int,
    sampler: Sampler,
    chunk_size: int,
) -> Estimate:
    """Average `term(matvec, z)` over probes z, `chunk_size` at a time, with its standard error."""
    check_params(params)
    check_count(1, num_probes=num_probes, chunk_size=chunk_size)
    check_function(
        "sampler",
        sampler,
        "(key, params) -> z",
        "curvax.estimate.rademacher or curvax.estimate.normal",
    )

    def probe(matvec: Matvec, i: Any) -> PyTree[Array]:
        z = sampler(jax.random.fold_in(key, i), params)
        return term(matvec, z)

    if num_probes == 1:
        mean = probe(matvec, 0)
        return Estimate(mean, optax.tree.full_like(mean, jnp.inf))

    # Chan's merge of (mean, squared deviations) of the n probes seen and the k of the next chunk:
    # one pass over the probes, no cancellation.
    def add(carry: tuple[PyTree, PyTree], n: Array) -> tuple[tuple[PyTree, PyTree], None]:
        """Merge the probes of one chunk into mean and squared deviations."""
        mean, squares = carry
        # The last chunk may be ragged.
        index = n + jnp.arange(chunk_size)
        live = index < num_probes
        k = live.sum()

        def total(x: Array) -> Array:
            mask = live.reshape(-1, *(1,) * (x.ndim - 1))
            return jnp.sum(jnp.where(mask, x, 0), axis=0)

        # x_i, the terms of the chunk; pinned, so that the matvec's arrays are not prepared for all
        # probes before the loop.
        pinned_probe = partial(probe, pin_to_iteration(matvec, n))
        x = fast_convs_in_loops(jax.vmap(pinned_probe))(index)

        # c = 1/k sum_i x_i, mean <- mean + k/(n + k) (c - mean)
        c = jax.tree.map(lambda x: total(x) / k.astype(x.dtype), x)
        delta = optax.tree.sub(c, mean)
        share = k / (n + k)
        mean = jax.tree.map(lambda m, d: m + d * share.astype(d.dtype), mean, delta)

        # squares <- squares + sum_i (x_i - c)^2 + n k/(n + k) (c - mean)^2, with the old mean
        weight = n * k / (n + k)
        within = jax.tree.map(lambda x, c: total((x - c) ** 2), x, c)
        between = jax.tree.map(lambda d: d**2 * weight.astype(d.dtype), delta)
        squares = jax.tree.map(lambda s, w, b: s + w + b, squares, within, between)
        return (mean, squares), None

    zeros = optax.tree.zeros_like(jax.eval_shape(partial(probe, matvec), 0))
    firsts = jnp.arange(0, num_probes, chunk_size)
    (mean, squares), _ = lax.scan(add, (zeros, zeros), firsts)

    # sqrt(sum (x - mean)^2 / (n - 1) / n)
    def standard_error(s: Array) -> Array:
        return jnp.sqrt(s / (num_probes - 1) / num_probes)

    return Estimate(mean, jax.tree.map(standard_error, squares))
