"""Tracked solutions against direct ones: a constant matrix, a drifting one, sampled blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.solve import Result, init_tracked, tracked, update_blocks

BLOCKS = 6
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
MATRIX = (ROTATION * np.array([0.5, 1.0, 2.0, 3.0])) @ ROTATION.T
B = np.array([1.0, -2.0, 0.5, 3.0])
METHODS = {"gradient": {"rate": 0.5, "num_steps": 2}, "cg": {"num_steps": 2}}
every_method = pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)


def run(how, matrix_of, num_steps, damping=0.0, b=B):
    """Track the solutions of `matrix_of(k)`; return the last one and all residuals."""

    def update(state, k):
        u, state = tracked(lambda v: matrix_of(k) @ v, b, state=state, damping=damping, **how)
        return state, (u, state.residual)

    scan = lambda: jax.lax.scan(update, init_tracked(b), jnp.arange(num_steps))
    state, (solutions, residuals) = jax.jit(scan)()
    return state, solutions, residuals


@every_method
def test_a_constant_system_is_solved(how, x64):
    state, solutions, residuals = run(how, lambda k: jnp.asarray(MATRIX), 60, 0.25, jnp.asarray(B))
    want = np.linalg.solve(MATRIX + 0.25 * np.eye(4), B)
    np.testing.assert_allclose(solutions[-1], want, rtol=1e-4)
    # It goes on from the last solution: of two steps alone the residual is that of the first.
    assert state.converged and state.count == 60 and residuals[0] > 1e-2
    # Within a tolerance of zero it goes on to the digits of the floats.
    state, solutions, _ = run({**how, "tol": 0.0}, lambda k: jnp.asarray(MATRIX), 120, 0.25, B)
    np.testing.assert_allclose(solutions[-1], want, rtol=1e-10)


@every_method
def test_a_drifting_system_is_followed(how, x64):
    """The error behind a matrix that moves on falls as its speed, at two products a step."""
    turning = lambda speed: lambda k: jnp.asarray(MATRIX) * (2 + jnp.sin(speed * k)) / 3
    errors = []
    for speed in (1e-2, 1e-3):
        _, solutions, _ = run(how, turning(speed), 300, b=jnp.asarray(B))
        want = np.linalg.solve(np.asarray(turning(speed)(299)), B)
        errors.append(np.linalg.norm(solutions[-1] - want) / np.linalg.norm(want))
    assert errors[0] < 2e-2 and errors[1] < 2e-3, errors


def test_mini_batches_average_out_in_the_solution(x64):
    """Gradient steps on rows drawn at random, at rates of 1/k, end near the whole's solution."""
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(20, 4)))

    def update(state, k):
        x = rows[jax.random.randint(jax.random.fold_in(jax.random.key(0), k), (5,), 0, 20)]
        matvec = lambda v: x.T @ (x @ v) / 5
        _, state = tracked(matvec, jnp.asarray(B), state=state, damping=0.5, rate=1 / (3 + k))
        return state, None

    state, _ = jax.lax.scan(update, init_tracked(jnp.asarray(B)), jnp.arange(2000))
    want = np.linalg.solve(rows.T @ rows / 20 + 0.5 * np.eye(4), B)
    np.testing.assert_allclose(state.solution, want, rtol=0.05, atol=0.05 * np.abs(want).max())


# Ridge regressions that share a log-penalty h: block i is |p - a_i|^2 / 2 + exp(h) |p|^2_W / 2.
CENTERS = np.random.default_rng(2).normal(size=(BLOCKS, 3))
WEIGHTS = np.array([0.5, 1.0, 3.0])


def inner(p, h, a):
    return jnp.sum((p - a) ** 2) / 2 + jnp.exp(h) * jnp.sum(WEIGHTS * p**2) / 2


def outer(p, h, a):
    return jnp.sum(jnp.cos(p) * a) + 0.1 * h**2


@every_method
def test_hypergradients_of_many_inner_problems_of_which_some_are_sampled(how, x64):
    """Two of six blocks in each step; all states end at the direct solutions of their systems."""
    how = {**how, "rate": 0.3} if "rate" in how else how
    h, a = jnp.asarray(0.3), jnp.asarray(CENTERS)
    params = a / (1 + np.exp(0.3) * WEIGHTS)

    def hypergradient(state, p, a):
        solver = functools.partial(tracked, state=state, tol=0.0, **how)
        of_block = [lambda p, h, f=f: f(p, h, a) for f in (outer, inner)]
        return curvax.apps.implicit_gradient(*of_block, p, h, solver=solver)

    def step(states, k):
        index = jax.random.permutation(jax.random.fold_in(jax.random.key(0), k), BLOCKS)[:2]
        gradients, states = update_blocks(hypergradient, states, index, params[index], a[index])
        return states, (index, gradients)

    states = jax.vmap(init_tracked)(params)
    scan = jax.jit(lambda states: jax.lax.scan(step, states, jnp.arange(100)))
    states, (index, gradients) = scan(states)
    assert states.count.sum() == 200 and states.count.min() > 10
    assert (np.bincount(index.ravel(), minlength=BLOCKS) == states.count).all()

    # Closed form: H = diag(1 + e^h w), v = -sin(p) a, gradient 0.2 h - e^h sum w p u.
    v = -np.sin(params) * CENTERS
    u = v / (1 + np.exp(0.3) * WEIGHTS)
    np.testing.assert_allclose(states.solution, u, rtol=1e-8, atol=1e-10)
    want = 0.06 - np.exp(0.3) * (WEIGHTS * params * u).sum(axis=1)
    np.testing.assert_allclose(gradients[-1], want[index[-1]], rtol=1e-8)


@every_method
def test_what_is_not_finite_or_curves_down_leaves_the_solution(how):
    good, b = init_tracked(jnp.ones(2)), jnp.ones(2)
    _, good = tracked(lambda v: v, b, state=good, **how)
    u, state = tracked(lambda v: jnp.nan * v, b, state=good, **how)
    assert state.code == Result.NOT_FINITE and u.tolist() == good.solution.tolist()
    # The residual is that of the solution.
    assert state.count == 2 and state.residual == good.residual and state.residual < 1
    if "rate" not in how:
        u, state = tracked(lambda v: -3 * v, 2 * b, state=good)
        assert state.code == Result.NEGATIVE_CURVATURE and u.tolist() == good.solution.tolist()


@every_method
def test_bfloat16_keeps_the_small_steps_in_float32(how):
    b, matvec = jnp.asarray(B, jnp.bfloat16), lambda v: jnp.asarray(MATRIX, v.dtype) @ v
    update = jax.jit(lambda state: tracked(matvec, b, state=state, **how))
    state = init_tracked(b)
    for _ in range(40):
        u, state = update(state)
    assert u.dtype == jnp.bfloat16 and state.solution.dtype == jnp.float32
    assert state.residual < 0.05
    np.testing.assert_allclose(state.solution, np.linalg.solve(MATRIX, B), rtol=0.1, atol=0.1)


def test_blocks_that_do_not_exist():
    """Concrete numbers are checked; for traced ones no other block's state changes."""
    add = lambda state: (state, state + 1)
    for index in ([0, 3], [-1]):
        with pytest.raises(ValueError, match=rf"index has {index[-1]}, but.* 3 blocks.*0 to 2"):
            update_blocks(add, jnp.arange(3), jnp.array(index))
    with pytest.raises(ValueError, match=r"index is \[1, 1\], which has a block twice"):
        update_blocks(add, jnp.arange(3), np.array([1, 1]))
    update = jax.jit(lambda index: update_blocks(add, jnp.arange(3), index))
    _, states = update(jnp.array([0, 3, -1]))
    assert states.tolist() == [1, 1, 2]


def test_errors():
    state, b = init_tracked(jnp.ones(2)), jnp.ones(2)
    with pytest.raises(TypeError, match=r"state must be a TrackedState.*init_tracked"):
        tracked(lambda v: v, b, state=b)
    with pytest.raises(ValueError, match="rate must be positive, got 0"):
        tracked(lambda v: v, b, state=state, rate=0.0)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        tracked(lambda v: v, b, state=state, num_steps=0)
    with pytest.raises(ValueError, match=r"x0 is float32\[2\], b is float32\[3\]"):
        tracked(lambda v: v, jnp.ones(3), state=state)
