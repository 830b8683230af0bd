"""Every leaf of every model is found, and its taps give the model's own gradients,
example by example.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import zoo
from jax import lax
from zoo.checks import check_leaves, check_taps, prepare

import curvax
from curvax import losses
from curvax.capture import record
from curvax.kron._factors import init_factors
from curvax.kron._layout import present
from curvax.kron._plan import layout_plan

BFLOAT16 = [name for name in zoo.CASES if name.startswith("bf16")]


@pytest.mark.parametrize("name", zoo.CASES)
def test_every_model(name):
    with jax.enable_x64(name not in BFLOAT16):
        case = zoo.CASES[name]()
        objective, _, layout = prepare(case)
        check_leaves(case, layout)
        check_taps(case, objective, layout, tolerance=2.0**-8 if name in BFLOAT16 else 1e-10)


@pytest.mark.parametrize("name", zoo.CASES)
def test_layouts_and_shapes_of_factors_are_static_facts(name):
    case = zoo.CASES[name]()
    objective, batch, layout = prepare(case)
    struct = lambda shape, x: jax.ShapeDtypeStruct(shape, x.dtype)
    params = jax.tree.map(lambda x: struct(x.shape, x), case.params)
    for size in (1, 7):
        other = jax.tree.map(lambda x, n=size: struct((n, *x.shape[1:]), x), batch)
        again = curvax.kron_layout(objective, params, other)
        assert again == layout and hash(again) == hash(layout)
    estimate = functools.partial(curvax.kron_factors, objective, layout, key=jax.random.key(0))
    factors = jax.eval_shape(estimate, params=params, batch=batch)
    zeros = jax.eval_shape(lambda: init_factors(layout, case.params))
    chex.assert_trees_all_equal_shapes_and_dtypes(factors, zeros)


def act(fn):
    """Model of two layers, with `fn` of the first one's output and params in between."""
    return lambda p, x: jnp.tanh(fn(x @ p["w"], p)) @ p["v"]


def returned_and_read_again(p, x):
    z, y = jax.jit(lambda w, x: (z := x @ w, jnp.tanh(z)))(p["w"], x)
    return (z + p["b"]) * y


def returned_by_remat(p, x):
    z, y = jax.checkpoint(lambda z: (z, jnp.sin(z)))(x @ p["w"])
    return (z + p["b"]) * y


def returned_twice(p, x):
    z, y = jax.jit(lambda w, x: [x @ w] * 2)(p["w"], x)
    return (z + p["b"]) * y


def joined(p, x):
    return x @ jnp.stack([p["w"], p["v"]], axis=1) * p["v"][0]


def in_the_carry(p, x):
    """Weights go round in the carry; some come back smaller."""

    def step(carry, _):
        h, w, v = carry
        return (jnp.tanh(h @ w @ v), w, 0.9 * v), None

    return lax.scan(step, (x, p["w"], p["v"]), None, 2)[0][0]


def scan_in_scan(p, x):
    """Layers in groups; each of their kernels and biases belongs to a layer,
    to a group, or to all.
    """

    def group(h, q):
        def layer(h, r):
            h = (jnp.tanh(h @ r["w"] + r["b"]) @ q["v"] + q["c"]) @ p["u"] + p["d"]
            return h, h @ p["s"] + r["e"]

        h, skips = lax.scan(jax.checkpoint(layer), h, q["layers"], reverse=True)
        return h + skips.sum(0), None

    layers = {name: p[name] for name in "wbe"}
    return lax.scan(group, x, {"layers": layers, "v": p["v"], "c": p["c"]})[0]


def members_in_a_scan(p, x):
    """Layers of three members."""
    step = lambda h, q: (jnp.tanh(jnp.einsum("ebi,eio->ebo", h, q["w"]) + q["b"][:, None]), None)
    return lax.scan(step, jnp.stack([x] * 3), p)[0].swapaxes(0, 1)


def layers_of_two_types(p, x):
    branches = [lambda h, w: jnp.tanh(h @ w), lambda h, w: h + jnp.tanh(h @ p["v"] + p["b"])]
    step = lambda h, layer: (lax.switch(layer[0], branches, h, layer[1]), None)
    return lax.scan(step, x, (jnp.array([0, 1, 0]), p["w"]))[0]


def tied_with_bias(p, x):
    return jnp.tanh(p["w"][rows(x)]) @ p["w"].T + p["b"]


def rows(x):
    """Row numbers of five, also from the end (-1), and out of range."""
    return jnp.round(4 * x).astype(int)


PRODUCT = lambda p, x: x @ p["w"]
# Model, shapes of the leaves, and a word of the reason of those that are not, or not wholly, kron.
ODD = {
    "bias before a transpose": (act(lambda z, p: (z.T + p["b"][:, None]).T), "w33 v32 b3", {}),
    "bias after a reshape": (
        act(lambda z, p: (z.reshape(-1, 1, 3) + p["b"])[:, 0]),
        "w33 v32 b3",
        {},
    ),
    "read twice": (act(lambda z, p: (z + p["b"]) * z), "w33 v32 b3", {"b": "add"}),
    "returned and read again": (returned_and_read_again, "w32 b2", {"b": "add"}),
    "returned by remat": (returned_by_remat, "w32 b2", {"b": "add"}),
    "returned twice": (returned_twice, "w32 b2", {"b": "add"}),
    "scaled before": (act(lambda z, p: -z * 2 / 3 + p["b"]), "w33 v32 b3", {}),
    "scaled by data": (act(lambda z, p: z * z[:, :1] + p["b"]), "w33 v32 b3", {"b": "straight"}),
    "subtracted": (act(lambda z, p: z - p["b"]), "w33 v32 b3", {}),
    "subtracted from": (act(lambda z, p: p["b"] - z), "w33 v32 b3", {"b": "sub"}),
    "second bias": (act(lambda z, p: z + p["b"] + p["c"]), "w33 v32 b3 c3", {"c": "second bias"}),
    "split features": (lambda p, x: (x @ p["w"]).reshape(-1, 2, 2) + p["b"], "w34 b22", {}),
    "joined features": (
        lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]).reshape(-1, 4) + p["b"],
        "w322 b4",
        {},
    ),
    "one bias of two": (
        lambda p, x: (x @ p["w"] + p["b"]) * (x @ p["v"] + p["b"]),
        "w33 v33 b3",
        {"b": "several"},
    ),
    "two biases of one": (
        act(lambda z, p: jnp.tanh(z + p["b"]) @ p["w"] + p["c"]),
        "w33 v32 b3 c3",
        {"c": "another bias"},
    ),
    "part of a leaf": (lambda p, x: x @ p["w"][1:4, ::2], "w54", {"w": "14 of 20 entries"}),
    "several times": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1),
        "w32",
        {},
    ),
    "same mask twice": (
        lambda p, x: jnp.tanh(x @ jnp.tril(p["w"])) @ jnp.tril(p["w"]).T,
        "w33",
        {},
    ),
    "two masks": (
        lambda p, x: jnp.tanh(x @ jnp.tril(p["w"])) @ jnp.triu(p["w"]),
        "w33",
        {"w": "overlap"},
    ),
    "masked once": (
        lambda p, x: jnp.tanh(x @ jnp.tril(p["w"])) @ p["w"],
        "w33",
        {"w": "overlap"},
    ),
    "permuted and not": (
        lambda p, x: jnp.tanh(x @ p["w"][jnp.array([2, 0, 1])] + p["b"]) @ p["w"] + p["b"] / 2,
        "w33 b3",
        {},
    ),
    "joined with one that is not": (joined, "w3 v3", {"w": "joined", "v": "mul"}),
    "stopped": (
        lambda p, x: x @ p["w"] + 0 * lax.stop_gradient(p["b"]),
        "w32 b2",
        {"b": "not influence"},
    ),
    "not used": (lambda p, x: [x @ p["w"], p["w"] * p["b"]][0], "w32 b2", {"b": "not influence"}),
    "read in vain": (act(lambda z, p: [z + p["b"], jnp.exp(z)][0]), "w33 v32 b3", {}),
    "an output": (lambda p, x: jnp.broadcast_to(p["w"], (len(x), 2)), "w2", {"w": "output"}),
    "inside a function": (lambda p, x: x @ jax.nn.relu(p["w"]), "w33", {"w": "custom_jvp_call"}),
    "repeated": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(p["w"], (len(x), 3, 2))),
        "w32",
        {"w": "dot"},
    ),
    "unrolled": (
        lambda p, x: functools.reduce(lambda h, w: jnp.tanh(h @ w), p["w"], x),
        "w233",
        {},
    ),
    "columns": (lambda p, x: jnp.take(p["w"], rows(x), 1, mode="clip").swapaxes(0, 1), "w25", {}),
    "rows out of range": (
        lambda p, x: jnp.take(p["w"], rows(x), 0, mode="fill", fill_value=0),
        "w52",
        {},
    ),
    "tied with bias": (tied_with_bias, "w53 b5", {}),
    "row by row": (
        lambda p, x: lax.scan(lambda h, i: (jnp.tanh(h @ p["w"][i]), None), x, jnp.arange(2))[0],
        "w233",
        {"w": "slice"},
    ),
    "in the carry": (in_the_carry, "w33 v33", {"v": "changed in the carry"}),
    "scan in scan": (scan_in_scan, "w2333 b233 e233 v233 c23 u33 d3 s33", {"e": "axes"}),
    "members in a scan": (members_in_a_scan, "w2333 b233", {}),
    "layers of two types": (layers_of_two_types, "w333 v33 b3", {}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ODD)
def test_odd_models(name):
    model, shapes, reasons = ODD[name]
    params = {text[0]: zoo.normal(i, *map(int, text[1:])) for i, text in enumerate(shapes.split())}
    case = zoo.Case(model, params, zoo.normal(9, 4, 3))
    objective, _, layout = prepare(case)
    for leaf in layout.leaves:
        reason = reasons.get(leaf.path[2], "")
        assert bool(leaf.reason) == bool(reason) and reason in leaf.reason
        assert leaf.outside == ("diagonal" if reason else None)
    check_taps(case, objective, layout, tolerance=1e-10)


def a_while_loop(p, x):
    return lax.while_loop(lambda h: h.sum() < 9, lambda h: h + jnp.exp(h @ p["w"]), x)


def test_a_while_loop_has_no_taps():
    _, _, layout = prepare(zoo.Case(a_while_loop, {"w": jnp.ones((3, 3))}, jnp.ones((4, 3))))
    reason = layout.leaves[0].reason
    assert reason.startswith("enters `while`, whose steps have no taps") and "Adjoint" in reason


def test_the_branch_not_taken_has_no_cotangents():
    case = zoo.CASES["cond"]()
    objective, batch, layout = prepare(case)
    ones = jnp.ones_like(batch[1])
    inputs = lambda flag: {**case.inputs, "flag": jnp.full(4, flag)}
    for by_example in (False, True):
        plan = layout_plan(objective, layout, case.params, inputs(0), by_example)
        pulled = jax.jit(lambda flag, plan=plan: record(plan, case.params, inputs(flag)).pull(ones))
        for flag in (0, 1):
            taken = {
                name: any(bool(g.any()) for g in flows)
                for name, flows in pulled(flag).blocks.items()
            }
            assert taken == {"['w1']": flag == 1, "['w2']": flag == 0, "['out']": True}


def test_printed_layout_has_a_line_for_each_leaf():
    _, _, layout = prepare(zoo.CASES["scan_layers_plain"]())
    assert str(layout).splitlines() == [
        "leaf       shape  block     A x G            stack  uses  factors  note",
        "['b']      3x2    kron                                             bias of ['w']",
        "['scale']  3x2    diagonal                                24 B     enters `mul`",
        "['w']      3x2x2  kron      full 3 x full 2  3      1     156 B",
        "1 block, factors of 180 B in float32",
        "75 % of the parameters are in blocks (18 of 24)",
    ]
    for name in ("tied", "fused_qkv", "lstm_optimized", "overlapping"):
        _, _, layout = prepare(zoo.CASES[name]())
        lines = str(layout).splitlines()[1:-2]
        for line, leaf in zip(lines, layout.leaves, strict=True):
            assert (
                line.split()[0] == leaf.path
                and f" {leaf.kind} " in line
                and line.endswith(leaf.reason)
            )


def test_layout_by_choice():
    case = zoo.CASES["scan_layers_plain"]()
    objective, batch, layout = prepare(case)
    make = functools.partial(curvax.kron_layout, objective, case.params, batch)
    kinds = lambda layout: {leaf.path[2:-2]: leaf.outside or leaf.kind for leaf in layout.leaves}
    assert kinds(layout) == {"b": "kron", "scale": "diagonal", "w": "kron"}
    assert kinds(make(unmatched="identity")) == {"b": "kron", "scale": "identity", "w": "kron"}
    assert make(unmatched={"['sc": "identity", "": "error"}) == make(
        "identity"
    )  # the longest key counts
    assert make(sharing={"['w']": "reduce"}).blocks[0].sharing == "reduce"
    assert (layout.blocks[0].a_structure, layout.blocks[0].g_structure) == ("full", "full")  # 3 x 2
    for longest, sides in {
        3: ("full", "full"),
        2: ("diagonal", "full"),
        1: ("diagonal", "diagonal"),
    }.items():
        for choice in (longest, {"['w']": longest}):
            (block,) = make(max_dim=choice).blocks
            assert (block.a_structure, block.g_structure) == sides
            assert block.factor_shapes == tuple(
                (3, n, n)[: 2 + (s == "full")] for n, s in zip((3, 2), sides, strict=True)
            )
    with pytest.raises(
        ValueError,
        match=r"(?s)unmatched=\"error\":\n  \['scale'\] \[3, 2\]: enters `mul`\n.*\"identity\"",
    ):
        make(unmatched="error")
    with pytest.raises(
        ValueError,
        match=r"(?s)\['a'\] \[3, 4\]: is used by several.*\['b'\] \[2, 3\]: is used by several",
    ):
        prepare(zoo.CASES["overlapping"](), unmatched="error")
    with pytest.raises(
        ValueError, match=r"unknown unmatched 'skip'; valid: 'error', 'diagonal', 'identity'"
    ):
        make(unmatched="skip")
    with pytest.raises(ValueError, match=r"unknown sharing 'pool'; valid: 'expand', 'reduce'"):
        make(sharing={"['w']": "pool"})
    with pytest.raises(
        ValueError,
        match=(
            r"no leaf's path begins with \"\['q'\]\"; the paths are \['b'\], "
            r"\['scale'\], \['w'\]"
        ),
    ):
        make(sharing={"['q']": "reduce"})
    with pytest.raises(ValueError, match="max_dim must be an integer of at least 1, got 0"):
        make(max_dim=0)


def test_edited_layout():
    _, _, layout = prepare(zoo.CASES["scan_layers_plain"]())
    assert layout.edit("['w']") == layout
    for path in ("['w']", "['b']"):  # of one block
        (block,) = layout.edit(
            path, a_structure="diagonal", g_structure="identity", sharing="reduce"
        ).blocks
        assert (block.a_structure, block.g_structure, block.sharing) == (
            "diagonal",
            "identity",
            "reduce",
        )
        out = layout.edit(path, kind="identity")
        assert not out.blocks and [leaf.kind for leaf in out.leaves] == [
            "identity",
            "diagonal",
            "identity",
        ]
    assert layout.edit("['scale']", kind="identity").leaves[1].kind == "identity"
    with pytest.raises(
        ValueError,
        match=r"unknown path \"\['q'\]\"; valid: \"\['b'\]\", \"\['scale'\]\", \"\['w'\]\"",
    ):
        layout.edit("['q']", sharing="reduce")
    with pytest.raises(
        ValueError,
        match=(
            "unknown change 'side'; valid: 'a_structure', 'g_structure', 'sharing', "
            "'positions', 'two_products', 'kind'"
        ),
    ):
        layout.edit("['w']", side="full")
    with pytest.raises(
        ValueError, match=r"unknown g_structure 'wide'; valid: 'full', 'diagonal', 'identity'"
    ):
        layout.edit("['w']", g_structure="wide")
    with pytest.raises(
        ValueError, match=r"\['scale'\] is in no block, so that only its kind can be changed"
    ):
        layout.edit("['scale']", a_structure="full")
    _, _, cut = prepare(zoo.CASES["fused_qkv"]())
    assert [b.sharing for b in cut.edit("['cut']['b']", sharing="reduce").blocks].count(
        "reduce"
    ) == 3


def test_a_layout_is_of_one_model():
    case = zoo.CASES["scan_layers_plain"]()
    objective, batch, layout = prepare(case)
    factors = lambda params=case.params, model=case.model, batch=batch: curvax.kron_factors(
        curvax.Objective(model, objective.loss), layout, params, batch, jax.random.key(0)
    )
    with pytest.raises(
        ValueError, match=r"of other params: params has a leaf \['more'\], the layout has not"
    ):
        factors({**case.params, "more": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"of other params: the layout has a leaf \['b'\], params has not"
    ):
        factors({"w": case.params["w"], "scale": case.params["scale"]})
    with pytest.raises(
        ValueError, match=r"of other params: \['w'\] is \[3, 2, 2\] there, in params \[3, 2, 5\]"
    ):
        factors({**case.params, "w": jnp.ones((3, 2, 5))})
    with pytest.raises(
        ValueError,
        match=r"of another model: there, \['w'\] with bias \['b'\] is used by 1 linear map.*again",
    ):
        factors(model=lambda p, x: x @ p["w"][0] + p["b"][0] * p["scale"][0])
    with pytest.raises(
        ValueError, match=r"targets float32\[4, 3\] do not fit outputs float32\[4, 2\]"
    ):
        factors(batch=(case.inputs, jnp.ones((4, 3))))
    with pytest.raises(TypeError, match=r"pair \(inputs, targets\)"):
        factors(batch=case.inputs)
    with pytest.raises(TypeError, match=r"int32\[2\] at params\['n'\]"):
        curvax.kron_layout(objective, {"n": jnp.ones(2, int)}, batch)


def test_a_masked_leaf_does_not_mask_one_whose_name_begins_alike():
    class Params(NamedTuple):
        w: object
        w2: object

    params = Params(jnp.ones((3, 4)), jnp.ones((4, 2)))
    objective = curvax.Objective(lambda p, x: x @ p.w @ p.w2, losses.squared_error())
    layout = curvax.kron_layout(objective, params, (jnp.ones((5, 3)), jnp.ones((5, 2))))
    masked = Params(optax.MaskedNode(), params.w2)
    assert [block.name for block in present(layout, masked).blocks] == [".w2"]
