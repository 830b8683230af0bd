"""Factors: equal to dense Gauss-Newton blocks where K-FAC is exact, else to sums written out;
and how they add up.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, Case
from jax import lax
from jax.flatten_util import ravel_pytree

import curvax
from curvax import losses
from curvax.kron import moving_average

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def factors(case, layout, **kwargs):
    return curvax.kron_factors(case.objective, layout, case.params, case.batch, KEY, **kwargs)


def compiled(fn, case):
    """`fn(case)`, compiled for params and batch."""
    on = lambda params, batch: fn(case._replace(params=params, batch=batch))
    return jax.jit(on)(case.params, case.batch)


def layout_of(case, **kwargs):
    return curvax.kron_layout(case.objective, case.params, case.batch, **kwargs)


# ---------------------------------------------------------------- where K-FAC is exact


def bare(p, h):
    return (h @ p["w"])[..., None, :]


def biased(p, h):
    return (h @ p["w"] + p["b"])[..., None, :]


def shuffled(p, h):
    kernel = jnp.concatenate([p["u"][::-1], jnp.flip(p["v"], axis=1).T], axis=1)
    return (h @ kernel + p["b"])[..., None, :]


def used_twice(p, h):
    return jnp.stack([part @ p["w"] + p["b"] for part in jnp.split(h, 2, axis=-1)], axis=-2)


def biased_once(p, h):
    first, second = jnp.split(h, 2, axis=-1)
    return jnp.stack([first @ p["w"] + p["b"], second @ p["w"]], axis=-2)


def stacked(p, h):
    members = h.reshape(*h.shape[:-1], 2, 2)
    return (jnp.einsum("...ei,eio->...eo", members, p["w"]) + p["b"]).reshape(*h.shape[:-1], 1, 6)


def scanned(p, h):
    return lax.scan(lambda h, q: (h @ q["w"] + q["b"], None), h, p)[0][..., None, :]


# A layer in the middle, from [..., 4] features to [..., uses, features]; shapes of its leaves.
LAYERS = {
    "bare": (bare, {"w": (4, 3)}),
    "biased": (biased, {"w": (4, 3), "b": (3,)}),
    "shuffled": (shuffled, {"u": (4, 2), "v": (1, 4), "b": (3,)}),
    "used_twice": (used_twice, {"w": (2, 3), "b": (3,)}),
    "biased_once": (biased_once, {"w": (2, 3), "b": (3,)}),
    "stacked": (stacked, {"w": (2, 2, 3), "b": (2, 3)}),
    "scanned": (scanned, {"w": (2, 4, 4), "b": (2, 4)}),
}


def network(setting, layer):
    """Three layers around `layer`, where the Gauss-Newton block of each is a Kronecker product."""
    apply, shapes = LAYERS[layer]
    params = {
        "layer": {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items(), 1)}
    }
    params["first"] = normal(5, 3, 4)
    width = jax.eval_shape(apply, params["layer"], jnp.ones((1, 4))).shape[-1]
    params["last"] = normal(6, width, 2)

    if setting == "one example":  # of any network; what is used twice is pooled before it is bent

        def model(p, x):
            h = jnp.tanh(x @ p["first"])
            return jnp.tanh(apply(p["layer"], h).mean(-2)) @ p["last"]

        objective = curvax.Objective(model, losses.softmax_cross_entropy())
        return Case(objective, params, (normal(7, 1, 3), jnp.array([1])))

    pool = {"reduce": lambda f: f.mean((1, 2))}.get(setting, lambda f: f)
    model = lambda p, x: pool(apply(p["layer"], x @ p["first"]) @ p["last"])
    x = normal(7, 5, 3) if setting == "several examples" else normal(7, 4, 3, 3)
    return Case(
        curvax.Objective(model, losses.squared_error()),
        params,
        (x, jnp.zeros(jax.eval_shape(model, params, x).shape)),
    )


def kronecker_and_dense(case, layout):
    """For every block A x G of each slice, and the block of the Gauss-Newton matrix;
    rows (in, out) in order.
    """
    _, unravel = ravel_pytree(case.params)
    J = jax.vmap(unravel)(oracle.jacobian(case))
    J = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(J)}
    S = oracle.output_curvature(case)
    found = factors(case, layout, fisher="exact")
    pairs = {}
    for block in layout.blocks:
        rows = jax.vmap(block.kernel.read)(
            {path: J[path] for path in block.kernel.leaves}
        )  # [outputs, stack, in, out]
        if block.bias is not None:
            bias = jax.vmap(block.bias.read)({path: J[path] for path in block.bias.leaves})
            rows = jnp.concatenate([rows, bias[:, :, None]], axis=2)
        rows = rows.reshape(*rows.shape[:2], -1)
        A, G = found.blocks[block.name].a.mean, found.blocks[block.name].g.mean
        A = jax.vmap(jnp.diag)(A) if block.a_structure == "diagonal" else A
        pairs[block.name] = jax.vmap(jnp.kron)(A, G), jnp.einsum("csi,cd,dsj->sij", rows, S, rows)
    return pairs


def check_exact(case, layout):
    pairs = compiled(functools.partial(kronecker_and_dense, layout=layout), case)
    for product, dense in jax.tree.map(np.asarray, pairs).values():
        np.testing.assert_allclose(product, dense, rtol=0, atol=1e-9 * abs(dense).max())
        assert abs(dense).max() > 1e-3


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("setting", ["one example", "several examples", "expand", "reduce"])
def test_exact_in_networks(setting, layer):
    case = network(setting, layer)
    pooled = setting == "reduce" or (
        setting == "one example" and LAYERS[layer][0] in (used_twice, biased_once)
    )
    sharing = "reduce" if pooled else "expand"
    layout = layout_of(case, sharing=sharing)
    assert {leaf.kind for leaf in layout.leaves} == {"kron"} and len(layout.blocks) == 3
    check_exact(case, layout)


def convolution(groups, dilation=1):
    def model(p, x):
        dims = ("NHC", "HIO", "NHC")
        y = lax.conv_general_dilated(
            x,
            p["w"],
            (2,),
            "SAME",
            rhs_dilation=(dilation,),
            dimension_numbers=dims,
            feature_group_count=groups,
        )
        return y + p["b"]

    return model, {"w": normal(1, 2, 4 // groups, 6), "b": normal(2, 6)}, normal(3, 3, 5, 4)


def lookup():
    ids = jnp.asarray(np.random.default_rng(0).integers(-2, 5, size=(4, 3)))  # some from the end
    return (
        lambda p, ids: p["table"][ids] @ p["w"],
        {"table": normal(1, 5, 3), "w": normal(2, 3, 2)},
        ids,
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["convolution", "grouped", "lookup"])
def test_exact_in_convolutions_and_lookups(kind, sharing):
    """A loss at each position, or of their mean; the mean of rows looked up has a full A."""
    kinds = {
        "convolution": lambda: convolution(1, 2),
        "grouped": lambda: convolution(2),
        "lookup": lookup,
    }
    each, params, x = kinds[kind]()
    model = each if sharing == "expand" else lambda p, x: each(p, x).mean(1)
    targets = jnp.zeros(jax.eval_shape(model, params, x).shape)
    case = Case(curvax.Objective(model, losses.squared_error()), params, (x, targets))
    layout = layout_of(case, sharing=sharing)
    check_exact(
        case,
        layout.edit("['table']", a_structure="full")
        if (kind, sharing) == ("lookup", "reduce")
        else layout,
    )


# ---------------------------------------------------------------- how factors add up


def sequences(mask=True):
    """Two layers over positions that depend on those before; one leaf in no block;
    labels of which some are missing.
    """

    def model(p, x):
        h = jnp.tanh((x @ p["w"] + p["b"]) * p["scale"])
        return jnp.cumsum(h, axis=1) @ p["v"] + p["c"]

    params = {
        "w": normal(1, 3, 4),
        "b": normal(2, 4),
        "scale": normal(3, 4),
        "v": normal(4, 4, 3),
        "c": normal(5, 3),
    }
    labels = jnp.asarray(np.random.default_rng(6).integers(3, size=(5, 3)))
    labels = labels.at[0, 1:].set(-1).at[2].set(-1).at[4, 0].set(-1) if mask else labels
    return Case(
        curvax.Objective(model, losses.softmax_cross_entropy(ignore_index=-1)),
        params,
        (normal(7, 5, 3, 3), labels),
    )


def means(found):
    """What stands for curvature: all means."""
    return jax.tree.map(lambda factor: factor.mean, found, is_leaf=lambda x: hasattr(x, "weight"))


def rows(case, start, stop):
    return case._replace(batch=jax.tree.map(lambda x: x[start:stop], case.batch))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_data_given_twice_merged_or_in_chunks(fisher, sharing):
    case = sequences(mask=fisher == "exact")
    layout = layout_of(case, sharing=sharing)
    estimate = functools.partial(factors, layout=layout, fisher=fisher)

    def every_way(case):
        twice = case._replace(batch=jax.tree.map(lambda x: jnp.concatenate([x, x]), case.batch))
        halves = [estimate(rows(case, 0, 2)), estimate(rows(case, 2, 5))]
        return (
            estimate(case),
            means(estimate(twice)),
            curvax.kron.merge(*halves),
            estimate(case, microbatch=2),
        )

    whole, twice, merged, chunked = compiled(every_way, case)
    chex.assert_trees_all_close(twice, means(whole), rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(merged, whole, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(chunked, whole, rtol=1e-9, atol=1e-12)
    larger = jax.eval_shape(lambda: estimate(case, microbatch=10))
    chex.assert_trees_all_equal_shapes_and_dtypes(larger, whole)


def test_draws_depend_on_rows_not_on_chunks():
    """Where examples are told apart; A does not depend on draws at all."""
    case = sequences()
    reduce, expand = layout_of(case, sharing="reduce"), layout_of(case)

    def every_way(case):
        whole, chunked = (factors(case, reduce, num_samples=2, microbatch=m) for m in (None, 2))
        return whole, chunked, [factors(case, expand, microbatch=m) for m in (None, 2)]

    whole, chunked, expanded = compiled(every_way, case)
    chex.assert_trees_all_close(whole, chunked, rtol=1e-9, atol=1e-12)
    A = [{name: block.a for name, block in found.blocks.items()} for found in expanded]
    chex.assert_trees_all_close(*A, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, sharing", [("sequences", "expand"), ("sequences", "reduce"), ("multi_head", "reduce")]
)
def test_sampled_factors_are_unbiased_for_exact_ones(name, sharing):
    case = sequences() if name == "sequences" else CASES[name]()
    layout = layout_of(case, sharing=sharing)

    def all_draws(case):
        draw = lambda key: means(
            curvax.kron_factors(case.objective, layout, case.params, case.batch, key, num_samples=2)
        )
        return jax.vmap(draw)(jax.random.split(KEY, 400)), means(
            factors(case, layout, fisher="exact")
        )

    draws, exact = jax.tree.map(np.asarray, compiled(all_draws, case))
    for block in layout.blocks:
        A = draws.blocks[block.name].a
        np.testing.assert_allclose(
            A, np.broadcast_to(exact.blocks[block.name].a, A.shape), rtol=1e-12, atol=1e-14
        )
    G = lambda found: [block.g for block in found.blocks.values()] + list(found.diagonal.values())
    assert len(G(exact)) == len(layout.blocks) + (name == "sequences")
    for x, y in zip(G(draws), G(exact), strict=True):
        sem = x.std(0, ddof=1) / len(x) ** 0.5
        assert (np.abs(x.mean(0) - y) <= 5 * sem + 1e-12).all()
        assert sem.max() < 0.15 * abs(y).max()  # the test can tell a wrong factor


def test_shared_inputs_are_those_of_every_example():
    """As if the model had closed over them."""
    case = CASES["shared_statistics"]()
    shared = {name: x for name, x in case.batch[0].items() if name != "x"}
    closed = lambda p, x: case.objective.model(
        p, {"x": x, **{name: part.value for name, part in shared.items()}}
    )
    alone = case._replace(
        objective=curvax.Objective(closed, case.objective.loss, has_aux=True),
        batch=(case.batch[0]["x"], case.batch[1]),
    )
    for kwargs in ({"fisher": "exact"}, {"microbatch": 2}):
        of = lambda case, kwargs=kwargs: factors(case, layout_of(case, sharing="reduce"), **kwargs)
        chex.assert_trees_all_close(compiled(of, case), compiled(of, alone), rtol=1e-9)


# ---------------------------------------------------------------- masks, precision, diagonals


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_padding_counts_nowhere(fisher):
    """As if it were not there: in each position a batch of its own (expand),
    in sums over each example (reduce).
    """
    case = sequences()
    x, labels = case.batch
    params = {"w": case.params["w"], "b": case.params["b"]}
    objective = curvax.Objective(lambda p, x: x @ p["w"] + p["b"], case.objective.loss)
    padded = Case(objective, params, (x.at[labels < 0].set(jnp.nan), labels))
    there = np.asarray(labels >= 0)
    flat = Case(objective, params, (x[there], labels[there]))
    if fisher == "exact":
        sparse, dense = (
            compiled(lambda c: factors(c, layout_of(c), fisher="exact"), c) for c in (padded, flat)
        )
        chex.assert_trees_all_close(sparse, dense, rtol=1e-9)
        assert sparse.blocks["['w']"].a.weight == there.sum()
    found = compiled(
        lambda c: factors(c, layout_of(c, sharing="reduce"), fisher=fisher), padded
    ).blocks["['w']"]
    f = np.asarray(x @ params["w"] + params["b"])
    p = np.exp(f) / np.exp(f).sum(-1, keepdims=True)
    A, G, N = np.zeros((4, 4)), np.zeros((4, 4)), there.sum()
    for b in np.flatnonzero(there.any(1)):
        a = np.append(np.asarray(x[b])[there[b]].mean(0), 1)
        A += np.outer(a, a) / there.any(1).sum()
        if fisher == "exact":
            G += sum(np.diag(q) - np.outer(q, q) for q in p[b][there[b]]) / N
        else:
            g = (p[b] - np.eye(4)[np.asarray(labels[b])])[there[b]].sum(0)
            G += np.outer(g, g) / N
    np.testing.assert_allclose(found.a.mean[0], A, rtol=1e-9)
    np.testing.assert_allclose(found.g.mean[0], G, rtol=1e-9)


def test_factors_by_term_take_no_products_of_terms_of_one_example():
    """Signs make them vanish in expectation: a z-test of the diagonal, where no block is, and of
    the moments of a block.
    """
    case = sequences()
    layout = layout_of(case).edit("['w']", kind="diagonal")
    by_block = layout_of(case)

    @jax.jit
    @jax.vmap
    def draw(key):
        problem = case.objective, layout, case.params, case.batch, key
        diagonal = curvax.kron_factors(*problem, fisher="empirical_by_term").diagonal
        basis = {block.name: curvax.kron.Basis(None, None) for block in by_block.blocks}
        problem = case.objective, by_block, basis, case.params, case.batch, key
        moments = curvax.kron.kron_moments(*problem, fisher="empirical_by_term").moments
        return diagonal["['w']"].mean, moments["['w']"].mean[0, :-1]

    def exact(by):
        problem = case.objective, case.params, case.batch
        return np.asarray(curvax.empirical_fisher_diagonal(*problem, by=by)["w"])

    draws = draw(jax.random.split(KEY, 2000))
    for x in map(np.asarray, draws):
        sem = x.std(axis=0) / len(x) ** 0.5 + 1e-12
        assert np.abs((x.mean(axis=0) - exact("term")) / sem).max() < 4.5
        assert np.abs((x.mean(axis=0) - exact("example")) / sem).max() > 10


def test_bfloat16_params_give_float32_factors():
    case = sequences()
    half = case._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params))
    half = half._replace(batch=(case.batch[0].astype(jnp.bfloat16), case.batch[1]))
    for sharing in ("expand", "reduce"):
        layout = layout_of(half, sharing=sharing)
        estimate = lambda case, layout=layout: (
            found := factors(case, layout, fisher="exact"),
            means(found),
        )
        found, got = compiled(estimate, half)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
        wide = half._replace(params=jax.tree.map(lambda x: x.astype(float), half.params))
        wide = wide._replace(batch=(half.batch[0].astype(float), case.batch[1]))
        exact, want = compiled(estimate, wide)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.linalg.norm(x - y) < 10 * jnp.finfo(jnp.bfloat16).eps * np.linalg.norm(y)
        assert found.blocks["['w']"].a.weight == exact.blocks["['w']"].a.weight


@pytest.mark.parametrize(
    "name", ["sequences", "multi_head", "gaussian", "masked_regression", "shared_statistics"]
)
def test_leaves_in_no_block_get_their_diagonal(name):
    case = sequences() if name == "sequences" else CASES[name]()
    layout = layout_of(case)
    left = [leaf.path for leaf in layout.leaves if leaf.kind == "kron"]
    for path in left:  # and those in blocks, by choice
        layout = layout.edit(path, kind="diagonal")
    exact = lambda case: (
        means(factors(case, layout, fisher="exact")),
        curvax.ggn_diagonal(case.objective, case.params, case.batch),
        means(factors(case, layout, fisher="empirical", microbatch=2)),
        curvax.empirical_fisher_diagonal(case.objective, case.params, case.batch),
    )
    ours, ggn, empirical, fisher = compiled(exact, case)
    assert not ours.blocks
    for found, want in ((ours, ggn), (empirical, fisher)):
        want = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(want)}
        chex.assert_trees_all_close(found.diagonal, want, rtol=1e-9, atol=1e-12)


def test_the_rest_of_a_leaf_gets_a_diagonal():
    case = sequences()
    objective, params = case.objective, {**case.params, "w": normal(8, 5, 4)}
    part = lambda p, x: objective.model({**p, "w": p["w"][1:4]}, x)
    case = case._replace(objective=curvax.Objective(part, objective.loss), params=params)
    for unmatched, paths in (("diagonal", {"['w']", "['scale']"}), ("identity", set())):
        layout = layout_of(case, unmatched=unmatched)
        assert {leaf.path: leaf.unmatched for leaf in layout.leaves}["['w']"] == unmatched
        both = lambda case, layout=layout: (
            factors(case, layout, fisher="exact"),
            curvax.ggn_diagonal(case.objective, case.params, case.batch)["w"],
        )
        found, want = compiled(both, case)
        assert set(found.diagonal) == paths
        if paths:
            np.testing.assert_allclose(found.diagonal["['w']"].mean, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_diagonal_and_identity_sides(sharing):
    case = sequences()
    full = layout_of(case, sharing=sharing)
    choices = {
        "['w']": {"a_structure": "diagonal", "g_structure": "identity"},
        "['v']": {"a_structure": "identity", "g_structure": "diagonal"},
    }
    thin = functools.reduce(lambda layout, path: layout.edit(path, **choices[path]), choices, full)
    both = lambda case: [means(factors(case, layout, fisher="exact")) for layout in (full, thin)]
    want, got = jax.tree.map(np.asarray, compiled(both, case))
    for path, structures in choices.items():
        for name, structure in structures.items():
            factor = name[0]  # of "a_structure" and "g_structure"
            matrix, found = getattr(want.blocks[path], factor), getattr(got.blocks[path], factor)
            diagonal = np.diagonal(matrix, axis1=1, axis2=2)
            np.testing.assert_allclose(
                found, diagonal if structure == "diagonal" else 0 * diagonal, rtol=1e-9
            )


# ---------------------------------------------------------------- lookups


def test_inputs_of_a_table_are_the_frequencies_of_its_rows():
    """Negative numbers count from the end; those out of range are positions, but of no row."""
    ids = np.array([[0, 3, 3], [-1, 4, 7], [-7, 3, 1]])  # of five rows
    model = lambda table, ids: jnp.take(table, ids, axis=0, fill_value=0)
    case = Case(
        curvax.Objective(model, losses.squared_error()),
        normal(1, 5, 2),
        (jnp.asarray(ids), jnp.zeros((3, 3, 2))),
    )
    found = compiled(lambda case: factors(case, layout_of(case), fisher="exact"), case).blocks[""]
    kept = ids[(ids >= -5) & (ids < 5)] % 5
    np.testing.assert_allclose(
        found.a.mean[0], np.bincount(kept, minlength=5) / ids.size, rtol=1e-12
    )
    np.testing.assert_allclose(found.g.mean[0], np.eye(2) * ids.size / len(ids), rtol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_a_tied_table_has_factors_of_both_uses(biased):
    """With a bias of the logits the kernel is the table's transpose,
    and it is the lookup that is transposed.
    """
    ids, labels = np.random.default_rng(0).integers(5, size=(2, 4, 3))
    params = {"table": normal(1, 5, 3)} | ({"bias": normal(2, 5)} if biased else {})
    model = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T + p.get("bias", 0)
    case = Case(
        curvax.Objective(model, losses.softmax_cross_entropy()),
        params,
        (jnp.asarray(ids), jnp.asarray(labels)),
    )
    layout = layout_of(case)
    (block,) = layout.blocks
    assert [(m.kind, m.transposed) for m in block.uses] == [
        ("lookup", biased),
        ("dot", not biased),
    ]
    found = compiled(lambda case: means(factors(case, layout, fisher="exact")), case).blocks[
        "['table']"
    ]

    table = np.asarray(params["table"])
    h = np.tanh(table[ids.ravel()])
    f = h @ table.T + (np.asarray(params["bias"]) if biased else 0)
    p = np.exp(f) / np.exp(f).sum(-1, keepdims=True)
    S = [(np.diag(q) - np.outer(q, q)) / ids.size for q in p]
    frequencies = np.diag(np.bincount(ids.ravel(), minlength=5) / ids.size)
    back = [np.diag(1 - a**2) @ table.T for a in h]
    of_lookup = frequencies, sum(b @ s @ b.T for b, s in zip(back, S, strict=True))
    a = np.column_stack([h, np.ones(len(h))]) if biased else h
    of_logits = a.T @ a / len(a), sum(S)
    if biased:
        of_lookup = frequencies, np.pad(of_lookup[1], (0, 1))  # the lookup leaves the bias alone
    own, transposed = (of_logits, of_lookup) if biased else (of_lookup, of_logits)
    for got, want in zip((found.a, found.g, *found.second), (*own, *transposed[::-1]), strict=True):
        np.testing.assert_allclose(got[0], want, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- branches, averages, errors


def test_a_branch_not_taken_has_no_weight_and_keeps_its_average():
    def model(p, x):
        return lax.cond(x["flag"].sum() > 0, lambda h: h @ p["yes"], lambda h: h @ p["no"], x["h"])

    params = {"yes": normal(1, 3, 2), "no": normal(2, 3, 2)}
    batch = lambda flag, seed: (
        {"h": normal(seed, 4, 3), "flag": jnp.full(4, flag)},
        jnp.zeros((4, 2)),
    )
    case = Case(curvax.Objective(model, losses.squared_error()), params, batch(1, 3))
    layout = layout_of(case)
    for kwargs in ({"fisher": "exact"}, {"fisher": "mc"}):
        estimate = jax.jit(
            lambda b, kwargs=kwargs: factors(case._replace(batch=b), layout, **kwargs)
        )
        held, new = estimate(batch(1, 3)), estimate(batch(0, 4))
        idle = new.blocks["['yes']"]
        assert idle.a.weight == 0 and not idle.a.mean.any() and not idle.g.mean.any()
        assert new.blocks["['no']"].a.weight == 4
        average = moving_average(held, new, 0.75)
        for name, before in (("['yes']", held), ("['no']", new)):
            np.testing.assert_allclose(
                average.blocks[name].a.mean, before.blocks[name].a.mean, rtol=1e-12
            )
            share = (
                0.75 if before is held else 0.25
            )  # of the curvature, which is less if the branch is taken less often
            want = share * before.blocks[name].g.mean
            np.testing.assert_allclose(average.blocks[name].g.mean, want, rtol=1e-12)
        again = moving_average(
            moving_average(jax.tree.map(jnp.zeros_like, held), held, 0.9), held, 0.9
        )
        chex.assert_trees_all_close(means(again), means(held), rtol=1e-12)  # no bias of the start


def test_errors_say_what_and_where():
    case = sequences()
    layout = layout_of(case)
    shapes = lambda *args, **kwargs: jax.eval_shape(
        lambda: factors(*args, **kwargs)
    )  # errors come at trace time
    with pytest.raises(
        ValueError, match=r"unknown fisher 'fisher'; valid: 'mc', 'exact', 'empirical'"
    ):
        shapes(case, layout, fisher="fisher")
    with pytest.raises(
        ValueError, match=r"num_samples is of fisher=\"mc\" and .*; 'exact' does not sample"
    ):
        shapes(case, layout, fisher="exact", num_samples=2)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        shapes(case, layout, num_samples=0)
    with pytest.raises(ValueError, match="microbatch must be at least 1, got 0"):
        shapes(case, layout, microbatch=0)
    user = CASES["user_loss"]()
    with pytest.raises(TypeError, match=r"no way to sample.*from_function\(value, sample="):
        shapes(user, layout_of(user))
    flat_rows = curvax.Objective(
        lambda p, x: case.objective.model(p, x).reshape(-1, 3), case.objective.loss
    )
    flat = case._replace(objective=flat_rows, batch=(case.batch[0], jnp.zeros(5, int)))
    for kwargs in ({"fisher": "exact"}, {"fisher": "empirical"}):
        with pytest.raises(
            ValueError, match=r"for one row of inputs, outputs is float64\[3, 3\]; work by example"
        ):
            shapes(flat, layout_of(flat), **kwargs)
    with pytest.raises(
        ValueError, match=r"for one row of inputs, outputs is float64\[3, 3\].*sharing=\"reduce\""
    ):
        shapes(flat, layout_of(flat, sharing="reduce"))
    with pytest.raises(TypeError, match=r"int64\[3\] at params\['w'\]"):
        shapes(case._replace(params={**case.params, "w": jnp.zeros(3, int)}), layout)
    with pytest.raises(ValueError, match="of different layouts"):
        curvax.kron.merge(shapes(case, layout), shapes(case, layout.edit("['w']", kind="diagonal")))
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        moving_average(shapes(case, layout), shapes(case, layout), 1.0)


# ---------------------------------------------------------------- which positions count


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_positions_without_a_cotangent_are_left_out_of_a_or_kept_by_choice(sharing, fisher):
    case = CASES["masked_sequence"]()
    inputs, labels = case.batch
    first = "['Dense_0']['kernel']"
    active = layout_of(case, sharing=sharing)
    by_edit = active.edit(first, positions="all")
    by_choice = layout_of(case, sharing=sharing, positions={first: "all", "": "active"})
    assert by_edit == by_choice != active and "all positions" in str(by_edit)
    got, kept = compiled(
        lambda case: [factors(case, layout, fisher=fisher) for layout in (active, by_edit)], case
    )
    name = next(block.name for block in active.blocks if first in block.leaves)
    with_one = np.concatenate([inputs, np.ones((*inputs.shape[:2], 1))], axis=2)
    for result, counts in ((got, labels >= 0), (kept, np.ones(labels.shape, bool))):
        if sharing == "expand":
            rows = with_one[counts]
        else:
            rows = np.stack(
                [x[m].mean(axis=0) for x, m in zip(with_one, counts, strict=True) if m.any()]
            )
        want = rows.T @ rows / len(rows)
        np.testing.assert_allclose(result.blocks[name].a.mean[0], want, atol=1e-12)
    # G, and blocks whose choice did not change, are the same.
    chex.assert_trees_all_close(got.blocks[name].g, kept.blocks[name].g, atol=1e-14)
    others = lambda result: {key: x for key, x in result.blocks.items() if key != name}
    chex.assert_trees_all_close(others(got), others(kept), atol=1e-14)
