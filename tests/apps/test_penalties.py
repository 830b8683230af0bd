"""Penalties on derivatives of a loss, against exact second derivatives in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.apps.penalties import gradient_norm, hessian_alignment

pytestmark = pytest.mark.usefixtures("x64")
DIFFERENCES = ["forward", "backward", "centred"]


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


OBJECTIVE = curvax.Objective(model, curvax.losses.softmax_cross_entropy(ignore_index=-1))


def is_head(path, leaf):
    return "b" in path


def problem():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(4, 5))), "b": jnp.asarray(rng.normal(size=(5, 3)))}
    labels = jnp.asarray(rng.integers(0, 3, 10)).at[2].set(-1)
    return params, (jnp.asarray(rng.normal(size=(10, 4))), labels)


def squared(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


def largest_difference(x, y):
    differences = jax.tree.map(lambda a, b: jnp.max(abs(a - b)), x, y)
    return max(map(float, jax.tree.leaves(differences)))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_differences_are_exact_on_quadratics(difference, normalized):
    rng = np.random.default_rng(1)
    root, w = rng.normal(size=(4, 4)), rng.normal(size=4)
    H = root @ root.T
    options = {"difference": difference, "normalized": normalized}
    regularized = gradient_norm(lambda w: w @ H @ w / 2, 0.3, 0.7, **options)
    value, gradient = jax.value_and_grad(regularized)(jnp.asarray(w))
    g = H @ w
    np.testing.assert_allclose(value, w @ H @ w / 2 + 0.15 * g @ g, rtol=1e-12)
    np.testing.assert_allclose(gradient, g + 0.3 * H @ g, rtol=1e-11)
    # At a minimum there is no direction to step along (0/0): the gradient is 0.
    assert not jnp.any(jax.grad(regularized)(jnp.zeros(4)))


def test_errors_fall_with_eps_and_chunks_change_nothing():
    params, batch = problem()

    def exact(params, batch):
        gradient = jax.grad(OBJECTIVE)(params, batch)
        return OBJECTIVE(params, batch) + 0.15 * squared(gradient)

    value, gradient = jax.jit(jax.value_and_grad(exact))(params, batch)
    # A gamma and an eps that are mapped: one program for both.
    for difference, order in zip(DIFFERENCES, (1, 1, 2), strict=True):
        errors = []
        for microbatch in (None, 3):

            def at(eps, difference=difference, microbatch=microbatch):
                options = {"difference": difference, "microbatch": microbatch}
                return jax.value_and_grad(gradient_norm(OBJECTIVE, 0.3, eps, **options))(
                    params, batch
                )

            values, gradients = jax.jit(jax.vmap(at))(jnp.array([1e-2, 1e-3]))
            np.testing.assert_allclose(values, value, rtol=1e-12)
            errors.append(
                [
                    largest_difference(jax.tree.map(lambda x, i=i: x[i], gradients), gradient)
                    for i in (0, 1)
                ]
            )
        ratio = errors[0][0] / errors[0][1]
        assert 0.7 * 10**order < ratio < 1.4 * 10**order
        np.testing.assert_allclose(errors[0], errors[1], rtol=1e-5)


def test_sam_is_the_case_of_gamma_equal_to_eps_and_bfloat16_holds_the_difference():
    params, batch = problem()
    gradient = jax.grad(gradient_norm(OBJECTIVE, 0.1, 0.1))(params, batch)
    g = jax.grad(OBJECTIVE)(params, batch)
    ascended = jax.tree.map(lambda w, v: w + 0.1 * v, params, g)
    assert largest_difference(gradient, jax.grad(OBJECTIVE)(ascended, batch)) < 1e-12
    # A step of 1e-4 is far below the spacing of bfloat16.
    short = gradient_norm(OBJECTIVE, 0.3, 1e-4, normalized=True)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), half)
    of_half, of_wide = jax.grad(short)(half, batch), jax.grad(short)(wide, batch)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(of_half))
    assert largest_difference(of_half, of_wide) < 0.02


@functools.cache
def literal_alignment(form):
    """Return value and gradient of the penalized loss by explicit Hessians, for two domains."""
    params, (x, y) = problem()
    domains = [(x[:4], y[:4]), (x[4:], y[4:])]

    def moments(params, batch):
        loss = lambda b: OBJECTIVE({**params, "b": b.reshape(5, 3)}, batch)
        b = params["b"].ravel()
        g, H = jax.grad(loss)(b), jax.hessian(loss)(b)
        # H g = |g| grad |g|, the form in which the paper has it
        norm_gradient = jax.grad(lambda b: jnp.linalg.norm(jax.grad(loss)(b)))(b)
        return g, jnp.linalg.norm(g) * norm_gradient if form == "hessian_gradient" else H

    def penalized(params):
        pooled = jax.lax.stop_gradient(moments(params, (x, y)))
        penalty = 0
        for batch in domains:
            g, h = moments(params, batch)
            penalty += (2 * squared(h - pooled[1]) + 3 * squared(g - pooled[0])) / 2
        return OBJECTIVE(params, (x, y)) + penalty

    return params, domains, jax.jit(jax.value_and_grad(penalized))(params)


@pytest.mark.parametrize("microbatch", [None, 3])
def test_alignment_is_that_of_explicit_hessians(microbatch):
    params, domains, (value, gradient) = literal_alignment("hessian_gradient")
    weights = {"curvature_weight": 2.0, "gradient_weight": 3.0, "microbatch": microbatch}
    regularized = jax.jit(jax.value_and_grad(hessian_alignment(OBJECTIVE, is_head, **weights)))
    # Sharded domains, and one whose terms are all masked, which counts for nothing.
    x, y = domains[0]
    masked = x[:3], jnp.full_like(y[:3], -1)
    ours, ours_gradient = regularized(params, [*domains, masked])
    np.testing.assert_allclose(ours, value, rtol=1e-11)
    assert largest_difference(ours_gradient, gradient) < 1e-10
    if microbatch is None:
        mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
        sharded = jax.device_put(domains, rows)
        assert abs(regularized(params, [*sharded, masked])[0] - value) < 1e-11


@pytest.mark.parametrize("form", ["hessian_gradient", "hutchinson"])
def test_equal_domains_have_no_penalty(form):
    params, batch = problem()
    weights = {"curvature_weight": 1.0, "gradient_weight": 1.0, "num_probes": 3}
    regularized = jax.jit(hessian_alignment(OBJECTIVE, is_head, form=form, **weights))
    key, (x, y) = jax.random.key(0), batch
    np.testing.assert_allclose(
        regularized(params, [batch, batch], key), OBJECTIVE(params, batch), rtol=1e-13
    )
    others = {"first": (x[:4], y[:4]), "second": (x[4:], y[4:])}
    assert regularized(params, others, key) > OBJECTIVE(params, batch) + 1e-3


def test_bad_input_is_named():
    params, batch = problem()
    with pytest.raises(ValueError, match="eps must be positive"):
        gradient_norm(OBJECTIVE, 1.0, 0.0)
    with pytest.raises(TypeError, match="microbatch needs"):
        gradient_norm(lambda w: w, 1.0, 1.0, microbatch=2)
    with pytest.raises(ValueError, match=r"no leaf of params; their paths are \['a'\]"):
        hessian_alignment(OBJECTIVE, lambda *_: False)(params, [batch, batch])
    with pytest.raises(ValueError, match="two domains or more"):
        hessian_alignment(OBJECTIVE, is_head)(params, [batch])
    with pytest.raises(ValueError, match="draws probes"):
        hessian_alignment(OBJECTIVE, is_head, form="hutchinson")(params, [batch, batch])


def test_gradient_norm_of_a_sharded_batch():
    params, (x, y) = problem()
    batch = x[:8], y[:8]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    gradient = jax.jit(jax.grad(gradient_norm(OBJECTIVE, 0.3, 0.1)))
    on_devices = gradient(params, jax.device_put(batch, rows))
    assert largest_difference(gradient(params, batch), on_devices) < 1e-12
