"""Rules on matrices of the gradient: Shampoo, ASGO, SOAP, and the KL methods.

References are the NumPy transcriptions in `published_matrices.py`, written from the papers and the
authors' programs without a look at the library.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_matrices as published
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.optim import (
    MatrixBlock,
    MatrixMethod,
    adam_norm,
    exact_polar,
    momentum_norm,
    rms_norm,
    scale_by_matrices,
    unscaled,
)

SIDES = (5, 4)


def recorded(num_steps=30, shape=SIDES, seed=0):
    """Gradients whose rows and columns have scales that differ."""
    noise = np.random.default_rng(seed).normal(size=(num_steps, *shape))
    scales = np.outer(np.logspace(0, 1, shape[0]), np.logspace(-1, 0.5, shape[1]))
    return noise * scales


def run(rule, gradients):
    """The updates of all steps, and the state after them."""
    gradients = jax.tree.map(jnp.asarray, gradients)

    @jax.jit
    def scan(gradients):
        def step(state, gradient):
            updates, state = rule.update(gradient, state)
            return state, updates

        start = rule.init(jax.tree.map(lambda x: x[0], gradients))
        return jax.lax.scan(step, start, gradients)

    state, updates = scan(gradients)
    return jax.tree.map(np.asarray, updates), state


def first_bases(rule, gradients):
    """The bases after the first gradient; its null space leaves them open."""
    first = jnp.asarray(gradients[0])
    _, state = rule.update(first, rule.init(first))
    (block,) = state.blocks.values()
    return tuple(None if x is None else np.asarray(x[0]) for x in block.preconditioner.basis)


def assert_equal(updates, expected, tolerance=1e-12):
    for update, reference in zip(updates, expected, strict=True):
        np.testing.assert_allclose(
            update, reference, rtol=0, atol=tolerance * np.abs(reference).max()
        )


@pytest.mark.parametrize("every", [1, 3, 10])
def test_soap_equals_its_transcription(x64, every):
    gradients = recorded()
    rule = curvax.scale_by_soap(refresh_every=every)
    expected = published.soap(
        gradients, b1=0.95, b2=0.95, shampoo_beta=-1, eps=1e-8, every=every, max_dim=10,
        first_bases=first_bases(rule, gradients),
    )  # fmt: skip
    updates, _ = run(rule, gradients)
    assert not updates[0].any()
    assert_equal(updates, expected)


def test_soap_leaves_an_axis_over_the_limit_alone(x64):
    gradients = recorded(shape=(6, 3))
    layout = curvax.matrix_layout(jnp.asarray(gradients[0]), max_dim=4)
    rule = curvax.scale_by_soap(layout, b1=0.9, b2=0.99, shampoo_beta=0.8, refresh_every=3)
    expected = published.soap(
        gradients, b1=0.9, b2=0.99, shampoo_beta=0.8, eps=1e-8, every=3, max_dim=4
    )
    assert_equal(run(rule, gradients)[0], expected)


def test_soap_turns_with_the_gradients(x64):
    """SOAP(P G Q') = P SOAP(G) Q' for orthogonal P and Q."""
    gradients, rng = recorded(shape=(4, 4)), np.random.default_rng(1)
    P, Q = (np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(2))
    rule = curvax.scale_by_soap(refresh_every=3)
    turned = P @ run(rule, gradients)[0] @ Q.T
    assert_equal(run(rule, P @ gradients @ Q.T)[0], turned, 1e-10)


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("name", ["kl_shampoo", "kl_soap"])
def test_kl_methods_equal_their_transcriptions(x64, name, every):
    gradients = recorded()
    build = {"kl_shampoo": curvax.scale_by_kl_shampoo, "kl_soap": curvax.scale_by_kl_soap}[name]
    options = {"scale": unscaled()} if name == "kl_shampoo" else {}
    rule = build(b1=0.9, b2=0.98, eps=1e-14, init_factor=0.1, refresh_every=every, **options)
    expected = getattr(published, name)(
        gradients, b1=0.9, b2=0.98, eps=1e-14, every=every, init_factor=0.1, clamp=None,
        first_bases=first_bases(rule, gradients),
    )  # fmt: skip
    if name == "kl_soap":  # ours are free of bias, as SOAP's are
        corrections = [0, *(np.sqrt(1 - 0.98**t) / (1 - 0.9**t) for t in range(1, 30))]
        expected = [c * u for c, u in zip(corrections, expected, strict=True)]
    assert_equal(run(rule, gradients)[0], expected, 1e-12)


def test_kl_shampoo_finds_the_stationary_product(x64):
    """tr((L x R)^-1 F) = in out, with L and R of means over a set of gradients."""
    gradients = recorded(6, (3, 3))
    rule = curvax.scale_by_kl_shampoo(b2=0.9, refresh_every=1)
    state = rule.init(jnp.asarray(gradients[0]))
    update = jax.jit(rule.update)
    # Each in turn, many times over: averages over about ten steps come close to the mean.
    for _ in range(40):
        for gradient in gradients:
            _, state = update(jnp.asarray(gradient), state)
    (block,) = state.blocks.values()
    left, right = (np.asarray(x[0]) for x in block.preconditioner.values)
    P, Q = (np.asarray(x[0]) for x in block.preconditioner.basis)
    rotated = P.T @ gradients @ Q
    trace = np.mean(np.sum(rotated**2 / np.outer(left, right), axis=(1, 2)))
    assert abs(trace / 9 - 1) < 0.2
    # The gauge: neither side drifts.
    assert abs(left.mean() / right.mean() - 1) < 0.3


@pytest.mark.parametrize("root", [2, 4])
# The transcription's Adam sums where the statistics do; ours has a decay of its own.
@pytest.mark.parametrize(
    ("graft", "decay"), [("adam", 0.99), ("sgd", 0.99), ("sgd", 1), (None, 0.99), (None, 1)]
)
def test_shampoo_equals_its_transcription(x64, root, graft, decay):
    gradients = recorded(20, (4, 4))
    scale = {"adam": adam_norm(0.99, 1e-8), "sgd": momentum_norm(), None: unscaled()}[graft]
    rule = curvax.scale_by_shampoo(b2=decay, eps=1e-6, root=root, refresh_every=3, scale=scale)
    expected = published.shampoo(
        gradients, b1=0.9, b2=decay, exponent=1 / root, epsilon=1e-6, every=3, graft=graft,
        graft_eps=1e-8, start=0, first_step=0,
    )  # fmt: skip
    # Roots of statistics that one gradient fills in part: the smallest eigenvalues are rounding.
    assert_equal(run(rule, gradients)[0], expected, 1e-11)


def test_asgo_equals_its_transcription(x64):
    # In units in which eps is nothing: the transcription adds it to averages with their bias.
    for shape in ((5, 3), (3, 5)):
        gradients = 1e3 * recorded(shape=shape)
        expected = published.asgo(gradients, b1=0.9, b2=0.8, eps=1e-10)
        assert_equal(run(curvax.scale_by_asgo(), gradients)[0], expected, 1e-9)


def test_one_gradient_gives_its_polar_factor(x64):
    gradient = recorded(1)
    rule = curvax.scale_by_shampoo(b1=0.0, b2=0.0, eps=0.0, scale=unscaled())
    for g in (gradient, np.swapaxes(gradient, 1, 2)):
        u, _, v = np.linalg.svd(g[0], full_matrices=False)
        assert_equal(run(rule, g)[0], [u @ v], 1e-6)  # L or R is singular: rounding damps it


def test_square_roots_whiten_kronecker_data(x64):
    """With vec G ~ N(0, A x B) Shampoo's `(L x R / tr L)^-1/2` is `(A x B)^-1/2` on average."""
    rng = np.random.default_rng(0)
    A, B = np.diag([1.0, 0.1, 0.01]), np.diag([4.0, 0.5])
    gradients = np.sqrt(A) @ rng.normal(size=(4000, 3, 2)) @ np.sqrt(B)
    whitened = np.linalg.inv(np.sqrt(A)) @ gradients[0] @ np.linalg.inv(np.sqrt(B))

    def cosine(root):
        rule = curvax.scale_by_shampoo(
            b1=0.0, b2=1, root=root, refresh_every=4000, scale=unscaled()
        )
        _, state = run(rule, gradients)
        update, _ = rule.update(jnp.asarray(gradients[0]), state)  # with the second refresh
        product = np.sum(np.asarray(update) * whitened)
        return product / np.linalg.norm(update) / np.linalg.norm(whitened)

    assert cosine(2) > 0.999
    assert cosine(4) < 0.95  # the fourth root of an average whitens half


# -- matrices of a model -------------------------------------------------------------------------


def test_stacked_matrices_are_stepped_one_by_one(x64):
    gradients = np.stack([recorded(seed=0), recorded(seed=1)], axis=1)
    layout = curvax.matrix_layout(jnp.asarray(gradients[0]), axes="sio")
    rules = {
        "soap": functools.partial(curvax.scale_by_soap, refresh_every=2),
        "kl_soap": functools.partial(curvax.scale_by_kl_soap, refresh_every=2),
        "shampoo": functools.partial(curvax.scale_by_shampoo, refresh_every=2),
    }
    for build in rules.values():
        together, _ = run(build(layout), gradients)
        for k in range(2):
            alone, _ = run(build(), gradients[:, k])
            assert_equal(together[1:, k], alone[1:], 1e-8)


def test_tiles_are_blocks_of_their_own(x64):
    gradients = recorded(10, (6, 4))
    like = jnp.asarray(gradients[0])
    whole, _ = run(curvax.scale_by_shampoo(eps=1e-6), gradients)
    same, _ = run(
        curvax.scale_by_shampoo(curvax.matrix_layout(like, block_size=6), eps=1e-6), gradients
    )
    assert_equal(same, whole)
    tiled, _ = run(
        curvax.scale_by_shampoo(curvax.matrix_layout(like, block_size=4), eps=1e-6), gradients
    )
    for rows in (slice(0, 4), slice(4, 6)):
        alone, _ = run(curvax.scale_by_shampoo(eps=1e-6), gradients[:, rows])
        assert_equal(tiled[:, rows], alone)
    assert np.abs(tiled - whole).max() > 1e-3 * np.abs(whole).max()


def test_entries_in_no_matrix_follow_the_fallback():
    gradients = {
        "w": recorded(5).astype(np.float32),
        "b": recorded(5, (3, 1))[..., 0].astype(np.float32),
    }
    updates, _ = run(curvax.scale_by_soap(b1=0.9, b2=0.95), gradients)
    adam, _ = run(optax.scale_by_adam(0.9, 0.95), gradients["b"])
    np.testing.assert_allclose(updates["b"], adam, rtol=1e-6)
    plain, _ = run(curvax.scale_by_soap(fallback=optax.identity()), gradients)
    np.testing.assert_array_equal(plain["b"], gradients["b"])


def test_the_layout_of_a_model_gives_its_matrices():
    """A convolution, a bias and a fused kernel: blocks are those of the model, without biases."""

    def model(params, x):
        h = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        first, second = jnp.split(h.mean((1, 2)) @ params["fused"] + params["b"], 2, axis=1)
        return jnp.tanh(first) * second

    objective = curvax.Objective(model, curvax.losses.squared_error())
    shapes = {"conv": (3, 3, 2, 4), "fused": (4, 6), "b": (6,)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    batch = jnp.ones((2, 5, 5, 2)), jnp.ones((2, 3))
    layout = curvax.kron_layout(objective, params, batch)
    state = curvax.scale_by_shampoo(layout).init(params)
    sizes = {
        name: (block.statistics.left.total.shape, block.statistics.right.total.shape)
        for name, block in state.blocks.items()
    }
    assert sizes["['conv']"] == ((1, 18, 18), (1, 4, 4))
    assert "['b']" not in str(list(sizes))
    assert jax.tree.leaves(state.fallback_state.mu)[0].shape == (6,)


RULES = {
    "shampoo": curvax.scale_by_shampoo,
    "asgo": curvax.scale_by_asgo,
    "soap": curvax.scale_by_soap,
    "kl_shampoo": curvax.scale_by_kl_shampoo,
    "kl_soap": curvax.scale_by_kl_soap,
}
every_rule = pytest.mark.parametrize("build", RULES.values(), ids=RULES)


def regression(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y) ** 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@every_rule
def test_eight_devices_equal_one(x64, build, axis_type):
    """Square kernels, whose gradients have full rank: nothing is left to rounding."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        name: jax.random.normal(key, (8, 8))
        for name, key in zip(("first", "second"), keys, strict=False)
    }
    batch = tuple(jax.random.normal(key, (32, 8)) for key in keys[2:])
    tx = optax.chain(build(refresh_every=2), optax.scale(-0.01))

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(regression)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    def train(params, batch):
        state = tx.init(params)
        for _ in range(5):
            params, state = step(params, state, batch)
        return params

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    # Explicitly sharded params would need products that say how their results are.
    of_params = (None, "model") if axis_type == AxisType.Auto else ()
    sharded = {name: put(x, *of_params) for name, x in params.items()}
    got = train(sharded, tuple(put(x, "data") for x in batch))
    expected = train(params, batch)
    # A millionth of a step: of entries that are nearly zero in the first basis, all but rounding,
    # Adam's quotient makes steps as long as of any other.
    for name, x in expected.items():
        np.testing.assert_allclose(np.asarray(got[name]), x, rtol=0, atol=1e-8)


@every_rule
def test_in_masks_and_partitions(build):
    """A part of params is stepped as it would be alone; a part without a matrix is no error."""
    gradients = {"w": recorded(4).astype(np.float32), "b": np.ones((4, 3), np.float32)}
    alone, _ = run(build(), {"w": gradients["w"]})
    masked, _ = run(optax.masked(build(), {"w": True, "b": False}), gradients)
    parts = {"rule": build(), "vectors": build()}
    parted, _ = run(optax.partition(parts, {"w": "rule", "b": "vectors"}), gradients)
    for updates in (masked, parted):
        np.testing.assert_allclose(updates["w"], alone["w"], rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(masked["b"], gradients["b"])


@every_rule
def test_a_vmapped_refresh_stays_conditional(build):
    gradients = jnp.asarray(recorded(3), jnp.float32)
    rule = build(refresh_every=3)
    states = jax.vmap(rule.init)(gradients)
    update = jax.jit(jax.vmap(rule.update))
    assert "conditional" in update.lower(gradients, states).compile().as_text()


# -- numbers that are not finite, precision, compilation -----------------------------------------


@pytest.mark.parametrize("build", [curvax.scale_by_shampoo, curvax.scale_by_soap])
def test_a_gradient_whose_squares_overflow_is_left_out(build):
    gradients = jnp.asarray(recorded(4, (4, 3)), jnp.float32)
    rule = build(refresh_every=1)
    _, before = run(rule, gradients)
    updates, after = jax.jit(rule.update)(jnp.full((4, 3), 1e30), before)
    assert not updates.any()
    assert after.info.num_nonfinite == 1
    restored = after._replace(info=before.info)
    jax.tree.map(np.testing.assert_array_equal, before, restored)


def test_a_refresh_that_fails_keeps_the_last_good_one():
    """A method that divides by its number of steps minus 2, and fails in that one."""

    def average(block, state, V, count):
        return state._replace(statistics=count)

    def refresh(layout, statistics, roots):
        return {name: roots[name] + 1.0 / (count - 2) for name, count in statistics.items()}

    method = MatrixMethod(
        init=lambda block, V: MatrixBlock(jnp.int32(0), jnp.float32(0)),
        average=average,
        step=lambda state, V, count: (state.preconditioner * V, state),
        refresh=refresh,
    )
    gradients = np.ones((4, 2, 2), np.float32)
    for every in (1, lambda count: 1):
        updates, state = run(scale_by_matrices(None, method, every), gradients)
        assert updates[:, 0, 0].tolist() == [-0.5, -1.5, -1.5, -0.5]
        assert list(state.info.num_failures.values()) == [1]
        assert state.info.num_nonfinite == 0


@every_rule
def test_zero_gradients(build):
    """Zero steps; a matrix that comes to life later, or rests for long, goes on as others do."""
    normal = np.asarray(recorded(400, (4, 3)), np.float32)
    dead = np.zeros_like(normal[:12])
    updates, state = run(build(), dead)
    assert not updates.any()
    assert state.info.num_nonfinite == 0
    later, state = run(build(refresh_every=1), np.concatenate([dead, normal[:40]]))
    usual, _ = run(build(refresh_every=1), normal[:40])
    assert 0.3 < np.linalg.norm(later[-10:]) / np.linalg.norm(usual[-10:]) < 3
    rest = np.zeros((300, 4, 3), np.float32)
    resting, state = run(build(refresh_every=1), np.concatenate([normal[:50], rest, normal[:50]]))
    assert np.isfinite(resting).all()
    assert np.abs(resting[350:]).max() < 10 * np.abs(resting[20:50]).max()
    assert state.info.num_nonfinite == 0
    assert not any(state.info.num_failures.values())


@pytest.mark.parametrize("name", ["soap", "kl_shampoo", "kl_soap", "asgo"])
def test_steps_do_not_depend_on_the_unit(name):
    gradients = np.asarray(recorded(30, (4, 3)), np.float32)
    # eps is an absolute number, and small in both units.
    usual, _ = run(RULES[name](refresh_every=1), 1e3 * gradients)
    larger, _ = run(RULES[name](refresh_every=1), 2.0**20 * 1e3 * gradients)
    np.testing.assert_allclose(larger, usual, rtol=2e-2, atol=2e-2 * np.abs(usual).max())


def test_kl_shampoo_after_a_jump():
    """Steps stay short, and find back to their size within tens of steps."""
    gradients = np.asarray(recorded(200, (4, 3)), np.float32)
    gradients[100:] *= 1e5
    updates, _ = run(curvax.scale_by_kl_shampoo(refresh_every=1), gradients)
    rms = np.sqrt(np.mean(updates**2, axis=(1, 2)))
    assert rms.max() < 1.2
    assert 0.3 < rms[-50:].mean() / rms[50:100].mean() < 3


def test_a_side_that_is_left_as_it_is():
    """One-sided KL-Shampoo: rows of any scale come out as they are beside each other."""
    gradients = np.asarray(recorded(200, (4, 3)), np.float32)
    layout = curvax.matrix_layout(jnp.asarray(gradients[0])).edit("", a_structure="identity")
    rule = curvax.scale_by_kl_shampoo(layout, b1=0.0, b2=0.9, refresh_every=1)
    updates, _ = run(rule, gradients)
    rms = np.sqrt(np.mean(updates[50:] ** 2, axis=0))
    rows = rms.mean(axis=1)
    np.testing.assert_allclose(rows / rows[0], np.logspace(0, 1, 4), rtol=0.3)
    columns = rms.mean(axis=0)
    assert columns.max() / columns.min() < 1.3


def test_keys_with_dots_are_no_other_matrix():
    params = {
        "a.b": jnp.diag(jnp.array([3.0, 0.1])),
        "a": {"b": jnp.array([[0.0, 1.0], [5.0, 0.0]])},
    }
    rule = curvax.scale_by_muon(polar=exact_polar())
    updates, state = rule.update(params, rule.init(params))
    np.testing.assert_allclose(updates["a"]["b"], [[0, 1], [1, 0]], atol=1e-5)
    np.testing.assert_allclose(updates["a.b"], np.eye(2), atol=1e-5)
    assert len(state.blocks) == 2


def test_overflow_outside_of_matrices_is_left_out_too():
    rule = curvax.scale_by_soap()
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    _, state = rule.update(params, rule.init(params))
    updates, after = rule.update(params | {"b": jnp.array([1e20, 1.0])}, state)
    assert not any(np.any(u) for u in updates.values())
    assert after.info.num_nonfinite == 1
    assert jnp.isfinite(after.fallback_state.nu["b"]).all()


def test_a_scale_gives_every_matrix_its_norm():
    gradients = np.stack([recorded(3), 100 * recorded(3, seed=1)], axis=1).astype(np.float32)
    layout = curvax.matrix_layout(jnp.asarray(gradients[0]), axes="sio")
    updates, _ = run(curvax.scale_by_shampoo(layout, scale=rms_norm(0.3)), gradients)
    rms = np.sqrt(np.mean(updates**2, axis=(2, 3)))
    np.testing.assert_allclose(rms, 0.3, rtol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="root must be at least 1"):
        curvax.scale_by_shampoo(root=0)
    with pytest.raises(ValueError, match="b2 must lie"):
        curvax.scale_by_soap(b2=1.0)
    with pytest.raises(ValueError, match="refresh_every"):
        curvax.scale_by_kl_shampoo(refresh_every=0)
    layout = curvax.matrix_layout({"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="the layout is of other params"):
        curvax.scale_by_soap(layout).init({"w": jnp.ones((3, 2))})


def test_in_nnx_optimizer_without_a_layout():
    """Its containers print other paths at `init` than at `update`; matrices are the same."""
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, curvax.muon(0.1), wrt=nnx.Param)
    before = module.kernel[...]

    def loss(module):
        return jnp.sum(module(jnp.ones((2, 4))) ** 2)

    optimizer.update(module, nnx.grad(loss)(module))
    # A step of a polar factor of rank 1.
    step = np.linalg.norm(module.kernel[...] - before)
    assert 0.05 < step < 0.15
