"""Hypergradients against closed forms, finite differences of solved problems,
and unrolled training.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.apps._hypergradient import implicit_gradient
from curvax.solve import Result, SolveInfo

pytestmark = pytest.mark.usefixtures("x64")

exact = functools.partial(curvax.cg, tol=1e-13)
SOLVERS = {
    "cg": exact,
    "minres": functools.partial(curvax.solve.minres, tol=1e-13),
    "neumann": functools.partial(curvax.solve.neumann, tol=1e-12, max_steps=2000),
}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    with jax.ensure_compile_time_eval():  # kept for all tests, also where the first is being traced
        return draw(12, 5), draw(12), draw(7, 5), draw(7)


def tree(w):
    return {"a": w[:2], "b": (w[2:],)}


def flat(tree):
    return ravel_pytree(tree)[0]


# Ridge regression: inner is |X w - y|^2 / 2n + sum_i exp(h_i) w_i^2 / 2


def inner(params, hyper):
    X, y, _, _ = data()
    w = flat(params)
    penalty = (
        jnp.broadcast_to(hyper["log_penalty"], w.shape)
        if hyper["log_penalty"].ndim == 0
        else hyper["log_penalty"]
    )
    return jnp.mean((X @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(penalty) * w**2) / 2


def outer(params, hyper):
    _, _, X, y = data()
    return jnp.mean((X @ flat(params) - y) ** 2) / 2 + 0.1 * jnp.sum(hyper["log_penalty"] ** 2)


def hessian(h):
    X = np.asarray(data()[0])
    return X.T @ X / 12 + np.diag(np.broadcast_to(np.exp(h), 5))


def solved(h):
    X, y, _, _ = map(np.asarray, data())
    return np.linalg.solve(hessian(h), X.T @ y / 12)


def validation_gradient(w):
    _, _, X, y = map(np.asarray, data())
    return X.T @ (X @ w - y) / 7


def closed_form(h, w, x):
    """With x in place of `H^-1 v`."""
    each = -np.broadcast_to(np.exp(h), 5) * w * x
    return 0.2 * h + (each if np.ndim(h) else each.sum())


PENALTIES = {"scalar": np.asarray(-1.0), "by parameter": np.array([-2.0, -1.0, 0.0, 0.3, -0.5])}


@functools.partial(jax.jit, static_argnums=0)
def ridge(solver, w, h, damping=0.0):
    return implicit_gradient(
        outer, inner, tree(w), {"log_penalty": h}, solver=solver, damping=damping
    )


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("h", PENALTIES.values(), ids=PENALTIES)
def test_ridge_regression_in_closed_form(name, h):
    w = solved(h)
    gradient, info = ridge(SOLVERS[name], w, h)
    x = np.linalg.solve(hessian(h), validation_gradient(w))
    np.testing.assert_allclose(gradient["log_penalty"], closed_form(h, w, x), rtol=1e-8)
    assert info.converged, info.message


@pytest.mark.parametrize("terms", [1, 4])
def test_a_truncated_series_is_that_many_steps_of_gradient_descent(terms):
    h, alpha = PENALTIES["by parameter"], 0.3
    w = solved(h)
    solver = functools.partial(curvax.solve.neumann, scale=1 / alpha, max_steps=terms, tol=0)
    gradient, info = ridge(solver, w, h)
    H, v = hessian(h), validation_gradient(w)
    left = np.linalg.matrix_power(np.eye(5) - alpha * H, terms) @ np.linalg.solve(H, v)
    np.testing.assert_allclose(
        gradient["log_penalty"], closed_form(h, w, np.linalg.solve(H, v) - left), rtol=1e-12
    )
    assert info.steps == terms and info.code == Result.MAX_STEPS

    @jax.jit
    @jax.grad
    def unrolled(hyper):
        params = tree(jnp.asarray(w))
        for _ in range(terms):
            params = jax.tree.map(
                lambda p, g: p - alpha * g, params, jax.grad(inner)(params, hyper)
            )
        return outer(tree(jnp.asarray(w)), hyper) + outer(params, {"log_penalty": jnp.zeros(5)})

    np.testing.assert_allclose(
        gradient["log_penalty"],
        unrolled({"log_penalty": jnp.asarray(h)})["log_penalty"],
        rtol=1e-12,
    )


def test_damping_is_added_to_the_hessian_and_a_singular_one_needs_it():
    h = np.array([-1.0, -1.0, -1.0, -np.inf, -np.inf])  # two of the parameters are not penalized,
    X = np.asarray(data()[0]).copy()
    X[:, 4] = X[:, 3]  # and enter as their sum
    H = X.T @ X / 12 + np.diag(np.exp(h))
    w = np.linalg.pinv(H) @ (X.T @ np.asarray(data()[1]) / 12)

    def singular(params, hyper):
        loss = jnp.mean((X @ flat(params) - data()[1]) ** 2) / 2
        return loss + jnp.exp(hyper["log_penalty"]) * jnp.sum(flat(params)[:3] ** 2) / 2

    @functools.partial(jax.jit, static_argnums=0)
    def compute(damping):
        hyper = {"log_penalty": jnp.asarray(-1.0)}
        return implicit_gradient(
            outer, singular, tree(jnp.asarray(w)), hyper, solver=exact, damping=damping
        )

    gradient, info = compute(0.2)
    x = np.linalg.solve(H + 0.2 * np.eye(5), validation_gradient(w))
    want = -0.2 - np.exp(-1.0) * (w * x)[:3].sum()
    np.testing.assert_allclose(gradient["log_penalty"], want, rtol=1e-8)
    assert info.converged
    _, info = compute(0.0)
    assert info.code == Result.NEGATIVE_CURVATURE


# A classifier with weighted examples: neither loss is quadratic, hyperparameters enter both.


def classifier(params, hyper):
    X, y, _, _ = data()
    each = jax.nn.softplus(
        -jnp.sign(y) * jnp.tanh(X[:, :2] @ params["a"] + X[:, 2:] @ params["b"][0])
    )
    return jnp.mean(jax.nn.softmax(hyper["weights"]) * each) + jnp.exp(
        hyper["log_penalty"]
    ) * jnp.sum(flat(params) ** 2)


def validation(params, hyper):
    _, _, X, y = data()
    return jnp.mean(jax.nn.softplus(-jnp.sign(y) * (X @ flat(params)))) * jnp.exp(
        0.3 * hyper["log_penalty"]
    )


@jax.jit
def minimize(hyper, tilt, start):
    """Newton's method on `classifier - tilt . params`."""
    loss = lambda w: classifier(tree(w), hyper) - tilt @ w
    step = lambda w, _: (w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w)), None)
    return jax.lax.scan(step, start, length=12)[0]


@jax.jit
def of_classifier(params, hyper):
    return implicit_gradient(validation, classifier, params, hyper, solver=exact)


def differences(fun, at, width=1e-3):
    """Central differences of fourth order, entry by entry."""
    along = lambda e: (
        (8 * (fun(at + e) - fun(at - e)) - (fun(at + 2 * e) - fun(at - 2 * e))) / (12 * width)
    )
    return np.stack([along(e) for e in width * np.eye(at.size)])


HYPER = {"log_penalty": jnp.asarray(-3.0), "weights": jnp.linspace(-1.0, 1.0, 12)}


@pytest.mark.parametrize("tilt", [0.0, 0.02])
def test_finite_differences_of_the_solved_problem(tilt):
    """Without a tilt, params are at the minimum of inner;
    with one, at that of `inner - g . params`.
    """
    hyper, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float64), HYPER))
    tilts = tilt * jnp.arange(1.0, 6)
    w = minimize(unravel(hyper), tilts, jnp.zeros(5))
    np.testing.assert_allclose(
        flat(jax.jit(jax.grad(classifier))(tree(w), unravel(hyper))), tilts, atol=1e-14
    )
    loss = jax.jit(lambda h: validation(tree(minimize(unravel(h), tilts, w)), unravel(h)))
    gradient, info = of_classifier(tree(w), unravel(hyper))
    np.testing.assert_allclose(flat(gradient), differences(loss, hyper), rtol=1e-7, atol=1e-11)
    assert info.converged


def test_other_matrices_solvers_and_inverses():
    h = PENALTIES["by parameter"]
    w, H = solved(h), hessian(h)
    x = np.linalg.solve(H, validation_gradient(w))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def compute(solver, damping, matvec):
        return implicit_gradient(
            outer,
            inner,
            tree(jnp.asarray(w)),
            {"log_penalty": h},
            solver=solver,
            damping=damping,
            matvec=matvec,
        )

    doubled = jax.tree_util.Partial(lambda H, v: tree(2 * H @ flat(v)), jnp.asarray(H))
    direct, _ = compute(curvax.solve.direct, 0.5, curvax.solve.Dense(jnp.asarray(H)))
    twice, _ = compute(exact, 0.0, doubled)
    own, info = compute(
        lambda matvec, b, *, damping: (tree(jnp.linalg.inv(H) @ flat(b)), None), 0.0, None
    )
    damped = np.linalg.solve(H + 0.5 * np.eye(5), validation_gradient(w))
    for got, want in ((direct, damped), (twice, x / 2), (own, x)):
        np.testing.assert_allclose(got["log_penalty"], closed_form(h, w, want), rtol=1e-8)
    assert info is None


def test_what_the_solver_tells_comes_back():
    h = PENALTIES["scalar"]
    w = jnp.asarray(solved(h))
    _, info = ridge(functools.partial(curvax.cg, max_steps=2, tol=1e-10), w, h)
    assert info.code == Result.MAX_STEPS and not info.converged and info.residual > 1e-10
    _, info = ridge(functools.partial(curvax.solve.neumann, scale=0.1), w, h)
    assert info.code == Result.DIVERGED
    concave = lambda p, h: -inner(p, h)
    _, info = jax.jit(lambda w: implicit_gradient(outer, concave, tree(w), {"log_penalty": h}))(w)
    assert isinstance(info, SolveInfo) and info.code == Result.NEGATIVE_CURVATURE


def test_an_outer_loss_of_hyper_alone_needs_no_solve():
    alone = lambda p, h: jnp.sum(h**2)
    gradient, info = implicit_gradient(
        alone, lambda p, h: jnp.sum((p - h) ** 2), jnp.ones(2), jnp.array([1.0, 2.0])
    )
    np.testing.assert_array_equal(gradient, [2.0, 4.0])
    assert info.converged and info.steps == 0


def test_vmap_over_hyper_equals_one_by_one():
    many = jnp.stack([PENALTIES["by parameter"], np.zeros(5), -3 * np.ones(5)])
    w = np.stack([solved(h) for h in np.asarray(many)])
    together, info = jax.jit(jax.vmap(functools.partial(ridge, exact)))(w, many)
    for i in range(3):
        np.testing.assert_allclose(
            together["log_penalty"][i], ridge(exact, w[i], many[i])[0]["log_penalty"], rtol=1e-10
        )
    assert info.converged.shape == (3,) and info.converged.all()


def test_params_and_hyper_in_bfloat16():
    h = jnp.asarray(PENALTIES["by parameter"], jnp.bfloat16)
    exactly = np.asarray(h, np.float64)
    w = solved(exactly)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(jnp.asarray(w)))
    gradient, info = jax.jit(lambda p, h: implicit_gradient(outer, inner, p, {"log_penalty": h}))(
        params, h
    )
    want = closed_form(exactly, w, np.linalg.solve(hessian(exactly), validation_gradient(w)))
    assert gradient["log_penalty"].dtype == jnp.bfloat16
    assert info.residual < jnp.finfo(jnp.bfloat16).eps  # of b's own rounding
    assert np.linalg.norm(
        gradient["log_penalty"].astype(jnp.float64) - want
    ) < 0.02 * np.linalg.norm(want)


def test_hyper_may_be_a_python_float():
    loss, held_out = (lambda p, h, f=f: f(p, {"log_penalty": h}) for f in (inner, outer))
    gradient, _ = implicit_gradient(
        held_out, loss, tree(jnp.asarray(solved(-1.0))), -1.0, solver=exact
    )
    want, _ = ridge(exact, solved(-1.0), PENALTIES["scalar"])
    np.testing.assert_allclose(gradient, want["log_penalty"], rtol=1e-10)


def test_errors_say_what_and_where():
    w, h = tree(jnp.ones(5)), {"log_penalty": jnp.zeros([])}
    with pytest.raises(
        TypeError,
        match=r"hyper must hold float arrays: got int64\[\] at hyper\['size'\]\. Close over",
    ):
        implicit_gradient(outer, inner, w, {**h, "size": 3})
    with pytest.raises(
        TypeError, match=r"params must hold float arrays: got int\d+\[2\] at params\['a'\]"
    ):
        implicit_gradient(outer, inner, {**w, "a": jnp.arange(2)}, h)
    with pytest.raises(TypeError, match=r"outer must return a real scalar, got float64\[5\]"):
        implicit_gradient(lambda p, h: flat(p), inner, w, h)
    with pytest.raises(TypeError, match=r"inner must return a real scalar, got float64\[5\]"):
        implicit_gradient(outer, lambda p, h: flat(p), w, h)
    with pytest.raises(
        TypeError,
        match=r"solver must be a function \(matvec, b, \*, damping\) -> \(x, info\).*got 'cg'",
    ):
        implicit_gradient(outer, inner, w, h, solver="cg")
    with pytest.raises(ValueError, match="damping must be positive, got -1"):
        implicit_gradient(outer, inner, w, h, damping=-1)
