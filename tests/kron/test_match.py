"""Leaves are recognized in other containers than those that the layout was made of."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import MaskedNode

import curvax
from curvax.kron._layout import named_leaves, present
from curvax.kron._match import match_leaves


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Box:
    """An array in a box, as `nnx.Param` and Flax's `Partitioned` are: its path ends in `.value`."""

    value: Any


class Pair(NamedTuple):
    w: Any
    b: Any


def model(params, x):
    """Two layers of equal shapes, so that shapes alone do not tell them apart."""
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x * params["scale"]


PARAMS = {
    "layers": [
        {"w": jnp.arange(9.0).reshape(3, 3) / (5 + i), "b": jnp.arange(3.0) / (5 + i)}
        for i in range(2)
    ],
    "scale": jnp.array([1.0, 2.0, 3.0]),
}
BATCH = (jnp.sin(jnp.arange(15.0)).reshape(5, 3), jnp.cos(jnp.arange(15.0)).reshape(5, 3))
OBJECTIVE = curvax.Objective(model, curvax.losses.squared_error())
LAYOUT = curvax.kron_layout(OBJECTIVE, PARAMS, BATCH)
SHAPES = {leaf.path: leaf.shape for leaf in LAYOUT.leaves}
PATHS = list(SHAPES)


def flattened(tree, separator):
    """One dict of all leaves; the keys of its sort order are not those of the tree."""
    (b0, w0), (b1, w1) = ((layer["b"], layer["w"]) for layer in tree["layers"])
    leaves = {"layers/0/b": b0, "layers/0/w": w0, "layers/1/b": b1, "layers/1/w": w1}
    named = leaves | {"scale": tree["scale"]}
    return {name.replace("/", separator): x for name, x in named.items()}


CONTAINERS = {
    "boxes": lambda tree: jax.tree.map(lambda x: Box(value=x), tree),
    "some boxes": lambda tree: {**tree, "scale": Box(value=tree["scale"])},
    "tuples": lambda tree: {**tree, "layers": tuple(Pair(**layer) for layer in tree["layers"])},
    "strings for numbers": lambda tree: {
        **tree,
        "layers": dict(zip("01", tree["layers"], strict=True)),
    },
    "another order": lambda tree: OrderedDict(
        scale=tree["scale"], layers=[OrderedDict(w=x["w"], b=x["b"]) for x in tree["layers"]]
    ),
    "one dict": lambda tree: flattened(tree, "/"),
    "one dict with dots": lambda tree: flattened(tree, "."),
    "a list": jax.tree.leaves,
    "all under a key": lambda tree: {"params": tree},
}
every_container = pytest.mark.parametrize("put", CONTAINERS.values(), ids=CONTAINERS)


@every_container
def test_leaves_are_recognized_in_other_containers(put):
    by_path = named_leaves(LAYOUT, PARAMS)
    got = named_leaves(LAYOUT, put(PARAMS))
    assert got.keys() == by_path.keys()
    assert all(got[path] is x for path, x in by_path.items())
    # The scale alone is in no block.
    expected = jax.tree.map(lambda x: "diagonal" if x is PARAMS["scale"] else "kron", put(PARAMS))
    assert LAYOUT.labels(put(PARAMS)) == expected


def test_more_than_ten_layers_whose_numbers_become_strings():
    """As strings, 10 comes before 2: the order of leaves alone would be wrong."""
    arrays = [np.full((2, 2), i) for i in range(12)]
    numbered = {"layers": dict(enumerate(arrays))}
    shapes = {f"['layers'][{i}]": (2, 2) for i in range(12)}
    renamed = {"layers": {str(i): x for i, x in numbered["layers"].items()}}
    for match in match_leaves(shapes, renamed, "params"):
        assert match.names == [f"['layers'][{match.leaf[0, 0]}]"]


MASKS = {
    "a leaf": lambda tree: {**tree, "scale": MaskedNode()},
    "a part": lambda tree: {**tree, "layers": [MaskedNode(), tree["layers"][1]]},
    "several": lambda tree: {"layers": [MaskedNode(), tree["layers"][1]], "scale": MaskedNode()},
    "a leaf of boxes": lambda tree: {**CONTAINERS["boxes"](tree), "scale": Box(value=MaskedNode())},
    "a part of boxes": lambda tree: CONTAINERS["boxes"](
        {**tree, "layers": [MaskedNode(), tree["layers"][1]]}
    ),
    "leaves of a list": lambda tree: [MaskedNode(), MaskedNode(), *jax.tree.leaves(tree)[2:]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_parts_are_recognized(mask):
    masked = mask(PARAMS)
    leaves = named_leaves(LAYOUT, masked)
    by_path = named_leaves(LAYOUT, PARAMS)
    assert 0 < len(leaves) < len(by_path)
    assert all(by_path[path] is x for path, x in leaves.items())
    # The layout without what is masked out is one of the same tree.
    remaining = present(LAYOUT, masked)
    assert {leaf.path for leaf in remaining.leaves} == leaves.keys()
    assert named_leaves(remaining, masked).keys() == leaves.keys()
    assert [block.name for block in remaining.blocks] == [
        block.name for block in LAYOUT.blocks if block.name in leaves
    ]


def test_a_true_mismatch_says_which_leaf():
    def refused(tree, message):
        with pytest.raises(ValueError, match=message):
            match_leaves(SHAPES, tree, "updates")

    refused({**PARAMS, "more": 1.0}, r"updates has a leaf \['more'\], the layout has not")
    refused({"layers": PARAMS["layers"]}, r"the layout has a leaf \['scale'\], updates has not")
    # One that was renamed alone is another one, even of that shape.
    renamed = {"layers": PARAMS["layers"], "gain": PARAMS["scale"]}
    refused(renamed, r"the layout has a leaf \['scale'\], updates has not")
    turned = {"layers": PARAMS["layers"][::-1], "scale": jnp.ones(4)}
    refused(turned, r"\['scale'\] is \[3\] there, in updates \[4\]\.")
    boxed = CONTAINERS["boxes"](turned)
    refused(boxed, r"\['scale'\] is \[3\] there, in updates \[4\], at \['scale'\].value")
    refused(jax.tree.leaves(PARAMS)[1:], r"the layout has a leaf \['layers'\]\[0\]\['b'\]")
    refused([*jax.tree.leaves(PARAMS), 1.0], r"the layout has a leaf \['layers'\]\[0\]\['b'\]")
    rotated = [*jax.tree.leaves(PARAMS)[1:], PARAMS["scale"]]
    refused(rotated, r"\[0\]\['b'\] is \[3\] there, in updates \[3, 3\], at \[0\]")


def unboxed_model(params, x):
    is_box = lambda x: isinstance(x, Box)
    return model(jax.tree.map(lambda x: x.value if is_box(x) else x, params, is_leaf=is_box), x)


def test_matrices_of_blocks_in_other_containers():
    boxed = CONTAINERS["boxes"](PARAMS)
    matrices = curvax.kron.block_matrices(LAYOUT, boxed)
    chex.assert_trees_all_equal(matrices, curvax.kron.block_matrices(LAYOUT, PARAMS))
    doubled = curvax.kron.with_block_matrices(
        LAYOUT, jax.tree.map(jnp.add, matrices, matrices), boxed
    )
    expected = {"layers": optax.tree.scale(2, PARAMS["layers"]), "scale": PARAMS["scale"]}
    chex.assert_trees_all_close(doubled, CONTAINERS["boxes"](expected))


@pytest.mark.parametrize("optimizer", [curvax.kfac, curvax.ekfac])
def test_an_update_in_other_containers_is_the_same(optimizer):
    """As in `nnx.Optimizer`: the layout and `init` see boxes, the update sees arrays."""
    boxed = CONTAINERS["boxes"](PARAMS)
    objective = curvax.Objective(unboxed_model, OBJECTIVE.loss)
    layout = curvax.kron_layout(objective, boxed, BATCH)
    assert layout.leaves[0].path == "['layers'][0]['b'].value"
    results = []
    for tx, params in (
        (optimizer(0.1, OBJECTIVE, LAYOUT, momentum=0.0), PARAMS),
        (optimizer(0.1, objective, layout, momentum=0.0), boxed),
    ):
        state, gradient = tx.init(params), PARAMS
        update = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p, batch=BATCH))
        results.append(update(gradient, state, PARAMS)[0])
    chex.assert_trees_all_close(*results, rtol=1e-6)
    assert optax.tree.norm(results[0]) > 0
