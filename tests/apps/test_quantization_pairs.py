"""Interactions of layers against dense Hessians; choices and bisection against brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.apps import quantization
from curvax.apps.quantization import (
    Interactions,
    Scheme,
    allocate,
    allocate_pairwise,
    largest_set,
    quantize,
)

WIDTHS = (2, 3, 5)
SCHEME = Scheme(axis=-1, by=1)


def model(p, x):
    h = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"])
    return jnp.tanh(h @ p["c"]["w"] @ p["c"]["u"]) @ p["d"]


OBJECTIVE = curvax.Objective(model, curvax.losses.softmax_cross_entropy())


@pytest.fixture
def problem(x64):
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    params = {
        "a": {"b": draw(3), "w": draw(4, 3)},
        "c": {"u": draw(2, 3), "w": draw(3, 2)},
        "d": draw(3, 3),
    }
    return params, (draw(10, 4), jnp.arange(10) % 3)


@pytest.mark.parametrize("product", [curvax.hvp, curvax.ggnvp], ids=["hvp", "ggnvp"])
def test_interactions_are_those_of_dense_blocks(problem, product):
    params, batch = problem
    compute = jax.jit(
        lambda params: quantization.interactions(
            product(OBJECTIVE, params, batch), params, WIDTHS, SCHEME
        )
    )
    got = compute(params)
    layers = dict.fromkeys(quantization.layers_by_path(params, SCHEME).values())
    assert got.choices == tuple(itertools.product(layers, WIDTHS))
    h = np.asarray(curvax.to_dense(product(OBJECTIVE, params, batch), params))
    flat = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(tree)[0])
    rows = [
        flat(quantize(params, {layer: width}, SCHEME)) - flat(params)
        for layer, width in got.choices
    ]
    expected = np.array(rows) @ h @ np.array(rows).T
    np.testing.assert_allclose(got.matrix, expected, rtol=1e-10, atol=1e-12)
    # The sum over all layers at one width is the quadratic model of the quantized network.
    change = flat(quantize(params, 3, SCHEME)) - flat(params)
    places = [k for k, (_, width) in enumerate(got.choices) if width == 3]
    total = np.asarray(got.matrix)[np.ix_(places, places)].sum()
    np.testing.assert_allclose(total, change @ h @ change, rtol=1e-10)
    for (layer, width), row in zip(got.choices, rows, strict=True):
        np.testing.assert_allclose(got.diagonal()[layer][width], row @ h @ row, rtol=1e-10)


def test_interactions_over_batches_on_the_host_and_over_networks(problem):
    params, (x, y) = problem
    of = lambda matvec, params: quantization.interactions(matvec, params, (2, 3), SCHEME).matrix
    dense = lambda params: of(curvax.ggnvp(OBJECTIVE, params, (x, y)), params)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    streamed = of(curvax.streamed(curvax.ggnvp, OBJECTIVE, params, batches), params)
    twice = jax.tree.map(lambda w: jnp.stack([w / 2, w]), params)
    together = jax.jit(jax.vmap(dense))(twice)[1]
    np.testing.assert_allclose(streamed, together, rtol=1e-10, atol=1e-14)


def random_programme(seed, num_layers, widths=WIDTHS):
    rng = np.random.default_rng(seed)
    layers = [f"l{i}" for i in range(num_layers)]
    choices = tuple(itertools.product(layers, widths))
    root = rng.normal(size=(len(choices), 4)) / np.array([width for _, width in choices])[:, None]
    pairs = Interactions(jnp.asarray(root @ root.T), choices)
    sizes = {
        layer: int(n) for layer, n in zip(layers, rng.integers(1, 50, num_layers), strict=True)
    }
    return pairs, sizes


def brute_force(pairs, sizes, budget, widths=WIDTHS):
    """The least sum over all combinations within the budget."""
    matrix = np.asarray(pairs.matrix)
    numbers = {choice: k for k, choice in enumerate(pairs.choices)}
    least = np.inf
    for picks in itertools.product(widths, repeat=len(sizes)):
        if np.dot(picks, list(sizes.values())) <= budget:
            rows = [numbers[choice] for choice in zip(sizes, picks, strict=True)]
            least = min(least, matrix[np.ix_(rows, rows)].sum())
    return least


def total(pairs, bits):
    rows = [pairs.choices.index(choice) for choice in bits.items()]
    return float(np.asarray(pairs.matrix)[np.ix_(rows, rows)].sum())


def test_exact_allocation_equals_brute_force_and_exchange_is_between(x64):
    differ, gaps = 0, []
    for seed in range(12):
        pairs, sizes = random_programme(seed, 5)
        budget = 3.4 * sum(sizes.values())
        best = brute_force(pairs, sizes, budget)
        exact = allocate_pairwise(pairs.diagonal(), pairs, sizes, budget)
        near = allocate_pairwise(pairs.diagonal(), pairs, sizes, budget, method="exchange")
        apart = allocate(pairs.diagonal(), sizes, budget)
        for chosen in (exact, near):
            np.testing.assert_allclose(chosen.omega, total(pairs, chosen.bits), rtol=1e-10)
            assert chosen.size == sum(sizes[x] * b for x, b in chosen.bits.items()) <= budget
        np.testing.assert_allclose(exact.omega, best, rtol=1e-10)
        assert best - 1e-12 <= near.omega <= total(pairs, apart.bits) + 1e-12
        differ += exact.bits != apart.bits
        gaps.append(near.omega / best - 1)
    assert differ >= 6  # interactions matter here
    assert np.median(gaps) < 1e-9


def test_hawq_v2_terms_take_the_place_of_the_diagonal(x64):
    pairs, sizes = random_programme(3, 3)
    omegas = {layer: {width: 7.0 / width for width in WIDTHS} for layer in sizes}
    got = allocate_pairwise(omegas, pairs, sizes, 4 * sum(sizes.values()))
    exact = pairs.diagonal()
    single = sum(omegas[x][b] - float(exact[x][b]) for x, b in got.bits.items())
    np.testing.assert_allclose(got.omega, total(pairs, got.bits) + single, rtol=1e-10)


def test_many_layers_go_by_exchange(x64):
    pairs, sizes = random_programme(0, 16)
    budget = 3 * sum(sizes.values())
    with pytest.raises(ValueError, match=r'43046721 combinations .*method="exchange"'):
        allocate_pairwise(pairs.diagonal(), pairs, sizes, budget)
    got = allocate_pairwise(pairs.diagonal(), pairs, sizes, budget, method="exchange")
    apart = allocate(pairs.diagonal(), sizes, budget)
    assert got.size <= budget and got.omega < 0.5 * total(pairs, apart.bits)


def test_one_layer_has_no_pairs(x64):
    pairs, sizes = random_programme(0, 1)
    for method in ("exact", "exchange"):
        got = allocate_pairwise(pairs.diagonal(), pairs, sizes, 1e9, method=method)
        assert got == allocate(pairs.diagonal(), sizes, 1e9)


def test_bisection_equals_brute_force_where_the_loss_grows():
    rng = np.random.default_rng(0)
    for n, sign in itertools.product((1, 2, 5, 12), (1, -1)):
        cost = {f"l{i}": float(x) for i, x in enumerate(rng.random(n))}
        order = sorted(cost, key=cost.get)
        for limit in np.linspace(0, sum(cost.values()) * 1.1, 9):
            evaluate = lambda layers, cost=cost, sign=sign: sign * sum(map(cost.get, layers))
            got = largest_set(evaluate, cost, sign * limit, larger_is_better=sign < 0)
            within = [k for k in range(n + 1) if sum(map(cost.get, order[:k])) <= limit]
            assert got.layers == tuple(order[: max(within)])
            assert got.value == evaluate(got.layers) == got.evaluations[len(got.layers)]
            assert len(got.evaluations) <= np.log2(n + 1) + 2


def test_where_the_loss_is_not_monotone_the_next_layer_is_too_much():
    values = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, float("nan"), 0.0, 1.0]
    layers = {str(i): i for i in range(8)}
    got = largest_set(lambda chosen: values[len(chosen)], layers, 0.5)
    k = len(got.layers)
    assert values[k] <= 0.5 and not values[k + 1] <= 0.5
    assert got.evaluations[k] == 0 and k + 1 in got.evaluations


def test_errors_say_what_and_where(problem):
    params, _ = problem
    matvec = functools.partial(jax.tree.map, jnp.asarray)
    with pytest.raises(ValueError, match="widths is empty"):
        quantization.interactions(matvec, params, ())
    with pytest.raises(ValueError, match=r"must lie in \[2, 8\], got 9"):
        quantization.interactions(matvec, params, (9,))
    with pytest.raises(ValueError, match=r"widths are \(4, 4\), which has one twice"):
        quantization.interactions(matvec, params, (4, 4))
    pairs, sizes = random_programme(0, 2)
    omegas = pairs.diagonal()
    with pytest.raises(ValueError, match=r"no choice of widths fits into 1 bits"):
        allocate_pairwise(omegas, pairs, sizes, 1)
    with pytest.raises(ValueError, match=r"unknown method 'best'; valid: 'exact', 'exchange'"):
        allocate_pairwise(omegas, pairs, sizes, 1e9, method="best")
    with pytest.raises(ValueError, match=r"no interactions of \[\('l0', 8\)\]"):
        allocate_pairwise({"l0": {8: 1.0}}, pairs, sizes, 1e9)
    spoiled = Interactions(pairs.matrix.at[0, 4].set(jnp.nan), pairs.choices)
    with pytest.raises(ValueError, match=r"pairs.matrix has entries that are not finite"):
        allocate_pairwise(omegas, spoiled, sizes, 1e9)
    with pytest.raises(ValueError, match=r"without any quantized layer the value is 2.0"):
        largest_set(lambda layers: 2.0, {"a": 1}, 1.0)
    with pytest.raises(ValueError, match=r"got 0 layers"):
        largest_set(lambda layers: 2.0, {}, 1.0)
    with pytest.raises(ValueError, match=r"NaN for \['a'\]"):
        largest_set(lambda layers: 2.0, {"a": float("nan")}, 1.0)
    with pytest.raises(TypeError, match=r"evaluate must be a function layers -> value"):
        largest_set(2.0, {"a": 1.0}, 1.0)
