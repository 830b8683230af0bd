"""SPRING, energy natural gradient descent and the line search, against NumPy in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import parts
import pytest

import curvax
from curvax.solve import Dense, Result, direct, sample_space

RESIDUALS = {name: parts.PARTS[name] for name in ("interior", "boundary")}
OBJECTIVE = curvax.total(RESIDUALS, {"interior": 0.7, "boundary": 3.0})
DAMPING, MOMENTUM, NUM_STEPS = 1e-2, 0.8, 4


def batches(num_interior, num_boundary):
    """Batches with a leading axis of steps."""
    interior, boundary = (NUM_STEPS, num_interior), (NUM_STEPS, num_boundary)
    return {
        "interior": (parts.normal(7, *interior, 2), parts.normal(8, *interior, 1)),
        "boundary": (parts.normal(9, *boundary, 2), jnp.ones((*boundary, 1))),
    }


@functools.partial(jax.jit, static_argnums=0)
def directions(space, params, stacked):
    """The directions of the rule, the gradients, and the dense matrices and rows, step by step."""
    rule = curvax.scale_by_spring(DAMPING, MOMENTUM)

    def step(state, batch):
        gradient = jax.grad(OBJECTIVE)(params, batch)
        curvature = sample_space(OBJECTIVE, params, batch, space=space)
        phi, state = rule.update(gradient, state, params, curvature=curvature)
        matrix = curvax.to_dense(curvax.ggnvp(OBJECTIVE, params, batch), params)
        return state, (oracle.flat(phi), oracle.flat(gradient), matrix)

    return jax.lax.scan(step, rule.init(params), stacked)


@pytest.mark.parametrize("sizes", [(5, 3), (14, 6)], ids=["few rows", "many rows"])
def test_both_forms_of_spring(sizes, x64):
    params, _ = parts.problem()
    stacked = batches(*sizes)
    by_space = [directions(space, params, stacked) for space in ("samples", "params")]
    _, (phis, gradients, matrices) = by_space[0]
    # (F + damping I) phi = g + damping mu phi_0
    phi = np.zeros(len(phis[0]))
    want = []
    for g, matrix in zip(gradients, matrices, strict=True):
        right = g + DAMPING * MOMENTUM * phi
        phi = np.linalg.solve(matrix + DAMPING * np.eye(len(phi)), right)
        want.append(phi)
    for state, (phis, _, _) in by_space:
        parts.close(phis, np.stack(want), rtol=1e-9)
        assert state.count == NUM_STEPS and state.info.code == Result.CONVERGED
        parts.close(oracle.flat(state.direction), want[-1], rtol=1e-9)


def test_the_recurrence_of_the_papers(x64):
    """`zeta = e - mu J phi`, `phi <- mu phi + J'(JJ' + damping I)^-1 zeta`, with plain arrays."""
    J, e = np.random.default_rng(0).normal(size=(2, 3, 6)), np.ones((2, 3))
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    rule, w = curvax.scale_by_spring(DAMPING, MOMENTUM), jnp.zeros(6)
    state, phi = rule.init(w), np.zeros(6)
    update = jax.jit(lambda g, s, b: rule.update(g, s, w, curvature=sample_space(objective, w, b)))
    for x, y in zip(J, e, strict=True):
        # Rows and entries are divided by the root of their number.
        rows, entries = x / 3**0.5, y / 3**0.5
        zeta = entries - MOMENTUM * rows @ phi
        solved = np.linalg.solve(rows @ rows.T + DAMPING * np.eye(3), zeta)
        phi = MOMENTUM * phi + rows.T @ solved
        batch = jnp.asarray(x), jnp.asarray(y)
        got, state = update(jax.grad(objective)(w, batch), state, batch)
        np.testing.assert_allclose(-got, phi, rtol=1e-10, atol=1e-12)


def test_engd_is_its_first_step_and_a_split_of_a_set_changes_nothing(x64):
    params, batch = parts.problem()
    interior, boundary = batch["interior"], batch["boundary"]
    split = {
        "one": jax.tree.map(lambda x: x[:2], interior),
        "two": jax.tree.map(lambda x: x[2:], interior),
        "boundary": boundary,
    }
    both = {"one": parts.INTERIOR, "two": parts.INTERIOR, "boundary": parts.BOUNDARY}
    weights = {"one": 0.7 * 2 / 5, "two": 0.7 * 3 / 5, "boundary": 3.0}
    in_three = curvax.total(both, weights)

    @jax.jit
    def steps(params, batch, split):
        results = {}
        for name, tx, objective, rows in (
            ("engd", curvax.engd(1.0, OBJECTIVE, DAMPING), OBJECTIVE, batch),
            ("spring", curvax.spring(1.0, OBJECTIVE, DAMPING), OBJECTIVE, batch),
            ("split", curvax.engd(1.0, in_three, DAMPING), in_three, split),
        ):
            gradient = jax.grad(objective)(params, rows)
            results[name], _ = tx.update(gradient, tx.init(params), params, batch=rows)
        matrix = curvax.to_dense(curvax.ggnvp(OBJECTIVE, params, batch), params)
        return results, oracle.flat(jax.grad(OBJECTIVE)(params, batch)), matrix

    results, gradient, matrix = steps(params, batch, split)
    want = -np.linalg.solve(matrix + DAMPING * np.eye(len(matrix)), gradient)
    parts.close(oracle.flat(results["engd"]), want, rtol=1e-9)
    parts.close(results["spring"], results["engd"], rtol=1e-12)
    parts.close(results["split"], results["engd"], rtol=1e-11)
    # Without momentum there is nothing to keep.
    assert optax.tree.get(curvax.engd(1.0, OBJECTIVE).init(params), "direction") is None


@pytest.mark.parametrize("shape", [(4, 7), (9, 7)], ids=["few rows", "many rows"])
def test_tiny_damping_gives_least_squares(shape, x64):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=shape), rng.normal(size=shape[0])
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w, batch = jnp.zeros(7), (jnp.asarray(x), jnp.asarray(y))
    tx = curvax.engd(1.0, objective, damping=1e-13)
    step, _ = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
    np.testing.assert_allclose(step, np.linalg.lstsq(x, y)[0], rtol=1e-9, atol=1e-10)


def test_where_cholesky_fails_a_pseudo_inverse_steps_in(x64):
    rule, w = curvax.scale_by_spring(damping=0.5, momentum=0.5), jnp.zeros(3)
    diagonals = jnp.array([[2.0, 1.0, -1.0], [2.0, 1.0, 0.0]])
    curvature = Dense(jax.vmap(jnp.diag)(diagonals))
    update = lambda c: rule.update(jnp.ones(3), rule.init(w), w, curvature=c)
    phi, state = jax.jit(jax.vmap(update))(curvature)
    np.testing.assert_allclose(phi, [[1 / 2.5, 1 / 1.5, 0], [1 / 2.5, 1 / 1.5, 2]], rtol=1e-12)
    assert state.info.num_fallbacks.tolist() == [1, 0]
    assert state.info.code.tolist() == [Result.PSEUDO_INVERSE, Result.CONVERGED]
    message = Result.PSEUDO_INVERSE.message
    assert "pseudo-inverse" in message
    # Asked for nothing, a solve is zero.
    x, info = direct(Dense(jnp.diag(diagonals[0])), jnp.ones(3), damping=0.5)
    assert not x.any() and info.code == Result.NOT_DEFINITE


def test_what_is_not_finite_leaves_the_direction():
    rule, w = curvax.scale_by_spring(damping=0.5, momentum=0.5), jnp.zeros(2)
    update = jax.jit(lambda g, s, m: rule.update(g, s, w, curvature=Dense(m)))
    _, state = update(jnp.ones(2), rule.init(w), jnp.eye(2))
    bad_gradient, after = update(jnp.array([1.0, jnp.nan]), state, jnp.eye(2))
    assert np.all(np.isnan(bad_gradient)) and after.info.num_nonfinite == 1
    chex.assert_trees_all_equal(after.direction, state.direction)
    zero, after = update(jnp.ones(2), state, jnp.eye(2) * jnp.nan)
    assert not zero.any() and after.info.num_nonfinite == 1
    chex.assert_trees_all_equal(after.direction, state.direction)


def test_the_limit_of_a_step_is_not_in_the_direction():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w, batch = jnp.zeros(2, jnp.bfloat16), (jnp.eye(2), jnp.full(2, 8.0))
    tx = curvax.spring(0.5, objective, 1e-3, max_norm=0.25)
    step, state = tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
    assert step.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.linalg.norm(step.astype(float)), 0.25, rtol=1e-2)
    phi = optax.tree.get(state, "direction")
    assert phi.dtype == jnp.float32
    np.testing.assert_allclose(phi, [-8.0, -8.0], rtol=1e-2)


def quartic():
    """`f = w^4 / 4`, which is no number beyond 3."""
    value = lambda f, y: jnp.mean(jnp.where(f > 3, jnp.nan, f) ** 4) / 4
    return curvax.Objective(lambda w, x: x * w, curvax.losses.from_function(value))


def test_line_search_takes_the_best_of_the_grid():
    objective, batch = quartic(), (jnp.ones((1, 1)), jnp.zeros(1))
    tx = curvax.line_search(optax.scale(-8.0), objective, largest=2.0, num_trials=6)

    @jax.jit
    @jax.vmap
    def step(direction, w):
        updates, state = tx.update(direction, tx.init(w), w, batch=batch)
        return updates, state.info

    # From 1 by -8 d at scales 2, 1, 1/2 ... 1/16: to the minimum at 0 by 1/8; beyond 3 all is NaN
    # but the last two; uphill there is nothing to gain.
    directions = jnp.array([[1.0], [-2.0], [jnp.nan]])
    updates, info = step(directions, jnp.ones((3, 1)))
    np.testing.assert_allclose(updates[:2, 0], [-1.0, 0.0])
    assert np.isnan(updates[2, 0])
    assert info.scale.tolist() == [0.125, 0.0, 0.0]
    assert info.value.tolist() == [0.0, 0.25, 0.25]
    assert info.num_rejected.tolist() == [0, 1, 1] and info.accepted.tolist() == [1, 0, 0]
    # Where large steps give no number, smaller ones do: from -2.5 by 8 d.
    updates, info = step(jnp.array([[-1.0]]), jnp.array([[-2.5]]))
    np.testing.assert_allclose(updates, [[2.0]])


def test_line_search_goes_on_with_the_inner_state_and_takes_the_value():
    objective, batch = quartic(), (jnp.ones((1, 1)), jnp.zeros(1))
    tx = curvax.line_search(optax.chain(optax.trace(0.5), optax.scale(1.0)), objective)
    w = jnp.ones(1)
    update = jax.jit(lambda g, s, v: tx.update(g, s, w, batch=batch, value=v))
    updates, state = update(jnp.ones(1), tx.init(w), 0.25)
    assert not updates.any() and optax.tree.get(state, "trace") == 1
    # Against a value that is too high, a step uphill is lower.
    updates, _ = update(jnp.ones(1), tx.init(w), 100.0)
    assert updates.any()


def test_bad_input():
    w, batch = jnp.zeros(2), (jnp.eye(2), jnp.ones(2))
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        curvax.spring(1.0, objective, momentum=1.0)
    with pytest.raises(ValueError, match="max_norm must be positive"):
        curvax.spring(1.0, objective, max_norm=0.0)
    with pytest.raises(ValueError, match="damping must be positive"):
        curvax.engd(1.0, objective, damping=0.0)
    with pytest.raises(ValueError, match="num_trials must be at least 1"):
        curvax.line_search(optax.sgd(1.0), objective, num_trials=0)
    with pytest.raises(ValueError, match="largest must be positive"):
        curvax.line_search(optax.sgd(1.0), objective, largest=-1.0)
    search = curvax.line_search(optax.sgd(1.0), objective)
    with pytest.raises(ValueError, match="trials of the step need both"):
        search.update(w, search.init(w), w)
    rule = curvax.scale_by_spring()
    with pytest.raises(ValueError, match="a solve needs curvature in every step"):
        rule.update(w, rule.init(w), w)
    with pytest.raises(ValueError, match="center has no leaf"):
        direct(Dense(jnp.eye(2)), w, damping=1.0, center={"w": w})
    mean = curvax.Objective(lambda w, x: jnp.mean(x @ w), curvax.losses.squared_error())
    tx = curvax.engd(1.0, mean)
    with pytest.raises(ValueError, match=r"needs float outputs \[batch, ...\], got float32\[\]"):
        tx.update(w, tx.init(w), w, batch=batch)
