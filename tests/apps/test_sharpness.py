"""The sharpness report: its numbers against dense matrices, its thresholds against simulation."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import curvax


def in_batches(batch, size):
    rows = len(jax.tree.leaves(batch)[0])
    return [jax.tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, rows, size)]


@pytest.mark.parametrize("size", [7, 3])
def test_numbers_are_those_of_the_whole_data_set(size, x64):
    """One batch, and several with a ragged last one."""
    case = cases.mlp()
    batches = in_batches(case.batch, size)
    report = curvax.apps.sharpness_report(
        case.objective, case.params, batches, learning_rate=0.3, num_probes=400, tol=1e-6
    )
    matrix = np.asarray(oracle.hessian(case))
    largest = np.linalg.eigvalsh(matrix)[-1]
    np.testing.assert_allclose(report.largest, largest, rtol=1e-6)
    assert abs(report.trace.mean - np.trace(matrix)) < 4 * report.trace.sem
    assert (report.batch_size, report.num_examples) == (size, 7)
    np.testing.assert_allclose(report.gradient_descent, 0.3 * largest / 2, rtol=1e-6)
    factor = (1 - 1 / 7) / size + 1 / 7
    np.testing.assert_allclose(report.sgd, 0.3 * report.trace.mean * factor / 2, rtol=1e-12)
    np.testing.assert_allclose(report.max_gradient_descent, 2 / largest, rtol=1e-6)
    np.testing.assert_allclose(report.max_sgd, 2 / (report.trace.mean * factor), rtol=1e-12)
    assert report.max_learning_rate == min(report.max_gradient_descent, report.max_sgd)
    assert "of SGD, 7 examples" in str(report) and f"{largest:.4g}" in str(report)


@pytest.mark.parametrize("size", [1, 4])
def test_the_threshold_of_sgd_is_where_its_second_moment_grows(size, x64):
    """Orthogonal gradients of equal length: 0.95 of the reported rate contracts,
    1.05 of it expands.
    """
    n, s = 8, 3.0
    x = jnp.sqrt(s) * jnp.eye(n)
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    batches = in_batches((x, jnp.zeros(n)), size)
    report = curvax.apps.sharpness_report(objective, jnp.ones(n), batches, learning_rate=1.0)
    np.testing.assert_allclose(report.trace.mean, s, rtol=1e-12)

    def second_moment(share):
        """Simulate one step from all ones, with many batches drawn with replacement:
        the mean of w_i^2.
        """
        rate = share * report.max_sgd
        draws = jax.random.randint(jax.random.key(0), (200_000, size), 0, n)
        counts = jax.vmap(lambda d: jnp.zeros(n).at[d].add(1))(draws)
        return jnp.mean((1 - rate * s * counts / size) ** 2)

    assert second_moment(0.95) < 1 < second_moment(1.05)
    assert "SGD is not stable here" in str(
        curvax.apps.sharpness_report(objective, jnp.ones(n), batches, learning_rate=1e3)
    )


def test_picture_and_errors():
    from curvax import plot

    case = cases.mlp()
    report = curvax.apps.sharpness_report(
        case.objective, case.params, [case.batch], learning_rate=0.1, matvec_of=curvax.ggnvp
    )
    ax = plot.sharpness({0: report, 10: report})
    assert [line.get_label() for line in ax.lines[:2]] == ["gradient descent", "SGD"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), report.gradient_descent)
    with pytest.raises(ValueError, match="batches is empty"):
        curvax.apps.sharpness_report(case.objective, case.params, [], learning_rate=0.1)
    with pytest.raises(ValueError, match="learning_rate must be at least 0"):
        curvax.apps.sharpness_report(case.objective, case.params, [case.batch], learning_rate=-0.1)
    with pytest.raises(ValueError, match="num_probes must be at least 1"):
        curvax.apps.sharpness_report(
            case.objective, case.params, [case.batch], learning_rate=0.1, num_probes=0
        )


@pytest.mark.parametrize("size", [4, 2])
def test_heavy_ball_from_ritz_values_attains_its_rate(size, x64):
    """A quadratic with eigenvalues from 0.02 to 1: the error falls as the root of the momentum."""
    values = jnp.array([1.0, 0.3, 0.1, 0.02])
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    batch = (jnp.diag(jnp.sqrt(4 * values)), jnp.zeros(4))
    report = curvax.apps.sharpness_report(
        objective,
        jnp.ones(4),
        in_batches(batch, size),
        learning_rate=0.1,
        num_probes=1,
        tol=1e-10,
        ritz_steps=9,  # more than there are eigenvalues
    )
    best = report.heavy_ball
    np.testing.assert_allclose([best.largest, best.smallest], [1.0, 0.02], rtol=1e-8)
    assert "heavy ball, momentum" in str(report) and "from 0.02 to 1" in str(report)

    def step(carry, _):
        x, before = carry
        after = x - best.learning_rate * values * x + best.momentum * (x - before)
        return (after, x), jnp.linalg.norm(after)

    _, errors = jax.jit(lambda x: jax.lax.scan(step, (x, x), length=400))(jnp.ones(4))
    # |error| <= c k sqrt(beta)^k, so that between two steps only the factor k comes in.
    rate = (errors[399] / errors[199] / 2) ** (1 / 200)
    np.testing.assert_allclose(rate, jnp.sqrt(best.momentum), rtol=2e-3)
    # Gradient descent at its best rate falls by (L - mu) / (L + mu) a step, far slower.
    assert rate < 0.77 < 0.96 < (1 - 0.02) / (1 + 0.02)


def test_curvature_that_is_no_number_says_nothing_of_rates():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    batch = (jnp.full((2, 2), jnp.nan), jnp.zeros(2))
    report = curvax.apps.sharpness_report(
        objective, jnp.ones(2), [batch], learning_rate=0.1, num_probes=1, ritz_steps=1
    )
    rates = (report.max_gradient_descent, report.max_sgd, report.heavy_ball.learning_rate)
    assert np.isnan(rates).all() and np.isnan(report.max_learning_rate)
    assert "whether SGD is stable is unknown" in str(report)


def test_heavy_ball_leaves_out_what_is_flat_or_curves_down():
    best = curvax.apps.heavy_ball(jnp.array([4.0, 1.0, 1e-6, -0.5]))
    np.testing.assert_allclose(best, [4 / 9, 1 / 9, 4, 1], rtol=1e-6)
    np.testing.assert_allclose(
        curvax.apps.heavy_ball(jnp.array([4.0, 1e-6]), floor=0.0).smallest, 1e-6
    )
    assert jnp.isinf(curvax.apps.heavy_ball(-jnp.ones(3)).learning_rate)
    assert jnp.isnan(jnp.stack(curvax.apps.heavy_ball(jnp.array([1.0, jnp.nan])))).all()
    with pytest.raises(ValueError, match="floor must be at least 0"):
        curvax.apps.heavy_ball(jnp.ones(2), floor=-1.0)
