"""PSGD: fits to momentum, gradients and Hessian products; Kronecker, dense, diagonal, low rank.

References are the NumPy transcriptions in `published_matrices.py`, which are passed our probes.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_matrices as published
import pytest

import curvax
from curvax.optim import (
    HessianPair,
    hessian_pairs,
    psgd,
    psgd_interval,
    rms_at_most,
    scale_by_psgd,
    unscaled,
)
from curvax.optim._psgd import draw_probe
from curvax.optim._psgd_groups import norm_bound

SHAPE = (5, 4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_eigenvalues(values, seed=0):
    """A symmetric matrix, and the inverse of its absolute value."""
    q = np.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    return (q * values) @ q.T, (q / np.abs(values)) @ q.T


def run(rule, params, inputs, update, state=None):
    """`update(state, input) -> (updates, state)` over all inputs, compiled once."""

    @jax.jit
    def scan(state, inputs):
        return jax.lax.scan(lambda s, x: update(s, x)[::-1], state, inputs)

    state, updates = scan(rule.init(params) if state is None else state, inputs)
    return updates, state


def whiten(rule, gradients):
    """The updates for gradients along the leading axis, and the state after them."""
    gradients = jnp.asarray(gradients)
    return run(rule, gradients[0], gradients, lambda s, g: rule.update(g, s))


def fit(build, hessian, rates):
    """The state after fits to products of a d x d matrix with drawn probes, by `build(rate)`."""
    size, hessian = len(hessian), jnp.asarray(hessian)

    def update(state, key_and_rate):
        key, rate = key_and_rate
        v = jax.random.normal(key, (1, size, 1), hessian.dtype)
        pair = {"params": HessianPair(v, hessian @ v)}
        return build(rate).update(jnp.ones(size, hessian.dtype), state, curvature=pair)

    keys = jax.random.split(jax.random.key(0), len(rates))
    return run(build(1.0), jnp.zeros(size, hessian.dtype), (keys, jnp.asarray(rates)), update)[1]


def fitting(size, **options):
    """`build(rate)` of a rule without averages and limits, for all params as one vector."""
    layout = curvax.kron.vector_layout(jnp.zeros(size))
    return lambda rate: scale_by_psgd(
        layout, b1=0.0, fit_rate=rate, fit_to="hessian", scale=unscaled(), **options
    )


def preconditioner(build, state, size):
    """P as a matrix, of a rule without averages and limits."""
    rows = jax.vmap(lambda e: build(1.0).update(e, state)[0])(jnp.eye(size))
    return np.asarray(rows)


def probes_of(num_steps, shape, name="", seed=0, dtype=float):
    like = jnp.zeros(shape, dtype)
    return np.stack([draw_probe(seed, jnp.int32(t), name, like) for t in range(num_steps)])


def first_scale(h, v):
    """The multiple of the identity that fits a pair best."""
    return np.sqrt(np.linalg.norm(v) / np.linalg.norm(h))


def only(blocks):
    (block,) = blocks.values()
    return block.preconditioner


# --- transcriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit_to", "max_dim", "decay"), [("momentum", 10, 0.0), ("gradient", 4, 0.9)]
)
def test_whitening_equals_its_transcription_on_a_stack(x64, fit_to, max_dim, decay):
    """A stack of two, in 20 steps of which every second fits; sides over the limit are diagonal."""
    gradients = normal(20, 2, *SHAPE) * np.logspace(-1, 1, 5)[:, None]
    layout = curvax.matrix_layout(jnp.asarray(gradients[0]), axes={"": "sio"}, max_dim=max_dim)
    rule = scale_by_psgd(
        layout, fit_rate=0.7, refresh_every=2, fit_to=fit_to, bound_decay=decay, seed=3
    )
    updates, state = whiten(rule, gradients)
    probes = list(probes_of(20, (2, *SHAPE), seed=3))
    probes[1::2] = [None] * 10
    for s in range(2):
        noise = 2**-11.5 * np.mean(np.abs(gradients[0, s]))
        scale = first_scale(gradients[0, s] + noise * probes[0][s], probes[0][s])
        expected = published.psgd_kron(
            gradients[:, s], [None if v is None else v[s] for v in probes], step=0.7,
            norm="power", fit=fit_to, max_size=max_dim, beta=decay, balance_at=(4, 8), scale=scale,
        )  # fmt: skip
        np.testing.assert_allclose(updates[:, s], expected, rtol=1e-12, atol=1e-12)
    assert state.info.num_failures == {"": 0}


def test_a_kronecker_fit_to_hessian_products_equals_its_transcription(x64):
    h, v = normal(10, *SHAPE), normal(10, *SHAPE, seed=1)
    rule = scale_by_psgd(fit_rate=0.5, fit_to="hessian", bound_decay=0.0)

    def update(state, pair):
        pair = {"": HessianPair(*(x[None] for x in pair))}
        return rule.update(jnp.ones(SHAPE), state, curvature=pair)

    _, state = run(rule, jnp.zeros(SHAPE), (jnp.asarray(v), jnp.asarray(h)), update)
    factors = first_scale(h[0], v[0]) * np.eye(5), np.eye(4)
    for pair in zip(h, v, strict=True):
        factors, _ = published.psgd_kron_fit(factors, *pair, step=0.5, norm="power")
    Q = only(state.blocks)
    ours, theirs = np.kron(Q.left.matrix[0], Q.right.matrix[0]), np.kron(*factors)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_vector_forms_equal_their_transcriptions(x64, structure):
    """One vector of all params, of two leaves."""
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    layout = curvax.kron.vector_layout(params, structure)
    rule = scale_by_psgd(layout, fit_rate=0.8, fit_to="hessian", bound_decay=0.9)
    v, h = normal(15, 7), normal(15, 7, seed=1)

    def update(state, pair):
        pair = {"params": HessianPair(*(x[None, :, None] for x in pair))}
        return rule.update(params, state, curvature=pair)

    _, state = run(rule, params, (jnp.asarray(v), jnp.asarray(h)), update)
    init = first_scale(h[0], v[0])
    if structure == "full":
        ours, theirs = (
            only(state.blocks).left.matrix,
            published.psgd_dense(h, v, step=0.8, init=init),
        )
    else:
        ours = only(state.blocks).left.entries
        theirs = published.psgd_diagonal(h, v, step=0.8, beta=0.9, init=init)
    np.testing.assert_allclose(ours[0], theirs[-1], rtol=1e-12, atol=1e-12)


def test_the_interval_fits_about_as_often_as_the_counter():
    steps = jnp.arange(6000)
    ours = np.asarray(steps % psgd_interval()(steps) == 0)
    theirs = np.array(published.psgd_schedule(6000))
    assert ours[:501].all() and theirs[:501].all()
    for part in (slice(501, 2000), slice(2000, 4000), slice(4000, 6000)):
        assert abs(ours[part].sum() / theirs[part].sum() - 1) < 0.1


# --- where fits end -------------------------------------------------------------------------------


def test_dense_fits_converge_linearly_to_the_inverse(x64):
    hessian = normal(20, 20)
    hessian = hessian @ hessian.T / 20 + 0.1 * np.eye(20)
    build = fitting(20)
    P = preconditioner(build, fit(build, hessian, np.ones(3000)), 20)
    error = np.linalg.norm(P @ hessian @ hessian @ P - np.eye(20)) / np.sqrt(20)
    assert error < 1e-4
    np.testing.assert_allclose(P, np.linalg.inv(hessian), rtol=0, atol=1e-3)


def test_an_indefinite_hessian_gives_the_inverse_of_its_absolute_value(x64):
    hessian, expected = with_eigenvalues(np.array([3.0, 1.0, -1.0, -0.4]))
    build = fitting(4)
    # Products with an indefinite matrix keep the noise of the probes: smaller and smaller steps.
    P = preconditioner(build, fit(build, hessian, np.geomspace(0.3, 0.001, 4000)), 4)
    np.testing.assert_allclose(P, expected, rtol=0, atol=0.05 * expected.max())


def test_low_rank_is_exact_on_diagonal_plus_rank_one(x64):
    u = normal(10)
    hessian = np.diag(np.logspace(-0.5, 0.5, 10)) + np.outer(u, u)
    build = fitting(10, rank=1)
    P = preconditioner(build, fit(build, hessian, np.full(2500, 0.5)), 10)
    np.testing.assert_allclose(P, np.linalg.inv(hessian), rtol=0, atol=1e-4)


def test_whitening_of_kronecker_gradients_is_the_inverse_root(x64):
    """vec V ~ N(0, A x B): P = (A x B)^-1/2 up to a number."""
    (A, A_inverse), (B, B_inverse) = (
        with_eigenvalues(np.array([4.0, 1.0, 0.3]), 1),
        with_eigenvalues(np.array([2.0, 0.2]), 2),
    )
    root_a, root_b = np.linalg.cholesky(A), np.linalg.cholesky(B)
    gradients = jnp.asarray(root_a @ normal(4000, 3, 2) @ root_b.T)
    build = lambda rate: scale_by_psgd(
        b1=0.0, fit_rate=rate, refresh_every=1, fit_to="gradient", scale=unscaled()
    )
    inputs = gradients, jnp.geomspace(0.3, 0.001, 4000)
    update = lambda state, x: build(x[1]).update(x[0], state)
    _, state = run(build(1.0), gradients[0], inputs, update)
    Q = only(state.blocks)
    P = np.kron(*(np.asarray(q.matrix[0].T @ q.matrix[0]) for q in (Q.left, Q.right)))
    values, vectors = np.linalg.eigh(np.kron(A_inverse, B_inverse))
    expected = (vectors * np.sqrt(values)) @ vectors.T
    P, expected = P / np.trace(P), expected / np.trace(expected)
    np.testing.assert_allclose(P, expected, rtol=0, atol=0.05 * expected.max())


def test_diagonal_and_absent_sides(x64):
    """V = diag(l) Z: the diagonal side becomes 1 / l, the identity stays."""
    scales = np.array([3.0, 1.0, 0.2])
    gradients = scales[:, None] * normal(1500, 3, 4)
    layout = curvax.matrix_layout(jnp.zeros((3, 4))).edit(
        "", a_structure="diagonal", g_structure="identity"
    )
    rule = scale_by_psgd(layout, b1=0.0, fit_rate=0.03, refresh_every=1, scale=unscaled())
    updates, state = whiten(rule, gradients)
    P = np.asarray(only(state.blocks).left.entries[0]) ** 2
    np.testing.assert_allclose(P * scales, 1, rtol=0, atol=0.2)
    np.testing.assert_allclose(updates[-1], P[:, None] * gradients[-1], rtol=1e-12)
    assert only(state.blocks).right == ()


def test_the_diagonal_of_a_triangle_stays_positive():
    """Whatever the probes are, for any rate below 1; so Q can be inverted."""
    h = np.logspace(-3, 3, 60)[:, None, None] * normal(60, *SHAPE)
    rule = scale_by_psgd(b1=0.0, fit_rate=0.99, refresh_every=1, fit_to="gradient", bound_decay=0.0)
    _, state = whiten(rule, np.float32(np.random.default_rng(1).permutation(h)))
    Q = only(state.blocks)
    for side in (Q.left, Q.right):
        matrix = np.asarray(side.matrix[0])
        assert (np.diag(matrix) > 0).all() and not np.tril(matrix, -1).any()
    assert state.info.num_failures == {"": 0}


def test_the_bound_of_the_norm(x64):
    S = normal(4, 6, 6)
    S = S @ S.transpose(0, 2, 1)
    ours, norms = np.asarray(norm_bound(jnp.asarray(S))), np.linalg.norm(S, 2, axis=(1, 2))
    assert (ours <= norms * (1 + 1e-12)).all() and (ours >= 0.7 * norms).all()
    assert (ours >= np.diagonal(S, axis1=1, axis2=2).max(axis=1)).all()
    np.testing.assert_allclose(ours[0], published._spectral_norm(S[0], "power"), rtol=1e-12)
    assert not np.asarray(norm_bound(jnp.zeros((1, 3, 3)))).any()


# --- the rule -------------------------------------------------------------------------------------

PARAMS = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3), "c": jnp.zeros(())}
GRADIENTS = jax.tree.map(lambda x: jnp.asarray(normal(6, *x.shape), jnp.float32), PARAMS)


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def test_vectors_have_a_diagonal_of_their_own_unless_there_is_a_fallback():
    state = scale_by_psgd().init(PARAMS)
    sizes = {name: block.statistics.momentum.shape for name, block in state.blocks.items()}
    assert sizes == {"w": (1, 4, 3), "b": (1, 3, 1), "c": (1, 1, 1)}
    assert state.blocks["b"].preconditioner.left.entries.shape == (1, 3)
    rule = scale_by_psgd(fallback=optax.scale(7.0))
    updates, state = jax.jit(rule.update)(first(GRADIENTS), rule.init(PARAMS))
    assert list(state.blocks) == ["w"]
    np.testing.assert_allclose(updates["b"], 7 * GRADIENTS["b"][0], rtol=1e-6)


def test_leaves_that_are_left_alone_by_choice_stay_as_they_are():
    layout = curvax.matrix_layout(PARAMS).edit("['b']", kind="identity")
    rule = scale_by_psgd(layout)
    updates, _ = jax.jit(rule.update)(first(GRADIENTS), rule.init(PARAMS))
    chex.assert_trees_all_equal(updates["b"], GRADIENTS["b"][0])
    assert not np.allclose(updates["c"], GRADIENTS["c"][0])


def test_two_seeds_have_two_noises_under_vmap_and_one_has_one():
    @jax.jit
    @jax.vmap
    def update(seed):
        rule = scale_by_psgd(seed=seed)
        return rule.update(first(GRADIENTS), rule.init(PARAMS))[0]

    updates = update(jnp.array([0, 1, 0]))
    for x in jax.tree.leaves(updates):
        chex.assert_trees_all_equal(x[0], x[2])
        assert not np.allclose(x[0], x[1], rtol=1e-4)


def test_blocks_and_steps_have_noises_of_their_own():
    like = jnp.zeros((1, 4, 3))
    probes = [
        draw_probe(seed, count, name, like)
        for seed, count, name in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    ]
    for k, v in enumerate(probes):
        assert not any(np.allclose(v, other) for other in probes[:k])


@pytest.mark.parametrize("rank", [None, 2])
def test_bfloat16_params_have_float32_state(rank):
    wide = {"w": GRADIENTS["w"][0]}
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    rule = scale_by_psgd(rank=rank)
    update = jax.jit(rule.update)
    updates, state = update(narrow, rule.init(narrow))
    expected, _ = update(jax.tree.map(jnp.float32, narrow), rule.init(wide))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    dtypes = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert dtypes == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_close(jax.tree.map(jnp.float32, updates), expected, rtol=1e-2)


@pytest.mark.parametrize("fit_to", ["momentum", "hessian"])
def test_nan_leaves_the_state_as_it_was(fit_to):
    pair = {
        "w": HessianPair(jnp.ones((1, 4, 3)), jnp.ones((1, 4, 3))),
        "b": HessianPair(jnp.ones((1, 3, 1)), jnp.ones((1, 3, 1))),
        "c": HessianPair(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1))),
    }
    curvature = pair if fit_to == "hessian" else None
    rule = scale_by_psgd(fit_to=fit_to)
    update = jax.jit(rule.update)
    good = first(GRADIENTS)
    _, state = update(good, rule.init(PARAMS), curvature=curvature)
    updates, after = update(good | {"c": jnp.array(jnp.nan)}, state, curvature=curvature)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(updates))
    info = state.info._replace(num_nonfinite=state.info.num_nonfinite + 1)
    chex.assert_trees_all_equal(after, state._replace(info=info))
    if fit_to == "hessian":  # a bad product: the step goes on with the last good P
        bad = pair | {"c": HessianPair(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), jnp.inf))}
        updates, after = update(good, state, curvature=bad)
        preconditioners = lambda s: {name: b.preconditioner for name, b in s.blocks.items()}
        chex.assert_trees_all_equal(preconditioners(after), preconditioners(state))
        assert after.info.num_nonfinite == 1 and after.num_refreshes == 1
        assert np.isfinite(updates["w"]).all()


def test_a_fit_that_overflows_is_counted_and_left_out():
    rule = scale_by_psgd(fit_to="hessian")
    update = jax.jit(rule.update)
    ones, huge = jnp.ones((1, 2, 2)), jnp.full((1, 2, 2), 1e30)
    _, state = update(ones[0], rule.init(ones[0]), curvature={"": HessianPair(ones, ones)})
    updates, after = update(ones[0], state, curvature={"": HessianPair(ones, huge)})
    chex.assert_trees_all_equal(only(after.blocks), only(state.blocks))
    assert after.info.num_failures == {"": 1} and np.isfinite(updates).all()


def test_gradients_of_zero_leave_q_as_it_is():
    rule = scale_by_psgd()
    _, state = rule.update(jnp.zeros((3, 2)), rule.init(jnp.zeros((3, 2))))
    np.testing.assert_array_equal(only(state.blocks).left.matrix[0], np.eye(3))


def test_steps_are_limited_and_short_ones_are_not():
    gradient = jnp.asarray(normal(3, 2), jnp.float32)
    steps = []
    for scale in (unscaled(), rms_at_most(0.5), rms_at_most(100.0)):
        rule = scale_by_psgd(scale=scale)
        steps.append(np.asarray(rule.update(gradient, rule.init(gradient))[0]))
    rms = np.sqrt(np.mean(steps[0] ** 2))
    assert 0.5 < rms < 100
    np.testing.assert_allclose(steps[1], steps[0] * 0.5 / rms, rtol=1e-5)
    np.testing.assert_array_equal(steps[2], steps[0])


# --- with an objective ----------------------------------------------------------------------------


def model(params, x):
    return x @ params["w"] + params["b"]


OBJECTIVE = curvax.Objective(model, curvax.losses.squared_error())
LINEAR = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
INPUTS = jnp.asarray(normal(32, 3) * [3.0, 1.0, 0.3], jnp.float32)
BATCH = INPUTS, INPUTS @ jnp.asarray(normal(3, 2, seed=1), jnp.float32) + 1


def test_pairs_are_products_with_the_damped_hessian():
    pairs = hessian_pairs(OBJECTIVE, LINEAR, BATCH, jax.random.key(0), damping=0.5)
    probe = {"w": pairs["w"].probe[0], "b": pairs["b"].probe[0, :, 0]}
    product = curvax.hvp(OBJECTIVE, LINEAR, BATCH)(probe)
    expected = jax.tree.map(lambda hv, v: hv + 0.5 * v, product, probe)
    np.testing.assert_allclose(pairs["w"].product[0], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(pairs["b"].product[0, :, 0], expected["b"], rtol=1e-5)


@pytest.mark.parametrize("form", ["kronecker", "vector", "low rank"])
def test_newton_steps_solve_least_squares(form):
    layout = None if form == "kronecker" else curvax.kron.vector_layout(LINEAR)
    rank = 3 if form == "low rank" else None
    options = {"b1": 0.0, "fit_rate": 0.5, "refresh_every": 1, "max_kl": None}
    tx = psgd(0.3, OBJECTIVE, layout, rank=rank, **options)

    def update(state, _):
        params, inner = state
        updates, inner = tx.update(jax.grad(OBJECTIVE)(params, BATCH), inner, params, batch=BATCH)
        params = optax.apply_updates(params, updates)
        return OBJECTIVE(params, BATCH), (params, inner)

    start = LINEAR, tx.init(LINEAR)
    losses, _ = run(tx, LINEAR, jnp.arange(200), update, start)
    # The condition of this problem is about 100: gradient descent at its best is at 1e-2.
    assert losses[-1] < 1e-5 * losses[0]


def test_steps_with_an_objective_are_limited():
    gradient = jax.grad(OBJECTIVE)(LINEAR, BATCH)
    sizes = []
    for max_kl in (None, 1e-3):
        tx = psgd(0.5, OBJECTIVE, max_kl=max_kl)
        updates, _ = jax.jit(tx.update)(gradient, tx.init(LINEAR), LINEAR, batch=BATCH)
        sizes.append(-0.5 * optax.tree.vdot(gradient, updates))  # lr^2 g.u
    # u' P^-1 u is g.u for u = P g: a limit of 1e-3 makes u shorter by sqrt(1e-3 / g.u).
    assert sizes[0] > 2e-3
    np.testing.assert_allclose(sizes[1], np.sqrt(1e-3 * sizes[0]), rtol=1e-3)


def test_a_mask_has_the_pairs_of_its_part():
    rule = scale_by_psgd(fit_to="hessian")
    estimator = lambda params, batch, key: hessian_pairs(OBJECTIVE, params, batch, key)
    masked = optax.partition({"p": rule, "a": optax.adam(0.1)}, {"w": "p", "b": "a"})
    tx = curvax.estimating(masked, estimator)
    gradient = jax.grad(OBJECTIVE)(LINEAR, BATCH)
    _, state = tx.update(gradient, tx.init(LINEAR), LINEAR, batch=BATCH)
    inner = state.inner_state.inner_states["p"].inner_state
    assert list(inner.blocks) == ["w"] and inner.num_refreshes == 1


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_to": "curvature"}, "fit_to"),
        ({"fit_rate": 0.0}, r"fit_rate must lie in \(0, 1\]"),
        ({"fit_rate": 1.5}, r"fit_rate must lie in \(0, 1\]"),
        ({"b1": 1.0}, "b1 must lie"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"fit_to": "hessian", "refresh_every": 2}, "curvature_every"),
        ({"refresh_every": 0}, "refresh_every"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_psgd(**options)


def test_curvature_of_another_layout_or_kind():
    rule, w = scale_by_psgd(fit_to="hessian"), jnp.ones((3, 2))
    state = rule.init(w)
    x, wide = jnp.ones((1, 3, 2)), jnp.ones((1, 6, 1))
    with pytest.raises(ValueError, match="of another layout"):
        rule.update(w, state, curvature={"params": HessianPair(x, x)})
    with pytest.raises(ValueError, match=r"the product of a block \[1, 3, 2\]"):
        rule.update(w, state, curvature={"": HessianPair(x, wide)})
    with pytest.raises(TypeError, match="HessianPair"):
        rule.update(w, state, curvature={"": x})


def test_the_vector_layout_reads_all_params_in_order():
    params = {"a": jnp.arange(4.0).reshape(2, 2), "b": jnp.zeros((0, 3)), "c": jnp.array(9.0)}
    layout = curvax.kron.vector_layout(params)
    (x,) = curvax.kron.block_matrices(layout, params).values()
    np.testing.assert_array_equal(x[0, :, 0], [0, 1, 2, 3, 9])
    back = curvax.kron.with_block_matrices(layout, {"params": 2 * x}, params)
    chex.assert_trees_all_equal(back, jax.tree.map(lambda p: 2 * p, params))
    with pytest.raises(ValueError, match="structure"):
        curvax.kron.vector_layout(params, "triangular")
