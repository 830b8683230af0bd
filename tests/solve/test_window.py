"""The window's inverse against the dense inverse and both published algorithms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from mfac_published import dynamic_inverse, static_inverse

import curvax
from curvax.solve import init_window, insert

SIZE, DAMPING = 6, 0.3
PARAMS = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(3)}
KEYS = jax.random.split(jax.random.key(0), 20)


pytestmark = pytest.mark.usefixtures("x64")


@jax.jit
def tree(key):
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float64), PARAMS))
    return unravel(jax.random.normal(key, flat.shape, jnp.float64))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


step = jax.jit(insert)  # the slot is traced


def filled(number, size=SIZE, **options):
    """A window after `number` insertions, and its rows from the oldest to the newest."""
    gradients = [tree(key) for key in KEYS[:number]]
    window = init_window(gradients[0], size, **options)
    for g in gradients:
        window = step(window, g)
    return window, np.stack([flat(g) for g in gradients[-size:]])


def dense(G, number, damping=DAMPING):
    return np.linalg.inv(damping * np.eye(G.shape[1]) + G.T @ G / number)


@pytest.mark.parametrize("number", [1, 4, 6, 9, 17])
def test_equals_the_dense_inverse_and_both_published_algorithms(number):
    """While it fills, when it is full, and after it has wrapped."""
    window, G = filled(number)
    x = tree(KEYS[-1])
    for divisor, count in (("window", SIZE), ("count", len(G))):
        got = flat(curvax.solve.window_inverse(window, DAMPING, divisor=divisor)(x))
        np.testing.assert_allclose(got, dense(G, count) @ flat(x), rtol=1e-9)
    if len(G) == SIZE:
        for published in (static_inverse, dynamic_inverse):
            np.testing.assert_allclose(got, published(G, DAMPING, flat(x)), rtol=1e-9)
    np.testing.assert_allclose(
        window.gram[0], stored(window) @ stored(window).T, rtol=1e-12, atol=1e-12
    )


def stored(window):
    return np.concatenate(
        [np.reshape(x, (window.gram.shape[-1], -1)) for x in jax.tree.leaves(window.rows)], axis=1
    )


def test_the_order_of_rows_does_not_matter():
    window, _ = filled(9)
    permuted = curvax.solve.window_of(
        jax.tree.map(lambda x: x[np.array([3, 0, 5, 1, 2, 4])], window.rows)
    )
    x = tree(KEYS[-1])
    one, other = (curvax.solve.window_inverse(w, DAMPING)(x) for w in (window, permuted))
    np.testing.assert_allclose(flat(one), flat(other), rtol=1e-12)


def test_blocks_by_leaf_are_inverses_of_each_leaf_alone():
    window, _ = filled(9, blocks="leaf")
    assert window.gram.shape == (2, SIZE, SIZE)
    x = tree(KEYS[-1])
    got = curvax.solve.window_inverse(window, DAMPING)(x)
    for name in PARAMS:
        alone = curvax.solve.window_inverse(curvax.solve.window_of(window.rows[name]), DAMPING)(
            x[name]
        )
        np.testing.assert_allclose(got[name], alone, rtol=1e-12)
    given = curvax.solve.window_of(window.rows, blocks="leaf")
    np.testing.assert_allclose(given.gram, window.gram, rtol=1e-12)


def test_rows_in_bfloat16_are_those_that_the_gram_matrix_is_of():
    gradients = [jax.tree.map(lambda x: x.astype(jnp.float32), tree(key)) for key in KEYS[:9]]
    window = init_window(gradients[0], SIZE, dtype=jnp.bfloat16)
    for g in gradients:
        window = step(window, g)
    assert {x.dtype for x in jax.tree.leaves(window.rows)} == {jnp.dtype(jnp.bfloat16)}
    assert window.gram.dtype == jnp.float32
    G = stored(window).astype(np.float64)
    np.testing.assert_allclose(window.gram[0], G @ G.T, rtol=1e-5, atol=1e-5)
    x = jax.tree.map(lambda x: x.astype(jnp.float32), tree(KEYS[-1]))
    got = curvax.solve.window_inverse(window, DAMPING)(x)
    assert {y.dtype for y in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(flat(got), dense(G, SIZE) @ flat(x), rtol=1e-4, atol=1e-5)


def test_damping_below_the_precision_is_raised_to_it():
    """In float32, rows of rank 1 and next to no damping:
    still finite, and the same as with what it is raised to.
    """
    window = curvax.solve.window_of(
        jnp.ones((4, 3), jnp.float32) * jnp.arange(1.0, 5, dtype=jnp.float32)[:, None]
    )
    least = np.finfo(np.float32).eps * 3 * 30 / 4  # times the trace of the Fisher
    v = jnp.array([1.0, -1.0, 0.0], jnp.float32)
    tiny, raised = (curvax.solve.window_inverse(window, damping)(v) for damping in (1e-30, least))
    assert np.isfinite(tiny).all()
    np.testing.assert_allclose(tiny, raised, rtol=1e-6)


def test_a_matvec_crosses_jit_and_works_under_vmap():
    window, _ = filled(6)
    matvec = curvax.solve.window_inverse(window, DAMPING)
    xs = jax.tree.map(lambda *x: jnp.stack(x), *[tree(key) for key in KEYS[-3:]])
    together = jax.jit(lambda mv, xs: jax.vmap(mv)(xs))(matvec, xs)
    each = [flat(matvec(tree(key))) for key in KEYS[-3:]]
    together = np.concatenate([np.reshape(x, (3, -1)) for x in jax.tree.leaves(together)], axis=1)
    np.testing.assert_allclose(together, each)


def test_errors_say_what_and_where():
    window, _ = filled(2)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"window_size must be at least 1, got {size}"):
            init_window(PARAMS, size)
    for damping in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"damping must be positive, got {damping}"):
            curvax.solve.window_inverse(window, damping)
    with pytest.raises(ValueError, match="unknown divisor 'rows'; valid: 'window', 'count'"):
        curvax.solve.window_inverse(window, 1.0, divisor="rows")
    with pytest.raises(ValueError, match="unknown blocks 'layer'; valid: 'full', 'leaf'"):
        init_window(PARAMS, 2, blocks="layer")
    with pytest.raises(
        ValueError, match=r"v\['w'\] is .*\[5, 4\], a row of the window\['w'\] is .*\[4, 5\]"
    ):
        curvax.solve.window_inverse(window, 1.0)({**PARAMS, "w": jnp.zeros((5, 4))})
    with pytest.raises(ValueError, match=r"gradient has no leaf at \['b'\]"):
        insert(window, {"w": PARAMS["w"]})
