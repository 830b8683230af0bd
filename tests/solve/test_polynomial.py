"""Symmetric polynomials of a matrix against those of its eigenvalues, and as preconditioners."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.solve import PowerTraces, power_traces, symmetric_polynomial

VALUES = np.array([5.0, 2.0, 1.0, 0.5, 0.1])
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
MATRIX = (ROTATION * VALUES) @ ROTATION.T
LIKE = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(1)}


def tree_matvec(matrix):
    """`v -> matrix v` on trees, as a pytree that crosses `jit`."""

    def product(matrix, v):
        flat, unravel = jax.flatten_util.ravel_pytree(v)
        return unravel(matrix @ flat)

    return jax.tree_util.Partial(product, matrix)


def unscaled(traces):
    return traces.values * traces.scale ** jnp.arange(1, 1 + len(traces.values))


def elementary(values, order):
    return sum(math.prod(chosen) for chosen in itertools.combinations(values, order))


@jax.jit
def dense(traces, matrix, v):
    """The matrix of the preconditioner, which crosses `jit` as a pytree."""
    return curvax.to_dense(symmetric_polynomial(tree_matvec(matrix), traces), v)


def test_eigenvalues_are_polynomials_of_all_the_others(x64):
    """For every order, up to `P_(d-1) B = det(B) I`; and the recurrence of the docstring."""
    like = jax.tree.map(lambda x: x.astype(jnp.float64), LIKE)
    powers = [np.linalg.matrix_power(MATRIX, i) for i in range(5)]
    traces = unscaled(power_traces(tree_matvec(jnp.asarray(MATRIX)), like, order=4))
    np.testing.assert_allclose(traces, [np.trace(power) for power in powers[1:]], rtol=1e-12)
    P = [np.eye(5)]
    for t in range(1, 5):
        terms = [
            (-1) ** (i - 1) * P[t - i] @ (np.trace(powers[i]) * np.eye(5) - powers[i])
            for i in range(1, t + 1)
        ]
        P.append(sum(terms) / t)
        got = dense(traces[:t], jnp.asarray(MATRIX), like) * elementary(VALUES, t)
        np.testing.assert_allclose(got, P[t], rtol=1e-9, atol=1e-10)
        others = [elementary(np.delete(VALUES, i), t) for i in range(5)]
        np.testing.assert_allclose(got, (ROTATION * others) @ ROTATION.T, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(got @ MATRIX, np.prod(VALUES) * np.eye(5), atol=1e-10)


def test_estimated_traces_average_to_the_exact_ones(x64):
    """Orders 1 to 5 by random probes, within four standard errors of the exact traces."""
    matvec, v = tree_matvec(jnp.asarray(MATRIX)), jnp.zeros(5)
    estimate = jax.jit(jax.vmap(lambda key: unscaled(power_traces(matvec, v, 5, key, 2))))
    each = np.asarray(estimate(jax.random.split(jax.random.key(0), 400)))
    exact = np.array([(VALUES**power).sum() for power in range(1, 6)])
    error = each.std(axis=0) / 20
    assert (error > 0).all() and (np.abs(each.mean(axis=0) - exact) < 4 * error).all()


def test_gradient_descent_no_longer_sees_the_gap(x64):
    """Three eigenvalues far above 97 others: order 3 lowers them to the sum of the others."""
    others = jnp.linspace(1.0, 2.0, 97)
    values = jnp.concatenate([jnp.array([1e4, 3e3, 1e3]), others])
    matvec, b = (lambda v: values * v), jnp.ones(100)
    precondition = symmetric_polynomial(matvec, jnp.stack([jnp.sum(values**i) for i in (1, 2, 3)]))
    spread = values * precondition(b)
    np.testing.assert_allclose(spread[:3], others.sum(), rtol=0.2)
    # e_3 of all but the i-th is e_3 - value_i (e_2 - value_i (e_1 - value_i)).
    e = np.poly(-values)
    expected = values * (e[3] - values * (e[2] - values * (e[1] - values))) / e[3]
    np.testing.assert_allclose(spread, expected, rtol=1e-8)

    @jax.jit
    def descend(v):
        down = lambda P, rate: lambda _, x: x - rate * P(matvec(x) - b)
        run = lambda P, rate: jax.lax.fori_loop(0, 1000, down(P, rate), v)
        return run(precondition, 1 / spread.max()), run(lambda v: v, 1 / values.max())

    with_it, without = (jnp.max(jnp.abs(values * x - b)) for x in descend(jnp.zeros(100)))
    assert with_it < 1e-3 and without > 0.5


def test_it_preconditions_conjugate_gradients(x64):
    """Of order d - 1 it is the inverse but for a factor: one step."""
    matvec, b = tree_matvec(jnp.asarray(MATRIX)), jnp.ones(5)
    preconditioner = symmetric_polynomial(
        matvec, jnp.asarray([np.sum(VALUES**i) for i in (1, 2, 3, 4)])
    )
    solve = jax.jit(lambda matvec, b, P: curvax.cg(matvec, b, tol=1e-9, preconditioner=P))
    x, info = solve(matvec, b, preconditioner)
    np.testing.assert_allclose(x, np.linalg.solve(MATRIX, b), rtol=1e-9)
    assert info.converged and info.steps == 1


def test_large_numbers_and_bad_traces_in_float32():
    """Powers beyond the range of float32 are no matter; impossible traces cut the order."""
    values = jnp.full(1000, 1e6)
    traces = jnp.array([1e9, 1e15, 1e21])
    v = jnp.ones(1000, jnp.bfloat16)
    precondition = symmetric_polynomial(lambda v: values.astype(v.dtype) * v, traces)
    # All eigenvalues alike: e_3 of 999 of them over e_3 of 1000.
    out = precondition(v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 0.997, rtol=5e-3)
    # tr(B^2) > tr(B)^2 is that of no such matrix, and e_2 is negative.
    diagonal = jnp.array([3.0, 1.0, 0.0, 0.0])
    # Nor are traces known whose powers left the floats.
    tiny = 1e-20 * diagonal
    for bad in ([4.0, 17.0, 28.0], [4.0]):
        cut = symmetric_polynomial(lambda v: diagonal * v, jnp.array(bad))
        np.testing.assert_allclose(cut(jnp.ones(4)), [0.25, 0.75, 1, 1], rtol=1e-6)
    cut = symmetric_polynomial(lambda v: tiny * v, jnp.array([4e-20, 0.0, 0.0]))
    np.testing.assert_allclose(cut(jnp.ones(4)), [0.25, 0.75, 1, 1], rtol=1e-6)
    nothing = symmetric_polynomial(lambda v: 0 * v, jnp.zeros(2))
    assert nothing(jnp.ones(3)).tolist() == [1, 1, 1]


def test_a_preconditioner_does_not_depend_on_the_scale_of_the_matrix():
    """From 1e-25 to 1e25 in float32, where powers of the matrix leave the floats."""

    @jax.jit
    @jax.vmap
    def diagonal_of(scale):
        matvec = lambda v: scale * jnp.asarray(VALUES, jnp.float32) * v
        traces = power_traces(matvec, jnp.zeros(5), order=4)
        return symmetric_polynomial(matvec, traces)(jnp.ones(5))

    scales = jnp.array([1.0, 1e-9, 1e-25, 1e25])
    expected = [elementary(np.delete(VALUES, i), 4) / elementary(VALUES, 4) for i in range(5)]
    np.testing.assert_allclose(diagonal_of(scales), np.tile(expected, (4, 1)), rtol=1e-4, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match=r"traces must be \[t\], tr\(B\) to tr\(B\^t\); got \[\]"):
        symmetric_polynomial(lambda v: v, jnp.float32(1))
    with pytest.raises(ValueError, match=r"traces must be \[t\].*got \[1, 2\]"):
        symmetric_polynomial(lambda v: v, PowerTraces(1.0, jnp.ones((1, 2))))
    with pytest.raises(ValueError, match=r"2 traces for a matrix of 2 rows.*at most 1"):
        symmetric_polynomial(lambda v: v, jnp.ones(2))(jnp.ones(2))
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        power_traces(lambda v: v, jnp.ones(2), 0)
