"""Trajectories against NumPy transcriptions of the published algorithms,
and what the methods promise by formula.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest
from cases import CASES

import curvax
from curvax.estimate import rademacher

pytestmark = pytest.mark.usefixtures("x64")

NUM_STEPS = 50


@functools.cache  # its compiled functions are shared
class Flat:
    """A case with its parameters as a dict of arrays by path, for NumPy."""

    def __init__(self, name):
        self.case = CASES[name]()
        paths, self.treedef = jax.tree.flatten_with_path(self.case.params)
        self.names = [jax.tree_util.keystr(path) for path, _ in paths]
        self.gradient = self._on_dicts(jax.jit(jax.grad(self.case.objective.value)))
        loss = jax.jit(self.case.objective.value)
        self.loss = lambda theta, t: float(loss(self.tree(theta), self.batch(t)))
        self.batches = [
            jax.tree.map(lambda x, i=i: np.roll(x, i, 0)[:4], self.case.batch) for i in range(3)
        ]

    def dict(self, tree):
        return {
            name: np.asarray(x) for name, x in zip(self.names, jax.tree.leaves(tree), strict=True)
        }

    def tree(self, flat):
        return jax.tree.unflatten(self.treedef, [jnp.asarray(flat[name]) for name in self.names])

    def batch(self, t):
        return self.batches[t % 3]

    def _on_dicts(self, gradient):
        return lambda theta, t: self.dict(gradient(self.tree(theta), self.batch(t)))

    @functools.cached_property
    def hvp(self):
        apply = jax.jit(
            lambda p, b, v: jax.jvp(
                lambda p: jax.grad(self.case.objective.value)(p, b), (p,), (v,)
            )[1]
        )
        return lambda theta, t, z: self.dict(apply(self.tree(theta), self.batch(t), self.tree(z)))

    def probes(self, seed):
        """Those of the optimizer: one probe, from the key of the step."""
        key = lambda t: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), t), 0)
        draw = jax.jit(lambda t: rademacher(key(t), self.case.params))
        return [self.dict(draw(t)) for t in range(NUM_STEPS)]

    def first_probes(self, seed, num_first):
        """Those beside the first, of an optimizer whose first curvature is a mean."""
        at_zero = jax.random.fold_in(jax.random.key(seed), 0)
        key = lambda i: jax.random.fold_in(jax.random.fold_in(at_zero, i), 0)
        return [self.dict(rademacher(key(i), self.case.params)) for i in range(1, num_first)]

    def trajectory(self, tx):
        def step(params, state, batch):
            grads = jax.grad(self.case.objective.value)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return optax.apply_updates(params, updates), state

        step, carry, path = jax.jit(step), (self.case.params, tx.init(self.case.params)), []
        for t in range(NUM_STEPS):
            carry = step(*carry, self.batch(t))
            path.append(self.dict(carry[0]))
        return path


def assert_same_path(got, expected, rtol=1e-8, atol=1e-10):
    assert len(got) == len(expected) == NUM_STEPS
    for a, b in zip(got, expected, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name, averaging", [("mlp", None), ("cnn", None), ("mlp", 5)])
def test_adahessian_follows_the_published_algorithm(name, averaging):
    flat = Flat(name)
    constants = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "hessian_power": 0.7}
    if averaging is None:
        average = published.spatial_mean
        tx = curvax.adahessian(0.05, flat.case.objective, weight_decay=0.1, seed=3, **constants)
    else:
        average = published.block_mean(averaging)
        estimator = lambda params, batch, key: (
            curvax.hutchinson_diagonal(
                curvax.hvp(flat.case.objective, params, batch), params, key
            ).mean
        )
        rule = curvax.scale_by_adahessian(
            averaging=curvax.optim.block_average(averaging), **constants
        )
        tx = optax.chain(
            curvax.estimating(rule, estimator, seed=3),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(0.05),
        )
    expected = published.adahessian(
        flat.dict(flat.case.params),
        flat.gradient,
        flat.hvp,
        flat.probes(3),
        lr=0.05,
        weight_decay=0.1,
        average=average,
        **constants,
    )
    assert_same_path(flat.trajectory(tx), expected)


@pytest.mark.parametrize("variant", ["h", "g"])
def test_sophia_follows_the_published_algorithm(variant):
    flat = Flat("mlp")
    objective = flat.case.objective
    constants = {"b1": 0.9, "b2": 0.8, "gamma": 0.5}
    build = {"h": curvax.sophia_h, "g": curvax.sophia_g}[variant]
    tx = build(0.01, objective, weight_decay=0.2, curvature_every=4, seed=3, **constants)
    if variant == "h":
        curvature = published.sophia_hutchinson(flat.hvp, flat.probes(3))
    else:
        key = lambda t: jax.random.fold_in(jax.random.key(3), t)
        draw = jax.jit(
            lambda params, batch, t: curvax.gauss_newton_bartlett(objective, params, batch, key(t))
        )
        curvature = lambda theta, t: flat.dict(draw(flat.tree(theta), flat.batch(t), t))
    expected = published.sophia(
        flat.dict(flat.case.params),
        flat.gradient,
        curvature,
        NUM_STEPS,
        lr=0.01,
        weight_decay=0.2,
        eps=1e-12,
        every=4,
        **constants,
    )
    assert_same_path(flat.trajectory(tx), expected)
    change = [
        np.abs(b[n] - a[n] * (1 - 0.01 * 0.2)).max()
        for a, b in itertools.pairwise(expected)
        for n in a
    ]
    assert max(change) > 0.0099  # some entries were clipped, so both branches were followed


def test_oasis_follows_its_algorithm():
    flat = Flat("mlp")
    constants = {"b2": 0.9, "alpha": 0.05, "momentum": 0.8, "max_kl": 1e-3, "weight_decay": 0.1}
    tx = curvax.oasis(0.05, flat.case.objective, seed=3, num_first=3, **constants)
    expected, factors = published.oasis(
        flat.dict(flat.case.params),
        flat.gradient,
        flat.hvp,
        flat.probes(3),
        flat.first_probes(3, 3),
        lr=0.05,
        **constants,
    )
    assert_same_path(flat.trajectory(tx), expected, rtol=1e-12, atol=1e-12)
    assert min(factors) < max(factors) == 1  # the limit acted on a part of the steps


def test_oasis_auto_follows_the_published_algorithm():
    flat = Flat("mlp")
    constants = {"b2": 0.9, "alpha": 0.05, "first_rate": 1e-2}
    tx = curvax.oasis_auto(flat.case.objective, seed=3, num_first=3, **constants)
    expected, rates = published.oasis_auto(
        flat.dict(flat.case.params),
        flat.gradient,
        flat.hvp,
        flat.probes(3),
        flat.first_probes(3, 3),
        **constants,
    )
    assert_same_path(flat.trajectory(tx), expected, rtol=1e-12, atol=1e-12)
    # Rates fall and grow again, so both terms of the minimum were followed.
    assert min(rates[1:]) < rates[1] and (np.diff(rates[1:]) > 0).any()


@pytest.mark.parametrize("variant", ["adagrad", "adam"])
def test_sania_follows_the_published_algorithm(variant):
    flat = Flat("mlp")
    if variant == "adagrad":
        rule, metric = curvax.optim.scale_by_adagrad_sqr(0.1), published.adagrad_sqr(0.1)
    else:
        rule, metric = curvax.optim.scale_by_adam_sqr(0.9, 0.1), published.adam_sqr(0.9, 0.1)
    tx = curvax.sania(flat.case.objective, rule, f_star=0.05)
    theta = flat.dict(flat.case.params)
    expected = published.sania(
        theta, flat.loss, flat.gradient, NUM_STEPS, metric=metric, f_star=0.05
    )
    assert_same_path(flat.trajectory(tx), expected, rtol=1e-12, atol=1e-12)


def test_adahessian_solves_a_separable_quadratic_in_one_step():
    a = jnp.array([1.0, 10.0, 100.0])
    objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
    batch = (jnp.sqrt(a)[None], jnp.zeros((1, 3)))
    tx = curvax.adahessian(1.0, objective, b1=0.0, b2=0.0, eps=0.0)
    w = jnp.array([3.0, -2.0, 0.5])
    updates, state = jax.jit(
        lambda w: tx.update(jax.grad(objective)(w, batch), tx.init(w), w, batch=batch)
    )(w)
    np.testing.assert_allclose(w + updates, 0, atol=1e-14)
    np.testing.assert_allclose(optax.tree.get(state, "info").mean_curvature, a.mean(), rtol=1e-6)


def test_sophias_clip_bound_fraction_and_unclipped_step():
    rule = curvax.scale_by_sophia(b1=0.0, b2=0.0, gamma=2.0)
    g, h = jnp.array([1.0, -50.0, 3.0, 0.1]), jnp.array([1.0, 1.0, -5.0, 100.0])
    updates, state = jax.jit(rule.update)(g, rule.init(g), curvature=h)
    np.testing.assert_allclose(
        updates, [0.5, -1, 1, 0.1 / 200], rtol=1e-12
    )  # negative curvature: the sign
    assert state.info.unclipped_fraction == 0.5
    rising = curvax.scale_by_sophia(b1=0.0, b2=0.0, gamma=lambda count: 1.0 + count)
    update = jax.jit(rising.update)
    _, state = update(g, rising.init(g), curvature=h)
    updates, _ = update(g, state)
    np.testing.assert_allclose(updates[0], 0.5)  # gamma(1) = 2


def test_curvature_every_counts_refreshes_in_the_bias_correction():
    """With a constant curvature the held average, corrected,
    is that curvature whenever refreshed.
    """
    rule = curvax.scale_by_adahessian(b1=0.0, b2=0.9, eps=0.0)
    state, update = rule.init(jnp.zeros(2)), jax.jit(rule.update)
    for curvature in (jnp.array([2.0, 4.0]), None, None, jnp.array([2.0, 4.0]), None):
        updates, state = update(jnp.ones(2), state, curvature=curvature)
        np.testing.assert_allclose(updates, [0.5, 0.25], rtol=1e-12)


def test_averages_keep_shapes_and_follow_flax_layouts():
    tree = {
        "conv": np.arange(72.0).reshape(3, 2, 3, 4),
        "dense": np.arange(6.0).reshape(2, 3),
        "bias": np.arange(3.0),
    }
    heads = {
        "query": {"bias": tree["dense"], "kernel": tree["dense"]},
        "norm": {"scale": tree["dense"]},
    }
    spatial = jax.jit(curvax.optim.spatial_average())
    averaged = spatial(heads)
    np.testing.assert_allclose(averaged["query"]["bias"], tree["dense"])
    np.testing.assert_allclose(averaged["norm"]["scale"], tree["dense"])
    np.testing.assert_allclose(
        averaged["query"]["kernel"], np.broadcast_to(tree["dense"].mean(0), (2, 3))
    )
    got = spatial(tree)
    np.testing.assert_allclose(
        got["conv"], np.broadcast_to(tree["conv"].mean((0, 1)), (3, 2, 3, 4))
    )
    np.testing.assert_allclose(got["dense"], np.broadcast_to(tree["dense"].mean(0), (2, 3)))
    np.testing.assert_allclose(got["bias"], tree["bias"])
    for size in (1, 4, 5, 100):
        for name, x in jax.jit(curvax.optim.block_average(size))(tree).items():
            np.testing.assert_allclose(x, published.block_mean(size)(name, tree[name]), rtol=1e-12)
    with pytest.raises(ValueError, match="size must be at least 1"):
        curvax.optim.block_average(0)


@pytest.mark.parametrize(
    ("build", "limit"),
    [
        # The gradient's work is also a part of the Hessian product.
        (functools.partial(curvax.adahessian, 0.1), 3.1),
        # Two gradients of one batch are compared, of which one is that of the step.
        (functools.partial(curvax.oasis_auto, num_first=1), 4.2),
    ],
)
def test_a_training_step_shares_its_forward_and_backward_pass_with_the_estimate(build, limit):
    """At interval 1 the compiler merges what the gradient and the estimate have in common."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = [shape(64, 128), shape(128, 128), shape(128, 8)]
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) @ p[2],
        curvax.losses.softmax_cross_entropy(),
    )
    batch = (shape(256, 64), jax.ShapeDtypeStruct((256,), jnp.int32))
    tx = build(objective=objective)
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    step = lambda p, s, b: tx.update(jax.grad(objective)(p, b), s, p, batch=b)
    state = jax.eval_shape(tx.init, params)
    assert flops(step, params, state, batch) < limit * flops(jax.grad(objective), params, batch)
