"""Mean inputs and cotangents against gradients of biases, and against hooks put in by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parts import TOTAL, WEIGHTS, problem

import curvax
from curvax import losses
from curvax._trees import by_path
from curvax.kron import MeanVectors, block_matrices, kron_layout, mean_vectors


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.result_type(float))


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["cnn", "lstm", "multi_head"])
def test_cotangents_are_gradients_of_biases_and_inputs_beside_their_ones(name, x64):
    objective, params, batch, _ = CASES[name]()
    layout = kron_layout(objective, params, batch)

    @jax.jit
    def everything(params, batch):
        vectors = mean_vectors(objective, layout, params, batch)
        in_chunks = mean_vectors(objective, layout, params, batch, microbatch=2)
        factors = curvax.kron_factors(
            objective, layout, params, batch, jax.random.key(0), fisher="empirical"
        )
        return vectors, in_chunks, factors, jax.grad(objective)(params, batch)

    vectors, in_chunks, factors, gradient = everything(params, batch)
    jax.tree.map(close, in_chunks, vectors)
    biased = [block for block in layout.blocks if block.bias is not None]
    for block in biased:
        a, g = vectors[block.name]
        stack, rows, columns = block.kernel.shape
        assert a.shape == (stack, 1, rows) and g.shape == (stack, 1, columns)
        close(g[:, 0], block.bias.read(by_path(gradient)))
        # The last row of A is the mean of 1 times the inputs.
        close(a[:, 0], factors.blocks[block.name].a.mean[:, -1, :-1])
        assert np.any(a) and np.any(g)
    assert len(biased) >= 2 - (name == "lstm")


def language_model(params, ids, hook):
    """A table that is the head too, and three layers in a scan, or one by one with their hooks."""
    h = hook("embedded", params["table"][ids])
    for k, w in enumerate(params["layers"]):
        h = jnp.tanh(hook(f"layer {k}", h @ w))
    return hook("head", h @ params["table"].T)


def scanned(params, ids):
    h, _ = jax.lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), params["table"][ids], params["layers"]
    )
    return h @ params["table"].T


@functools.cache
def text():
    """Params, a batch whose last tokens are ignored, the objective, its layout."""
    params = {"table": normal(0, 6, 4), "layers": normal(1, 3, 4, 4)}
    ids = jax.random.randint(jax.random.key(2), (8, 5), 0, 5)
    labels = jax.random.randint(jax.random.key(3), (8, 5), 0, 6).at[:, 3:].set(-1)
    objective = curvax.Objective(scanned, losses.softmax_cross_entropy(ignore_index=-1))
    return objective, params, (ids, labels), kron_layout(objective, params, (ids, labels))


@functools.cache
def vectors_of_text():
    objective, *_, layout = text()
    return jax.jit(functools.partial(mean_vectors, objective, layout))


def test_stacked_layers_and_a_tied_table(x64):
    objective, params, (ids, labels), _ = text()
    vectors = vectors_of_text()(params, (ids, labels))
    seen = {}

    def loss(perturbations):
        def hook(name, x):
            seen[name] = x
            return x + perturbations[name]

        return objective.loss(language_model(params, ids, hook), labels)

    layer_names = [f"layer {k}" for k in range(3)]
    zeros = dict.fromkeys(["embedded", *layer_names, "head"], 0.0)
    loss(zeros)
    outputs, zeros = dict(seen), jax.tree.map(jnp.zeros_like, dict(seen))
    cotangents = jax.jit(jax.grad(loss))(zeros)
    sums = {name: x.sum((0, 1)) for name, x in cotangents.items()}

    # Ignored positions have no cotangent, and no part in means.
    mean_of = lambda x: x[:, :3].mean((0, 1))
    inputs = [outputs["embedded"], *(jnp.tanh(outputs[name]) for name in layer_names)]
    layers = vectors["['layers']"]
    close(layers.a[:, 0], jnp.stack([mean_of(x) for x in inputs[:3]]))
    close(layers.g[:, 0], jnp.stack([sums[name] for name in layer_names]))

    # One pair of the lookup, one of the head, which multiplies by the transpose.
    frequencies = mean_of(jax.nn.one_hot(ids, 6))
    pairs = [(frequencies, sums["embedded"]), (sums["head"], mean_of(inputs[3]))]
    table = vectors["['table']"]
    assert table.a.shape == (1, 2, 6) and table.g.shape == (1, 2, 4)
    for k, (a, g) in enumerate(pairs):
        close(jnp.outer(table.a[0, k], table.g[0, k]), jnp.outer(a, g))
    ratios = jnp.linalg.norm(table.a, axis=2) / jnp.linalg.norm(table.g, axis=2)
    close(ratios[0, 0], ratios[0, 1])


def test_eight_devices_sum_what_one_does(x64):
    _, params, batch, _ = text()
    expected = vectors_of_text()(params, batch)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
        replicated = jax.device_put(params, NamedSharding(mesh, P()))
        found = vectors_of_text()(replicated, sharded)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_have_the_mean_of_their_patches(groups, x64):
    def convolution(w, x):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (2, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    objective = curvax.Objective(convolution, losses.squared_error())
    w, x = normal(0, 3, 2, 4 // groups, 6), normal(1, 5, 4, 4, 4)
    batch = x, normal(2, 5, 2, 4, 6)
    layout = kron_layout(objective, w, batch)
    (a, g), in_chunks = jax.jit(
        lambda w, batch: (
            mean_vectors(objective, layout, w, batch)[""],
            mean_vectors(objective, layout, w, batch, microbatch=2)[""],
        )
    )(w, batch)
    jax.tree.map(close, in_chunks, MeanVectors(a, g))
    # A convolution is linear in its patches: the mean patch gives the mean output, of any kernel.
    matrix = block_matrices(layout, w)[""]
    mean_output = convolution(w, x).mean((0, 1, 2))
    close(jnp.einsum("ski,sio->sko", a, matrix).ravel(), mean_output)
    of_outputs = jax.grad(lambda f: objective.loss(f, batch[1]))(convolution(w, x))
    close(g.ravel(), of_outputs.sum((0, 1, 2)))


def test_parts_of_an_objective_have_a_pair_each(x64):
    params, batch = problem()
    layout = kron_layout(TOTAL, params, batch)
    vectors = jax.jit(lambda *args: mean_vectors(TOTAL, layout, *args))(params, batch)
    parts = {part.name: part.objective for part in TOTAL.parts}
    weight, objective = WEIGHTS["boundary"], parts["boundary"]
    alone = kron_layout(objective, params, batch["boundary"])
    expected = mean_vectors(objective, alone, params, batch["boundary"])
    for block in layout.blocks:
        a, g = vectors[block.name]
        # The Laplacian's uses come first; those of the boundary are the last pair.
        assert a.shape[1] == g.shape[1] == 2
        (a_alone,), (g_alone,) = expected[block.name].a[0], expected[block.name].g[0]
        close(jnp.outer(a[0, 1], g[0, 1]), weight**0.5 * jnp.outer(a_alone, g_alone))


def test_a_layout_of_shapes_says_what_is_needed():
    objective, params, batch, _ = CASES["mlp"]()
    layout = curvax.kron.matrix_layout(params)
    with pytest.raises(ValueError, match="does not say where the model uses"):
        mean_vectors(objective, layout, params, batch)
