"""Influence against retraining: linear and logistic regression, the linear datamodeling score,
and the filter for texts.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses
from curvax.apps import influence

pytestmark = pytest.mark.usefixtures("x64")

PENALTY = 1e-2


@functools.cache
def regression(kind):
    """An objective, its minimum with a penalty on 300 examples, data, and queries."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(340, 6)), rng.normal(size=(6, 1))
    noisy = x @ weights + rng.normal(size=(340, 1))
    y, loss = {
        "linear": (noisy, losses.squared_error()),
        "logistic": ((noisy > 0).astype(int), losses.sigmoid_cross_entropy()),
    }[kind]
    objective = curvax.Objective(lambda w, x: x @ w, loss)
    batch, queries = (
        (jnp.asarray(x[:300]), jnp.asarray(y[:300])),
        (jnp.asarray(x[300:]), jnp.asarray(y[300:])),
    )

    def train(key, there):
        """Minimize the sum over the examples that are there, over the number of all,
        and the penalty, by Newton's steps.
        """
        del key
        own = lambda w, x, y: objective(w[:, None], (x[None], y[None]))
        value = lambda w: (
            jnp.sum(there * jax.vmap(own, (None, 0, 0))(w, *batch)) / 300
            + PENALTY * jnp.sum(w**2) / 2
        )
        step = lambda w, _: (w - jnp.linalg.solve(jax.hessian(value)(w), jax.grad(value)(w)), None)
        return jax.lax.scan(step, jnp.zeros(6), length=8)[0][:, None]

    return objective, train(None, jnp.ones(300)), batch, queries, train


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_scores_are_the_change_when_an_example_is_left_out(kind):
    objective, params, batch, queries, train = regression(kind)
    own = lambda w: jax.vmap(lambda x, y: objective(w, (x[None], y[None])))(*queries)
    removed = jnp.arange(0, 300, 6)
    found = influence.leave_one_out(train, own, 300, removed, jax.random.key(0), chunk_size=16)
    assert np.isnan(found.sem).all()
    layout = curvax.kron_layout(objective, params, batch)
    fit = influence.fit(
        objective, layout, params, [batch], jax.random.key(0), fisher="exact", progress=False
    )
    solver = functools.partial(curvax.cg, tol=1e-10)
    # The Gauss-Newton matrix of both is the Hessian.
    # In one block with one output EK-FAC is exact if its eigenvectors are.
    for method in (solver, "ekfac")[: 1 + (kind == "linear")]:
        scores, _ = influence.influence(
            fit,
            objective,
            params,
            queries,
            [batch],
            damping=PENALTY,
            method=method,
        )
        predicted, happened = (
            scores.change_if_removed[:, removed].ravel(),
            found.change_if_removed.ravel(),
        )
        slope = predicted @ happened / (predicted @ predicted)
        assert np.corrcoef(predicted, happened)[0, 1] > 0.999, method
        assert abs(slope - 1) < 0.05, method
    ekfac, _ = influence.influence(fit, objective, params, queries, [batch], damping=PENALTY)
    assert np.corrcoef(ekfac.change_if_removed[:, removed].ravel(), happened)[0, 1] > 0.98


def test_measurements_other_than_a_loss():
    """A parameter by itself, and the sign: raising a target raises what is predicted."""
    objective, params, batch, _, train = regression("linear")
    layout = curvax.kron_layout(objective, params, batch)
    fit = influence.fit(
        objective, layout, params, [batch], jax.random.key(0), fisher="exact", progress=False
    )
    measure = lambda w, query: jnp.sum(query["weights"][0] @ w)
    queries = {"weights": jnp.eye(6)}
    scores, _ = influence.influence(
        fit, objective, params, queries, [batch], measurement=measure, damping=PENALTY
    )
    found = influence.leave_one_out(train, lambda w: w[:, 0], 300, jnp.arange(4), jax.random.key(0))
    np.testing.assert_allclose(
        scores.change_if_removed[:, :4], found.change_if_removed, rtol=0.05, atol=1e-5
    )


def test_retraining_runs_every_subset_with_every_seed():
    x = jnp.arange(5.0)
    train = lambda key, there: {
        "mean": jnp.sum(x * there) / jnp.sum(there),
        "noise": jax.random.normal(key),
    }
    measure = lambda params: jnp.stack([params["mean"], params["noise"]])
    subsets = influence.random_subsets(5, 7, jax.random.key(1), fraction=0.6)
    np.testing.assert_array_equal(subsets.sum(axis=1), 3)
    assert len({tuple(row) for row in np.asarray(subsets).tolist()}) > 3
    for chunk_size in (2, 100):
        found = influence.retrain(
            train, measure, subsets, jax.random.key(0), num_seeds=3, chunk_size=chunk_size
        )
        assert found.shape == (3, 7, 2)
        np.testing.assert_allclose(found[..., 0], np.tile(subsets @ x / 3, (3, 1)))
        noise = jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(0), 3))
        np.testing.assert_allclose(
            found[..., 1], np.tile(noise[:, None], (1, 7))
        )  # one seed is the same for all subsets
    one = influence.leave_one_out(
        train, measure, 5, jnp.array([4, 0]), jax.random.key(0), num_seeds=3
    )
    np.testing.assert_allclose(one.change_if_removed, [[1.5 - 2, 2.5 - 2], [0, 0]], atol=1e-12)
    np.testing.assert_allclose(one.sem, 0, atol=1e-12)


def test_linear_datamodeling_score_is_a_rank_correlation():
    rng = np.random.default_rng(0)
    scores, subsets = rng.normal(size=(3, 12)), rng.random((40, 12)) < 0.5
    sums = -(subsets @ scores.T)  # of those removed, up to what all together sum to
    score = influence.linear_datamodeling_score
    assert score(scores, subsets, np.exp(sums)).mean == pytest.approx(1) and score(
        scores, subsets, -sums
    ).mean == pytest.approx(-1)
    measured = sums + rng.normal(size=sums.shape) * sums.std()
    ranks = lambda x: np.argsort(np.argsort(x, axis=0), axis=0)
    each = [np.corrcoef(ranks(sums)[:, q], ranks(measured)[:, q])[0, 1] for q in range(3)]
    found = score(scores, subsets, measured)
    np.testing.assert_allclose(
        [found.mean, found.sem], [np.mean(each), np.std(each, ddof=1) / 3**0.5], rtol=1e-6
    )
    assert score(0 * scores, subsets, measured).mean == 0
    for wrong in (
        (scores, subsets, measured.T),
        (scores[:, :5], subsets, measured),
        (scores, subsets[:2], measured[:2]),
    ):
        with pytest.raises(ValueError, match=r"expected change_if_removed \[queries, examples\]"):
            score(*wrong)
    with pytest.raises(ValueError, match="query 1 has the same measurement on all subsets"):
        score(scores, subsets, measured * np.array([1, 0, 1]))
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got 1"):
        influence.random_subsets(5, 2, jax.random.key(0), fraction=1)


def test_bm25_sums_the_rarity_of_shared_tokens():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 30, size=rng.integers(0, 20)).tolist() for _ in range(50)]
    queries = [rng.integers(0, 35, size=6).tolist() for _ in range(3)] + [[], [99]]
    idf = lambda t: math.log((50 - (n := sum(t in d for d in documents)) + 0.5) / (n + 0.5) + 1)
    want = np.array(
        [[sum(idf(t) for t in query if t in d) for d in documents] for query in queries]
    )
    found = influence.bm25(queries, documents)
    for q in range(len(queries)):
        np.testing.assert_allclose(found.scores[q], want[q, found.documents[q]], rtol=1e-12)
        np.testing.assert_array_equal(np.sort(found.documents[q]), np.arange(50))
        assert (np.diff(found.scores[q]) <= 0).all()
    np.testing.assert_array_equal(
        found.documents[3], np.arange(50)
    )  # nothing is shared: in their order
    np.testing.assert_array_equal(
        influence.bm25(queries, documents, k=7).documents, found.documents[:, :7]
    )
    strings = influence.bm25([["b", "b"]], [["a"], ["b", "b"], ["b"]])
    assert strings.documents[0, 0] == 1 and strings.scores[0, 0] == strings.scores[
        0, 1
    ] == pytest.approx(2 * math.log(1.6))
    with pytest.raises(ValueError, match="documents is empty"):
        influence.bm25(queries, [])
