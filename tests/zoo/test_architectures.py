"""Public architectures: which leaves are in blocks, what is captured of them, and their factors
beside those of a program that an expert would write for the same function.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import curvax
from zoo import ARCHITECTURES
from zoo.checks import check_leaves, check_taps, prepare

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_leaves_are_in_blocks_and_taps_are_those_of_autodiff(name):
    case = ARCHITECTURES[name]()
    objective, _, layout = prepare(case)
    check_leaves(case, layout)
    # By example, where there is one: that the batch agrees is seen on `CASES`.
    check_taps(case, objective, layout, tolerance=1e-9, ways=(case.by_example,))


def kfac_curvature(case):
    """The dense curvature that K-FAC has of a model, and the exact one."""
    objective, batch, layout = prepare(case)

    def compute(params):
        factors = curvax.kron_factors(objective, layout, params, batch, KEY, fisher="exact")
        matvec = curvax.kron_inverse(layout, factors, 0.0, power=1.0)
        exact = curvax.ggnvp(objective, params, batch)
        return curvax.to_dense(matvec, params), curvax.to_dense(exact, params)

    return jax.jit(compute)(case.params)


# What an expert writes: a program of plain layers, and the multiples of the params that it has for
# kernels. Of `M = c V` the curvature in V is `c C c`, with C that in M.


def gcnn_by_expert(p, x):
    """Patches of the inputs, as of a convolution: entry k of the kernel meets input g - k at g."""
    patches = (np.arange(4)[:, None] - np.arange(4)) % 4
    h = jax.nn.selu(jnp.einsum("bgk,ko->bgo", x[:, patches], p["w"]) + p["b"])
    return (jnp.einsum("bgki,iok->bgo", h[:, patches], p["v"]) + p["c"]).swapaxes(1, 2)


def e3nn_by_expert(p, x):
    scalars, vectors = x[:, :2], x[:, 2:].reshape(-1, 2, 3)
    mixed = jnp.einsum("bud,uv->bvd", vectors, p["vectors"])
    gated = mixed * jax.nn.sigmoid(scalars @ p["gates"])[..., None]
    h = jnp.concatenate([scalars @ p["scalars"], jnp.sum(gated**2, axis=-1)], axis=-1)
    return jnp.tanh(h) @ p["out"]


def arnn_by_expert(p, x):
    h = jax.nn.selu((x @ p["w"]).reshape(-1, 3, 2) + p["b"]).reshape(len(x), -1)
    return (h @ p["v"]).reshape(-1, 3, 2) + p["c"]


def stylegan_by_expert(p, x):
    for w, b in p:
        x = jax.nn.leaky_relu(x @ w + b, 0.2)
    return x


def ones(p):
    return jax.tree.map(jnp.ones_like, p)


def masks_of_arnn(p):
    site = np.repeat(np.arange(3), 2)
    strict, below = np.arange(3)[:, None] < site, site[:, None] <= site
    return {**ones(p), "w": jnp.asarray(strict, float), "v": jnp.asarray(below, float)}


def roots_of_e3nn(p):
    return {name: jnp.full_like(w, len(w) ** -0.5) for name, w in p.items()}


EXPERTS = {
    "gcnn": (gcnn_by_expert, ones),
    "e3nn": (e3nn_by_expert, roots_of_e3nn),
    "arnn": (arnn_by_expert, masks_of_arnn),
    "stylegan": (
        stylegan_by_expert,
        lambda p: [(0 * w + len(w) ** -0.5, 0 * b + 0.01) for w, b in p],
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_blocks_are_those_of_an_experts_program(name):
    case = ARCHITECTURES[name]()
    model, multiples_of = EXPERTS[name]
    multiples = multiples_of(case.params)
    params = jax.tree.map(jnp.multiply, case.params, multiples)
    expert = case._replace(model=model, params=params)
    outputs = [each.model(each.params, case.inputs) for each in (case, expert)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-12)
    c = ravel_pytree(multiples)[0]
    got, exact = kfac_curvature(case)
    want, _ = kfac_curvature(expert)
    np.testing.assert_allclose(got, c[:, None] * want * c, rtol=0, atol=1e-10 * abs(got).max())
    # And no further from the exact matrix than such blocks are: they have its trace about.
    assert 0.5 < np.trace(got) / np.trace(exact) < 2


def test_quantized_layers_have_the_blocks_of_the_rounded_kernels():
    """A straight-through estimator has the curvature of plain layers at the rounded kernels."""
    case = ARCHITECTURES["quantized"]()
    rounded = dict(case.params)
    for name, axis in (("w", 0), ("v", None)):
        w = case.params[name]
        scale = jnp.max(abs(w), axis=axis, keepdims=True) / 7 + 1e-6
        rounded[name] = jnp.clip(jnp.round(w / scale), -7, 7) * scale

    def plain(p, x):
        h = jax.nn.relu(x @ p["w"] + p["b"])
        scale = jnp.max(abs(h), axis=-1, keepdims=True) / 7 + 1e-6
        h = h + lax.stop_gradient(jnp.clip(jnp.round(h / scale), -7, 7) * scale - h)
        return h @ p["v"] + p["c"]

    expert = case._replace(model=plain, params=rounded)
    got, want = kfac_curvature(case)[0], kfac_curvature(expert)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * abs(want).max())
