"""Penalties made of derivatives against dense Hessians in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.apps.penalties import gradient_norm, hessian_alignment

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
MATRIX = np.array([[2.0, 0.5, -1.0], [0.5, 1.0, 0.3], [-1.0, 0.3, -3.0]])
W = np.array([0.3, -1.2, 0.7])


def quadratic(w, b):
    return w @ MATRIX @ w / 2 + b @ w


def quartic(w):
    return jnp.sum(w**4) / 4 + quadratic(w, W)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("difference", ["forward", "backward", "centred"])
def test_differences_are_exact_on_quadratics(difference, normalized):
    gamma, b = 0.3, jnp.array([1.0, 0.2, -0.4])
    regularized = gradient_norm(quadratic, gamma, 0.1, difference=difference, normalized=normalized)
    value, (by_w, by_b) = jax.value_and_grad(regularized, argnums=(0, 1))(W, b)
    g = MATRIX @ W + b
    np.testing.assert_allclose(value, quadratic(W, b) + gamma / 2 * g @ g, rtol=1e-12)
    np.testing.assert_allclose(by_w, g + gamma * MATRIX @ g, rtol=1e-12)
    # d/db of b.w + gamma/2 |M w + b|^2
    np.testing.assert_allclose(by_b, W + gamma * g, rtol=1e-12)


def test_elsewhere_the_error_falls_with_the_step_and_its_square():
    exact = jax.grad(lambda w: quartic(w) + 0.25 * jnp.sum(jax.grad(quartic)(w) ** 2))(W)

    @functools.partial(jax.jit, static_argnames="difference")
    def error(eps, difference):
        gradient = jax.grad(gradient_norm(quartic, 0.5, eps, difference=difference))(W)
        return jnp.linalg.norm(gradient - exact)

    for difference, order in (("forward", 1), ("backward", 1), ("centred", 2)):
        ratio = error(1e-3, difference) / error(5e-4, difference)
        np.testing.assert_allclose(ratio, 2**order, rtol=0.02)


def test_with_gamma_equal_to_the_step_it_is_sharpness_aware_minimization():
    rho = 0.05
    gradient = jax.grad(gradient_norm(quartic, rho, rho))(W)
    ascended = W + rho * jax.grad(quartic)(W)
    np.testing.assert_allclose(gradient, jax.grad(quartic)(ascended), rtol=1e-12)


def test_without_a_gradient_there_is_no_step():
    flat = gradient_norm(lambda w: jnp.sum(w**2), 1.0, 0.1, normalized=True)
    assert jax.grad(flat)(jnp.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["head"]["w"] + params["head"]["b"]


OBJECTIVE = curvax.Objective(model, curvax.losses.softmax_cross_entropy(ignore_index=-1))
RNG = np.random.default_rng(0)
PARAMS = {
    "a": RNG.normal(size=(3, 4)),
    "head": {"w": RNG.normal(size=(4, 2)), "b": np.zeros(2)},
}


def domain(seed, rows):
    x = jax.random.normal(jax.random.key(seed), (rows, 3))
    return x, (jnp.arange(rows) % 3) - (jnp.arange(rows) % 3 == 2) * 3  # labels 0, 1, and -1


def in_head(path, leaf):
    return "head" in path


def test_a_penalty_in_chunks_on_eight_devices_and_in_bfloat16():
    batch = domain(2, 16)
    step = jax.jit(jax.value_and_grad(gradient_norm(OBJECTIVE, 0.3, 0.1)))
    expected = step(PARAMS, batch)
    in_chunks = gradient_norm(OBJECTIVE, 0.3, 0.1, microbatch=5)
    in_chunks = jax.jit(jax.value_and_grad(in_chunks))(PARAMS, batch)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)
    on_eight = step(PARAMS, sharded)
    for got in (in_chunks, on_eight):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), got, expected)
    coarse = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    _, gradient = step(coarse, batch)
    near, exact = ravel_pytree(gradient)[0], ravel_pytree(expected[1])[0]
    assert near.dtype == jnp.bfloat16
    assert jnp.linalg.norm(near - exact) < 0.03 * jnp.linalg.norm(exact)


def of_head(batch):
    """The mean loss of a batch as a function of the head, which is two leaves."""
    vector, unravel = ravel_pytree(PARAMS["head"])
    return lambda h: OBJECTIVE({"a": PARAMS["a"], "head": unravel(h)}, batch), vector


def dense_penalty(domains, curvature_of):
    """The penalty from dense gradients and Hessians, pooled by joining the rows."""
    pooled = jax.tree.map(lambda *rows: jnp.concatenate(rows), *domains)
    moments = []
    for batch in (pooled, *domains):
        loss, h = of_head(batch)
        g, H = jax.jit(lambda h, loss=loss: (jax.grad(loss)(h), jax.hessian(loss)(h)))(h)
        moments.append((g, curvature_of(H, g)))
    (g, h), *by_domain = moments
    distances = []
    for g_e, h_e in by_domain:
        distances.append(2.0 * np.sum((h_e - h) ** 2) + 3.0 * np.sum((g_e - g) ** 2))
    return OBJECTIVE(PARAMS, pooled) + np.mean(distances)


WEIGHTS = {"curvature_weight": 2.0, "gradient_weight": 3.0}


def test_alignment_equals_the_dense_formula_and_differentiates():
    """Domains of different sizes, with masked terms, whole and in chunks."""
    domains = [domain(3, 6), domain(4, 9)]
    align = hessian_alignment(OBJECTIVE, in_head, **WEIGHTS)
    expected = dense_penalty(domains, lambda H, g: H @ g)
    value, gradient = jax.jit(jax.value_and_grad(align))(PARAMS, domains)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    in_chunks = hessian_alignment(OBJECTIVE, in_head, microbatch=4, **WEIGHTS)
    np.testing.assert_allclose(jax.jit(in_chunks)(PARAMS, domains), expected, rtol=1e-10)
    # The features before the head are trained by the penalty too.
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(gradient))


def test_alignment_of_domains_on_eight_devices():
    align = jax.jit(hessian_alignment(OBJECTIVE, in_head, **WEIGHTS))
    domains = [domain(3, 8), domain(4, 16)]
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), domains)
    np.testing.assert_allclose(align(PARAMS, sharded), align(PARAMS, domains), rtol=1e-10)


def test_a_hessian_times_its_gradient_is_the_derivative_of_the_norm():
    loss, h = of_head(domain(3, 6))
    g = jax.grad(loss)(h)
    by_norm = jnp.linalg.norm(g) * jax.grad(lambda h: jnp.linalg.norm(jax.grad(loss)(h)))(h)
    np.testing.assert_allclose(jax.hessian(loss)(h) @ g, by_norm, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["hessian_gradient", "hutchinson"])
def test_equal_domains_have_no_penalty(form):
    batch = domain(3, 6)
    align = hessian_alignment(OBJECTIVE, in_head, form=form, num_probes=3, **WEIGHTS)
    value, gradient = jax.jit(jax.value_and_grad(align))(PARAMS, {"a": batch, "b": batch}, KEY)
    expected = jax.value_and_grad(OBJECTIVE)(PARAMS, batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        (value, gradient),
        expected,
    )


def test_hutchinson_estimates_the_distance_of_diagonals():
    domains = [domain(3, 6), domain(4, 9)]
    align = hessian_alignment(OBJECTIVE, in_head, form="hutchinson", num_probes=400, **WEIGHTS)
    expected = dense_penalty(domains, lambda H, g: jnp.diag(H))
    np.testing.assert_allclose(jax.jit(align)(PARAMS, domains, KEY), expected, rtol=0.02)


def test_a_domain_without_terms_is_left_out():
    x, labels = domain(5, 4)
    empty = (x, jnp.full_like(labels, -1))
    align = hessian_alignment(OBJECTIVE, in_head, **WEIGHTS)
    domains = [domain(3, 6), domain(4, 9)]
    value = jax.jit(align)(PARAMS, [*domains, empty])
    expected = dense_penalty(domains, lambda H, g: H @ g)
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="eps must be positive"):
        gradient_norm(quartic, 0.1, 0.0)
    with pytest.raises(ValueError, match="difference"):
        gradient_norm(quartic, 0.1, 0.1, difference="central")
    with pytest.raises(TypeError, match=r"microbatch needs.*curvax.Objective"):
        gradient_norm(quartic, 0.1, 0.1, microbatch=2)
    domains = [domain(3, 6), domain(4, 9)]
    with pytest.raises(ValueError, match=r"head selects no leaf.*\['head'\]\['w'\]"):
        hessian_alignment(OBJECTIVE, lambda path, leaf: False)(PARAMS, domains)
    with pytest.raises(ValueError, match=r"\(params, domains, key\)"):
        hessian_alignment(OBJECTIVE, in_head, form="hutchinson")(PARAMS, domains)
    with pytest.raises(ValueError, match="two"):
        hessian_alignment(OBJECTIVE, in_head)(PARAMS, domains[:1])
