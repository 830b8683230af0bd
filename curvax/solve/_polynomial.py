"""Preconditioners from symmetric polynomials of a matrix: large gaps of its spectrum flattened."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float

from curvax._checks import check_count, check_params
from curvax._trees import as_vector, cast_like, dimension, inner_product, power_of_two, safe_divide
from curvax._types import (
    Matvec,
    Params,
    PRNGKey,
    Scalar,
    at_least_float32,
    tree_at_least_float32,
)
from curvax.estimate._hutchinson import normal, rademacher
from curvax.solve._damped import damped

# B: the matrix, d: its size, t: order; p_i = tr(B^i); e_k: the elementary symmetric polynomials of
# its eigenvalues, e_0 = 1, e_1 = tr(B), ..., e_d = det(B)


class PowerTraces(NamedTuple):
    """Traces of the powers of a matrix B over its scale: `tr((B / scale)^i)` for i from 1 to t.

    Powers of B itself leave the range of floats: tr(B^5) of eigenvalues near 1e-9 is 0 in float32.

    Attributes:
      scale: a power of two near the size of B.
      values: `[t]`.
    """

    scale: Scalar
    values: Float[Array, " t"]


def symmetric_polynomial(matvec: Matvec, traces: PowerTraces | Float[Array, " t"]) -> Matvec:
    """Return the preconditioner `v -> P_t(B) v / e_t`, near a multiple of `B^-1` for large t.

    `P_0 = I`, `P_1 = tr(B) I - B`, and

        P_t = 1/t sum_(i=1..t) (-1)^(i-1) P_(t-i) (tr(B^i) I - B^i).

    On an eigenvector of B the eigenvalue of P_t is the elementary symmetric polynomial of order t
    of all *other* eigenvalues, so that `P_(d-1) B = det(B) I`. If t eigenvalues lie far above the
    others, order t brings those of `P_t B / e_t` down to about the sum of the others, however far
    above they were, and leaves the others: it is for iterations at a fixed rate. (Conjugate
    gradients take a step for each such eigenvalue in any case.) By Newton's identities the sum is
    `P_t = e_t I - B P_(t-1)`, one product for each order; divided by e_t all eigenvalues lie in
    [0, 1].

    Args:
      matvec: `v -> B v` on trees like params, B positive semidefinite: a Gauss-Newton product,
        perhaps with damping added.
      traces: what `curvax.solve.power_traces` returns, or an array `tr(B), tr(B^2), ..., tr(B^t)`;
        t is their number. Where they are not those of a positive semidefinite matrix (estimates, or
        gaps or powers beyond the floats), the order is cut to the largest for which e_1 to e_t are
        known and positive.

    Returns:
      `v -> P_t v / e_t`, a pytree as all preconditioners are: `curvax.cg(matvec, b,
      preconditioner=...)`.

    Raises:
      ValueError: traces are not a vector, or the matvec returns a tree of another kind; when the
        preconditioner is called, t is not below d, for `P_d = 0`.
      TypeError: the matvec changes dtypes.

    Cost: t products with B for each use. Memory: two trees.

    Example: of two eigenvalues, order 1 is the inverse times `det(B) / tr(B)`.
      >>> import jax.numpy as jnp, curvax
      >>> matvec = lambda v: jnp.array([3.0, 1.0]) * v
      >>> precondition = curvax.solve.symmetric_polynomial(matvec, jnp.array([4.0]))
      >>> precondition(jnp.ones(2)).tolist()
      [0.25, 0.75]

    References: Doikov and Rodomanov (2023), Polynomial preconditioning for gradient methods, of
      which only the abstract was read; the recurrences are derived, and checked against
      eigenvalues.

    Deviates: divided by e_t, which does not change what a preconditioner does, and keeps numbers
      in the range of float32.
    """
    of_scale = traces if isinstance(traces, PowerTraces) else PowerTraces(jnp.float32(1), traces)
    shape = jnp.shape(of_scale.values)
    if len(shape) != 1:
        raise ValueError(f"traces must be [t], tr(B) to tr(B^t); got {list(shape)}.")
    # The polynomial of B / scale, and one product with 1 / scale more for each order, is that of B.
    ratios = _ratios(at_least_float32(jnp.asarray(of_scale.values))) / of_scale.scale
    # A plain function becomes a pytree without arrays.
    return Partial(_apply, ratios, matvec if isinstance(matvec, Partial) else Partial(matvec))


def power_traces(
    matvec: Matvec,
    params: Params,
    order: int,
    key: PRNGKey | None = None,
    num_probes: int = 10,
) -> PowerTraces:
    """Return `tr(B), tr(B^2), ..., tr(B^t)`, exact, or estimated by random probes.

    The trace of a power is `E[z'B^i z] = E[(B^a z)'(B^b z)]` with `a + b = i`, so that a probe
    takes half as many products as there are powers. They are traces of B over its scale, which
    the largest entry of `sqrt(d) B z` tells for a normal z, so that no power leaves the floats.

    Args:
      matvec: `v -> B v` on trees like params, B symmetric.
      params: a pytree of d float numbers that gives shapes and dtypes.
      order: t.
      key: the JAX key of the probes. With None the probes are the d unit vectors, and traces exact.
      num_probes: the number of random probes (signs), if there is a key.

    Returns:
      The `PowerTraces`, in at least float32.

    Raises:
      ValueError: the order or `num_probes` is below 1.
      TypeError: params are not float, or the matvec changes dtypes.

    Cost: `ceil(t / 2)` products for each probe, and one. Memory: two trees.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> matvec = lambda v: jnp.array([3.0, 1.0]) * v
      >>> scale, values = curvax.solve.power_traces(matvec, jnp.zeros(2), order=3)
      >>> (scale ** jnp.arange(1, 4) * values).tolist()
      [4.0, 10.0, 28.0]

    References: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines.
    """
    check_params(params)
    check_count(1, order=order, num_probes=num_probes)
    wide = tree_at_least_float32(params)
    product = damped(matvec, 0.0, params)
    flat, to_tree = as_vector(wide)
    scale = _scale_of(product, wide)

    def apply(v: Params) -> Params:
        return jax.tree.map(lambda x: x / scale.astype(x.dtype), product(v))

    def probe(i: Array) -> Params:
        if key is not None:
            return rademacher(jax.random.fold_in(key, i), wide)
        return to_tree(jnp.zeros_like(flat).at[i].set(1))

    def add(total: Array, i: Array) -> tuple[Array, None]:
        # z'B z = z'(B z), z'B^2 z = (B z)'(B z), z'B^3 z = (B z)'(B^2 z), ...
        lower = upper = probe(i)
        terms = []
        for power in range(1, order + 1):
            if power % 2:
                upper = apply(lower)
            else:
                lower = upper
            terms.append(inner_product(lower, upper))
        return total + jnp.stack(terms), None

    count = dimension(params) if key is None else num_probes
    zeros = jnp.zeros(order, inner_product(wide, wide).dtype)
    total, _ = lax.scan(add, zeros, jnp.arange(count))
    # Unit vectors sum to the trace, random probes average to it.
    return PowerTraces(scale, total if key is None else total / num_probes)


def _scale_of(product: Matvec, like: Params) -> Scalar:
    """Return a power of two within a factor of about `sqrt(d)` of tr(B), or 1 if B is zero."""
    # E|B z|^2 = tr(B^2) lies between tr(B)^2 / d and tr(B)^2. Squares would leave the floats.
    z = tree_at_least_float32(normal(jax.random.key(0), like))
    largest = jnp.asarray(optax.tree.max(jax.tree.map(jnp.abs, product(z))))
    return power_of_two(largest * jnp.sqrt(dimension(like)).astype(largest.dtype))


def _ratios(traces: Float[Array, " t"]) -> Float[Array, " t"]:
    """Return `e_(k-1) / e_k` for k up to t; zero from the first e_k on that is not positive."""
    # Of B / tr(B), whose p_i are at most 1 and e_k at most 1 / k!: those of B overflow.
    scale = traces[0]
    count = len(traces)
    powers = jnp.arange(1, count + 1)
    sizes = scale**powers
    p = safe_divide(traces, sizes)

    # Newton: e_k = 1/k sum_(i=1..k) (-1)^(i-1) e_(k-i) p_i
    e = [jnp.ones_like(scale)]
    for k in range(1, count + 1):
        signs = (-1.0) ** jnp.arange(k)
        before = jnp.stack(e[::-1])
        e.append(jnp.sum(signs * before * p[:k]) / k)

    by_order = jnp.stack(e)
    # What rounding leaves of a sum of terms of size 1 / k is no polynomial.
    noise = 8 * jnp.finfo(p.dtype).eps / powers
    # Nor is what comes of powers that left the floats.
    is_known = (sizes >= jnp.finfo(p.dtype).tiny) & jnp.isfinite(sizes)
    is_good = jnp.cumprod((by_order[1:] > noise) & is_known & (scale > 0))
    # e_(k-1) / e_k of B is that of B / tr(B), over tr(B).
    ratios = safe_divide(by_order[:-1], by_order[1:] * scale)
    return jnp.where(is_good == 1, ratios, 0)


def _apply(ratios: Float[Array, " t"], matvec: Matvec, v: Params) -> Params:
    """Return `P_t v / e_t` by `P_k / e_k = I - (e_(k-1) / e_k) B P_(k-1) / e_(k-1)`."""
    order, d = len(ratios), dimension(v)
    if order >= d:
        # By Cayley and Hamilton, P_d = 0.
        raise ValueError(
            f"{order} traces for a matrix of {d} rows: the polynomial of that order is zero. Give "
            f"at most {d - 1}, with which it is the inverse but for a factor."
        )
    wide = tree_at_least_float32(v)
    product = damped(matvec, 0.0, v)

    def raise_order(y: Params, ratio: Array) -> tuple[Params, None]:
        By = product(y)

        def combined(v: Array, By: Array, y: Array) -> Array:
            # A ratio of zero: the order ends here, and y stays.
            return jnp.where(ratio > 0, v - ratio.astype(v.dtype) * By, y)

        return jax.tree.map(combined, wide, By, y), None

    y, _ = lax.scan(raise_order, wide, ratios)
    return cast_like(y, v)
