"""Tracked eigenbases against literal NumPy, on factors that drift, vanish, and are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kron import Diagonal, Full, Identity
from curvax.kron._eigenbasis import (
    _tracked,
    default_basis_method,
    first_bases,
    first_basis,
    tracked_bases,
    tracked_basis,
)

pytestmark = pytest.mark.usefixtures("x64")


def orthogonal(seed, stack, n):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(stack, n, n)))[0]


def with_values(seed, values):
    """Symmetric matrices with these eigenvalues `[s, n]`, and their eigenbases."""
    q = orthogonal(seed, *np.shape(values))
    return (q * np.asarray(values)[:, None]) @ q.swapaxes(1, 2), q


def ratio(matrix, basis):
    """The off-diagonal ratio as it is defined, in float64."""
    b = np.swapaxes(basis, 1, 2).astype(float) @ np.asarray(matrix, float) @ basis
    beside = b * (1 - np.eye(b.shape[-1]))
    return np.linalg.norm(beside, axis=(1, 2)) / np.linalg.norm(b, axis=(1, 2))


def close(got, want, tolerance=1e-12):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_a_step_is_qr_of_the_sorted_product():
    matrix, q = with_values(0, np.random.default_rng(1).uniform(0.1, 2, (3, 6)))
    old = q + 0.1 * np.random.default_rng(2).normal(size=q.shape)
    old = np.linalg.qr(old)[0]
    diagonal = Diagonal(jnp.asarray([[1.0, 3.0]] * 2))
    # Two full factors of one size are one batch, whose slices must find their way back.
    factors = [Full(jnp.asarray(matrix[:2])), diagonal, Full(jnp.asarray(matrix[2:]))]
    bases = [jnp.asarray(old[:2]), None, jnp.asarray(old[2:])]
    first, of_diagonal, last = jax.jit(tracked_bases)(factors, bases)
    for k, basis in enumerate(np.concatenate([first.basis, last.basis])):
        b = old[k].T @ matrix[k] @ old[k]
        o = np.argsort(-np.diag(b))
        want = np.linalg.qr(matrix[k] @ old[k][:, o])[0]
        close(basis * np.sign(np.sum(basis * want, axis=0)), want)
        result, row = (first, k) if k < 2 else (last, k - 2)
        np.testing.assert_array_equal(result.order[row], o)
        close(result.values[row], np.diag(b)[o])
    close(np.concatenate([first.off_diagonal_ratio, last.off_diagonal_ratio]), ratio(matrix, old))
    assert of_diagonal.basis is None and of_diagonal.order.tolist() == [[0, 1]] * 2
    assert of_diagonal.off_diagonal_ratio.tolist() == [0, 0]
    # The QR algorithm's step, without the sort, is the same one.
    unsorted = tracked_basis(factors[0], bases[0], sort=False)
    b = old[:2].swapaxes(1, 2) @ matrix[:2] @ old[:2]
    want = old[:2] @ np.linalg.qr(b)[0]
    close(unsorted.basis * np.sign(np.sum(unsorted.basis * want, axis=1))[:, None], want)
    np.testing.assert_array_equal(unsorted.order, [np.arange(6)] * 2)


def test_the_first_basis_is_in_descending_order():
    matrix, _ = with_values(0, [[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    result, of_identity = first_bases([jnp.asarray(matrix), Identity(jnp.ones(2), 4)])
    close(result.values, [[3, 2, 1], [5, 0, 0]])
    close(ratio(matrix, np.asarray(result.basis)), 0)
    close(result.off_diagonal_ratio, ratio(matrix, np.broadcast_to(np.eye(3), (2, 3, 3))))
    assert of_identity.basis is None and of_identity.order.shape == (2, 4)
    assert default_basis_method() == ("eigh" if jax.default_backend() == "cpu" else "qr")


def test_one_step_each_time_follows_a_running_average_that_drifts():
    n, decay = 24, 0.95
    rng = np.random.default_rng(0)
    skew = rng.normal(size=(n, n))
    generator = jnp.asarray((skew - skew.T) / n**0.5)
    values = jnp.asarray(1.0 / np.arange(1, n + 1) ** 2)
    turn = jax.scipy.linalg.expm(0.02 * generator)
    rows = jnp.asarray(rng.normal(size=(60, 2 * n, n)))

    def step(carry, x):
        average, truth, basis = carry
        # samples with eigenvalues k^-2 in a basis that turns in every step
        x = (x * jnp.sqrt(values)) @ truth.T
        average = decay * average + (1 - decay) * x.T @ x / len(x)
        result = tracked_basis(average[None], basis)
        after = jnp.concatenate([result.basis, start])
        product = after.swapaxes(1, 2) @ average @ after
        beside = jnp.linalg.norm(product * (1 - jnp.eye(n)), axis=(1, 2))
        ratios = beside / jnp.linalg.norm(product, axis=(1, 2))
        return (average, truth @ turn, result.basis), (result.off_diagonal_ratio[0], ratios)

    average = jnp.diag(values)
    start = first_basis(average[None]).basis
    carry = average, jnp.eye(n), start
    (_, _, basis), (before, after) = jax.jit(lambda c: jax.lax.scan(step, c, rows))(carry)
    tracked, fixed = np.asarray(after[20:]).T
    assert tracked.max() < 0.01 and np.median(tracked) < 0.5 * np.median(before[20:])
    assert fixed[-20:].min() > 0.2  # so it does turn
    close(basis[0].T @ basis[0], np.eye(n))


def test_the_criterion_does_not_cancel_in_float32():
    n = 24
    values = 1 / np.arange(1.0, n + 1)
    beside = np.random.default_rng(0).normal(size=(n, n))
    beside = (beside + beside.T) * (1 - np.eye(n))
    beside *= 9.6e-5 * np.linalg.norm(values) / np.linalg.norm(beside)
    matrix = jnp.asarray(np.diag(values) + beside, jnp.float32)[None]
    identity = jnp.eye(n, dtype=jnp.float32)[None]
    result = tracked_basis(matrix, identity, tolerance=9e-5)
    np.testing.assert_allclose(result.off_diagonal_ratio, 9.6e-5, rtol=1e-2)
    assert result.basis.dtype == jnp.float32 and ratio(matrix, result.basis) < 9e-5
    # |B|^2 - |diag B|^2, which would skip here
    total, diagonal = jnp.sum(matrix**2), jnp.sum(jnp.diagonal(matrix[0]) ** 2)
    assert jnp.sqrt(jnp.maximum(total - diagonal, 0) / total) < 2e-5 or total < diagonal
    # In a basis that is no identity, rounded to float32, too.
    q = jnp.asarray(orthogonal(1, 1, n), jnp.float32)
    wide = np.asarray(q, float)
    turned = jnp.asarray(wide @ np.asarray(matrix, float) @ wide.swapaxes(1, 2))
    reading = tracked_basis(turned.astype(jnp.float32), q).off_diagonal_ratio
    np.testing.assert_allclose(reading, 9.6e-5, rtol=2e-2)


def test_slices_within_the_tolerance_keep_their_basis_bit_by_bit():
    matrix, q = with_values(0, [[3.0, 1.0, 2.0, 0.5]] * 3)
    rotation = np.eye(4)
    angle = 0.05
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    old = jnp.asarray(np.stack([q[0], q[1] @ rotation, q[2]]))
    step = jax.jit(functools.partial(tracked_basis, tolerance=0.01))
    result = step(jnp.asarray(matrix), old)
    np.testing.assert_array_equal(result.basis[::2], old[::2])
    np.testing.assert_array_equal(result.order, [[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3]])
    assert result.is_turned.tolist() == [False, True, False]
    assert 0.01 < result.off_diagonal_ratio[1] < 0.1
    assert ratio(matrix, np.asarray(result.basis))[1] < 0.5 * result.off_diagonal_ratio[1]


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_a_basis_of_zeros_is_replaced_by_the_eigenbasis(method):
    matrix, q = with_values(0, [[3.0, 1.0, 2.0, 0.5]] * 3)
    matrix[2] = 0
    old = jnp.asarray(q).at[::2].set(0)
    for tolerance in (0.0, 0.5):
        result = tracked_basis(jnp.asarray(matrix), old, tolerance, method=method)
        close(ratio(matrix[:1], np.asarray(result.basis[:1])), 0)
        close(result.values[0], [3, 2, 1, 0.5])
        assert result.off_diagonal_ratio[::2].tolist() == [1, 1] and result.is_turned[0]
        close(result.basis[2].T @ result.basis[2], np.eye(4))
        assert bool(jnp.all(result.basis[1] == old[1])) == (tolerance > 0)


def test_eigh_skips_too_and_puts_columns_after_those_before():
    matrix, q = with_values(0, [[3.0, 1.0, 2.0, 0.5]] * 2)
    near = np.linalg.qr(q[1] + 0.05 * np.random.default_rng(2).normal(size=(4, 4)))[0]
    old = jnp.asarray(np.stack([q[0], near]))
    result = tracked_basis(jnp.asarray(matrix), old, 0.01, method="eigh")
    np.testing.assert_array_equal(result.basis[0], old[0])
    close(result.values, [[3, 1, 2, 0.5], [3, 2, 1, 0.5]])
    np.testing.assert_array_equal(result.order, [[0, 1, 2, 3], [0, 2, 1, 3]])
    overlap = np.abs(result.basis[1].T @ old[1][:, result.order[1]])
    assert (np.diag(overlap) > 0.9).all()


def conditionals(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text().count(" conditional(")


def test_skipping_stays_conditional_under_vmap():
    matrix, q = with_values(0, [[3.0, 1.0, 2.0, 0.5]] * 4)
    matrices, bases = jnp.asarray(matrix).reshape(2, 2, 4, 4), jnp.asarray(q).reshape(2, 2, 4, 4)
    bases = bases.at[1, 0].set(jnp.eye(4))
    # On CPUs slices go one after another, elsewhere a stack is one call.
    stack_at_once = lambda m, q: _tracked(Full(m), q, tolerance=0.01, sort=True, method="qr")
    for fn in (functools.partial(tracked_basis, tolerance=0.01), stack_at_once):
        assert conditionals(jax.vmap(fn), matrices, bases) >= 1
        result = jax.jit(jax.vmap(fn))(matrices, bases)
        np.testing.assert_array_equal(result.basis[0], bases[0])
        assert not jnp.any(result.basis[1, 0] == bases[1, 0])


@pytest.mark.parametrize("dtype, error", [(jnp.float64, 1e-12), (jnp.float32, 1e-5)])
def test_bases_of_factors_without_full_rank_are_orthogonal(dtype, error):
    # rank 1, with what spans its range in the last column
    u = orthogonal(0, 1, 8)
    matrix = jnp.asarray(u[:, :, -1:] @ u[:, :, -1:].swapaxes(1, 2), dtype)
    old = jnp.asarray(u, dtype)
    step = jax.jit(tracked_basis, static_argnames="sort")
    basis = step(matrix, old).basis
    close(basis[0].T @ basis[0], np.eye(8), error)
    assert ratio(matrix, np.asarray(basis)) < error
    # Unsorted, the first columns are rounding errors of zero, and the last goes without its share.
    unsorted = step(matrix, old, sort=False).basis
    close(unsorted[0].T @ unsorted[0], np.eye(8), error)
    assert ratio(matrix, np.asarray(unsorted)) > 0.1


def test_zeros_and_what_is_not_finite_keep_the_basis():
    matrix, _ = with_values(0, [[3.0, 1.0, 2.0, 0.5]] * 4)
    matrix[0], matrix[1, 2, 2], matrix[2, 1, 0] = 0, np.inf, np.nan
    old = orthogonal(1, 4, 4)
    for tolerance in (0.0, 0.01):
        result = tracked_basis(jnp.asarray(matrix), jnp.asarray(old), tolerance)
        np.testing.assert_array_equal(result.basis[:3], old[:3])
        assert result.is_finite.tolist() == [True, False, False, True]
        assert np.isfinite(result.off_diagonal_ratio).all() and result.off_diagonal_ratio[0] == 0
        assert not np.any(result.basis[3] == old[3])
    first = first_basis(jnp.asarray(matrix))
    assert first.is_finite.tolist() == [True, False, False, True]
    close(first.basis.swapaxes(1, 2) @ first.basis, np.broadcast_to(np.eye(4), (4, 4, 4)))
    np.testing.assert_array_equal(first.basis[1], np.eye(4))
    broken = tracked_basis(Diagonal(jnp.array([[1.0, jnp.nan]])), None)
    assert broken.is_finite.tolist() == [False]


def test_small_curvature_and_small_floats():
    matrix, q = with_values(0, [[3.0, 1.0, 2.0, 0.5]])
    old = jnp.asarray(np.linalg.qr(q + 0.05)[0], jnp.float32)
    single = jnp.asarray(matrix, jnp.float32)
    want = tracked_basis(single, old)
    # Squares of 1e-30 are zero in float32.
    small = tracked_basis(single * 1e-30, old)
    close(small.off_diagonal_ratio, want.off_diagonal_ratio, 1e-5)
    close(small.basis, want.basis, 1e-5)
    result = tracked_basis(single.astype(jnp.bfloat16), old.astype(jnp.bfloat16))
    assert result.basis.dtype == result.off_diagonal_ratio.dtype == jnp.float32


def test_refusals():
    with pytest.raises(ValueError, match=r"must be matrices \[stack, n, n\], got float64\[3, 3\]"):
        first_basis(jnp.eye(3))
    with pytest.raises(ValueError, match=r"must be \[1, 3, 3\] as the factor is, got float64"):
        tracked_basis(jnp.eye(3)[None], jnp.eye(4)[None])
    with pytest.raises(ValueError, match="unknown method 'svd'"):
        tracked_basis(jnp.eye(3)[None], jnp.eye(3)[None], method="svd")
    with pytest.raises(ValueError, match="begin with the basis of first_basis"):
        tracked_basis(jnp.eye(3)[None], None)
    with pytest.raises(ValueError, match="diagonal factor is I and must be None"):
        tracked_basis(Diagonal(jnp.ones((1, 3))), jnp.eye(3)[None])
