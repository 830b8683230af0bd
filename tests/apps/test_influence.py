"""Influence against dense matrices, in float64;
and that it does not depend on how data are cut, ordered or placed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr

import curvax
from curvax.apps import influence
from curvax.kron import _gradient_products

pytestmark = pytest.mark.usefixtures("x64")

MODELS = ("mlp", "cnn", "attention", "lstm", "masked_sequence", "multi_head", "gaussian")


@functools.cache
def layout_of(name):
    case = CASES[name]()
    return curvax.kron_layout(case.objective, case.params, case.batch)


@functools.cache
def fitted(name, method="ekfac"):
    case = CASES[name]()
    options = {"method": method, "fisher": "exact", "progress": False}
    return influence.fit(
        case.objective, layout_of(name), case.params, [case.batch], jax.random.key(0), **options
    )


def rows(batch, start=None, stop=None):
    return jax.tree.map(lambda x: x[start:stop], batch)


def size(batch):
    return len(jax.tree.leaves(batch)[0])


def indices(block, params):
    """Which rows of dense matrices, in the order of `ravel_pytree`, are the entries of a block:
    `[stack, in, out]`.
    """
    starts = np.cumsum([0, *[x.size for x in jax.tree.leaves(params)]])
    leaves = {
        keystr(path): np.arange(start, start + x.size).reshape(x.shape)
        for (path, x), start in zip(jax.tree.leaves_with_path(params), starts, strict=False)
    }
    kernel = block.kernel.read(leaves)
    return (
        kernel
        if block.bias is None
        else np.concatenate([kernel, block.bias.read(leaves)[:, None]], axis=1)
    )


@functools.cache
def gradients(name):
    """Dense rows: the gradients of every example's own mean loss,
    and of its part of the mean over all.
    """
    case = CASES[name]()
    parts = jax.jit(lambda p, batch: curvax.per_example_grads(case.objective, p, batch))(
        case.params, case.batch
    )
    of_row = jax.grad(lambda p, row: case.objective.value(p, row))
    own = jax.jit(lambda p, batch: [of_row(p, rows(batch, i, i + 1)) for i in range(size(batch))])
    own = own(case.params, case.batch)
    parts = jax.vmap(lambda g: ravel_pytree(g)[0])(parts) / size(case.batch)
    return np.stack([ravel_pytree(g)[0] for g in own]), np.asarray(parts)


def blockwise(name, damping, build):
    """A dense inverse, `build(factors and basis of a block, dense block)` for each
    slice of a block.
    """
    case, dense = CASES[name](), oracle.of(name).ggn
    diagonal = np.diag(dense)
    inverse = np.diag(1 / (diagonal + (0.1 if damping is None else damping)))
    starts = np.cumsum([0, *[x.size for x in jax.tree.leaves(case.params)]])
    if damping is None:
        for k in range(len(starts) - 1):
            own = slice(starts[k], starts[k + 1])
            inverse[own, own] = np.diag(1 / (diagonal[own] + 0.1 * diagonal[own].mean()))
    for block in layout_of(name).blocks:
        for s, which in enumerate(indices(block, case.params).reshape(block.shape[0], -1)):
            inverse[np.ix_(which, which)] = build(block.name, s, dense[np.ix_(which, which)])
    return inverse


def ekfac_inverse(name, damping):
    basis = fitted(name).eigen.basis

    def build(block, s, dense):
        vectors = np.kron(basis[block].a[s], basis[block].g[s])
        values = np.diag(
            vectors.T @ dense @ vectors
        )  # examples do not mix: their second moments add up to it
        strength = 0.1 * values.mean() if damping is None else damping
        return vectors / (values + strength) @ vectors.T

    return blockwise(name, damping, build)


def kfac_inverse(name, damping):
    factors = fitted(name).factors.blocks

    def build(block, s, dense):
        both = np.kron(factors[block].a.mean[s], factors[block].g.mean[s])
        strength = 0.1 * np.trace(both) / len(both) if damping is None else damping
        return np.linalg.inv(both + strength * np.eye(len(both)))

    return blockwise(name, damping, build)


def run(name, queries=None, batches=None, fit=None, **options):
    case = CASES[name]()
    queries, batches = queries or case.batch, batches or [case.batch]
    args = fit or fitted(name), case.objective, case.params, queries, batches
    return influence.influence(*args, **options)


def close(got, want, tolerance=1e-8):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("damping", [None, 1e-2])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_self_influence_equal_the_dense_formula(name, damping):
    case, (own, parts) = CASES[name](), gradients(name)
    want = own @ ekfac_inverse(name, damping) @ parts.T
    result, info = run(name, damping=damping, by="layer")
    close(result.change_if_removed, want)
    close(sum(result.by_layer.values()), want)
    assert len(result.by_layer) == len(info.damping if damping is None else result.by_layer)
    diagonal = influence.self_influence(
        fitted(name), case.objective, case.params, [case.batch], damping=damping
    )
    close(diagonal, np.diag(want))


def test_methods_equal_their_dense_formulas():
    case, (own, parts) = CASES["mlp"](), gradients("mlp")
    ggn, d = oracle.of("mlp").ggn, parts.shape[1]
    both = lambda inverse: own @ inverse @ parts.T
    self_influence = lambda fit, **options: influence.self_influence(
        fit, case.objective, case.params, [case.batch], **options
    )
    for damping in (None, 1e-2):
        want = both(kfac_inverse("mlp", damping))
        for fit in (fitted("mlp"), fitted("mlp", "kfac")):
            close(run("mlp", fit=fit, method="kfac", damping=damping)[0].change_if_removed, want)
            close(self_influence(fit, method="kfac", damping=damping), np.diag(want))
    diagonal = np.diag(np.diag(ggn))
    want = both(np.linalg.inv(diagonal + 1e-2 * np.eye(d)))
    close(run("mlp", fit=fitted("mlp", "diagonal"), damping=1e-2)[0].change_if_removed, want)
    close(self_influence(fitted("mlp", "diagonal"), damping=1e-2), np.diag(want))
    for fit in (fitted("mlp"), fitted("mlp", "identity")):
        close(run("mlp", fit=fit, method="identity")[0].change_if_removed, own @ parts.T)
        close(self_influence(fit, method="identity"), np.diag(own @ parts.T))
    want = both(np.linalg.inv(ggn + 1e-2 * np.eye(d)))
    solver = functools.partial(curvax.cg, tol=1e-12)
    for batches in ([case.batch], [rows(case.batch, 0, 4), rows(case.batch, 4)]):
        result, info = run("mlp", batches=batches, method=solver, damping=1e-2)
        close(result.change_if_removed, want)
        assert info.solves.converged.all() and info.solves.steps.shape == (size(case.batch),)
    # damping by block is part of the matrix
    damped = run("mlp", method=solver)
    ridge = np.zeros(d)
    for block in layout_of("mlp").blocks:
        ridge[indices(block, case.params).ravel()] = damped[1].damping[block.name][0]
    close(damped[0].change_if_removed, both(np.linalg.inv(ggn + np.diag(ridge))))
    rows_ = curvax.per_example_grads(case.objective, case.params, case.batch)
    window = influence.of_window(
        layout_of("mlp"), curvax.solve.window_of(rows_, size=9), terms=size(case.batch)
    )
    fisher = size(case.batch) * parts.T @ parts
    close(
        run("mlp", fit=window, damping=1e-2)[0].change_if_removed,
        both(np.linalg.inv(fisher + 1e-2 * np.eye(d))),
    )
    strength = 0.1 * np.trace(fisher) / d
    close(
        run("mlp", fit=window)[0].change_if_removed,
        both(np.linalg.inv(fisher + strength * np.eye(d))),
    )


@pytest.mark.parametrize("name", ["attention", "lstm", "masked_sequence"])
def test_tokens_and_layers_sum_to_the_whole(name):
    case = CASES[name]()
    whole, _ = run(name)
    by_layer, by_token = run(name, by="layer")[0], run(name, by="token")[0]
    close(by_layer.change_if_removed, whole.change_if_removed, 1e-12)
    close(sum(by_layer.by_layer.values()), whole.change_if_removed, 1e-12)
    assert set(by_layer.by_layer) == {b.name for b in layout_of(name).blocks} | {
        leaf.path for leaf in layout_of(name).leaves if leaf.outside
    }
    assert by_token.by_token.shape == (
        size(case.batch),
        *jax.tree.leaves(case.batch[0])[0].shape[:2],
    )
    close(by_token.by_token.sum(2) + by_token.elsewhere, whole.change_if_removed, 1e-12)
    if (
        name == "masked_sequence"
    ):  # the model acts on each position by itself: those without a loss have no influence
        assert (
            not by_token.elsewhere.any()
            and not by_token.by_token[:, 2].any()
            and not by_token.by_token[:, 0, 1:].any()
        )
        assert by_token.by_token[0, jnp.array([0, 1, 3, 4]), 0].all()


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_low_rank_scores_converge_to_full_rank(name):
    case = CASES[name]()
    prepared, _ = influence.precondition(fitted(name), case.objective, case.params, case.batch)
    scores = lambda prepared, **options: influence.score(
        prepared, case.objective, case.params, case.batch, **options
    )
    full, errors, told = scores(prepared).change_if_removed, [], []
    for rank in (1, 2, 3, 4):
        small, info = influence.compress(prepared, rank)
        got = scores(small, by="token" if name == "attention" else "layer")
        errors.append(np.linalg.norm(got.change_if_removed - full) / np.linalg.norm(full))
        told.append(info.error)
        again, more = influence.compress(small, rank)
        close(scores(again).change_if_removed, got.change_if_removed, 1e-10)
        assert max(more.error) < 1e-7
    assert (np.diff(errors) <= 1e-9).all() and errors[0] > 1e-2 and errors[-1] < 1e-9
    assert (
        (np.diff(told, axis=0) <= 1e-12).all()
        and (np.asarray(told[0]) > 1e-2).all()
        and not np.any(told[-1])
    )
    # what is told is what is left out
    small, info = influence.compress(prepared, 1)
    for name, v in small.blocks.items():
        v = v if isinstance(v, jax.Array) else v.left @ v.right
        norms = lambda x: np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)
        close(
            info.by_layer[name],
            norms(prepared.blocks[name] - v) / norms(prepared.blocks[name]),
            1e-7,
        )


@pytest.mark.parametrize("rank", [None, 1])
def test_work_arrays_are_bounded_whatever_the_batch(monkeypatch, rank):
    """A few examples at a time where more do not fit, with the same result."""
    case = CASES["attention"]()
    prepared, _ = influence.precondition(
        fitted("attention"), case.objective, case.params, case.batch
    )
    prepared = prepared if rank is None else influence.compress(prepared, rank)[0]
    double = jax.tree.map(lambda x: jnp.concatenate([x, x]), case.batch)
    score = lambda by: influence.score(prepared, case.objective, case.params, double, by=by)
    loops = lambda by: str(jax.make_jaxpr(lambda: score(by))()).count("scan[")
    whole = {by: (score(by), loops(by)) for by in ("example", "token")}
    for limit in (2**10, 1):  # a few, one
        monkeypatch.setattr(_gradient_products, "ENTRIES_AT_A_TIME", limit)
        for by, (want, without) in whole.items():
            close(score(by).change_if_removed, want.change_if_removed, 1e-12)
            assert limit > 1 or loops(by) > without


def test_top_k_is_that_of_the_whole_matrix():
    case = CASES["mlp"]()
    whole = np.asarray(run("mlp")[0].change_if_removed)
    prepared, _ = influence.precondition(fitted("mlp"), case.objective, case.params, case.batch)
    batches = [rows(case.batch, 0, 2), rows(case.batch, 2, 3), rows(case.batch, 3)]
    for k in (1, 3, 100):
        highest, lowest = influence.top_k(prepared, case.objective, case.params, batches, k)
        order = np.argsort(whole, axis=1)
        np.testing.assert_array_equal(highest.examples, order[:, ::-1][:, :k])
        np.testing.assert_array_equal(lowest.examples, order[:, :k])
        for best in (highest, lowest):
            close(
                best.change_if_removed,
                np.take_along_axis(whole, np.asarray(best.examples), axis=1),
                1e-12,
            )


def logit_gap(name):
    """A measurement that is no loss: the difference of two outputs, summed over positions."""
    case = CASES[name]()

    def measure(params, row):
        outputs = case.objective.outputs(params, row[0])
        return sum(jnp.sum(jnp.sin(x[..., 0]) - 2 * x[..., -1]) for x in jax.tree.leaves(outputs))

    return measure


@pytest.mark.parametrize("name", ["mlp", "multi_head"])
def test_a_summed_measurement_has_the_sum_of_the_scores(name):
    case, measure = CASES[name](), logit_gap(name)
    for inner in (None, measure):
        every = run(name, measurement=inner)[0].change_if_removed
        summed = run(name, measurement=influence.Summed(inner))[0].change_if_removed
        assert summed.shape == (1, size(case.batch))
        close(summed[0], every.sum(axis=0), 1e-12)
    # a few queries at a time, and with a solver
    prepared, _ = influence.precondition(
        fitted(name),
        case.objective,
        case.params,
        case.batch,
        measurement=influence.Summed(measure),
        chunk_size=3,
    )
    score = influence.score(prepared, case.objective, case.params, case.batch)
    close(score.change_if_removed, summed, 1e-12)
    if name == "mlp":
        solver = functools.partial(curvax.cg, tol=1e-13)
        total = run(name, measurement=influence.Summed(measure), method=solver)[0]
        every = run(name, measurement=measure, method=solver)[0].change_if_removed
        close(total.change_if_removed[0], every.sum(axis=0), 1e-9)


@pytest.mark.parametrize("name", ["mlp", "attention", "multi_head"])
def test_self_influence_of_a_measurement_is_the_diagonal(name):
    case, measure = CASES[name](), logit_gap(name)
    own = functools.partial(
        influence.self_influence, fitted(name), case.objective, case.params, measurement=measure
    )
    for options in ({"damping": 1e-2}, {"method": "kfac"}, {"method": "identity"}):
        want = np.diag(run(name, measurement=measure, **options)[0].change_if_removed)
        close(own([case.batch], **options), want, 1e-10)
        assert np.abs(want).min() > 0
    close(own([rows(case.batch, 0, 2), rows(case.batch, 2)], method="identity"), want, 1e-10)
    close(own([case.batch], microbatch=1, method="identity"), want, 1e-10)
    with pytest.raises(TypeError, match="measurement must be hashable, an Objective or a func"):
        own([case.batch], measurement=influence.Summed(measure))
    # The objective as a measurement is what None stands for, by another way.
    plain = influence.self_influence(fitted(name), case.objective, case.params, [case.batch])
    loss = influence.self_influence(
        fitted(name), case.objective, case.params, [case.batch], measurement=case.objective
    )
    close(loss, plain, 1e-10)


@pytest.mark.parametrize(("name", "num_parts"), [("mlp", 2), ("attention", 3)])
def test_parts_of_a_layout_add_up_to_it(name, num_parts):
    case, layout = CASES[name](), layout_of(name)
    parts = influence.partition(layout, num_parts)
    assert len(parts) == num_parts
    names = [block.name for part in parts for block in part.blocks]
    assert sorted(names) == sorted(block.name for block in layout.blocks)
    free = [leaf.path for part in parts for leaf in part.leaves if leaf.outside == "diagonal"]
    assert sorted(free) == sorted(leaf.path for leaf in layout.leaves if leaf.outside == "diagonal")
    scores, own = [], []
    for part in parts:
        fit = influence.fit(
            case.objective,
            part,
            case.params,
            [case.batch],
            jax.random.key(0),
            fisher="exact",
            progress=False,
        )
        # not all of the curvature is there at a time
        assert 0 < len(fit.factors.blocks) < len(layout.blocks)
        scores.append(run(name, fit=fit)[0].change_if_removed)
        own.append(influence.self_influence(fit, case.objective, case.params, [case.batch]))
    whole = run(name)[0].change_if_removed
    close(sum(scores), whole, 1e-10)
    close(sum(own), np.diag(whole), 1e-10)
    assert min(np.abs(x).max() for x in scores) > 1e-6 * np.abs(whole).max()
    with pytest.raises(ValueError, match=r"num_parts must be at most .*, got 1000"):
        influence.partition(layout, 1000)


def sampled_fit(batches, **options):
    case, key = CASES["attention"](), jax.random.key(3)
    return influence.fit(
        case.objective, layout_of("attention"), case.params, batches, key, progress=False, **options
    )


@functools.cache
def sampled():
    return sampled_fit([CASES["attention"]().batch])


def same(a, b, tolerance=1e-10):
    jax.tree.map(functools.partial(close, tolerance=tolerance), a, b)


def test_nothing_depends_on_how_data_are_cut():
    case = CASES["attention"]()
    cuts = [rows(case.batch, 0, 1), rows(case.batch, 1)]
    for fit in (sampled_fit(cuts), sampled_fit([case.batch], microbatch=3)):
        same(fit.factors, sampled().factors)
        same(
            fit.eigen.moments, sampled().eigen.moments, 1e-7
        )  # of eigenvectors of nearly equal values
        close(fit.terms, sampled().terms)
    want = run("attention", fit=sampled())[0].change_if_removed
    for options in (
        {"batches": cuts},
        {"microbatch": 1},
        {"microbatch": 3},
        {"batches": cuts, "queries": case.batch},
    ):
        close(run("attention", fit=sampled(), **options)[0].change_if_removed, want, 1e-12)
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[order], case.batch)
    close(
        run("attention", fit=sampled(), batches=[shuffled])[0].change_if_removed,
        want[:, order],
        1e-12,
    )
    close(
        run("attention", fit=sampled(), queries=shuffled)[0].change_if_removed, want[order], 1e-12
    )
    exact = lambda batches: sampled_fit(batches, fisher="exact")
    same(exact([shuffled]).factors, exact([case.batch]).factors)
    own = lambda **options: influence.self_influence(
        sampled(), case.objective, case.params, **options
    )
    whole = own(batches=[case.batch])
    close(own(batches=cuts), whole, 1e-12)
    close(own(batches=[case.batch], microbatch=1), whole, 1e-12)
    close(whole, np.diag(want), 1e-10)


@pytest.mark.parametrize(
    ("name", "fisher"),
    [("multi_head", "mc"), ("multi_head", "exact"), ("masked_sequence", "empirical")],
)
def test_batches_with_other_shares_of_terms_add_up_to_the_whole(name, fisher):
    """Heads that are masked in some examples, and the empirical Fisher of examples with different
    numbers of terms.
    """
    case, key = CASES[name](), jax.random.key(3)
    own = lambda batches: influence.fit(
        case.objective,
        layout_of(name),
        case.params,
        batches,
        key,
        fisher=fisher,
        progress=False,
    )
    cuts = [rows(case.batch, 0, 2), rows(case.batch, 2, 3), rows(case.batch, 3)]
    whole, parts = own([case.batch]), own(cuts)
    means = lambda tree: jax.tree.map(
        lambda x: x.mean, tree, is_leaf=lambda x: isinstance(x, curvax.kron.WeightedMean)
    )
    same(means(parts.factors), means(whole.factors))
    same(means(parts.eigen.moments), means(whole.eigen.moments), 1e-7)
    same(parts.terms, whole.terms)
    close(
        run(name, fit=parts, batches=cuts)[0].change_if_removed,
        run(name, fit=whole)[0].change_if_removed,
        1e-7,
    )
    together = curvax.kron_factors(
        case.objective, layout_of(name), case.params, case.batch, key, fisher=fisher
    )
    if fisher != "mc":
        same(means(whole.factors), means(together))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_nothing_depends_on_the_number_of_devices(kind):
    case, mesh = CASES["attention"](), jax.make_mesh((4,), ("data",), axis_types=(kind,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch, params = jax.device_put(case.batch, spread), jax.device_put(case.params, everywhere)
    key = jax.random.key(3)
    for microbatch in (None, 3):
        options = {"microbatch": microbatch, "progress": False}
        fit = influence.fit(case.objective, layout_of("attention"), params, [batch], key, **options)
        same(fit.factors, sampled().factors)
    want = run("attention", fit=sampled())[0].change_if_removed
    fit = jax.device_put(sampled(), everywhere)
    for queries in (case.batch, batch):
        got, _ = influence.influence(fit, case.objective, params, queries, [batch])
        close(got.change_if_removed, want, 1e-10)
    close(influence.self_influence(fit, case.objective, params, [batch]), np.diag(want), 1e-10)


def tied(p, ids):
    return jnp.tanh(p["e"][ids] @ p["w"]) @ p["e"].T


def used_twice(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"])


def one_id(p, ids):
    return jnp.tanh(p["e"][ids]) @ p["w"]


def some_ids(p, ids):
    """Some negative, some beyond the table; both look up zeros, or count from the end."""
    return jnp.tanh(p["e"].at[ids].get(mode="fill", fill_value=0)) @ p["w"]


def clipped_ids(p, ids):
    return jnp.tanh(jnp.take(p["e"], ids, axis=0, mode="clip")) @ p["w"]


def scanned(p, x):
    h, _ = jax.lax.scan(
        lambda h, layer: (h + jnp.tanh(h @ layer[0] + layer[1]), None), x, (p["w"], p["b"])
    )
    return h @ p["v"] * p["gain"]


def with_constants(p, ids):
    """Kernels scaled, masked and gathered by constants, and rows that are added."""
    mask = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1]])
    h = jnp.tanh((p["e"] * 0.5)[ids] + p["t"])
    h = jnp.tanh(h @ (p["w"] * mask) + p["b"])
    return h @ p["v"][jnp.array([2, 0, 1])]


IDS = jnp.array([[0, 1, 1], [-1, 2, 0], [5, 9, -2], [-9, 3, 4], [3, 3, 3]])
SHAPES = {
    tied: ({"e": (6, 3), "w": (3, 3)}, IDS % 6, 6),
    used_twice: ({"w": (3, 3), "b": (3,)}, (5, 3), 3),
    one_id: ({"e": (6, 3), "w": (3, 4)}, IDS[:, 0] % 6, 4),
    some_ids: ({"e": (6, 3), "w": (3, 4)}, IDS, 4),
    clipped_ids: ({"e": (6, 3), "w": (3, 4)}, IDS, 4),
    with_constants: (
        {"e": (6, 3), "t": (3, 3), "w": (3, 3), "b": (3,), "v": (3, 4)},
        IDS % 6,
        4,
    ),
    scanned: ({"w": (2, 3, 3), "b": (2, 3), "v": (3, 4), "gain": (4,)}, (5, 3), 4),
}


@pytest.mark.parametrize("model", SHAPES, ids=lambda model: model.__name__)
def test_every_kind_of_use(model):
    """Scores are the products of dense gradients, and self-influence their diagonal,
    in whatever way kernels are used.
    """
    shapes, inputs, classes = SHAPES[model]
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    inputs = jnp.asarray(rng.normal(size=inputs)) if isinstance(inputs, tuple) else inputs
    labels = jnp.asarray(rng.integers(0, classes, jax.eval_shape(model, params, inputs).shape[:-1]))
    objective, batch = (
        curvax.Objective(model, curvax.losses.softmax_cross_entropy()),
        (inputs, labels),
    )
    layout = curvax.kron_layout(objective, params, batch)
    assert {leaf.kind for leaf in layout.leaves if leaf.path != "['gain']"} == {"kron"}
    fit = influence.fit(
        objective, layout, params, [batch], jax.random.key(0), fisher="exact", progress=False
    )
    parts = jax.vmap(lambda g: ravel_pytree(g)[0])(
        curvax.per_example_grads(objective, params, batch)
    ) / size(batch)
    own = size(batch) * parts  # each example has as many terms
    whole = lambda **options: influence.influence(
        fit, objective, params, batch, [batch], **options
    )[0]
    close(whole(method="identity", by="layer").change_if_removed, own @ parts.T)
    for method in ("ekfac", "kfac"):
        scores = whole(method=method).change_if_removed
        own_scores = influence.self_influence(fit, objective, params, [batch], method=method)
        close(own_scores, np.diag(scores))
    if inputs.ndim == 2 and inputs.dtype != float:
        by_token = whole(by="token")
        close(by_token.by_token.sum(2) + by_token.elsewhere, whole().change_if_removed)
    if model is scanned:
        check_solves_and_compression(objective, layout, fit, params, batch, own, parts)


def check_solves_and_compression(objective, layout, fit, params, batch, own, parts):
    """CG with a damping for each slice of a stack, and errors of compression beside a
    leaf in no block.
    """
    solver = functools.partial(curvax.cg, tol=1e-13, max_steps=200)
    result, info = influence.influence(fit, objective, params, batch, [batch], method=solver)
    ridge = np.zeros(parts.shape[1])
    for block in layout.blocks:
        ridge[indices(block, params)] = np.asarray(info.damping[block.name])[:, None, None]
    start = np.cumsum([0, *[x.size for x in jax.tree.leaves(params)]])[1]
    ridge[start : start + params["gain"].size] = info.damping["['gain']"]
    assert len(set(np.round(ridge, 12))) == 4
    ggn = curvax.to_dense(curvax.ggnvp(objective, params, batch), params)
    close(result.change_if_removed, own @ np.linalg.inv(ggn + np.diag(ridge)) @ parts.T)
    prepared, _ = influence.precondition(fit, objective, params, batch)
    small, told = influence.compress(prepared, 1)
    flat = lambda tree: np.concatenate([np.asarray(x).reshape(5, -1) for x in tree], axis=1)
    kept = [v if isinstance(v, jax.Array) else v.left @ v.right for v in small.blocks.values()]
    whole = flat([*prepared.blocks.values(), prepared.outside["['gain']"]])
    error = flat(list(prepared.blocks.values())) - flat(kept)
    close(told.error, np.linalg.norm(error, axis=1) / np.linalg.norm(whole, axis=1))
