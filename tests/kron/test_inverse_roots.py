"""Inverse roots by `eigh` and by products against dense roots, over conditions from 1e2 to 1e8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kron import Diagonal, Full, Identity
from curvax.kron._inverse_roots import (
    _root,
    default_root_method,
    inverse_root,
    inverse_roots,
)

pytestmark = pytest.mark.usefixtures("x64")

CONDITIONS = np.array([1e2, 1e4, 1e6, 1e8])


def with_values(values, seed=0):
    """Symmetric matrices with these eigenvalues `[s, n]`."""
    values = np.asarray(values)
    q = np.random.default_rng(seed).normal(size=(*values.shape, values.shape[1]))
    q = np.linalg.qr(q)[0]
    return (q * values[:, None]) @ q.swapaxes(1, 2)


def spectra(n=24):
    """One matrix of every condition, with eigenvalues spread over the logarithm."""
    return with_values(CONDITIONS[:, None] ** -np.linspace(0, 1, n))


def dense_root(matrix, p):
    values, vectors = np.linalg.eigh(np.asarray(matrix, float))
    return (vectors * values[..., None, :] ** (-1 / p)) @ vectors.swapaxes(-1, -2)


def residuals(matrix, root, p):
    """`|A X^p - I|`, as the root mean square over rows, in float64."""
    matrix, root = np.asarray(matrix, float), np.asarray(root, float)
    beside = matrix @ np.linalg.matrix_power(root, p) - np.eye(matrix.shape[-1])
    return np.linalg.norm(beside, axis=(1, 2)) / matrix.shape[-1] ** 0.5


def errors(got, want):
    return np.linalg.norm(got - want, axis=(1, 2)) / np.linalg.norm(want, axis=(1, 2))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_products_are_right_or_eigh_is_taken(dtype, p):
    matrix = jnp.asarray(spectra(), dtype)
    result = jax.jit(lambda a: inverse_root(Full(a), p, "products"))(matrix)
    root, eps = result.root.matrix, float(jnp.finfo(dtype).eps)
    assert root.dtype == dtype and result.is_finite.all()
    # What rounding A alone does to the residual is its condition times the precision.
    fell_back = [False] * 3 + [dtype == jnp.float32]
    assert result.fell_back.tolist() == fell_back
    right = ~np.array(fell_back)
    assert (residuals(matrix, root, p) < 4 * p * CONDITIONS * eps)[right].all()
    assert (residuals(matrix, root, p) < 0.1)[right].all()
    assert (errors(root, dense_root(matrix, p)) < CONDITIONS * eps)[right].all()
    np.testing.assert_array_equal(root, root.swapaxes(1, 2))
    # By eigh what is below the precision counts as the precision: positive definite, and bounded.
    by_eigh = inverse_root(Full(matrix[3:]), p).root.matrix
    if dtype == jnp.float32:
        assert errors(root[3:], by_eigh) < 1e-2
        assert np.linalg.eigvalsh(np.asarray(root[3], float)).min() > 0
        assert np.linalg.norm(root[3], 2) < 1.01 * eps ** (-1 / p)
    else:
        assert residuals(matrix[3:], by_eigh, p) < 4 * p * CONDITIONS[3] * eps


def test_the_error_that_the_iteration_reports_is_not_that_of_its_root():
    """In float32 at a condition of 1e8, where no root in float32 has a small residual.

    The iteration ends well, with `|M - I| < 1e-6`; that of its X is not.
    """
    matrix = jnp.asarray(spectra()[3:], jnp.float32)
    for tolerance, is_wrong in ((1e6, False), (0.1, True)):
        result = inverse_root(Full(matrix), 2, "products", tolerance=tolerance)
        assert result.fell_back[0] == is_wrong
        assert result.is_finite[0] and residuals(matrix, result.root.matrix, 2) > 0.2


def test_a_damped_factor_has_a_root_of_seven_digits_whatever_its_condition():
    values = 10.0 ** -np.linspace(0, 12, 24)[None] + 1e-3
    matrix = jnp.asarray(with_values(values), jnp.float32)
    result = inverse_root(Full(matrix), 4, "products", tolerance=1e-3)
    assert not result.fell_back[0]
    assert errors(result.root.matrix, dense_root(matrix, 4)) < 1e-5


@pytest.mark.parametrize("method", ["eigh", "products"])
def test_factors_of_any_structure_size_and_root_at_once(method):
    rng = np.random.default_rng(0)
    # 5 and 6 rows are one batch, padded; powers keep batches apart.
    sizes, powers = (6, 5, 5, 9), (2, 2, 3, 4)
    matrices = [with_values(rng.uniform(0.1, 4, (2, n)), n) for n in sizes]
    full = [Full(jnp.asarray(matrix)) for matrix in matrices]
    diagonal = Diagonal(jnp.asarray(rng.uniform(0.1, 4, (2, 3))))
    identity = Identity(jnp.array([4.0, 16.0]), 3)
    compute = jax.jit(lambda factors: inverse_roots(factors, [*powers, 2, 4], method))
    results = compute([*full, diagonal, identity])
    for matrix, p, result in zip(matrices, powers, results, strict=False):
        np.testing.assert_allclose(result.root.matrix, dense_root(matrix, p), rtol=0, atol=1e-10)
        assert result.is_finite.tolist() == [True, True] and not result.fell_back.any()
    of_diagonal, of_identity = results[4:]
    np.testing.assert_allclose(of_diagonal.root.entries, diagonal.entries**-0.5, rtol=1e-12)
    np.testing.assert_allclose(of_identity.root.scale, [4**-0.25, 0.5], rtol=1e-12)
    assert of_identity.root.size == 3 and of_identity.is_finite.shape == (2,)


def test_the_root_of_the_pseudo_inverse():
    values = np.array([[4.0, 1e-6, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    matrix = with_values(values)
    result = inverse_root(Full(jnp.asarray(matrix)), 2, rtol=1e-5)
    root = np.asarray(result.root.matrix)
    assert result.is_finite.all()
    # a square root of the pseudo-inverse, and zero where A is (nearly) zero
    want = np.linalg.pinv(matrix, rcond=1e-5, hermitian=True)
    np.testing.assert_allclose(root @ root, want, atol=1e-12)
    assert np.linalg.matrix_rank(root[0]) == 2 and not root[1].any()
    of_diagonal = inverse_root(Diagonal(jnp.asarray(values)), 2, rtol=1e-5)
    np.testing.assert_allclose(of_diagonal.root.entries, [[0.5, 0, 1, 0], [0] * 4])
    # Without rtol zeros have no root, and the caller is told.
    without = inverse_root(Full(jnp.asarray(matrix)), 2)
    assert without.is_finite.tolist() == [True, False]
    assert inverse_root(Diagonal(jnp.asarray(values)), 2).is_finite.tolist() == [False, False]


@pytest.mark.parametrize("method", ["eigh", "products"])
def test_what_is_not_finite_is_told_and_scale_does_not_matter(method):
    matrix = np.repeat(with_values([[1.0, 2.0, 3.0, 4.0]]), 6, axis=0)
    matrix[1, 0, 1], matrix[2, 3, 3], matrix[3] = np.nan, np.inf, 0
    matrix[4] *= 1e-30  # whose squares are zero in float32
    matrix[5] *= 1e30
    single = jnp.asarray(matrix, jnp.float32)
    result = jax.jit(lambda a: inverse_root(Full(a), 4, method))(single)
    assert result.is_finite.tolist() == [True, False, False, False, True, True]
    usable = [0, 4, 5]
    root = np.asarray(result.root.matrix)[usable]
    assert (errors(root, dense_root(single[jnp.array(usable)], 4)) < 2e-6).all()
    # A slice that fails takes no other one with it; only zeros were tried by eigh too.
    assert result.fell_back.tolist() == [False] * 3 + [method == "products"] + [False] * 2
    narrow = inverse_root(Full(single[:1].astype(jnp.bfloat16)), 2, method)
    assert narrow.root.matrix.dtype == jnp.float32


def test_the_fall_back_stays_conditional_under_vmap():
    matrix = jnp.asarray(spectra(6), jnp.float32).reshape(2, 2, 6, 6)
    options = {"p": 2, "method": "products", "rtol": None, "tolerance": 0.1}
    # On CPUs slices go one after another, elsewhere a stack is one call.
    stack_at_once = lambda a: _root(Full(a), **options)
    for fn in (lambda a: inverse_root(Full(a), 2, "products"), stack_at_once):
        compiled = jax.jit(jax.vmap(fn)).lower(matrix).compile()
        assert " conditional(" in compiled.as_text()
        result = compiled(matrix)
        assert result.fell_back.tolist() == [[False, False], [False, True]]
        want = inverse_root(Full(matrix[0]), 2).root.matrix
        assert (errors(result.root.matrix[0], want) < 1e-2).all()


def test_defaults_and_refusals():
    factor = Full(jnp.eye(2)[None])
    assert default_root_method() == ("eigh" if jax.default_backend() == "cpu" else "products")
    with pytest.raises(ValueError, match="unknown method 'cholesky'"):
        inverse_root(factor, 2, "cholesky")
    with pytest.raises(ValueError, match="p must lie in"):
        inverse_root(factor, 0)
    with pytest.raises(ValueError, match='needs eigenvalues; use method="eigh"'):
        inverse_root(factor, 2, "products", rtol=1e-5)
