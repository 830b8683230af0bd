"""Kronecker curvature of objectives of several parts, against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parts import (
    BOUNDARY,
    INTERIOR,
    KEY,
    PARTS,
    TOTAL,
    WEIGHTS,
    close,
    laplacian,
    net,
    normal,
    problem,
)

import curvax
from curvax import losses
from curvax.kron import kron_basis, kron_moments

FIRST, LAST = "['first']['w']", "['last']['w']"
DATA = {name: PARTS[name] for name in ("interior", "boundary")}
DATA_WEIGHTS = {name: WEIGHTS[name] for name in DATA}
TWO = curvax.total(DATA, DATA_WEIGHTS)


@functools.cache
def of_two():
    """Params, batch, layout, and exact factors of the total and of each part."""
    params, batch = problem()
    layout = curvax.kron_layout(TWO, params, batch)

    @jax.jit
    def compute(params, batch):
        factors = curvax.kron_factors(TWO, layout, params, batch, KEY, fisher="exact", microbatch=2)
        parts = {}
        for name in DATA:
            of_part = layout.of_part(name)
            parts[name] = curvax.kron_factors(
                DATA[name], of_part, params, batch[name], KEY, fisher="exact"
            )
        return factors, parts

    return params, batch, layout, *compute(params, batch)


def sides(factors):
    return np.asarray(factors.a.mean), np.asarray(factors.g.mean)


def test_uses_of_all_parts_are_one_block_with_the_bias_of_any():
    params, batch = problem()
    layout = curvax.kron_layout(TWO, params, batch)
    assert [leaf.kind for leaf in layout.leaves] == ["kron"] * 4
    assert [(block.name, block.bias is not None) for block in layout.blocks] == [
        (FIRST, True),
        (LAST, True),
    ]
    for block in layout.blocks:
        assert [name for name, _ in block.parts] == ["interior", "boundary"]
        assert sum((uses for _, uses in block.parts), ()) == block.uses
    # the bias of the last layer has no influence on second derivatives
    interior = curvax.kron_layout(INTERIOR, params, batch["interior"])
    assert {block.name: block.bias for block in interior.blocks}[LAST] is None
    assert "in interior, boundary" in str(layout)
    assert hash(layout) == hash(curvax.kron_layout(TWO, params, batch))


def test_one_product_has_the_partial_traces_of_the_sum(x64):
    _, _, layout, factors, parts = of_two()
    for block in layout.blocks:
        trace_i, trace_o = 0.0, 0.0
        for name, of_part in parts.items():
            a, g = sides(of_part.blocks[block.name])
            trace_o += WEIGHTS[name] * np.trace(g[0]) * a[0]
            trace_i += WEIGHTS[name] * np.trace(a[0]) * g[0]
        a, g = sides(factors.blocks[block.name])
        want = np.kron(trace_o, trace_i) / np.trace(trace_i)
        close(np.kron(a[0], g[0]), want)
        # the scales are those of the factors of one part: A a mean of inputs, G a sum
        largest = max(np.trace(sides(x.blocks[block.name])[0][0]) for x in parts.values())
        assert 0 < np.trace(a[0]) <= largest


def test_parts_of_one_model_have_its_exact_factors(x64):
    """Inputs alike: the sum of the Kronecker products is one."""
    x, w = normal(0, 6, 3), normal(1, 3, 2)
    model = lambda w, x: x @ w
    error = curvax.Objective(model, losses.squared_error())
    labels = curvax.Objective(model, losses.sigmoid_cross_entropy())
    objective = curvax.total({"error": error, "labels": labels}, {"labels": 5.0})
    batch = {"error": (x, normal(2, 6, 2)), "labels": (jnp.tile(x, (2, 1)), jnp.ones((12, 2)))}
    layout = curvax.kron_layout(objective, w, batch)
    factors = curvax.kron_factors(objective, layout, w, batch, KEY, fisher="exact")
    p = 1 / (1 + np.exp(-(x @ w)))
    A = x.T @ x / 6
    G = np.eye(2) + 5 * np.diag((p * (1 - p)).mean(0))
    close(factors.blocks[""].a.mean[0], A)
    close(factors.blocks[""].g.mean[0], G)


def test_two_products_are_inverted_exactly(x64):
    params, batch, layout, _, parts = of_two()
    layout = layout.edit(LAST, two_products="exact")
    block = next(block for block in layout.blocks if block.name == LAST)
    assert block.num_products == 2
    factors = curvax.kron_factors(TWO, layout, params, batch, KEY, fisher="exact")
    inverse = curvax.kron_inverse(layout, factors, damping=0.3)
    (a1, g1), (a2, g2) = (sides(parts[name].blocks[LAST]) for name in DATA)
    g1, g2 = WEIGHTS["interior"] * g1, WEIGHTS["boundary"] * g2
    # G has one row, and so takes none of the damping: (A2 g2 + damping I) x 1
    matrix = np.kron(a1[0], g1[0]) + np.kron(a2[0], g2[0]) + 0.3 * np.eye(4)
    v = jax.tree.map(lambda p: normal(9, *p.shape), params)
    stacked = np.concatenate([v["last"]["w"].ravel(), v["last"]["b"]])
    got = inverse(v)["last"]
    close(np.concatenate([got["w"].ravel(), got["b"]]), np.linalg.solve(matrix, stacked))
    # averages of factors keep both products
    rule = curvax.scale_by_kfac(layout, damping=0.3)
    state = rule.init(params)
    updates, state = jax.jit(rule.update)(v, state, params, curvature=factors)
    close(updates["last"], got)
    with pytest.raises(ValueError, match="a sum of two Kronecker products has no"):
        kron_basis(layout, factors)


def test_exact_inverse_is_for_two_products():
    params, batch = problem()
    alone = curvax.total({"boundary": BOUNDARY})
    layout = curvax.kron_layout(alone, params, {"boundary": batch["boundary"]})
    with pytest.raises(ValueError, match=r"is the sum of 1 Kronecker\s+product"):
        layout.edit(LAST, two_products="exact")


def test_a_kernel_that_one_part_uses_transposed_alone(x64):
    """The gradient in the inputs has the kernel of the last layer transposed, and only so."""
    gradient = lambda p, x: jax.vmap(jax.grad(lambda x: net(p, x)[0]))(x)
    slope = curvax.Objective(gradient, losses.squared_error())
    params, batch = problem()
    batch = {**batch, "slope": (normal(7, 4, 2), normal(8, 4, 2))}
    objective = curvax.total({"boundary": BOUNDARY, "slope": slope})
    del batch["interior"]
    layout = curvax.kron_layout(objective, params, batch)
    block = next(block for block in layout.blocks if block.name == LAST)
    uses = dict(block.parts)
    assert [use.transposed for use in uses["slope"]] == [True]
    assert not any(use.transposed for use in uses["boundary"])

    @jax.jit
    def compute(params, batch):
        factors = curvax.kron_factors(objective, layout, params, batch, KEY, fisher="exact")
        basis = kron_basis(layout, factors)
        moments = kron_moments(objective, layout, basis, params, batch, KEY, fisher="exact")
        diagonal = curvax.ggn_diagonal(objective, params, batch)
        return factors.blocks[LAST], moments.moments[LAST].mean.sum(), diagonal["last"]

    factors, trace, diagonal = compute(params, batch)
    # the products of the two parts stay apart, as those of a tied weight; EK-FAC has the trace
    assert factors.second is not None
    np.testing.assert_allclose(trace, sum(x.sum() for x in jax.tree.leaves(diagonal)), rtol=1e-10)


def test_second_moments_are_weighted_sums_in_the_common_basis(x64):
    params, batch, layout, factors, _ = of_two()

    @jax.jit
    def compute(params, batch):
        basis = kron_basis(layout, factors)
        moments = kron_moments(TWO, layout, basis, params, batch, KEY, fisher="exact", microbatch=2)
        matrix = curvax.to_dense(curvax.ggnvp(TWO, params, batch), params)
        return basis, moments, matrix

    basis, eigen, matrix = compute(params, batch)
    # params in the order of the dense matrix: first b, first w, last b, last w
    places = {FIRST: ([*range(3, 9), *range(3)], 3), LAST: ([10, 11, 12, 9], 1)}
    for name, (indices, columns) in places.items():
        block = matrix[np.ix_(indices, indices)]
        q_g = np.eye(columns) if basis[name].g is None else basis[name].g[0]
        q = np.kron(basis[name].a[0], q_g)
        moments = eigen.moments[name].mean[0]
        close(moments, np.diag(q.T @ block @ q).reshape(moments.shape))


def test_rows_of_the_parts_have_the_second_moments_of_their_samples(x64):
    """What EK-FAC averages: the moments of the sampled rows are those of `kron_moments`."""
    params, batch = problem()
    layout = curvax.kron_layout(TOTAL, params, batch)

    @jax.jit
    def compute(params, batch):
        curvature = curvax.kron.eigen_curvature(TOTAL, layout, params, batch, KEY)
        basis = kron_basis(layout, curvature.factors)
        moments = kron_moments(TOTAL, layout, basis, params, batch, KEY)
        rows = {}
        for block in layout.blocks:
            rows[block.name] = curvax.kron._moments.moments_in(block, basis[block.name], curvature)
        return rows, {name: x.mean for name, x in moments.moments.items()}

    close(*compute(params, batch))


def test_a_penalty_adds_to_the_damping_of_blocks(x64):
    params, batch, _, factors, _ = of_two()
    decay = curvax.penalty(lambda w: 0.5 * w**2)
    objective = curvax.total({**DATA, "decay": decay}, {**DATA_WEIGHTS, "decay": 0.2})
    layout = curvax.kron_layout(objective, params, batch)
    plain = curvax.kron_layout(TWO, params, batch)
    penalized = curvax.kron_factors(objective, layout, params, batch, KEY, fisher="exact")
    v = jax.tree.map(lambda p: normal(9, *p.shape), params)
    for scheme in ("exact", "factored"):
        got = curvax.kron_inverse(layout, penalized, 0.1, damping_scheme=scheme)(v)
        close(got, curvax.kron_inverse(plain, factors, 0.3, damping_scheme=scheme)(v))
    basis = kron_basis(layout, penalized)
    moments = [
        kron_moments(total, of_layout, basis, params, batch, KEY, fisher="exact").moments
        for total, of_layout in ((objective, layout), (TWO, plain))
    ]
    for name in moments[0]:
        close(moments[0][name].mean, moments[1][name].mean + 0.2)


def test_the_diagonal_of_leaves_in_no_block_has_the_penalty_exactly(x64):
    params, batch = problem()
    layout = curvax.kron_layout(TOTAL, params, batch).edit(LAST, kind="diagonal")

    @jax.jit
    def compute(params, batch):
        factors = curvax.kron_factors(TOTAL, layout, params, batch, KEY, fisher="exact")
        return factors.diagonal, curvax.ggn_diagonal(TOTAL, params, batch)

    diagonal, want = compute(params, batch)
    close(diagonal[LAST].mean, want["last"]["w"])
    close(diagonal["['last']['b']"].mean, want["last"]["b"])


def test_a_leaf_that_one_part_uses_otherwise_is_in_no_block_and_says_where():
    params, batch = problem()
    scaled = lambda p, x: net({**p, "last": {**p["last"], "w": p["last"]["w"] ** 2}}, x)
    squared = curvax.Objective(scaled, losses.squared_error())
    objective = curvax.total({"interior": INTERIOR, "squared": squared})
    batch = {"interior": batch["interior"], "squared": batch["boundary"]}
    layout = curvax.kron_layout(objective, params, batch)
    leaf = next(leaf for leaf in layout.leaves if leaf.path == LAST)
    assert leaf.kind == "diagonal" and leaf.reason == "enters `integer_pow`, in part squared"
    assert "in part squared" in str(layout)
    factors = jax.eval_shape(
        lambda p, b: curvax.kron_factors(objective, layout, p, b, KEY), params, batch
    )
    assert set(factors.blocks) == {FIRST} and LAST in factors.diagonal


def test_factors_and_rows_of_a_batch_on_eight_devices():
    params, batch = problem(16, 8)
    layout = curvax.kron_layout(TOTAL, params, batch)
    mesh = jax.make_mesh((8,), ("data",))

    @jax.jit
    def compute(params, batch):
        factors = curvax.kron_factors(TOTAL, layout, params, batch, KEY, fisher="exact")
        curvature = curvax.kron.eigen_curvature(TOTAL, layout, params, batch, KEY)
        return factors, curvature.factors.diagonal, curvature.cotangents

    alone = jax.device_get(compute(params, batch))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
        close(jax.device_get(compute(params, sharded)), alone, 1e-4)


def test_fits_and_foreign_layouts_are_refused(x64):
    params, batch, layout, *_ = of_two()
    plain = curvax.kron_layout(BOUNDARY, params, batch["boundary"])
    with pytest.raises(ValueError, match="layout is of an objective without parts"):
        curvax.kron_factors(TWO, plain, params, batch, KEY)
    with pytest.raises(TypeError, match="fit each part by itself"):
        curvax.kron.fit_factors(TWO, layout, params, [batch], KEY)


METHODS = {
    "kfac": lambda o, layout: curvax.kfac(0.1, o, layout, damping=1e-2),
    "ekfac": lambda o, layout: curvax.ekfac(0.1, o, layout, damping=1e-2),
    "sophia_g": lambda o, layout: curvax.sophia_g(0.01, o),
    "adahessian": lambda o, layout: curvax.adahessian(0.01, o),
    "egn": lambda o, layout: curvax.egn(0.1, o, damping=1e-1),
    "gauss_newton": lambda o, layout: curvax.gauss_newton(0.1, o, damping=1e-1),
    "newton_cg": lambda o, layout: curvax.newton_cg(0.1, o, damping=1.0),
    "self-tuning": lambda o, layout: curvax.levenberg_marquardt(
        curvax.quadratic_model(
            curvax.estimating(curvax.scale_by_kfac(layout), curvax.kron.estimator(o, layout)), o
        ),
        o,
        damping=1.0,
    ),
    "fraction": lambda o, layout: optax.chain(
        curvax.estimating(
            curvax.scale_by_kfac(layout, damping=1e-2),
            curvax.on_fraction(curvax.kron.estimator(o, layout), 0.5),
        ),
        optax.scale_by_learning_rate(0.01),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_an_objective_of_several_parts_in_a_scan(name):
    params, batch = problem(8, 4)
    layout = curvax.kron_layout(TOTAL, params, batch)
    tx = METHODS[name](TOTAL, layout)

    @jax.jit
    def train(params, batch):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(TOTAL)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        _, values = jax.lax.scan(step, (params, tx.init(params)), None, length=8)
        return values

    values = train(params, batch)
    assert np.isfinite(values).all() and values[-1] < values[0]


def test_kfac_solves_a_boundary_value_problem():
    """u'' = f on 64 points inside of [0, 1], u = sin(pi t) at 16 points of its boundary."""
    u = lambda t: jnp.sin(jnp.pi * t)
    interior = curvax.Objective(laplacian, losses.squared_error())
    boundary = curvax.Objective(net, losses.squared_error())
    objective = curvax.total({"interior": interior, "boundary": boundary}, {"boundary": 10.0})
    params = {
        "first": {"w": 2 * normal(0, 1, 16), "b": normal(1, 16)},
        "last": {"w": normal(2, 16, 1) / 4, "b": jnp.zeros(1)},
    }
    points = jax.random.uniform(KEY, (64, 1))
    ends = jnp.tile(jnp.array([[0.0], [1.0]]), (8, 1))
    batch = {"interior": (points, -(jnp.pi**2) * u(points)), "boundary": (ends, u(ends))}
    layout = curvax.kron_layout(objective, params, batch)
    tx = curvax.kfac(0.03, objective, layout, damping=1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(objective)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), values = jax.lax.scan(step, (params, tx.init(params)), None, length=200)
        return params, values

    trained, values = train(params)
    assert values[-1] < 1e-2 * values[0]
    grid = jnp.linspace(0, 1, 11)[:, None]
    assert jnp.abs(net(trained, grid) - u(grid)).max() < 0.05
