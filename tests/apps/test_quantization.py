"""Quantizers by their definition; sensitivities against dense blocks and the true loss;
allocation against brute force.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

import curvax
from curvax.apps import quantization
from curvax.apps.quantization import Scheme, allocate, pareto, quantize

PARAMS = {
    "a": {"w": jax.random.normal(jax.random.key(0), (6, 5)), "b": jnp.arange(1.0, 6)},
    "c": {"w": jax.random.normal(jax.random.key(1), (3, 2, 4)), "zero": jnp.zeros((2, 3))},
}
AXES = {"tensor": None, "channel": -1, "several": (-2, -1)}


@functools.cache
def quantized(axis, scale):
    return jax.jit(lambda params, bits: quantize(params, bits, Scheme(axis, scale)))


def slices(x, axis):
    """Parts of a leaf that share a scale, as rows."""
    axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
    moved = np.moveaxis(np.asarray(x, np.float64), axes, range(len(axes)))
    return moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_levels_are_few_symmetric_and_nearest(axis, bits):
    got = quantized(axis, "max")(PARAMS, bits)
    last = 2 ** (bits - 1) - 1
    for layer, leaf in (("a", "w"), ("c", "w")):
        for w, q in zip(
            slices(PARAMS[layer][leaf], axis), slices(got[layer][leaf], axis), strict=True
        ):
            step = np.abs(w).max() / last
            levels = step * np.arange(-last, last + 1)  # 2^bits - 1 of them, zero among them
            nearest = levels[np.abs(levels[:, None] - w).argmin(0)]
            np.testing.assert_allclose(q, nearest, atol=1e-6)
            assert len(np.unique(np.round(q / step))) <= 2**bits - 1
    np.testing.assert_array_equal(got["a"]["b"], PARAMS["a"]["b"])  # biases stay
    np.testing.assert_array_equal(got["c"]["zero"], 0)
    opposite = quantized(axis, "max")(jax.tree.map(jnp.negative, PARAMS), bits)
    np.testing.assert_array_equal(opposite["a"]["w"], -got["a"]["w"])


@pytest.mark.parametrize("axis", [None, -1])
def test_least_squares_scale_is_never_worse_and_the_best_of_its_grid(axis):
    for bits in (2, 4):
        ours, plain = (
            quantized(axis, scale)(PARAMS, bits)["a"]["w"] for scale in ("least_squares", "max")
        )
        last = 2 ** (bits - 1) - 1
        w = slices(PARAMS["a"]["w"], axis)
        step = np.abs(w).max(1, keepdims=True) / last * np.linspace(1, 0.2, 32)[:, None, None]
        errors = ((step * np.clip(np.round(w / step), -last, last) - w) ** 2).sum(-1).min(0)
        np.testing.assert_allclose(((slices(ours, axis) - w) ** 2).sum(-1), errors, rtol=1e-5)
        if bits == 2:
            assert (((slices(plain, axis) - w) ** 2).sum(-1) > 1.1 * errors).all()
    assert not quantized(axis, "least_squares")(PARAMS, 2)["c"]["zero"].any()


def test_widths_by_layer_and_what_is_left_out():
    whole = {bits: quantized(None, "max")(PARAMS, bits) for bits in (2, 4)}
    got = quantized(None, "max")(PARAMS, {"['a']['w']": 2, "['c']['w']": jnp.int32(4)})
    np.testing.assert_array_equal(got["a"]["w"], whole[2]["a"]["w"])
    np.testing.assert_array_equal(got["c"]["w"], whole[4]["c"]["w"])
    alone = quantize(PARAMS, {"c": 2}, Scheme(by=lambda path: path[2]))
    np.testing.assert_array_equal(alone["c"]["w"], whole[2]["c"]["w"])
    np.testing.assert_array_equal(alone["a"]["w"], PARAMS["a"]["w"])
    biases = quantize(PARAMS, 2, Scheme(quantizable=lambda path, leaf: "b" in path))
    assert biases["a"]["b"].tolist() == [0, 0, 5, 5, 5]
    np.testing.assert_array_equal(biases["a"]["w"], PARAMS["a"]["w"])
    assert quantization.sizes(PARAMS, Scheme(by=1)) == {"['a']": 30, "['c']": 30}


def test_tiny_numbers_and_16_bit_floats():
    tiny = quantize({"w": jnp.array([[1e-45, 0.0], [1e-38, -1e-38]])}, 8)["w"]
    assert jnp.isfinite(tiny).all() and tiny[0, 1] == 0
    half = quantize({"w": PARAMS["a"]["w"].astype(jnp.bfloat16)}, 4)["w"]
    assert half.dtype == jnp.bfloat16 and len(np.unique(np.abs(half.astype(float)))) <= 8


def test_gradients_go_straight_through():
    weight = jax.random.normal(jax.random.key(2), (6, 5))
    loss = lambda params: jnp.sum(weight * jnp.sin(quantize(params, 3)["a"]["w"]))
    got = jax.jit(jax.grad(loss))(PARAMS)["a"]["w"]
    np.testing.assert_allclose(got, weight * jnp.cos(quantize(PARAMS, 3)["a"]["w"]), rtol=1e-5)


@functools.cache
def trained():
    """A network on noisy clusters, trained to a small loss; layers of different shapes."""
    centers = jax.random.normal(jax.random.key(4), (5, 12))
    labels = jnp.arange(200) % 5
    inputs = centers[labels] + 0.7 * jax.random.normal(jax.random.key(5), (200, 12))
    shapes = ((12, 20), (20, 10), (10, 16), (16, 5))
    keys = jax.random.split(jax.random.key(6), 4)
    params = {
        f"w{i}": jax.random.normal(keys[i], shape) / shape[0] ** 0.5
        for i, shape in enumerate(shapes)
    }
    model = lambda p, x: functools.reduce(lambda h, w: jnp.tanh(h) @ w, p.values(), 3 * x)
    objective, tx = curvax.Objective(model, curvax.losses.softmax_cross_entropy()), optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params, (inputs, labels)), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=100))((params, tx.init(params)))
    return objective, params, (inputs, labels)


CHANNELS = Scheme(axis=-1)


@functools.cache
def measured():
    """HAWQ-V2's sensitivities of the trained network, and the traces of its layers."""
    objective, params, batch = trained()

    def measure(params, batch):
        matvec, key = curvax.ggnvp(objective, params, batch), jax.random.key(0)
        return quantization.hawq_v2(matvec, params, key, 1000, scheme=CHANNELS)

    return jax.jit(measure)(params, batch)


def test_hawq_v2_is_the_average_trace_times_the_squared_perturbation():
    objective, params, batch = trained()
    omegas, traces = measured()
    diagonal = jax.jit(functools.partial(curvax.ggn_diagonal, objective))(params, batch)
    for bits in (2, 4, 8):
        quantized = quantize(params, bits, CHANNELS)
        for name, w in params.items():
            trace = traces[f"['{name}']"]
            assert (
                abs(trace.mean - diagonal[name].sum()) < 3 * trace.sem < 0.4 * diagonal[name].sum()
            )
            expected = trace.mean / w.size * jnp.sum((quantized[name] - w) ** 2)
            np.testing.assert_allclose(omegas[f"['{name}']"][bits], expected, rtol=1e-5)


def test_omega_ranks_assignments_of_widths_as_the_loss_does():
    objective, params, batch = trained()
    omegas, _ = measured()
    choices = list(itertools.product((2, 4, 8), repeat=4))
    loss = lambda bits: objective(
        quantize(params, dict(zip(omegas, bits, strict=True)), CHANNELS), batch
    )
    losses = jax.jit(lambda choices: jax.lax.map(loss, choices))(jnp.array(choices))
    total = [
        sum(row[bits] for row, bits in zip(omegas.values(), choice, strict=True))
        for choice in choices
    ]
    assert spearmanr(total, losses)[0] > 0.8
    assert losses.max() - losses.min() > 0.3
    best = allocate(omegas, quantization.sizes(params), 4 * sum(w.size for w in params.values()))
    within = [
        i
        for i, choice in enumerate(choices)
        if np.dot(choice, [w.size for w in params.values()]) <= best.size
    ]
    assert losses[choices.index(tuple(best.bits.values()))] < np.median(losses[np.array(within)])


def test_hawq_is_the_top_eigenvalue_by_number_of_weights():
    """Of a layer of two leaves, with a bias left out;
    the model is linear, so its curvature is that of the inputs.
    """
    x = jnp.array([[2.0, 0, 0, 1], [0, 4, 0, 1], [0, 0, 1, 1]])
    params = {"w": jnp.array([[0.5], [-1.0]]), "u": jnp.array([[0.25]]), "b": jnp.ones(1)}
    model = lambda p, x: x @ jnp.concatenate([p["w"], p["u"], p["b"][None]])
    objective = curvax.Objective(model, curvax.losses.squared_error())
    scheme = Scheme(by=lambda path: "all")

    @jax.jit
    def measure(params):
        matvec = curvax.hvp(objective, params, (x, jnp.zeros((3, 1))))
        return quantization.hawq(matvec, params, jax.random.key(0), (2,), scheme)

    omegas, info = measure(params)
    assert omegas.keys() == {"all"} and info["all"].converged
    np.testing.assert_allclose(
        omegas["all"][2], 16 / 3 / 3 * 0.5**2, rtol=1e-5
    )  # 0.5 goes to 0 or 1; 0.25 stays, alone


def brute_force(omegas, sizes):
    """All allocations, as (size, omega, bits)."""
    every = itertools.product(*(row.items() for row in omegas.values()))
    size = lambda picks: sum(
        sizes[layer] * bits for layer, (bits, _) in zip(omegas, picks, strict=True)
    )
    return [
        (
            size(p),
            functools.reduce(lambda t, x: t + x[1], p, 0.0),
            dict(zip(omegas, (b for b, _ in p), strict=True)),
        )
        for p in every
    ]


@pytest.mark.parametrize("ties", [False, True])
def test_allocation_equals_brute_force(ties):
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = {f"l{i}": int(n) for i, n in enumerate(rng.integers(1, 5 if ties else 1000, 6))}
        draw = lambda: float(rng.integers(0, 3)) if ties else rng.normal()
        omegas = {layer: {bits: draw() for bits in (2, 4, 8)} for layer in sizes}
        every = brute_force(omegas, sizes)
        front = pareto(omegas, sizes)
        best = sorted({size for size, _, _ in every})
        expected, least = [], np.inf
        for size in best:
            omega = min(o for s, o, _ in every if s == size)
            if omega < least:
                least = omega
                expected.append((size, omega))
        assert [(point.size, point.omega) for point in front] == expected
        bits = {tuple(b.items()): (s, o) for s, o, b in every}
        assert all(bits[tuple(point.bits.items())] == (point.size, point.omega) for point in front)
        for budget in (best[0], best[0] + 0.5, best[len(best) // 2], best[-1] + 7):
            got = allocate(omegas, sizes, budget)
            assert got.omega == min(o for s, o, _ in every if s <= budget)
            assert got.size == min(s for s, o, _ in every if o == got.omega) and got in front


def test_allocation_of_a_large_network_is_quick():
    rng = np.random.default_rng(1)
    sizes = {f"l{i}": int(n) for i, n in enumerate(64 * rng.integers(64, 40_000, 60))}
    omegas = {name: {b: float(rng.random() * 4.0**-b) for b in (2, 3, 4, 8)} for name in sizes}
    total = sum(sizes.values())
    got = allocate(omegas, sizes, 4 * total)
    assert 3.99 * total < got.size <= 4 * total  # nothing is left over
    uniform = sum(row[4] for row in omegas.values())
    assert got.omega < uniform


def test_errors_say_what_and_where():
    with pytest.raises(
        ValueError,
        match=r"bits names layers that params do not have: \['x'\]; there are \['a'\]\['w'\], ",
    ):
        quantize(PARAMS, {"['x']": 4})
    for bits in (1, 9):
        with pytest.raises(
            ValueError, match=rf"bits of \['a'\]\['w'\] must lie in \[2, 8\], got {bits}"
        ):
            quantize(PARAMS, bits)
    with pytest.raises(TypeError, match=r"bits of \['a'\]\['w'\] must be an integer"):
        quantize(PARAMS, 2.5)
    with pytest.raises(
        ValueError, match=r"axis -3 of the scheme is none of \['a'\]\['w'\], which has 2"
    ):
        quantize(PARAMS, 4, Scheme(axis=-3))
    with pytest.raises(ValueError, match=r"unknown scale 'mean'; valid: 'max', 'least_squares'"):
        quantize(PARAMS, 4, Scheme(scale="mean"))
    with pytest.raises(ValueError, match=r"quantizes no leaf of params; see Scheme.quantizable"):
        quantize({"b": jnp.ones(3)}, 4)
    with pytest.raises(
        ValueError,
        match=r"curvature is of layers \['a'\]\['w'\], the scheme quantizes .*layers_by_path",
    ):
        quantization.sensitivities({"['a']['w']": 1.0}, PARAMS, (2,))
    with pytest.raises(
        ValueError, match=r"no choice of widths fits into 19 bits; the smallest takes 20"
    ):
        allocate({"l": {2: 1.0, 4: 0.5}}, {"l": 10}, 19)
    with pytest.raises(
        ValueError, match=r"layer l needs a size, widths, and finite sensitivities; got size None"
    ):
        pareto({"l": {2: 1.0}}, {})
    with pytest.raises(ValueError, match=r"layer l needs .*finite.*\{2: nan\}"):
        pareto({"l": {2: float("nan")}}, {"l": 3})
    with pytest.raises(ValueError, match="omegas has no layers"):
        allocate({}, {}, 10)
