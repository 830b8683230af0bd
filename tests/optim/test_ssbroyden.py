"""Self-scaled quasi-Newton: parity with the transcription, the secant pair, guards, the search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import published_matrices as published
import pytest

import curvax
from curvax.optim import _self_scaled

KINDS = ("ssbroyden", "ssbfgs")
# The transcription has s itself, the rule the difference of iterates: near the minimum rounding
# would be what differs.
NUM_STEPS = 30


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def positive_definite(size, seed):
    x = normal(size, size, seed=seed)
    return x @ x.T / size + 0.1 * np.eye(size)


def residuals(x, rows):
    """Of Rosenbrock's function, half the sum of their squares."""
    return jnp.concatenate([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])[None] + 0 * rows


ROSENBROCK = curvax.Objective(residuals, curvax.losses.squared_error())


def batch_of(size):
    zeros = jnp.zeros((1, 2 * size - 2))
    return zeros, zeros


def backtracking(fun, x, p, g):
    alpha = 1.0
    while fun(x + alpha * p) > fun(x) + 1e-4 * alpha * (g @ p):
        alpha /= 2
    return alpha


def along(kind):
    """The states and directions of the rule, for gradients at iterates `[t, d]`."""
    rule = curvax.optim.scale_by_ssbroyden(kind)

    def step(state, point):
        x, g = point
        direction, state = rule.update(g, state, x)
        return state, (state.inverse, direction)

    @jax.jit
    @jax.vmap
    def run(xs, gs):
        return jax.lax.scan(step, rule.init(xs[0]), (xs, gs))

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_are_those_of_the_transcription(kind, x64):
    with_batch = lambda x: ROSENBROCK(x, batch_of(4))
    fun, grad = jax.jit(with_batch), jax.jit(jax.grad(with_batch))
    starts = [[-1.2, 1.0, -0.5, 1.5], [0.3, -0.8, 2.0, 0.1]]
    gradient_of = lambda x: np.asarray(grad(x))
    runs = [
        published.ssbroyden(fun, gradient_of, start, [backtracking] * NUM_STEPS, kind=kind)
        for start in starts
    ]
    xs = np.array([run[0] for run in runs])
    gs = np.array([[gradient_of(x) for x in run] for run in xs])
    state, (inverses, directions) = along(kind)(xs, gs)
    expected = np.array([run[1] for run in runs])
    size = np.linalg.norm(expected, axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(inverses / size, expected / size, rtol=0, atol=1e-10)
    np.testing.assert_allclose(directions, np.einsum("rtij,rtj->rti", inverses, gs), rtol=1e-10)
    np.testing.assert_array_equal(inverses, inverses.mT)
    num_changed = np.any(expected[:, 1:] != expected[:, :-1], axis=(2, 3)).sum(axis=1)
    np.testing.assert_array_equal(state.num_updates, num_changed)
    np.testing.assert_array_equal(state.info.num_skipped, NUM_STEPS - num_changed)
    assert np.all(num_changed > 20)
    # The secant pair, where an update took place, and a positive definite matrix everywhere.
    s, y = np.diff(xs, axis=1), np.diff(gs, axis=1)
    is_updated = np.sum(s * y, axis=2) > 0
    secant = np.einsum("rtij,rtj->rti", inverses[:, 1:], y)
    np.testing.assert_allclose(secant[is_updated], s[is_updated], rtol=1e-6, atol=1e-9)
    assert np.min(np.linalg.eigvalsh(inverses)) > 0


def test_any_member_of_the_family_maps_y_to_s(x64):
    direct, s = positive_definite(5, 1), normal(5)
    y = positive_definite(5, 2) @ s
    inverse, b = np.linalg.inv(direct), s @ direct @ s / (y @ s)
    a = b * (y @ inverse @ y) / (y @ s) - 1
    draws = np.random.default_rng(3).uniform([-0.9 / a, 0.1], [1.5, 2.0], size=(6, 2))
    update = jax.jit(_self_scaled._broyden)
    for theta, tau in draws:
        scales = _self_scaled.Scales(theta, tau, 1 + a * theta)
        new = update(inverse, s, y, scales)
        np.testing.assert_allclose(new @ y, s, rtol=0, atol=1e-11)
        expected = published.broyden_inverse_update(inverse, s, y, b, theta, tau)
        np.testing.assert_allclose(new, expected, rtol=0, atol=1e-11)
        new_direct = published.broyden_direct_update(direct, s, y, theta, tau)
        np.testing.assert_allclose(new @ new_direct, np.eye(5), atol=1e-9)
        assert np.min(np.linalg.eigvalsh(new)) > 0


@pytest.mark.parametrize("curvature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("size", [1, 3])
def test_parallel_steps_and_gradients_are_no_special_case(curvature, size, x64):
    x0 = np.arange(1.0, size + 1)
    direction = x0 / np.linalg.norm(x0)
    xs = np.array([1.0, 0.9, 0.7])[:, None] * x0
    for kind in KINDS:
        _, (inverses, _) = along(kind)(xs[None], curvature * xs[None])
        for inverse in inverses[0, 1:]:
            assert np.min(np.linalg.eigvalsh(inverse)) > 0
            np.testing.assert_allclose(inverse @ direction, direction / curvature, rtol=1e-12)


def test_steps_without_positive_curvature_leave_the_matrix_alone():
    rule = curvax.optim.scale_by_ssbroyden()
    gradient_at = lambda x: jnp.array([1.0, -3.0]) * x
    update = jax.jit(lambda x, state: rule.update(gradient_at(x), state, x))
    start = jnp.array([0.1, 1.0])
    x = start - 0.5 * gradient_at(start)
    _, state = update(start, rule.init(start))
    _, state = update(x, state)
    np.testing.assert_array_equal(state.inverse, np.eye(2))
    assert state.info.num_skipped == 1 and state.num_updates == 0
    # No step at all has no curvature either.
    _, state = update(x, state)
    np.testing.assert_array_equal(state.inverse, np.eye(2))
    assert state.info.num_skipped == 2
    # The first update that does take place scales the identity: H = I / 4 where the Hessian is 4 I.
    rule = curvax.optim.scale_by_ssbroyden("ssbfgs")
    state = rule.init(x)
    for point in (x, x, 0.9 * x):
        _, state = rule.update(4 * point, state, point)
    np.testing.assert_allclose(state.inverse, np.eye(2) / 4, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing():
    rule = curvax.optim.scale_by_ssbroyden()
    x = jnp.array([0.5, 1.0])
    state = rule.init(x)
    _, state = rule.update(x, state, x)
    bad, after = rule.update(x.at[0].set(jnp.nan), state, 0.9 * x)
    assert np.all(np.isnan(bad)) and after.info.num_nonfinite == 1
    unchanged = after._replace(info=state.info)
    jax.tree.map(np.testing.assert_array_equal, unchanged, state)
    good, after = rule.update(0.8 * x, after, 0.8 * x)
    assert np.all(np.isfinite(good)) and after.num_updates == 1


def test_params_are_any_tree_of_any_precision():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.zeros(3)}
    gradient = jax.tree.map(lambda x: x + 1, params)
    rule = curvax.optim.scale_by_ssbroyden()
    updates, state = rule.update(gradient, rule.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, gradient)  # H = I
    assert updates["w"].dtype == jnp.bfloat16
    assert state.inverse.shape == (7, 7) and state.inverse.dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="unknown kind 'bfgs'; valid: 'ssbroyden', 'ssbfgs'"):
        curvax.optim.scale_by_ssbroyden("bfgs")
    rule = curvax.optim.scale_by_ssbroyden()
    with pytest.raises(ValueError, match="need params"):
        rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="at least 1"):
        curvax.optim.ssbroyden(ROSENBROCK, max_search_steps=0)
    tx = curvax.optim.ssbroyden(ROSENBROCK)
    with pytest.raises(ValueError, match="the line search needs both"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


# --- with its line search -------------------------------------------------------------------------


@functools.cache
def minimizer(kind):
    tx = getattr(curvax.optim, kind)(ROSENBROCK)
    batch = batch_of(10)

    def step(carry, _):
        x, state = carry
        value, gradient = jax.value_and_grad(ROSENBROCK)(x, batch)
        updates, state = tx.update(gradient, state, x, batch=batch)
        return (x + updates, state), value

    @jax.jit
    def run(x):
        return jax.lax.scan(step, (x, tx.init(x)), length=120)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_in_large_units_falls_in_every_step(kind, x64):
    """The first step is a gradient of length 1e9: its trials would not come down to a good one."""
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    batch = 1e4 * jnp.diag(jnp.array([1.0, 3.0])), jnp.zeros((2, 1))
    tx = getattr(curvax.optim, kind)(objective)

    def step(carry, _):
        w, state = carry
        value, gradient = jax.value_and_grad(objective)(w, batch)
        updates, state = tx.update(gradient, state, w, batch=batch)
        return (w + updates, state), value

    w = jnp.ones((2, 1))
    _, values = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=8))(w)
    assert np.all(np.diff(values) <= 0)
    assert values[-1] < 1e-12 * values[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rosenbrock_in_ten_dimensions_is_solved(kind, x64):
    x0 = np.tile([-1.2, 1.0], 5)
    (x, _), values = minimizer(kind)(x0)
    np.testing.assert_allclose(x, 1, atol=1e-10)
    assert np.argmax(values < 1e-10) <= 100
    assert np.all(np.diff(values) <= 1e-20)  # the search lowers the loss in each step
