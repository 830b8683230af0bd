"""The state of an optimizer, made and restored where the parameters say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import curvax


def model(params, x):
    return jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) @ params["c"]


OBJECTIVE = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
VALUES = {"a": {"w": jnp.ones((4, 8)), "b": jnp.zeros(8)}, "c": jnp.ones((8, 16))}
SPECS = {"a": {"w": P(None, "model"), "b": P("model")}, "c": P("model")}
BATCH = (jnp.ones((16, 4)), jnp.arange(16) % 3)


def mesh_of(num_devices, axis_type=AxisType.Auto):
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("model",), (axis_type,), devices=devices)


def placed(mesh):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(put, VALUES, SPECS)


def optimizers():
    layout = curvax.kron_layout(OBJECTIVE, VALUES, BATCH)
    groups = {"a": {"w": "kron", "b": "adam"}, "c": "kron"}
    rules = {"kron": curvax.scale_by_mfac(4, 0.1), "adam": optax.adam(1e-3)}
    yield optax.chain(
        optax.clip(1.0), curvax.kfac(0.1, OBJECTIVE, layout, damping=0.1, momentum=0.9)
    )
    yield optax.partition(rules, groups)
    yield optax.masked(curvax.adahessian(0.1, OBJECTIVE), {"a": True, "c": False})
    yield optax.MultiSteps(curvax.soap(1e-3), 2).gradient_transformation()


def at(tree, *ends):
    """Return the leaves whose path ends so, one for each end."""
    paths = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree)]
    return [next(x for path, x in paths if path.endswith(end)) for end in ends]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_what_mirrors_a_parameter_is_where_it_is_and_the_rest_everywhere(axis_type):
    params = placed(mesh_of(8, axis_type))
    kfac, partition, masked, multi_steps = optimizers()

    shardings = curvax.state_shardings(kfac, params)
    momentum = at(shardings, "trace['a']['w']", "trace['a']['b']", "trace['c']")
    assert [s.spec for s in momentum] == [P(None, "model"), P("model"), P("model")]
    factors = jax.tree.leaves(optax.tree.get(shardings, "curvature"))
    assert {s.spec for s in factors} == {P()}

    # A window of four gradients: its own axis is whole, the parameter's axes are sharded.
    ends = ("rows['a']['w']", "mu['a']['b']")
    window, mu = at(curvax.state_shardings(partition, params), *ends)
    assert (window.spec, mu.spec) == (P(None, None, "model"), P("model"))
    (mu,) = at(curvax.state_shardings(masked, params), "mu['a']['w']")
    assert mu.spec == P(None, "model")
    gradients = optax.tree.get(curvax.state_shardings(multi_steps, params), "acc_grads")
    assert jax.tree.map(lambda s: s.spec, gradients) == SPECS


def test_rows_of_a_window_are_written_where_they_are():
    """Under data parallelism every device has some of the gradients, and none is sent."""
    mesh = mesh_of(8)
    params = jax.device_put(VALUES, NamedSharding(mesh, P()))
    tx = curvax.scale_by_mfac(16, 0.1)
    shardings = curvax.state_shardings(tx, params)
    assert {s.spec for s in jax.tree.leaves(shardings.curvature.rows)} == {P("model")}
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    update = jax.jit(tx.update, out_shardings=(None, shardings))
    program = update.lower(params, state).compile().as_text()
    gathered = re.findall(r"\[([\d,]*)\]\S* all-gather\(", program)
    assert gathered and not {"16,4,8", "16,8,16", "16,8"}.intersection(gathered)

    # The same steps as on one device, past the end of the window.
    alone = tx.init(VALUES)
    for k in range(18):
        gradient = jax.tree.map(
            lambda x, k=k: jnp.sin(x + k + jnp.arange(x.size).reshape(x.shape)), VALUES
        )
        step, state = update(jax.device_put(gradient, NamedSharding(mesh, P())), state)
        expected, alone = tx.update(gradient, alone)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), step, expected
    )


def test_a_state_is_made_there_and_restored_on_other_devices(tmp_path):
    """Eight devices, then four, then one."""
    tx, *_ = optimizers()
    params = placed(mesh_of(8))
    state = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))(params)
    assert at(state, "trace['c']")[0].addressable_shards[0].data.shape == (1, 16)
    counted = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), state)
    counted = jax.device_put(counted, curvax.state_shardings(tx, params))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", counted)
        checkpointer.wait_until_finished()
        for num_devices in (4, 1):
            there = placed(mesh_of(num_devices))
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                jax.eval_shape(tx.init, there),
                curvax.state_shardings(tx, there),
            )
            restored = checkpointer.restore(tmp_path / "state", target)
            jax.tree.map(np.testing.assert_array_equal, restored, counted)
            (trace,) = at(restored, "trace['c']")
            assert trace.sharding == there["c"].sharding


def test_shapes_with_shardings_will_do_and_one_device_too():
    tx, *_ = optimizers()
    params = placed(mesh_of(8))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    assert curvax.state_shardings(tx, shapes) == curvax.state_shardings(tx, params)
    device = jax.devices()[3]
    alone = curvax.state_shardings(tx, jax.device_put(VALUES, device))
    assert set(jax.tree.leaves(alone)) == {SingleDeviceSharding(device)}


def test_params_without_a_place_are_refused():
    tx = optax.sgd(0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"params\['w'\], a ndarray, has no sharding"):
        curvax.state_shardings(tx, {"w": np.ones(3)})
    two = {name: placed(mesh_of(number))["c"] for name, number in (("a", 8), ("b", 4))}
    with pytest.raises(ValueError, match="2 different meshes"):
        curvax.state_shardings(tx, two)
    with pytest.raises(ValueError, match="no arrays"):
        curvax.state_shardings(tx, {})


def gathered_model(params, x):
    """Fully sharded: every layer gathers its parameters before it uses them."""
    if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
        params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
    return model(params, x)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "shampoo", "egn", "lazy_newton", "ssbroyden"])
def test_fully_sharded_explicit_params_step_as_on_one_device(name):
    """A kernel is joined with its bias, and multiplied along the axis that is sharded.

    Exact methods make one axis of examples and outputs, or of all entries of all parameters.
    """
    objective = curvax.Objective(gathered_model, curvax.losses.softmax_cross_entropy())
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = {"a": {"w": (8, 16), "b": (16,)}, "c": (16, 8)}
        params = jax.tree.map(
            lambda key, shape: jax.random.normal(key, shape),
            {"a": {"w": keys[0], "b": keys[1]}, "c": keys[2]},
            shapes,
        )
        batch = (jax.random.normal(keys[3], (16, 8)), jnp.arange(16) % 8)
        layout = curvax.kron_layout(objective, params, batch)
        tx = {
            "kfac": curvax.kfac(0.1, objective, layout, damping=0.1),
            "ekfac": curvax.ekfac(0.1, objective, layout, damping=0.1),
            "shampoo": optax.with_extra_args_support(curvax.shampoo(0.1)),
            "egn": curvax.egn(0.1, objective, damping=0.1),
            "lazy_newton": curvax.lazy_newton(0.1, objective, 0.1, matvec_of=curvax.ggnvp),
            "ssbroyden": curvax.scale_by_ssbroyden(),
        }[name]

        @jax.jit
        def two_steps(params, state, batch):
            for _ in range(2):
                gradient = jax.grad(objective)(params, batch)
                updates, state = tx.update(gradient, state, params, batch=batch)
                params = optax.apply_updates(params, updates)
            return params, state

        expected, _ = two_steps(params, tx.init(params), batch)
        mesh = mesh_of(8, AxisType.Explicit)
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P("model")))
        params, batch = jax.tree.map(put, (params, batch))
        with jax.set_mesh(mesh):
            init = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))
            stepped, _ = two_steps(params, init(params), batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), stepped, expected)
    same_place = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(same_place, stepped, params))
