"""MKOR: parity with the transcription, the inverses, guards; and the switch of MKOR-H."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_matrices as published
import pytest

import curvax
from curvax.kron import MeanVectors, kron_layout
from curvax.optim import mkor, mkor_h, momentum_norm, scale_by_mkor, unscaled, until_plateau

OBJECTIVE = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
NUM_STEPS, RATE = 50, 1e-9


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def layout_of(w):
    """The layout of `w [i, o]`, or of a stack of such."""
    model = lambda w, x: jnp.einsum("b...i,...io->b...o", x, w)
    objective = curvax.Objective(model, curvax.losses.squared_error())
    batch = jnp.ones((2, *w.shape[:-1])), jnp.ones((2, *w.shape[:-2], w.shape[-1]))
    return kron_layout(objective, w, batch)


# Three sequences, which run as members of one batch.
GRADIENTS = normal(3, NUM_STEPS, 4, 3)
INPUTS, COTANGENTS = normal(3, NUM_STEPS, 5, 4, seed=1), normal(3, NUM_STEPS, 5, 3, seed=2)


@functools.cache
def runs(variant, threshold, every, rescale=True):
    """Updates and the final state, for three sequences of gradients."""
    rule = scale_by_mkor(
        layout_of(jnp.zeros((4, 3))),
        stabilize_above=threshold,
        variant=variant,
        scale=momentum_norm() if rescale else unscaled(),
    )

    def estimator(params, batch, key):
        return batch

    tx = curvax.estimating(rule, estimator, every)

    def step(state, now):
        gradient, a, g = now
        vectors = {"": MeanVectors(a.mean(0)[None, None], g.mean(0)[None, None])}
        updates, state = tx.update(gradient, state, jnp.zeros((4, 3)), batch=vectors)
        return state, updates

    @jax.jit
    @jax.vmap
    def run(gradients, inputs, cotangents):
        return jax.lax.scan(step, tx.init(gradients[0]), (gradients, inputs, cotangents))

    return run(GRADIENTS, INPUTS, COTANGENTS)


CHOICES = [("exact", None, 1, True), ("exact", 1.5, 3, True), ("reference", 1.01, 3, False)]


@pytest.mark.parametrize(("variant", "threshold", "every", "rescale"), CHOICES)
def test_updates_are_those_of_the_transcription(variant, threshold, every, rescale, x64):
    state, updates = runs(variant, threshold, every, rescale)
    method = published.mkor if variant == "exact" else published.mkor_reference
    left, right = state.inner_state.blocks[""].preconditioner
    options = {"decay": 0.95, "every": every, "rescale": rescale, "threshold": threshold}
    num_stabilized = 0
    for k, data in enumerate(zip(GRADIENTS, INPUTS, COTANGENTS, strict=True)):
        expected, pairs = method(*map(list, data), **options)
        np.testing.assert_allclose(updates[k], expected, rtol=1e-12, atol=1e-12)
        # After 50 updates the inverses still are those of the dense averages.
        L, R = pairs[-1]
        np.testing.assert_allclose(left.matrix[k, 0] @ L, np.eye(4), atol=1e-10)
        np.testing.assert_allclose(right.matrix[k, 0] @ R, np.eye(3), atol=1e-10)
        without = method(*map(list, data), **options | {"threshold": None})[0]
        num_stabilized += not np.allclose(expected, without)
    assert (num_stabilized > 0) == (threshold is not None and variant == "exact")
    for inverse in (left.matrix[:, 0], right.matrix[:, 0]):
        np.testing.assert_array_equal(inverse, inverse.mT)
        assert np.min(np.linalg.eigvalsh(inverse)) > 0
    if rescale:
        norms = np.linalg.norm(updates, axis=(2, 3))
        np.testing.assert_allclose(norms, np.linalg.norm(GRADIENTS, axis=(2, 3)), rtol=1e-12)


@functools.cache
def stacked():
    """A rule for a stack of two matrices `[4, 3]` and its compiled update."""
    w = jnp.zeros((2, 4, 3))
    rule = scale_by_mkor(layout_of(w), 0.8, stabilize_above=None)
    return rule, rule.init(w), jax.jit(rule.update)


def test_every_matrix_of_a_stack_has_the_norm_of_its_gradient():
    _, state, update = stacked()
    gradient = jnp.asarray(normal(2, 4, 3), jnp.float32) * jnp.array([1.0, 100.0])[:, None, None]
    vectors = {"": MeanVectors(jnp.asarray(normal(2, 1, 4)), jnp.asarray(normal(2, 1, 3)))}
    updates, _ = update(gradient, state, curvature=vectors)
    norm_of = functools.partial(jnp.linalg.norm, axis=(1, 2))
    np.testing.assert_allclose(norm_of(updates), norm_of(gradient), rtol=1e-6)
    alone = scale_by_mkor(layout_of(gradient[0]), 0.8, stabilize_above=None)
    of_first = jax.tree.map(lambda x: x[:1], vectors)
    expected, _ = alone.update(gradient[0], alone.init(gradient[0]), curvature=of_first)
    np.testing.assert_allclose(updates[0], expected, rtol=1e-5)
    zeros, _ = update(jnp.zeros_like(gradient), state, curvature=vectors)
    assert not np.any(zeros)


def test_nothing_that_is_not_finite_or_was_not_measured_enters_an_inverse():
    _, state, update = stacked()
    gradient = jnp.ones((2, 4, 3))
    good = {"": MeanVectors(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 3)))}
    # Before the first vectors there is nothing to step with.
    updates, _ = update(gradient, state)
    assert not np.any(updates)
    # No position reached the first slice: it stays as it is, bit by bit.
    unused = jax.tree.map(lambda x: x.at[0].set(0), good)
    _, once = update(gradient, state, curvature=good)
    _, after = update(gradient, once, curvature=unused)
    for before, now in zip(*(jax.tree.leaves(s.blocks) for s in (once, after)), strict=True):
        np.testing.assert_array_equal(before[0], now[0])
        assert np.any(before[1] != now[1])
    # Vectors whose products overflow are a failure; vectors that are not finite never get there.
    huge = jax.tree.map(lambda x: 1e30 * x, good)
    updates, after = update(gradient, once, curvature=huge)
    jax.tree.map(np.testing.assert_array_equal, after.blocks, once.blocks)
    assert after.info.num_failures[""] == 1 and after.info.num_nonfinite == 0
    assert np.all(np.isfinite(updates)) and np.any(updates)
    _, after = update(gradient, once, curvature=jax.tree.map(lambda x: x * jnp.nan, good))
    jax.tree.map(np.testing.assert_array_equal, after.blocks, once.blocks)
    assert after.info.num_failures[""] == 0 and after.info.num_nonfinite == 1


def test_a_kernel_with_two_products_takes_in_both(x64):
    w = jnp.zeros((4, 3))
    rule = scale_by_mkor(layout_of(w), 0.7, stabilize_above=None)
    a, g = normal(1, 2, 4), normal(1, 2, 3)
    _, state = rule.update(w + 1, rule.init(w), curvature={"": MeanVectors(a, g)})
    for inverse, (x,) in zip(state.blocks[""].preconditioner, (a, g), strict=True):
        dense = 0.7 * np.eye(x.shape[1]) + 0.3 * x.T @ x
        np.testing.assert_allclose(inverse.matrix[0] @ dense, np.eye(len(dense)), atol=1e-12)


def test_sides_have_the_structure_of_the_layout_and_biases_their_gradient(x64):
    model = lambda p, x: x @ p["w"] + p["b"]
    objective = curvax.Objective(model, curvax.losses.squared_error())
    params = {"w": normal(4, 3), "b": normal(3)}
    batch = normal(6, 4, seed=1), normal(6, 3, seed=2)
    layout = kron_layout(objective, params, batch)
    layout = layout.edit("['w']", a_structure="diagonal", g_structure="identity")
    vectors = curvax.kron.mean_vectors(objective, layout, params, batch)
    rule = scale_by_mkor(layout, 0.7, scale=unscaled())
    gradient = jax.tree.map(lambda x: x + 1.0, params)
    updates, _ = rule.update(gradient, rule.init(params), curvature=vectors)
    # The diagonal of L, of the mean input without the bias's 1.
    diagonal = 0.7 + 0.3 * batch[0].mean(0) ** 2
    np.testing.assert_allclose(updates["w"], gradient["w"] / diagonal[:, None], rtol=1e-12)
    np.testing.assert_array_equal(updates["b"], gradient["b"])


def test_errors():
    layout = layout_of(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="unknown variant 'printed'; valid: 'exact', 'reference'"):
        scale_by_mkor(layout, variant="printed")
    with pytest.raises(ValueError, match="decay must be above 0"):
        scale_by_mkor(layout, 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        scale_by_mkor(layout, stabilize_above=0.5)
    rule = scale_by_mkor(layout)
    w = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="curvature is of another layout"):
        rule.update(w, rule.init(w), curvature={"other": MeanVectors(w, w)})
    with pytest.raises(
        ValueError, match=r"vectors \[1, k, 3\] were expected, got float32\[2, 1, 3\]"
    ):
        vectors = MeanVectors(jnp.ones((1, 1, 4)), jnp.ones((2, 1, 3)))
        rule.update(w, rule.init(w), curvature={"": vectors})
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        until_plateau(rule, tolerance=-1.0)
    tx = until_plateau(optax.scale_by_sign())
    with pytest.raises(ValueError, match="the loss is missing"):
        tx.update(w, tx.init(w), w)
    tx = until_plateau(optax.scale_by_sign(), OBJECTIVE)
    with pytest.raises(ValueError, match="the loss is computed from both"):
        tx.update(w, tx.init(w), w)


# --- MKOR-H ---------------------------------------------------------------------------------------


@functools.cache
def training(build, **options):
    """Compile 60 steps on a quadratic; `[losses, states]` of each step."""
    w, batch = jnp.ones((2, 1)), (jnp.diag(jnp.array([1.0, 3.0])), jnp.zeros((2, 1)))
    layout = kron_layout(OBJECTIVE, w, batch)
    tx = build(layout=layout, objective=OBJECTIVE, momentum=0.0, **options)

    def step(carry, _):
        w, state = carry
        loss, gradient = jax.value_and_grad(OBJECTIVE)(w, batch)
        updates, state = tx.update(gradient, state, w, batch=batch)
        return (w + updates, state), (loss, gradient, updates, state)

    @jax.jit
    def run(w):
        return jax.lax.scan(step, (w, tx.init(w)), length=60)[1]

    return run(w)


def test_mkor_trains_and_updates_its_inverses_at_intervals():
    every_five = lambda count: 5
    losses, _, _, state = training(mkor, learning_rate=0.1, curvature_every=every_five)
    assert losses[-1] < 1e-2 * losses[0]
    inverse = state[0].inner_state.blocks[""].preconditioner.left.matrix
    changes = 1 + np.flatnonzero(np.any(inverse[1:] != inverse[:-1], axis=(1, 2, 3)))
    np.testing.assert_array_equal(changes, np.arange(5, 60, 5))
    np.testing.assert_array_equal(state[0].inner_state.num_refreshes, 1 + np.arange(60) // 5)


def test_mkor_h_switches_where_the_loss_has_stopped_falling():
    options = {"curvature_every": 1, "patience": 5}
    # At a rate of almost zero nothing falls.
    _, gradients, updates, states = training(mkor_h, learning_rate=RATE, **options)
    has_switched = states[0].has_switched
    np.testing.assert_array_equal(has_switched, np.arange(60) >= 5)
    np.testing.assert_allclose(updates[5:], -RATE * gradients[5:], rtol=1e-6)
    assert np.all(np.abs(updates[:5] / RATE + gradients[:5]).max(axis=(1, 2)) > 0.01)
    counts = states[0].inner_state.count
    np.testing.assert_array_equal(counts, np.minimum(1 + np.arange(60), 5))
    inner = jax.tree.map(lambda x: x[4:], states[0].inner_state)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, x[:1].repeat(len(x), 0)), inner)


def test_mkor_h_goes_on_where_the_loss_falls():
    options = {"curvature_every": 1, "patience": 5}
    losses, _, _, states = training(mkor_h, learning_rate=0.02, **options)
    assert np.all(np.diff(losses) < 0)
    assert not np.any(states[0].has_switched)
    np.testing.assert_array_equal(states[0].inner_state.count, 1 + np.arange(60))


@functools.cache
def watching():
    """Signs until three flat steps, for two sequences of losses at once."""
    tx = until_plateau(optax.scale_by_sign(), patience=3)
    gradient = jnp.array([3.0, -2.0])

    def step(state, loss):
        updates, state = tx.update(gradient, state, value=loss)
        return state, (updates, state)

    return jax.jit(jax.vmap(lambda losses: jax.lax.scan(step, tx.init(gradient), losses)[1]))


def test_members_of_a_batch_switch_one_by_one_and_noise_ends_no_progress():
    falling = 0.9 ** np.arange(20) * (1 + 0.02 * np.sin(7 * np.arange(20)))
    flat = np.r_[5.0, np.full(19, 4.0)]
    flat[2:6] = 4.0, np.nan, np.inf, 4.0
    updates, states = watching()(jnp.stack([falling, flat]))
    np.testing.assert_array_equal(updates[0], np.tile([1.0, -1.0], (20, 1)))
    # The averages of the flat sequence meet only once the first loss is forgotten; what is not
    # finite is in none of them.
    np.testing.assert_array_equal(states.averages.num_losses[:, -1], [20, 18])
    assert np.all(np.isfinite(states.averages.slow))
    rising = jnp.stack([jnp.arange(20.0), -jnp.arange(20.0) - 1])
    updates, states = watching()(rising)
    np.testing.assert_array_equal(states.has_switched[0], np.arange(20) >= 3)
    np.testing.assert_array_equal(updates[0, 3:], np.tile([3.0, -2.0], (17, 1)))
    # A loss below zero that falls makes progress.
    assert not np.any(states.has_switched[1])


def test_the_loss_is_that_of_the_objective_where_none_is_passed():
    w, batch = jnp.ones((2, 1)), (jnp.eye(2), jnp.zeros((2, 1)))
    tx = until_plateau(optax.scale_by_sign(), OBJECTIVE)
    of_batch = tx.update(w, tx.init(w), w, batch=batch)
    of_value = tx.update(w, tx.init(w), w, value=OBJECTIVE(w, batch))
    jax.tree.map(np.testing.assert_array_equal, of_batch, of_value)
    assert of_batch[1].averages.fast > 0
