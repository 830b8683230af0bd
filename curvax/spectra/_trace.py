"""Traces of matrices with a few large eigenvalues: a sketch holds those, random probes see only the rest."""

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
from curvax.solve._rows import put_row, zero_rows
from curvax.spectra._lanczos import draw, reject


def hutchpp(matvec: Matvec, params: Params, num_products: int, key: PRNGKey) -> Estimate:
    """Estimate the trace of a symmetric matrix by Hutch++: exactly on a sketch of its range, by Hutchinson beside it.

    With Q an orthonormal basis of `A [z_1 ... z_k]`, k a third of the products, and P = I - QQ':
    `tr(A) = tr(Q'AQ) + E[g'P A P g]`. On matrices whose eigenvalues decay the error falls as 1/m, where that of
    `curvax.hutchinson_trace` falls as `1/sqrt(m)`; nothing is gained on those whose eigenvalues are alike.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric. It gets vectors of at least float32.
      params: pytree of d float numbers that gives shapes, dtypes and shardings of the vectors.
      key: JAX key.
      num_products: m, from 4 to d; k = m // 3 each for the sketch and for `tr(Q'AQ)`, the rest for probes g.

    Returns:
      `Estimate(mean, sem)` of scalars, in at least float32: unbiased, and exact where the rank is at most k. `sem` comes
      from the probes g, the only random part once Q is known.

    Raises:
      ValueError: fewer products than 4, or more than d, which give the exact trace; a matvec that returns another tree
        than it is given.

    Cost: m products, one at a time, and `3 k m d` multiplications. Memory: k trees like params.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import hutchpp
      >>> matvec = lambda v: {"w": 3.0 * jnp.sum(v["w"]) * jnp.ones(8)}          # rank one, trace 24
      >>> estimate = hutchpp(matvec, {"w": jnp.zeros(8)}, 6, jax.random.key(0))
      >>> round(float(estimate.mean), 3), round(float(estimate.sem), 3)
      (24.0, 0.0)

    References: Meyer, Musco, Musco and Woodruff (2021), Hutch++: optimal stochastic trace estimation, algorithm 1.

    Deviates: the vectors of the sketch are normal; random signs, as published, may all be orthogonal to what they look for.
    """
    _check(params, num_products)
    size = num_products // 3
    sketch_key, probe_key = jax.random.split(key)
    sketch = _sketch(matvec, params, sketch_key, size)
    inside = jnp.trace(_projection(matvec, sketch.basis))

    def beside(i: Array) -> Scalar:
        g, _ = reject(sketch.basis, draw(rademacher, jax.random.fold_in(probe_key, i), params))
        return inner_product(g, checked(pin_to_iteration(matvec, i), g))

    with loops_for(matvec):
        values = lax.map(fast_convs_in_loops(beside), jnp.arange(num_products - 2 * size))
    return estimate_of(inside + values)


def xtrace(matvec: Matvec, params: Params, num_products: int, key: PRNGKey) -> Estimate:
    """Estimate the trace of a symmetric matrix by XTrace, which uses every product for the sketch and as a probe.

    Each of k = m/2 random vectors z_i is the probe beside the sketch of the others: with Q_i an orthonormal basis of
    `A [z_j, j != i]`, P_i = I - Q_i Q_i' and u_i = P_i z_i scaled to the length `sqrt(d - k + 1)`,
    `tr(A) = mean_i of tr(Q_i'A Q_i) + u_i'A u_i`.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric. It gets vectors of at least float32.
      params: pytree of d float numbers that gives shapes, dtypes and shardings of the vectors.
      key: JAX key.
      num_products: m, from 4 to d; of an odd number one is left.

    Returns:
      `Estimate(mean, sem)` of scalars, in at least float32: unbiased, and exact where the rank is below k. `sem` takes the
      k values for independent, which they are not quite: in our tests it is 0.7 to 1 times the true error.

    Raises:
      ValueError: fewer products than 4, or more than d, which give the exact trace; a matvec that returns another tree
        than it is given.

    Cost: m products, one at a time, and `6 k^2 d` multiplications. Memory: k trees like params.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import xtrace
      >>> matvec = lambda v: {"w": 3.0 * jnp.sum(v["w"]) * jnp.ones(8)}          # rank one, trace 24
      >>> estimate = xtrace(matvec, {"w": jnp.zeros(8)}, 6, jax.random.key(0))
      >>> round(float(estimate.mean), 3), round(float(estimate.sem), 3)
      (24.0, 0.0)

    References: Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic trace estimation,
      sections 2.1 and 2.3 (normalization).
    """
    _check(params, num_products)
    size = num_products // 2
    basis, r, complete = _sketch(matvec, params, key, size)
    H = _projection(matvec, basis)

    def coordinates(i: Array) -> tuple[Float[Array, " k"], Scalar]:
        z = draw(normal, jax.random.fold_in(key, i), params)
        return row_products(basis, z), inner_product(z, z)

    # Row i of each belongs to probe z_i, in the basis Q. w: z_i; r: A z_i; s: the direction that Q has and Q_i lacks
    # (zero where Q lost a direction: then the range of A is in Q_i too); x: the part of z_i in Q_i.
    w, squares = lax.map(coordinates, jnp.arange(size))
    s = jnp.where(complete, _left_out(jnp.where(complete, r, jnp.eye(size, dtype=r.dtype))), 0)
    along = jnp.sum(s * w, axis=1)
    x = w - along[:, None] * s
    with jax.default_matmul_precision("highest"):
        inside = jnp.trace(H) - jnp.sum(s * (s @ H), axis=1)
        beside = along * jnp.sum(s * r, axis=1) - jnp.sum(x * (r - x @ H), axis=1)
    return estimate_of(
        inside + beside * (dimension(params) - size + 1) / (squares - jnp.sum(x**2, axis=1))
    )


def estimate_of(values: Float[Array, " n"]) -> Estimate:
    """Return the mean of n values and its standard error, as if they were independent; infinite for one."""
    mean, n = jnp.mean(values, axis=0), len(values)
    sem = (
        jnp.sqrt(jnp.sum((values - mean) ** 2, axis=0) / n / (n - 1))
        if n > 1
        else jnp.full_like(mean, jnp.inf)
    )
    return Estimate(mean, sem)


class _Sketch(NamedTuple):
    """An orthonormal basis Q of the range of `Y = A [z_1 ... z_k]`.

    Attributes:
      basis: k rows, a tree; where y_i depends on those before it, row i is zero.
      coordinates: row i: `Q'y_i`.
      complete: no row is zero.
    """

    basis: PyTree[Array]
    coordinates: Float[Array, "k k"]
    complete: Bool[Array, ""]


def _sketch(matvec: Matvec, params: Params, key: PRNGKey, size: int) -> _Sketch:
    def add(basis: PyTree[Array], i: Array) -> tuple[PyTree[Array], tuple[Array, Array]]:
        y = checked(pin_to_iteration(matvec, i), draw(normal, jax.random.fold_in(key, i), params))
        return _with_row(basis, y, i)

    empty = zero_rows(params, size)
    with loops_for(matvec):
        basis, (coordinates, depends) = lax.scan(fast_convs_in_loops(add), empty, jnp.arange(size))
    return _Sketch(basis, coordinates, ~jnp.any(depends))


@partial(compiled, donate=(0,))
def _with_row(
    basis: PyTree[Array], y: Params, i: Array
) -> tuple[PyTree[Array], tuple[Array, Array]]:
    """Make row i of what y adds to the basis; return the coordinates of y, and whether it adds nothing."""
    rest, along = reject(basis, y)
    length = norm(rest)
    depends = length <= 10 * jnp.finfo(length.dtype).eps * norm(
        y
    )  # False where y is not finite: then all is not
    row = jax.tree.map(
        lambda x: jnp.where(depends, 0, x / jnp.where(depends, 1, length)).astype(x.dtype), rest
    )
    return put_row(basis, row, i), (jnp.where(depends, along, along.at[i].set(length)), depends)


def _projection(matvec: Matvec, basis: PyTree[Array]) -> Float[Array, "k k"]:
    """Return `Q'AQ`."""

    def row(i: Array) -> Float[Array, " k"]:
        q = jax.tree.map(lambda rows: lax.dynamic_index_in_dim(rows, i, keepdims=False), basis)
        return row_products(basis, checked(pin_to_iteration(matvec, i), q))

    with loops_for(matvec):
        rows: Array = lax.map(fast_convs_in_loops(row), jnp.arange(len(jax.tree.leaves(basis)[0])))
    return rows


def _left_out(r: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Return in row i the unit vector orthogonal to all rows of the lower triangular r but row i."""
    scaled = r / jnp.linalg.norm(
        r, axis=1, keepdims=True
    )  # the length of a row matters to no direction
    columns = solve_triangular(scaled, jnp.eye(len(r), dtype=r.dtype), lower=True)
    unit: Array = columns / jnp.linalg.norm(columns, axis=0)
    return unit.T


def _check(params: Params, num_products: int) -> None:
    check_params(params)
    check_count(4, num_products=num_products)
    if num_products > dimension(params):
        raise ValueError(
            f"num_products must be at most the {dimension(params)} entries of params, got {num_products}: that many "
            "products give the exact trace, jnp.trace(curvax.to_dense(matvec, params))."
        )
