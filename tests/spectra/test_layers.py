"""Traces and top eigenvalues of layers' blocks against dense matrices;
a stream of batches against one batch.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES

import curvax
from curvax._host import OnHost
from curvax.spectra import layer_paths, top_eigenvalues_by, traces_by, traces_over
from curvax.spectra._layers import restrict

pytestmark = pytest.mark.usefixtures("x64")


def layer(path):
    return None if "bias" in path else path.split("'")[1]


GROUPINGS = {"leaf": None, "entry": 1, "function": layer, "one": lambda path: "all"}


def blocks(case, matrix, by):
    """Each layer's diagonal block of a dense matrix."""
    places, start = {}, 0
    for path, leaf in jax.tree.leaves_with_path(case.params):
        places[jax.tree_util.keystr(path)] = np.arange(start, start + leaf.size)
        start += leaf.size
    own = {
        name: np.concatenate([places[p] for p in paths])
        for name, paths in layer_paths(case.params, by).items()
    }
    return {name: np.asarray(matrix)[np.ix_(index, index)] for name, index in own.items()}


def test_layers_by_leaf_by_entry_and_by_function():
    params = CASES["mlp"]().params
    paths = [
        "['Dense_0']['bias']",
        "['Dense_0']['kernel']",
        "['Dense_1']['bias']",
        "['Dense_1']['kernel']",
    ]
    assert layer_paths(params) == {path: [path] for path in paths} == layer_paths(params, 7)
    assert layer_paths(params, 1) == {"['Dense_0']": paths[:2], "['Dense_1']": paths[2:]}
    assert layer_paths(params, layer) == {"Dense_0": paths[1:2], "Dense_1": paths[3:]}
    assert layer_paths(jnp.ones(3), 1) == {"": [""]}


@functools.cache
def estimated():
    """Traces of one network's layers by each grouping, and of the whole, with the same probes."""
    case = CASES["mlp"]()

    @jax.jit
    def estimate(params, batch):
        matvec, key = curvax.hvp(case.objective, params, batch), jax.random.key(0)
        layers = {
            name: traces_by(matvec, params, 400, key, by=by) for name, by in GROUPINGS.items()
        }
        return layers, curvax.hutchinson_trace(matvec, params, key, 400)

    return estimate(case.params, case.batch)


@pytest.mark.parametrize("name", ["leaf", "entry", "function"])
def test_traces_are_within_their_errors_of_those_of_the_blocks(name):
    case, got = CASES["mlp"](), estimated()[0][name]
    exact = {
        layer: np.trace(block)
        for layer, block in blocks(case, oracle.hessian(case), GROUPINGS[name]).items()
    }
    assert got.keys() == exact.keys()
    for layer, trace in got.items():
        assert abs(trace.mean - exact[layer]) < 3 * trace.sem
        assert (
            trace.sem < 0.15 * abs(exact[layer]) + 0.02
        )  # the test can tell one layer from another


def test_layers_add_up_to_the_trace_of_the_whole():
    layers, whole = estimated()
    np.testing.assert_allclose(
        sum(trace.mean for trace in layers["leaf"].values()), whole.mean, rtol=1e-12
    )
    chex.assert_trees_all_close(layers["one"]["all"], whole, rtol=1e-12)


class Matrix(NamedTuple):
    """A symmetric matrix on a tree of two layers."""

    dense: jax.Array
    params: dict

    def __call__(self, v):
        y = self.dense @ jnp.concatenate([v["a"]["w"].ravel(), v["b"]["w"], v["a"]["x"]])
        return {"a": {"w": y[:6].reshape(3, 2), "x": y[9:]}, "b": {"w": y[6:9]}}


def matrix():
    draw = jax.random.normal(jax.random.key(0), (11, 11))
    return Matrix(
        draw + draw.T, {"a": {"w": jnp.zeros((3, 2)), "x": jnp.zeros(2)}, "b": {"w": jnp.zeros(3)}}
    )


def test_top_eigenvalues_are_those_of_the_blocks():
    given, a, b = matrix(), np.r_[0:6, 9:11], np.r_[6:9]
    values, info = jax.jit(
        lambda m: top_eigenvalues_by(m, m.params, jax.random.key(0), by=1, tol=1e-10)
    )(given)
    exact = {"['a']": a, "['b']": b}
    assert values.keys() == info.keys() == exact.keys()
    for name, index in exact.items():
        np.testing.assert_allclose(
            values[name], np.linalg.eigvalsh(given.dense[np.ix_(index, index)])[-1], rtol=1e-10
        )
        assert info[name].converged and info[name].steps == len(index)


def test_the_product_with_a_block_does_not_depend_on_how_it_is_compiled():
    """XLA on CPUs returns garbage where a constant enters a matrix product in a fusion
    like this one.
    """
    keys, single = jax.random.split(jax.random.key(0), 4), jnp.float32
    shapes = ((512, 64), (64, 64), (64, 10), (64, 64))
    x, a, b, v = (
        jax.random.normal(k, shape, single) / 8 for k, shape in zip(keys, shapes, strict=True)
    )
    objective = curvax.Objective(
        lambda p, x: x @ p["a"] @ p["b"], curvax.losses.softmax_cross_entropy()
    )
    params, batch = {"a": a, "b": b}, (x, jnp.arange(512) % 10)
    build = functools.partial(curvax.ggnvp, objective)
    block = jax.jit(
        lambda params, batch, v: restrict(build(params, batch), params, [True, False])([v])[0]
    )
    whole = jax.jit(lambda params, batch, v: build(params, batch)(v)["a"])
    expected = whole(params, batch, {"a": v, "b": jnp.zeros_like(b)})
    np.testing.assert_allclose(block(params, batch, v), expected, rtol=1e-4, atol=1e-6)


def test_a_matvec_that_loops_on_the_host():
    given = matrix()
    on_host = OnHost(jax.jit(lambda v: given(v)))
    by = lambda path: "b" if "b" in path else None
    values, _ = top_eigenvalues_by(
        on_host, given.params, jax.random.key(0), by=by, which="smallest"
    )
    np.testing.assert_allclose(values["b"], np.linalg.eigvalsh(given.dense[6:9, 6:9])[0], rtol=1e-8)
    alone = jax.jit(lambda m: traces_by(m, m.params, 3, jax.random.key(1)))(given)
    chex.assert_trees_all_close(
        traces_by(on_host, given.params, 3, jax.random.key(1)), alone, rtol=1e-10
    )


def split(batch, *sizes):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]


@pytest.mark.parametrize(
    "name, sizes, product",
    [
        ("multi_head", (1, 1, 1, 1, 1), curvax.hvp),
        ("masked_sequence", (3, 2), functools.partial(curvax.ggnvp, microbatch=2)),
    ],
)
def test_a_stream_of_batches_equals_their_concatenation(name, sizes, product):
    """With numbers of terms that differ from batch to batch, and from head to head;
    some have none.
    """
    case = CASES[name]()
    estimate = functools.partial(
        traces_over, case.objective, case.params, key=jax.random.key(0), num_probes=4
    )
    got = estimate(iter(split(case.batch, *sizes)), by=1, matvec_of=product)
    matvec = product(case.objective, case.params, case.batch)
    whole = jax.jit(lambda mv: traces_by(mv, case.params, 4, jax.random.key(0), by=1))(matvec)
    chex.assert_trees_all_close(got, whole, rtol=1e-10)
    assert all(trace.sem > 1e-3 for trace in got.values())


def test_a_stream_is_compiled_once_and_read_one_batch_at_a_time():
    case, traces, alive = CASES["mlp"](), [], []

    def model(params, x):
        traces.append(1)
        return case.objective.model(params, x)

    def batches():
        for batch in split(case.batch, 1, 1, 1, 1, 1, 1):
            alive.append(len(traces))
            yield batch

    traces_over(
        curvax.Objective(model, case.objective.loss), case.params, batches(), 2, jax.random.key(0)
    )
    assert alive[0] == 0 < alive[1] == alive[-1] == len(traces)


def test_bfloat16_params_give_float32_results():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 2), jnp.bfloat16)}
    matvec = curvax.hvp(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2) / 2, params)

    @jax.jit
    def results(matvec, params):
        key, by = jax.random.key(0), lambda path: "b" if "b" in path else None
        return traces_by(matvec, params, 2, key), top_eigenvalues_by(matvec, params, key, by=by)

    traces, (values, _) = results(matvec, params)
    assert {x.dtype for x in jax.tree.leaves((traces, values))} == {jnp.dtype(jnp.float32)}
    assert {name: float(trace.mean) for name, trace in traces.items()} == {"['a']": 6, "['b']": 4}
    np.testing.assert_allclose(values["b"], 1, rtol=0.01)


def test_errors_say_what_and_where():
    case, key = CASES["mlp"](), jax.random.key(0)
    matvec = curvax.hvp(case.objective, case.params, case.batch)
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        traces_by(matvec, case.params, 0, key)
    with pytest.raises(ValueError, match="by must be at least 1, got 0"):
        traces_by(matvec, case.params, 1, key, by=0)
    with pytest.raises(TypeError, match=r"by must be a Python integer.*got str"):
        traces_by(matvec, case.params, 1, key, by="layer")
    with pytest.raises(
        TypeError, match=r"by must return a layer's name.*got int for \['Dense_0'\]\['bias'\]"
    ):
        top_eigenvalues_by(matvec, case.params, key, by=len)
    with pytest.raises(ValueError, match="by puts no leaf of params into a layer"):
        traces_by(matvec, case.params, 1, key, by=lambda path: None)
    with pytest.raises(ValueError, match=r"batches is empty"):
        traces_over(case.objective, case.params, [], 1, key)
