"""Eigendecompositions in float64 on the host, of float32 factors, stacked and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import curvax
from curvax.apps import influence
from curvax.kron._host_eigh import eigh_on_host
from curvax.kron._kron_factor import Diagonal, Full, eigh_all


def spectra(stack, n):
    """Float32 matrices of rank n / 2 with eigenvalues that fall, and an edge that repeats."""
    x = np.random.default_rng(0).normal(size=(stack, n // 2, n)) * 0.7 ** np.arange(n)
    return jnp.asarray(x.swapaxes(1, 2) @ x, jnp.float32)


def test_factors_at_hand_are_decomposed_in_float64_and_traced_ones_in_the_program():
    matrix = spectra(3, 24)
    eigen = eigh_all([Full(matrix), Diagonal(matrix[:, 0])])
    traced = jax.jit(lambda matrix: eigh_all([Full(matrix)]))(matrix)
    wide = np.asarray(matrix, float)
    values = np.linalg.eigvalsh(wide)

    # How far each is from a decomposition, before float32 rounds the results.
    def errors(eigen):
        vectors = np.asarray(eigen.vectors, float)
        diagonal = vectors.swapaxes(1, 2) @ wide @ vectors
        beside = diagonal - np.eye(24) * diagonal
        relative = np.abs(eigen.values - np.maximum(values, 0)) / values[:, -1:]
        return np.abs(beside).max() / values.max(), relative.max()

    assert eigen[0].vectors.dtype == eigen[0].values.dtype == jnp.float32
    assert errors(eigen[0])[0] < 2e-7 and errors(eigen[0])[1] < 1e-7
    assert errors(traced[0])[0] > errors(eigen[0])[0]
    assert eigen[1].vectors is None


def test_a_slice_that_is_not_finite_is_nan_and_others_are_not():
    matrix = spectra(3, 6).at[1, 2, 2].set(jnp.nan)
    values, vectors = eigh_on_host(matrix)
    assert np.isnan(values[1]).all() and np.isnan(vectors[1]).all()
    np.testing.assert_allclose(
        vectors[::2] * values[::2, None] @ vectors[::2].swapaxes(1, 2), matrix[::2], atol=1e-5
    )


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P()])
def test_factors_stay_where_they_are(spec):
    matrix = spectra(8, 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(matrix, NamedSharding(mesh, spec))
    values, vectors = eigh_on_host(sharded)
    assert vectors.sharding == sharded.sharding and len(values.devices()) == 8
    for got, want in zip((values, vectors), eigh_on_host(matrix), strict=True):
        np.testing.assert_array_equal(got, want)


@functools.cache
def digits(dtype):
    """A classifier of digits, whose inputs have pixels that are always, or nearly always, zero."""
    data, rng = load_digits(), np.random.default_rng(1)
    params = {
        "w": rng.normal(size=(64, 24)) / 8,
        "b": 0.1 * rng.normal(size=24),
        "v": rng.normal(size=(24, 10)) / 24**0.5,
    }
    model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
    single = lambda x: jnp.asarray(np.asarray(x, np.float32), dtype)
    batch = single(data.data[:150] / 16), jnp.asarray(data.target[:150])
    return objective, jax.tree.map(single, params), batch


def scores(dtype, method):
    objective, params, batch = digits(dtype)
    layout, key = curvax.kron_layout(objective, params, batch), jax.random.key(0)
    options = {"fisher": "exact", "progress": False, "method": method}
    fitted = influence.fit(objective, layout, params, [batch], key, **options)
    queries = jax.tree.map(lambda x: x[:10], batch)
    # With little damping the small eigenvalues count: decomposed in float32, scores of EK-FAC are
    # off by 2e-2.
    result, _ = influence.influence(fitted, objective, params, queries, [batch], damping=1e-8)
    return np.asarray(result.change_if_removed, float)


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
def test_scores_in_float32_are_those_in_float64(method):
    with jax.enable_x64(True):
        want = scores(jnp.float64, method)
    got = scores(jnp.float32, method)
    assert np.linalg.norm(got - want) < 5e-5 * np.linalg.norm(want)
