"""Models that name explicit axes of a mesh, as tensor parallel ones do, act as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.apps import influence

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
SPECS = {"a": P(None, "model"), "b": P("model"), "s": P(None, "model", None), "c": P("model")}


@jax.custom_vjp
def doubled_backwards(x, power):
    """Return x, with a derivative that is not that of the value."""
    return x**power


doubled_backwards.defvjp(lambda x, power: (x, power), lambda _, g: (2 * g, None))


@jax.custom_jvp
def tripled_forwards(x, power):
    """Return x, with a derivative that is not that of the value."""
    return x**power


tripled_forwards.defjvp(lambda at, v: (at[0] ** at[1], 3 * v[0]))


def network(placed, params, inputs):
    """Two linear maps around a scan of linear maps; [b, t, i] to [b, t, o]."""
    dot = functools.partial(jnp.einsum, "bti,io->bto")
    at = lambda *spec: P("data", None, *spec) if placed else None
    shard = lambda x, spec: jax.sharding.reshard(x, spec) if placed else x

    def layer(h, w):
        h = doubled_backwards(dot(h, w, out_sharding=at(None)), inputs["one"])
        return shard(jnp.tanh(h), at("model")), None

    h = dot(inputs["x"], params["a"], out_sharding=at("model")) + params["b"]
    h = tripled_forwards(jax.nn.relu(h), inputs["one"])
    # Without what the axes say of it, the carry would be of another type than it is.
    h, _ = lax.scan(jax.checkpoint(layer), h, params["s"])
    h = lax.cond(inputs["one"] > 0, jnp.sin, jnp.cos, h)
    return dot(h, params["c"], out_sharding=at(None))


def objective_of(placed):
    model = functools.partial(network, placed)
    return curvax.Objective(model, curvax.losses.softmax_cross_entropy())


def problem():
    draws = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draws.normal(size=shape))
    params = {"a": normal(3, 8), "b": normal(8), "s": normal(2, 8, 8), "c": normal(8, 4)}
    inputs = {"x": normal(8, 2, 3), "one": curvax.Shared(jnp.array(1))}
    return params, (inputs, jnp.asarray(draws.integers(4, size=(8, 2))))


@pytest.fixture
def sharded():
    """Params and batch on a mesh of 2 x 4, which is in force."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params, (inputs, targets) = problem()
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        everywhere = put(inputs["one"].value, P())
        inputs = {"x": put(inputs["x"], P("data")), "one": curvax.Shared(everywhere)}
        yield jax.tree.map(put, params, SPECS), (inputs, put(targets, P("data")))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), a, b)


def test_curvature_of_a_tensor_parallel_model_is_that_on_one_device(sharded):
    """All rows at once, chunks of three rows, which no axis divides, and single rows."""
    params, batch = problem()
    layout = curvax.kron_layout(objective_of(False), params, batch)
    reduced = layout.edit("['c']", sharing="reduce")
    assert layout == curvax.kron_layout(objective_of(True), *sharded)

    @functools.partial(jax.jit, static_argnums=0)
    def curvature(placed, params, batch):
        objective = objective_of(placed)
        sampled = curvax.kron_factors(objective, layout, params, batch, KEY)
        options = {"fisher": "exact", "microbatch": 3}
        factors = curvax.kron_factors(objective, reduced, params, batch, KEY, **options)
        eigen = curvax.kron.eigen_curvature(objective, layout, params, batch, KEY)
        inputs = curvax.kron.input_factors(objective, layout, params, batch, KEY)
        vectors = curvax.kron.mean_vectors(objective, layout, params, batch)
        return sampled, factors, eigen, inputs, vectors

    close(curvature(True, *sharded), curvature(False, params, batch))


def test_an_exact_solve_of_a_tensor_parallel_model_is_that_on_one_device(sharded):
    def model(placed, w, inputs):
        spec = P("data", None, "model") if placed else None
        return jnp.tanh(jnp.einsum("bti,io->bto", inputs["x"], w, out_sharding=spec))

    def step(placed, params, batch):
        error = curvax.losses.squared_error()
        objective = curvax.Objective(functools.partial(model, placed), error)
        batch = batch[0], jnp.zeros_like(objective.outputs(params["a"], batch[0]))
        space = curvax.solve.sample_space(objective, params["a"], batch, space="samples")
        return curvax.solve.direct(space, params["a"], damping=0.1)[0]

    close(*[jax.jit(functools.partial(step, i))(*x) for i, x in enumerate((problem(), sharded))])


def test_influence_of_a_tensor_parallel_model_is_that_on_one_device(sharded):
    def scores(placed, params, batch):
        objective = objective_of(placed)
        layout = curvax.kron_layout(objective, params, batch)
        fitted = influence.fit(objective, layout, params, [batch], KEY, progress=False)
        on_batch = fitted, objective, params, batch, [batch]
        by_value, _ = influence.influence(*on_batch, measurement=objective.value)
        alone = influence.self_influence(fitted, objective, params, [batch])
        return by_value.change_if_removed, alone

    close(scores(True, *sharded), scores(False, *problem()))


def test_a_model_that_names_the_mesh_itself_is_told_what_to_do(sharded):
    (params, batch), mesh = sharded, jax.sharding.get_mesh()

    def model(w, inputs):
        spec = NamedSharding(mesh, P("data", None, "model"))
        return jnp.einsum("bti,io->bto", inputs["x"], w, out_sharding=spec)

    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
    layout = curvax.kron_layout(objective, params["a"], batch)
    with pytest.raises(ValueError, match="should match the mesh") as error:
        curvax.kron_factors(objective, layout, params["a"], batch, KEY)
    assert "by a PartitionSpec" in error.value.__notes__[0]


def test_rows_of_ekfac_stay_where_the_batch_is():
    """Of one batch, of two that are merged, and of the parts of an objective."""
    draws = np.random.default_rng(1)
    model = lambda w, x: jnp.tanh(x @ w)
    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
    parts = curvax.total({"first": objective, "second": objective})
    w, batch = jnp.ones((6, 4)), (draws.normal(size=(16, 6)), draws.integers(4, size=16))
    layout = curvax.kron_layout(objective, w, batch)
    of_parts = curvax.kron_layout(parts, w, {"first": batch, "second": batch})

    @jax.jit
    def curvatures(w, batch):
        two = {"first": batch, "second": (-batch[0], batch[1])}
        one = curvax.kron.eigen_curvature(objective, layout, w, batch, KEY)
        other = curvax.kron.eigen_curvature(objective, layout, w, two["second"], KEY)
        both = curvax.kron.eigen_curvature(parts, of_parts, w, two, KEY)
        return one, curvax.kron.merge(one, other), both

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
    sharded = curvatures(put(w), put(batch, "data"))
    close(sharded, curvatures(w, batch))
    rows = jax.tree.leaves([(x.inputs, x.cotangents) for x in sharded])
    assert {x.sharding.spec[0] for x in rows} == {"data"}
    factors = jax.tree.leaves([x.factors for x in sharded])
    assert all(x.sharding.is_fully_replicated for x in factors)
