"""Lanczos, eigenpairs and subspaces against dense matrices in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.sparse.linalg
from cases import CASES
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.solve import Result
from curvax.spectra import (
    absolute_krylov,
    eigsh,
    fraction_in_subspace,
    hutchpp,
    lanczos,
    spectral_density,
    subspace_overlap,
    traces_by,
)

pytestmark = pytest.mark.usefixtures("x64")

DIMENSION, KEY = 40, jax.random.key(0)


def tree(v):
    return {"a": v[:12].reshape(3, 4), "b": v[12:]}


def flat(tree):
    return jnp.concatenate([tree["a"].ravel(), tree["b"]])


def rows(trees):
    return np.asarray(jax.vmap(flat)(trees))


def params(dtype=jnp.float64):
    return tree(jnp.zeros(DIMENSION, dtype))


def with_eigenvalues(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return (Q * values) @ Q.T


def times(A):
    return lambda v: tree(A @ flat(v))


# In NumPy, where the precision does not depend on when it is made.
INDEFINITE = with_eigenvalues(np.random.default_rng(1).normal(size=DIMENSION))
MATRICES = {
    "indefinite": INDEFINITE,
    "repeated": with_eigenvalues(
        np.r_[[5, 5, 5, 4.5, -2, -2, -2], np.linspace(0, 4, DIMENSION - 7)]
    ),
    "low_rank": with_eigenvalues(np.r_[[3, 2, 2, -1], np.zeros(DIMENSION - 4)]),
    "diagonal": np.diag(np.linspace(-1, 2, DIMENSION) ** 3),
    "identity": np.eye(DIMENSION),
    "zero": np.zeros((DIMENSION, DIMENSION)),
}
every_matrix = pytest.mark.parametrize("name", MATRICES)


def tridiagonal(found):
    return (
        np.diag(found.diagonal)
        + np.diag(found.off_diagonal[:-1], 1)
        + np.diag(found.off_diagonal[:-1], -1)
    )


@functools.cache
def run_lanczos(steps, keyed=True):
    return jax.jit(lambda A, v: lanczos(times(A), tree(v), steps, KEY if keyed else None))


@functools.cache
def run_eigsh(which):
    return jax.jit(
        lambda A, key, tol=1e-12: eigsh(times(A), params(), 4, key, which=which, tol=tol)
    )


@every_matrix
@pytest.mark.parametrize("steps", [12, DIMENSION])
def test_lanczos_relation_holds_on_an_orthonormal_basis(name, steps):
    A, start = MATRICES[name], jax.random.normal(KEY, (DIMENSION,))
    found = run_lanczos(steps)(A, start)
    V, T, residual = rows(found.basis), tridiagonal(found), flat(found.residual)
    np.testing.assert_allclose(V @ V.T, np.eye(steps), atol=1e-13)
    np.testing.assert_allclose(V[0], start / np.linalg.norm(start), atol=1e-14)
    np.testing.assert_allclose(A @ V.T, V.T @ T + np.outer(residual, np.eye(steps)[-1]), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(residual), found.off_diagonal[-1], atol=1e-14)
    np.testing.assert_allclose(V @ residual, 0, atol=1e-13)
    if steps == DIMENSION:  # all eigenvalues, as often as they occur
        np.testing.assert_allclose(np.linalg.eigvalsh(T), np.linalg.eigvalsh(A), atol=1e-12)


def test_where_the_krylov_space_ends():
    """Rank 4 with one repeated eigenvalue, and the kernel: four steps.
    Then random rows, or zero ones without a key.
    """
    A, start = MATRICES["low_rank"], jax.random.normal(KEY, (DIMENSION,))
    found, bare = run_lanczos(12)(A, start), run_lanczos(12, keyed=False)(A, start)
    assert found.off_diagonal[3] == 0 and (found.off_diagonal[:3] > 0.1).all()
    np.testing.assert_allclose(tridiagonal(bare)[:4, :4], tridiagonal(found)[:4, :4], atol=1e-14)
    assert (
        not rows(bare.basis)[4:].any()
        and not tridiagonal(bare)[4:].any()
        and not flat(bare.residual).any()
    )


@every_matrix
@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_eigenpairs_equal_those_of_the_dense_matrix(name, which):
    A = MATRICES[name]
    exact = np.linalg.eigvalsh(A)
    by_size = np.sort(np.abs(exact))[::-1]
    want = {
        "largest": exact[::-1][:4],
        "smallest": exact[:4],
        "both": np.r_[exact[:-3:-1], exact[:2][::-1]],
    }
    (values, vectors), info = run_eigsh(which)(A, KEY)
    if which == "magnitude":
        np.testing.assert_allclose(np.abs(values), by_size[:4], atol=1e-11)
    else:
        np.testing.assert_allclose(values, want[which], atol=1e-11)
    U = rows(vectors)
    np.testing.assert_allclose(U @ U.T, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(
        info.residuals, np.linalg.norm(A @ U.T - U.T * values, axis=0), atol=1e-13
    )
    assert info.residuals.max() <= 1e-12 * by_size[0]
    assert info.converged and info.message == "converged to the tolerance." and info.steps >= 20


def test_repeated_eigenvalues_come_as_often_as_they_occur_at_a_loose_tolerance_too():
    """A Krylov space holds each but once, and rounding does not help before the
    tolerance is met.
    """
    (values, _), info = run_eigsh("largest")(MATRICES["repeated"], KEY, 1e-3)
    np.testing.assert_allclose(values, [5, 5, 5, 4.5], atol=1e-4)
    assert info.converged


def test_steps_and_vectors_are_like_those_of_arpack():
    A, counted = with_eigenvalues(np.random.default_rng(2).normal(size=DIMENSION)), []
    operator = scipy.sparse.linalg.LinearOperator(
        A.shape, matvec=lambda x: (counted.append(0), A @ x)[1], dtype=float
    )
    exact, V = scipy.sparse.linalg.eigsh(operator, 4, which="LA", ncv=20, tol=1e-12)
    (values, vectors), info = run_eigsh("largest")(A, KEY)
    np.testing.assert_allclose(values, exact[::-1], atol=1e-12)
    np.testing.assert_allclose(np.abs(rows(vectors) @ V[:, ::-1]), np.eye(4), atol=1e-8)
    assert info.steps <= 1.5 * len(counted) + 16  # of which 16 search for repeated eigenvalues


def test_all_pairs():
    A = INDEFINITE[:6, :6]
    (values, vectors), info = jax.jit(lambda A: eigsh(lambda v: A @ v, jnp.zeros(6), 6, KEY))(A)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(A)[::-1], atol=1e-13)
    np.testing.assert_allclose(vectors.T @ np.diag(values) @ vectors, A, atol=1e-13)
    assert info.converged and info.steps == 6


def test_keys_are_mapped_over():
    (values, vectors), info = jax.jit(jax.vmap(run_eigsh("largest"), (None, 0)))(
        INDEFINITE, jax.random.split(KEY, 3)
    )
    np.testing.assert_allclose(
        values, np.tile(np.linalg.eigvalsh(INDEFINITE)[::-1][:4], (3, 1)), atol=1e-11
    )
    assert info.converged.all() and vectors["a"].shape == (3, 4, 3, 4)


def test_how_it_ended():
    """One program for all: A times v, rounded to float32 and divided by zero where asked."""
    exact, size = np.linalg.eigvalsh(INDEFINITE)[::-1][:2], DIMENSION

    @jax.jit
    def find(coarse, zero, tol):
        product = lambda v: (
            jnp.where(coarse, (INDEFINITE @ v).astype(jnp.float32).astype(v.dtype), INDEFINITE @ v)
            / zero
        )
        return eigsh(product, jnp.zeros(size), 2, KEY, tol=tol, max_restarts=2)

    (values, _), info = find(False, 1.0, 1e-14)
    assert info.code == Result.MAX_STEPS and "raise max_restarts, basis_size or tol" in info.message
    assert np.abs(values - exact).max() <= info.residuals.max() and info.steps == 20 + 2 * 9
    (values, _), info = find(True, 1.0, 1e-10)
    assert info.code == Result.STALLED and "check_symmetric" in info.message and not info.converged
    np.testing.assert_allclose(values, exact, atol=1e-6)
    _, info = find(False, 0.0, 1e-10)
    assert (
        info.code == Result.NOT_FINITE
        and "Look for inf or NaN" in info.message
        and info.steps == 20
    )


def test_float32_is_orthogonal_to_its_precision_where_one_entry_is_large():
    """Sums of 200,000 terms after a large one: accumulated in a row they would leave
    angles of 3e-5.
    """
    size = 200_000
    diagonal = jax.random.normal(KEY, (size,), jnp.float32) ** 5
    start = jax.random.normal(jax.random.key(1), (size,), jnp.float32)
    found = jax.jit(lambda a, v: lanczos(lambda v: a * v, v, 8))(diagonal, start)
    V = np.asarray(found.basis, np.float64)
    np.testing.assert_allclose(V @ V.T, np.eye(8), atol=5e-6)
    np.testing.assert_allclose(
        (V * np.asarray(diagonal)) @ V.T, tridiagonal(found), atol=5e-6 * np.abs(diagonal).max()
    )


def test_bfloat16_params_have_a_basis_in_float32():
    case = CASES["mlp"]()
    exact = np.linalg.eigvalsh(oracle.of("mlp").ggn)[::-1][:2]
    low, inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (case.params, case.batch[0]))
    find = lambda p, b: eigsh(curvax.ggnvp(case.objective, p, b), p, 2, KEY, tol=0.05)
    (values, vectors), info = jax.jit(find)(low, (inputs, case.batch[1]))
    assert {x.dtype for x in jax.tree.leaves((values, vectors))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(values, exact, rtol=0.05)
    assert info.converged


WEIGHT = np.random.default_rng(3).normal(size=(16, 3))


def of_quartic(like):
    """Pairs of the Hessian of `sum w^4 + (sum w)^2`, and what subspaces make of them."""
    matvec = curvax.hvp(lambda w: jnp.sum(w**4) + jnp.sum(w) ** 2, like)
    (values, vectors), info = eigsh(matvec, like, 3, KEY, tol=1e-10)
    return vectors, (
        values,
        subspace_overlap(vectors, vectors),
        fraction_in_subspace(vectors, like),
        info.steps,
    )


@functools.cache
def alone():
    return jax.device_get(jax.jit(of_quartic)(jnp.asarray(WEIGHT))[1])


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_sharded_over_eight_devices_equals_one(mode):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, mode),))
    with jax.set_mesh(mesh):
        vectors, found = jax.jit(of_quartic)(jax.device_put(WEIGHT, NamedSharding(mesh, P("data"))))
        assert vectors.sharding.spec[:2] == (None, "data")
    chex.assert_trees_all_close(jax.device_get(found), alone(), atol=1e-9)


SHARDED = {
    "lanczos": lambda matvec, v: lanczos(matvec, v, 5, KEY),
    "eigsh": lambda matvec, v: eigsh(matvec, v, 3, KEY, basis_size=8)[0][0],
    "absolute_krylov": lambda matvec, v: absolute_krylov(matvec, v, damping=0.1)[0],
    "spectral_density": lambda matvec, v: spectral_density(matvec, v, KEY, 2, 5)[0],
    "hutchpp": lambda matvec, v: hutchpp(matvec, v, 12, KEY),
    "traces_by": lambda matvec, v: traces_by(matvec, v, 2, KEY),
    "window": lambda matvec, v: curvax.solve.window_inverse(
        curvax.solve.insert(curvax.solve.init_window(v, 3), v), damping=0.1
    )(matvec(v)),
}


@pytest.mark.parametrize("name", SHARDED)
def test_bases_are_sharded_as_the_vectors_without_a_mesh_in_context(name):
    """Rows with an explicit sharding are written into zeros, which have none by themselves."""
    run = lambda scale, v: SHARDED[name](lambda v: scale * v, v)
    compiled = jax.jit(run)
    arrays = (jnp.arange(1.0, 49.0).reshape(16, 3), jnp.asarray(WEIGHT))
    one = jax.device_get(compiled(*arrays))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    # Sharded, and on all devices whole; op by op, and compiled.
    for spec, call in ((P("data"), run), (P("data"), compiled), (P(), compiled)):
        result = jax.device_get(call(*jax.device_put(arrays, NamedSharding(mesh, spec))))
        chex.assert_trees_all_close(result, one, rtol=1e-9, atol=1e-9)


def temporaries(fn, *args):
    """Temporary memory in copies of the first argument."""
    size = sum(x.nbytes for x in jax.tree.leaves(args[0]))
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes / size


def test_memory_is_the_basis_and_a_few_vectors():
    like = {"w": jnp.ones((100, 80)), "b": jnp.ones(100)}
    diagonal = lambda v: jax.tree.map(lambda x: 2 * x, v)
    short = lambda found: (found.diagonal, found.off_diagonal)
    assert temporaries(lambda v: short(lanczos(diagonal, v, 30)), like) < 30 + 3.5
    assert (
        temporaries(lambda v: eigsh(diagonal, v, 10, KEY), like) < 21 + 15 + 2
    )  # 15 are made anew in a restart


def test_overlap_and_fraction_equal_dense_projections():
    draw = lambda seed: jax.vmap(tree)(jax.random.normal(jax.random.key(seed), (5, DIMENSION)))
    a, b, g = draw(1), draw(2), tree(jax.random.normal(KEY, (DIMENSION,)))
    a["b"] = a["b"].at[:, 3:].set(0)  # in "b" the vectors span three dimensions only

    def projection(vectors):
        basis = np.linalg.svd(vectors, full_matrices=False)
        return basis[2][basis[1] > 1e-10].T @ basis[2][basis[1] > 1e-10]

    for part in (lambda t: t, lambda t: t["a"], lambda t: t["b"]):
        A, B, G = (
            np.asarray(jax.vmap(lambda t: ravel_pytree(t)[0])(part(x)))
            for x in (a, b, jax.tree.map(lambda x: x[None], g))
        )
        overlap, fraction = (
            subspace_overlap(part(a), part(b)),
            fraction_in_subspace(part(a), part(g)),
        )
        np.testing.assert_allclose(overlap, np.trace(projection(A) @ projection(B)) / 5, atol=1e-12)
        np.testing.assert_allclose(
            fraction, G[0] @ projection(A) @ G[0] / (G[0] @ G[0]), atol=1e-12
        )
    np.testing.assert_allclose(
        subspace_overlap(b, jax.tree.map(lambda x: 2 * x[::-1], b)), 1, atol=1e-12
    )


def test_outliers_are_as_many_as_classes_and_hold_the_gradient():
    """A mixture of ten Gaussians and a hidden layer,
    after 200 steps of gradient descent (Gur-Ari et al., 2018).
    """
    rng, classes = np.random.default_rng(0), 10
    centres = rng.normal(size=(classes, 40))
    labels = np.arange(500) % classes
    inputs = 4 * (centres / np.linalg.norm(centres, axis=1, keepdims=True))[
        labels
    ] + 0.3 * rng.normal(size=(500, 40))
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p[0]) @ p[1], curvax.losses.softmax_cross_entropy()
    )
    start = [rng.normal(size=(40, 50)) / 40**0.5, rng.normal(size=(50, classes)) / 50**0.5]

    @jax.jit
    def measure(params, batch):
        descend = lambda _, p: jax.tree.map(
            lambda w, g: w - 0.3 * g, p, jax.grad(objective)(p, batch)
        )
        params = jax.lax.fori_loop(0, 200, descend, params)
        (values, vectors), _ = eigsh(
            curvax.hvp(objective, params, batch), params, 2 * classes, KEY, tol=1e-3
        )
        top = jax.tree.map(lambda x: x[:classes], vectors)
        return values, fraction_in_subspace(top, jax.grad(objective)(params, batch))

    values, fraction = measure(jax.tree.map(jnp.asarray, start), (inputs, labels))
    assert np.argmax(values[:-1] / values[1:]) + 1 in (classes - 1, classes) and fraction > 0.8


def test_errors_say_what_and_where():
    identity = lambda v: v
    with pytest.raises(
        ValueError, match="num_steps must be at most the 40 entries of params, got 41"
    ):
        lanczos(identity, params(), 41)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        lanczos(identity, params(), 0)
    with pytest.raises(ValueError, match="k must be at most the 40 entries of params, got 41"):
        eigsh(identity, params(), 41, KEY)
    with pytest.raises(ValueError, match="basis_size must be above k: got 4 for k = 4"):
        eigsh(identity, params(), 4, KEY, basis_size=4)
    with pytest.raises(
        ValueError, match="basis_size must be at most the 40 entries of params, got 50"
    ):
        eigsh(identity, params(), 4, KEY, basis_size=50)
    with pytest.raises(
        ValueError, match="unknown which 'LA'; valid: 'largest', 'smallest', 'both', 'magnitude'"
    ):
        eigsh(identity, params(), 4, KEY, which="LA")
    with pytest.raises(ValueError, match="max_restarts must be at least 0, got -1"):
        eigsh(identity, params(), 4, KEY, max_restarts=-1)
    with pytest.raises(TypeError, match=r"int64\[3\] at params\['n'\]"):
        eigsh(identity, {"n": jnp.zeros(3, int)}, 1, KEY)
    with pytest.raises(ValueError, match=r"matvec\(v\) has no leaf at \['b'\]"):
        lanczos(lambda v: {"a": v["a"]}, params(), 3)
    with pytest.raises(TypeError, match=r"matvec\(v\)\['a'\] is float32"):
        eigsh(lambda v: jax.tree.map(lambda x: x.astype(jnp.float32), v), params(), 2, KEY)
    vectors = jax.tree.map(lambda x: x[None], params())
    with pytest.raises(
        ValueError, match=r"gradient\['a'\] is .*\[4, 3\], a vector\['a'\] is .*\[3, 4\]"
    ):
        fraction_in_subspace(vectors, {**params(), "a": jnp.zeros((4, 3))})
    with pytest.raises(ValueError, match=r"b\['a'\] is .*\[2, 3, 4\], a\['a'\] is .*\[1, 3, 4\]"):
        subspace_overlap(
            vectors, jax.tree.map(lambda x: jnp.tile(x, (2, *(1,) * (x.ndim - 1))), vectors)
        )
