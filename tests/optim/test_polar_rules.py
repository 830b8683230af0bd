"""Rules that take polar factors: Muon, Newton-Muon, FISMO.

References are the NumPy transcriptions in `published_matrices.py`, written from the papers and the
authors' programs without a look at the library, and optax's Muon.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_matrices as published
import pytest
from optax.contrib import MuonDimensionNumbers

import curvax
from curvax.kron import WeightedMean, input_factors, without_lookups
from curvax.kron._layout import Leaf
from curvax.optim import (
    exact_polar,
    fismo,
    muon,
    newton_muon,
    newton_schulz,
    polar_express,
    scale_by_fismo,
    scale_by_muon,
    scale_by_newton_muon,
    shape_norm,
)

MUON = (3.4445, -4.7750, 2.0315)
SHAPES = [(5, 3), (3, 5), (4, 4)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def recorded(num_steps=12, shape=(5, 4), seed=0):
    """Gradients whose rows and columns have scales that differ."""
    scales = np.outer(np.logspace(0, 1, shape[0]), np.logspace(-1, 0.5, shape[1]))
    return normal(num_steps, *shape, seed=seed) * scales


def run(rule, gradients, curvatures=None, params=None):
    """The updates of all steps, and the state after them."""
    gradients, curvatures = jax.tree.map(jnp.asarray, (gradients, curvatures))

    @jax.jit
    def scan(gradients, curvatures):
        def step(state, now):
            gradient, curvature = now
            updates, state = rule.update(gradient, state, params, curvature=curvature)
            return state, updates

        start = rule.init(jax.tree.map(lambda x: x[0], gradients))
        return jax.lax.scan(step, start, (gradients, curvatures))

    state, updates = scan(gradients, curvatures)
    return jax.tree.map(np.asarray, updates), state


def assert_equal(updates, expected, tolerance=1e-12):
    assert np.any(updates[-1])
    for update, reference in zip(updates, expected, strict=True):
        np.testing.assert_allclose(
            update, reference, rtol=0, atol=tolerance * np.abs(reference).max()
        )


# -- polar factors -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_equals_its_transcription(x64, shape):
    stack = normal(3, *shape) * np.array([1e-3, 1.0, 1e3])[:, None, None]
    steps = [(4.0, -6.0, 2.8), (2.0, -1.5, 0.5)]
    for coefficients in ([MUON] * 5, steps):
        polar = newton_schulz(coefficients, eps=1e-4)
        expected = [
            published.newton_schulz(x, coefficients, len(coefficients), 1e-4) for x in stack
        ]
        assert_equal(polar(jnp.asarray(stack)), expected, 1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_polar_factors(x64, shape):
    full, low_rank = normal(*shape), np.outer(normal(shape[0]), normal(shape[1], seed=1))
    stack = np.stack([full, 1e-200 * full, low_rank])
    factors = exact_polar()(jnp.asarray(stack))
    assert_equal(factors, [published.polar(x) for x in (full, full, low_rank)], 1e-13)
    of_members = jax.jit(jax.vmap(exact_polar()))(jnp.stack([stack, -stack]))
    assert_equal(of_members, [factors, -factors], 1e-13)
    converged = newton_schulz(polar_express(9), eps=0.0)(jnp.asarray(stack[:1]))
    assert_equal(converged, factors[:1], 1e-6)  # the margin of 1 % moves the fixed point by 8e-8


def test_polar_factors_of_zeros_are_zeros_and_tiny_matrices_have_some():
    x = normal(4, 3).astype(np.float32)
    stack = jnp.asarray(np.stack([x, np.float32(1e-30) * x, 0 * x]))
    for polar in (newton_schulz(eps=0.0), exact_polar()):
        alone, tiny, zero = polar(stack)
        np.testing.assert_allclose(tiny, alone, atol=1e-4)
        assert not zero.any()
    # The published form fades out far below eps.
    assert np.abs(newton_schulz()(stack)[1:]).max() < 1e-18


def test_a_matrix_that_is_not_finite_spoils_its_slice_alone():
    stack = jnp.asarray(normal(2, 4, 3)).at[0, 1, 1].set(jnp.nan)
    for polar in (newton_schulz(), exact_polar()):
        bad, good = polar(stack)
        assert jnp.isnan(bad).all() and jnp.isfinite(good).all()


def composed(coefficients, s):
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


def test_best_coefficients():
    """They keep what their docstring says, and no polynomial near them does better."""
    s = np.geomspace(1e-3, 1, 20_001)
    for num_steps, low, high in ((5, 0.86, 1.14), (6, 0.998, 1.002), (8, 1 - 1e-7, 1 + 1e-7)):
        mapped = composed(polar_express(num_steps), s)
        assert low < mapped.min() < mapped.max() < high
    muons = composed([MUON] * 5, s)
    assert muons.max() - muons.min() > 0.5  # Muon's do not converge

    ((a, b, c),) = polar_express(1, smallest=0.1)
    s = np.linspace(0.1 * 1.0, 1.01, 20_001)
    error = lambda a, b, c: np.abs(1 - composed([(a, b, c)], s)).max()
    best = error(a, b, c)
    extrema = np.diff(np.sign(np.diff(composed([(a, b, c)], s)))) != 0
    swings = 1 - composed([(a, b, c)], np.array([s[0], *s[1:-1][extrema], s[-1]]))
    np.testing.assert_allclose(swings, best * np.array([1, -1, 1, -1]), rtol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(300):
        changes = 1 + 0.02 * rng.normal(size=3)
        assert error(a * changes[0], b * changes[1], c * changes[2]) > best


def test_products_in_bfloat16():
    """Singular values move a little, none changes its sign; the result has the dtype of params."""
    u, v = (np.linalg.qr(normal(64, 64, seed=k))[0] for k in range(2))
    s = np.geomspace(2e-2, 1, 64)
    matrix = jnp.asarray((u * s) @ v.T, jnp.float32)[None]
    for coefficients, low, high in ((None, 0.55, 1.35), (polar_express(5), 0.75, 1.25)):
        options = {} if coefficients is None else {"coefficients": coefficients}
        factor = newton_schulz(**options, dtype=jnp.bfloat16)(matrix)
        assert factor.dtype == jnp.float32
        along = np.diag(u.T @ np.asarray(factor[0]) @ v)
        assert low < along.min() and along.max() < high
        exactly = newton_schulz(**options)(matrix)
        assert 1e-4 < np.abs(factor - exactly).max() < 0.1


def test_products_in_bfloat16_keep_long_directions_with_any_coefficients():
    """The best polynomials on a wide interval would map its middle to 0, and rounding past it."""
    u, v = (np.linalg.qr(normal(64, 64, seed=k))[0] for k in range(2))
    s = np.concatenate([np.geomspace(1e-5, 1e-2, 32), np.geomspace(0.05, 1, 32)])
    matrix = jnp.asarray((u * s) @ v.T, jnp.float32)[None]
    factor = newton_schulz(polar_express(10, 1e-5), dtype=jnp.bfloat16)(matrix)
    along = np.diag(u.T @ np.asarray(factor[0]) @ v)
    np.testing.assert_allclose(along[32:], 1, atol=0.03)


def test_bad_coefficients():
    with pytest.raises(ValueError, match=r"three numbers \(a, b, c\), got \(2.0, 1.0\)"):
        newton_schulz([(2.0, 1.0)])
    with pytest.raises(ValueError, match=r"three numbers.*got 3.4445"):
        newton_schulz(MUON)
    with pytest.raises(ValueError, match="smallest must lie between 0 and 1, got 1"):
        polar_express(5, smallest=1)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        polar_express(0)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        newton_schulz(eps=-1.0)


# -- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rms", [None, 0.2])
def test_muon_equals_its_transcription(x64, nesterov, rms):
    options = {"b": 0.9, "nesterov": nesterov}
    for shape in SHAPES[:2]:
        gradients = recorded(shape=shape)
        for polar, coefficients in ((None, MUON), (exact_polar(), None)):
            rule = scale_by_muon(polar=polar, scale=shape_norm(rms), **options)
            expected = published.muon(
                gradients, coefficients=coefficients, num_steps=5, consistent_rms=rms, **options
            )
            assert_equal(run(rule, gradients)[0], expected)


# Shapes, what optax calls the axes of their matrices, and what a layout does.
KERNELS = {
    "dense": ((5, 4), (0, 1), "io"),
    "wide": ((3, 7), (0, 1), "io"),
    "stacked": ((3, 4, 5), (1, 2), "sio"),
    "convolution": ((3, 3, 2, 4), ((0, 1, 2), 3), "iiio"),
    "to_heads": ((6, 2, 3), (0, (1, 2)), "ioo"),
    "from_heads": ((2, 3, 6), ((0, 1), 2), "iio"),
}


@pytest.mark.parametrize("rms", [None, 0.2])
def test_muon_equals_that_of_optax_on_kernels_of_all_kinds(x64, rms):
    """In float64: in float32 each is up to 2e-6 from that, by rounding that grows 485 times."""
    gradients = {
        name: normal(4, *shape, seed=k) for k, (name, (shape, _, _)) in enumerate(KERNELS.items())
    }
    params = {name: jnp.ones(x.shape[1:]) for name, x in gradients.items()}
    dimensions = {name: MuonDimensionNumbers(*axes) for name, (_, axes, _) in KERNELS.items()}
    theirs = optax.contrib.muon(
        0.5, weight_decay=0.1, muon_weight_dimension_numbers=dimensions, consistent_rms=rms
    )
    axes = {f"['{name}']": letters for name, (_, _, letters) in KERNELS.items()}
    layout = curvax.matrix_layout(params, axes)
    ours = muon(0.5, layout, scale=shape_norm(rms), weight_decay=0.1)
    updates, _ = run(ours, gradients, params=params)
    expected, _ = run(theirs_without_curvature(theirs), gradients, params=params)
    for name in gradients:
        np.testing.assert_allclose(updates[name], expected[name], atol=1e-12)


def theirs_without_curvature(tx):
    update = lambda updates, state, params, curvature=None: tx.update(updates, state, params)
    return optax.GradientTransformationExtraArgs(tx.init, update)


def test_two_learning_rates():
    """Both schedules count, and each part decays by its own; a leaf may be in a matrix in part."""
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "mixed": jnp.ones((3, 2))}
    gradients = {"w": normal(3, 2, 2), "b": normal(3, 2), "mixed": normal(3, 3, 2)}
    rates = jnp.array([0.5, 0.25, 0.125]), jnp.array([0.01, 0.02, 0.04])
    layout = first_rows_of_mixed(params)
    schedules = [functools.partial(lambda rate, count: rate[count], rate) for rate in rates]
    tx = muon(schedules[0], layout, fallback_learning_rate=schedules[1], weight_decay=0.1)
    updates, _ = run(tx, gradients, params=params)
    steps, _ = run(scale_by_muon(layout), gradients)
    spread = lambda rate, like: np.asarray(rate).reshape(-1, *[1] * (like.ndim - 1))
    decayed = jax.tree.map(lambda u, p: u + 0.1 * np.asarray(p), steps, params)
    of_matrices, of_others = (
        {name: -spread(rate, u) * u for name, u in decayed.items()} for rate in rates
    )
    np.testing.assert_allclose(updates["w"], of_matrices["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], of_others["b"], rtol=1e-6)
    np.testing.assert_allclose(updates["mixed"][:, :2], of_matrices["mixed"][:, :2], rtol=1e-6)
    np.testing.assert_allclose(updates["mixed"][:, 2], of_others["mixed"][:, 2], rtol=1e-6)
    # The matrix part is a polar factor, and the other row is Adam's.
    adam, _ = run(optax.with_extra_args_support(optax.scale_by_adam()), gradients["mixed"][:, 2])
    np.testing.assert_allclose(steps["mixed"][:, 2], adam, rtol=1e-5)


def first_rows_of_mixed(params):
    """The layout of a model that uses two rows of a leaf as a matrix, and the third nowhere."""

    def model(p, x):
        return x @ p["w"] @ p["mixed"][:2] + jnp.sin(p["b"])

    objective = curvax.Objective(model, curvax.losses.squared_error())
    batch = jnp.ones((3, 2)), jnp.ones((3, 2))
    return curvax.kron_layout(objective, params, batch, unmatched="diagonal")


# -- tables --------------------------------------------------------------------------------------


def lookup_model(p, ids):
    return jnp.tanh(p["table"][ids]) @ p["head"]


LOOKUP = curvax.Objective(lookup_model, curvax.losses.squared_error())
LOOKUP_PARAMS = {"table": jnp.asarray(normal(6, 3)), "head": jnp.asarray(normal(3, 2, seed=1))}
LOOKUP_BATCH = jnp.array([0, 2, 2, 5]), jnp.asarray(normal(4, 2, seed=2))


def test_tables_that_are_only_looked_up_follow_the_fallback():
    layout = curvax.kron_layout(LOOKUP, LOOKUP_PARAMS, LOOKUP_BATCH)
    gradient = jax.grad(LOOKUP)(LOOKUP_PARAMS, LOOKUP_BATCH)
    adam = optax.scale_by_adam()
    expected, _ = adam.update(gradient, adam.init(gradient))
    a = input_factors(LOOKUP, layout, LOOKUP_PARAMS, LOOKUP_BATCH, jax.random.key(0))
    assert list(a) == ["['head']"]
    for build in (scale_by_muon, scale_by_newton_muon, scale_by_fismo):
        rule = build(layout)
        update = jax.jit(lambda g, s, a, rule=rule: rule.update(g, s, g, curvature=a))
        updates, state = update(gradient, jax.jit(rule.init)(gradient), a)
        np.testing.assert_allclose(updates["table"], expected["table"], rtol=1e-5)
        assert np.abs(updates["head"] - expected["head"]).max() > 0.1
        assert list(state.blocks) == ["['head']"]
    # From shapes alone a table is a matrix like any other.
    assert len(scale_by_muon().init(LOOKUP_PARAMS).blocks) == 2


def test_a_layout_without_tables_says_why():
    layout = without_lookups(curvax.kron_layout(LOOKUP, LOOKUP_PARAMS, LOOKUP_BATCH))
    assert "its rows are only looked up" in str(layout)

    def tied(p, ids):
        return p["table"][ids] @ p["table"].T

    objective = curvax.Objective(tied, curvax.losses.softmax_cross_entropy())
    params = {"table": LOOKUP_PARAMS["table"]}
    layout = curvax.kron_layout(objective, params, (LOOKUP_BATCH[0], LOOKUP_BATCH[0]))
    assert without_lookups(layout) == layout  # it is the head too


def test_a_leaf_that_holds_a_table_and_a_matrix_loses_the_table_alone():
    def model(p, ids):
        return jnp.tanh(p[:4][ids]) @ p[4:]

    objective = curvax.Objective(model, curvax.losses.squared_error())
    params = jnp.asarray(normal(6, 2))
    batch = LOOKUP_BATCH[0] % 4, LOOKUP_BATCH[1]
    layout = without_lookups(curvax.kron_layout(objective, params, batch))
    (leaf,) = layout.leaves
    assert isinstance(leaf, Leaf) and (leaf.kind, leaf.unmatched) == ("kron", "diagonal")
    rule = scale_by_muon(layout, polar=exact_polar())
    gradient = jax.grad(objective)(params, batch)
    updates, _ = jax.jit(rule.update)(gradient, jax.jit(rule.init)(gradient))
    np.testing.assert_allclose(updates[4:], published.polar(np.asarray(gradient[4:])), atol=1e-5)
    adam = optax.scale_by_adam()
    expected, _ = adam.update(gradient, adam.init(gradient))
    np.testing.assert_allclose(updates[:4], expected[:4], rtol=1e-5)


# -- Newton-Muon ---------------------------------------------------------------------------------


def linear_layout(num_in, num_out):
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    batch = jnp.ones((2, num_in)), jnp.ones((2, num_out))
    return curvax.kron_layout(objective, jnp.ones((num_in, num_out)), batch)


def as_curvature(moments):
    """Second moments of inputs of all steps, as `input_factors` has them: `[steps, i, i]`."""
    return {"": WeightedMean(moments[:, None], np.ones((len(moments), 1)))}


def moments_of(inputs):
    return np.einsum("tni,tnj->tij", inputs, inputs) / inputs.shape[1]


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_newton_muon_equals_its_transcription(x64, shape):
    """With inputs of which A is the same in both; theirs divides by no mean, so it is constant."""
    num_in = shape[0]
    moments = moments_of(normal(9, 7, num_in, seed=1))
    moments *= num_in / np.trace(moments, axis1=1, axis2=2)[:, None, None]
    # Our average: of the weight of each term, `decay^k`, without a start.
    weights = [0.9 ** np.arange(t, -1, -1) for t in range(9)]
    means = [np.average(moments[: t + 1], axis=0, weights=w) for t, w in enumerate(weights)]
    # In units in which their absolute 1e-8 is nothing.
    inputs = [1e4 * np.sqrt(num_in) * np.linalg.cholesky(mean).T for mean in means]
    options = {"b": 0.9, "damping": 0.3}
    gradients = recorded(9, shape)
    expected = published.newton_muon(gradients, inputs, decay=0.0, every=1, **options)
    rule = scale_by_newton_muon(
        linear_layout(*shape), decay=0.9, refresh_every=1, polar=exact_polar(), **options
    )
    assert_equal(run(rule, gradients, as_curvature(moments))[0], expected, 1e-12)


def test_newton_muon_with_momentum_before(x64):
    """polar(P N), with N the mix of raw gradients and the latest P for all of them."""
    gradients, moments = recorded(5, (4, 3)), moments_of(normal(5, 6, 4, seed=1))
    rule = scale_by_newton_muon(
        linear_layout(4, 3),
        decay=0.0,
        refresh_every=2,
        momentum_place="before",
        polar=exact_polar(),
    )
    updates, state = run(rule, gradients, as_curvature(moments))
    m = 0.0
    for t, g in enumerate(gradients):
        if t % 2 == 0:
            A = moments[t] / (np.trace(moments[t]) / 4)
            P = np.linalg.inv(A + 0.2 * np.eye(4))
        m = 0.95 * m + 0.05 * g
        expected = published.polar(P @ published._muon_mix(m, g, 0.95, t, True))
        np.testing.assert_allclose(updates[t], expected, atol=1e-12)
    assert state.num_refreshes == 5 and state.info.num_failures[""] == 0


def test_newton_muon_of_white_inputs_is_muon(x64):
    gradients = recorded(6, (4, 3))
    white = as_curvature(np.broadcast_to(7.0 * np.eye(4), (6, 4, 4)))
    updates, _ = run(scale_by_newton_muon(linear_layout(4, 3)), gradients, white)
    assert_equal(updates, run(scale_by_muon(), gradients)[0])
    # So it is where no inputs were seen, and where a choice leaves them out.
    zero = as_curvature(np.zeros((6, 4, 4)))
    updates, _ = run(scale_by_newton_muon(linear_layout(4, 3)), gradients, zero)
    assert_equal(updates, run(scale_by_muon(), gradients)[0])
    layout = linear_layout(4, 3).edit("", a_structure="identity")
    nothing = {"": WeightedMean(np.zeros((6, 1, 4)), np.ones((6, 1)))}
    updates, _ = run(scale_by_newton_muon(layout), gradients, nothing)
    assert_equal(updates, run(scale_by_muon(), gradients)[0])


def test_newton_muon_follows_rotations_of_inputs_and_not_their_scale(x64):
    gradients, moments = recorded(6, (4, 3)), moments_of(normal(6, 7, 4, seed=1))
    q = np.linalg.qr(normal(4, 4, seed=2))[0]
    rule = scale_by_newton_muon(linear_layout(4, 3), refresh_every=2)
    updates, _ = run(rule, gradients, as_curvature(moments))
    rotated, _ = run(rule, q @ gradients, as_curvature(q @ moments @ q.T))
    assert_equal(rotated, q @ updates, 1e-7)  # eps of the norm sees nothing, but rounding
    scaled, _ = run(rule, gradients, as_curvature(1e6 * moments))
    assert_equal(scaled, updates, 1e-8)
    plain, _ = run(scale_by_muon(), gradients)
    assert np.abs(updates - plain).max() > 0.1


def test_newton_muon_before_its_first_curvature():
    rule = scale_by_newton_muon(linear_layout(4, 3))
    g = jnp.asarray(normal(4, 3), jnp.float32)
    update = jax.jit(lambda g, s, a: rule.update(g, s, curvature=a))
    updates, state = update(g, jax.jit(rule.init)(g), None)
    assert not updates.any() and state.num_refreshes == 0
    bad = {"": WeightedMean(jnp.full((1, 4, 4), jnp.nan), jnp.ones(1))}
    updates, state = update(g, state, bad)
    assert not updates.any() and state.info.num_nonfinite == 1
    with pytest.raises(ValueError, match="it has nothing for"):
        rule.update(g, state, curvature={})
    with pytest.raises(ValueError, match=r"a factor \[1, 4\].*a factor \[1, 4, 4\]"):
        rule.update(g, state, curvature={"": WeightedMean(jnp.ones((1, 4)), jnp.ones(1))})
    with pytest.raises(ValueError, match=r"has tuple where .*input_factors"):
        rule.update(g, state, curvature={"": (jnp.ones((1, 1, 4)), jnp.ones((1, 1, 3)))})


def conv_model(p, x):
    h = jax.lax.conv_general_dilated(
        x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(h).mean((1, 2)) @ p["w"] + p["b"]


CONV = curvax.Objective(conv_model, curvax.losses.squared_error())
CONV_PARAMS = {
    "conv": jnp.asarray(normal(3, 3, 2, 4), jnp.float32),
    "w": jnp.asarray(normal(4, 3, seed=1), jnp.float32),
    "b": jnp.zeros(3),
}
CONV_BATCH = (
    jnp.asarray(normal(6, 5, 5, 2, seed=2), jnp.float32),
    jnp.asarray(normal(6, 3, seed=3), jnp.float32),
)


def test_input_factors_are_those_of_kfac_without_biases():
    key = jax.random.key(0)
    layout = curvax.kron_layout(CONV, CONV_PARAMS, CONV_BATCH, positions="all")
    of_kfac = jax.jit(functools.partial(curvax.kron_factors, CONV, layout))
    expected = of_kfac(CONV_PARAMS, CONV_BATCH, key).blocks
    for microbatch in (None, 4):
        estimate = functools.partial(input_factors, CONV, layout, microbatch=microbatch)
        factors = jax.jit(estimate)(CONV_PARAMS, CONV_BATCH, key)
        for name, factor in factors.items():
            size = factor.mean.shape[-1]
            a = expected[name].a
            np.testing.assert_allclose(factor.mean, a.mean[:, :size, :size], atol=1e-5)
            np.testing.assert_array_equal(factor.weight, a.weight)
    assert factors["['w']"].mean.shape == (1, 4, 4)
    assert factors["['conv']"].weight.tolist() == [6 * 25]


def test_input_factors_of_parts_and_of_transposed_kernels():
    params = {"w": jnp.asarray(normal(3, 2)), "v": jnp.asarray(normal(2, 3))}
    loss, key = curvax.losses.squared_error(), jax.random.key(0)
    first = curvax.Objective(lambda p, x: x @ p["w"], loss)
    second = curvax.Objective(lambda p, x: x @ p["w"] @ p["v"] @ p["v"].T, loss)
    total = curvax.total({"first": first, "second": second})
    rows, more = jnp.asarray(normal(4, 3)), jnp.asarray(normal(5, 3, seed=1))
    batch = {"first": (rows, jnp.ones((4, 2))), "second": (more, jnp.ones((5, 2)))}
    layout = curvax.kron_layout(total, params, batch)
    factors = input_factors(total, layout, params, batch, key)
    x = np.concatenate([rows, more])
    np.testing.assert_allclose(factors["['w']"].mean[0], x.T @ x / 9, rtol=1e-5)
    # Inputs on both sides are none.
    assert factors["['v']"].weight.tolist() == [0] and not factors["['v']"].mean.any()


def test_newton_muon_trains_a_convolution():
    layout = curvax.kron_layout(CONV, CONV_PARAMS, CONV_BATCH)
    tx = newton_muon(0.1, CONV, layout, curvature_every=2, inverse_every=2)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(CONV)(params, CONV_BATCH)
        updates, state = tx.update(gradient, state, params, batch=CONV_BATCH)
        return optax.apply_updates(params, updates), state

    carry = CONV_PARAMS, jax.jit(tx.init)(CONV_PARAMS)
    for _ in range(20):
        carry = step(*carry)
    assert CONV(carry[0], CONV_BATCH) < 0.8 * CONV(CONV_PARAMS, CONV_BATCH)
    assert optax.tree.get(carry[1], "num_refreshes") == 20  # one in each step at first


# -- FISMO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_fismo_equals_its_transcription(x64, every):
    options = {"b": 0.9}
    for shape in SHAPES[:2]:
        gradients = normal(12, *shape)
        rule = scale_by_fismo(
            decay=0.8, damping=1e-2, refresh_every=every, polar=exact_polar(), **options
        )
        expected = published.fismo(gradients, c=0.8, mu=1e-2, every=every, **options)
        assert_equal(run(rule, gradients)[0], expected, 1e-12)


def test_fismo_is_the_best_of_the_directions_within_its_norm(x64):
    gradients = normal(5, 4, 3)
    rule = scale_by_fismo(b=0.0, decay=0.5, refresh_every=1, polar=exact_polar())
    updates, state = run(rule, gradients)
    p, q = (np.asarray(factor.matrix[0]) for factor in state.blocks[""].preconditioner.factors)
    np.testing.assert_allclose([np.trace(p), np.trace(q)], [4, 3], rtol=1e-12)
    assert np.linalg.cond(p) > 1.5
    root_p, root_q = published._power(p, 0.5), published._power(q, 0.5)
    # Feasible, and of the value that the dual norm bounds.
    u, g = updates[-1], gradients[-1]
    np.testing.assert_allclose(np.linalg.norm(root_p @ u @ root_q, 2), 1, rtol=1e-10)
    whitened = np.linalg.solve(root_p, g) @ np.linalg.inv(root_q)
    np.testing.assert_allclose(np.sum(g * u), np.linalg.norm(whitened, "nuc"), rtol=1e-10)
    directions = normal(1000, 4, 3, seed=1)
    directions /= np.linalg.norm(directions, 2, axis=(1, 2))[:, None, None]
    directions = np.linalg.solve(root_p, directions) @ np.linalg.inv(root_q)
    assert np.sum(g * u) > np.max(np.sum(g * directions, axis=(1, 2))) > 0


def test_fismo_with_identities_is_muon(x64):
    gradients = recorded(5, (4, 3))
    layout = curvax.matrix_layout(jnp.asarray(gradients[0]))
    layout = layout.edit("", a_structure="identity", g_structure="identity")
    updates, _ = run(scale_by_fismo(layout, b=0.9), gradients)
    plain, _ = run(scale_by_muon(b=0.9, nesterov=False), gradients)
    # M has its bias here, which polar factors see through the eps of the norm alone.
    assert_equal(updates, plain, 1e-6)
    one_sided = layout.edit("", a_structure="diagonal")
    diagonal, state = run(scale_by_fismo(one_sided, b=0.9), gradients)
    p = state.blocks[""].preconditioner.factors.left
    assert p.entries.shape == (1, 4)
    np.testing.assert_allclose(p.entries.sum(), 4, rtol=1e-12)
    assert np.abs(diagonal - plain).max() > 0.01


def test_a_fismo_factor_of_nothing_counts_as_failure():
    """Without a past, a gradient or a damping a factor is 0/0; the old one goes on."""
    rule = scale_by_fismo(decay=0.0, damping=0.0, refresh_every=1)
    updates, state = run(rule, np.zeros((3, 4, 3), np.float32))
    assert not updates.any()
    assert state.info.num_failures[""] == 3
    np.testing.assert_array_equal(state.blocks[""].preconditioner.factors.left.matrix[0], np.eye(4))


# -- all of them ---------------------------------------------------------------------------------


def all_rules(layout):
    return {
        "muon": scale_by_muon(layout),
        "newton_muon": scale_by_newton_muon(layout, refresh_every=2),
        "fismo": scale_by_fismo(layout, refresh_every=2),
    }


def test_zero_gradients_give_zero_steps():
    zeros, moments = np.zeros((5, 4, 3), np.float32), as_curvature(np.zeros((5, 4, 4), np.float32))
    for rule in all_rules(linear_layout(4, 3)).values():
        updates, state = run(rule, zeros, moments)
        assert not updates.any()
        assert state.info.num_nonfinite == 0


def test_members_of_a_vmap_and_bfloat16_gradients():
    gradients = jnp.asarray(recorded(4, (4, 3)), jnp.bfloat16)
    members = jnp.stack([gradients, 2 * gradients[::-1]], axis=1)
    moments = moments_of(normal(4, 7, 4, seed=1)).astype(np.float32)
    for rule in all_rules(linear_layout(4, 3)).values():
        start = jax.jit(jax.vmap(rule.init))(members[0])

        def step(state, now, rule=rule):
            gradient, a = now
            update = lambda g, s, a: rule.update(g, s, curvature=a)
            updates, state = jax.vmap(update, in_axes=(0, 0, None))(gradient, state, a)
            return state, updates

        inputs = members, as_curvature(moments)
        _, together = jax.jit(lambda s, x, step=step: jax.lax.scan(step, s, x))(start, inputs)
        assert together.dtype == jnp.bfloat16
        for k in range(2):
            alone, state = run(rule, members[:, k], as_curvature(moments))
            difference = np.asarray(together[:, k], np.float32) - np.asarray(alone, np.float32)
            assert np.abs(difference).max() < 0.02  # a digit of bfloat16
            floats = [x.dtype for x in jax.tree.leaves(state.blocks) if x.dtype != jnp.int32]
            assert set(floats) == {jnp.dtype(jnp.float32)}


def test_bad_arguments():
    layout = linear_layout(4, 3)
    with pytest.raises(ValueError, match="b must lie"):
        scale_by_muon(b=1.0)
    with pytest.raises(ValueError, match="decay must lie"):
        scale_by_fismo(decay=1.0)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        scale_by_newton_muon(layout, damping=-0.1)
    with pytest.raises(
        ValueError, match="unknown momentum_place 'first'; valid: 'after', 'before'"
    ):
        scale_by_newton_muon(layout, momentum_place="first")
    with pytest.raises(ValueError, match="refresh_every"):
        fismo(0.1, refresh_every=0)
    shapes_alone = curvax.matrix_layout(jnp.ones((4, 3)))
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    tx = newton_muon(0.1, objective, shapes_alone)
    with pytest.raises(ValueError, match="the layout was made from shapes"):
        batch = jnp.ones((2, 4)), jnp.ones((2, 3))
        tx.update(jnp.ones((4, 3)), tx.init(jnp.ones((4, 3))), jnp.ones((4, 3)), batch=batch)
