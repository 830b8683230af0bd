"""Objectives of several parts, and penalties on params: every curvature is the weighted sum."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parts import (
    BOUNDARY,
    DECAY,
    INTERIOR,
    KEY,
    PARTS,
    TOTAL,
    WEIGHTS,
    close,
    net,
    normal,
    penalized,
    problem,
    second_derivatives,
)

import curvax
from curvax import losses
from curvax.optim._quadratic_model import quadratic_form


def dense_of(matvec_of):
    """The dense matrix of the total, and the weighted sum of those of the parts."""

    @jax.jit
    def compute(params, batch):
        of_total = curvax.to_dense(matvec_of(TOTAL, params, batch, KEY), params)
        dense = WEIGHTS["decay"] * jnp.diag(second_derivatives(params))
        for number, name in enumerate(("interior", "boundary")):
            key = jax.random.fold_in(KEY, number)
            matvec = matvec_of(PARTS[name], params, batch[name], key)
            dense += WEIGHTS[name] * curvax.to_dense(matvec, params)
        return of_total, dense

    return compute(*problem())


MATVECS = {
    "hvp": lambda o, p, b, key: curvax.hvp(o, p, b),
    "hvp by chunks": lambda o, p, b, key: curvax.hvp(o, p, b, microbatch=2),
    "ggnvp": lambda o, p, b, key: curvax.ggnvp(o, p, b),
    "ggnvp by chunks": lambda o, p, b, key: curvax.ggnvp(o, p, b, microbatch=2),
    "empirical": lambda o, p, b, key: curvax.empirical_fishervp(o, p, b, microbatch=2),
    "fishervp": lambda o, p, b, key: curvax.fishervp(o, p, b, key, 2, microbatch=2),
}


@pytest.mark.parametrize("name", MATVECS)
def test_products_are_weighted_sums_of_those_of_the_parts(name, x64):
    got, want = dense_of(MATVECS[name])
    close(got, want)


def test_value_gradient_and_gauss_newton_matrix_against_dense_ones(x64):
    params, batch = problem()
    value, gradient = jax.jit(jax.value_and_grad(TOTAL))(params, batch)
    flat_params = np.asarray(oracle.flat(params))
    mask = np.asarray(oracle.flat(jax.tree.map(jnp.full_like, params, penalized(params))))
    want = WEIGHTS["decay"] * np.sum(mask * (0.5 * flat_params**2 + flat_params**4))
    want_gradient = WEIGHTS["decay"] * mask * (flat_params + 4 * flat_params**3)
    ggn = WEIGHTS["decay"] * np.diag(second_derivatives(params))
    for name in ("interior", "boundary"):
        case = cases.Case(PARTS[name], params, batch[name])
        of_part, of_gradient = jax.jit(jax.value_and_grad(PARTS[name]))(params, batch[name])
        want += WEIGHTS[name] * of_part
        want_gradient += WEIGHTS[name] * oracle.flat(of_gradient)
        ggn += WEIGHTS[name] * oracle.ggn(case)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    close(oracle.flat(gradient), want_gradient)
    # a matvec is a pytree, also that of several parts
    matvec = jax.jit(lambda p, b: curvax.ggnvp(TOTAL, p, b))(params, batch)
    product = jax.jit(lambda matvec, v: matvec(v))(matvec, params)
    close(oracle.flat(product), ggn @ flat_params)
    got, diagonal, form = jax.jit(
        lambda p, b: (
            curvax.to_dense(curvax.ggnvp(TOTAL, p, b), p),
            curvax.ggn_diagonal(TOTAL, p, b, microbatch=2),
            quadratic_form(TOTAL, p, b, [p, gradient]),
        )
    )(params, batch)
    close(got, ggn)
    close(oracle.flat(diagonal), np.diag(ggn))
    vectors = np.stack([flat_params, oracle.flat(gradient)])
    close(form, vectors @ ggn @ vectors.T)


def test_diagonals_and_gradients_of_examples_are_those_of_the_parts(x64):
    params, batch = problem()

    @jax.jit
    def compute(params, batch):
        sampled = curvax.gauss_newton_bartlett(TOTAL, params, batch, KEY)
        empirical = curvax.empirical_fisher_diagonal(TOTAL, params, batch, microbatch=2)
        matrix = curvax.to_dense(curvax.empirical_fishervp(TOTAL, params, batch), params)
        want = WEIGHTS["decay"] * second_derivatives(params)
        for number, name in enumerate(("interior", "boundary")):
            key = jax.random.fold_in(KEY, number)
            diagonal = curvax.gauss_newton_bartlett(PARTS[name], params, batch[name], key)
            want += WEIGHTS[name] * oracle.flat(diagonal)
        rows = curvax.per_example_grads(TOTAL, params, batch)
        means = jax.tree.map(lambda x: x.mean(0), rows)
        gradients = {name: jax.grad(PARTS[name])(params, batch[name]) for name in batch}
        return sampled, want, empirical, matrix, means, gradients

    sampled, want, empirical, matrix, means, gradients = compute(params, batch)
    close(oracle.flat(sampled), want)
    close(oracle.flat(empirical), np.diag(matrix))
    close(means, gradients)


@functools.cache
def batches_of_stream():
    _, whole = problem(5, 4)
    cut = lambda name, rows: jax.tree.map(lambda x: x[rows], whole[name])
    first = {"interior": cut("interior", slice(4)), "boundary": cut("boundary", slice(1))}
    second = {"interior": cut("interior", slice(4, 5)), "boundary": cut("boundary", slice(1, 4))}
    return whole, [first, second]


@pytest.mark.parametrize("matvec_of", [curvax.ggnvp, curvax.hvp, curvax.empirical_fishervp])
def test_batches_of_a_stream_have_their_shares_in_every_part(matvec_of, x64):
    params, _ = problem()
    whole, batches = batches_of_stream()
    streamed = curvax.streamed(matvec_of, TOTAL, params, batches)
    want = jax.jit(lambda p, b: matvec_of(TOTAL, p, b)(p))(params, whole)
    close(streamed(params), want)


def test_a_data_set_cut_in_two_parts_has_the_curvature_of_the_whole(x64):
    params, batch = problem(6, 4)
    points, values = batch["interior"]
    parts = {"few": (points[:2], values[:2]), "more": (points[2:], values[2:])}
    objective = curvax.total({"few": INTERIOR, "more": INTERIOR}, {"few": 2 / 6, "more": 4 / 6})

    @functools.partial(jax.jit, static_argnums=0)
    def compute(objective, params, batch):
        value_and_gradient = jax.value_and_grad(objective)(params, batch)
        dense = curvax.to_dense(curvax.ggnvp(objective, params, batch), params)
        empirical = curvax.to_dense(curvax.empirical_fishervp(objective, params, batch), params)
        diagonal = curvax.ggn_diagonal(objective, params, batch)
        return value_and_gradient, dense, empirical, diagonal

    close(compute(objective, params, parts), compute(INTERIOR, params, (points, values)))


def test_aux_and_shared_inputs_by_part(x64):
    def model(params, inputs):
        f = inputs["x"] * inputs["scale"] @ params
        return f, {"largest": jnp.max(f)}

    with_aux = curvax.Objective(model, losses.squared_error(), has_aux=True)
    plain = curvax.Objective(lambda w, x: x @ w, losses.squared_error())
    objective = curvax.total({"aux": with_aux, "plain": plain})
    assert objective.has_aux
    inputs = {"x": normal(0, 4, 2), "scale": curvax.Shared(jnp.array([2.0, 1.0]))}
    batch = {"aux": (inputs, normal(1, 4, 1)), "plain": (normal(2, 3, 2), normal(3, 3, 1))}
    params = normal(4, 2, 1)
    value, aux = jax.jit(objective)(params, batch)
    want, of_part = with_aux(params, batch["aux"])
    np.testing.assert_allclose(value, want + plain(params, batch["plain"]), rtol=1e-12)
    assert aux.keys() == {"aux"} and aux["aux"]["largest"] == of_part["largest"]
    assert objective.value(params, batch) == value
    # model and loss are those of the parts, side by side
    outputs, targets = objective.outputs(params, {"aux": inputs, "plain": batch["plain"][0]}), {}
    targets = {name: rows[1] for name, rows in batch.items()}
    np.testing.assert_allclose(objective.loss(outputs, targets), value, rtol=1e-12)
    rows = jax.jit(lambda p, b: curvax.ggnvp(objective, p, b, microbatch=2)(p))(params, batch)
    want = jax.jit(lambda p, b: curvax.hvp(objective, p, b)(p))(params, batch)
    close(rows, want)


def test_a_batch_on_eight_devices():
    params, batch = problem(16, 8)
    mesh = jax.make_mesh((8,), ("data",))

    @jax.jit
    def compute(params, batch):
        product = curvax.ggnvp(TOTAL, params, batch, microbatch=8)(params)
        sampled = curvax.fishervp(TOTAL, params, batch, KEY)(params)
        return jax.grad(TOTAL)(params, batch), product, sampled

    alone = jax.device_get(compute(params, batch))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
        close(jax.device_get(compute(params, sharded)), alone, 1e-4)


def test_bfloat16_params_get_products_in_their_dtype():
    params, batch = problem()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch))
    product = jax.jit(lambda p, b: curvax.ggnvp(TOTAL, p, b)(p))(*narrow)
    assert {x.dtype for x in jax.tree.leaves(product)} == {jnp.dtype(jnp.bfloat16)}
    want = jax.jit(lambda p, b: curvax.ggnvp(TOTAL, p, b)(p))(params, batch)
    close(jax.tree.map(lambda x: x.astype(jnp.float32), product), want, 0.1)


def test_a_fraction_of_the_rows_of_every_part():
    _, batch = problem(8, 4)
    rows = lambda params, batch, key: batch
    selected = curvax.on_fraction(rows, 0.5)(None, {**batch, "decay": None}, None)
    assert selected["decay"] is None
    np.testing.assert_array_equal(selected["interior"][0], batch["interior"][0][::2])
    np.testing.assert_array_equal(selected["boundary"][1], batch["boundary"][1][::2])


def test_errors_name_the_part():
    params, batch = problem()
    with pytest.raises(ValueError, match="keys boundary, interior, one for each part"):
        TOTAL(params, {"interior": batch["interior"]})
    with pytest.raises(ValueError, match="got interior, boundary, other"):
        TOTAL(params, {**batch, "other": batch["interior"]})
    with pytest.raises(ValueError, match=r"batch\['decay'\] is tuple, but part 'decay' is a pen"):
        TOTAL(params, {**batch, "decay": batch["interior"]})
    with pytest.raises(TypeError, match=r"a batch that is a dict, .* got tuple"):
        curvax.ggnvp(TOTAL, params, batch["interior"])
    with pytest.raises(ValueError, match="'other', which is no part; parts: interior, boundary"):
        curvax.total(PARTS, {"other": 1.0})
    with pytest.raises(ValueError, match="weight of part 'decay' must be at least 0, got -1"):
        curvax.total(PARTS, {"decay": -1.0})
    with pytest.raises(ValueError, match="one part with a batch, got no part"):
        curvax.total({})
    with pytest.raises(ValueError, match="one part with a batch, got decay"):
        curvax.total({"decay": DECAY})
    with pytest.raises(ValueError, match=r"'inner' is a curvax\.total itself"):
        curvax.total({"inner": TOTAL})
    with pytest.raises(TypeError, match=r"part 'f' must be a curvax\.Objective, got function"):
        curvax.total({"f": net})
    user = curvax.Objective(BOUNDARY.model, lambda f, y: jnp.mean((f - y) ** 4))
    objective = curvax.total({"interior": INTERIOR, "boundary": user})
    with pytest.raises(TypeError, match="no way to sample") as raised:
        curvax.gauss_newton_bartlett(objective, params, batch, KEY)
    assert raised.value.__notes__ == ["This is of the part 'boundary' of curvax.total."]
    vector = curvax.Objective(BOUNDARY.model, lambda f, y: (f - y) ** 2)
    with pytest.raises(TypeError, match=r"scalar, got float32\[3, 1\]") as raised:
        curvax.total({"interior": INTERIOR, "boundary": vector})(params, batch)
    assert any("'boundary'" in note for note in raised.value.__notes__)
    bad = curvax.total({"interior": INTERIOR, "decay": curvax.penalty(lambda w: jnp.ones(2) * w)})
    with pytest.raises(TypeError, match="a penalty must return a real scalar") as raised:
        bad(params, {"interior": batch["interior"]})
    assert any("'decay'" in note for note in raised.value.__notes__)
