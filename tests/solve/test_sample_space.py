"""The Gauss-Newton matrix in sample space, and solves with it,
against dense matrices in float64.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parts
import pytest
import zoo

import curvax
from curvax.capture import _gram
from curvax.solve import Dense, SampleSpace, _jacobian_rows, direct

flat_rows = jax.vmap(oracle.flat)


@functools.partial(jax.jit, static_argnums=0)
def space_and_rows(objective, params, batch):
    space = curvax.solve.sample_space(objective, params, batch, space="samples")
    return space, flat_rows(jax.vmap(space.pull)(jnp.eye(len(space.gram))))


@functools.cache
def problem(name):
    """A case, its gradient and its dense Gauss-Newton matrix without negative curvature."""
    case = cases.CASES[name]()
    J, S = oracle.jacobian(case), oracle.output_curvature(case)
    values, vectors = np.linalg.eigh(S)
    gradient = jax.jit(jax.grad(case.objective.value))(case.params, case.batch)
    return case, gradient, J.T @ (vectors * np.maximum(values, 0) @ vectors.T) @ J


KINDS = (
    "mlp",
    "cnn",
    "masked_sequence",
    "user_loss",
    "multi_head",
    "sigmoid",
    "gaussian",
    "shared_statistics",
)


@pytest.mark.parametrize("name", KINDS)
def test_gram_matrix_and_solves(name, x64):
    """Any right-hand side; a gradient among them, for which there is a way of its own."""
    case, gradient, matrix = problem(name)
    space, rows = space_and_rows(case.objective, case.params, case.batch)
    np.testing.assert_allclose(space.gram, rows @ rows.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rows.T @ rows, matrix, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        oracle.flat(space.pull(space.gradient)), oracle.flat(gradient), rtol=1e-8, atol=1e-10
    )
    np.testing.assert_allclose(
        space.push(case.params), rows @ oracle.flat(case.params), rtol=1e-10, atol=1e-12
    )
    solve = jax.jit(lambda space, b, damping: direct(space, b, damping=damping, tol=1e-9))
    for b in (
        gradient,
        jax.tree.map(lambda g, p: 2 * g + 0.1 * p, gradient, case.params),
        case.params,
    ):
        x, info = solve(space, b, 1e-3)
        want = np.linalg.solve(matrix + 1e-3 * np.eye(len(matrix)), oracle.flat(b))
        np.testing.assert_allclose(oracle.flat(x), want, rtol=1e-8, atol=1e-8 * np.abs(want).max())
        assert info.converged, info


ZOO = (
    "attention",
    "conv_grouped",
    "embed",
    "tied",
    "scan_layers",
    "ensemble",
    "mixture",
    "two_uses",
    "overlapping",
    "masked",
    "tied_entries",
    "scaled",
    "positions",
)


@pytest.mark.parametrize("name", ZOO)
def test_gram_matrix_of_any_layer(name, x64):
    case = zoo.CASES[name]()
    objective = curvax.Objective(case.model, curvax.losses.squared_error())
    targets = jnp.zeros(jax.eval_shape(case.model, case.params, case.inputs).shape)
    space, rows = space_and_rows(objective, case.params, (case.inputs, targets))
    np.testing.assert_allclose(
        space.gram, rows @ rows.T, rtol=2e-5, atol=1e-6 * np.abs(space.gram).max()
    )


def test_rows_are_formed_in_parts(x64, monkeypatch):
    case = cases.cnn()
    whole, _ = space_and_rows(case.objective, case.params, case.batch)
    monkeypatch.setattr(_gram, "ENTRIES_AT_A_TIME", 200)
    parts = jax.jit(
        lambda p, b: curvax.solve.sample_space(case.objective, p, b, space="samples").gram
    )(case.params, case.batch)
    np.testing.assert_allclose(parts, whole.gram, rtol=1e-12, atol=1e-14)


def test_the_smaller_space_is_chosen(x64):
    case, gradient, matrix = problem("mlp")
    form = jax.jit(lambda p, b: curvax.solve.sample_space(case.objective, p, b))
    assert isinstance(jax.eval_shape(form, case.params, case.batch), SampleSpace)
    tripled = jax.tree.map(lambda x: jnp.concatenate([x] * 3), case.batch)  # the same mean
    dense = form(case.params, tripled)
    assert isinstance(dense, Dense)
    np.testing.assert_allclose(dense.matrix, matrix, rtol=1e-10, atol=1e-12)
    x, info = direct(dense, gradient, damping=1e-3)
    want = np.linalg.solve(matrix + 1e-3 * np.eye(len(matrix)), oracle.flat(gradient))
    np.testing.assert_allclose(oracle.flat(x), want, rtol=1e-8)
    x, info = direct(Dense(-jnp.eye(len(matrix))), gradient, damping=0.5)
    assert "not positive definite" in info.message and not np.any(oracle.flat(x))
    with pytest.raises(TypeError, match=r"direct takes the result of curvax\.solve\.sample_space"):
        direct(lambda v: v, gradient, damping=1.0)
    with pytest.raises(ValueError, match="b has no leaf"):
        direct(form(case.params, case.batch), {"w": jnp.ones(1)}, damping=1.0)


def test_float32_solves_are_accurate_down_to_small_damping():
    """Through the gradient's own coordinates; a difference divided by damping would
    lose all digits.
    """
    x, w = (
        jax.random.normal(jax.random.key(0), (6, 40)),
        jax.random.normal(jax.random.key(1), (40, 3)),
    )
    objective = curvax.Objective(lambda w, x: jnp.tanh(x @ w), curvax.losses.squared_error())
    batch = (x, jax.random.normal(jax.random.key(2), (6, 3)))
    gradient = jax.grad(objective)(w, batch)
    solve = jax.jit(
        lambda w, batch, b: direct(curvax.solve.sample_space(objective, w, batch), b, damping=1e-6)
    )
    step, _info = solve(w, batch, gradient)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
        matrix = curvax.to_dense(curvax.ggnvp(objective, wide(w), wide(batch)), wide(w))
        want = np.linalg.solve(
            matrix + 1e-6 * np.eye(120), np.asarray(gradient, np.float64).ravel()
        )
    assert np.linalg.norm(step.ravel() - want) < 1e-3 * np.linalg.norm(want)


def test_memory_stays_below_the_jacobian():
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p[0]) @ p[1], curvax.losses.softmax_cross_entropy()
    )
    params, batch = (
        [jnp.zeros((100, 300)), jnp.zeros((300, 5))],
        (jnp.zeros((16, 100)), jnp.zeros(16, int)),
    )
    form = jax.jit(lambda p, b: curvax.solve.sample_space(objective, p, b).gram)
    jacobian = 80 * 31_500 * 4
    assert form.lower(params, batch).compile().memory_analysis().temp_size_in_bytes < 0.1 * jacobian


def test_errors():
    case = cases.mlp()
    with pytest.raises(ValueError, match="unknown space 'rows'"):
        curvax.solve.sample_space(case.objective, case.params, case.batch, space="rows")
    mixing = curvax.Objective(lambda w, x: (x - x.mean(0)) @ w, curvax.losses.squared_error())
    with pytest.raises(ValueError, match="mixes examples"):
        jax.eval_shape(
            lambda w, b: curvax.solve.sample_space(mixing, w, b),
            jnp.ones((20, 2)),
            (jnp.ones((3, 20)), jnp.ones((3, 2))),
        )
    with pytest.raises(ValueError, match=r"the matrix is \[2, 2\], b has 3 entries"):
        direct(Dense(jnp.eye(2)), jnp.ones(3), damping=1.0)
    with pytest.raises(ValueError, match="damping must be positive"):
        direct(SampleSpace(jnp.eye(2), None, None, jnp.ones(2)), case.params, damping=0.0)


@pytest.mark.usefixtures("x64")
def test_rows_of_several_parts_stand_side_by_side():
    """Parts with one output and with three, of other numbers of examples."""
    shared = cases.mlp()
    first = shared.objective
    last = curvax.Objective(
        lambda p, x: first.outputs(p, x)[:, :1] ** 2, curvax.losses.squared_error()
    )
    weights = {"first": 0.5, "last": 3.0}
    objective = curvax.total({"first": first, "last": last}, weights)
    x = jax.random.normal(jax.random.key(8), (2, 3))
    batch = {"first": jax.tree.map(lambda x: x[:4], shared.batch), "last": (x, jnp.ones((2, 1)))}
    space, rows = space_and_rows(objective, shared.params, batch)
    matrix = 0.0
    for name, part in (("first", first), ("last", last)):
        matrix += weights[name] * oracle.ggn(cases.Case(part, shared.params, batch[name]))
    assert space.gram.shape == (14, 14)
    np.testing.assert_allclose(space.gram, rows @ rows.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rows.T @ rows, matrix, rtol=1e-10, atol=1e-12)
    gradient = jax.jit(jax.grad(objective))(shared.params, batch)
    pulled = oracle.flat(space.pull(space.gradient))
    np.testing.assert_allclose(pulled, oracle.flat(gradient), rtol=1e-8, atol=1e-10)
    pushed = rows @ oracle.flat(shared.params)
    np.testing.assert_allclose(space.push(shared.params), pushed, rtol=1e-10, atol=1e-12)
    got, info = direct(space, gradient, damping=1e-3, tol=1e-9)
    want = np.linalg.solve(matrix + 1e-3 * np.eye(len(matrix)), oracle.flat(gradient))
    np.testing.assert_allclose(oracle.flat(got), want, rtol=1e-8)
    assert info.converged


@pytest.mark.usefixtures("x64")
def test_a_penalty_goes_into_the_matrix_over_params():
    case = cases.mlp()
    parts = {"fit": case.objective, "decay": curvax.penalty(lambda w: 0.5 * w**2)}
    objective = curvax.total(parts, {"decay": 0.2})
    batch = {"fit": jax.tree.map(lambda x: x[:1], case.batch)}
    space = jax.jit(lambda p, b: curvax.solve.sample_space(objective, p, b))(case.params, batch)
    assert isinstance(space, Dense)
    fit = oracle.ggn(cases.Case(case.objective, case.params, batch["fit"]))
    np.testing.assert_allclose(space.matrix, fit + 0.2 * np.eye(len(fit)), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="penalty 'decay' would be as many rows"):
        curvax.solve.sample_space(objective, case.params, batch, space="samples")


@pytest.mark.usefixtures("x64")
def test_rows_by_reverse_passes_against_layers_and_products(monkeypatch):
    """Second derivatives inside and values on the boundary; in sample space and over params."""
    residuals = {name: parts.PARTS[name] for name in ("interior", "boundary")}
    without_decay = curvax.total(residuals, {"interior": 0.7, "boundary": 3.0})
    params, batch = parts.problem()
    # Two examples at a time, and the one that remains.
    monkeypatch.setattr(_jacobian_rows, "ENTRIES_AT_A_TIME", 26)

    @jax.jit
    def both(params, batch):
        form = functools.partial(curvax.solve.sample_space, params=params, batch=batch)
        by_rows = form(without_decay, space="samples", form_rows=True)
        by_layers = form(without_decay, space="samples", form_rows=False)
        dense = [form(parts.TOTAL, form_rows=by).matrix for by in (True, False)]
        pulled = [space.pull(space.gradient) for space in (by_rows, by_layers)]
        pushed = [space.push(params) for space in (by_rows, by_layers)]
        return [by_rows.gram, by_layers.gram], dense, pulled, pushed

    for got, want in both(params, batch):
        assert np.any(np.asarray(jax.tree.leaves(want)[0]))
        parts.close(got, want)


@pytest.mark.parametrize("name", ["mlp", "multi_head", "shared_statistics"])
def test_rows_of_several_outputs(name, x64):
    case, _, matrix = problem(name)
    form = functools.partial(curvax.solve.sample_space, case.objective, form_rows=True)
    dense = jax.jit(lambda p, b: form(p, b, space="params").matrix)(case.params, case.batch)
    np.testing.assert_allclose(dense, matrix, rtol=1e-9, atol=1e-11)


def test_shapes_decide_whether_rows_are_formed():
    """A model with a backward pass only can be worked through by rows alone."""

    @jax.custom_vjp
    def scaled(w, x):
        return x @ w

    scaled.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, c: (saved[1].T @ c, c @ saved[0].T))
    objective = curvax.Objective(scaled, curvax.losses.squared_error())

    def form(num_outputs, **options):
        w, batch = jnp.ones((3, num_outputs)), (jnp.eye(3), jnp.ones((3, num_outputs)))
        build = lambda w, b: curvax.solve.sample_space(objective, w, b, **options)
        return jax.eval_shape(build, w, batch)

    assert isinstance(form(1), SampleSpace)
    assert isinstance(form(1, space="params"), Dense)
    assert isinstance(form(2, space="params"), Dense)
    for options in (
        {"num_outputs": 2, "space": "samples"},
        {"num_outputs": 5, "space": "params"},
        {"num_outputs": 1, "form_rows": False},
    ):
        with pytest.raises(TypeError, match="custom_vjp"):
            form(**options)


def test_rows_need_examples_that_are_apart():
    mixing = curvax.Objective(lambda w, x: (x - x.mean(0)) @ w, curvax.losses.squared_error())
    w, batch = jnp.ones(2), (jnp.arange(6.0).reshape(3, 2), jnp.ones(3))
    with pytest.raises(ValueError, match="known to keep examples apart"):
        curvax.solve.sample_space(mixing, w, batch, form_rows=True)
    # Products see the whole batch: x of zero mean.
    dense = curvax.solve.sample_space(mixing, w, batch, space="params").matrix
    np.testing.assert_allclose(dense, np.full((2, 2), 8 / 3), rtol=1e-6)
    empty = jax.tree.map(lambda x: x[:0], batch)
    with pytest.raises(ValueError, match="batch has no rows"):
        curvax.solve.sample_space(mixing, w, empty)
