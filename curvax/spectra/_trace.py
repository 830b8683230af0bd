"""Traces of matrices with a few large eigenvalues: a sketch for those, probes beside it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, PyTree

from curvax._checks import check_count, check_params
from curvax._host import compiled, loops_for
from curvax._trees import dimension, inner_product, norm, row_products
from curvax._types import Matvec, Params, PRNGKey, Scalar
from curvax._xla import fast_convs_in_loops, pin_to_iteration
from curvax.estimate._hutchinson import Estimate, normal, rademacher
from curvax.solve._damped import checked
from curvax.solve._rows import get_row, put_row, zero_rows
from curvax.spectra._lanczos import draw, reject

# d: parameters; k: vectors of a sketch; n: values of an estimate
# Q: [d, k], an orthonormal basis; in code its transpose, a tree with a leading axis k


def hutchpp(
    matvec: Matvec,
    params: Params,
    num_products: int,
    key: PRNGKey,
) -> Estimate:
    """Estimate the trace of a symmetric matrix by Hutch++.

    It is exact on a sketch of the matrix's range, and Hutchinson's estimate beside it. With Q an
    orthonormal basis of `A [z_1 ... z_k]`, k a third of the products, and P = I - QQ':
    `tr(A) = tr(Q'AQ) + E[g'P A P g]`. On matrices whose eigenvalues decay the error falls as 1/m,
    where that of `curvax.hutchinson_trace` falls as `1/sqrt(m)`; nothing is gained on those whose
    eigenvalues are alike.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric. It gets vectors of at least float32.
      params: a pytree of d float numbers that gives shapes, dtypes and shardings of the vectors.
      key: a JAX key.
      num_products: m, from 4 to d. Each of the sketch and `tr(Q'AQ)` takes k = m // 3; the others
        are for probes g.

    Returns:
      `Estimate(mean, sem)` of scalars, in at least float32. It is unbiased, and exact where the
      rank is at most k. `sem` comes from the probes g, the only random part once Q is known.

    Raises:
      ValueError: products are fewer than 4, or more than d, which give the exact trace; or the
        matvec returns a tree of another structure.

    Cost: m products, one at a time, and `3 k m d` multiplications. Memory: k trees like params.

    Example: rank one, trace 24.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import hutchpp
      >>> matvec = lambda v: {"w": 3.0 * jnp.sum(v["w"]) * jnp.ones(8)}
      >>> estimate = hutchpp(matvec, {"w": jnp.zeros(8)}, 6, jax.random.key(0))
      >>> round(float(estimate.mean), 3), round(float(estimate.sem), 3)
      (24.0, 0.0)

    References: Meyer, Musco, Musco and Woodruff (2021), Hutch++: optimal stochastic trace
      estimation, https://arxiv.org/abs/2010.09649, algorithm 1.

    Deviates: the vectors of the sketch are normal; random signs, as published, may all be
      orthogonal to the eigenvectors that matter.
    """
    _check(params, num_products)
    # Algorithm 1: S for the sketch A S = Q R, G for the probes, a third of the products each.
    k = num_products // 3
    sketch_key, probe_key = jax.random.split(key)
    sketch = _sketch(matvec, params, sketch_key, k)
    trace_in_sketch = jnp.trace(_projection(matvec, sketch.basis))

    def probe(i: Array) -> Scalar:
        # g'P A P g, with P g = g - Q Q'g
        g = draw(rademacher, jax.random.fold_in(probe_key, i), params)
        Pg, _ = reject(sketch.basis, g)
        return inner_product(Pg, checked(pin_to_iteration(matvec, i), Pg))

    num_probes = num_products - 2 * k
    with loops_for(matvec):
        traces_beside = lax.map(fast_convs_in_loops(probe), jnp.arange(num_probes))
    return estimate_of(trace_in_sketch + traces_beside)


def xtrace(
    matvec: Matvec,
    params: Params,
    num_products: int,
    key: PRNGKey,
) -> Estimate:
    """Estimate the trace of a symmetric matrix by XTrace.

    Every product serves both the sketch and as a probe. Each of k = m/2 random vectors z_i is the
    probe beside the sketch of the others: with Q_i an orthonormal basis of `A [z_j, j != i]`,
    P_i = I - Q_i Q_i' and u_i = P_i z_i scaled to the length `sqrt(d - k + 1)`,
    `tr(A) = mean_i of tr(Q_i'A Q_i) + u_i'A u_i`.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric. It gets vectors of at least float32.
      params: a pytree of d float numbers that gives shapes, dtypes and shardings of the vectors.
      key: a JAX key.
      num_products: m, from 4 to d; of an odd number one is not used.

    Returns:
      `Estimate(mean, sem)` of scalars, in at least float32. It is unbiased, and exact where the
      rank is below k. `sem` counts in that the k values have sketches in common: in our tests its
      root mean square is 0.9 to 1.25 times the true error from 12 products on. With few products
      it varies as the standard error of few numbers does.

    Raises:
      ValueError: products are fewer than 4, or more than d, which give the exact trace; or the
        matvec returns a tree of another structure.

    Cost: m products, one at a time, and `6 k^2 d + 4 k^4` multiplications. Memory: k trees like
      params.

    Example: rank one, trace 24.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import xtrace
      >>> matvec = lambda v: {"w": 3.0 * jnp.sum(v["w"]) * jnp.ones(8)}
      >>> estimate = xtrace(matvec, {"w": jnp.zeros(8)}, 6, jax.random.key(0))
      >>> round(float(estimate.mean), 3), round(float(estimate.sem), 3)
      (24.0, 0.0)

    References: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in
      stochastic trace estimation, https://arxiv.org/abs/2301.07825, sections 2.1 and 2.3
      (normalization).

    Deviates: the paper's standard error takes the k values for independent; here their covariance
      is added, which is estimated without further products, and kept between zero and twice the
      paper's variance. In our tests the paper's is 0.72 to 1 times the true error.
    """
    _check(params, num_products)
    k = num_products // 2
    basis, r, complete = _sketch(matvec, params, key, k)
    H = _projection(matvec, basis)

    def coordinates(i: Array) -> tuple[Float[Array, " k"], Scalar]:
        z = draw(normal, jax.random.fold_in(key, i), params)
        return row_products(basis, z), inner_product(z, z)

    # All is done in the coordinates of Q; row i of each array belongs to the probe z_i.
    #   w: Q'z_i; r: Q'A z_i, which is all of A z_i, as Q spans it; H: Q'A Q
    #   s: the direction that Q has and Q_i lacks, Q_i Q_i' = Q (I - s s') Q'. It is zero where Q
    #      lost a direction: then the range of A is in Q_i too.
    w, squares = lax.map(coordinates, jnp.arange(k))
    identity = jnp.eye(k, dtype=r.dtype)
    left_out = _left_out_directions(jnp.where(complete, r, identity))
    s = jnp.where(complete, left_out, 0)
    probes = _Probes(w, squares, r, s)
    size = dimension(params)
    values = _values_beside(H, probes, s[:, None], size)
    mean = jnp.mean(values)
    # Var(mean) = E[sum_i (t_i - mean)^2 / (k (k - 1))] + Cov(t_i, t_j), for any t_1 ... t_k that
    # are alike: the first term alone is that of independent values.
    apart = estimate_of(values).sem ** 2
    # Where a sketch of two vectors less misses all that matters, the covariance is noise of any
    # size: we never saw it beyond the first term.
    common = jnp.clip(_covariance(H, probes, values, size), 0, 2 * apart)
    return Estimate(mean, jnp.sqrt(apart + common))


class _Probes(NamedTuple):
    """What XTrace knows of its random vectors, in the coordinates of Q; row i is of z_i.

    Attributes:
      w: `Q'z_i`.
      squares: `|z_i|^2`.
      r: `Q'A z_i`.
      s: the unit vector that is orthogonal to all rows of r but row i, or zero.
    """

    w: Float[Array, "k k"]
    squares: Float[Array, " k"]
    r: Float[Array, "k k"]
    s: Float[Array, "k k"]


# n: directions that are left out of the sketch
def _values_beside(
    H: Float[Array, "k k"],
    probes: _Probes,
    directions: Float[Array, "k n k"],
    size: int,
) -> Float[Array, " k"]:
    """Estimate the trace by each probe, beside a sketch that lacks n orthonormal directions.

    With S the directions, `P = I - Q (I - S S') Q'` and u = P z scaled to the length
    `sqrt(d - k + n)` the estimate is `tr(H) - tr(S'H S) + u'A u`.
    """
    w, squares, r, _ = probes
    k = len(H)
    with jax.default_matmul_precision("highest"):
        S_w = jnp.einsum("inj,ij->in", directions, w)
        S_r = jnp.einsum("inj,ij->in", directions, r)
        trace_left_out = jnp.einsum("inj,jl,inl->i", directions, H, directions)
        # x: the coordinates of z's part in the sketch, (I - S S') Q'z
        x = w - jnp.einsum("in,inj->ij", S_w, directions)
        x_H = x @ H
    # With P z = z - Q x and P A z = Q (S S') r: z'P A P z = z'P A z - z'P A Q x, where
    # z'P A z = (S'w)'(S'r). Of the second term, by symmetry, (A P z)'Q x = x'r - x'H x.
    trace_beside = jnp.sum(S_w * S_r, axis=1) - jnp.sum(x * (r - x_H), axis=1)
    # u has the length sqrt(d - k + n), and |P z|^2 = |z|^2 - |x|^2.
    scale = (size - k + directions.shape[1]) / (squares - jnp.sum(x**2, axis=1))
    return jnp.trace(H) - trace_left_out + trace_beside * scale


def _covariance(
    H: Float[Array, "k k"], probes: _Probes, values: Float[Array, " k"], size: int
) -> Scalar:
    """Estimate the covariance of two values of XTrace, which have k - 2 vectors in common.

    With t_i^(j) the estimate by the probe z_i beside a sketch that has neither z_i nor z_j,

        Cov(t_i, t_j) = E[(t_i - t_i^(j)) (t_j - t_j^(i))].

    A value has the mean tr(A) whatever its sketch is. So `E[t_i t_j^(i)]` is tr(A)^2, since the
    second does not depend on z_i, the probe of the first; so are `E[t_i^(j) t_j]` and, as the
    two probes are independent, `E[t_i^(j) t_j^(i)]`.
    """
    s = probes.s
    k = len(s)

    # t_i^(j) for every i: the sketch lacks the span of s_i and s_j.
    def without(j: Array) -> Float[Array, " k"]:
        across = s - jnp.outer(s @ s[j], s[j])
        # Once more: directions may be alike to half of the digits, which rounding then tilts.
        across = across - jnp.outer(across @ s[j], s[j])
        length = jnp.linalg.norm(across, axis=1, keepdims=True)
        # i = j, or no direction at all
        second = jnp.where(length > 0, across / jnp.where(length > 0, length, 1), 0)
        first = jnp.broadcast_to(s[j], s.shape)
        return _values_beside(H, probes, jnp.stack([first, second], axis=1), size)

    by_pair = lax.map(without, jnp.arange(k))
    # d_ij = t_i - t_i^(j)
    d = jnp.where(jnp.eye(k, dtype=bool), 0, values[:, None] - by_pair.T)
    return jnp.sum(d * d.T) / k / (k - 1)


def estimate_of(values: Float[Array, " n"]) -> Estimate:
    """Return the mean of n values and its standard error, infinite for one value.

    The standard error is that of independent values.
    """
    n = len(values)
    mean = jnp.mean(values, axis=0)
    if n == 1:
        return Estimate(mean, jnp.full_like(mean, jnp.inf))
    variance = jnp.sum((values - mean) ** 2, axis=0) / n / (n - 1)
    return Estimate(mean, jnp.sqrt(variance))


class _Sketch(NamedTuple):
    """An orthonormal basis Q of the range of `Y = A [z_1 ... z_k]`.

    Attributes:
      basis: k rows, a tree; where y_i depends on those before it, row i is zero.
      coordinates: lower triangular, `Q'y_i` in row i: the transpose of R in `Y = Q R`.
      complete: whether no row is zero.
    """

    basis: PyTree[Array]
    coordinates: Float[Array, "k k"]
    complete: Bool[Array, ""]


def _sketch(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    size: int,
) -> _Sketch:
    """Multiply random vectors by A one by one, and orthonormalize the products as they come."""

    def add(
        basis: PyTree[Array],
        i: Array,
    ) -> tuple[PyTree[Array], tuple[Array, Array]]:
        z = draw(normal, jax.random.fold_in(key, i), params)
        y = checked(pin_to_iteration(matvec, i), z)
        return _with_row(basis, y, i)

    rows = zero_rows(params, size)
    with loops_for(matvec):
        basis, (coordinates, depends) = lax.scan(fast_convs_in_loops(add), rows, jnp.arange(size))
    return _Sketch(basis, coordinates, ~jnp.any(depends))


@partial(compiled, donate=(0,))
def _with_row(
    basis: PyTree[Array], y: Params, i: Array
) -> tuple[PyTree[Array], tuple[Array, Array]]:
    """Put the direction of y that the basis lacks into row i.

    Returns:
      the basis; the coordinates of y, and whether y depends on the rows before, to rounding.
    """
    residual, coordinates = reject(basis, y)
    length = norm(residual)
    # False where y is not finite: then everything is not.
    depends = length <= 10 * jnp.finfo(length.dtype).eps * norm(y)
    divisor = jnp.where(depends, 1, length)

    def unit_or_zero(x: Array) -> Array:
        return jnp.where(depends, 0, x / divisor).astype(x.dtype)

    basis = put_row(basis, jax.tree.map(unit_or_zero, residual), i)
    with_length = coordinates.at[i].set(length)
    return basis, (jnp.where(depends, coordinates, with_length), depends)


def _projection(
    matvec: Matvec,
    basis: PyTree[Array],
) -> Float[Array, "k k"]:
    """Return `Q'AQ`, by a product with A for each row."""

    def row(i: Array) -> Float[Array, " k"]:
        product = checked(pin_to_iteration(matvec, i), get_row(basis, i))
        return row_products(basis, product)

    num_rows = len(jax.tree.leaves(basis)[0])
    with loops_for(matvec):
        rows: Array = lax.map(fast_convs_in_loops(row), jnp.arange(num_rows))
    return rows


def _left_out_directions(r: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Return in row i the unit vector orthogonal to all rows of the lower triangular r but row i.

    These are the columns of the inverse of r, normalized (XTrace, section 2.1).
    """
    # The length of a row matters to no direction.
    unit_rows = r / jnp.linalg.norm(r, axis=1, keepdims=True)
    identity = jnp.eye(len(r), dtype=r.dtype)
    columns = solve_triangular(unit_rows, identity, lower=True)
    unit: Array = columns / jnp.linalg.norm(columns, axis=0)
    return unit.T


def _check(params: Params, num_products: int) -> None:
    check_params(params)
    check_count(4, num_products=num_products)
    size = dimension(params)
    if num_products > size:
        raise ValueError(
            f"num_products must be at most the {size} entries of params, got {num_products}: "
            "that many products give the exact trace, jnp.trace(curvax.to_dense(matvec, params))."
        )
