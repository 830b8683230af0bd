"""GPTQ against the constrained minimum of every step in NumPy; layouts, dead inputs, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.apps.quantization import Scheme, gptq, quantize

CHANNELS = Scheme(axis=-1)


def levels(w, bits, channels=True):
    """Steps of `Scheme(axis=-1)` or `Scheme()`, and the last level."""
    last = 2 ** (bits - 1) - 1
    return np.abs(w).max(axis=0 if channels else None, keepdims=True) / last, last


def constrained(w, a, step, last, damping=0.01, order=None, free=()):
    """Round row after row; after each, the exact minimum over all others not rounded yet."""
    a = a + damping * np.trace(a) / len(a) * np.eye(len(a))
    target, order = w.copy(), list(range(len(w))) if order is None else list(order)
    step = np.broadcast_to(step, w.shape)
    for k, i in enumerate(order):
        if i in free:
            continue
        target[i] = step[i] * np.clip(np.round(target[i] / step[i]), -last, last)
        fixed, rest = order[: k + 1], order[k + 1 :]
        # d_r = -A_rr^-1 A_rf d_f, the minimum of d'A d with d_f fixed
        errors = target[fixed] - w[fixed]
        if rest:
            coupling = a[np.ix_(rest, fixed)] @ errors
            target[rest] = w[rest] - np.linalg.solve(a[np.ix_(rest, rest)], coupling)
    return target


def cost(w, q, a):
    return np.einsum("io,ij,jo->o", w - q, a, w - q)


def better_of(w, q, plain, a):
    return np.where(cost(w, q, a) < cost(w, plain, a), q, plain)


MODEL = lambda p, x: x @ p["w"] + p["b"]
OBJECTIVE = curvax.Objective(MODEL, curvax.losses.squared_error())


@functools.cache
def data():
    """A dense kernel with a bias, correlated inputs of which one is dead; in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 9)) + 0.3 * rng.normal(size=(60, 9)) + 0.5
    x[:, 3] = 0
    return rng.normal(size=(9, 40)), rng.normal(size=40), x


@pytest.fixture
def dense(x64):
    w, b, x = data()
    params = {"w": jnp.array(w), "b": jnp.array(b)}
    batch = (jnp.array(x), jnp.zeros((60, 40)))
    layout = curvax.kron_layout(OBJECTIVE, params, batch)
    return params, layout, batch


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("channels", [True, False])
def test_every_step_is_the_constrained_minimum(dense, channels, by_activation):
    params, layout, batch = dense
    w, _, x = data()
    scheme = Scheme(axis=-1 if channels else None)
    factors = curvax.kron.input_factors(OBJECTIVE, layout, params, batch, jax.random.key(0))
    got = gptq(params, layout, factors, 3, scheme, by_activation=by_activation)
    a = x.T @ x / len(x)
    order = np.argsort(-np.diag(a), kind="stable") if by_activation else None
    step, last = levels(w, 3, channels)
    plain = np.asarray(quantize(params, 3, scheme)["w"])
    expected = better_of(w, constrained(w, a, step, last, order=order), plain, a)
    np.testing.assert_allclose(got.params["w"], expected, atol=1e-10)
    np.testing.assert_array_equal(got.params["b"], params["b"])
    errors = got.errors["['w']"]
    np.testing.assert_allclose(errors.nearest, cost(w, plain, a).sum(), rtol=1e-10)
    np.testing.assert_allclose(errors.rounded, cost(w, expected, a).sum(), rtol=1e-10)
    assert errors.rounded < 0.5 * errors.nearest
    # The dead input's row is that of rounding to nearest.
    np.testing.assert_allclose(got.params["w"][3], plain[3], atol=1e-12)
    assert (got.params["w"] != plain).mean() > 0.1


def test_a_bias_makes_up_for_errors_where_the_factors_have_its_row(dense):
    params, layout, batch = dense
    w, b, x = data()
    estimate = functools.partial(curvax.kron_factors, OBJECTIVE, layout, fisher="exact")
    factors = estimate(params, batch, jax.random.key(0))
    got = gptq(params, layout, factors, 3, CHANNELS)
    ones = np.hstack([x, np.ones((60, 1))])
    a, joined = ones.T @ ones / 60, np.vstack([w, b])
    step, last = levels(w, 3)
    step = np.vstack([np.broadcast_to(step, w.shape), np.ones((1, 40))])
    plain = np.vstack([quantize(params, 3, CHANNELS)["w"], b])
    corrected = constrained(joined, a, step, last, free=(9,))
    expected = better_of(joined, corrected, plain, a)
    np.testing.assert_allclose(got.params["w"], expected[:-1], atol=1e-10)
    np.testing.assert_allclose(got.params["b"], expected[-1], atol=1e-10)
    assert not np.allclose(got.params["b"], b)


def test_stacked_fused_headed_and_convolutional_kernels(x64):
    """Each is the dense case on its matrix; all in one model."""
    keys = jax.random.split(jax.random.key(1), 8)
    params = {
        "conv": jax.random.normal(keys[0], (2, 2, 3, 4)),
        "layers": jax.random.normal(keys[1], (3, 4, 4)),
        "q": jax.random.normal(keys[2], (4, 2, 3)),
        "k": jax.random.normal(keys[3], (4, 2, 3)),
        "out": jax.random.normal(keys[4], (2, 3, 5)),
        "free": jax.random.normal(keys[5], (5, 5)),
    }

    def model(p, x):
        h = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jnp.mean(jnp.tanh(h), axis=(1, 2)) * 3
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["layers"])
        joined = jnp.concatenate([p["q"], p["k"]], axis=1)
        heads = jnp.einsum("bi,ihd->bhd", h, joined)
        return jnp.einsum("bhd,hdo->bo", heads[:, :2] * heads[:, 2:], p["out"]) @ p["free"]

    objective = curvax.Objective(model, curvax.losses.squared_error())
    batch = (jax.random.normal(keys[6], (20, 4, 4, 3)) + 1, jnp.zeros((20, 5)))
    layout = curvax.kron_layout(objective, params, batch)
    bits = {f"['{name}']": 3 for name in params if name != "free"}

    @jax.jit
    def compute(params, batch):
        factors = curvax.kron.input_factors(objective, layout, params, batch, jax.random.key(0))
        return factors, gptq(params, layout, factors, bits)

    factors, got = compute(params, batch)
    plain = quantize(params, bits)
    tree = lambda x: curvax.kron.block_matrices(layout, x)
    old, new, nearest = (
        {k: np.asarray(v) for k, v in tree(x).items()} for x in (params, got.params, plain)
    )
    assert len(layout.blocks) == 5 and "['free']" not in got.errors
    np.testing.assert_array_equal(got.params["free"], params["free"])
    for block in layout.blocks:
        if block.name not in got.errors:
            continue
        # Every leaf has one scale: that of the entries that came from it.
        steps = jax.tree.map(lambda w: jnp.full_like(w, jnp.abs(w).max() / 3), params)
        step = np.asarray(tree(steps)[block.name])
        for s in range(block.shape[0]):
            a = np.asarray(factors[block.name].mean[s])
            w, plain_w = old[block.name][s], nearest[block.name][s]
            expected = better_of(w, constrained(w, a, step[s], 3), plain_w, a)
            np.testing.assert_allclose(new[block.name][s], expected, atol=1e-9)
        before, after = got.errors[block.name]
        assert after <= before * (1 + 1e-12)
    changed = {name for name in got.errors if (new[name] != nearest[name]).any()}
    assert len(changed) >= 3


def test_what_has_no_inputs_to_go_by_is_rounded_to_nearest():
    """Tables, tied ones, diagonal factors, zero inputs, and factors that are not finite."""
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        "table": jax.random.normal(keys[0], (7, 6)),
        "tied": jax.random.normal(keys[1], (7, 30)),
        "w": jax.random.normal(keys[2], (6, 30)),
    }
    model = lambda p, x: ((p["table"][x] + 1) @ p["w"] + p["tied"][x]) @ p["tied"].T
    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
    batch = (jnp.arange(7), jnp.arange(7))
    layout = curvax.kron_layout(objective, params, batch)
    diagonal = layout.edit("['w']", a_structure="diagonal")

    @jax.jit
    def compute(params, batch):
        factors, diagonal_factors = (
            curvax.kron.input_factors(objective, x, params, batch, jax.random.key(0))
            for x in (layout, diagonal)
        )
        zero = {"['w']": jax.tree.map(jnp.zeros_like, factors["['w']"])}
        spoiled = {"['w']": factors["['w']"]._replace(total=jnp.full((1, 6, 6), jnp.nan))}
        every = [gptq(params, layout, x, 3) for x in (factors, zero, spoiled)]
        return *every, gptq(params, diagonal, diagonal_factors, 3), quantize(params, 3)

    got, *results, plain = compute(params, batch)
    assert got.errors.keys() == {"['w']"}
    assert (got.params["w"] != plain["w"]).any()
    for name in ("table", "tied"):
        np.testing.assert_array_equal(got.params[name], plain[name])
    for result in results:
        np.testing.assert_array_equal(result.params["w"], plain["w"])
    assert results[0].errors["['w']"].nearest == 0
    assert np.isnan(results[1].errors["['w']"].rounded)


def test_entries_behind_a_constant_mask_do_not_take_part(x64):
    """They are zero in the model, so that no other weight may count on them."""
    mask = np.tril(np.ones((8, 8)))
    objective = curvax.Objective(lambda w, x: x @ (w * mask), curvax.losses.squared_error())
    w = jax.random.normal(jax.random.key(0), (8, 8))
    x = 1 + jax.random.normal(jax.random.key(1), (30, 8))
    batch = (x, jnp.zeros((30, 8)))
    layout = curvax.kron_layout(objective, w, batch)

    @jax.jit
    def compute(w):
        factors = curvax.kron.input_factors(objective, layout, w, batch, jax.random.key(0))
        return gptq(w, layout, factors, 3), quantize(w, 3)

    got, plain = compute(w)
    np.testing.assert_array_equal(np.asarray(got.params)[mask == 0], plain[mask == 0])
    a, step = np.asarray(x.T @ x) / 30, float(jnp.abs(w).max()) / 3
    inside, rounded = np.asarray(w) * mask, np.asarray(plain) * mask
    # Levels of next to zero, as hidden entries are.
    steps = np.where(mask, step, 1e-300)
    expected = np.where(mask, constrained(inside, a, steps, 3), 0)
    expected = better_of(inside, expected, rounded, a)
    np.testing.assert_allclose(np.asarray(got.params) * mask, expected, atol=1e-10)
    assert (expected != rounded).any()


def test_bfloat16_params_rank_deficient_inputs_and_vmap_over_networks():
    """More inputs than examples; members of a `vmap` as one after another."""
    x = 1 + jax.random.normal(jax.random.key(3), (5, 12))
    batch = (x, jnp.zeros((5, 30)))
    many = jax.random.normal(jax.random.key(4), (2, 12, 30)).astype(jnp.bfloat16)
    objective = curvax.Objective(lambda w, x: x @ w.astype(x.dtype), OBJECTIVE.loss)
    layout = curvax.kron_layout(objective, many[0], batch)

    def one(w):
        factors = curvax.kron.input_factors(objective, layout, w, batch, jax.random.key(0))
        return gptq(w, layout, factors, 3, CHANNELS)

    got, single = jax.jit(jax.vmap(one))(many), jax.jit(one)(many[1])
    assert got.params.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.params[1], single.params)
    assert (got.errors[""].rounded < 0.3 * got.errors[""].nearest).all()
    # The error that is reported is that of what was returned, rounding to bfloat16 included.
    change = np.asarray(many[1], np.float64) - np.asarray(single.params, np.float64)
    error = np.mean(np.sum((np.asarray(x, np.float64) @ change) ** 2, axis=1))
    np.testing.assert_allclose(single.errors[""].rounded, error, rtol=1e-5)
    on_levels = np.asarray(got.params, np.float32) / np.abs(np.asarray(many, np.float32)).max(
        axis=1, keepdims=True
    )
    np.testing.assert_allclose(on_levels * 3, np.round(on_levels * 3), atol=0.02)


def test_gptq_beats_nearest_rounding_on_trained_networks_at_three_bits():
    """Five networks by `vmap`; the loss on other data than those that trained and rounded."""
    centers = (
        1.5
        * jax.random.normal(jax.random.key(5), (5, 4))
        @ jax.random.normal(jax.random.key(6), (4, 20))
    )

    def draw(key):
        labels = jnp.arange(150) % 5
        return centers[labels] + 2 * jax.random.normal(key, (150, 20)), labels

    train, test = draw(jax.random.key(7)), draw(jax.random.key(8))
    model = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"] / 4) @ p["b"]) @ p["c"]
    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
    shapes = {"a": (20, 24), "b": (24, 16), "c": (16, 5)}
    init = lambda key: {
        name: jax.random.normal(jax.random.fold_in(key, k), shape) / shape[0] ** 0.5
        for k, (name, shape) in enumerate(shapes.items())
    }
    layout = curvax.kron_layout(objective, init(jax.random.key(0)), train)
    tx = optax.adam(3e-3)

    def losses(key):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(objective)(params, train), state)
            return (optax.apply_updates(params, updates), state), None

        params = init(key)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=60)
        factors = curvax.kron.input_factors(objective, layout, params, train, key)
        rounded = gptq(params, layout, factors, 3, CHANNELS)
        plain = quantize(params, 3, CHANNELS)
        return jnp.array([objective(p, test) for p in (params, plain, rounded.params)])

    full, nearest, rounded = jax.jit(jax.vmap(losses))(jax.random.split(jax.random.key(9), 5)).T
    gain = np.asarray(nearest - rounded)
    standard_error = gain.std(ddof=1) / 5**0.5
    assert gain.mean() > 2 * standard_error
    assert gain.mean() > 0.3 * float((nearest - full).mean()) > 0


def test_moments_of_batches_add_up(dense):
    params, layout, (x, y) = dense
    estimate = lambda rows: curvax.kron.input_factors(
        OBJECTIVE, layout, params, (x[rows], y[rows]), jax.random.key(0)
    )
    first, second, both = (estimate(rows) for rows in (slice(0, 20), slice(20, 60), slice(0, 60)))
    added = jax.tree.map(jnp.add, first, second)
    expected = gptq(params, layout, both, 2, CHANNELS).params["w"]
    np.testing.assert_allclose(
        gptq(params, layout, added, 2, CHANNELS).params["w"], expected, atol=1e-10
    )


def test_errors_say_what_and_where(dense):
    params, layout, batch = dense
    factors = curvax.kron.input_factors(OBJECTIVE, layout, params, batch, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"block \['w'\] needs a second moment of inputs \[1, 9, 9\], got none"
    ):
        gptq(params, layout, {}, 3)
    short = {"['w']": jax.tree.map(lambda x: x[:, :4, :4] if x.ndim == 3 else x, factors["['w']"])}
    with pytest.raises(ValueError, match=r"\[1, 9, 9\], got .*4.*input_factors"):
        gptq(params, layout, short, 3)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        gptq(params, layout, factors, 3, damping=0)
    with pytest.raises(ValueError, match=r"bits of \['w'\] must lie in \[2, 8\], got 1"):
        gptq(params, layout, factors, 1)
    with pytest.raises(ValueError, match=r"bits names layers that params do not have: x"):
        gptq(params, layout, factors, {"x": 3})
    with pytest.raises(ValueError, match=r"params"):
        gptq({"w": params["w"]}, layout, factors, 3)
