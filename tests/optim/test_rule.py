"""The builder of rules on a toy: every cell of its table of states; and a rule written with it."""

import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from example_rule import scale_by_eigen_sign

import curvax
from curvax.optim import StepResult, curvature_rule, zero_count, zero_number


class ToyInfo(NamedTuple):
    size: Any
    num_nonfinite: Any


class ToyState(NamedTuple):
    count: Any
    num_refreshes: Any
    mean: Any
    curvature: Any
    info: ToyInfo


def toy(damping=None):
    """Average gradients, keep the last curvature, and step `mean^3 / (curvature + damping)`."""

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        info = ToyInfo(zero_number(), zero_count())
        return ToyState(zero_count(), zero_count(), zeros(), zeros(), info)

    def average(state, gradient):
        mean = jax.tree.map(lambda m, g: (m + g) / 2, state.mean, gradient)
        return state._replace(mean=mean)

    def take_in(state, curvature, gradient):
        chex.assert_trees_all_equal_shapes(curvature, gradient)
        is_finite = jnp.all(jnp.stack([jnp.isfinite(c).all() for c in jax.tree.leaves(curvature)]))
        return state._replace(curvature=curvature), is_finite

    def step(state, gradient, context):
        ridge = 0 if context.damping is None else context.damping
        steps = jax.tree.map(lambda m, c: m**3 / (c + ridge), state.mean, state.curvature)
        return StepResult(steps, state, info={"size": optax.tree.norm(steps)})

    return curvature_rule(init, step, average=average, take_in=take_in, damping=damping)


PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(())}
GRADIENT = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
CURVATURE = {"a": jnp.array([2.0, 4.0]), "b": jnp.array(0.5)}


def poisoned(tree):
    return tree | {"b": jnp.array(jnp.nan)}


def jitted(rule):
    return jax.jit(rule.update)


def eager(rule):
    return rule.update


def vmapped(rule):
    """Two members, of which the second is the one that is looked at."""
    pair = lambda x: None if x is None else jax.tree.map(lambda x: jnp.stack([x + 1, x]), x)

    def update(gradient, state, curvature=None):
        results = jax.vmap(lambda g, s, c: rule.update(g, s, curvature=c))(
            pair(gradient), jax.tree.map(lambda x: jnp.stack([x, x]), state), pair(curvature)
        )
        return jax.tree.map(lambda x: x[1], results)

    return update


every_way = pytest.mark.parametrize("way", [jitted, eager, vmapped])
CELLS = list(
    itertools.product(
        ("gradient good", "gradient bad"),
        ("curvature good", "curvature bad", "no curvature"),
        ("one before", "none before"),
    )
)


@every_way
@pytest.mark.parametrize(("gradient", "curvature", "before"), CELLS)
def test_every_cell_of_the_table(way, gradient, curvature, before):
    rule = toy()
    update, state = way(rule), rule.init(PARAMS)
    if before == "one before":
        _, state = update(GRADIENT, state, curvature=CURVATURE)
    is_good, is_new = gradient == "gradient good", curvature == "curvature good"
    passed = {
        "curvature good": jax.tree.map(lambda c: 2 * c, CURVATURE),
        "curvature bad": poisoned(CURVATURE),
        "no curvature": None,
    }[curvature]
    steps, after = update(GRADIENT if is_good else poisoned(GRADIENT), state, curvature=passed)
    if not is_good:  # NaN, and all but the count of such is bitwise what it was
        assert all(jnp.isnan(x).all() for x in jax.tree.leaves(steps))
        info = state.info._replace(num_nonfinite=state.info.num_nonfinite + 1)
        chex.assert_trees_all_equal(after, state._replace(info=info))
        return
    mean = jax.tree.map(lambda m, g: (m + g) / 2, state.mean, GRADIENT)
    in_use = passed if is_new else state.curvature
    chex.assert_trees_all_close(after.mean, mean)
    chex.assert_trees_all_equal(after.curvature, in_use)
    assert after.count == state.count + 1
    assert after.num_refreshes == state.num_refreshes + is_new
    assert after.info.num_nonfinite == (curvature == "curvature bad")
    if after.num_refreshes == 0:  # no curvature yet
        assert optax.tree.norm(steps) == 0
        return
    chex.assert_trees_all_close(steps, jax.tree.map(lambda m, c: m**3 / c, mean, in_use))
    np.testing.assert_allclose(after.info.size, optax.tree.norm(steps), rtol=1e-6)


def test_damping_is_a_number_a_schedule_or_an_argument_and_none_is_the_constructors():
    def second_step(rule, **extra):
        _, state = rule.update(GRADIENT, rule.init(PARAMS), curvature=CURVATURE)
        return rule.update(GRADIENT, state, curvature=CURVATURE, **extra)[0]

    want = second_step(toy(0.5))
    for rule, extra in (
        (toy(0.5), {"damping": None}),
        (toy(lambda count: 0.25 * (count + 1)), {}),
        (toy(8.0), {"damping": 0.5}),
        (toy(8.0), {"damping": jnp.float32(0.5)}),
    ):
        chex.assert_trees_all_close(second_step(rule, **extra), want)
    with pytest.raises(ValueError, match="damping must be positive"):
        toy(0.0)
    with pytest.raises(TypeError, match="damping arrives as bfloat16"):
        toy(jnp.bfloat16(0.5))


def test_none_as_damping_is_legal_for_every_rule():
    model = lambda w, x: x @ w
    objective = curvax.Objective(model, curvax.losses.squared_error())
    params, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
    layout = curvax.kron_layout(objective, params, batch)
    gradient = jax.grad(objective)(params, batch)
    key = jax.random.key(0)
    factors = curvax.kron_factors(objective, layout, params, batch, key)
    rows = curvax.kron.eigen_curvature(objective, layout, params, batch, key)
    dense = curvax.solve.Dense(jnp.eye(6))
    for rule, curvature in (
        (curvax.scale_by_kfac(layout), factors),
        (curvax.scale_by_ekfac(layout), rows),
        (curvax.scale_by_mfac(4), None),
        (curvax.scale_by_newton(), curvax.ggnvp(objective, params, batch)),
        (curvax.scale_by_lazy_newton(), dense),
        (curvax.scale_by_sophia(), gradient),
        (curvax.scale_by_gradient_regularized_newton(objective), dense),
    ):
        state, passed = rule.init(params), {"batch": batch, "curvature": curvature}
        without = rule.update(gradient, state, params, **passed)
        chex.assert_trees_all_equal(
            rule.update(gradient, state, params, damping=None, **passed), without
        )


def test_what_a_step_rejects_is_not_counted_and_emits_zero():
    class State(NamedTuple):
        count: Any
        info: ToyInfo

    def init(params):
        return State(zero_count(), ToyInfo(zero_number(), zero_count()))

    def step(state, gradient, context):
        is_accepted = gradient < 2
        return StepResult(gradient, state, info={"size": gradient}, is_accepted=is_accepted)

    rule = curvature_rule(init, step)
    update = jax.jit(rule.update)
    one, state = update(jnp.float32(1), rule.init(0.0))
    nothing, after = update(jnp.float32(3), state)
    assert (one, nothing, state.count, after.count) == (1, 0, 1, 1)
    assert after.info.size == 3  # what was measured is told
    bf16, _ = update(jnp.bfloat16(1), state)
    assert bf16.dtype == jnp.bfloat16


def two_layers(rotation):
    """A network with rotated inputs, first weights that undo it, and a gain in no block."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 3)), rng.normal(size=(32, 2))
    shapes = {"w": (3, 4), "b": (4,), "v": (4, 2), "gain": (2,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] * p["gain"]
    objective = curvax.Objective(model, curvax.losses.squared_error())
    return objective, params | {"w": rotation.T @ params["w"]}, (x @ rotation, y)


def trained(rotation, num_steps):
    objective, params, batch = two_layers(rotation)
    layout = curvax.kron_layout(objective, params, batch)
    tx = optax.chain(scale_by_eigen_sign(layout), optax.scale_by_learning_rate(0.01))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(objective)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    carry, first = (params, tx.init(params)), objective(params, batch)
    for _ in range(num_steps):
        carry = step(*carry)
    return carry[0], first, objective(carry[0], batch)


def test_sign_momentum_in_a_kronecker_eigenbasis_does_not_see_rotations_and_trains(x64):
    """Of a layer's inputs, by an orthogonal matrix: all but the weights there goes the same way."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    plain, first, last = trained(np.eye(3), 30)
    rotated, *_ = trained(rotation, 30)
    chex.assert_trees_all_close(rotated | {"w": rotation @ rotated["w"]}, plain, rtol=1e-8)
    assert last < 0.7 * first


def test_block_matrices_are_read_and_put_back():
    objective, params, batch = two_layers(np.eye(3))
    layout = curvax.kron_layout(objective, params, batch)
    matrices = curvax.kron.block_matrices(layout, params)
    assert {name: x.shape for name, x in matrices.items()} == {
        "['w']": (1, 4, 4),
        "['v']": (1, 4, 2),
    }
    doubled = jax.tree.map(lambda x: 2 * x, matrices)
    got = curvax.kron.with_block_matrices(layout, doubled, params)
    want = jax.tree.map(lambda x: 2 * x, params) | {"gain": params["gain"]}
    chex.assert_trees_all_equal(got, want)
