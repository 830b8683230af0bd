"""Methods that solve in every step: against dense steps in float64, at saddles,
and in optax's wrappers.
"""

import functools
import itertools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.solve import Dense, Result

DAMPING = 2.0**-6


@functools.cache
def problem(name):
    """A case, its gradient, and the dense matrices."""
    case = cases.CASES[name]()
    gradient = jax.jit(jax.grad(case.objective.value))(case.params, case.batch)
    return (
        case,
        gradient,
        {"hvp": np.asarray(oracle.hessian(case)), "ggnvp": np.asarray(oracle.ggn(case))},
    )


def stepping(tx, case):
    def step(params, state, batch):
        updates, state = tx.update(
            jax.grad(case.objective.value)(params, batch), state, params, batch=batch
        )
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def first_step(tx, case):
    params, state = stepping(tx, case)(case.params, tx.init(case.params), case.batch)
    return oracle.flat(optax.tree.sub(params, case.params)), state


def damped_step(matrix, gradient, damping=DAMPING, absolute=False):
    values, vectors = np.linalg.eigh(matrix)
    values = np.abs(values) if absolute else values
    return -vectors @ (vectors.T @ oracle.flat(gradient) / (values + damping))


METHODS = {
    "gauss_newton": (lambda o: curvax.gauss_newton(1.0, o, DAMPING, 1e-12, 400), "ggnvp", False),
    "egn": (lambda o: curvax.egn(1.0, o, DAMPING), "ggnvp", False),
    "saddle_free_newton": (
        lambda o: curvax.saddle_free_newton(1.0, o, DAMPING, 10**6),
        "hvp",
        True,
    ),
    "lazy_newton": (lambda o: curvax.lazy_newton(1.0, o, DAMPING), "hvp", True),
    "lazy_gauss_newton": (
        lambda o: curvax.lazy_newton(1.0, o, DAMPING, matvec_of=curvax.ggnvp),
        "ggnvp",
        False,
    ),
}


COVERED = [(name, "mlp") for name in METHODS] + [
    ("gauss_newton", "multi_head"),
    ("egn", "multi_head"),
]
COVERED += [
    ("egn", "shared_statistics"),
    ("egn", "sigmoid"),
    ("saddle_free_newton", "shared_statistics"),
]


@pytest.mark.parametrize(("name", "of"), COVERED)
def test_step_equals_the_dense_one(name, of, x64):
    """Softmax, several heads, squared error with aux, sigmoid;
    singular Gauss-Newton matrices and indefinite Hessians.
    """
    case, gradient, matrices = problem(of)
    build, product, absolute = METHODS[name]
    got, state = first_step(build(case.objective), case)
    want = damped_step(matrices[product], gradient, absolute=absolute)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8 * np.abs(want).max())
    if name in ("gauss_newton", "egn"):
        info = optax.tree.get(state, "info")
        assert info.code == Result.CONVERGED and info.residual < 1e-10 and info.damping == DAMPING


def test_newton_cg_solves_where_it_can_and_goes_down_where_it_cannot(x64):
    case, gradient, matrices = problem("mlp")
    lowest = np.linalg.eigvalsh(matrices["hvp"])[0]
    got, _ = first_step(
        curvax.newton_cg(1.0, case.objective, float(1e-2 - lowest), 1e-12, 400), case
    )
    np.testing.assert_allclose(
        got, damped_step(matrices["hvp"], gradient, 1e-2 - lowest), rtol=1e-8, atol=1e-8
    )
    got, state = first_step(curvax.newton_cg(1.0, case.objective), case)  # at default settings
    assert optax.tree.get(state, "info").code == Result.NEGATIVE_CURVATURE
    assert np.isfinite(got).all() and got @ oracle.flat(gradient) < 0


def saddle():
    loss = curvax.losses.from_function(lambda f, y: jnp.mean(f[:, 0] ** 2 - f[:, 1] ** 2) / 2)
    objective = curvax.Objective(lambda w, x: x * w, loss)
    return cases.Case(objective, jnp.array([1.0, 1e-3]), (jnp.ones((1, 2)), jnp.zeros(1)))


@pytest.mark.parametrize(
    "build", [curvax.saddle_free_newton, curvax.lazy_newton], ids=lambda f: f.__name__
)
def test_saddle_free_methods_escape(build, x64):
    """`(x^2 - y^2) / 2` from (1, 1e-3), damping 1e-3:
    x goes to 0, y about doubles, to 4.1 after 12 steps.
    """
    case = saddle()
    tx = build(1.0, case.objective, damping=1e-3)
    params, state, step = case.params, tx.init(case.params), stepping(tx, case)
    for _ in range(12):
        params, state = step(params, state, case.batch)
    assert abs(params[0]) < 1e-12 and round(params[1].item(), 1) == 4.1


def test_lazy_newton_keeps_the_matrix_and_takes_fresh_gradients(x64):
    case, _, _ = problem("mlp")
    tx = curvax.lazy_newton(0.5, case.objective, DAMPING, curvature_every=3)
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    held = np.asarray(oracle.hessian(case))
    for count in range(4):
        gradient = jax.grad(case.objective.value)(params, case.batch)
        if count == 3:
            held = np.asarray(oracle.hessian(case._replace(params=params)))
        before = params
        params, state = step(params, state, case.batch)
        got = oracle.flat(optax.tree.sub(params, before))
        np.testing.assert_allclose(
            got, 0.5 * damped_step(held, gradient, absolute=True), rtol=1e-7, atol=1e-9
        )
    assert optax.tree.get(state, "num_refreshes") == 2


def test_levenberg_marquardt_rejects_and_leaves_all_as_it_was():
    """A loss on which the full step overshoots: all stays bitwise,
    damping grows until a step is taken.
    """
    case = bowl()
    objective = case.objective
    for inner in (
        curvax.newton_cg(1.0, objective),
        curvax.lazy_newton(1.0, objective, curvature_every=2),
    ):
        tx = curvax.levenberg_marquardt(
            inner, objective, damping=1e-4, every=1, factor=0.1, matvec_of=curvax.hvp
        )
        step, params, state = stepping(tx, case), case.params, tx.init(case.params)
        losses, rejected = [objective(params, case.batch)], 0
        for _ in range(12):
            new, after = step(params, state, case.batch)
            if not after.info.accepted:
                rejected += 1
                chex.assert_trees_all_equal((new, after.inner_state), (params, state.inner_state))
                assert after.damping > state.damping
            params, state = new, after
            losses.append(objective(params, case.batch))
        assert rejected >= 1 and all(a >= b for a, b in itertools.pairwise(losses))
        assert losses[-1] < 1 + 1e-5


def penalized():
    """Regularized logistic regression: the penalty is a second head whose outputs are
    the parameters.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 20)), rng.integers(0, 2, (200, 1))
    penalty = curvax.losses.from_function(lambda f, _: jnp.mean(jnp.sum(f**2, axis=-1)) / 2)
    heads = curvax.losses.weighted_sum(
        {"fit": (1.0, curvax.losses.sigmoid_cross_entropy()), "penalty": (1e-3, penalty)}
    )
    model = lambda w, x: {"fit": (x @ w)[:, None], "penalty": jnp.broadcast_to(w, (len(x), w.size))}
    batch = (x, {"fit": y, "penalty": jnp.zeros(len(x))})
    return cases.Case(curvax.Objective(model, heads), 5 * jnp.ones(20), batch)


@pytest.mark.parametrize("every", [1, 3])
def test_gradient_regularized_newton_goes_down_to_1e_10_within_its_radius(every, x64):
    case = penalized()
    tx = curvax.gradient_regularized_newton(case.objective, curvature_every=every)
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    values, norms = [], []
    for _ in range(40):
        value, gradient = jax.value_and_grad(case.objective)(params, case.batch)
        values.append(value.item())
        norms.append(jnp.linalg.norm(gradient).item())
        if norms[-1] < 1e-10:
            break
        new, after = step(params, state, case.batch)
        radius = optax.tree.get(after, "gamma") / 2
        assert jnp.linalg.norm(new - params) <= radius * (1 + 1e-12)
        params, state = new, after
    assert norms[-1] < 1e-10 and len(norms) < (20, 40)[every > 1], norms
    assert all(b <= a + 1e-14 for a, b in itertools.pairwise(values))


def bowl():
    """`sqrt(1 + w^2)` from 3, where Newton's step overshoots."""
    loss = curvax.losses.from_function(lambda f, y: jnp.mean(jnp.sqrt(1 + f**2)))
    return cases.Case(
        curvax.Objective(lambda w, x: x @ w, loss),
        jnp.array([[3.0]]),
        (jnp.ones((2, 1)), jnp.zeros(2)),
    )


def test_gradient_regularized_newton_rejects_what_it_cannot_lower():
    """Too large a radius for the trials of one update:
    nothing moves but gamma, and the fresh Hessian is kept.
    """
    case = bowl()
    tx = curvax.gradient_regularized_newton(
        case.objective, gamma=1e4, max_trials=2, curvature_every=20
    )
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    rejected = 0
    for _ in range(12):
        before, gamma = params, optax.tree.get(state, "gamma")
        params, state = step(params, state, case.batch)
        if optax.tree.get(state, "accepted"):
            break
        rejected += 1
        assert params == before and optax.tree.get(state, "gamma") == gamma / 4
        assert optax.tree.get(state, "curvature").values > 0
    assert 2 <= rejected < 12 and case.objective(params, case.batch) < case.objective(
        before, case.batch
    )


def test_gradient_regularized_newton_goes_on_after_a_minimum():
    """At a minimum there is nothing to search for: the radius stays, and new data are learned."""
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    case = cases.Case(objective, jnp.ones((2, 1)), (jnp.eye(2), jnp.zeros((2, 1))))
    tx = curvax.gradient_regularized_newton(objective)
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    for _ in range(60):
        params, state = step(params, state, case.batch)
    assert optax.tree.get(state, "gamma") > 0.1
    for _ in range(10):
        params, state = step(params, state, (jnp.eye(2), jnp.ones((2, 1))))
    np.testing.assert_allclose(params, 1, atol=1e-3)


def test_gradient_regularized_newton_grows_its_radius_where_rounding_hides_the_gain():
    """From a radius of 1e-3 to a minimum at distance 3; the loss is 1e4 times its gain higher."""
    loss = curvax.losses.from_function(lambda f, y: 1e4 + jnp.mean(jnp.sqrt(1 + f**2) - 1))
    case = bowl()._replace(objective=curvax.Objective(lambda w, x: x @ w, loss))
    tx = curvax.gradient_regularized_newton(case.objective, gamma=1e-3)
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    for _ in range(30):
        params, state = step(params, state, case.batch)
    assert abs(params.item()) < 1e-5
    # At the minimum it stops, and does not leave the floats.
    for _ in range(200):
        params, state = step(params, state, case.batch)
    assert abs(params.item()) < 1e-5 and 0.1 < optax.tree.get(state, "gamma") < 1e4


def secular_step(matrix, gradient, M):
    """The minimum of `g's + s'H s / 2 + M / 6 |s|^3` by bisection, in NumPy."""
    values, vectors = np.linalg.eigh(matrix)
    c = vectors.T @ gradient
    low, high = max(0, -2 * values[0] / M) * (1 + 1e-15), 1e6
    for _ in range(200):
        r = (low + high) / 2
        is_long = np.linalg.norm(c / (values + M * r / 2)) > r
        low, high = (r, high) if is_long else (low, r)
    return -vectors @ (c / (values + M * r / 2))


def valley(x, y):
    """A curved valley, in which the Hessian is indefinite above the parabola."""
    return (1 - x) ** 2 + 5 * (y - x**2) ** 2


def derivatives_of_valley(x, y):
    u = y - x**2
    gradient = np.array([-2 * (1 - x) - 20 * x * u, 10 * u])
    return gradient, np.array([[2 - 20 * u + 40 * x**2, -20 * x], [-20 * x, 10]])


def test_cubic_newton_equals_the_literal_method(x64):
    """Fresh Hessians, m = 1: cubic Newton, with M doubled on failure and halved on success."""
    loss = curvax.losses.from_function(lambda f, _: valley(f[0, 0], f[0, 1]))
    objective = curvax.Objective(lambda w, x: x * w, loss)
    case = cases.Case(objective, jnp.array([0.1, 1.0]), (jnp.ones((1, 2)), jnp.zeros(1)))
    tx = curvax.cubic_newton(objective, regularization=0.02)
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    M, x, doubled, indefinite = 0.02, np.array([0.1, 1.0]), 0, 0
    for _ in range(6):
        g, H = derivatives_of_valley(*x)
        indefinite += np.linalg.eigvalsh(H)[0] < -1e-3
        while True:
            s = secular_step(H, g, M)
            model = g @ s + s @ H @ s / 2 + M / 6 * np.linalg.norm(s) ** 3
            if valley(*(x + s)) - valley(*x) <= 0.1 * model:
                break
            M, doubled = 2 * M, doubled + 1
        x, M = x + s, M / 2
        params, state = step(params, state, case.batch)
        np.testing.assert_allclose(params, x, rtol=1e-10)
        np.testing.assert_allclose(optax.tree.get(state, "regularization"), M)
    assert doubled > 0 and indefinite > 0 and valley(*x) < 0.1


def test_cubic_newton_keeps_the_matrix_and_goes_down_to_1e_10(x64):
    """Lazy Hessians: the same matrix for three steps, with fresh gradients; losses never rise."""
    case = penalized()
    tx = curvax.cubic_newton(case.objective, curvature_every=3)
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    value_and_grad = jax.jit(jax.value_and_grad(case.objective.value))
    held, values, norms = [], [], []
    for _ in range(40):
        value, gradient = value_and_grad(params, case.batch)
        values.append(value.item())
        norms.append(jnp.linalg.norm(gradient).item())
        if norms[-1] < 1e-10:
            break
        params, state = step(params, state, case.batch)
        held.append(optax.tree.get(state, "curvature").values)
    assert norms[-1] < 1e-10 and 5 < len(norms) < 40, norms
    changes = [bool((a != b).any()) for a, b in itertools.pairwise(held[:7])]
    assert changes == [False, False, True, False, False, True]
    assert all(b <= a + 1e-14 for a, b in itertools.pairwise(values))


def quartic_saddle(scale=1.0, constant=0.0):
    """`x^2 / 2 - y^2 / 2 + y^4 / 4` at its saddle, where the gradient is zero."""
    fun = lambda x, y: scale * jnp.mean(x**2 - y**2 + y**4 / 2) / 2 + constant
    loss = curvax.losses.from_function(lambda f, _: fun(f[:, 0], f[:, 1]))
    objective = curvax.Objective(lambda w, x: x * w, loss)
    return cases.Case(objective, jnp.zeros(2), (jnp.ones((1, 2)), jnp.zeros(1)))


def test_cubic_newton_leaves_a_saddle_without_a_gradient():
    """In float32, also where a step of the first length gains less than the loss can show; and the
    next minimum is no reason to lengthen steps for ever.
    """

    @jax.jit
    def train(scale, constant):
        case = quartic_saddle(scale, constant)
        tx = curvax.cubic_newton(case.objective)
        step = lambda carry, _: (stepping(tx, case)(*carry, case.batch), None)
        (params, state), _ = jax.lax.scan(step, (case.params, tx.init(case.params)), length=60)
        return params, optax.tree.get(state, "regularization")

    for scale, constant in ((1.0, 0.0), (1e-3, 1.0)):
        params, regularization = train(scale, constant)
        np.testing.assert_allclose(jnp.abs(params), [0, 1], atol=0.02)
        assert 1e-8 < regularization < 1e4


def test_cubic_newton_rejects_what_it_cannot_lower():
    """One trial an update, of too long a step: nothing moves but M, until it is large enough."""
    case = bowl()
    tx = curvax.cubic_newton(case.objective, regularization=1e-4, max_trials=1, curvature_every=50)
    step, params, state = stepping(tx, case), case.params, tx.init(case.params)
    rejected = 0
    for _ in range(40):
        before, M = params, state.inner_state.regularization
        params, state = step(params, state, case.batch)
        if state.inner_state.info.accepted:
            break
        rejected += 1
        assert params == before and state.inner_state.regularization == 2 * M
        assert state.inner_state.info.num_rejected == rejected and state.inner_state.count == 0
    assert 2 <= rejected < 39
    assert case.objective(params, case.batch) < case.objective(before, case.batch)


def krylov_minimum(matrix, gradient, order):
    """The minimum of the quadratic model over `span{g, H g, ..., H^order g}`, in NumPy."""
    basis = [gradient]
    for _ in range(order):
        product = matrix @ basis[-1]
        basis.append(product / np.linalg.norm(product))
    Q = np.linalg.qr(np.stack(basis, axis=1))[0]
    return -Q @ np.linalg.solve(Q.T @ matrix @ Q, Q.T @ gradient)


@pytest.mark.parametrize("order", [2, 4])
def test_krylov_descent_minimizes_the_model_in_the_krylov_space(order, x64):
    """Of a quadratic loss of five parameters; of order 4, in one step to the minimum."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 1))
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    case = cases.Case(objective, jnp.zeros((5, 1)), (jnp.asarray(x), jnp.asarray(y)))
    params, state = stepping(tx := curvax.krylov_descent(objective, order), case)(
        case.params, tx.init(case.params), case.batch
    )
    want = krylov_minimum(x.T @ x / 9, (-x.T @ y / 9)[:, 0], order)
    np.testing.assert_allclose(params[:, 0], want, rtol=1e-10)
    info = optax.tree.get(state, "info")
    assert info.trials == 1 and info.accepted and info.shift == 0
    if order == 4:
        assert jnp.linalg.norm(jax.grad(objective)(params, case.batch)) < 1e-12
        # Beyond the dimension there is nothing, and a space that g does not fill ends early.
        eigenvector = np.linalg.eigh(x.T @ x)[1][:, 2:3]
        small = case._replace(params=params + eigenvector)
        tx = curvax.krylov_descent(objective, order=10)
        back, state = stepping(tx, small)(small.params, tx.init(small.params), case.batch)
        np.testing.assert_allclose(back, params, rtol=1e-10)
        assert optax.tree.get(state, "info").trials == 1


def test_krylov_descent_decides_negative_curvature_and_goes_down(x64):
    """Indefinite Hessians of a network: the minimum of the cubic model in the space; a saddle."""
    case, gradient, matrices = problem("mlp")
    H, g = matrices["hvp"], oracle.flat(gradient)
    order = 3
    got, state = first_step(curvax.krylov_descent(case.objective, order), case)
    info = optax.tree.get(state, "info")
    Q = np.linalg.qr(np.stack([np.linalg.matrix_power(H, k) @ g for k in range(order + 1)], 1))[0]
    T = Q.T @ H @ Q
    ritz = np.linalg.eigvalsh(T)
    np.testing.assert_allclose([info.smallest, info.largest], ritz[[0, -1]], rtol=1e-6)
    assert ritz[0] < 0 and info.accepted
    # M is L^2 / |g| at first, doubles for each further trial, and halves after the last.
    M = np.abs(ritz).max() ** 2 / np.linalg.norm(g) * 2.0 ** (int(info.trials) - 1)
    want = Q @ secular_step(T, Q.T @ g, M)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8 * np.abs(want).max())
    np.testing.assert_allclose(optax.tree.get(state, "regularization"), M / 2)
    np.testing.assert_allclose(info.shift, M * np.linalg.norm(want) / 2, rtol=1e-6)

    # From beside a saddle, on to the minimum; from the saddle itself there is no Krylov space.
    case = quartic_saddle()
    tx = curvax.krylov_descent(case.objective, order=1)
    step = stepping(tx, case)
    params, state, values = jnp.array([1.0, 1e-3]), tx.init(case.params), []
    for _ in range(20):
        params, state = step(params, state, case.batch)
        values.append(case.objective(params, case.batch))
    np.testing.assert_allclose(params, [0, 1], atol=1e-8)
    assert all(b <= a for a, b in itertools.pairwise(values))
    still, state = step(jnp.zeros(2), state, case.batch)
    assert not still.any() and not optax.tree.get(state, "accepted")


def test_krylov_descent_goes_on_where_rounding_hides_what_a_step_gains():
    """In float32, beside a constant of 1e6: gradients tell, also by steps that lengthen them."""
    values, start = jnp.array([1.0, 0.03]), 1e-3 * jnp.array([0.1, 33.0])
    loss = curvax.losses.from_function(lambda f, _: jnp.sum(values * f[0] ** 2) / 2 + 1e6)
    objective = curvax.Objective(lambda w, x: x * w, loss)
    case = cases.Case(objective, start, (jnp.ones((1, 2)), jnp.zeros(1)))
    tx = curvax.krylov_descent(objective, order=0)
    step = stepping(tx, case)
    run = lambda carry: jax.lax.scan(lambda c, _: (step(*c, case.batch), c[0]), carry, length=25)
    (end, state), path = jax.jit(run)((start, tx.init(start)))
    assert optax.tree.get(state, "num_rejected") == 0
    assert jnp.sum(values * end**2) < 0.1 * jnp.sum(values * start**2)
    norms = jnp.linalg.norm(values * path, axis=1)
    assert (jnp.diff(norms) > 0).any()


def test_a_step_that_16_bits_round_away_is_none():
    """Beside a constant, gradients seem to gain by it; params stay where they are."""
    loss = curvax.losses.from_function(lambda f, _: jnp.sum((f - 1.001) ** 2) / 2 + 1e3)
    objective = curvax.Objective(lambda w, x: x * w, loss)
    params, batch = jnp.ones(1, jnp.bfloat16), (jnp.ones((1, 1)), jnp.zeros(1))
    tx = curvax.krylov_descent(objective, order=0)
    step = jax.jit(lambda g, s: tx.update(g, s, params, batch=batch))
    updates, state = step(jax.grad(objective)(params, batch), tx.init(params))
    info = optax.tree.get(state, "info")
    assert updates == 0 and not info.accepted and info.num_rejected == 1


TREE = {"a": jnp.arange(6.0).reshape(2, 3) / 6, "b": jnp.ones(3)}
OBJECTIVE = curvax.Objective(
    lambda p, x: jnp.tanh(x @ p["a"] + p["b"]), curvax.losses.softmax_cross_entropy()
)
BATCH = (jax.random.normal(jax.random.key(0), (16, 2)), jnp.arange(16) % 3)
WRAPPED = {
    "gauss_newton": functools.partial(curvax.gauss_newton, 0.5, OBJECTIVE, 0.1),
    "egn": functools.partial(curvax.egn, 0.5, OBJECTIVE, 0.1),
    "saddle_free_newton": functools.partial(
        curvax.saddle_free_newton, 0.5, OBJECTIVE, 0.1, num_steps=4
    ),
    "lazy_newton": functools.partial(curvax.lazy_newton, 0.5, OBJECTIVE, 0.1, curvature_every=2),
    "gradient_regularized_newton": functools.partial(
        curvax.gradient_regularized_newton, OBJECTIVE, curvature_every=2
    ),
}
every_wrapped = pytest.mark.parametrize("name", WRAPPED)
CASE = cases.Case(OBJECTIVE, TREE, BATCH)


@functools.cache
def compiled(name):
    tx = WRAPPED[name]()
    return tx, stepping(tx, CASE)


def train(tx, step, params=TREE, batch=BATCH, num_steps=4):
    state = tx.init(params)
    for _ in range(num_steps):
        params, state = step(params, state, batch)
    return params, state


@every_wrapped
def test_scan_checkpoint_bad_gradients_and_no_retracing(name, tmp_path):
    tx, step = compiled(name)
    carry = train(tx, step)
    assert OBJECTIVE(carry[0], BATCH) < OBJECTIVE(TREE, BATCH) - 0.01
    assert step._cache_size() == 1
    scanned, _ = jax.jit(lambda c: jax.lax.scan(lambda c, _: (step(*c, BATCH), None), c, length=4))(
        (TREE, tx.init(TREE))
    )
    chex.assert_trees_all_close(scanned[0], carry[0], rtol=1e-4, atol=1e-5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "step", jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)
        )
    chex.assert_trees_all_equal(step(*restored, BATCH), step(*carry, BATCH))
    bad = (BATCH[0].at[0].set(jnp.nan), BATCH[1])
    params, state = step(*carry, bad)
    assert all(jnp.isnan(x).any() for x in jax.tree.leaves(params))  # apply_if_finite sees it
    chex.assert_trees_all_equal(
        optax.tree.get(state, "curvature"), optax.tree.get(carry[1], "curvature")
    )
    chex.assert_tree_all_finite(state)


# The others are in tests/optim/test_conformance.py.
@pytest.mark.parametrize("name", ["saddle_free_newton", "gradient_regularized_newton"])
def test_eight_devices_and_bfloat16(name):
    tx, step = compiled(name)
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), BATCH)
    whole = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), TREE)
    one = train(tx, step)[0]
    chex.assert_trees_all_close(train(tx, step, whole, sharded)[0], one, rtol=1e-3, atol=1e-4)
    coarse = jax.tree.map(lambda p: p.astype(jnp.bfloat16), TREE)
    params, state = train(tx, step, coarse, (BATCH[0].astype(jnp.bfloat16), BATCH[1]))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert OBJECTIVE(params, BATCH) < OBJECTIVE(TREE, BATCH)
    assert not any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))


def test_vmap_schedules_and_injected_damping():
    build = lambda damping: curvax.gauss_newton(0.5, OBJECTIVE, damping)
    run = lambda damping: train(build(damping), stepping(build(damping), CASE), num_steps=2)[0]
    member = lambda damping: stepping(build(damping), CASE)(TREE, build(damping).init(TREE), BATCH)[
        0
    ]
    many = jax.jit(jax.vmap(member))(jnp.array([0.01, 1.0]))
    for i, damping in enumerate((0.01, 1.0)):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], many), member(damping), rtol=1e-4, atol=1e-5
        )
    scheduled = run(optax.piecewise_constant_schedule(1.0, {1: 0.01}))
    first = train(build(1.0), stepping(build(1.0), CASE), num_steps=1)[0]
    second = stepping(build(0.01), CASE)(first, build(0.01).init(TREE), BATCH)[0]
    chex.assert_trees_all_close(scheduled, second, rtol=1e-4, atol=1e-5)
    injected = optax.inject_hyperparams(build)(damping=0.01)
    params, _ = stepping(injected, CASE)(TREE, injected.init(TREE), BATCH)
    chex.assert_trees_all_close(params, jax.tree.map(lambda x: x[0], many), rtol=1e-4, atol=1e-5)


def test_any_solver_and_curvature_as_data(x64):
    case, gradient, matrices = problem("mlp")
    want = -damped_step(matrices["hvp"], gradient)
    rule = curvax.scale_by_newton(
        functools.partial(curvax.solve.minres, tol=1e-12, max_steps=500), DAMPING
    )
    apply = jax.jit(lambda g, s, c: rule.update(g, s, curvature=c))
    matvec = curvax.hvp(case.objective, case.params, case.batch)
    got, state = apply(gradient, rule.init(case.params), matvec)  # a matvec crosses jit
    np.testing.assert_allclose(oracle.flat(got), want, rtol=1e-7, atol=1e-8)
    lazy = curvax.scale_by_lazy_newton(DAMPING)
    dense = Dense(jnp.asarray(matrices["ggnvp"]))
    got, state = lazy.update(gradient, lazy.init(case.params), curvature=dense)
    again, _later = lazy.update(gradient, state)
    chex.assert_trees_all_equal(got, again)
    np.testing.assert_allclose(
        oracle.flat(got), -damped_step(matrices["ggnvp"], gradient), rtol=1e-8
    )
    nothing, _ = lazy.update(gradient, lazy.init(case.params))
    assert not oracle.flat(nothing).any()
    bad, kept = lazy.update(gradient, state, curvature=Dense(dense.matrix * jnp.nan))
    chex.assert_trees_all_equal((bad, kept.curvature), (got, state.curvature))
    assert kept.info.num_nonfinite == 1


def test_masks_missing_curvature_and_bad_numbers_have_errors():
    tx = curvax.gauss_newton(1.0, OBJECTIVE)
    masked = optax.masked(tx, {"a": True, "b": False})
    gradient = jax.grad(OBJECTIVE)(TREE, BATCH)
    with pytest.raises(
        ValueError, match=r"updates\['b'\] is masked out. Keep what is not trained out of params"
    ):
        masked.update(gradient, masked.init(TREE), TREE, batch=BATCH, model_params=TREE)
    rule = curvax.scale_by_newton()
    with pytest.raises(ValueError, match=r"a solve needs curvature in every step.*lazy_newton"):
        rule.update(gradient, rule.init(TREE))
    with pytest.raises(TypeError, match=r"solver must be a function \(curvature, b, \*, damping\)"):
        curvax.scale_by_newton("cg")
    with pytest.raises(ValueError, match="damping must be positive"):
        curvax.newton_cg(1.0, OBJECTIVE, damping=0.0)
    with pytest.raises(ValueError, match="gamma must be positive"):
        curvax.gradient_regularized_newton(OBJECTIVE, gamma=0.0)
    with pytest.raises(ValueError, match="regularization must be positive, got 0"):
        curvax.cubic_newton(OBJECTIVE, regularization=0.0)
    with pytest.raises(ValueError, match="order must be at least 0, got -1"):
        curvax.krylov_descent(OBJECTIVE, order=-1)
    for search in (
        curvax.scale_by_gradient_regularized_newton(OBJECTIVE),
        curvax.scale_by_cubic_newton(OBJECTIVE),
    ):
        with pytest.raises(ValueError, match="a trial of the step needs both"):
            search.update(gradient, search.init(TREE), TREE)
    krylov = curvax.scale_by_krylov_descent(OBJECTIVE)
    with pytest.raises(ValueError, match=r"a solve needs curvature in every step.*lazy_newton"):
        krylov.update(gradient, krylov.init(TREE), TREE, batch=BATCH)


@pytest.mark.parametrize("build", ["cubic_newton", "gradient_regularized_newton", "krylov_descent"])
def test_a_search_goes_on_after_batches_whose_loss_is_not_a_number(build):
    """The gradient is finite, as it is behind `optax.zero_nans`."""
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    x = jnp.array([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
    good, bad = (x, x @ jnp.array([2.0, -1.0])), (x, jnp.full(3, jnp.nan))
    tx = optax.chain(optax.zero_nans(), getattr(curvax, build)(objective))

    @jax.jit
    def step(w, state, batch):
        updates, state = tx.update(jax.grad(objective)(w, batch), state, w, batch=batch)
        return w + updates, state

    w, state = step(jnp.zeros(2), tx.init(jnp.zeros(2)), good)
    for _ in range(4):
        before = w
        w, state = step(w, state, bad)
        np.testing.assert_array_equal(w, before)
    for _ in range(40):
        w, state = step(w, state, good)
    assert objective(w, good) < 1e-3
