"""K-FAC and EK-FAC whose factors and inverses are spread over devices: the steps of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax

pytestmark = pytest.mark.usefixtures("x64")

WIDTH, DEPTH, TOKENS, EXAMPLES, TIMES = 8, 3, 24, 16, 8


def model(params, tokens):
    """A table that is the head too, a kernel with a bias, a scanned stack, one up and one down."""
    if AxisType.Explicit in jax.typeof(tokens).sharding.mesh.axis_types:
        params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
        x = params["table"].at[tokens].get(out_sharding=P("data"))
    else:
        x = params["table"][tokens]
    x = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["w"] + w["b"]), None), x, params["stack"])
    x = x + jnp.tanh(x @ params["up"]) @ params["down"]
    return x * params["scale"] @ params["table"].T


OBJECTIVE = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
SHAPES = {
    "table": (TOKENS, WIDTH),
    "first": {"w": (WIDTH, WIDTH), "b": (WIDTH,)},
    "stack": {"w": (DEPTH, WIDTH, WIDTH), "b": (DEPTH, WIDTH)},
    "up": (WIDTH, 2 * WIDTH),
    "down": (2 * WIDTH, WIDTH),
    "scale": (WIDTH,),
}
MESHES = {"data": ((8,), ("data",)), "both": ((4, 2), ("data", "model"))}


def is_shape(x):
    return isinstance(x, tuple)


@pytest.fixture(scope="module")
def problem():
    """Params, a batch, and the layout, with one factor that is diagonal."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        draw = lambda shape: jnp.asarray(rng.standard_normal(shape) / 2)
        params = jax.tree.map(draw, SHAPES, is_leaf=is_shape)
        tokens = jnp.asarray(rng.integers(TOKENS, size=(EXAMPLES, TIMES)))
        targets = jnp.asarray(rng.integers(TOKENS, size=(EXAMPLES, TIMES)))
        batch = tokens, targets
        layout = curvax.kron_layout(OBJECTIVE, params, batch)
    layout = layout.edit("['up']", g_structure="diagonal").edit("['scale']", kind="diagonal")
    return params, batch, layout


def optimizer(name, layout, placement):
    """Build one of the optimizers, with a placement or without."""
    rules = {
        "factored": curvax.scale_by_kfac,
        "exact": functools.partial(curvax.scale_by_kfac, damping_scheme="exact"),
        "relative": curvax.scale_by_kfac,
        "ekfac": curvax.scale_by_ekfac,
        "tracked": functools.partial(curvax.scale_by_ekfac, basis="qr"),
        "stagger": functools.partial(curvax.scale_by_kfac, inverse_every=2, stagger=True),
    }
    is_ekfac = name in ("ekfac", "tracked")
    estimate = curvax.kron.eigen_curvature if is_ekfac else curvax.kron_factors
    estimator = curvax.kron.estimator(OBJECTIVE, layout, estimate, placement=placement)
    damping = curvax.optim.RelativeDamping(0.1) if name == "relative" else 0.1
    rule = rules[name](layout, damping, placement=placement)
    return optax.chain(curvax.estimating(rule, estimator), optax.sgd(0.1, momentum=0.9))


def three_steps(tx):
    @jax.jit
    def run(params, state, batch):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(OBJECTIVE)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=3)[0]

    return run


@functools.cache
def on_one_device(name, problem_id):
    params, batch, layout = PROBLEMS[problem_id]
    tx = optimizer(name, layout, None)
    return three_steps(tx)(params, tx.init(params), batch)


PROBLEMS = {}


def expected(name, problem):
    PROBLEMS[id(problem)] = problem
    return on_one_device(name, id(problem))


def sharded(mesh, params, batch, is_full):
    """Place params whole or sharded by their largest axis, and the batch by its rows."""

    def spec(x):
        axes = [None] * x.ndim
        sizes = [size if size % 8 == 0 else 0 for size in x.shape]
        if is_full and max(sizes):
            axes[int(np.argmax(sizes))] = mesh.axis_names
        return P(*axes)

    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = jax.tree.map(lambda x: put(x, spec(x)), params)
    return params, jax.tree.map(lambda x: put(x, P("data")), batch)


CASES = [
    ("factored", "data", AxisType.Auto, False, "owners"),
    ("exact", "data", AxisType.Auto, False, "everyone"),
    ("relative", "both", AxisType.Auto, True, "owners"),
    ("stagger", "data", AxisType.Auto, True, "owners"),
    ("ekfac", "both", AxisType.Auto, False, "owners"),
    ("ekfac", "data", AxisType.Explicit, True, "owners"),
    ("tracked", "data", AxisType.Auto, True, "everyone"),
    ("factored", "both", AxisType.Explicit, True, "owners"),
]


@pytest.mark.parametrize(("name", "mesh_name", "axis_type", "is_full", "precondition"), CASES)
def test_placed_steps_are_those_of_one_device(
    problem, name, mesh_name, axis_type, is_full, precondition
):
    params, batch, layout = problem
    sizes, axes = MESHES[mesh_name]
    mesh = jax.make_mesh(sizes, axes, (axis_type,) * len(axes))
    placement = curvax.kron.kron_placement(
        layout,
        mesh,
        axes,
        batch_axes=("data",),
        precondition=precondition,
        min_size=4,
        turns=2 if name == "stagger" else 1,
    )
    tx = optimizer(name, layout, placement)
    reference, _ = expected(name, problem)
    params, batch = sharded(mesh, params, batch, is_full)
    with jax.set_mesh(mesh):
        init = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))
        stepped, state = three_steps(tx)(params, init(params), batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13), stepped, reference
    )
    curvature, block_state = (optax.tree.get(state, name) for name in ("curvature", "block_state"))
    for block in placement.blocks:
        arrays = jax.tree.leaves(curvature.blocks[block.name])
        if precondition == "owners":
            arrays += jax.tree.leaves(block_state[block.name])
        for x in arrays:
            shard = x.addressable_shards[0].data
            assert shard.shape == (x.shape[0] // 8, *x.shape[1:])


def test_a_state_goes_on_with_another_number_of_devices(problem):
    """Eight, four, and eight again: between them it is the state of the rule by itself."""
    _, _, layout = problem
    for name in ("factored", "exact", "ekfac"):
        _, state = expected(name, problem)
        back = state
        for number in (8, 4, 8):
            mesh = jax.make_mesh((number,), ("data",), devices=jax.devices()[:number])
            placement = curvax.kron_placement(layout, mesh, min_size=4)
            with jax.set_mesh(mesh):
                pack = jax.jit(functools.partial(curvax.pack_state, placement))
                unpack = jax.jit(functools.partial(curvax.unpack_state, placement))
                packed = pack(jax.tree.map(np.asarray, back))
                back = unpack(packed)
        # Bases have lost nothing but the order in which padding came.
        assert jax.tree.structure(back) == jax.tree.structure(state)
        arrays = lambda state: [
            optax.tree.get(state, "curvature"),
            optax.tree.get(state, "block_state"),
        ]
        jax.tree.map(np.testing.assert_array_equal, arrays(back), arrays(state))


def test_a_packed_state_of_other_blocks_is_refused(problem):
    _, _, layout = problem
    mesh = jax.make_mesh((1,), ("data",))
    placement = curvax.kron_placement(layout, mesh, min_size=4)
    _, state = expected("factored", problem)
    with jax.set_mesh(mesh):
        packed = curvax.pack_state(placement, state)
        with pytest.raises(ValueError, match="packed for a placement already"):
            curvax.pack_state(placement, packed)


def test_a_mask_removes_owner_blocks_but_no_part_of_one(problem):
    params, _, layout = problem
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    placement = curvax.kron_placement(layout, mesh, min_size=4)
    rule = curvax.scale_by_kfac(layout, placement=placement)
    joined = {path for block in placement.blocks for path in block.leaves}
    names = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    without_joined = jax.tree.map(lambda name: name not in joined, names)
    state = jax.eval_shape(optax.masked(rule, without_joined).init, params)
    assert list(state.inner_state.block_state) == ["['table']", "['up']"]
    without_one = jax.tree.map(lambda name: name != "['stack']['w']", names)
    without_one["stack"]["b"] = False
    with pytest.raises(ValueError, match="which the placement joins with"):
        jax.eval_shape(optax.masked(rule, without_one).init, params)


def test_slices_fail_each_for_itself(problem):
    """A factor that is not positive definite leaves the inverses beside it new."""
    params, batch, layout = problem
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    placement = curvax.kron_placement(layout, mesh, min_size=4)
    rule = curvax.scale_by_kfac(layout, decay=0.0, placement=placement)
    factors = curvax.kron_factors(OBJECTIVE, layout, params, batch, jax.random.key(0))
    twice = {
        name: block._replace(g=block.g._replace(total=2 * block.g.total))
        for name, block in factors.blocks.items()
    }
    bad = twice["['first']['w']"]
    bad = bad._replace(a=bad.a._replace(total=-bad.a.total))
    update = jax.jit(rule.update)
    state = update(params, rule.init(params), curvature=factors)[1]
    curvature = factors._replace(blocks=twice | {"['first']['w']": bad})
    after = update(params, state, curvature=curvature)[1]
    (name,) = (b.name for b in placement.blocks if "['first']['w']" in b.leaves)
    is_new = np.any(
        after.block_state[name].left.matrix != state.block_state[name].left.matrix, axis=(1, 2)
    )
    (block,) = (b for b in placement.blocks if b.name == name)
    for member, slices in block.slices():
        assert is_new[slices].all() == (member.block.name != "['first']['w']")
    assert after.info.num_failures[name] == 1


def lookups(params, ids):
    return params["wide"][ids] @ params["v"] + params["narrow"][ids] @ params["w"]


def test_padded_and_full_factors_of_lookups():
    """Two tables of other widths in one stack; a table whose factor of inputs is full."""
    objective = curvax.Objective(lookups, curvax.losses.softmax_cross_entropy())
    rng = np.random.default_rng(0)
    shapes = {"wide": (6, 5), "narrow": (6, 4), "v": (5, 3), "w": (4, 3)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.integers(6, size=16)), jnp.asarray(rng.integers(3, size=16))
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    for structure in ("diagonal", "full"):
        layout = curvax.kron_layout(objective, params, batch)
        for name in ("wide", "narrow"):
            layout = layout.edit(f"['{name}']", a_structure=structure)
        placement = curvax.kron_placement(layout, mesh, min_size=2)
        assert any("wide" in b.name and "narrow" in b.name for b in placement.blocks)

        def step(placement, layout=layout):
            curvature = curvax.kron.eigen_curvature(
                objective, layout, params, batch, jax.random.key(0), placement=placement
            )
            rule = curvax.scale_by_ekfac(layout, placement=placement)
            return rule.update(params, rule.init(params), curvature=curvature)[0]

        both = lambda step=step, placement=placement: (step(placement), step(None))
        placed, alone = jax.jit(both)()
        near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10)
        jax.tree.map(near, placed, alone)
