"""Estimates: exact by enumeration, variances by formula, diagonals against dense matrices."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, SAMPLED
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax import losses
from curvax.estimate import normal, rademacher
from curvax.estimate._hutchinson import diagonal_term, trace_term

pytestmark = pytest.mark.usefixtures("x64")


def symmetric(n):
    a = np.asarray(jax.random.normal(jax.random.key(0), (n, n)))
    return a + a.T


def all_signs(n):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def test_hutchinson_over_all_sign_vectors_is_exact_with_the_known_variance():
    H = symmetric(5)
    off = H - np.diag(np.diag(H))
    terms = jax.jit(
        jax.vmap(lambda z: [term(lambda v: H @ v, z) for term in (diagonal_term, trace_term)])
    )
    diagonals, traces = map(np.asarray, terms(all_signs(5)))
    np.testing.assert_allclose(diagonals.mean(0), np.diag(H), atol=1e-12)
    np.testing.assert_allclose(diagonals.var(0), (off**2).sum(1), atol=1e-12)
    np.testing.assert_allclose(traces.mean(), np.trace(H), atol=1e-12)
    np.testing.assert_allclose(traces.var(), 2 * (off**2).sum(), atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("sampler", [rademacher, normal])
def test_mean_and_standard_error_are_those_of_the_probes(sampler, chunk_size):
    """Whatever the chunks, ragged or larger than the number of probes."""
    H, params, key = symmetric(4), {"a": jnp.zeros(3), "b": jnp.zeros(())}, jax.random.key(1)
    matvec = lambda v: {"a": (H @ oracle.flat(v))[:3], "b": (H @ oracle.flat(v))[3]}

    @jax.jit
    def compute(key):
        probe = lambda i: oracle.flat(
            diagonal_term(matvec, sampler(jax.random.fold_in(key, i), params))
        )
        options = {"sampler": sampler, "chunk_size": chunk_size}
        diagonal, trace = (
            functools.partial(estimate, matvec, params, key, **options)
            for estimate in (curvax.hutchinson_diagonal, curvax.hutchinson_trace)
        )
        return jax.vmap(probe)(jnp.arange(10)), diagonal(10), trace(10), diagonal(1)

    terms, got, trace, one = jax.tree.map(np.asarray, compute(key))
    flat = lambda tree: np.append(tree["a"], tree["b"])
    np.testing.assert_allclose(flat(got.mean), terms.mean(0), atol=1e-12)
    np.testing.assert_allclose(flat(got.sem), terms.std(0, ddof=1) / 10**0.5, atol=1e-12)
    np.testing.assert_allclose(trace.mean, terms.sum(1).mean(), atol=1e-12)
    np.testing.assert_allclose(trace.sem, terms.sum(1).std(ddof=1) / 10**0.5, atol=1e-12)
    np.testing.assert_allclose(flat(one.mean), terms[0], atol=1e-12)
    assert np.isinf(flat(one.sem)).all()


@pytest.mark.parametrize("sampler", [rademacher, normal])
def test_samplers_have_identity_second_moment(sampler):
    draw = jax.jit(jax.vmap(lambda k: sampler(k, jnp.zeros(3))))
    z = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(3), atol=5 * 2**0.5 / len(z) ** 0.5)


def test_gauss_newton_bartlett_over_all_label_tuples_is_the_ggn_diagonal():
    x = jax.random.normal(jax.random.key(0), (4, 2))
    w = jax.random.normal(jax.random.key(1), (2, 3))
    model = lambda w, x: jnp.tanh(x @ w)
    plain = losses.softmax_cross_entropy()
    given = losses.from_function(
        plain.value,
        curvature_product=plain.curvature_product,
        sample=lambda key, outputs, targets: targets,
    )
    objective = curvax.Objective(model, given)
    tuples = np.array(list(itertools.product(range(3), repeat=4)))

    @jax.jit
    def compute(tuples):
        log_p = jax.nn.log_softmax(model(w, x))
        probability = jax.vmap(lambda y: jnp.exp(log_p[jnp.arange(4), y].sum()))(tuples)
        draw = lambda y: curvax.gauss_newton_bartlett(objective, w, (x, y), jax.random.key(0))
        mean = jnp.einsum("t,t...->...", probability, jax.vmap(draw)(tuples))
        return probability.sum(), mean, curvax.ggn_diagonal(objective, w, (x, tuples[0]))

    total, mean, diagonal = compute(tuples)
    np.testing.assert_allclose(total, 1, atol=1e-12)
    np.testing.assert_allclose(mean, diagonal, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["masked_sequence", "multi_head", "masked_regression", "gaussian", "shared_statistics"]
)
def test_gauss_newton_bartlett_is_unbiased(name):
    case = CASES[name]()
    draw = lambda key: oracle.flat(
        curvax.gauss_newton_bartlett(case.objective, case.params, case.batch, key)
    )
    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
    sem = draws.std(0, ddof=1) / len(draws) ** 0.5 + 1e-12
    assert np.abs((draws.mean(0) - np.diag(oracle.of(name).ggn)) / sem).max() < 5


@pytest.mark.parametrize("name", CASES)
def test_exact_diagonals_equal_those_of_dense_matrices(name):
    case = CASES[name]()

    @jax.jit
    def compute(params, batch):
        estimates = curvax.ggn_diagonal, curvax.per_example_grads, curvax.empirical_fisher_diagonal
        in_chunks = [
            estimate(case.objective, params, batch, microbatch=3) for estimate in estimates
        ]
        return jax.grad(case.objective.value)(params, batch), *in_chunks

    gradient, ggn, rows, empirical = jax.tree.map(np.asarray, compute(case.params, case.batch))
    ggn = np.concatenate([np.ravel(x) for x in jax.tree.leaves(ggn)])
    np.testing.assert_allclose(ggn, np.diag(oracle.of(name).ggn), atol=1e-10)
    chex.assert_trees_all_close(jax.tree.map(lambda g: g.mean(0), rows), gradient, atol=1e-12)
    matrices, loss = oracle.of(name), case.objective.loss
    r = oracle.empirical_gradient(loss, matrices.outputs, oracle.targets(case))
    fisher = oracle.sum_over_examples(matrices, r)
    np.testing.assert_allclose(oracle.flat(empirical), np.diag(fisher), atol=1e-10)


@pytest.mark.parametrize("name", SAMPLED[:2])
def test_per_example_gradients_are_those_of_each_example(name):
    case = CASES[name]()
    x, y = case.batch
    rows = jax.jit(functools.partial(curvax.per_example_grads, case.objective))(
        case.params, case.batch
    )
    gradient = jax.jit(jax.grad(case.objective))
    for b in (0, 3):
        alone = gradient(case.params, (x[b : b + 1], y[b : b + 1]))
        chex.assert_trees_all_close(jax.tree.map(lambda g, b=b: g[b], rows), alone, atol=1e-12)


def test_probes_and_draws_do_not_depend_on_the_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], losses.softmax_cross_entropy()
    )
    params = {"a": jnp.ones((4, 16)), "b": jax.random.normal(jax.random.key(0), (16, 3))}
    batch = (jax.random.normal(jax.random.key(1), (32, 4)), jnp.arange(32) % 3)

    @jax.jit
    def estimates(params, batch):
        key = jax.random.key(2)
        matvec = curvax.hvp(objective, params, batch)
        return (
            curvax.hutchinson_diagonal(matvec, params, key, 3),
            curvax.gauss_newton_bartlett(objective, params, batch, key),
            curvax.fishervp(objective, params, batch, key, microbatch=16)(params),
        )

    shardings = {"a": NamedSharding(mesh, P(None, "data")), "b": NamedSharding(mesh, P("data"))}
    sharded = (
        jax.device_put(params, shardings),
        jax.device_put(batch, NamedSharding(mesh, P("data"))),
    )
    chex.assert_trees_all_close(estimates(*sharded), estimates(params, batch), atol=1e-12)


def test_memory_of_many_probes_is_that_of_one():
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], losses.squared_error())
    params, batch = (
        [jnp.zeros((64, 128)), jnp.zeros((128, 8))],
        (jnp.zeros((512, 64)), jnp.zeros((512, 8))),
    )

    def peak(num_probes):
        estimate = lambda p, b: curvax.hutchinson_diagonal(
            curvax.hvp(objective, p, b), p, jax.random.key(0), num_probes
        )
        return jax.jit(estimate).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert peak(64) < 1.3 * peak(1)


def test_leaves_of_any_size_have_probes():
    params = {
        "none": jnp.zeros((0, 5)),
        "scalar": jnp.zeros(()),
        "odd": jnp.zeros((2, 33)),
        "empty": jnp.zeros((3, 0)),
    }
    estimate = curvax.hutchinson_diagonal(lambda v: v, params, jax.random.key(0))
    chex.assert_trees_all_equal(estimate.mean, jax.tree.map(jnp.ones_like, params))


def test_bfloat16_params_give_float32_estimates():
    H = jnp.diag(jnp.array([1.0, 2.0, 3.0], jnp.bfloat16))
    estimate = curvax.hutchinson_diagonal(
        lambda v: H @ v, jnp.zeros(3, jnp.bfloat16), jax.random.key(0), 3
    )
    assert estimate.mean.dtype == estimate.sem.dtype == jnp.float32
    np.testing.assert_allclose(estimate.mean, [1, 2, 3])


def test_a_nan_in_one_probe_is_not_hidden():
    matvec = lambda v: jnp.where(v > 0, v, jnp.nan)
    assert jnp.isnan(
        curvax.hutchinson_diagonal(matvec, jnp.zeros(4), jax.random.key(0), 5, chunk_size=2).mean
    ).any()


def test_errors_say_what_and_where():
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        curvax.hutchinson_trace(lambda v: v, jnp.zeros(2), jax.random.key(0), 0)
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        curvax.hutchinson_trace(lambda v: v, jnp.zeros(2), jax.random.key(0), np.int64(0))
    with pytest.raises(TypeError, match=r"num_probes must be a Python integer.*got float"):
        curvax.hutchinson_trace(lambda v: v, jnp.zeros(2), jax.random.key(0), 2.5)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        curvax.hutchinson_diagonal(lambda v: v, jnp.zeros(2), jax.random.key(0), 2, chunk_size=0)
    with pytest.raises(
        TypeError, match=r"such as curvax.estimate.rademacher or .*normal; got 'gaussian'"
    ):
        curvax.hutchinson_diagonal(lambda v: v, jnp.zeros(2), jax.random.key(0), sampler="gaussian")
    case = CASES["mlp"]()
    for diagonal in (
        curvax.ggn_diagonal,
        curvax.empirical_fisher_diagonal,
        curvax.per_example_grads,
    ):
        with pytest.raises(ValueError, match="microbatch must be at least 1, got -1"):
            diagonal(case.objective, case.params, case.batch, microbatch=-1)
        with pytest.raises(ValueError, match="leading axes disagree"):
            diagonal(case.objective, case.params, (case.batch[0], case.batch[1][:2]))
    user = CASES["user_loss"]()
    with pytest.raises(TypeError, match="no way to sample"):
        curvax.gauss_newton_bartlett(user.objective, user.params, user.batch, jax.random.key(0))
