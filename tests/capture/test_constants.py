"""Kernels that constants gather, multiply, mask and round, against dense matrices: the blocks of
single layers, for which K-FAC and EK-FAC are exact.
"""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from zoo import normal

import curvax
from curvax import losses

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
DAMPING = 0.1


def correlated(*shape):
    """Inputs of mean one, with correlated entries."""
    mixing = normal(8, shape[-1], shape[-1])
    return normal(9, *shape) @ mixing + 1


def problem(model, params, inputs, **kwargs):
    objective = curvax.Objective(model, losses.squared_error())
    outputs = jax.eval_shape(model, params, inputs)
    batch = inputs, jnp.zeros(outputs.shape)
    return objective, batch, curvax.kron_layout(objective, params, batch, **kwargs)


def dense(matvec, params):
    return curvax.to_dense(matvec, params)


def exact_and_blocks(objective, layout, params, batch):
    """The dense Gauss-Newton matrix, K-FAC and EK-FAC curvature, and their damped inverses."""

    def compute(params, batch):
        factors = curvax.kron_factors(objective, layout, params, batch, KEY, fisher="exact")
        basis = curvax.kron.kron_basis(layout, factors)
        moments = curvax.kron.kron_moments(
            objective, layout, basis, params, batch, KEY, fisher="exact"
        )
        power = lambda which, p, damping: dense(
            curvax.kron_inverse(layout, which, damping, power=p), params
        )
        curvatures = [power(which, 1.0, 0.0) for which in (factors, moments)]
        inverses = [power(which, -1.0, DAMPING) for which in (factors, moments)]
        return dense(curvax.ggnvp(objective, params, batch), params), curvatures, inverses

    return jax.jit(compute)(params, batch)


CIRCULANT = (np.arange(4)[None] - np.arange(4)[:, None]) % 4
FEATURES = lambda p, x: jnp.einsum("bhi,iohg->bgo", x, p["w"][..., CIRCULANT]) + p["b"]
X, IMAGES = correlated(7, 4), correlated(5, 4, 2)
ROWS = jnp.array([2, 0, 3, 1])

# Model, shapes of the leaves, and the inputs.
SINGLE = {
    "rows": (lambda p, x: x @ p["w"][ROWS], {"w": (4, 3)}, X),
    "columns": (lambda p, x: x @ p["w"][:, ROWS] + p["b"][ROWS], {"w": (4, 4), "b": (4,)}, X),
    "columns, bias": (lambda p, x: x @ p["w"][:, ROWS] + p["b"], {"w": (4, 4), "b": (4,)}, X),
    "anything": (
        lambda p, x: x @ p["w"].ravel()[np.random.default_rng(0).permutation(12).reshape(4, 3)],
        {"w": (4, 3)},
        X,
    ),
    "computed": (lambda p, x: x @ p["w"][(3 * jnp.arange(4) + 1) % 4], {"w": (4, 3)}, X),
    "equal rows": (lambda p, x: x @ p["w"][jnp.array([1, 0, 1, 1])], {"w": (2, 3)}, X),
    "equal columns": (lambda p, x: x @ p["w"][:, jnp.array([1, 0, 1])], {"w": (4, 2)}, X),
    "group": (lambda p, x: x @ p["w"][CIRCULANT], {"w": (4,)}, X),
    "group, features": (FEATURES, {"w": (2, 3, 4), "b": (3,)}, IMAGES),
    "group, flat": (
        lambda p, x: (
            x.reshape(len(x), -1) @ p["w"][..., CIRCULANT].transpose(2, 0, 3, 1).reshape(8, 12)
        ),
        {"w": (2, 3, 4)},
        IMAGES,
    ),
    "number": (lambda p, x: x @ (p["w"] * 0.5) + p["b"], {"w": (4, 3), "b": (3,)}, X),
    "root": (lambda p, x: x @ (-p["w"] / jnp.sqrt(4)) + 2 * p["b"], {"w": (4, 3), "b": (3,)}, X),
    "each": (
        lambda p, x: x @ (p["w"] * jnp.outer(jnp.arange(1.0, 5), jnp.array([2, -1, 0.5]))),
        {"w": (4, 3)},
        X,
    ),
    "gathered and scaled": (
        lambda p, x: x @ (p["w"][ROWS] * jnp.array([2, -1, 0.5])) + p["b"] * jnp.array([4, -2, 1]),
        {"w": (4, 3), "b": (3,)},
        X,
    ),
    "masked inputs": (lambda p, x: x @ (p["w"] * (jnp.arange(4) > 1)[:, None]), {"w": (4, 3)}, X),
    "rounded": (
        lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"])) + p["b"],
        {"w": (4, 3), "b": (3,)},
        X,
    ),
    "merged": (
        lambda p, x: x @ (p["w"] + lax.stop_gradient(p["a"]) @ jnp.ones((2, 3))),
        {"w": (4, 3), "a": (4, 2)},
        X,
    ),
    "table": (
        lambda p, ids: jax.vmap(lambda i: p["w"][i] / 2)(ids),
        {"w": (5, 3)},
        jnp.array([0, 3, 3, 1, 4, 0]),
    ),
    "permuted table": (
        lambda p, ids: p["w"][jnp.array([4, 2, 0, 1, 3])][ids],
        {"w": (5, 3)},
        jnp.array([0, 3, 3, 1, 4, 0]),
    ),
    "equinox": (
        lambda p, ids: jax.vmap(equinox.nn.Embedding(weight=p["w"]))(ids),
        {"w": (5, 3)},
        jnp.array([0, 3, 3, 1, 4, 0]),
    ),
    "positions": (lambda p, x: x + p["w"], {"w": (4, 2)}, IMAGES),
    "first positions": (lambda p, x: x + 0.5 * p["w"][None, :4], {"w": (6, 2)}, IMAGES),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_layers_are_exact(name):
    model, shapes, inputs = SINGLE[name]
    inputs = inputs.astype(int if inputs.dtype.kind == "i" else float)  # in double precision
    params = {path: normal(i, *shape) for i, (path, shape) in enumerate(shapes.items())}
    objective, batch, layout = problem(model, params, inputs)
    for leaf in layout.leaves:
        assert leaf.path == "['a']" or (leaf.kind, leaf.rest) == ("kron", None), leaf
    exact, curvatures, inverses = exact_and_blocks(objective, layout, params, batch)
    inverse = np.linalg.inv(exact + DAMPING * np.eye(len(exact)))
    for curvature, inverse_of_block in zip(curvatures, inverses, strict=True):
        np.testing.assert_allclose(curvature, exact, rtol=0, atol=1e-12 * abs(exact).max())
        np.testing.assert_allclose(
            inverse_of_block, inverse, rtol=0, atol=1e-11 * abs(inverse).max()
        )
