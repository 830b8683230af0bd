"""K-FAC and EK-FAC step by step against NumPy, and the wrappers that choose damping, rate,
momentum and rows.
"""

import functools
import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest

import curvax
from curvax import losses
from curvax.kron import WeightedMean
from curvax.kron._factors import init_factors

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def network(p, x):
    """Two layers with biases for sequences, and a gain in no block."""
    return (jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) * p["gain"]


OBJECTIVE = curvax.Objective(network, losses.softmax_cross_entropy())
SHAPES = {"w1": (3, 4), "b1": (4,), "w2": (4, 3), "b2": (3,), "gain": (3,)}
PARAMS = {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
BATCHES = [(normal(t, 6, 2, 3), np.random.default_rng(t).integers(0, 3, (6, 2))) for t in range(4)]
GRADIENTS = [jax.tree.map(lambda p, t=t: normal(t, *p.shape), PARAMS) for t in range(4)]
LAYOUT = curvax.kron_layout(OBJECTIVE, PARAMS, BATCHES[0])
KERNELS = {"['w1']": ("w1", "b1"), "['w2']": ("w2", "b2")}  # by block
DAMPING = 2.0**-4  # it and its root are exact in float32, in which the state keeps it

LINEAR = curvax.Objective(lambda p, x: x @ p["w"] + p["b"], losses.squared_error())
LINEAR_LAYOUT = curvax.kron_layout(
    LINEAR, {"w": np.ones((3, 2)), "b": np.zeros(2)}, (np.ones((9, 3)), np.ones((9, 2)))
)


def exact_factors(params, batch, key):
    return curvax.kron_factors(OBJECTIVE, LAYOUT, params, batch, key, fisher="exact")


def sampled_factors(params, batch, key):
    return curvax.kron_factors(OBJECTIVE, LAYOUT, params, batch, key)


def sampled_rows(params, batch, key):
    return curvax.kron.eigen_curvature(OBJECTIVE, LAYOUT, params, batch, key)


ESTIMATORS = {"kfac": sampled_factors, "ekfac": sampled_rows}
gradient = jax.jit(jax.grad(OBJECTIVE))


def drawn_factors(layout, params, seed):
    """Positive definite factors."""
    rng = np.random.default_rng(seed)

    def draw(factor):
        x = rng.normal(size=(*factor.total.shape[:2], 20))
        return WeightedMean(jnp.asarray(x @ x.swapaxes(1, 2) / 20), jnp.ones(factor.weight.shape))

    zeros = init_factors(layout, params)
    blocks = jax.tree.map(draw, zeros.blocks, is_leaf=lambda x: isinstance(x, WeightedMean))
    ones = {
        path: WeightedMean(jnp.ones(x.total.shape), jnp.ones([]))
        for path, x in zeros.diagonal.items()
    }
    return zeros._replace(blocks=blocks, diagonal=ones)


def matrix(tree, name):
    """A block's kernel with its bias as last row."""
    kernel, bias = KERNELS[name]
    return np.concatenate([tree[kernel], tree[bias][None]])


def mean(factor):
    """Of one slice."""
    total, weight = np.asarray(factor.total), np.asarray(factor.weight)
    return (total / weight.reshape(*weight.shape, *[1] * (total.ndim - weight.ndim)))[0]


class Averages:
    """Averages with bias correction: of the sides of each block, and of the diagonal."""

    def __init__(self, decay):
        self.decay, self.power, self.held = decay, 1.0, {}

    def take(self, **new):
        """The averages, corrected."""
        self.power *= self.decay
        for name, x in new.items():
            self.held[name] = self.decay * self.held.get(name, 0) + (1 - self.decay) * x
        return {name: x / (1 - self.power) for name, x in self.held.items()}


def of_factors(factors):
    sides = {
        (name, side): mean(getattr(f, side))
        for name, f in factors.blocks.items()
        for side in ("a", "g")
    }
    gain = factors.diagonal["['gain']"]
    return {str(key): x for key, x in sides.items()} | {
        "gain": np.asarray(gain.total) / gain.weight
    }


def pair(averages, name):
    return averages[str((name, "a"))], averages[str((name, "g"))]


def damped(a, g, damping, scheme):
    """The damped block as one matrix."""
    n, m = len(a), len(g)
    if scheme == "exact":
        return np.kron(a, g) + damping * np.eye(n * m)
    pi = np.sqrt((np.trace(a) / n) / (np.trace(g) / m))
    return np.kron(a + pi * damping**0.5 * np.eye(n), g + damping**0.5 / pi * np.eye(m))


def rayleigh(matrix):
    """The Rayleigh quotient of the column with the largest diagonal entry:
    the largest eigenvalue is above.
    """
    column = matrix[:, np.argmax(np.diag(matrix))]
    return column @ matrix @ column / (column @ column)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("scheme", ["factored", "exact"])
def test_kfac_inverts_bias_corrected_averages(scheme):
    """Along with what the state says of each block."""
    rule = curvax.scale_by_kfac(LAYOUT, DAMPING, inverse_every=2, decay=0.9, damping_scheme=scheme)
    update, draw = jax.jit(rule.update), jax.jit(exact_factors)
    state, averages, inverse = rule.init(PARAMS), Averages(0.9), {}
    for t, (g, batch) in enumerate(zip(GRADIENTS, BATCHES, strict=True)):
        factors = draw(PARAMS, batch, jax.random.key(0))
        steps, state = update(g, state, curvature=factors)
        now = averages.take(**of_factors(factors))
        for name in KERNELS:
            info = state.info.blocks[name]
            assert info.age == t % 2 and state.info.num_failures[name] == 0
            if t % 2 == 0:
                a, g_side = pair(now, name)
                dense = damped(a, g_side, DAMPING, scheme)
                inverse[name], values = np.linalg.inv(dense), np.linalg.eigvalsh(dense)
                np.testing.assert_allclose(info.trace, np.trace(a) * np.trace(g_side), rtol=1e-6)
                if scheme == "exact":
                    np.testing.assert_allclose(
                        [info.smallest, info.largest], values[[0, -1]], rtol=1e-6
                    )
                else:  # by power iteration: better than one step of it
                    assert rayleigh(dense) < info.largest <= values[-1] * (1 + 1e-6)
                    assert values[0] * (1 - 1e-6) <= info.smallest < 1 / rayleigh(inverse[name])
                np.testing.assert_allclose(info.condition, info.largest / info.smallest, rtol=1e-6)
            close(matrix(steps, name).ravel(), inverse[name] @ matrix(g, name).ravel())
        close(steps["gain"], g["gain"] / (now["gain"] + DAMPING))
        assert state.count == state.num_refreshes == t + 1 and state.info.damping == DAMPING


def turned(side, old, method):
    """The next basis of a factor: its eigenbasis, or one step from the basis before to it."""
    if method == "eigh" or old is None:
        return np.linalg.eigh(side)[1]
    order = np.argsort(-np.diag(old.T @ side @ old))
    return np.linalg.qr(side @ old[:, order])[0]


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_ekfac_divides_by_averaged_moments_that_go_along_with_the_basis(method):
    rule = curvax.scale_by_ekfac(LAYOUT, DAMPING, inverse_every=2, decay=0.9, basis=method)
    update, draw = jax.jit(rule.update), jax.jit(sampled_rows)
    state, averages, moments, basis, sides = rule.init(PARAMS), Averages(0.9), {}, {}, {}
    for t, (g, batch) in enumerate(zip(GRADIENTS, BATCHES, strict=True)):
        rows = draw(PARAMS, batch, jax.random.key(t))
        steps, state = update(g, state, curvature=rows)
        now = averages.take(**of_factors(rows.factors))
        for name in KERNELS:
            a, g_side = pair(now, name)
            if t % 2 == 0:
                olds = sides.get(name, (None, None))
                sides[name] = [
                    turned(side, old, method) for side, old in zip((a, g_side), olds, strict=True)
                ]
                new = np.kron(*sides[name])
                if t > 0:
                    turn = new.T @ basis[name]
                    moments[name] = np.diag(turn * moments[name] @ turn.T)
                basis[name], values = new, np.linalg.eigvalsh(damped(a, g_side, DAMPING, "exact"))
                info = state.info.blocks[name]
                np.testing.assert_allclose(info.trace, np.trace(a) * np.trace(g_side), rtol=1e-6)
                # One step knows eigenvalues to second order only.
                np.testing.assert_allclose(
                    [info.smallest, info.largest],
                    values[[0, -1]],
                    rtol=1e-6 if method == "eigh" or t == 0 else 0.2,
                )
            assert state.info.blocks[name].age == t % 2
            given, cotangents = (
                np.asarray(x[name][0])[:, 0] for x in (rows.inputs, rows.cotangents)
            )
            given = np.concatenate([given, np.ones((6, 2, 1))], axis=2)
            gradients = np.einsum("bni,bno->bio", given, cotangents).reshape(6, -1)
            fresh = np.sum((gradients @ basis[name]) ** 2, axis=0)
            moments[name] = 0.9 * moments.get(name, 0) + 0.1 * fresh
            scale = moments[name] / (1 - 0.9 ** (t + 1)) + DAMPING
            q = basis[name]
            close(matrix(steps, name).ravel(), q @ (q.T @ matrix(g, name).ravel() / scale))
        close(steps["gain"], g["gain"] / (now["gain"] + DAMPING))


def test_ekfac_keeps_bases_and_moments_within_the_tolerance():
    rows = jax.jit(sampled_rows)(PARAMS, BATCHES[0], jax.random.key(0))
    # Of the second curvature one factor is turned, and one block's are as they were.
    blocks, name = dict(rows.factors.blocks), "['w1']"
    a = blocks[name].a
    other = normal(9, *a.total.shape)
    total = a.total + 0.2 * np.trace(a.total[0]) * other @ other.swapaxes(1, 2)
    blocks[name] = blocks[name]._replace(a=a._replace(total=total))
    second = rows._replace(factors=rows.factors._replace(blocks=dict(blocks)))
    # A number beside the diagonal is not seen where curvature comes in: the refresh fails.
    blocks[name] = blocks[name]._replace(a=a._replace(total=a.total.at[0, 0, 1].set(jnp.nan)))
    failing = rows._replace(factors=rows.factors._replace(blocks=blocks))
    for method in ("eigh", "qr"):
        rule = curvax.scale_by_ekfac(
            LAYOUT, DAMPING, inverse_every=2, decay=0.5, basis=method, tolerance=0.05
        )
        update = jax.jit(rule.update)
        states = [rule.init(PARAMS)]
        for curvature in (rows, rows, second):
            states.append(update(GRADIENTS[0], states[-1], curvature=curvature)[1])
        before, after = (state.block_state for state in states[2:])
        for factor in ("a", "g"):
            basis, old = getattr(after[name].basis, factor), getattr(before[name].basis, factor)
            assert bool(jnp.all(basis == old)) == (factor == "g")
        chex.assert_trees_all_equal(after["['w2']"].basis, before["['w2']"].basis)
        assert states[-1].info.blocks["['w2']"].age == 0
        failed = update(GRADIENTS[0], states[2], curvature=failing)[1]
        chex.assert_trees_all_equal(failed.block_state[name].basis, before[name].basis)
        assert failed.info.num_failures == {name: 1, "['w2']": 0}
        # With the bases kept, moments are a running average of equal numbers.
        of_w2 = [block["['w2']"].moments for block in (before, after)]
        means = [moments.total / moments.weight for moments in of_w2]
        close(means[1], means[0])
    with pytest.raises(ValueError, match="unknown basis 'cholesky'"):
        curvax.scale_by_ekfac(LAYOUT, basis="cholesky")
    with pytest.raises(ValueError, match=r"tolerance must lie in \[0, 1\), got 1"):
        curvax.scale_by_ekfac(LAYOUT, tolerance=1)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_rows_of_ekfac_give_the_moments(fisher):
    """In the basis of its own factors; and a first step with them is one with `kron_inverse`.
    Rows of two halves of the batch merge into those of the whole.
    """
    rule = curvax.scale_by_ekfac(LAYOUT, DAMPING)

    def rows_of(params, batch, key):
        return curvax.kron.eigen_curvature(OBJECTIVE, LAYOUT, params, batch, key, fisher=fisher)

    @jax.jit
    def compute(params, batch, g):
        key = jax.random.key(5)
        rows = rows_of(params, batch, key)
        halves = [jax.tree.map(lambda x, i=i: x[3 * i : 3 * i + 3], batch) for i in (0, 1)]
        merged = curvax.kron.merge(*[rows_of(params, half, key) for half in halves])
        basis = curvax.kron.kron_basis(LAYOUT, rows.factors)
        moments = curvax.kron.kron_moments(
            OBJECTIVE, LAYOUT, basis, params, batch, key, fisher=fisher
        )
        inverse = curvax.kron_inverse(LAYOUT, moments, DAMPING)
        steps = [rule.update(g, rule.init(params), curvature=x)[0] for x in (rows, merged)]
        return inverse(g), *steps

    want, step, merged_step = compute(PARAMS, BATCHES[0], GRADIENTS[0])
    chex.assert_trees_all_close(step, want, rtol=1e-9)
    if fisher != "mc":  # whose halves draw apart
        chex.assert_trees_all_close(merged_step, want, rtol=1e-9)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_the_one_liners_take_their_fisher(fisher):
    """The curvature in their state is that of the estimator by itself."""

    @jax.jit
    def compute(params, batch, g):
        key = jax.random.key(0)
        want = curvax.kron_factors(OBJECTIVE, LAYOUT, params, batch, key, fisher=fisher)
        curvatures = []
        for build in (curvax.kfac, curvax.ekfac):
            tx = build(0.1, OBJECTIVE, LAYOUT, DAMPING, fisher=fisher)
            _, state = tx.update(g, tx.init(params), params, batch=batch)
            curvatures.append(optax.tree.get(state, "curvature"))
        return want, *curvatures

    def means(factors):
        return jax.tree.map(
            lambda f: f.mean, factors, is_leaf=lambda f: isinstance(f, WeightedMean)
        )

    want, *curvatures = compute(PARAMS, BATCHES[0], GRADIENTS[0])
    for curvature in curvatures:
        chex.assert_trees_all_close(means(curvature), means(want), rtol=1e-9)


def test_momentum_and_learning_rate():
    """A sum of past steps that decays, times a rate that may be a schedule;
    without momentum, no buffer.
    """
    rate, batch = lambda count: 0.5**count, (normal(0, 9, 3), normal(1, 9, 2))
    build = functools.partial(
        curvax.kfac, objective=LINEAR, layout=LINEAR_LAYOUT, damping=DAMPING, max_kl=None, seed=3
    )
    still, tx = build(-1.0, momentum=0.0), build(rate, momentum=0.7)
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    updates = [
        jax.jit(lambda g, s, rule=rule: rule.update(g, s, params, batch=batch))
        for rule in (still, tx)
    ]
    held, state, total = still.init(params), tx.init(params), optax.tree.zeros_like(params)
    for t in range(4):
        g = jax.tree.map(lambda p, t=t: normal(t, *p.shape), params)
        (steps, held), (got, state) = updates[0](g, held), updates[1](g, state)
        total = jax.tree.map(lambda m, s: 0.7 * m + s, total, steps)
        chex.assert_trees_all_close(
            got, jax.tree.map(lambda m, t=t: -rate(t) * m, total), rtol=1e-9
        )
    assert size(tx, params) - size(still, params) == 8


# -- schedules, guards -------------------------------------------------------------------------


def test_stagger_inverts_all_at_first_and_then_each_share_in_its_turn():
    params = [normal(i, *shape) for i, shape in enumerate([(9, 2), (2, 3), (3, 3), (3, 2)])]
    model = lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p, x)
    objective = curvax.Objective(model, losses.squared_error())
    layout = curvax.kron_layout(objective, params, (normal(0, 4, 9), normal(1, 4, 2)))
    names = [block.name for block in layout.blocks]
    factors = [drawn_factors(layout, params, seed) for seed in range(7)]
    build = functools.partial(curvax.scale_by_kfac, layout, DAMPING, damping_scheme="exact")
    rules = build(3, stagger=True), build()
    updates, inits = [jax.jit(rule.update) for rule in rules], [rule.init(params) for rule in rules]

    def run(which, curvatures):
        state = inits[which]
        for curvature in curvatures:
            steps, state = updates[which](params, state, curvature=curvature)
            yield (
                dict(zip(names, steps, strict=True)),
                {name: int(b.age) for name, b in state.info.blocks.items()},
            )

    turns = []
    for t, ((steps, ages), (fresh, _)) in enumerate(
        zip(run(0, factors), run(1, factors), strict=True)
    ):
        turns.append({name for name in names if ages[name] == 0})
        for name in names:
            assert np.allclose(steps[name], fresh[name], rtol=1e-9) == (name in turns[t])
    assert turns[0] == set(names) and turns[1:4] == turns[4:7]
    assert sorted(name for turn in turns[1:4] for name in turn) == sorted(names)  # each once
    assert {names[0]} in turns[1:4]  # the largest matrix has a step for itself
    constant = [factors[0]] * 5
    for (steps, _), (expected, _) in zip(run(0, constant), run(1, constant), strict=True):
        chex.assert_trees_all_close(steps, expected, rtol=1e-9)


def test_a_block_whose_factorization_fails_goes_on_with_its_last_good_inverse():
    rule = curvax.scale_by_kfac(LAYOUT, DAMPING, decay=0.0)
    update, g = jax.jit(rule.update), GRADIENTS[0]
    one, two, three = (drawn_factors(LAYOUT, PARAMS, seed) for seed in range(3))
    other, name = KERNELS
    bad = two.blocks[name]
    bad = bad._replace(a=bad.a._replace(total=bad.a.total - 10 * jnp.eye(5)))  # indefinite
    first, state = update(g, rule.init(PARAMS), curvature=one)
    steps, failed = update(g, state, curvature=two._replace(blocks=two.blocks | {name: bad}))
    expected, _ = update(g, state, curvature=two)
    chex.assert_tree_all_finite((steps, failed))
    chex.assert_trees_all_equal(steps, expected | {leaf: first[leaf] for leaf in KERNELS[name]})
    assert failed.info.num_failures == {other: 0, name: 1} and failed.info.num_nonfinite == 0
    assert (failed.info.blocks[other].age, failed.info.blocks[name].age) == (0, 1)
    chex.assert_trees_all_equal(failed.info.blocks[name]._replace(age=0), state.info.blocks[name])
    steps, healed = update(g, failed, curvature=three)
    chex.assert_trees_all_equal(steps, update(g, state, curvature=three)[0])
    assert healed.info.blocks[name].age == 0 and healed.info.num_failures[name] == 1


RULES = {
    "kfac": functools.partial(curvax.scale_by_kfac, damping_scheme="exact"),
    "ekfac": curvax.scale_by_ekfac,
}
every_rule = pytest.mark.parametrize("name", RULES)


@every_rule
def test_what_is_not_finite_stays_out_of_the_state(name):
    rule = RULES[name](LAYOUT, DAMPING)
    update, draw = jax.jit(rule.update), jax.jit(ESTIMATORS[name])
    good = draw(PARAMS, BATCHES[0], jax.random.key(0))
    held, state = update(GRADIENTS[0], rule.init(PARAMS), curvature=good)
    leaves, structure = jax.tree.flatten(good)
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(good)):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        bad = jax.tree.unflatten(
            structure, [x * jnp.nan if i == k else x for k, x in enumerate(leaves)]
        )
        steps, after = update(GRADIENTS[0], state, curvature=bad)
        chex.assert_tree_all_finite((steps, after))
        assert after.info.num_nonfinite == 1 and after.count == 2
        if name == "kfac" or "factors" in jax.tree_util.keystr(path):
            chex.assert_trees_all_close(steps, held, rtol=1e-9)
            chex.assert_trees_all_equal(after.curvature, state.curvature)
            assert after.num_refreshes == 1
    steps, after = update({**GRADIENTS[0], "b2": jnp.full(3, jnp.nan)}, state, curvature=good)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(steps)) and after.info.num_nonfinite == 1
    chex.assert_trees_all_equal(after._replace(info=after.info._replace(num_nonfinite=0)), state)


@every_rule
def test_the_first_curvature_is_inverted_whenever_it_comes(name):
    """Also if it comes late, or the one before was not finite:
    the updates are zero only while there is none.
    """
    rule = RULES[name](LAYOUT, DAMPING, inverse_every=10)
    update = jax.jit(rule.update)
    good = jax.jit(ESTIMATORS[name])(PARAMS, BATCHES[0], jax.random.key(0))
    expected, _ = update(GRADIENTS[0], rule.init(PARAMS), curvature=good)
    for first in (None, jax.tree.map(lambda x: (x * np.nan).astype(x.dtype), good)):
        nothing, state = update(GRADIENTS[0], rule.init(PARAMS), curvature=first)
        assert optax.tree.norm(nothing) == 0
        chex.assert_trees_all_close(
            update(GRADIENTS[0], state, curvature=good)[0], expected, rtol=1e-9
        )


def linear_problem():
    """Params of the linear model, which are the gradient too, a rule for it,
    and inverses to compare with.
    """
    params = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    invert = jax.jit(
        lambda factors, damping: curvax.kron_inverse(LINEAR_LAYOUT, factors, damping)(params)
    )
    return params, functools.partial(RULES["kfac"], LINEAR_LAYOUT), invert


def test_damping_by_schedule_by_argument_and_injected():
    """Each with damping 1/2 in the first step and 1/8 in the second."""
    params, build, invert = linear_problem()
    factors = drawn_factors(LINEAR_LAYOUT, params, 0)
    injected = optax.inject_hyperparams(lambda damping: build(damping))(damping=0.5)
    inject = lambda state, t: state._replace(hyperparams={"damping": jnp.float32(0.5 * 0.25**t)})
    ways = {
        "schedule": (build(lambda count: 0.5 * 0.25**count), lambda state, t: state, lambda t: {}),
        "argument": (
            build(8.0),
            lambda state, t: state,
            lambda t: {"damping": jnp.float32(0.5 * 0.25**t)},
        ),
        "injected": (injected, inject, lambda t: {}),
    }
    for way, (rule, prepare, extra) in ways.items():
        update, state = jax.jit(rule.update), rule.init(params)
        for t in range(2):
            steps, state = update(params, prepare(state, t), curvature=factors, **extra(t))
            expected = invert(factors, 0.5 * 0.25**t)
            chex.assert_trees_all_close(
                steps, expected, rtol=1e-9, custom_message=f"{way}, step {t}"
            )
            assert optax.tree.get(state, "info").damping == 0.5 * 0.25**t


def test_inversions_wait_for_a_curvature():
    params, build, invert = linear_problem()
    rule = build(DAMPING, inverse_every=2, decay=0.0)
    update, state = jax.jit(rule.update), rule.init(params)
    a, b, c, d = (drawn_factors(LINEAR_LAYOUT, params, seed) for seed in range(4))
    plan = (a, a, 0), (None, a, 1), (None, a, 2), (b, b, 0), (c, b, 1), (None, b, 2), (d, d, 0)
    for curvature, inverted, age in plan:
        steps, state = update(params, state, curvature=curvature)
        chex.assert_trees_all_close(steps, invert(inverted, DAMPING), rtol=1e-9)
        assert [info.age for info in state.info.blocks.values()] == [age]


def test_fallback_for_leaves_in_no_block():
    alone, adam = RULES["kfac"](LAYOUT, DAMPING), optax.scale_by_adam()
    groups = {"kron": alone, "diagonal": adam}
    tx = curvax.estimating(optax.partition(groups, LAYOUT.labels(PARAMS)), sampled_factors)
    update, draw = (
        jax.jit(lambda g, s, b: tx.update(g, s, PARAMS, batch=b)),
        jax.jit(sampled_factors),
    )
    alone_update = jax.jit(alone.update)
    state, held, of_adam = tx.init(PARAMS), alone.init(PARAMS), adam.init(PARAMS)
    for t, (g, batch) in enumerate(zip(GRADIENTS, BATCHES, strict=True)):
        updates, state = update(g, state, batch)
        factors = draw(PARAMS, batch, jax.random.fold_in(jax.random.key(0), t))
        expected, held = alone_update(g, held, curvature=factors)
        by_adam, of_adam = adam.update(g, of_adam)
        chex.assert_trees_all_close(updates, expected | {"gain": by_adam["gain"]}, rtol=1e-9)
    assert optax.tree.get(state, "curvature").diagonal == {}  # nothing is held for what Adam has


# -- what K-FAC is for -------------------------------------------------------------------------


def test_one_step_solves_a_linear_least_squares_problem():
    x, y = normal(0, 9, 3), normal(1, 9, 2)
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    estimator = functools.partial(curvax.kron_factors, fisher="exact")
    draw = lambda params, batch, key: estimator(LINEAR, LINEAR_LAYOUT, params, batch, key)
    tx = curvax.quadratic_model(
        curvax.estimating(curvax.scale_by_kfac(LINEAR_LAYOUT, 1e-24), draw), LINEAR
    )
    step = jax.jit(lambda p, b: tx.update(jax.grad(LINEAR)(p, b), tx.init(p), p, batch=b))
    updates, state = step(params, (x, y))
    solution = np.linalg.lstsq(np.concatenate([x, np.ones((9, 1))], axis=1), y, rcond=None)[0]
    close(
        np.concatenate([params["w"] + updates["w"], (params["b"] + updates["b"])[None]]), solution
    )
    np.testing.assert_allclose([state.info.learning_rate, state.info.momentum], [1, 0], rtol=1e-6)


@pytest.mark.parametrize("scheme", ["factored", "exact"])
def test_kfac_does_not_see_affine_maps_of_a_layers_inputs(scheme):
    """Without damping. Each layer's inputs are mapped,
    and its initial weights so that the model is the same.
    """

    def model(p, inputs):
        (t1, c1), (t2, c2) = inputs["maps"]
        h = jnp.tanh((inputs["x"] @ t1 + c1) @ p["w1"] + p["b1"])
        return (h @ t2 + c2) @ p["w2"] + p["b2"]

    objective = curvax.Objective(model, losses.squared_error())
    batch = lambda maps: ({"x": normal(5, 16, 3), "maps": curvax.Shared(maps)}, normal(6, 16, 3))
    maps = [(np.eye(n) + 0.8 * normal(n, n, n), normal(n + 10, n)) for n in (3, 4)]
    layout = curvax.kron_layout(
        objective, {name: PARAMS[name] for name in ("w1", "b1", "w2", "b2")}, batch(maps)
    )
    estimator = curvax.kron.estimator(objective, layout, fisher="exact")
    tx = curvax.estimating(curvax.scale_by_kfac(layout, 1e-20, damping_scheme=scheme), estimator)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return value, jax.tree.map(lambda p, u: p - 0.3 * u, params, updates), state

    def values(maps, params):
        state = tx.init(params)
        for _ in range(5):
            value, params, state = step(params, state, batch(maps))
            yield value

    plain = {name: PARAMS[name] for name in ("w1", "b1", "w2", "b2")}
    mapped = {}
    for i, (t, c) in enumerate(maps, 1):
        mapped[f"w{i}"] = np.linalg.solve(t, plain[f"w{i}"])
        mapped[f"b{i}"] = plain[f"b{i}"] - c @ mapped[f"w{i}"]
    expected = list(values([(np.eye(n), np.zeros(n)) for n in (3, 4)], plain))
    np.testing.assert_allclose(list(values(maps, mapped)), expected, rtol=1e-6)
    assert expected[-1] < 0.5 * expected[0]


def test_ekfac_trains_a_sequence_model():
    tx = curvax.ekfac(0.1, OBJECTIVE, LAYOUT, 0.01, inverse_every=3)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(OBJECTIVE)(params, BATCHES[0]), state, params, batch=BATCHES[0]
        )
        return optax.apply_updates(params, updates), state

    carry = PARAMS, tx.init(PARAMS)
    for _ in range(30):
        carry = step(*carry)
    assert OBJECTIVE(carry[0], BATCHES[0]) < 0.5 * OBJECTIVE(PARAMS, BATCHES[0])
    info = optax.tree.get(carry[1], "info")
    assert info.num_nonfinite == 0 and not any(info.num_failures.values())


# -- wrappers ----------------------------------------------------------------------------------


def damped_descent():
    """Minus momentum over damping: a step that depends on `damping=`, and a state."""
    step = lambda m, g: 0.5 * m + g

    def update(updates, state, params=None, *, damping, **extra):
        new = jax.tree.map(step, state, updates)
        return jax.tree.map(lambda m: -m / damping, new), new

    return optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )


X = np.linspace(0, 3, 6)
Y = 2 * np.exp(-1.5 * X) + 0.1 * np.cos(9 * X)


class Decay(NamedTuple):
    """Least squares for `a exp(-b x)`, by hand."""

    a: float = 0.0
    b: float = 0.0

    def residual(self):
        return self.a * np.exp(-self.b * X) - Y

    def jacobian(self):
        return np.stack([np.exp(-self.b * X), -self.a * X * np.exp(-self.b * X)], axis=1)


DECAY = curvax.Objective(lambda p, x: p["a"] * jnp.exp(-p["b"] * x), losses.squared_error())


def test_levenberg_marquardt_follows_the_published_rule():
    start, how = np.array([1.0, 1.0]), {"damping": 0.125, "every": 2, "factor": 0.8}
    tx = curvax.levenberg_marquardt(damped_descent(), DECAY, **how)
    step = jax.jit(lambda p, s: tx.update(jax.grad(DECAY)(p, (X, Y)), s, p, batch=(X, Y)))
    expected = published.levenberg_marquardt(
        start,
        loss=lambda theta: 0.5 * np.mean(Decay(*theta).residual() ** 2),
        gradient=lambda theta: Decay(*theta).jacobian().T @ Decay(*theta).residual() / 6,
        curvature=lambda theta: Decay(*theta).jacobian().T @ Decay(*theta).jacobian() / 6,
        step=lambda g, m, damping: (-(0.5 * m + g) / np.float64(damping), 0.5 * m + g),
        num_steps=16,
        **how,
    )
    params, num_rejected = dict(zip("ab", start, strict=True)), 0
    state = tx.init(params)
    for theta, m, damping, rho, accepted in expected:
        before = params, state
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose([params["a"], params["b"]], theta, rtol=1e-9)
        np.testing.assert_allclose([state.inner_state["a"], state.inner_state["b"]], m, rtol=1e-9)
        np.testing.assert_allclose(
            state.info.ratio, before[1].info.ratio if rho is None else rho, rtol=1e-5
        )
        num_rejected += not accepted
        assert (state.damping, state.info.accepted, state.info.num_rejected) == (
            damping,
            accepted,
            num_rejected,
        )
        if not accepted:
            chex.assert_trees_all_equal(
                (params, state.inner_state), (before[0], before[1].inner_state)
            )
            assert state.damping > before[1].damping
    assert state.count == 16 and num_rejected == 2
    taken = [rho for *_, rho, accepted in expected if accepted and rho is not None]
    assert {np.digitize(rho, [0, 1 / 4, 3 / 4]) for rho in taken} == {
        1,
        2,
        3,
    }  # damping grew, stayed and fell


def test_levenberg_marquardt_rejects_what_is_not_finite_and_keeps_its_bounds():
    params = {"a": np.array(0.5), "b": np.array(0.8)}
    tx = curvax.levenberg_marquardt(
        damped_descent(), DECAY, damping=1.0, every=1, factor=0.5, bounds=(0.5, 3.0)
    )
    update = jax.jit(lambda g, s: tx.update(g, s, params, batch=(X, Y)))
    for bad in (jnp.nan, jnp.inf, -1e300):
        g, state = {"a": np.array(bad), "b": np.array(bad)}, tx.init(params)
        for damping in (2.0, 3.0):
            steps, state = update(g, state)
            assert all(x == 0 for x in jax.tree.leaves((steps, state.inner_state)))
            assert state.damping == damping and not state.info.accepted
    tiny, state = jax.tree.map(lambda x: 1e-3 * x, jax.grad(DECAY)(params, (X, Y))), tx.init(params)
    for _ in range(3):
        _, state = update(tiny, state)
    assert state.damping == 0.5 and state.info.num_rejected == 0


@pytest.mark.parametrize("where", ["constructor", "update"])
def test_quadratic_model_solves_for_rate_and_momentum(where):
    damping = 0.25
    tx = curvax.quadratic_model(
        optax.identity(), OBJECTIVE, damping=damping if where == "constructor" else 9.0
    )
    extra = {"damping": damping} if where == "update" else {}

    @jax.jit
    def step(params, state, batch):
        g = jax.grad(OBJECTIVE)(params, batch)
        dense = curvax.to_dense(curvax.ggnvp(OBJECTIVE, params, batch), params)
        return g, dense, *tx.update(g, state, params, batch=batch, **extra)

    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    params, state, previous = PARAMS, tx.init(PARAMS), np.zeros(len(flat(PARAMS)))
    for t in range(3):
        g, dense, updates, state = step(params, state, BATCHES[0])
        chex.assert_trees_all_close(flat(state.previous), flat(updates))
        g, pair = flat(g), np.stack([-flat(g), previous], axis=1)
        matrix, slope = pair.T @ (dense + damping * np.eye(len(g))) @ pair, pair.T @ g
        weights = (
            np.linalg.solve(matrix, -slope) if t > 0 else np.array([-slope[0] / matrix[0, 0], 0])
        )
        s = pair @ weights
        close(flat(updates), s)
        model = g @ s + s @ dense @ s / 2 + damping * s @ s / 2
        np.testing.assert_allclose(g @ s / 2, model, rtol=1e-9)  # at the minimum
        np.testing.assert_allclose(state.info, [*weights, model], rtol=1e-6)
        params, previous = optax.apply_updates(params, updates), s
    # the direction of the previous step once more, at the same place: the rate alone
    _, _, first, after = step(PARAMS, tx.init(PARAMS), BATCHES[0])
    _, _, again, after = step(PARAMS, after, BATCHES[0])
    close(flat(again), flat(first))
    assert after.info.momentum == 0


def test_a_gradient_that_is_not_finite_does_not_stay_in_the_quadratic_model():
    tx = curvax.quadratic_model(damped_descent(), OBJECTIVE)
    update = jax.jit(lambda g, s: tx.update(g, s, PARAMS, batch=BATCHES[0], damping=1.0))
    _, state = update(gradient(PARAMS, BATCHES[0]), tx.init(PARAMS))
    steps, after = update({**GRADIENTS[0], "b1": jnp.full(4, jnp.nan)}, state)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(steps))
    chex.assert_trees_all_equal(after._replace(inner_state=None), state._replace(inner_state=None))
    assert np.isnan(
        after.inner_state["b1"]
    ).all()  # what the inner transformation does is its own affair


def test_kl_clip_shortens_by_its_formula():
    g, factor = {"a": jnp.array([3.0, 1.0]), "b": jnp.array(-2.0)}, 2.0
    dot = factor * 14.0  # of the gradient with the step
    rate = lambda count: 0.5 / (count + 1)
    for schedule, rates in ((rate, (0.5, 0.25, 0.5 / 3)), (0.5, (0.5, 0.5, 0.5))):
        tx = curvax.kl_clip(optax.scale(factor), schedule, max_kl=1.0)
        update, state = jax.jit(tx.update), tx.init(g)
        for lr in rates:
            steps, state = update(g, state)
            scale = min(1, np.sqrt(1.0 / (lr**2 * dot)))
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-9),
                steps,
                optax.tree.scale(factor * scale, g),
            )
            np.testing.assert_allclose(state.scale, scale, rtol=1e-6)
    assert state.scale < 1 and rates[0] ** 2 * dot * state.scale**2 == pytest.approx(1)
    nothing, state = update(optax.tree.zeros_like(g), state)
    assert optax.tree.norm(nothing) == 0 and state.scale == 1 and state.count == 4
    same, _ = curvax.kl_clip(optax.identity(), 0.01, max_kl=1.0).update(g, tx.init(g))
    chex.assert_trees_all_equal(same, g)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_one_liner_limits_the_step_before_momentum(name):
    """`max_kl` is `kl_clip` with the optimizer's own rate, a schedule too;
    the momentum comes after.
    """
    scale_by = {"kfac": curvax.scale_by_kfac, "ekfac": curvax.scale_by_ekfac}[name]
    rate = lambda count: 3.0 / (count + 1)
    one_liner = getattr(curvax, name)(
        rate, OBJECTIVE, LAYOUT, DAMPING, momentum=0.7, max_kl=1e-3, seed=3
    )
    rule = curvax.estimating(scale_by(LAYOUT, DAMPING), ESTIMATORS[name], seed=3)
    composed = optax.chain(
        curvax.kl_clip(rule, rate, max_kl=1e-3),
        optax.trace(0.7),
        optax.scale_by_learning_rate(rate),
    )
    states, scales = [tx.init(PARAMS) for tx in (one_liner, composed)], []
    updates = [
        jax.jit(lambda g, s, b, tx=tx: tx.update(g, s, PARAMS, batch=b))
        for tx in (one_liner, composed)
    ]
    for g, batch in zip(GRADIENTS, BATCHES, strict=True):
        results = [update(g, state, batch) for update, state in zip(updates, states, strict=True)]
        chex.assert_trees_all_close(*(steps for steps, _ in results), rtol=1e-9)
        states = [state for _, state in results]
        scales.append(optax.tree.get(states[0], "scale").item())
    assert max(scales) < 1  # every step was shortened


def test_on_fraction_takes_rows_at_equal_distances():
    rows = lambda params, batch, key: batch
    for size, fraction, want in (
        (8, 0.25, [0, 4]),
        (8, 1, range(8)),
        (9, 1 / 3, [0, 3, 6]),
        (8, 0.01, [0]),
        (10, 0.2, [0, 5]),
    ):
        inputs = {"x": jnp.arange(size), "all": curvax.Shared(jnp.arange(5))}
        got, targets = curvax.on_fraction(rows, fraction)(
            None, (inputs, 2 * jnp.arange(size)), None
        )
        assert got["x"].tolist() == list(want) and targets.tolist() == [2 * i for i in want]
        assert got["all"].value.tolist() == list(range(5))


# -- cost --------------------------------------------------------------------------------------


def size(tx, params):
    """Entries in the state, other than scalars."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, params)) if x.ndim > 0)


def test_the_states_take_what_the_documentation_says():
    sides = 2 * (4**2 + 4**2 + 5**2 + 3**2) + 3 + 2  # with the diagonal, and weights of inputs
    assert size(curvax.scale_by_kfac(LAYOUT), PARAMS) == sides
    assert size(curvax.scale_by_ekfac(LAYOUT), PARAMS) == sides + 4 * 4 + 5 * 3
    widths = [64, 1000, 500, 250, 30, 250, 500, 1000, 64]
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = [(shape(n, m), shape(m)) for n, m in itertools.pairwise(widths)]
    objective = curvax.Objective(
        lambda p, x: functools.reduce(lambda h, layer: jnp.tanh(h @ layer[0] + layer[1]), p, x),
        losses.squared_error(),
    )
    layout = curvax.kron_layout(objective, params, (shape(8, 64), shape(8, 64)))
    for momentum, limit in ((0.0, 43e6), (0.9, 49e6)):
        state = jax.eval_shape(curvax.kfac(0.1, objective, layout, momentum=momentum).init, params)
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= limit


def test_at_interval_1_nothing_is_conditional_and_one_forward_pass_serves_both():
    """Bound: the parts by themselves, less nearly all of a forward pass;
    each part has one of its own.
    """
    with jax.enable_x64(False):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        params = [shape(32, 64), shape(64, 8)]
        model = lambda p, x: jnp.tanh(x @ p[0]) @ p[1]
        objective = curvax.Objective(model, losses.softmax_cross_entropy())
        batch = shape(256, 32), jax.ShapeDtypeStruct((256,), jnp.int32)
        layout = curvax.kron_layout(objective, params, batch)
        estimator = lambda p, b: curvax.kron_factors(objective, layout, p, b, jax.random.key(0))
        rule, build = (
            curvax.scale_by_kfac(layout),
            functools.partial(curvax.kfac, 0.1, objective, layout),
        )
        tx = build()
        step = lambda tx: lambda p, s, b: tx.update(jax.grad(objective)(p, b), s, p, batch=b)
        flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
        state = jax.eval_shape(tx.init, params)
        factors = jax.eval_shape(estimator, params, batch)
        rest = flops(
            lambda g, s, c: rule.update(g, s, curvature=c),
            params,
            jax.eval_shape(rule.init, params),
            factors,
        )
        parts = flops(jax.grad(objective), params, batch), flops(estimator, params, batch), rest
        forward = 2 * 256 * (32 * 64 + 64 * 8)
        whole = flops(step(tx), params, state, batch)
        assert whole <= sum(parts) - 0.95 * forward
        text = lambda **every: str(jax.make_jaxpr(step(build(**every)))(params, state, batch))
        assert "cond[" not in text()
        assert "cond[" in text(curvature_every=2) and "cond[" in text(inverse_every=2)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_by", [curvax.scale_by_kfac, curvax.scale_by_ekfac])
def test_errors_of_the_rules(scale_by):
    for damping in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"damping must be positive, got {damping}"):
            scale_by(LAYOUT, damping)
    with pytest.raises(ValueError, match=r"inverse_every must lie in \[1, .*got 0"):
        scale_by(LAYOUT, inverse_every=0)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        scale_by(LAYOUT, decay=1.0)
    with pytest.raises(TypeError, match="inverse_every must be a Python integer"):
        scale_by(LAYOUT, inverse_every=jnp.array(2), stagger=True)
    rule = scale_by(LAYOUT)
    with pytest.raises(
        ValueError,
        match=r"the layout is of other params: \['w1'\] is \[3, 4\] there, in params \[4, 3\]",
    ):
        rule.init({**PARAMS, "w1": np.ones((4, 3))})
    state = rule.init(PARAMS)
    with pytest.raises(
        ValueError,
        match=r"the layout is of other params: \['b1'\] is \[4\] there, in updates \[1\]",
    ):
        rule.update({**PARAMS, "b1": np.ones(1)}, state)
    with pytest.raises(ValueError, match=r"the layout has a leaf \['gain'\], updates has not"):
        rule.update({name: x for name, x in PARAMS.items() if name != "gain"}, state)


def test_errors_of_curvature_and_wrappers():
    rule = curvax.scale_by_kfac(LAYOUT)
    state, factors = rule.init(PARAMS), drawn_factors(LAYOUT, PARAMS, 0)
    with pytest.raises(
        ValueError, match="unknown damping_scheme 'cholesky'; valid: 'exact', 'factored'"
    ):
        curvax.scale_by_kfac(LAYOUT, damping_scheme="cholesky")
    with pytest.raises(
        ValueError, match=r"curvature is of another layout: it has no factors of \['w1'\]"
    ):
        rule.update(
            PARAMS, state, curvature=factors._replace(blocks={"['w2']": factors.blocks["['w2']"]})
        )
    with pytest.raises(
        ValueError, match="curvature is of another layout: shapes of its factors differ"
    ):
        rule.update(
            PARAMS,
            state,
            curvature=init_factors(LAYOUT.edit("['w1']", a_structure="diagonal"), PARAMS),
        )
    with pytest.raises(
        ValueError, match=r"separates \['w1'\] from \['b1'\], which are in one Kronecker block"
    ):
        optax.masked(rule, {name: name != "b1" for name in PARAMS}).init(PARAMS)
    for build in (curvax.kfac, curvax.ekfac):
        tx = build(0.1, OBJECTIVE, LAYOUT)
        with pytest.raises(
            ValueError, match=r"needs the batch: tx.update\(grads, state, params, batch=batch\)"
        ):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1"):
            build(0.1, OBJECTIVE, LAYOUT, momentum=1.0)
    for tx in (
        curvax.levenberg_marquardt(damped_descent(), OBJECTIVE, 1.0),
        curvax.quadratic_model(rule, OBJECTIVE),
    ):
        for missing in ({"params": PARAMS}, {"batch": BATCHES[0]}):
            with pytest.raises(
                ValueError, match=r"needs both: tx.update\(grads, state, params, batch=batch\)"
            ):
                tx.update(PARAMS, tx.init(PARAMS), **missing)
    for wrong, message in (
        ({"damping": 0.0}, "damping must be positive"),
        ({"factor": 1.0}, r"factor must lie in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            curvax.levenberg_marquardt(rule, OBJECTIVE, **{"damping": 1.0, **wrong})
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        curvax.levenberg_marquardt(rule, OBJECTIVE, 1.0, every=0)
    with pytest.raises(ValueError, match="max_kl must be at least 0, got -1"):
        curvax.kl_clip(rule, 0.1, max_kl=-1)
    for fraction in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=rf"fraction must lie in \(0, 1\], got {fraction}"):
            curvax.on_fraction(sampled_factors, fraction)


def test_a_damping_that_reaches_zero_keeps_the_last_inverse_of_a_singular_block():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    params, batch = jnp.zeros((2, 3)), (jnp.ones((4, 2)), jnp.ones((4, 3)))
    layout = curvax.kron_layout(objective, params, batch)
    factors = curvax.kron_factors(
        objective, layout, params, batch, jax.random.key(0), fisher="exact"
    )
    gradient = jax.grad(objective)(params, batch)
    vanishing = lambda count: jnp.where(count < 1, 1e-2, 0.0)
    rule = curvax.scale_by_kfac(layout, vanishing, decay=0.0, damping_scheme="exact")
    first, state = rule.update(gradient, rule.init(params), curvature=factors)
    nothing = jax.tree.map(jnp.zeros_like, factors)._replace(diagonal=factors.diagonal)
    updates, state = rule.update(gradient, state, curvature=nothing)
    assert list(state.info.num_failures.values()) == [1]
    np.testing.assert_array_equal(updates, first)


def test_inputs_of_any_unit_are_stepped_with():
    """In float32, where squares of the factors of such inputs overflow."""
    with jax.enable_x64(False):
        objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        x = jnp.array([[1e10, 1.0], [2e10, 0.0], [0.0, 3.0]], jnp.float32)
        params, batch = jnp.zeros((2, 1), jnp.float32), (x, jnp.ones((3, 1), jnp.float32))
        layout = curvax.kron_layout(objective, params, batch)
        factors = curvax.kron_factors(objective, layout, params, batch, jax.random.key(0))
        rule = curvax.scale_by_kfac(layout, 1e-3)
        gradient = jax.grad(objective)(params, batch)
        updates, state = rule.update(gradient, rule.init(params), curvature=factors)
        assert list(state.info.num_failures.values()) == [0]
        assert (jnp.abs(updates) > 0).all()
