"""Elements, diagonals and blocks of the inverse against the dense inverse;
collecting from a stream.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.solve import inverse_element, map_inverse_blocks, whiten

DAMPING, SIZE = 0.3, 5
OBJECTIVE = curvax.Objective(
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["c"], curvax.losses.softmax_cross_entropy()
)
PARAMS = {
    "c": jax.random.normal(jax.random.key(0), (5, 3)),
    "w": jax.random.normal(jax.random.key(1), (4, 5)),
}
BATCHES = [
    (jax.random.normal(jax.random.key(i), (6, 4)), jnp.arange(6) % 3) for i in range(2, 2 + SIZE)
]

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def window(**options):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    return curvax.solve.fisher_window(OBJECTIVE, params, BATCHES, SIZE, **options)


def rows(window):
    return np.concatenate([np.reshape(x, (SIZE, -1)) for x in jax.tree.leaves(window.rows)], axis=1)


def dense(G, number=SIZE):
    return np.linalg.inv(DAMPING * np.eye(G.shape[1]) + G.T @ G / number)


def test_the_window_holds_the_gradients_of_the_stream():
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    gradient = jax.jit(lambda p, b: ravel_pytree(jax.grad(OBJECTIVE)(p, b))[0])
    want = [gradient(params, batch) for batch in BATCHES]
    np.testing.assert_allclose(rows(window()), want, rtol=1e-12)


def test_diagonal_and_elements():
    inverse = dense(rows(window()))
    diagonal = curvax.solve.inverse_diagonal(window(), DAMPING)
    np.testing.assert_allclose(ravel_pytree(diagonal)[0], np.diag(inverse), rtol=1e-10)
    whitened = whiten(window(), DAMPING)
    places = {0: ("['c']", 0, 0), 7: ("['c']", 2, 1), 15: ("['w']", 0, 0), 33: ("['w']", 3, 3)}
    for i, one in places.items():
        for j, other in places.items():
            np.testing.assert_allclose(
                inverse_element(whitened, one, other), inverse[i, j], rtol=1e-10, atol=1e-12
            )


def test_a_matrix_for_each_leaf():
    G = rows(window())
    cut = PARAMS["c"].size
    inverses = [dense(G[:, :cut]), dense(G[:, cut:])]
    diagonal = curvax.solve.inverse_diagonal(window(blocks="leaf"), DAMPING)
    np.testing.assert_allclose(
        ravel_pytree(diagonal)[0], np.concatenate([np.diag(x) for x in inverses]), rtol=1e-10
    )
    whitened = whiten(window(blocks="leaf"), DAMPING)
    np.testing.assert_allclose(
        inverse_element(whitened, ("['w']", 0, 0), ("['w']", 0, 1)), inverses[1][0, 1], rtol=1e-10
    )
    assert inverse_element(whitened, ("['c']", 0, 0), ("['w']", 0, 0)) == 0


@pytest.mark.parametrize("size", [1, 4, 7, 15, 64])
def test_blocks_of_consecutive_entries(size):
    """Ragged last blocks, blocks longer than a leaf, more blocks than are worked on at a time."""
    G, want = rows(window()), []
    for leaf in np.split(G, [PARAMS["c"].size], axis=1):
        for start in range(0, leaf.shape[1], size):
            want.append(np.diag(dense(leaf[:, start : start + size])))
    got = curvax.solve.inverse_diagonal(window(), DAMPING, block_size=size)
    np.testing.assert_allclose(ravel_pytree(got)[0], np.concatenate(want), rtol=1e-10)
    ones = jax.tree.map(lambda p: jnp.ones(p.shape), PARAMS)
    sums = map_inverse_blocks(lambda inverse, v: inverse @ v, window(), DAMPING, size, ones)
    if size == 64:
        want = [dense(leaf).sum(1) for leaf in np.split(G, [PARAMS["c"].size], axis=1)]
        np.testing.assert_allclose(ravel_pytree(sums)[0], np.concatenate(want), rtol=1e-10)


def test_a_stream_that_ends_says_how_many_came_and_serves_with_its_count():
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    with pytest.warns(
        UserWarning, match=r"batches gave 5 finite gradients for a window of 8.*divisor=\"count\""
    ):
        short = curvax.solve.fisher_window(OBJECTIVE, params, BATCHES, 8)
    full = window()
    for of in (
        lambda w, d: curvax.solve.inverse_diagonal(w, DAMPING, divisor=d),
        lambda w, d: curvax.solve.window_inverse(w, DAMPING, divisor=d)(params),
    ):
        np.testing.assert_allclose(
            *(ravel_pytree(of(w, d))[0] for w, d in ((short, "count"), (full, "window"))),
            rtol=1e-12,
        )
    bad = [(jnp.full((6, 4), jnp.nan), BATCHES[0][1]), *BATCHES]
    with pytest.warns(UserWarning, match="5 finite gradients for a window of 6"):
        assert int(curvax.solve.fisher_window(OBJECTIVE, params, bad, 6).count) == 5
    with pytest.raises(ValueError, match="no finite gradient"):
        curvax.solve.fisher_window(OBJECTIVE, params, [], 4)


def test_errors_say_what_and_where():
    whitened = whiten(window(), DAMPING)
    with pytest.raises(
        ValueError, match=r"there is no leaf \['b'\]; the leaves are \['c'\], \['w'\]"
    ):
        inverse_element(whitened, ("['b']", 0), ("['c']", 0, 0))
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        curvax.solve.inverse_diagonal(window(), DAMPING, block_size=0)
    with pytest.raises(ValueError, match="damping must be positive"):
        curvax.solve.inverse_diagonal(window(), 0.0, block_size=4)
