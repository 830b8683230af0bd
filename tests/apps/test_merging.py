"""Merged models, against the dense system `(sum_t c_t F_t) w = sum_t c_t F_t w_t` in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.apps import merging

pytestmark = pytest.mark.usefixtures("x64")
exactly = {"tol": 1e-13, "max_steps": 500}


def model(params, x):
    return (jnp.tanh(x @ params["a"] + params["c"]) * params["s"]) @ params["b"]


OBJECTIVE = curvax.Objective(model, curvax.losses.squared_error())


@functools.cache
def tasks():
    """Return params and data of three tasks, and the layout."""
    shapes = {"a": (3, 4), "b": (4, 2), "c": (4,), "s": (4,)}
    results = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        batch = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.normal(size=(16, 2)))
        results.append((params, batch))
    models, batches = zip(*results, strict=True)
    return list(models), batches, curvax.kron_layout(OBJECTIVE, models[0], batches[0])


@functools.cache
def fitted(method):
    models, batches, layout = tasks()
    layout = merging.merge_layout(layout, method)
    fit = jax.jit(
        functools.partial(curvax.kron_factors, OBJECTIVE, layout, fisher="exact", microbatch=None)
    )
    return layout, [fit(w, b, jax.random.key(0)) for w, b in zip(models, batches, strict=True)]


def dense(layout, factors, name):
    """Return A x G of a block, or the diagonal of a leaf."""
    if name in factors.diagonal:
        return np.diag(np.ravel(factors.diagonal[name].mean))
    (block,) = [block for block in layout.blocks if block.name == name]
    of_block = factors.blocks[name]
    identity = np.eye(block.shape[2])
    G = identity if block.g_structure == "identity" else of_block.g.mean[0]
    return np.kron(of_block.a.mean[0], G)


def vectors(layout, params, name):
    """Return the entries of a block or leaf as a vector."""
    matrices = curvax.kron.block_matrices(layout, params)
    return np.ravel(matrices[name] if name in matrices else params[name.split("'")[1]])


@pytest.mark.parametrize("method", ["fisher", "regmean", "subspace"])
def test_merges_solve_the_dense_system(method):
    models, _, _ = tasks()
    layout, factors = fitted(method)
    weights = [1.0, 2.0, 0.5]
    merged, info = merging.merge(models, factors, layout, weights=weights, **exactly)
    assert info.converged
    iterated, _ = merging.merge(
        models, factors, layout, weights=weights, closed_form=False, **exactly
    )
    names = [block.name for block in layout.blocks]
    names += list(factors[0].diagonal)
    assert names
    for name in names:
        matrix, b = 0, 0
        for c, F, w in zip(weights, factors, models, strict=True):
            matrix = matrix + c * dense(layout, F, name)
            b = b + c * dense(layout, F, name) @ vectors(layout, w, name)
        for result in (merged, iterated):
            np.testing.assert_allclose(
                vectors(layout, result, name), np.linalg.solve(matrix, b), rtol=1e-9, atol=1e-10
            )
    if method == "regmean":
        average = np.average([w["s"] for w in models], axis=0, weights=weights)
        np.testing.assert_allclose(merged["s"], average, rtol=1e-12)


def test_one_task_and_equal_curvature_are_trivial():
    models, _, _ = tasks()
    layout, factors = fitted("subspace")
    alone, _ = merging.merge(models[:1], factors[:1], layout, init=models[1], **exactly)
    same, _ = merging.merge(models, [factors[0]] * 3, layout, init=models[1], **exactly)
    for name in models[0]:
        np.testing.assert_allclose(alone[name], models[0][name], atol=1e-9)
        average = np.mean([w[name] for w in models], axis=0)
        np.testing.assert_allclose(same[name], average, atol=1e-9)
        np.testing.assert_allclose(merging.merge(models)[0][name], average, rtol=1e-12)


def test_the_error_falls_with_every_step():
    models, _, _ = tasks()
    layout, factors = fitted("subspace")
    name = layout.blocks[0].name
    F = sum(dense(layout, of_task, name) for of_task in factors)
    solution = vectors(layout, merging.merge(models, factors, layout, **exactly)[0], name)
    errors = []
    for steps in (1, 2, 4, 8):
        merged, info = merging.merge(models, factors, layout, tol=0.0, max_steps=steps)
        assert not info.converged and info.blocks[name].steps == steps
        error = vectors(layout, merged, name) - solution
        errors.append(error @ F @ error)
    assert np.all(np.diff(errors) < 0)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_model_of_weight_zero_may_be_nan(method):
    """In closed form and by iteration, params and curvature."""
    models, _, _ = tasks()
    layout, factors = fitted(method)
    expected, _ = merging.merge(models[:2], factors[:2], layout, weights=[1.0, 2.0], **exactly)
    broken = jax.tree.map(lambda x: jnp.nan * x, (models[2], factors[2]))
    models, factors = [*models[:2], broken[0]], [*factors[:2], broken[1]]
    merged, info = merging.merge(models, factors, layout, weights=[1.0, 2.0, 0.0], **exactly)
    assert info.converged
    for name, w in expected.items():
        np.testing.assert_allclose(merged[name], w, rtol=1e-9, atol=1e-10)


def test_what_has_no_curvature_stays_and_bad_input_is_named():
    models = [jnp.ones(2, jnp.bfloat16), jnp.full(2, 4.0, jnp.bfloat16)]
    curvature = [jnp.array([1.0, 0.0]), jnp.array([2.0, -1.0])]
    merged, _ = merging.merge(models, curvature, init=jnp.full(2, 7.0))
    assert merged.dtype == jnp.bfloat16 and merged.tolist() == [3.0, 7.0]
    layout, factors = fitted("subspace")
    with pytest.raises(ValueError, match="2 models and 1 curvatures"):
        merging.merge(models, curvature[:1])
    with pytest.raises(TypeError, match="one kind, got diagonal, kron"):
        merging.merge(models, [curvature[0], factors[0]], layout)
    with pytest.raises(ValueError, match="factors need layout="):
        merging.merge(tasks()[0], factors)
    with pytest.raises(ValueError, match="weights are all 0"):
        merging.merge(models, curvature, weights=[0.0, 0.0])
    with pytest.raises(ValueError, match="one number for each model"):
        merging.merge(models, curvature, weights=np.eye(2))
    grams = {f"other {name}": factor.a for name, factor in factors[0].blocks.items()}
    with pytest.raises(ValueError, match="they are of another layout"):
        merging.merge(tasks()[0], [grams] * 3, layout)


def test_chunks_and_devices_change_nothing():
    models, batches, _ = tasks()
    layout, factors = fitted("subspace")
    reference, _ = merging.merge(models, factors, layout, **exactly)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    fit = jax.jit(
        functools.partial(curvax.kron_factors, OBJECTIVE, layout, fisher="exact", microbatch=5)
    )
    sharded = [
        fit(w, jax.device_put(batch, rows), jax.random.key(0))
        for w, batch in zip(models, batches, strict=True)
    ]
    merged, info = merging.merge(models, sharded, layout, **exactly)
    assert info.converged
    for name in models[0]:
        np.testing.assert_allclose(merged[name], reference[name], atol=1e-9)
