"""OASIS, SANIA and the induced metric: what they promise by formula, and where they have nothing
to go by. tests/optim/test_optimizers.py compares their trajectories with NumPy.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.optim import (
    hessian_diagonal,
    induced_metric,
    scale_by_adagrad_sqr,
    scale_by_adam_sqr,
    scale_by_oasis_auto,
    scale_by_sania,
)

SQUARES = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
LOGISTIC = curvax.Objective(lambda w, x: x @ w, curvax.losses.sigmoid_cross_entropy())


def path(tx, objective, w, batch, num_steps):
    """The params before each step and after the last, and the last state; one compiled scan."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(objective)(w, batch), state, w, batch=batch)
        return (optax.apply_updates(w, updates), state), w

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps))
    (last, state), before = scan((w, tx.init(w)))
    return jnp.concatenate([before, last[None]]), state


def separable():
    """Data that a plane separates, in units that differ by 1e4."""
    x = jax.random.normal(jax.random.key(0), (40, 3)) * jnp.array([1.0, 100.0, 0.01])
    normal = jnp.array([1.0, -0.02, 50.0])
    return x, (x @ normal > 0).astype(x.dtype)[:, None]


# --- OASIS ----------------------------------------------------------------------------------------


def test_oasis_halves_the_error_of_a_diagonal_quadratic_exactly(x64):
    """With an exact diagonal all preconditioned curvatures are 1, and half the secant is 1/2."""
    a = np.array([1e-2, 1.0, 1e4])
    batch = jnp.sqrt(a)[None], jnp.zeros((1, 3))
    tx = curvax.oasis_auto(SQUARES, alpha=1e-4, num_first=2)
    w, state = path(tx, SQUARES, jnp.array([3.0, -2.0, 0.5]), batch, 8)
    np.testing.assert_allclose(w[1], w[0] * (1 - 1e-2), rtol=1e-12)  # the first rate
    np.testing.assert_allclose(w[2:], w[1:-1] / 2, rtol=1e-12)
    rule = optax.tree.get(state, "inner_state")
    np.testing.assert_allclose([rule.rate, rule.growth], [0.5, 1.0], rtol=1e-12)
    np.testing.assert_allclose(rule.curvature, a, rtol=1e-12)
    assert rule.info.floored_fraction == 0 and rule.info.num_nonfinite == 0


def test_oasis_does_not_depend_on_the_scale_of_params_above_the_floor(x64):
    x, y = separable()
    v = jnp.array([[1e-2], [3.0], [50.0]])  # w = v * w'

    def exact(params, batch, key):
        dense = curvax.to_dense(curvax.hvp(LOGISTIC, params, batch), params)
        return jnp.diag(dense).reshape(3, 1)

    def follow(alpha, x):
        tx = curvax.estimating(scale_by_oasis_auto(LOGISTIC, alpha=alpha), exact)
        return path(tx, LOGISTIC, jnp.zeros((3, 1)), (x, y), 20)[0]

    w = follow(1e-12, x)
    np.testing.assert_allclose(v * follow(1e-12, x * v.T), w, rtol=1e-9)
    assert not np.allclose(v * follow(1.0, x * v.T), w, rtol=1e-2)  # the floor has a scale


def test_oasis_keeps_its_rate_where_nothing_bounds_it_and_where_a_gradient_is_bad():
    """A linear loss; then params, before the step, at which the gradient is not finite."""
    root = curvax.losses.from_function(lambda f, y: jnp.mean(jnp.sqrt(f)))
    linear = curvax.losses.from_function(lambda f, y: jnp.mean(f))
    batch, w = (jnp.ones((1, 1)), jnp.zeros(1)), jnp.array([4.0])
    for loss, before, num_nonfinite in ((linear, w, 0), (root, -w, 1)):
        objective = curvax.Objective(lambda w, x: x * w, loss)
        rule = scale_by_oasis_auto(objective, alpha=0.5, first_rate=0.25)
        update = jax.jit(lambda w, s, c, rule=rule: rule.update(w, s, w, batch=batch, curvature=c))
        _, state = update(before, rule.init(w), jnp.ones(1))
        updates, state = update(w, state, jnp.ones(1))
        np.testing.assert_allclose(updates, -0.25 * w, rtol=1e-6)
        assert state.rate == 0.25 and jnp.isinf(state.growth)
        assert state.info.num_nonfinite == num_nonfinite


@pytest.mark.parametrize("name", ["alpha", "eps", "f_star", "zeta"])
def test_hyperparameters_may_be_injected(name):
    """Traced numbers in place of concrete ones; the step is the same."""
    build = {
        "alpha": lambda alpha: scale_by_oasis_auto(SQUARES, alpha=alpha, first_rate=0.1),
        "eps": scale_by_adagrad_sqr,
        "f_star": lambda f_star: scale_by_sania(optax.identity(), f_star=f_star),
        "zeta": lambda zeta: induced_metric(optax.identity(), zeta),
    }[name]
    injected, plain = optax.inject_hyperparams(build)(**{name: 0.3}), build(**{name: 0.3})
    w, batch = jnp.array([2.0]), (jnp.ones((1, 1)), jnp.zeros((1, 1)))
    extra = {"batch": batch, "value": 2.0, "curvature": jnp.array([0.1])}
    steps = [tx.update(w, tx.init(w), w, **extra)[0] for tx in (injected, plain)]
    np.testing.assert_allclose(*steps, rtol=1e-6)
    assert optax.tree.norm(steps[0]) > 0


def test_the_rate_grows_by_no_more_than_it_may(x64):
    """Nearly linear after a curved beginning: eta_k = sqrt(1 + theta_{k-1}) eta_{k-1}."""
    huber = curvax.losses.from_function(lambda f, y: jnp.mean(optax.losses.huber_loss(f)))
    objective = curvax.Objective(lambda w, x: x * w, huber)
    batch = jnp.ones((1, 1)), jnp.zeros(1)
    rule = scale_by_oasis_auto(objective, alpha=1.0, first_rate=0.1)
    update = jax.jit(lambda w, s: rule.update(w, s, w, batch=batch, curvature=jnp.ones(1)))
    w, state, rates, growths = jnp.array([0.5]), rule.init(jnp.ones(1)), [], []
    for point in (w, 0.9 * w, 8.0 + w, 9.0 + w, 9.5 + w):
        _, state = update(point, state)
        rates.append(float(state.rate))
        growths.append(float(state.growth))
    assert rates[:2] == pytest.approx([0.1, 0.5])  # forgotten; then half of 1 / smoothness
    for k in (3, 4):
        np.testing.assert_allclose(rates[k], np.sqrt(1 + growths[k - 1]) * rates[k - 1])


def test_the_first_curvature_is_a_mean_of_independent_probes():
    """So it is for every rule; `num_first` of `estimating`."""
    draws = []

    def estimator(params, batch, key):
        draw = jax.random.normal(key, (2,))
        draws.append(draw)
        return draw

    seen = optax.stateless_with_tree_map(lambda g, p: g)
    seen = optax.GradientTransformationExtraArgs(
        seen.init, lambda g, s, p=None, *, curvature, **extra: (curvature, s)
    )
    key = jax.random.fold_in(jax.random.key(3), 0)
    others = [jax.random.fold_in(key, i) for i in (1, 2)]
    expected = jnp.mean(jnp.stack([jax.random.normal(k, (2,)) for k in (key, *others)]), axis=0)
    tx = curvax.estimating(seen, estimator, seed=3, num_first=3)
    update = jax.jit(lambda s: tx.update(jnp.ones(2), s, jnp.ones(2), batch=()))
    first, state = update(tx.init(jnp.ones(2)))
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    second, _ = update(state)
    one = jax.random.normal(jax.random.fold_in(jax.random.key(3), 1), (2,))
    np.testing.assert_allclose(second, one, rtol=1e-6)


# --- SANIA ----------------------------------------------------------------------------------------


def lam(value, n, f_star=0.0):
    """Lambda and the number of skipped updates, for `g.u = n`: u = n g with |g| = 1."""
    tx = scale_by_sania(optax.scale(n), f_star=f_star)
    g = jnp.array([0.6, 0.8])
    steps, state = jax.jit(partial(tx.update, value=value))(g, tx.init(g))
    return steps, state


def test_lambda_is_the_first_root_of_the_quadratic_model(x64):
    for value, n in ((2.0, 5.0), (2.0, 4.0), (1e-9, 3.0), (1.3, 1e12)):
        steps, state = lam(value, n, f_star=0.0)
        scale = optax.tree.norm(steps) / n
        model = value - scale * n + scale**2 * n / 2
        np.testing.assert_allclose(model, 0, atol=1e-12 * value)
        assert scale <= 1 and state.num_skipped == 0
        np.testing.assert_allclose(state.scale, scale, rtol=1e-6)
    # A model that stays above f_star: its minimum. With f_star: the gap counts.
    assert lam(2.0, 3.9)[1].scale == 1
    np.testing.assert_allclose(lam(2.5, 5.0, 0.5)[0], lam(2.0, 5.0)[0], rtol=1e-12)


def test_lambda_does_not_cancel_in_float32():
    """2 f / n = 2e-8, where 1 - sqrt(1 - 2 f / n) is 0."""
    assert 1 - np.sqrt(np.float32(1 - 2e-8)) == 0
    np.testing.assert_allclose(lam(jnp.float32(1e-4), 1e4)[1].scale, 1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "value, n, is_skipped",
    [
        (0.0, 5.0, False),
        (-1.0, 5.0, False),
        (-jnp.inf, 5.0, True),
        (jnp.nan, 5.0, True),
        (jnp.inf, 5.0, True),
        (1.0, -2.0, True),
        (1.0, 0.0, False),
    ],
)
def test_no_step_where_lambda_is_not_defined(value, n, is_skipped):
    steps, state = lam(value, n)
    assert optax.tree.norm(steps) == 0 and state.num_skipped == is_skipped


@pytest.mark.parametrize("rule", [scale_by_adagrad_sqr, scale_by_adam_sqr])
def test_a_gradient_whose_square_is_infinite_counts_as_not_finite(rule):
    """In float32, where 1e20 is finite; the state stays as it was but for the count of such."""
    tx = rule()
    _, before = tx.update(jnp.array([1.0, 2.0]), tx.init(jnp.ones(2)))
    updates, after = tx.update(jnp.array([1.0, 1e20]), before)
    assert jnp.isnan(updates).all() and after.info.num_nonfinite == 1
    assert after.nu.tolist() == before.nu.tolist() and after.count == 1
    # So is one whose square makes a sum of squares infinite.
    big = jnp.array([1.5e19, 1.0])
    for _ in range(3):
        updates, before = tx.update(big, before)
    assert jnp.isfinite(before.nu).all()


@pytest.mark.parametrize("rule", [scale_by_adagrad_sqr, scale_by_adam_sqr])
def test_squares_do_not_depend_on_the_scale_of_params_above_the_floor(rule, x64):
    """w = v w': the same iterates; with the floor they are others."""
    x, y = separable()
    v = jnp.array([[1e-2], [3.0], [50.0]])
    tx = curvax.sania(LOGISTIC, rule(eps=1e-20))
    w, state = path(tx, LOGISTIC, jnp.zeros((3, 1)), (x, y), 20)
    scaled, _ = path(tx, LOGISTIC, jnp.zeros((3, 1)), (x * v.T, y), 20)
    np.testing.assert_allclose(v * scaled, w, rtol=1e-9)
    assert optax.tree.get(state, "floored_fraction") == 0
    floored, state = path(curvax.sania(LOGISTIC, rule()), LOGISTIC, w[0], (x * v.T, y), 20)
    assert not np.allclose(v * floored, w, rtol=1e-2)
    assert optax.tree.get(state, "floored_fraction") > 0


def hessian(objective):
    return lambda params, batch, key: curvax.hvp(objective, params, batch)


VARIANTS = {
    "adagrad": lambda objective: scale_by_adagrad_sqr(eps=1e-8),
    "adam": lambda objective: scale_by_adam_sqr(eps=1e-8),
    "hutchinson": lambda objective: curvax.estimating(
        curvax.scale_by_oasis(alpha=1e-8), hessian_diagonal(objective), num_first=5
    ),
    "cg": lambda objective: curvax.estimating(
        curvax.scale_by_newton(curvax.cg, damping=1e-10), hessian(objective)
    ),
}

FITTED = {"adagrad": 0.05, "adam": 0.005, "hutchinson": 0.2, "cg": 1e-6}
"""What is left of the loss after 200 steps."""


@pytest.mark.parametrize("name", VARIANTS)
def test_interpolating_logistic_regression_is_fitted_without_tuning(name, x64):
    """At the same settings for data in other units."""
    x, y = separable()
    for unit in (1.0, 1e3):
        batch = unit * x, y
        tx = curvax.sania(LOGISTIC, VARIANTS[name](LOGISTIC))
        w, state = path(tx, LOGISTIC, jnp.zeros((3, 1)), batch, 200)
        losses = [LOGISTIC(w[k], batch) for k in (0, 20, 50, 100, 200)]
        assert (np.diff(losses) < 0).all()
        assert losses[-1] < FITTED[name] * losses[0]
        assert optax.tree.get(state, "num_skipped") == 0


def test_cg_goes_down_where_the_curvature_is_negative(x64):
    """At the top of a hill CG ends in its first step, with u = g; lambda is that of B = I."""
    hill = curvax.losses.from_function(lambda f, y: 1 + jnp.mean(jnp.cos(f)))
    objective = curvax.Objective(lambda w, x: x * w, hill)
    batch, w = (jnp.ones((1, 1)), jnp.zeros(1)), jnp.array([0.3])
    tx = curvax.sania(objective, VARIANTS["cg"](objective))
    points, _ = path(tx, objective, w, batch, 1)
    np.testing.assert_allclose(points[1] - w, np.sin(0.3), rtol=1e-12)  # g = -sin(w), lambda = 1


def test_a_bad_gradient_passes_as_nan_and_the_rule_keeps_its_state():
    tx = scale_by_sania(scale_by_adam_sqr())
    g = jnp.array([1.0, 2.0])
    _, good = tx.update(g, tx.init(g), value=1.0)
    steps, after = tx.update(jnp.array([jnp.nan, 1.0]), good, value=1.0)
    assert jnp.isnan(steps).all() and after.num_skipped == 1
    assert after.inner_state.info.num_nonfinite == 1
    np.testing.assert_array_equal(after.inner_state.nu, good.inner_state.nu)


def test_the_loss_is_passed_or_computed():
    w, batch = jnp.array([2.0]), (jnp.array([[3.0]]), jnp.zeros((1, 1)))
    g, value = jax.grad(SQUARES)(w, batch), SQUARES(w, batch)
    passed, computed = scale_by_sania(optax.identity()), scale_by_sania(optax.identity(), SQUARES)
    steps, _ = passed.update(g, passed.init(w), value=value)
    np.testing.assert_array_equal(steps, computed.update(g, computed.init(w), w, batch=batch)[0])
    with pytest.raises(ValueError, match=r"the loss is missing: tx.update\(.*value=loss\)"):
        passed.update(g, passed.init(w), w, batch=batch)
    with pytest.raises(ValueError, match=r"the loss is computed from both: tx.update"):
        computed.update(g, computed.init(w), w)
    with pytest.raises(ValueError, match=r"one number; got float32\[3\]. Reduce it with jnp.mean"):
        passed.update(g, passed.init(w), value=jnp.ones(3))


# --- the induced metric ---------------------------------------------------------------------------


def test_induced_metric_is_the_inverse_of_the_dense_metric(x64):
    """G = P + zeta g g', with P the diagonal of AdaGrad-SQR, and the identity."""
    g, zeta = jnp.array([0.3, -2.0, 5.0]), 0.7
    for inner, P in ((optax.identity(), np.eye(3)), (scale_by_adagrad_sqr(0.5), None)):
        metric = np.diag(np.maximum(g**2, 0.5)) if P is None else P
        tx = induced_metric(inner, zeta)
        steps, state = jax.jit(tx.update)(g, tx.init(g))
        expected = np.linalg.solve(metric + zeta * np.outer(g, g), g)
        np.testing.assert_allclose(steps, expected, rtol=1e-12)
        norm_of_g = g @ np.linalg.solve(metric, g)
        np.testing.assert_allclose(state.scale, 1 / (1 + zeta * norm_of_g), rtol=1e-6)


def test_no_step_in_the_induced_metric_is_longer_than_the_bound(x64):
    zeta = 4.0
    tx = induced_metric(optax.identity(), zeta)
    lengths = jnp.concatenate([jnp.logspace(-6, 12, 40), jnp.array([1 / jnp.sqrt(zeta)])])
    step_of = lambda length: tx.update(length * jnp.array([0.6, 0.8]), tx.init(jnp.ones(2)))[0]
    norms = jnp.linalg.norm(jax.vmap(step_of)(lengths), axis=1)
    bound = 1 / (2 * np.sqrt(zeta))
    assert (norms <= bound * (1 + 1e-12)).all()
    np.testing.assert_allclose(norms[-1], bound, rtol=1e-12)
    np.testing.assert_allclose(norms[0], lengths[0], rtol=1e-9)  # short gradients pass
    np.testing.assert_allclose(norms[39], 1 / (zeta * lengths[39]), rtol=1e-9)


def test_induced_metric_around_a_rule_with_curvature_and_bad_numbers():
    """Extra arguments reach the rule; 16-bit leaves stay; NaN stays; ascent is not stretched."""
    tx = induced_metric(curvax.scale_by_oasis(), zeta=1.0)
    g = jnp.array([1.0, 2.0], jnp.bfloat16)
    steps, _ = tx.update(g, tx.init(g), curvature=jnp.array([1.0, 4.0]))
    assert steps.dtype == jnp.bfloat16
    np.testing.assert_allclose(steps.astype(float), [1 / 3, 1 / 6], rtol=1e-2)
    bad, _ = tx.update(g * jnp.nan, tx.init(g), curvature=jnp.ones(2))
    assert jnp.isnan(bad).all()
    uphill = induced_metric(optax.scale(-1.0), zeta=1.0)
    up, state = uphill.update(g, uphill.init(g))
    np.testing.assert_array_equal(up, -g)
    assert state.scale == 1


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: curvax.scale_by_oasis(alpha=0.0), "alpha must be positive, got 0.0"),
        (lambda: scale_by_oasis_auto(SQUARES, alpha=-1.0), "alpha must be positive, got -1.0"),
        (lambda: curvax.oasis_auto(SQUARES, first_rate=0), "first_rate must be positive, got 0"),
        (lambda: curvax.oasis(0.1, SQUARES, num_first=0), "num_first must be at least 1, got 0"),
        (lambda: scale_by_adagrad_sqr(eps=0.0), "eps must be positive, got 0.0"),
        (lambda: scale_by_adam_sqr(b2=1.0), r"b2 must lie in \[0, 1\), got 1"),
        (lambda: induced_metric(optax.identity(), -1.0), "zeta must be at least 0, got -1.0"),
    ],
)
def test_errors_of_hyperparameters(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_errors_of_the_adaptive_rate():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    rule = optax.masked(scale_by_oasis_auto(SQUARES), {"a": True, "b": False})
    with pytest.raises(ValueError, match=r"whole model, but params\['b'\] is masked.*curvax.oasis"):
        rule.update(params, rule.init(params), params, batch=(), curvature=params)
    rule = scale_by_oasis_auto(SQUARES)
    with pytest.raises(ValueError, match=r"gradients at both params: tx.update\(grads, state, par"):
        rule.update(params, rule.init(params), params, curvature=params)
