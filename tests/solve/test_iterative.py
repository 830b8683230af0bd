"""Solves against dense matrices in float64: definite, singular and indefinite."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.solve import Result


@functools.cache
def problem(name, kind):
    """A case's matvec, right-hand side and dense matrix."""
    case = cases.CASES[name]()
    product = {"hessian": curvax.hvp, "ggn": curvax.ggnvp, "fisher": curvax.empirical_fishervp}[
        kind
    ]
    matvec = product(case.objective, case.params, case.batch)
    b = jax.grad(case.objective.value)(case.params, case.batch)
    return matvec, b, np.asarray(jax.jit(lambda mv: curvax.to_dense(mv, case.params))(matvec))


PROBLEMS = [("mlp", "hessian"), ("mlp", "ggn"), ("sigmoid", "fisher"), ("multi_head", "ggn")]
PROBLEMS += [("masked_sequence", "hessian")]
every_problem = pytest.mark.parametrize(("name", "kind"), PROBLEMS)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, matrix, b, damping):
    return solver(
        lambda v: {"w": matrix @ v["w"]}, {"w": b}, damping=damping, tol=1e-12, max_steps=600
    )


def error(x, want):
    return np.abs(oracle.flat(x) - want).max() / np.abs(want).max()


@every_problem
@pytest.mark.parametrize(
    "solver", [curvax.cg, curvax.solve.minres, curvax.solve.neumann], ids=lambda f: f.__name__
)
def test_solves_equal_dense_ones(solver, name, kind, x64):
    _, b, matrix = problem(name, kind)
    b = oracle.flat(b)
    lowest = np.linalg.eigvalsh(matrix)[0]
    # definite for cg and neumann, whose number of terms grows with the condition;
    # as it is for minres
    damping = 1e-2 if solver is curvax.solve.minres else 0.3 - min(lowest, 0)
    x, info = solve(solver, matrix, b, damping)
    want = np.linalg.solve(matrix + damping * np.eye(len(matrix)), b)
    assert info.converged, info.message
    assert error(x, want) < 1e-8 and info.residual < 1e-11
    assert kind != "hessian" or lowest < -1e-3


@pytest.mark.parametrize(("name", "kind"), [p for p in PROBLEMS if p[1] != "hessian"])
def test_a_singular_system_with_a_right_hand_side_in_its_range(name, kind, x64):
    _, b, matrix = problem(name, kind)
    b = oracle.flat(b)
    values = np.linalg.eigvalsh(matrix)
    assert values[0] < 1e-12 * values[-1]
    for solver in (curvax.cg, curvax.solve.minres):
        x, info = solve(solver, matrix, matrix @ b, 0.0)
        assert info.residual < 1e-7 and np.linalg.norm(oracle.flat(x)) <= np.linalg.norm(b) * 1.001


def test_cg_leaves_negative_curvature_by_a_direction_of_descent(x64):
    """At default settings, on an indefinite Hessian: the direction and its flag, no NaN."""
    matvec, b, matrix = problem("mlp", "hessian")
    x, info = jax.jit(curvax.cg)(matvec, b)
    assert info.code == Result.NEGATIVE_CURVATURE and "raise damping" in info.message
    direction = oracle.flat(info.direction)
    assert direction @ matrix @ direction <= 0 and np.isclose(np.linalg.norm(direction), 1)
    assert oracle.flat(x) @ oracle.flat(b) > 0
    # before that direction, x is what cg had found, on which the model is below 0
    model = lambda x: x @ matrix @ x / 2 - oracle.flat(b) @ x
    assert model(oracle.flat(x)) < 0


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_negative_or_no_curvature_in_the_first_step(sign):
    b = {"w": jnp.array([3.0, 4.0])}
    x, info = curvax.cg(lambda v: jax.tree.map(lambda x: sign * x, v), b)
    assert info.code == Result.NEGATIVE_CURVATURE and x["w"].tolist() == [3, 4]
    np.testing.assert_allclose(info.direction["w"], [0.6, 0.8], rtol=1e-6)


def test_preconditioner_guess_and_progress(x64):
    _, b, matrix = problem("mlp", "ggn")
    damping = 1e-3
    want = np.linalg.solve(matrix + damping * np.eye(len(matrix)), oracle.flat(b))
    matvec, b = lambda v: matrix @ v, oracle.flat(b)
    inverse = np.linalg.inv(matrix + 2 * damping * np.eye(len(matrix)))
    for solver in (curvax.cg, curvax.solve.minres):
        run = jax.jit(
            lambda b, x0, solver=solver, **how: solver(
                matvec, b, damping=damping, tol=1e-10, x0=x0, **how
            )
        )
        _, plain = run(b, jnp.zeros_like(b))
        near = jax.jit(
            lambda b, solver=solver: solver(
                matvec, b, damping=damping, tol=1e-10, preconditioner=lambda v: inverse @ v
            )
        )
        x, info = near(b)
        assert error(x, want) < 1e-8 and info.steps <= plain.steps / 2
        x, info = run(b, jnp.asarray(want))
        assert info.steps == 0 and info.converged
        x, info = run(b, 100 * b)
        assert error(x, want) < 1e-7
    _, info = jax.jit(
        lambda b: curvax.cg(matvec, b, damping=1e-6, tol=0.0, max_steps=500, progress=5e-4)
    )(b)
    assert info.code == Result.LITTLE_PROGRESS and 10 < info.steps < 100
    _, info = jax.jit(lambda b: curvax.cg(matvec, b, tol=1e-9, preconditioner=jnp.negative))(b)
    assert info.code == Result.BAD_PRECONDITIONER and "preconditioner" in info.message
    for solver in (curvax.cg, curvax.solve.minres):
        for wrong in (jnp.negative, jnp.zeros_like):
            x, info = solver(matvec, b, preconditioner=wrong)
            assert info.code == Result.BAD_PRECONDITIONER and not x.any()


def test_kronecker_inverse_and_window_precondition(x64):
    case = cases.mlp()
    matvec, b, matrix = problem("mlp", "ggn")
    layout = curvax.kron_layout(case.objective, case.params, case.batch)
    damping = 1e-2

    @jax.jit
    def both(params, batch, matvec, b):
        factors = curvax.kron_factors(
            case.objective, layout, params, batch, jax.random.key(0), fisher="exact"
        )
        window = curvax.solve.window_of(curvax.per_example_grads(case.objective, params, batch))
        inverses = (
            curvax.kron_inverse(layout, factors, damping),
            curvax.solve.window_inverse(window, damping),
        )
        return [
            curvax.cg(matvec, b, damping=damping, tol=1e-12, preconditioner=inverse)[0]
            for inverse in inverses
        ]

    want = np.linalg.solve(matrix + damping * np.eye(len(matrix)), oracle.flat(b))
    for x in both(case.params, case.batch, matvec, b):
        assert error(x, want) < 1e-8


def test_what_is_left_of_the_neumann_series(x64):
    matrix = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    b, scale = jnp.array([1.0, -2.0]), 2.5
    x, info = curvax.solve.neumann(lambda v: matrix @ v, b, scale=scale, tol=0.0, max_steps=7)
    rest = np.linalg.matrix_power(np.eye(2) - matrix / scale, 7) @ b
    np.testing.assert_allclose(b - matrix @ x, rest, rtol=1e-12)
    np.testing.assert_allclose(info.residual, np.linalg.norm(rest) / np.linalg.norm(b), rtol=1e-12)
    assert info.code == Result.MAX_STEPS and info.steps == 7
    x, info = curvax.solve.neumann(lambda v: matrix @ v, b, scale=0.5)
    assert info.code == Result.DIVERGED and "larger scale" in info.message and np.isfinite(x).all()
    _, info = curvax.solve.neumann(lambda v: -v, b)
    assert info.code == Result.DIVERGED
    _, info = curvax.solve.neumann(lambda v: 0 * v, b)
    assert info.code == Result.NOT_DEFINITE
    _, info = curvax.solve.neumann(lambda v: matrix @ v, b, tol=0.0, max_steps=7, power_steps=10)
    assert info.steps == 17
    with pytest.raises(ValueError, match="scale must be positive"):
        curvax.solve.neumann(lambda v: matrix @ v, b, scale=0.0)


def test_woodbury_equals_the_dense_solve(x64):
    case = cases.mlp()
    rows = curvax.per_example_grads(case.objective, case.params, case.batch)
    b = jax.grad(case.objective.value)(case.params, case.batch)
    dense = np.stack([oracle.flat(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(7)])
    for divisor, number in (("window", 9), ("count", 7)):
        x, info = curvax.solve.woodbury(
            curvax.solve.window_of(rows, size=9), b, damping=1e-3, divisor=divisor
        )
        want = np.linalg.solve(
            dense.T @ dense / number + 1e-3 * np.eye(dense.shape[1]), oracle.flat(b)
        )
        assert error(x, want) < 1e-10 and info.converged


@pytest.mark.parametrize(
    "solver", [curvax.cg, curvax.solve.minres, curvax.solve.neumann], ids=lambda f: f.__name__
)
def test_not_finite_stalled_zero_and_too_few_steps(solver):
    diagonal = jnp.array([1.0, 0.5, 0.25])
    x, info = solver(lambda v: diagonal * v * jnp.nan, jnp.ones(3))
    assert info.code == Result.NOT_FINITE and jnp.isfinite(x).all()
    x, info = solver(lambda v: diagonal * v, jnp.array([1.0, jnp.nan, 1.0]))
    assert info.code == Result.NOT_FINITE
    x, info = solver(lambda v: diagonal * v, jnp.zeros(3))
    assert info.converged and x.tolist() == [0, 0, 0] and info.residual == 0
    x, info = solver(lambda v: diagonal * v, jnp.ones(3), max_steps=1)
    assert info.code == Result.MAX_STEPS and "raise max_steps" in info.message
    assert info.steps == (11 if solver is curvax.solve.neumann else 1)


def test_the_residual_is_the_true_one():
    """Float32 and a condition of 1e7: the recurrence says converged long before x is."""
    diagonal = jnp.logspace(-7, 0, 60)
    b = jnp.sin(jnp.arange(60.0))
    x, info = curvax.cg(lambda v: diagonal * v, b, tol=1e-6, max_steps=3000)
    assert info.code == Result.STALLED and not info.converged and "precision" in info.message
    true = np.linalg.norm(
        np.asarray(b, np.float64) - np.asarray(diagonal, np.float64) * np.asarray(x, np.float64)
    )
    np.testing.assert_allclose(info.residual, true / np.linalg.norm(b), rtol=0.1, atol=1e-6)
    same = curvax.solve.minres(
        lambda v: diagonal * v, b, tol=1e-6, max_steps=3000, preconditioner=lambda v: v
    )[1]
    assert not same.converged and same.residual > 1e-6


@pytest.mark.parametrize(
    "solver", [curvax.cg, curvax.solve.minres, curvax.solve.neumann], ids=lambda f: f.__name__
)
def test_scales_of_matrix_and_right_hand_side_do_not_matter(solver):
    diagonal, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 3.0])
    for s, t in ((1e-4, 1e3), (1e6, 1e-6), (1.0, 1e12)):
        x, info = solver(lambda v, s=s: s * diagonal * v, t * b)
        assert info.converged, info.message
        np.testing.assert_allclose(x, t / s * b / diagonal, rtol=1e-4)


def test_minres_ends_near_the_least_residual_where_there_is_no_solution(x64):
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    values = np.where(np.arange(20) < 5, 0, rng.normal(size=20))
    matrix, b = jnp.asarray(Q * values @ Q.T), jnp.asarray(rng.normal(size=20))
    x, info = curvax.solve.minres(lambda v: matrix @ v, b, max_steps=200)
    assert info.code == Result.LEAST_SQUARES and "outside the range" in info.message
    least = np.linalg.norm(Q[:, :5].T @ b) / np.linalg.norm(b)
    np.testing.assert_allclose(info.residual, least, rtol=1e-6)
    assert np.linalg.norm(x) < 100 * np.linalg.norm(np.linalg.pinv(matrix, rcond=1e-10) @ b)


def test_bfloat16_vmap_and_eight_devices():
    diagonal = jnp.linspace(1.0, 3.0, 16)
    b = jnp.cos(jnp.arange(16.0))
    x, info = curvax.cg(lambda v: (diagonal * v).astype(v.dtype), b.astype(jnp.bfloat16), tol=1e-2)
    assert x.dtype == jnp.bfloat16 and info.residual.dtype == jnp.float32 and info.converged
    scales = jnp.array([1.0, 10.0, -1.0])
    many, infos = jax.vmap(lambda s: curvax.cg(lambda v: s * diagonal * v, b))(scales)
    np.testing.assert_allclose(many[1], b / diagonal / 10, rtol=1e-4)
    assert infos.code.tolist() == [Result.CONVERGED, Result.CONVERGED, Result.NEGATIVE_CURVATURE]
    assert len(set(infos.steps.tolist())) > 1
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.device_put(b, NamedSharding(mesh, P("data")))
    for solver in (curvax.cg, curvax.solve.minres):
        apart, _ = jax.jit(lambda b, solver=solver: solver(lambda v: diagonal * v, b))(sharded)
        np.testing.assert_allclose(apart, b / diagonal, rtol=1e-4)
        assert apart.sharding.is_equivalent_to(sharded.sharding, 1)


def test_errors():
    b = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"matvec\(v\) has no leaf at \['w'\]"):
        curvax.cg(lambda v: {}, b)
    with pytest.raises(
        ValueError, match=r"matvec\(v\)\['w'\] is float32\[2\], v\['w'\] is float32\[3\]"
    ):
        curvax.solve.minres(lambda v: {"w": v["w"][:2]}, b)
    with pytest.raises(
        TypeError, match=r"matvec\(v\)\['w'\] is float16\[3\] where v is float32\[3\].*Cast"
    ):
        curvax.solve.neumann(lambda v: {"w": v["w"].astype(jnp.float16)}, b)
    with pytest.raises(ValueError, match=r"preconditioner\(v\) has no leaf"):
        curvax.cg(lambda v: v, b, preconditioner=lambda v: {})
    with pytest.raises(ValueError, match="x0 has no leaf"):
        curvax.cg(lambda v: v, b, x0={})
    for wrong in ({"damping": -1.0}, {"tol": -1.0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            curvax.cg(lambda v: v, b, **wrong)
    with pytest.raises(TypeError, match="float arrays"):
        curvax.cg(lambda v: v, jnp.arange(3))


def test_symmetry_is_checked_on_request(x64):
    matvec, b, _ = problem("mlp", "hessian")
    curvax.solve.check_symmetric(matvec, b, jax.random.key(0))
    skewed = lambda v: {**v, "Dense_0": jax.tree.map(lambda x: jnp.roll(x, 1), v["Dense_0"])}
    with pytest.raises(ValueError, match="the matrix is not symmetric"):
        curvax.solve.check_symmetric(skewed, b, jax.random.key(0))
    with pytest.raises(ValueError, match="not finite"):
        curvax.solve.check_symmetric(lambda v: v * jnp.nan, jnp.ones(2), jax.random.key(0))


def test_lineax_takes_our_products_and_we_take_its_operators(x64):
    lineax = pytest.importorskip("lineax")
    matvec, b, matrix = problem("mlp", "ggn")
    shifted = lambda v: jax.tree.map(lambda x, y: x + 0.1 * y, matvec(v), v)
    operator = curvax.solve.to_lineax(shifted, b, positive_semidefinite=True)
    theirs = lineax.linear_solve(operator, b, lineax.CG(1e-12, 1e-12, max_steps=500)).value
    want = np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), oracle.flat(b))
    assert error(theirs, want) < 1e-8
    ours, _ = curvax.cg(curvax.solve.from_lineax(operator), b, tol=1e-12)
    assert error(ours, want) < 1e-8
    with pytest.raises(ValueError, match="not tagged as symmetric"):
        curvax.solve.from_lineax(lineax.MatrixLinearOperator(jnp.ones((2, 2))))


def test_products_over_batches_on_the_host(x64):
    """A data set in batches, the last one ragged: the same solution as that of the whole,
    by loops in Python.
    """
    case = cases.masked_sequence()
    batches = [jax.tree.map(lambda x, i=i: x[i : i + 2], case.batch) for i in (0, 2, 4)]
    matvec = curvax.products.streamed(curvax.ggnvp, case.objective, case.params, batches)
    whole = curvax.ggnvp(case.objective, case.params, case.batch)
    b = jax.grad(case.objective.value)(case.params, case.batch)
    for solver in (curvax.cg, curvax.solve.minres, curvax.solve.neumann):
        got, info = solver(matvec, b, damping=1.0, tol=1e-4)
        want, expected = jax.jit(lambda mv, b, solver=solver: solver(mv, b, damping=1.0, tol=1e-4))(
            whole, b
        )
        np.testing.assert_allclose(oracle.flat(got), oracle.flat(want), rtol=1e-8, atol=1e-12)
        assert info.steps == expected.steps and info.converged
