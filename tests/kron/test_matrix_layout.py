"""Layouts for rules on gradients: from shapes, from a model's layout, and cut into tiles."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from zoo.checks import prepare

import curvax
from curvax.capture import entry_numbers
from curvax.kron import (
    block_matrices,
    gradient_layout,
    matrix_layout,
    tiled,
    with_block_matrices,
)

SHAPES = {
    "conv": (3, 2, 4, 5),
    "embed": (9, 4),
    "layers": {"norm": (2, 4), "out": (2, 3, 2, 4), "qkv": (2, 4, 3, 2), "up": (2, 4, 6)},
    "scale": (),
    "bias": (5,),
    "column": (4, 1),
}
AXES = {
    "['embed']": None,
    "['layers']": "sioo",
    "['layers']['out']": "siio",
    "['layers']['up']": "sio",
}


def numbered(shapes, dtype=np.float32):
    """Arrays whose entries are all different, and exact in bfloat16 where they are few."""
    counter = itertools.count(1)
    fill = lambda shape: np.array(
        [next(counter) for _ in range(int(np.prod(shape)))], dtype
    ).reshape(shape)
    return jax.tree.map(fill, shapes, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = numbered(SHAPES)
LAYOUT = matrix_layout(PARAMS, AXES)


def entries(layout):
    """For every leaf how many blocks have each entry, counted by numbers and not by kinds."""
    shapes = {leaf.path: leaf.shape for leaf in layout.leaves}
    counts = np.zeros(sum(int(np.prod(shape)) for shape in shapes.values()), int)
    for block in layout.blocks:
        np.add.at(counts, entry_numbers(block.kernel, shapes).ravel(), 1)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    return dict(zip(shapes, np.split(counts, ends[:-1]), strict=True))


def check_covered(layout):
    """Every entry of a leaf in blocks is in one block, all others are in none."""
    for leaf in layout.leaves:
        inside = ~layout.uncovered(leaf.path).ravel()
        np.testing.assert_array_equal(entries(layout)[leaf.path], inside)


def check_round_trip(layout, params):
    """What is read is put back bit by bit, into a tree that has nothing of it."""
    matrices = block_matrices(layout, params)
    assert {name: x.shape for name, x in matrices.items()} == {
        block.name: block.shape for block in layout.blocks
    }
    blank = {}
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        blank[name] = jnp.where(layout.uncovered(name), x, jnp.nan)
    tree = jax.tree.unflatten(jax.tree.structure(params), blank.values())
    chex.assert_trees_all_equal(with_block_matrices(layout, matrices, tree), params)


# -- from shapes -------------------------------------------------------------------------------


def test_matrices_are_what_numpy_makes_of_the_axes():
    got = block_matrices(LAYOUT, PARAMS)
    layers = PARAMS["layers"]
    want = {
        "['column']": PARAMS["column"][None],
        "['conv']": PARAMS["conv"].reshape(1, 24, 5),
        "['layers']['out']": layers["out"].reshape(2, 6, 4),
        "['layers']['qkv']": layers["qkv"].reshape(2, 4, 6),
        "['layers']['up']": layers["up"],
    }
    chex.assert_trees_all_equal(got, want)
    check_covered(LAYOUT)
    check_round_trip(LAYOUT, PARAMS)


def test_axes_of_one_role_are_joined_in_their_order_wherever_they_stand():
    x = numbered((2, 3, 4, 5, 2))
    layout = matrix_layout(x, "oisis")
    want = x.transpose(2, 4, 1, 3, 0).reshape(8, 15, 2)
    np.testing.assert_array_equal(block_matrices(layout, x)[""], want)
    check_round_trip(layout, x)


def test_the_table_says_how_each_matrix_was_read():
    assert str(LAYOUT).splitlines() == [
        "leaf                shape    block     A x G             stack  uses  factors  note",
        "['bias']            5        diagonal                                 20 B     a vector",
        "['column']          4x1      kron      full 4 x full 1                68 B     "
        "read from its shape as io",
        "['conv']            3x2x4x5  kron      full 24 x full 5               2.4 kB   "
        "read from its shape as iiio",
        "['embed']           9x4      diagonal                                 144 B    "
        "as chosen: no matrix",
        "['layers']['norm']  2x4      diagonal                                 32 B     "
        "as chosen: sioo is for 4 axes",
        "['layers']['out']   2x3x2x4  kron      full 6 x full 4   2            416 B    "
        "as chosen: siio",
        "['layers']['qkv']   2x4x3x2  kron      full 4 x full 6   2            416 B    "
        "as chosen: sioo",
        "['layers']['up']    2x4x6    kron      full 4 x full 6   2            416 B    "
        "as chosen: sio",
        "['scale']           scalar   diagonal                                 4 B      a scalar",
        "5 blocks, factors of 3.92 kB in float32",
        "84.3 % of the parameters are in blocks (268 of 318)",
    ]


def test_long_sides_are_diagonal():
    layout = matrix_layout(PARAMS, AXES, max_dim={"": 5, "['conv']": 4})
    structures = {block.name: block.structures for block in layout.blocks}
    assert structures["['conv']"] == ("diagonal", "diagonal")
    assert structures["['layers']['out']"] == ("diagonal", "full")


def test_a_layout_is_a_static_fact_of_shapes():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), PARAMS)
    again = matrix_layout(shapes, AXES)
    assert again == LAYOUT and hash(again) == hash(LAYOUT)
    assert matrix_layout(shapes) != LAYOUT
    inside = jax.eval_shape(lambda p: block_matrices(matrix_layout(p, AXES), p), PARAMS)
    assert inside["['conv']"].shape == (1, 24, 5)


def test_masked_leaves_are_left_out():
    masked = PARAMS | {"conv": optax.MaskedNode(), "layers": optax.MaskedNode()}
    for layout in (LAYOUT, matrix_layout(masked, {"['embed']": None})):
        matrices = block_matrices(layout, masked)
        assert matrices.keys() == {"['column']"}
        got = with_block_matrices(layout, jax.tree.map(jnp.negative, matrices), masked)
        chex.assert_trees_all_equal(got, masked | {"column": -PARAMS["column"]})
    # A group of `optax.partition` may have no leaf at all.
    nothing = jax.tree.map(lambda x: optax.MaskedNode(), PARAMS)
    assert matrix_layout(nothing).blocks == ()
    assert block_matrices(matrix_layout(nothing), nothing) == {}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"['convs']": "iiio"}, r"axes: no leaf's path begins with \"\['convs'\]\""),
        ({"['conv']": "iio"}, r"'iio' is for 3 axes, which \['conv'\] \[3, 2, 4, 5\] does not"),
        ({"['layers']": "iiiio"}, r"'iiiio' is for 5 axes, which \['layers'\]\['norm'\] \[2, 4\],"),
        ({"['conv']": "hwio"}, r"unknown letter 'h' in 'hwio'; valid: s \(stack\), i \(input\)"),
        ({"['conv']": "sooo"}, r"'sooo' has no i \(input\), which a matrix needs; None"),
        ({"['conv']": "siii"}, r"'siii' has no o \(output\)"),
        ({"['bias']": ""}, r"'' has no i \(input\)"),
        ({"": None}, r"no leaf of params is a matrix:\n  \['bias'\] \[5\]: as chosen: no matrix\n"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        matrix_layout(PARAMS, axes)


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"one letter for each axis, .* got \('i', 'o'\)"):
        matrix_layout(PARAMS, {"['embed']": ("i", "o")})
    with pytest.raises(TypeError, match="params must hold float arrays"):
        matrix_layout({"w": np.zeros((2, 2), int)})
    with pytest.raises(ValueError, match=r"\['b'\] \[3\]: a vector\nSay what the axes of one are"):
        matrix_layout({"b": np.zeros(3)})
    with pytest.raises(ValueError, match=r"\['w'\] \[0, 3\]: has no entries"):
        matrix_layout({"w": np.zeros((0, 3))})
    with pytest.raises(ValueError, match="max_dim must be an integer of at least 1, got 0"):
        matrix_layout(PARAMS, max_dim=0)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        matrix_layout(PARAMS, block_size=0)
    with pytest.raises(TypeError, match="block_size must be a Python integer"):
        tiled(LAYOUT, 2.5)


# -- tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 24, 100])
def test_tiles_are_no_larger_than_asked_and_have_every_entry_once(block_size):
    layout = matrix_layout(PARAMS, AXES, block_size=block_size)
    assert layout == tiled(LAYOUT, block_size)
    assert max(max(block.shape[1:]) for block in layout.blocks) <= block_size
    assert len({block.name for block in layout.blocks}) == len(layout.blocks)
    check_covered(layout)
    check_round_trip(layout, PARAMS)
    if block_size >= 24:
        assert layout == LAYOUT


def test_tiles_are_what_numpy_cuts():
    x = numbered((2, 7, 5))
    layout = matrix_layout(x, "sio", block_size=3)
    tiles = {
        "[0:6, 0:3]": np.stack([x[s, r : r + 3, :3] for s in (0, 1) for r in (0, 3)]),
        "[0:6, 3:5]": np.stack([x[s, r : r + 3, 3:] for s in (0, 1) for r in (0, 3)]),
        "[6:7, 0:3]": x[:, 6:, :3],
        "[6:7, 3:5]": x[:, 6:, 3:],
    }
    chex.assert_trees_all_equal(block_matrices(layout, x), tiles)
    # Tiles of both sides, in the order of the rows.
    x = numbered((4, 6))
    (tile,) = block_matrices(matrix_layout(x, block_size=2), x).values()
    want = [x[r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2, 4)]
    np.testing.assert_array_equal(tile, np.stack(want))


def test_the_table_shows_tiles():
    layout = matrix_layout({"w": np.zeros((8, 5))}, block_size=4)
    assert str(layout).splitlines()[1] == (
        "['w']  8x5    kron   full 4 x full 4, full 4 x full 1  2            392 B    "
        "['w'][0:8, 0:4]; read from its shape as io; 2 tiles of 4 x 4; "
        "['w'][0:8, 4:5]; 2 tiles of 4 x 1"
    )


def test_sides_that_are_not_full_are_not_cut():
    layout = LAYOUT.edit("['conv']", a_structure="identity")
    conv = [block for block in tiled(layout, 3).blocks if "conv" in block.name]
    assert [block.shape for block in conv] == [(1, 24, 3), (1, 24, 2)]
    # With tiles, max_dim is compared with the sides of tiles.
    structures = lambda block_size: {
        block.structures
        for block in matrix_layout(PARAMS, AXES, max_dim=4, block_size=block_size).blocks
    }
    assert structures(4) == {("full", "full")}
    assert structures(5) == {("full", "full"), ("diagonal", "diagonal"), ("full", "diagonal")} | {
        ("diagonal", "full")
    }


# -- from the layout of a model ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["tied", "lstm_optimized", "scan_layers", "fused_qkv", "embed", "experts", "conv_2d"],
)
def test_kernels_of_a_model_without_their_biases(name):
    case = zoo.CASES[name]()
    _, _, layout = prepare(case)
    kernels = gradient_layout(layout)
    assert gradient_layout(kernels) == kernels
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(case.params)}
    matrices = block_matrices(kernels, case.params)
    for block in layout.blocks:
        np.testing.assert_array_equal(matrices[block.name], block.kernel.read(leaves))
    assert all(block.bias is None and not block.uses for block in kernels.blocks)
    biases = {path for block in layout.blocks if block.bias for path in block.bias.leaves}
    for leaf in kernels.leaves:
        assert (leaf.kind == "diagonal" and "bias of" in leaf.reason) == (leaf.path in biases)
    for cut in (kernels, tiled(layout, 2)):
        check_covered(cut)
        check_round_trip(cut, case.params)


def test_tables_that_are_only_looked_up_are_told_from_those_that_are_the_head_too():
    lookups = lambda layout: {block.name: block.is_lookup for block in layout.blocks}
    _, _, layout = prepare(zoo.CASES["embed"]())
    want = {"['layers_0']['embedding']": True, "['layers_1']['kernel']": False}
    assert lookups(layout) == lookups(gradient_layout(layout)) == want
    assert "only looked up" in str(gradient_layout(layout))
    # The rows of a table have a diagonal factor, which needs no tiles.
    tiles = [block for block in tiled(layout, 2).blocks if block.is_lookup]
    assert [block.shape for block in tiles] == [(1, 5, 2), (1, 5, 1)]
    _, _, tied = prepare(zoo.CASES["tied"]())
    assert lookups(gradient_layout(tied)) == {"['embedding']": False}


def test_a_table_may_be_only_looked_up_in_one_part_of_an_objective():
    loss = curvax.losses.squared_error()
    parts = {
        "embed": curvax.Objective(lambda p, tokens: p["table"][tokens], loss),
        "head": curvax.Objective(lambda p, x: x @ p["table"].T, loss),
    }
    batch = {
        "embed": (jnp.zeros(3, int), jnp.ones((3, 2))),
        "head": (jnp.ones((3, 2)), jnp.ones((3, 5))),
    }
    layout = curvax.kron_layout(curvax.total(parts), {"table": jnp.ones((5, 2))}, batch)
    of = {name: layout.of_part(name).blocks[0].is_lookup for name in parts}
    assert of == {"embed": True, "head": False}
    assert not gradient_layout(layout).blocks[0].is_lookup


def homogeneous(w, x):
    """A kernel with its bias as last row, in one array."""
    return jnp.tanh(x @ w[:-1] + w[-1])


OBJECTIVE = curvax.Objective(homogeneous, curvax.losses.squared_error())
X, W = jnp.ones((3, 4)), numbered((5, 2))


def test_a_leaf_that_holds_kernel_and_bias_stays_in_its_block_in_part():
    layout = curvax.kron_layout(OBJECTIVE, W, (X, jnp.ones((3, 2))))
    kernels = gradient_layout(layout)
    (block,), (leaf,) = kernels.blocks, kernels.leaves
    assert block.shape == (1, 4, 2)
    assert (leaf.kind, leaf.unmatched) == ("kron", "diagonal")
    assert leaf.reason == "2 of 10 entries are in no matrix"
    check_covered(kernels)
    check_round_trip(kernels, W)


def test_layouts_for_gradients_alone_are_refused_where_the_model_is_captured():
    batch = X, jnp.ones((3, 2))
    key = jax.random.key(0)
    message = r"the layout was made from shapes .* curvax.kron_layout\(objective, params, batch\)"
    for layout in (
        matrix_layout(W),
        gradient_layout(curvax.kron_layout(OBJECTIVE, W, batch)),
    ):
        with pytest.raises(ValueError, match=message):
            curvax.kron_factors(OBJECTIVE, layout, W, batch, key)
        with pytest.raises(ValueError, match=message):
            curvax.kron.eigen_curvature(OBJECTIVE, layout, W, batch, key)
        with pytest.raises(ValueError, match=message):
            curvax.kron.fit_factors(OBJECTIVE, layout, W, [batch], key)
        tx = curvax.kfac(0.1, OBJECTIVE, layout, damping=0.1)
        with pytest.raises(ValueError, match=message):
            tx.update(W, tx.init(W), W, batch=batch)


# -- matrices are put back ---------------------------------------------------------------------


def test_matrices_are_put_back_in_the_dtype_of_the_tree():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    layout = tiled(LAYOUT, 3)
    matrices = block_matrices(layout, params)
    assert {x.dtype for x in matrices.values()} == {jnp.dtype("float32")}
    got = with_block_matrices(layout, jax.tree.map(lambda x: x + 2.0**-20, matrices), params)
    # The sum rounds to what was there.
    chex.assert_trees_all_equal(got, params)
    chex.assert_trees_all_equal_dtypes(got, params)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_is_replaced_does_not_matter_and_what_is_not_stays_bit_by_bit(value):
    layout = curvax.kron_layout(OBJECTIVE, W, (X, jnp.ones((3, 2))))
    kernels = gradient_layout(layout)
    matrix = jnp.full((1, 4, 2), 1e-3)
    got = with_block_matrices(kernels, {"[:4, :]": matrix}, jnp.full((5, 2), value))
    np.testing.assert_array_equal(got[:4], matrix[0])
    np.testing.assert_array_equal(got[4], np.full(2, value, np.float32))


def test_entries_behind_a_mask_stay():
    case = zoo.CASES["masked"]()
    _, _, layout = prepare(case)
    kernels = tiled(layout, 2)
    check_covered(kernels)
    matrices = block_matrices(kernels, case.params)
    got = with_block_matrices(kernels, matrices, jax.tree.map(lambda x: x * jnp.nan, case.params))
    for block in layout.blocks:
        x, mask = case.params[block.name[2:-2]], block.kernel.mask
        want = x if mask is None else np.where(mask, block.kernel.read({block.name: x}), np.nan)
        np.testing.assert_array_equal(got[block.name[2:-2]].reshape(want.shape), want)


def test_a_leaf_in_blocks_is_not_read_to_be_replaced():
    """The compiled program has only those leaves for arguments that it reads."""
    matrices = block_matrices(LAYOUT, PARAMS)
    put = jax.jit(lambda matrices, tree: with_block_matrices(LAYOUT, matrices, tree))
    program = put.lower(matrices, PARAMS).compile()
    sizes = {leaf.path: int(np.prod(leaf.shape)) for leaf in LAYOUT.leaves if leaf.kind != "kron"}
    read = sum(x.size for x in matrices.values()) + sum(sizes.values())
    assert program.memory_analysis().argument_size_in_bytes == 4 * read
    assert program.memory_analysis().temp_size_in_bytes == 0


def test_matrices_are_put_back_under_vmap():
    stacked = jax.tree.map(lambda x: jnp.stack([x, -x]), PARAMS)
    trip = lambda tree: with_block_matrices(LAYOUT, block_matrices(LAYOUT, tree), tree)
    chex.assert_trees_all_equal(jax.jit(jax.vmap(trip))(stacked), stacked)


def test_matrices_that_do_not_fit_are_refused():
    matrices = block_matrices(LAYOUT, PARAMS)
    name = "['conv']"
    with pytest.raises(ValueError, match=r"a block \[1, 24, 5\], got none"):
        with_block_matrices(LAYOUT, {k: x for k, x in matrices.items() if k != name}, PARAMS)
    with pytest.raises(ValueError, match=r"a block \[1, 24, 5\], got float32\[1, 5, 24\]"):
        with_block_matrices(LAYOUT, matrices | {name: matrices[name].mT}, PARAMS)
    with pytest.raises(ValueError, match="no such block, got float32"):
        with_block_matrices(LAYOUT, matrices | {"['w']": matrices[name]}, PARAMS)


def test_notes_and_lookups_are_a_part_of_a_layout():
    (block, *others) = LAYOUT.blocks
    other = dataclasses.replace(block, is_lookup=True)
    assert dataclasses.replace(LAYOUT, blocks=(other, *others)) != LAYOUT
