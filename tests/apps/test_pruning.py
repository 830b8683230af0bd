"""Optimal brain surgeon against its identities on dense matrices; patterns;
that pruning keeps a network's accuracy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.apps import pruning

DAMPING, SIZE = 0.3, 6
PARAMS = {"b": jnp.arange(1.0, 4), "w": jax.random.normal(jax.random.key(0), (4, 5))}
ONES = jax.tree.map(lambda w: jnp.ones(w.shape, bool), PARAMS)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def window():
    keys = jax.random.split(jax.random.key(1))
    rows = {
        "b": jax.random.normal(keys[0], (SIZE, 3)),
        "w": jax.random.normal(keys[1], (SIZE, 4, 5)),
    }
    return curvax.solve.window_of(wide(rows))


def fisher():
    """Of the leaf w alone."""
    G = np.asarray(window().rows["w"]).reshape(SIZE, 20)
    return DAMPING * np.eye(20) + G.T @ G / SIZE


def test_scores_and_the_removal_of_one_weight(x64):
    inverse, w = np.linalg.inv(fisher()), np.asarray(wide(PARAMS)["w"]).ravel()
    scores = pruning.surgeon(wide(PARAMS), window(), DAMPING, block_size=64)["w"].ravel()
    np.testing.assert_allclose(scores, w**2 / (2 * np.diag(inverse)), rtol=1e-10)
    for q in (0, 7, 19):
        masks = {**ONES, "w": ONES["w"].ravel().at[q].set(False).reshape(4, 5)}
        params, increase = pruning.remove(wide(PARAMS), masks, window(), DAMPING, block_size=64)
        step = np.asarray(params["w"]).ravel() - w
        np.testing.assert_allclose(
            step, -inverse[:, q] * w[q] / inverse[q, q], rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose([step @ fisher() @ step / 2, increase], scores[q], rtol=1e-10)
        assert params["w"].ravel()[q] == 0
        np.testing.assert_array_equal(params["b"], PARAMS["b"])


def test_the_removal_of_a_group_is_the_constrained_minimum(x64):
    w = np.asarray(wide(PARAMS)["w"]).ravel()
    gone = np.array([1, 4, 5, 11, 16])
    masks = {**ONES, "w": ONES["w"].ravel().at[gone].set(False).reshape(4, 5)}
    params, increase = pruning.remove(wide(PARAMS), masks, window(), DAMPING, block_size=64)
    stay = np.setdiff1d(np.arange(20), gone)
    F = fisher()
    best = np.zeros(20)  # minimize (x - w)'F(x - w) over x with x_Q = 0
    best[stay] = w[stay] + np.linalg.solve(F[np.ix_(stay, stay)], F[np.ix_(stay, gone)] @ w[gone])
    np.testing.assert_allclose(params["w"].ravel(), best, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(increase, (best - w) @ F @ (best - w) / 2, rtol=1e-10)


def test_blocks_are_corrected_by_themselves(x64):
    masks = {**ONES, "w": ONES["w"].at[0, 1].set(False).at[2, 3].set(False)}
    params, _ = pruning.remove(wide(PARAMS), masks, window(), DAMPING, block_size=5)
    moved = np.asarray(params["w"] != wide(PARAMS)["w"])
    assert moved[[0, 2]].all() and not moved[[1, 3]].any()


def test_apoptosis_sums_to_the_second_order_term(x64):
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["w"]) + p["b"][:1], curvax.losses.squared_error()
    )
    batch = (jax.random.normal(jax.random.key(2), (8, 4), jnp.float64), jnp.ones((8, 5)))
    flat, unravel = ravel_pytree(wide(PARAMS))
    flat, H = (
        np.asarray(flat),
        np.asarray(jax.jit(jax.hessian(lambda f: objective(unravel(f), batch)))(flat)),
    )
    scores = ravel_pytree(pruning.apoptosis(objective, wide(PARAMS), batch))[0]
    np.testing.assert_allclose(scores, np.abs(flat * (H @ flat)), rtol=1e-10, atol=1e-12)
    diagonal = pruning.diagonal_fisher(objective, wide(PARAMS), batch)
    row = lambda x, y: ravel_pytree(jax.grad(objective)(wide(PARAMS), (x[None], y[None])))[0]
    G = np.asarray(jax.jit(jax.vmap(row))(*batch))
    np.testing.assert_allclose(ravel_pytree(diagonal)[0], (G**2).mean(0) * flat**2 / 2, rtol=1e-10)


def test_unstructured_takes_the_lowest_of_all_kernels_and_what_is_gone_stays_gone():
    scores = {
        "a": jnp.array([[1.0, 8.0], [3.0, 6.0]]),
        "b": jnp.zeros(3),
        "c": jnp.array([[2.0, 7.0, 4.0, 5.0]]),
    }
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), scores)
    masks["a"] = masks["a"].at[0, 1].set(False)  # the highest score is gone already
    got = pruning.unstructured()(scores, masks, 0.5)
    assert got["a"].tolist() == [[False, False], [False, True]]
    assert got["c"].tolist() == [[False, True, True, True]]
    assert got["b"].all() and pruning.density(got) == 0.5
    only = pruning.unstructured(lambda path, leaf: "c" in path)(scores, masks, 0.5)
    assert only["c"].tolist() == [[False, True, False, True]] and only["a"].sum() == 3


def test_n_of_m_and_whole_slices():
    x = jax.random.uniform(jax.random.key(3), (8, 6))
    mask = jnp.ones(x.shape, bool)
    got = pruning.n_of_m(2, 4)(x, mask, 0.0)
    assert (got.reshape(2, 4, 6).sum(1) == 2).all()
    top = jnp.sort(x.reshape(2, 4, 6), axis=1)[:, 2:]
    np.testing.assert_array_equal(
        jnp.sort(jnp.where(got, x, 0).reshape(2, 4, 6), axis=1)[:, 2:], top
    )
    ties = pruning.n_of_m(2, 4, axis=-1)(jnp.zeros((3, 8)), jnp.ones((3, 8), bool), 0.0)
    assert (ties.reshape(3, 2, 4).sum(-1) == 2).all()
    rows = pruning.whole(axis=-2)(x, mask, 0.5)
    assert sorted(rows.sum(1).tolist()) == [0] * 4 + [6] * 4
    assert x[rows[:, 0]].sum(1).min() > x[~rows[:, 0]].sum(1).max()


@pytest.fixture(scope="module")
def trained():
    """A network on noisy clusters, and its batches for pruning."""
    centers = 2 * jax.random.normal(jax.random.key(4), (5, 16))
    labels = jnp.arange(400) % 5
    inputs = centers[labels] + jax.random.normal(jax.random.key(5), (400, 16))
    model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["c"]
    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
    keys = jax.random.split(jax.random.key(6))
    params = {
        "w": 0.3 * jax.random.normal(keys[0], (16, 24)),
        "b": jnp.zeros(24),
        "c": 0.3 * jax.random.normal(keys[1], (24, 5)),
    }
    tx = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params, (inputs, labels)), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=60))((params, tx.init(params)))
    batches = [(inputs[i : i + 10], labels[i : i + 10]) for i in range(0, 400, 10)]
    return objective, params, batches, (inputs, labels)


@pytest.mark.parametrize("pattern", [None, pruning.n_of_m(2, 4), pruning.whole()])
def test_surgeon_beats_magnitude_on_a_trained_network(trained, pattern):
    objective, params, batches, data = trained
    sparsity = 0.5 if pattern else 0.8
    options = {"window_size": 40, "damping": 1e-4, "pattern": pattern}
    pruned = pruning.prune(objective, params, batches, sparsity, **options)
    own = pattern or pruning.unstructured()
    masks = own(
        pruning.magnitude(params), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), sparsity
    )
    assert abs(pruning.density(pruned.masks) - (1 - sparsity)) < 0.03
    assert all(
        (w[~m] == 0).all()
        for w, m in zip(*map(jax.tree.leaves, (pruned.params, pruned.masks)), strict=True)
    )
    assert objective(pruned.params, data) < objective(pruning.apply_masks(params, masks), data)
    assert pruned.increase > 0


def test_gradual_pruning_ends_at_the_sparsity_and_is_better_than_one_shot(trained):
    objective, params, batches, data = trained
    options = {"window_size": 40, "damping": 1e-4}
    once = pruning.prune(objective, params, batches, 0.9, **options)
    gradual = pruning.prune(objective, params, batches * 4, 0.9, recomputations=4, **options)
    assert pruning.density(once.masks) == pytest.approx(pruning.density(gradual.masks), abs=0.005)
    assert objective(gradual.params, data) < objective(once.params, data)
    more = pruning.prune(objective, gradual.params, batches, 0.95, masks=gradual.masks, **options)
    was, now = (
        np.concatenate([m.ravel() for m in jax.tree.leaves(x.masks)]) for x in (gradual, more)
    )
    assert not now[~was].any()


def test_fine_tuning_leaves_what_is_pruned_zero(trained):
    objective, params, batches, data = trained
    pruned = pruning.prune(objective, params, batches, 0.8, window_size=40, damping=1e-4)
    tx = optax.chain(optax.adamw(1e-2), pruning.keep_pruned(pruned.masks))
    params, state = pruned.params, tx.init(pruned.params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(objective)(params, data), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    assert all(
        (w[~m] == 0).all()
        for w, m in zip(*map(jax.tree.leaves, (params, pruned.masks)), strict=True)
    )
    assert objective(params, data) < objective(pruned.params, data)


def test_errors_say_what_and_where(trained):
    objective, params, batches, _ = trained
    for sparsity in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"sparsity must lie in \[0, 1\), got {sparsity}"):
            pruning.prune(objective, params, batches, sparsity)
    with pytest.raises(
        ValueError, match=r"5 does not divide axis -2 of \['w'\], which has 4 entries"
    ):
        pruning.n_of_m(2, 5)(PARAMS, ONES, 0.0)
    with pytest.raises(ValueError, match="n must be at most m, got 3 of 2"):
        pruning.n_of_m(3, 2)
    with pytest.raises(ValueError, match=r"masks has no leaf at \['w'\]"):
        pruning.remove(PARAMS, {"b": ONES["b"]}, window(), 1.0)
    with pytest.warns(UserWarning, match="40 finite gradients for a window of 64"):
        pruning.prune(objective, params, batches, 0.5)
