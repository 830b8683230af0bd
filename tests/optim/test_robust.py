"""Optimizers as their docstrings call them, on tasks of many kinds, at rates two decades apart:
none may diverge. `examples/benchmarks/robust.py` has all of the tasks, seeds and intervals.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _tasks import TASKS, train
from robust import EXCLUDED, FACTORS, METHODS, run

import curvax

# K-FAC on every task; the others where they have been seen to fail: layers of zeros, attention, a
# loss without a Gauss-Newton matrix, outputs that are a distribution.
CASES = [
    *((name, "kfac") for name in TASKS),
    *((name, "ekfac") for name in ("zero-head", "flow")),
    ("classifier", "kfac_auto"),
    ("classifier", "mfac"),
    ("classifier", "adahessian"),
    ("classifier", "oasis"),
    ("classifier", "oasis_auto"),
    ("classifier", "sania"),
    ("vae", "sophia_g"),
    ("vae", "gauss_newton"),
    ("zero-head", "soap"),
]

# Layers behind gammas of zero learn nothing for tens of steps at a low rate: the loss of a uniform
# guess, up to the noise of batches.
NUM_STEPS = {"resnet": 70}


@functools.cache
def task(name):
    return TASKS[name]()


@functools.cache
def learned_by_adam(name):
    result = train(task(name), optax.adam, [1e-2], [0], NUM_STEPS.get(name, 40))
    return result.before[0] - result.after[0]


@pytest.mark.parametrize("name, method", CASES)
def test_trains_at_every_rate(name, method):
    assert (name, method) not in EXCLUDED
    every = METHODS[method].intervals[-1]
    num_steps = NUM_STEPS.get(name, 40)
    result = run(task(name), method, every, num_seeds=1, num_steps=num_steps)
    assert np.isfinite(result.batches).all()
    assert (result.after < result.before).all()
    # At the rate of the docstring it learns much of what there is to learn.
    if method in ("kfac", "ekfac", "kfac_auto", "gauss_newton"):
        learned = (result.before - result.after)[FACTORS.index(1.0)]
        assert learned > 0.7 * learned_by_adam(name)


def test_without_the_limit_on_the_step_the_same_call_diverges():
    objective, layout = task("classifier").objective, task("classifier").layout()
    build = lambda rate: curvax.kfac(
        rate, objective, layout, damping=1e-2, inverse_every=10, max_kl=None
    )
    result = train(task("classifier"), build, [0.1], [0], 100)
    assert not result.after[0] < result.before[0]


def test_stale_inverses_are_what_growing_intervals_prevent():
    """An inverse of the first step, kept for ten, against one of each of the first steps."""
    deep = task("deep")
    layout = deep.layout()

    def build(interval):
        return lambda rate: curvax.kfac(
            rate, deep.objective, layout, damping=1e-2, inverse_every=interval
        )

    growing = train(deep, build(10), [0.1], [0, 1], 20).batches[:, 10:]
    stale = train(deep, build(lambda step: 10), [0.1], [0, 1], 20).batches[:, 10:]
    assert growing.mean() < 0.8 * stale.mean()


def test_an_interval_grows_up_to_its_end_and_a_schedule_stays():
    interval = curvax.optim.growing_interval(4, start=2)
    assert [int(interval(step)) for step in range(10)] == [1, 1, 1, 1, 2, 2, 2, 2, 4, 4]
    assert curvax.optim.growing_interval(1) == 1
    assert curvax.optim.growing_interval(interval) is interval
    with pytest.raises(ValueError, match=r"every must lie in \[1, "):
        curvax.optim.growing_interval(0)


def test_relative_damping_is_the_fraction_of_the_mean_eigenvalue():
    """The dense matrix says what the mean eigenvalue is."""
    with jax.enable_x64(True):
        x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
        objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        params, batch = jnp.zeros((2, 3)), (x, jnp.ones((3, 3)))
        layout = curvax.kron_layout(objective, params, batch)
        key = jax.random.key(0)
        factors = curvax.kron_factors(objective, layout, params, batch, key, fisher="exact")
        matrix = curvax.to_dense(curvax.ggnvp(objective, params, batch), params)
        damping = 0.3 * jnp.trace(matrix) / 6

        gradient = jax.grad(objective)(params, batch)
        relative = curvax.scale_by_kfac(layout, curvax.optim.RelativeDamping(0.3))
        absolute = curvax.scale_by_kfac(layout, damping)
        steps = []
        for rule in (relative, absolute):
            updates, state = rule.update(gradient, rule.init(params), curvature=factors)
            np.testing.assert_allclose(state.info.damping, damping, rtol=1e-12)
            steps.append(updates)
        np.testing.assert_allclose(*steps, rtol=1e-12)
        # A schedule of the fraction, and a damping from outside, which is absolute.
        scheduled = curvax.scale_by_kfac(layout, curvax.optim.RelativeDamping(lambda step: 0.3))
        updates, _ = scheduled.update(gradient, scheduled.init(params), curvature=factors)
        np.testing.assert_allclose(updates, steps[0], rtol=1e-12)
        updates, state = relative.update(
            gradient, relative.init(params), curvature=factors, damping=0.5
        )
        assert state.info.damping == 0.5


def test_relative_damping_counts_every_entry_of_a_leaf_once():
    """Of this kernel one column is in no block."""
    with jax.enable_x64(True):
        x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
        model = lambda w, x: x @ w[:, :2]
        objective = curvax.Objective(model, curvax.losses.squared_error())
        params, batch = jnp.zeros((2, 3)), (x, jnp.ones((3, 2)))
        layout = curvax.kron_layout(objective, params, batch)
        key = jax.random.key(0)
        factors = curvax.kron_factors(objective, layout, params, batch, key, fisher="exact")
        rule = curvax.scale_by_kfac(layout, curvax.optim.RelativeDamping(0.3))
        gradient = jax.grad(objective)(params, batch)
        _, state = rule.update(gradient, rule.init(params), curvature=factors)
        matrix = curvax.to_dense(curvax.ggnvp(objective, params, batch), params)
        expected = 0.3 * jnp.trace(matrix) / 6
        np.testing.assert_allclose(state.info.damping, expected, rtol=1e-12)


def test_a_growing_interval_refreshes_as_often_as_it_says():
    interval = curvax.optim.growing_interval(100)
    due = [step for step in range(1100) if step % int(interval(step)) == 0]
    # start (2 + log2(every)) before step 1000, then one in a hundred.
    assert len([step for step in due if step < 1000]) == 10 * 2 + 5 * 10 + 6
    assert [step for step in due if step >= 1000] == [1000]


@pytest.mark.parametrize("fraction", [0.0, -1.0])
def test_errors_of_relative_damping(fraction):
    with pytest.raises(ValueError, match="damping must be positive"):
        curvax.optim.RelativeDamping(fraction)


def test_relative_damping_is_refused_where_no_curvature_is_known():
    relative = curvax.optim.RelativeDamping(0.1)
    with pytest.raises(TypeError, match="which only scale_by_kfac"):
        curvax.scale_by_mfac(4, relative)
    objective = task("classifier").objective
    with pytest.raises(TypeError, match="which only scale_by_kfac"):
        curvax.kfac_auto(objective, task("classifier").layout(), relative)
