"""An objective of two parts and a penalty: a boundary value problem, shared by tests."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import curvax
from curvax import losses

WEIGHTS = {"interior": 0.7, "boundary": 3.0, "decay": 0.2}
KEY = jax.random.key(3)


def net(params, x):
    h = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return h @ params["last"]["w"] + params["last"]["b"]


def laplacian(params, points):
    """Second derivatives by forward mode, in which no kernel is used transposed."""
    second = jax.jacfwd(jax.jacfwd(lambda x: net(params, x)[0]))
    return jax.vmap(lambda x: jnp.trace(second(x)))(points)[:, None]


def penalized(params):
    return {"first": {"w": True, "b": False}, "last": {"w": True, "b": True}}


INTERIOR = curvax.Objective(laplacian, losses.squared_error())
BOUNDARY = curvax.Objective(lambda p, x: net(p, x), losses.sigmoid_cross_entropy())
DECAY = curvax.penalty(lambda w: 0.5 * w**2 + w**4, penalized)
PARTS = {"interior": INTERIOR, "boundary": BOUNDARY, "decay": DECAY}
TOTAL = curvax.total(PARTS, WEIGHTS)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.result_type(float))


def problem(num_interior=5, num_boundary=3):
    params = {
        "first": {"w": normal(0, 2, 3), "b": normal(1, 3)},
        "last": {"w": normal(2, 3, 1), "b": normal(3, 1)},
    }
    batch = {
        "interior": (normal(4, num_interior, 2), normal(5, num_interior, 1)),
        "boundary": (normal(6, num_boundary, 2), jnp.ones((num_boundary, 1))),
    }
    return params, batch


def close(got, want, rtol=1e-10):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(want))
    close_leaf = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale)
    jax.tree.map(close_leaf, got, want)


def second_derivatives(params):
    """The curvature of the penalty, flat, in the order of the params."""
    second = jax.tree.map(lambda w, on: (1 + 12 * w**2) * on, params, penalized(params))
    return oracle.flat(second)
