"""Products over batches on the host against those with all data at once; solvers that get one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES

import curvax
from curvax._batch import batch_size, map_rows
from curvax.products import streamed
from curvax.spectra import eigsh, lanczos, spectral_density

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


def cut(batch, size=3):
    """Batches of `size` rows, the last one ragged."""
    return [
        map_rows(lambda x, i=i: x[i : i + size], batch) for i in range(0, batch_size(batch), size)
    ]


def like(params):
    return jax.tree.map(
        lambda p: jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params
    )


@pytest.mark.parametrize("name", ["mlp", "masked_sequence", "multi_head", "shared_statistics"])
def test_equals_the_product_over_the_concatenated_batch(name):
    """Ragged, with masked terms, heads with counts of their own, an empty batch, shared parts."""
    case = CASES[name]()
    v, vector = like(case.params), oracle.flat(like(case.params))
    exact = {curvax.hvp: oracle.hessian(case), curvax.ggnvp: oracle.of(name).ggn}
    for product, matrix in exact.items():
        got = streamed(product, case.objective, case.params, cut(case.batch))(v)
        np.testing.assert_allclose(oracle.flat(got), matrix @ vector, atol=1e-12)
    want = jax.jit(lambda p, b, v: curvax.empirical_fishervp(case.objective, p, b)(v))(
        case.params, case.batch, v
    )
    got = streamed(
        curvax.empirical_fishervp, case.objective, case.params, cut(case.batch), microbatch=2
    )(v)
    chex.assert_trees_all_close(got, want, atol=1e-12)


def test_fisher_products_draw_with_a_key_for_each_batch():
    case, size = CASES["mlp"](), 7
    v = like(case.params)
    got = streamed(
        curvax.fishervp, case.objective, case.params, cut(case.batch), key=KEY, num_samples=2
    )(v)
    of_batch = jax.jit(
        lambda batch, i: curvax.fishervp(
            case.objective, case.params, batch, jax.random.fold_in(KEY, i), 2
        )(v)
    )
    parts = [
        batch_size(b) / size * oracle.flat(of_batch(b, i)) for i, b in enumerate(cut(case.batch))
    ]
    np.testing.assert_allclose(oracle.flat(got), sum(parts), atol=1e-12)


def test_batches_of_numpy_arrays_in_lists_and_programs_that_are_compiled_once():
    case = CASES["mlp"]()
    batches, traced = [list(jax.tree.map(np.asarray, batch)) for batch in cut(case.batch)], []
    model = lambda p, x: (traced.append(x.shape), case.objective.model(p, x))[1]
    objective = curvax.Objective(model, case.objective.loss)
    matvec = streamed(curvax.ggnvp, objective, case.params, batches)
    matvec(case.params)
    traced.clear()
    for scale, params in ((1.0, case.params), (2.0, jax.tree.map(jnp.copy, case.params))):
        matvec = streamed(curvax.ggnvp, objective, params, batches)
        got = matvec(jax.tree.map(lambda x, s=scale: s * x, like(case.params)))
        np.testing.assert_allclose(
            oracle.flat(got), scale * oracle.of("mlp").ggn @ oracle.flat(like(params)), atol=1e-12
        )
    assert not traced
    integer = matvec(jax.tree.map(lambda p: np.ones(p.shape, int), case.params))
    np.testing.assert_allclose(oracle.flat(integer), oracle.of("mlp").ggn.sum(1), atol=1e-12)
    low = matvec(jax.tree.map(lambda x: x.astype(jnp.float32), like(case.params)))
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype(jnp.float32)}


def test_spectra_run_their_loops_in_python():
    case = CASES["mlp"]()
    matvec = streamed(curvax.hvp, case.objective, case.params, cut(case.batch))
    H = oracle.hessian(case)
    exact = np.linalg.eigvalsh(H)
    (values, vectors), info = eigsh(matvec, case.params, 5, KEY, which="both", tol=1e-11)
    np.testing.assert_allclose(values, [*exact[:-4:-1], *exact[1::-1]], atol=1e-10)
    U = np.asarray(jax.vmap(oracle.flat)(vectors))
    np.testing.assert_allclose(
        info.residuals, np.linalg.norm(H @ U.T - U.T * values, axis=0), atol=1e-12
    )
    density, info = spectral_density(matvec, case.params, KEY, 2, 6)
    z = np.stack(
        [
            oracle.flat(curvax.estimate.rademacher(jax.random.fold_in(KEY, i), case.params))
            for i in range(2)
        ]
    )
    np.testing.assert_allclose(
        np.sum(density.weights * density.nodes**3, axis=1),
        np.einsum("ni,ni->n", z @ H @ H, z @ H) / len(H),
        atol=1e-11,
    )
    found = lanczos(matvec, case.params, 4, KEY)  # case.params are left as they were
    np.testing.assert_allclose(
        oracle.flat(jax.tree.map(lambda x: x[0], found.basis)), _unit(oracle.flat(case.params))
    )


def _unit(x):
    return x / np.linalg.norm(x)


def test_a_matvec_made_of_it_under_disable_jit():
    case = CASES["mlp"]()
    matvec = streamed(curvax.ggnvp, case.objective, case.params, cut(case.batch))
    shifted = lambda v: jax.tree.map(lambda x, y: x + y, matvec(v), v)
    with jax.disable_jit():
        (values, _), _ = eigsh(shifted, case.params, 1, KEY, tol=1e-11)
    np.testing.assert_allclose(
        values[0], 1 + np.linalg.eigvalsh(oracle.of("mlp").ggn)[-1], atol=1e-10
    )


def test_errors_say_what_and_where():
    case = CASES["mlp"]()
    objective, params, batches = case.objective, case.params, cut(case.batch)
    build = functools.partial(streamed, curvax.ggnvp, objective, params)
    with pytest.raises(
        TypeError,
        match=r"matvec_of must be one of curvax.hvp, curvax.ggnvp, .*; got functools.partial",
    ):
        streamed(functools.partial(curvax.ggnvp, microbatch=2), objective, params, batches)
    with pytest.raises(
        TypeError, match=r"batches is an iterator \(generator\), which can be gone through but once"
    ):
        build(batch for batch in batches)
    with pytest.raises(ValueError, match="batches is empty"):
        build([])
    with pytest.raises(
        TypeError, match=r"batches must hold pairs \(inputs, targets\), got float64\[7, 3\]"
    ):
        build([case.batch[0]])
    with pytest.raises(ValueError, match=r"batch\[0\] has 7 rows, batch\[1\] is int\d+\[6\]"):
        build([(case.batch[0], case.batch[1][:6])])
    matvec = build(batches)
    with pytest.raises(ValueError, match=r"v has no leaf at \['Dense_0'\]\['bias'\]"):
        matvec({"Dense_0": {"kernel": params["Dense_0"]["kernel"]}})
    for transform in (jax.jit, jax.grad, jax.linearize):
        with pytest.raises(TypeError, match=r"cannot be traced.*under `with jax.disable_jit\(\):`"):
            transform(
                lambda v: sum(map(jnp.sum, jax.tree.leaves(matvec(v)))),
                *([params] if transform is jax.linearize else []),
            )(params)
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda key: eigsh(matvec, params, 1, key))(KEY)
    running_out = list(batches)
    matvec = build(running_out)
    running_out.pop()
    with pytest.raises(ValueError, match="batches gave 3 the first time and 2 now"):
        matvec(params)


def test_rows_of_one_process_of_several_are_refused(monkeypatch):
    """Each process would take its own rows for the whole batch."""
    case = CASES["mlp"]()
    product = streamed(curvax.ggnvp, case.objective, case.params, [case.batch])
    product(like(case.params))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"batch\[0\].*make_array_from_process_local_data"):
        product(like(case.params))
