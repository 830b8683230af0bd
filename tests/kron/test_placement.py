"""Owners of slices: which there are, what each device does and sends, and what is refused."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

SIZES = (6, 24, 12, 24, 6)
ROWS = 16


def model(params, x):
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


OBJECTIVE = curvax.Objective(model, curvax.losses.squared_error())
PARAMS = [jax.ShapeDtypeStruct(pair, jnp.float32) for pair in itertools.pairwise(SIZES)]
BATCH = tuple(jax.ShapeDtypeStruct((ROWS, size), jnp.float32) for size in (SIZES[0], SIZES[-1]))


@pytest.fixture(scope="module")
def layout():
    return curvax.kron_layout(OBJECTIVE, PARAMS, BATCH)


def mesh_of(*sizes, axes=("data",)):
    return jax.make_mesh(sizes, axes, (AxisType.Auto,) * len(axes))


def test_shapes_that_are_transposes_of_each_other_are_joined(layout):
    placement = curvax.kron_placement(layout, mesh_of(8), min_size=2)
    (block,) = placement.blocks
    # 6 x 24, 12 x 24, and their transposes: in one stack of 12 x 24, with four slices empty.
    assert block.shape == (8, 12, 24)
    assert [member.is_swapped for member in block.members] == [False, True, True, False]
    np.testing.assert_allclose(block.fill, [0.5, 0.5, 1, 1, 0, 0, 0, 0])
    alone = curvax.kron_placement(layout, mesh_of(1), min_size=2)
    # One device gains nothing by padding.
    assert sorted(block.shape for block in alone.blocks) == [(2, 6, 24), (2, 12, 24)]
    assert hash(placement) == hash(curvax.kron_placement(layout, mesh_of(8), min_size=2))
    assert str(placement).splitlines()[1].split()[:4] == ["12x24", "4", "1", "38%"]


def test_devices_that_are_not_there_can_be_planned_for(layout):
    mesh = AbstractMesh((64,), ("data",))
    (block,) = curvax.kron_placement(layout, mesh, min_size=2).blocks
    assert block.shape == (64, 12, 24)


def test_small_blocks_and_such_of_two_products_stay_on_every_device(layout):
    placement = curvax.kron_placement(layout, mesh_of(8), min_size=25)
    assert not placement.blocks and placement.layout == layout


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"axes": ("rows",)}, ValueError, "an axis of axes.*'data'"),
        ({"batch_axes": ("rows",)}, ValueError, "an axis of batch_axes.*'data'"),
        ({"precondition": "all"}, ValueError, "'owners'.*'everyone'"),
        ({"mesh": 8}, TypeError, "jax.sharding.Mesh, got int"),
        ({"turns": 0}, ValueError, "turns"),
        ({"axes": ("data", "data")}, ValueError, "different axes of the mesh"),
        ({"layout": PARAMS}, TypeError, r"what curvax\.kron_layout returns, got list"),
    ],
)
def test_what_is_no_placement_is_refused(layout, change, error, message):
    with pytest.raises(error, match=message):
        curvax.kron_placement(**{"layout": layout, "mesh": mesh_of(8), **change})


def test_a_placement_of_another_layout_is_refused(layout):
    placement = curvax.kron_placement(layout, mesh_of(8), min_size=2)
    other = layout.edit("[0]", a_structure="diagonal")
    with pytest.raises(ValueError, match="placement is of another layout"):
        curvax.scale_by_kfac(other, placement=placement)
    with pytest.raises(TypeError, match=r"what curvax\.kron_placement returns, got Layout"):
        curvax.kron_factors(OBJECTIVE, layout, PARAMS, BATCH, jax.random.key(0), placement=layout)
    # Blocks of two turns are in one stack.
    rule = curvax.scale_by_kfac(layout, inverse_every=2, stagger=True, placement=placement)
    with pytest.raises(ValueError, match=r"different turns.*turns=2"):
        jax.eval_shape(rule.update, PARAMS, jax.eval_shape(rule.init, PARAMS))


def test_a_placement_for_another_mesh_is_refused(layout):
    """Its sums would be over other devices than they are divided among."""
    placement = curvax.kron_placement(layout, mesh_of(8), min_size=2)
    rule = curvax.scale_by_kfac(layout, placement=placement)
    other = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(other), pytest.raises(ValueError, match="the mesh in context"):
        jax.eval_shape(rule.init, PARAMS)
    whole = NamedSharding(other, P())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), PARAMS)
    with pytest.raises(ValueError, match="make the placement for that"):
        curvax.state_shardings(rule, params)


def test_what_a_device_does_and_sends(layout):
    """One inversion of either side, factors scattered, steps gathered; and so in a scan."""
    mesh = mesh_of(8)
    placement = curvax.kron_placement(layout, mesh, min_size=2)
    tx = curvax.kfac(0.1, OBJECTIVE, layout, curvature_every=1, placement=placement)
    tx_everywhere = curvax.kfac(0.1, OBJECTIVE, layout, curvature_every=1)
    put = lambda x, *axes: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes))
    )
    params = jax.tree.map(put, PARAMS)
    batch = jax.tree.map(lambda x: put(x, "data"), BATCH)

    def compiled(tx):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(OBJECTIVE)(params, batch_here)
            updates, state = tx.update(gradient, state, params, batch=batch_here)
            return (jax.tree.map(jnp.add, params, updates), state), None

        def steps(params, state, batch):
            nonlocal batch_here
            batch_here = batch
            return jax.lax.scan(step, (params, state), None, length=2)[0]

        batch_here = None
        shardings = curvax.state_shardings(tx, params)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            shardings,
        )
        return state, jax.jit(steps).lower(params, state, batch).compile()

    state, program = compiled(tx)
    _, everywhere = compiled(tx_everywhere)
    factorizations = lambda program: program.as_text().count("lapack_spotrf")
    assert factorizations(program) == 2 and factorizations(everywhere) > 2

    text = program.as_text()
    gathered = re.findall(r"f32\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered.count("8,12,24") == 1  # the steps
    # No factors, and no rows of the whole batch.
    assert not {"8,12,12", "8,24,24"}.intersection(gathered)
    assert not any(str(ROWS) in shape.split(",") for shape in gathered)
    scattered = re.findall(r"f32\[([\d,]*)\]\S* reduce-scatter\(", text)
    assert {"1,12,12", "1,24,24"} <= set(scattered)

    # Every device has an eighth before and after.
    _, after = program.output_shardings
    before = jax.tree.map(lambda x: x.sharding, state)
    is_same = lambda x, sharding, now: sharding.is_equivalent_to(now, x.ndim)
    assert jax.tree.all(jax.tree.map(is_same, state, before, after))


def test_the_symmetric_product_of_gpus_is_called_on_one_device_only(layout, monkeypatch):
    """XLA has no rule by which it would divide the call: all rows would go to all devices."""
    placement = curvax.kron_placement(layout, mesh_of(8), min_size=2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def lowered(placement):
        def factors(params, batch):
            key = jax.random.key(0)
            return curvax.kron_factors(OBJECTIVE, layout, params, batch, key, placement=placement)

        traced = jax.jit(factors).trace(PARAMS, BATCH)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert "syrk" not in lowered(None)
    # Every call is in a region that is a device's own.
    text = lowered(placement)
    regions = re.findall(r"sdy\.manual_computation.*?sdy\.return", text, re.DOTALL)
    calls = [region.count("cusolver_syrk") for region in regions]
    assert sum(calls) == text.count("@cusolver_syrk") == 2 * len(PARAMS)
