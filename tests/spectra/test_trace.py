"""Hutch++ and XTrace: unbiased, with honest errors, exact on low rank,
and better than Hutchinson where they should be.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax._host import OnHost
from curvax.spectra import hutchpp, xtrace

ESTIMATORS = pytest.mark.parametrize("estimator", [hutchpp, xtrace])
PARAMS = {"a": jnp.zeros((6, 5)), "b": jnp.zeros(31)}


def keys(number):
    return jax.random.split(jax.random.key(0), number)


@functools.cache
def rotation():
    return np.linalg.qr(np.random.default_rng(0).normal(size=(61, 61)))[0]


def symmetric(eigenvalues):
    return jnp.asarray(rotation() * np.asarray(eigenvalues) @ rotation().T)


def product(A, v):
    y = A @ jnp.concatenate([v["a"].ravel(), v["b"]])
    return {"a": y[:30].reshape(6, 5), "b": y[30:]}


def as_type(dtype):
    return jax.tree.map(lambda x: x.astype(dtype), PARAMS)


@functools.cache
def compiled(estimator, num_keys):
    """Estimates of the trace of A by 13 products, with many keys."""
    one = lambda A, params, key: estimator(functools.partial(product, A), params, 13, key)
    return jax.jit(lambda A, params: jax.vmap(lambda key: one(A, params, key))(keys(num_keys)))


SPECTRA = {
    "decaying": 0.7 ** np.arange(61),
    "flat": np.linspace(3, 1, 61),
    "indefinite": (-0.8) ** np.arange(61),
    "power": 1 / (1 + np.arange(61)),
    "outliers": np.where(np.arange(61) < 4, 50.0, 1 / (1 + np.arange(61))),
}


@ESTIMATORS
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_unbiased_with_an_honest_standard_error(x64, estimator, spectrum):
    eigenvalues = SPECTRA[spectrum]
    got = compiled(estimator, 2000)(symmetric(eigenvalues), as_type(float))
    error = np.asarray(got.mean - eigenvalues.sum())
    assert abs(error.mean()) < 4 * error.std(ddof=1) / len(error) ** 0.5
    assert error.std() > 1e-4 * np.abs(eigenvalues).max()  # an estimate, not the exact value
    claimed = np.mean(got.sem**2) ** 0.5 / error.std()
    covered = np.mean(np.abs(error) < 2 * got.sem)
    # Given the sketch the probes of Hutch++ are independent. XTrace's values are not: taken as
    # such, they claim 0.77 of the error on two of these spectra. Of a sketch as small as the number
    # of outliers hardly anything can be told.
    low, high = (0.93, 1.07) if estimator is hutchpp else (0.85, 1.25)
    if spectrum != "outliers":
        assert low < claimed < high
    assert covered > 0.78


def test_better_than_hutchinson_on_a_decaying_spectrum(x64):
    eigenvalues = 0.3 ** np.arange(61)
    spread = lambda estimator: np.std(
        compiled(estimator, 2000)(symmetric(eigenvalues), as_type(float)).mean
    )
    probes = lambda matvec, params, number, key: curvax.hutchinson_trace(
        matvec, params, key, number
    )
    plain, sketched, every = map(spread, (probes, hutchpp, xtrace))
    assert sketched < plain / 5 and every < sketched / 3


@ESTIMATORS
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_on_low_rank(x64, estimator, rank, dtype):
    eigenvalues = np.where(np.arange(61) < rank, 5.0 - 3 * np.arange(61), 0)
    got = compiled(estimator, 2000)(symmetric(eigenvalues).astype(dtype), as_type(dtype))
    assert got.mean.dtype == got.sem.dtype == dtype
    tolerance = 300 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got.mean, eigenvalues.sum(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got.sem, 0, atol=tolerance)


@ESTIMATORS
def test_a_spectrum_that_falls_to_rounding_within_the_sketch(x64, estimator):
    """Neither full rank nor low rank, to the precision of the floats; whatever the scale."""
    eigenvalues = 10.0 ** -(5.0 * np.arange(61))
    for scale in (1, 1e-30, 1e30):
        got = compiled(estimator, 2000)(scale * symmetric(eigenvalues), as_type(float))
        np.testing.assert_allclose(got.mean / scale, eigenvalues.sum(), rtol=1e-12)


@ESTIMATORS
def test_a_product_that_is_not_finite_is_not_hidden(x64, estimator):
    A = symmetric(SPECTRA["decaying"]).at[3, 7].set(jnp.nan)
    assert jnp.isnan(compiled(estimator, 2000)(A, as_type(float)).mean).all()


@ESTIMATORS
def test_as_many_products_as_dimensions(x64, estimator):
    scale = jnp.array([4.0, -2, 1, 0.5])
    got = jax.jit(jax.vmap(lambda key: estimator(lambda v: scale * v, jnp.zeros(4), 4, key)))(
        keys(1000)
    ).mean
    assert abs(np.mean(got) - 3.5) < 4 * np.std(got) / 1000**0.5


@ESTIMATORS
def test_bfloat16_params_give_float32_estimates(estimator):
    matrix = symmetric(0.5 ** np.arange(61)).astype(jnp.bfloat16)

    def matvec(v):  # as curvax.hvp does: compute as params are, return as v is
        half = product(matrix, jax.tree.map(lambda x: x.astype(jnp.bfloat16), v))
        return jax.tree.map(lambda x, y: y.astype(x.dtype), v, half)

    got = jax.jit(lambda params: estimator(matvec, params, 30, jax.random.key(0)))(
        as_type(jnp.bfloat16)
    )
    assert got.mean.dtype == got.sem.dtype == jnp.float32
    np.testing.assert_allclose(got.mean, 2, rtol=0.02)


@functools.cache
def diagonal_estimate(estimator):
    return jax.jit(
        lambda scale, params: estimator(lambda v: scale * v, params, 24, jax.random.key(0))
    )


@ESTIMATORS
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_the_sketch_stays_sharded_on_eight_devices(estimator, mode):
    shape, estimate = (256, 32), diagonal_estimate(estimator)
    scale = 1 / (1 + jnp.arange(256.0 * 32).reshape(shape)) ** 2
    alone = jax.device_get(estimate(scale, jnp.zeros(shape)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(AxisType, mode),))
    with jax.set_mesh(mesh):
        sharded = jax.device_put((scale, jnp.zeros(shape)), NamedSharding(mesh, P("data")))
        program = estimate.lower(*sharded).compile()
        chex.assert_trees_all_close(jax.device_get(program(*sharded)), alone, rtol=1e-4, atol=1e-5)
    assert not any(
        f"f32[{k},256,32]" in program.as_text() for k in (8, 12)
    )  # rows: an eighth on each device
    assert program.memory_analysis().temp_size_in_bytes < 6 * 24 * (256 * 32 * 4 // 8)


@ESTIMATORS
def test_loops_on_the_host_take_as_many_products_and_give_the_same(estimator):
    scale, calls = 1 / (1 + jnp.arange(32.0)) ** 2, []
    counted = lambda v: calls.append(1) or scale * v
    got = estimator(OnHost(counted), jnp.zeros(32), 14, jax.random.key(0))
    assert len(calls) == 14
    inside = jax.jit(
        lambda scale: estimator(lambda v: scale * v, jnp.zeros(32), 14, jax.random.key(0))
    )
    chex.assert_trees_all_close(got, inside(scale), rtol=1e-4, atol=1e-5)
    if estimator is xtrace:  # multiples of the identity are exact by the scaling of probes
        np.testing.assert_allclose(inside(jnp.full(32, 2.0)).mean, 64, rtol=1e-5)


@ESTIMATORS
def test_errors_say_what_to_do(estimator):
    with pytest.raises(ValueError, match="num_products must be at least 4, got 3"):
        estimator(lambda v: v, jnp.zeros(8), 3, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"at most the 8 entries of params, got 9.*jnp.trace\(curvax.to_dense"
    ):
        estimator(lambda v: v, jnp.zeros((4, 2)), 9, jax.random.key(0))
    with pytest.raises(TypeError, match="num_products must be a Python integer"):
        estimator(lambda v: v, jnp.zeros(8), 4.0, jax.random.key(0))
