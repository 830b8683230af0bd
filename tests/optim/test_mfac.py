"""M-FAC over steps: against the dense inverse, in optax wrappers, sharded,
and in bounded memory.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

PARAMS = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
KEYS = jax.random.split(jax.random.key(0), 12)
SIZE, DAMPING = 4, 0.5


RULE = curvax.scale_by_mfac(SIZE, DAMPING)
UPDATE = jax.jit(RULE.update)


@functools.partial(jax.jit, static_argnums=1)
def gradient(i, dtype=jnp.float32):
    flat, unravel = ravel_pytree(jax.tree.map(lambda p: p.astype(dtype), PARAMS))
    return unravel(jax.random.normal(KEYS[i], flat.shape, dtype))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def steps():
    """Of the rule: six updates, flat, and the state after each."""
    state, taken = RULE.init(PARAMS), []
    for i in range(6):
        u, state = UPDATE(gradient(i), state)
        taken.append((flat(u), state))
    return tuple(zip(*taken, strict=True))


def expected(gradients, number, damping=DAMPING):
    """The newest of the gradients, times the dense inverse of those in the window."""
    G = np.stack(gradients[-SIZE:]).astype(np.float64)
    return np.linalg.solve(damping * np.eye(G.shape[1]) + G.T @ G / number, G[-1])


def run(tx, number):
    """Updates of some steps, and the last state."""
    update = jax.jit(lambda g, s: tx.update(g, s, PARAMS))
    state, taken = tx.init(PARAMS), []
    for i in range(number):
        u, state = update(gradient(i), state)
        taken.append(flat(u))
    return taken, state


@pytest.mark.parametrize("divisor", ["window", "count"])
def test_every_step_is_the_dense_inverse_with_the_new_gradient_in_it(divisor, x64):
    tx = curvax.scale_by_mfac(SIZE, DAMPING, divisor)
    state = tx.init(jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS))
    update, seen = jax.jit(tx.update), []
    for i in range(9):
        g = gradient(i, jnp.float64)
        seen.append(flat(g))
        u, state = update(g, state)
        want = expected(seen, SIZE if divisor == "window" else min(i + 1, SIZE))
        np.testing.assert_allclose(flat(u), want, rtol=1e-10)
        assert state.info.num_rows == min(i + 1, SIZE)
        np.testing.assert_allclose(
            state.info.shrinkage, DAMPING * seen[-1] @ want / (seen[-1] @ seen[-1]), rtol=1e-6
        )


def test_a_small_damping_costs_no_digits_of_the_step():
    """`v / damping` and its projection would cancel:
    in float32 at 1e-6 of the largest eigenvalue nothing would be left.
    """
    taken, _ = run(curvax.scale_by_mfac(SIZE, 1e-5), 6)
    want = expected([flat(gradient(i)) for i in range(6)], SIZE, 1e-5)
    np.testing.assert_allclose(taken[-1], want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_one_liner_is_the_rule_with_momentum_decay_and_rate():
    taken, _ = run(curvax.mfac(0.1, SIZE, DAMPING, momentum=0.9, weight_decay=0.01), 6)
    rule = steps()[0]
    mu = np.zeros_like(rule[0])
    for u, step in zip(rule, taken, strict=True):
        mu = 0.9 * mu + 0.1 * u
        np.testing.assert_allclose(step, -0.1 * (mu + 0.01 * flat(PARAMS)), rtol=1e-5, atol=1e-7)


def test_a_non_finite_gradient_is_not_inserted():
    state = steps()[1][4]
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.inf), gradient(5))
    u, after = UPDATE(bad, state)
    assert np.isnan(flat(u)).all() and after.info.num_nonfinite == 1
    chex.assert_trees_all_equal(after._replace(info=None), state._replace(info=None))
    finite = optax.apply_if_finite(RULE, 3)
    u, _ = jax.jit(finite.update)(bad, finite.init(PARAMS))
    assert not flat(u).any()


def test_schedules_of_damping_and_rate():
    damping = optax.piecewise_constant_schedule(DAMPING, {1: 10.0})
    taken, _ = run(curvax.scale_by_mfac(SIZE, damping), 2)
    seen = [flat(gradient(i)) for i in range(2)]
    np.testing.assert_allclose(taken[0], expected(seen[:1], SIZE), rtol=1e-5)
    np.testing.assert_allclose(taken[1], expected(seen, SIZE, 10 * DAMPING), rtol=1e-5)
    injected = optax.inject_hyperparams(
        lambda learning_rate, damping: curvax.mfac(learning_rate, SIZE, damping)
    )
    same = run(injected(learning_rate=0.1, damping=DAMPING), 3)[0]
    np.testing.assert_allclose(same, run(curvax.mfac(0.1, SIZE, DAMPING), 3)[0], rtol=1e-6)


def test_wrappers_of_optax():
    """masked and partition see a window of their own leaves alone;
    MultiSteps one of averaged gradients.
    """
    alone = UPDATE(gradient(0)["w"], RULE.init(PARAMS["w"]))[0]
    masked = optax.masked(RULE, {"w": True, "b": False})
    u, state = jax.jit(masked.update)(gradient(0), masked.init(PARAMS))
    chex.assert_trees_all_close(u, {"w": alone, "b": gradient(0)["b"]}, rtol=1e-6)
    assert not any(x.shape[1:] == (8,) for x in jax.tree.leaves(state))
    groups = optax.partition({"m": RULE, "a": optax.scale_by_adam()}, {"w": "m", "b": "a"})
    u, _ = jax.jit(groups.update)(gradient(0), groups.init(PARAMS))
    chex.assert_trees_all_close(u["w"], alone, rtol=1e-6)
    averaging = optax.MultiSteps(RULE, 2)
    taken, _ = run(optax.GradientTransformation(averaging.init, averaging.update), 2)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, gradient(0), gradient(1))
    np.testing.assert_allclose(taken[1], flat(UPDATE(mean, RULE.init(PARAMS))[0]), rtol=1e-5)


def test_scan_vmap_and_bfloat16():
    stacked = jax.tree.map(lambda *x: np.stack(x), *[gradient(i) for i in range(6)])
    flat_rows = lambda tree: np.concatenate(
        [np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(tree)], axis=1
    )
    scan = jax.jit(lambda s, g: jax.lax.scan(lambda s, g: RULE.update(g, s)[::-1], s, g)[1])
    np.testing.assert_allclose(
        flat_rows(scan(RULE.init(PARAMS), stacked)), steps()[0], rtol=1e-5, atol=1e-6
    )
    members = jax.tree.map(lambda x: x[:3], stacked)
    together, _ = jax.jit(lambda g: jax.vmap(RULE.update)(g, jax.vmap(RULE.init)(g)))(members)
    for i, row in enumerate(flat_rows(together)):
        alone, _ = UPDATE(gradient(i), RULE.init(PARAMS))
        np.testing.assert_allclose(row, flat(alone), rtol=1e-5)
    coarse = curvax.scale_by_mfac(SIZE, DAMPING, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    rounded = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient(0))
    u, state = jax.jit(coarse.update)(rounded, coarse.init(params))
    assert {x.dtype for x in jax.tree.leaves((u, state.curvature.rows))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert state.curvature.gram.dtype == jnp.float32
    np.testing.assert_allclose(flat(u).astype(np.float32), steps()[0][0], rtol=0.03, atol=0.01)


def test_eight_devices_equal_one_and_never_gather_the_window():
    """Leaves sharded on different axes: the state is sharded as they are,
    and what crosses devices is m numbers.
    """
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shardings = {"w": NamedSharding(mesh, P("x", "y")), "b": NamedSharding(mesh, P("y"))}
    params = jax.device_put(PARAMS, shardings)
    state = jax.jit(RULE.init)(params)
    state = state._replace(
        curvature=state.curvature._replace(
            rows={
                k: jax.device_put(x, NamedSharding(mesh, P(None, *shardings[k].spec)))
                for k, x in state.curvature.rows.items()
            }
        )
    )
    update = jax.jit(RULE.update, donate_argnums=1)
    text = update.lower(jax.device_put(gradient(0), shardings), state).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
    for i in range(6):
        u, state = update(jax.device_put(gradient(i), shardings), state)
    np.testing.assert_allclose(flat(jax.device_get(u)), steps()[0][-1], rtol=1e-5)
    for name, rows in state.curvature.rows.items():
        assert rows.sharding.is_equivalent_to(
            NamedSharding(mesh, P(None, *shardings[name].spec)), rows.ndim
        )
    eager = RULE.init(params).curvature.rows
    assert eager["w"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x", "y")), 3)


@pytest.mark.parametrize(("dtype", "bound"), [(None, 0.15), (jnp.bfloat16, 1.15)])
def test_a_step_works_in_little_memory_beside_the_window(dtype, bound):
    """With the state donated: no second copy of the m d numbers;
    of 16-bit ones, CPUs make one, but none in float32.
    """
    params = {"w": jnp.zeros((500, 200)), "b": jnp.zeros(1000)}
    tx = curvax.scale_by_mfac(64, 1e-3, dtype=dtype)
    state = jax.eval_shape(tx.init, params)
    memory = jax.jit(tx.update, donate_argnums=1).lower(params, state).compile().memory_analysis()
    window = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.curvature.rows))
    assert (
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        < bound * window
    )


def test_errors_say_what_and_where():
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"window_size must be at least 1, got {size}"):
            curvax.mfac(0.1, size)
    with pytest.raises(TypeError, match="window_size must be a Python integer"):
        curvax.mfac(0.1, 2.5)
    with pytest.raises(ValueError, match=r"damping must be positive, got 0\.0"):
        curvax.scale_by_mfac(4, 0.0)
    with pytest.raises(ValueError, match="unknown divisor 'rows'"):
        curvax.mfac(0.1, 4, divisor="rows")
    with pytest.raises(ValueError, match="unknown blocks 'row'"):
        curvax.scale_by_mfac(4, blocks="row")
    tx = curvax.scale_by_mfac(4)
    state = tx.init(PARAMS)
    with pytest.raises(
        ValueError,
        match=r"gradient\['b'\] is float32\[2\], a row of the window\['b'\] is float32\[8\]",
    ):
        tx.update({**PARAMS, "b": jnp.zeros(2)}, state)
    with pytest.raises(
        ValueError, match=r"curvature\['w'\] is float32\[3, 4, 8\].*float32\[5, 4, 8\]"
    ):
        tx.update(PARAMS, state, curvature={"w": jnp.zeros((3, 4, 8)), "b": jnp.zeros((5, 8))})
    with pytest.raises(ValueError, match="window_size must be at least 9, got 4"):
        tx.update(PARAMS, state, curvature=jax.tree.map(lambda p: jnp.zeros((9, *p.shape)), PARAMS))
