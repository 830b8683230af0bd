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
