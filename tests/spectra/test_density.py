"""Stochastic Lanczos quadrature against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.solve import Result
from curvax.spectra import Density, logdet, moments, smooth_density, spectral_density, spectral_sum

pytestmark = pytest.mark.usefixtures("x64")

DIMENSION, MANY, KEY = 40, 60, jax.random.key(0)


def tree(v):
    return {"a": v[:12].reshape(3, 4), "b": v[12:]}


def flat(tree):
    return jnp.concatenate([tree["a"].ravel(), tree["b"]])


def params():
    return tree(jnp.zeros(DIMENSION))


def times(A):
    return lambda v: tree(A @ flat(v))


def with_eigenvalues(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return (Q * values) @ Q.T


INDEFINITE = with_eigenvalues(np.linspace(-1, 1, DIMENSION) ** 3)
POSITIVE = with_eigenvalues(np.linspace(0.1, 1, DIMENSION))


@functools.cache
def run(probes, steps, sampler=curvax.estimate.rademacher):
    return jax.jit(
        lambda A, key: spectral_density(times(A), params(), key, probes, steps, sampler=sampler)
    )


def probes(number, sampler=curvax.estimate.rademacher):
    """The unit vectors that are used."""
    z = [flat(sampler(jax.random.fold_in(KEY, i), params())) for i in range(number)]
    return np.stack([x / jnp.linalg.norm(x) for x in z])


@pytest.mark.parametrize("sampler", [curvax.estimate.rademacher, curvax.estimate.normal])
def test_quadrature_is_exact_for_polynomials(sampler):
    """`sum_j w_j theta_j^i = v'A^i v` for i up to 2 m - 1, and no further."""
    steps = 6
    (density, info) = run(2, steps, sampler)(INDEFINITE, KEY)
    V = probes(2, sampler)
    np.testing.assert_allclose(density.weights.sum(1), 1, atol=1e-14)
    assert (
        (density.weights >= 0).all()
        and (np.diff(density.nodes) > 0).all()
        and density.dimension == DIMENSION
    )
    quadratic = lambda i: np.einsum("ni,ij,nj->n", V, np.linalg.matrix_power(INDEFINITE, i), V)
    for i in range(2 * steps):
        np.testing.assert_allclose(
            np.sum(density.weights * density.nodes**i, axis=1), quadratic(i), atol=1e-10
        )
    assert (
        np.abs(
            np.sum(density.weights * density.nodes ** (2 * steps), axis=1) - quadratic(2 * steps)
        ).max()
        > 1e-6
    )
    np.testing.assert_allclose(
        moments(density, 3).mean,
        [np.mean([quadratic(i)[n] for n in range(2)]) for i in range(4)],
        atol=1e-12,
    )
    nearest = np.abs(np.asarray(density.nodes)[..., None] - np.linalg.eigvalsh(INDEFINITE)).min(-1)
    assert (nearest <= info.residuals + 1e-14).all() and info.steps == 2 * steps and info.converged


def test_where_the_krylov_space_ends_weights_are_those_of_the_start():
    """Three eigenvalues, one of them 37-fold: nodes after the third have no weight."""
    A = with_eigenvalues(np.r_[[3.0, 2.0, -1.0], np.zeros(DIMENSION - 3)])
    density, info = run(2, 12)(A, KEY)
    values, U = np.linalg.eigh(A)
    along = (probes(2) @ U) ** 2
    for value in (3, 2, -1, 0):
        got = np.sum(np.where(np.abs(density.nodes - value) < 1e-10, density.weights, 0), axis=1)
        np.testing.assert_allclose(got, along[:, np.abs(values - value) < 1e-10].sum(1), atol=1e-12)
    assert info.residuals.max() < 1e-12


def test_density_with_all_steps_is_the_distribution_that_each_probe_sees():
    """The smoothed density against that of all eigenvalues, and its integral."""
    width = 0.1
    density, _ = run(MANY, DIMENSION)(INDEFINITE, KEY)
    grid = jnp.linspace(-3, 3, 1201)
    got = jax.jit(smooth_density)(density, grid, width)
    np.testing.assert_allclose(np.trapezoid(got.mean, grid), 1, atol=1e-10)
    values = np.linalg.eigvalsh(INDEFINITE)
    peaks = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) / (np.sqrt(2 * np.pi) * width)
    exact = peaks.mean(1)
    inside = exact > 0.05
    assert (np.abs(got.mean - exact)[inside] < 4.5 * got.sem[inside]).all() and got.sem[
        inside
    ].max() < 0.1 * exact.max()
    each = np.stack(
        [
            smooth_density(Density(n[None], w[None], density.dimension), grid, width).mean
            for n, w in zip(*density[:2], strict=True)
        ]
    )
    np.testing.assert_allclose(got.mean, each.mean(0), atol=1e-12)
    np.testing.assert_allclose(got.sem, each.std(0, ddof=1) / MANY**0.5, atol=1e-12)


def test_sums_over_the_spectrum_by_z_test():
    values = np.linalg.eigvalsh(POSITIVE)
    density, _ = run(MANY, DIMENSION)(POSITIVE, KEY)
    for fun, exact in (
        (jnp.exp, np.exp(values).sum()),
        (lambda x: x / (x + 0.1), (values / (values + 0.1)).sum()),
    ):
        got = spectral_sum(density, fun)
        assert abs(got.mean - exact) < 4 * got.sem < 0.05 * exact
    find = jax.jit(lambda A, damping: logdet(times(A), params(), KEY, MANY, 12, damping=damping))
    for damping in (0.0, 2.0):
        got, exact = (
            find(POSITIVE, damping),
            np.linalg.slogdet(POSITIVE + damping * np.eye(DIMENSION))[1],
        )
        assert abs(got.mean - exact) < 4 * got.sem < 0.1 * abs(exact)
    assert np.isnan(find(INDEFINITE, 0.0).mean)


def test_rademacher_probes_are_exact_for_diagonal_matrices():
    diagonal = np.repeat([1.0, 2.0, 4.0, 8.0], 10)
    density, _ = run(3, 4)(np.diag(diagonal), KEY)
    np.testing.assert_allclose(density.nodes, np.tile([1, 2, 4, 8], (3, 1)), atol=1e-12)
    np.testing.assert_allclose(density.weights, 0.25, atol=1e-12)
    estimate = spectral_sum(density, jnp.log)
    np.testing.assert_allclose(
        [estimate.mean, estimate.sem], [np.log(diagonal).sum(), 0], atol=1e-11
    )


def test_one_probe_says_nothing_about_its_error():
    density = Density(jnp.array([[0.0, 2.0]]), jnp.array([[0.5, 0.5]]), jnp.array(4.0))
    for estimate in (
        smooth_density(density, jnp.zeros(3), 1.0),
        moments(density, 2),
        spectral_sum(density, jnp.exp),
    ):
        assert np.isinf(estimate.sem).all()


def test_keys_are_mapped_over():
    keys = jax.random.split(KEY, 2)
    together, _ = jax.vmap(run(2, 6), (None, 0))(INDEFINITE, keys)
    np.testing.assert_allclose(
        together.nodes[1], run(2, 6)(INDEFINITE, keys[1])[0].nodes, atol=1e-10
    )


def test_a_product_that_is_not_finite():
    density, info = run(2, 6)(INDEFINITE * np.nan, KEY)
    assert (
        info.code == Result.NOT_FINITE
        and "Look for inf or NaN" in info.message
        and np.isnan(density.nodes).all()
    )


def test_sharded_over_eight_devices_equals_one():
    weight = jax.random.normal(KEY, (16, 3))
    find = jax.jit(
        lambda w: spectral_density(
            curvax.hvp(lambda w: jnp.sum(w**4) + jnp.sum(w) ** 2, w), w, KEY, 2, 8
        )[0]
    )
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        spread = jax.device_get(find(jax.device_put(weight, NamedSharding(mesh, P("data")))))
    alone = find(weight)
    np.testing.assert_allclose(spread.nodes, alone.nodes, atol=1e-9)
    np.testing.assert_allclose(spread.weights, alone.weights, atol=1e-9)


def test_memory_is_one_basis_whatever_the_probes():
    """80 steps with 10 probes in 85 copies of the params:
    a step more is a copy more, a probe more is none.
    """
    like = {"w": jnp.ones((100, 80)), "v": jnp.ones((80, 50)), "b": jnp.ones(100)}
    size = sum(x.nbytes for x in jax.tree.leaves(like))

    def copies(number, steps):
        find = lambda p: spectral_density(
            lambda v: jax.tree.map(lambda x: 2 * x, v), p, KEY, number, steps
        )
        return jax.jit(find).lower(like).compile().memory_analysis().temp_size_in_bytes / size

    assert copies(10, 80) < 80 + 4
    assert copies(3, 20) < 20 + 4


def test_bfloat16_params_have_a_density_in_float32():
    case = CASES["mlp"]()
    low, inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (case.params, case.batch[0]))
    find = jax.jit(
        lambda p, b: spectral_density(curvax.ggnvp(case.objective, p, b), p, KEY, 1, 4)[0]
    )
    got = find(low, (inputs, case.batch[1]))
    assert got.nodes.dtype == got.weights.dtype == jnp.float32
    z = oracle.flat(curvax.estimate.rademacher(jax.random.fold_in(KEY, 0), low))
    np.testing.assert_allclose(
        moments(got, 1).mean[1], z @ oracle.of("mlp").ggn @ z / z.size, rtol=0.05
    )


def test_errors_say_what_and_where():
    identity = lambda v: v
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        spectral_density(identity, params(), KEY, 0)
    with pytest.raises(
        ValueError, match="num_steps must be at most the 40 entries of params, got 80"
    ):
        spectral_density(identity, params(), KEY)
    with pytest.raises(
        TypeError,
        match=(
            r"sampler must be a function \(key, params\) -> z, "
            "such as .*rademacher.*got 'normal'"
        ),
    ):
        spectral_density(identity, params(), KEY, 1, 4, sampler="normal")
    with pytest.raises(ValueError, match="damping must be positive, got -1"):
        logdet(identity, params(), KEY, 1, 4, damping=-1.0)
    density = Density(jnp.zeros((1, 2)), jnp.ones((1, 2)) / 2, jnp.array(4.0))
    with pytest.raises(ValueError, match="degree must be at least 0, got -1"):
        moments(density, -1)
