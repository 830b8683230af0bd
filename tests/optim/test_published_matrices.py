"""The transcriptions of matrix updates obey the identities of their papers, or of algebra."""

import numpy as np
import published_matrices as published
import pytest

SHAMPOO = {
    "b1": 0.0,
    "b2": 0.0,
    "epsilon": 0.0,
    "every": 1,
    "graft": None,
    "graft_eps": 1e-10,
    "start": 1,
}
SOAP = {"b1": 0.9, "b2": 0.95, "shampoo_beta": -1, "eps": 1e-8, "max_dim": 100}
KL = {"b1": 0.9, "b2": 0.9, "eps": 0.0, "every": 3, "init_factor": 0.1, "clamp": None}
KL_METHODS = (published.kl_shampoo, published.kl_soap)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def positive_definite(size, seed):
    x = normal(size, size, seed=seed)
    return x @ x.T / size + 0.1 * np.eye(size)


def orthogonal(size, seed):
    return np.linalg.qr(normal(size, size, seed=seed))[0]


def random_signs(seed):
    """A map of a basis to one with other signs."""
    rng = np.random.default_rng(seed)
    return lambda q: q * rng.choice([-1.0, 1.0], size=len(q))


def kronecker_gradients(a, b):
    """Matrices whose vectors have the mean outer product A x B, exactly."""
    num_in, num_out = len(a), len(b)
    units = np.eye(num_in * num_out).reshape(-1, num_in, num_out)
    root_a, root_b = published._power(a, 0.5), published._power(b, 0.5)
    return list(np.sqrt(num_in * num_out) * root_a @ units @ root_b)


def expect_equal(updates, expected, tolerance):
    """The relative error of every update; the last is not zero."""
    assert np.any(updates[-1])
    for u, x in zip(updates, expected, strict=True):
        np.testing.assert_allclose(u, x, rtol=0, atol=tolerance * (np.max(np.abs(x)) + 1e-300))


# --- Shampoo, ASGO --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_one_gradient_gives_its_polar_factor(shape):
    g = normal(*shape)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    one_side = (0.5, 0) if shape[0] <= shape[1] else (0, 0.5)
    for exponent in (0.25, one_side):
        (update,) = published.shampoo([g], exponent=exponent, **SHAMPOO)
        np.testing.assert_allclose(update, u @ vt, atol=1e-12)
    (update,) = published.asgo([g], b1=0.0, b2=0.0, eps=0.0)
    scale = 0.2 * np.sqrt(g.size) / np.sqrt(min(shape))
    np.testing.assert_allclose(update, scale * u @ vt, atol=1e-12)


@pytest.mark.parametrize("b3", [None, 0.5])
def test_bias_corrections_leave_a_constant_gradient_as_it_is(b3):
    g = normal(3, 5)
    options = {**SHAMPOO, "b1": 0.9, "b2": 0.95, "b3": b3}
    for update in published.shampoo([g] * 4, exponent=(0.5, 0), **options):
        np.testing.assert_allclose(update, published.polar(g), atol=1e-12)


def test_shampoo_shifts_eigenvalues_that_rounding_made_negative():
    g = 1e8 * np.outer(normal(6), normal(5, seed=1))
    options = {**SHAMPOO, "epsilon": 1e-12}
    (update,) = published.shampoo([g], exponent=0.25, **options)
    assert np.all(np.isfinite(update))
    assert np.linalg.eigvalsh(g @ g.T + 1e-12 * np.eye(6))[0] < 0


def test_exponent_one_half_of_one_gradient_inverts_its_singular_values():
    g = normal(5, 3)
    (update,) = published.shampoo([g], exponent=0.5, **SHAMPOO)
    singular_values = np.linalg.svd(update, compute_uv=False)
    np.testing.assert_allclose(singular_values, 1 / np.linalg.svd(g, compute_uv=False)[::-1])


def test_exponent_one_half_and_traces_whiten_kronecker_gradients():
    a, b = positive_definite(4, 1), positive_definite(3, 2)
    gradients = kronecker_gradients(a, b)
    options = {**SHAMPOO, "b2": 1.0, "bias_correction": False}
    update = published.shampoo(gradients, exponent=0.5, trace_scaling=True, **options)[-1]
    # A sum of n gradients is n times their mean.
    white = published._power(a, -0.5) @ gradients[-1] @ published._power(b, -0.5)
    np.testing.assert_allclose(update, white / np.sqrt(len(gradients)), atol=1e-12)


@pytest.mark.parametrize("graft", ["adam", "sgd"])
def test_a_graft_sets_the_norm_and_is_the_first_steps(graft):
    gradients = list(normal(8, 4, 3))
    options = {**SHAMPOO, "b1": 0.9, "b2": 0.95, "every": 2, "epsilon": 1e-12, "graft": graft}
    grafted = published.shampoo(gradients, exponent=0.25, **{**options, "start": 99})
    updates = published.shampoo(gradients, exponent=0.25, **{**options, "start": 3})
    expect_equal(updates[:2], grafted[:2], 0.0)
    assert not np.allclose(updates[2], grafted[2])
    norms = [[np.linalg.norm(u) for u in us] for us in (updates, grafted)]
    np.testing.assert_allclose(*norms, rtol=1e-12)


def test_asgo_does_not_see_the_scale_of_gradients():
    gradients = normal(6, 3, 5)
    updates = published.asgo(list(gradients), b1=0.9, b2=0.8, eps=0.0)
    expect_equal(updates, published.asgo(list(1e3 * gradients), b1=0.9, b2=0.8, eps=0.0), 1e-10)


# --- SOAP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 10])
def test_soap_follows_rotations(every):
    gradients = normal(30, 5, 5)
    p, q = orthogonal(5, 1), orthogonal(5, 2)
    updates = published.soap(list(gradients), every=every, **SOAP)
    rotated = published.soap(list(p @ gradients @ q.T), every=every, **SOAP)
    expect_equal(rotated, [p @ u @ q.T for u in updates], 1e-10)


def test_soap_does_not_see_signs_of_its_bases():
    gradients = list(normal(30, 6, 4))
    bases = orthogonal(6, 1), orthogonal(4, 2)
    updates = published.soap(gradients, every=3, first_bases=bases, **SOAP)
    options = {"every": 3, "first_bases": bases, "flip": random_signs(3), **SOAP}
    expect_equal(published.soap(gradients, **options), updates, 1e-12)


def test_soap_without_bases_is_adam_that_skips_a_step():
    gradients = list(normal(10, 3, 4))
    updates = published.soap(gradients, every=2, **{**SOAP, "max_dim": 2})
    m, v = 0.0, 0.0
    assert not np.any(updates[0])
    for t, g in enumerate(gradients[1:], start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        # The root is not corrected before eps is added: eps / sqrt(1 - b2^t) in effect.
        root = np.sqrt(v / (1 - 0.95**t)) + 1e-8 / np.sqrt(1 - 0.95**t)
        np.testing.assert_allclose(updates[t], m / (1 - 0.9**t) / root, rtol=1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_soap_of_diagonal_gradients_is_adam_whatever_the_order_of_eigenvalues(every):
    # The bases stay permutations, which the sort changes: v has to follow.
    gradients = [np.diag(d) for d in normal(30, 4)]
    options = {**SOAP, "every": every, "eps": 1e-3}  # off the diagonal is 0 / eps
    updates = published.soap(gradients, first_bases=(np.eye(4), np.eye(4)), **options)
    adam = published.soap(gradients, **{**options, "max_dim": 0})
    expect_equal(updates, adam, 1e-10)


def test_soap_with_one_long_axis_follows_rotations_of_the_other():
    gradients, q = normal(20, 6, 4), orthogonal(4, 1)
    options = {**SOAP, "every": 3, "max_dim": 5}
    updates = published.soap(list(gradients), **options)
    rotated = published.soap(list(gradients @ q.T), **options)
    expect_equal(rotated, [u @ q.T for u in updates], 1e-10)


# --- KL -------------------------------------------------------------------------------------------


def objective(left, right, covariance):
    """logdet(L x R) + tr((L x R)^-1 F)."""
    product = np.kron(left, right)
    return np.linalg.slogdet(product)[1] + np.trace(np.linalg.solve(product, covariance))


def test_kl_fixed_point_has_its_trace_and_beats_shampoo():
    g = normal(40, 4, 6) @ normal(6, 6, seed=1) + normal(4, 6, seed=2)
    left, right = published.kl_fixed_point(list(g), b=0.5, num_steps=200)
    vectors = g.reshape(len(g), -1)
    covariance = vectors.T @ vectors / len(g)
    inverse = np.linalg.inv(np.kron(left, right))
    np.testing.assert_allclose(np.trace(inverse @ covariance), 4 * 6, rtol=1e-10)
    mean_l = np.mean(g @ g.transpose(0, 2, 1), axis=0)
    mean_r = np.mean(g.transpose(0, 2, 1) @ g, axis=0)
    shampoo = objective(mean_l / np.trace(mean_l), mean_r, covariance)
    assert objective(left, right, covariance) < shampoo - 0.1


def test_kl_fixed_point_of_kronecker_gradients_is_their_covariance():
    a, b = positive_definite(4, 1), positive_definite(3, 2)
    left, right = published.kl_fixed_point(kronecker_gradients(a, b), b=0.9, num_steps=300)
    np.testing.assert_allclose(np.kron(left, right), np.kron(a, b), rtol=1e-10, atol=1e-11)


def test_without_divisions_kl_has_no_fixed_point():
    gradients = kronecker_gradients(np.eye(8), np.eye(2))
    left, right = published.kl_fixed_point(gradients, b=0.9, num_steps=100, divide=False)
    ratio = np.trace(right) / 2 / (np.trace(left) / 8)
    assert min(ratio, 1 / ratio) < 1e-5


@pytest.mark.parametrize("fix_gauge", [False, True])
def test_kl_shampoo_whitens_kronecker_gradients(fix_gauge):
    a, b = positive_definite(5, 1), positive_definite(3, 2)
    white = normal(2000, 5, 3)
    gradients = list(published._power(a, 0.5) @ white @ published._power(b, 0.5))
    options = {**KL, "b1": 0.0, "b2": 0.995, "every": 20, "fix_gauge": fix_gauge}
    updates = np.stack(published.kl_shampoo(gradients, **options))
    root_a, root_b = published._power(a, -0.5), published._power(b, -0.5)
    error = updates[-100:] - root_a @ np.stack(gradients[-100:]) @ root_b
    # The averages of 200 gradients are 2 / (200 sqrt(2 x 3)) off, and more.
    assert np.linalg.norm(error) < 0.15 * np.linalg.norm(white[-100:])


@pytest.mark.parametrize("method", KL_METHODS)
def test_kl_does_not_see_how_a_factor_is_split(method):
    gradients = list(normal(20, 4, 4))
    updates = method(gradients, **KL)
    expect_equal(method(gradients, fix_gauge=True, **KL), updates, 1e-10)


@pytest.mark.parametrize("method", KL_METHODS)
def test_kl_does_not_see_the_scale_of_gradients(method):
    gradients = normal(20, 4, 4)
    scaled = method(list(100 * gradients), **{**KL, "init_factor": 10.0})
    expect_equal(scaled, method(list(gradients), **KL), 1e-10)


@pytest.mark.parametrize("method", KL_METHODS)
def test_kl_follows_rotations(method):
    gradients, p, q = normal(20, 4, 4), orthogonal(4, 1), orthogonal(4, 2)
    rotated = method(list(p @ gradients @ q.T), **KL)
    expect_equal(rotated, [p @ u @ q.T for u in method(list(gradients), **KL)], 1e-10)


def test_where_every_eigenvalue_clamps_kl_shampoo_is_scaled_momentum():
    gradients = list(1e-6 * normal(10, 4, 3))
    updates = published.kl_shampoo(gradients, **{**KL, "init_factor": 1e-9, "clamp": 10.0})
    m = 0.0
    for g, u in zip(gradients[1:], updates[1:], strict=True):
        m = 0.9 * m + 0.1 * g
        np.testing.assert_allclose(u, 100 * m, rtol=1e-8)  # 1 / (d_L d_R)^1/2 = 10^2


# --- Muon, FISMO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_muon_tends_to_the_polar_factor(shape):
    gradients = list(normal(6, *shape))
    options = {"b": 0.9, "nesterov": True, "consistent_rms": None}
    exact = published.muon(gradients, coefficients=None, num_steps=0, **options)
    iterated = published.muon(gradients, coefficients=(2, -1.5, 0.5), num_steps=40, **options)
    expect_equal(iterated, exact, 1e-10)
    scale = np.sqrt(max(1, shape[1] / shape[0]))
    singular_values = np.linalg.svd(exact[-1], compute_uv=False)
    np.testing.assert_allclose(singular_values, scale, rtol=1e-12)


def test_newton_muon_of_white_inputs_is_muon():
    gradients = list(normal(6, 4, 3))
    white = np.sqrt(4) * orthogonal(4, 1)
    options = {"b": 0.9, "decay": 0.95, "every": 1, "damping": 0.2}
    updates = published.newton_muon(gradients, [white] * 6, init=1.0, **options)
    muon = published.muon(
        gradients, b=0.9, nesterov=True, coefficients=None, num_steps=0, consistent_rms=None
    )
    expect_equal(updates, muon, 1e-10)


def test_newton_muon_has_the_inputs_since_its_last_refresh():
    gradients, inputs = list(normal(5, 4, 3)), normal(5, 7, 4, seed=1)
    options = {"b": 0.0, "decay": 0.5, "every": 2, "damping": 0.2}
    updates = published.newton_muon(gradients, list(inputs), **options)
    means = [x.reshape(-1, 4).T @ x.reshape(-1, 4) / 14 for x in (inputs[:2], inputs[2:4])]
    a = 0.25 * 1e-3 * np.eye(4) + 0.25 * means[0] + 0.5 * means[1]
    damped = a + (0.2 * np.trace(a) / 4 + 1e-8) * np.eye(4)
    expected = published.polar(np.linalg.solve(damped, gradients[-1]))
    np.testing.assert_allclose(updates[-1], expected, atol=1e-12)
    np.testing.assert_allclose(updates[0], published.polar(gradients[0]), atol=1e-12)


def test_newton_muon_follows_rotations_of_inputs_and_not_their_scale():
    gradients, inputs, q = normal(9, 4, 3), normal(9, 7, 4, seed=1), orthogonal(4, 2)
    options = {"b": 0.9, "decay": 0.95, "every": 4, "damping": 0.2}
    updates = published.newton_muon(list(gradients), list(inputs), **options)
    rotated = published.newton_muon(list(q @ gradients), list(inputs @ q.T), **options)
    expect_equal(rotated, [q @ u for u in updates], 1e-10)
    # Momentum mixes steps before and after the first refresh, so none may come before it.
    options = {**options, "every": 1}
    updates = published.newton_muon(list(gradients), list(inputs), **options)
    scaled = published.newton_muon(list(gradients), list(100 * inputs), init=10.0, **options)
    expect_equal(scaled, updates, 1e-5)  # the absolute 1e-8 of the damping does see it


def test_fismo_is_the_best_of_the_directions_within_its_norm():
    gradients, options = list(normal(5, 4, 3)), {"c": 0.9, "mu": 1e-3}
    u = published.fismo(gradients, b=0.0, every=1, **options)[-1]
    p, q = np.eye(4), np.eye(3)
    for g in gradients:
        p, q = published.fismo_factors(p, q, g, **options)
    np.testing.assert_allclose([np.trace(p), np.trace(q)], [4, 3], rtol=1e-12)
    root_p, root_q = published._power(p, 0.5), published._power(q, 0.5)
    # Feasible, and of the value that the dual norm bounds.
    np.testing.assert_allclose(np.linalg.norm(root_p @ u @ root_q, 2), 1, rtol=1e-12)
    whitened = np.linalg.solve(root_p, gradients[-1]) @ np.linalg.inv(root_q)
    value = np.sum(gradients[-1] * u)
    np.testing.assert_allclose(value, np.linalg.norm(whitened, "nuc"), rtol=1e-12)
    directions = normal(1000, 4, 3, seed=1)
    directions /= np.linalg.norm(directions, 2, axis=(1, 2))[:, None, None]
    directions = np.linalg.solve(root_p, directions) @ np.linalg.inv(root_q)
    values = np.sum(gradients[-1] * directions, axis=(1, 2))
    assert value > np.max(values) > 0


def test_fismo_without_refresh_is_muon():
    gradients = list(normal(5, 4, 3))
    updates = published.fismo(gradients, b=0.9, c=1.0, mu=0.0, every=1)
    muon = published.muon(
        gradients, b=0.9, nesterov=False, coefficients=None, num_steps=0, consistent_rms=None
    )
    expect_equal(updates, muon, 1e-10)  # the scale of a tall matrix is 1


# --- MKOR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [published.mkor, published.mkor_reference])
@pytest.mark.parametrize("threshold", [None, 2.0])
def test_mkor_inverts_its_dense_matrices(method, threshold):
    gradients, inputs = list(normal(50, 4, 3)), list(normal(50, 5, 4, seed=1))
    cotangents = list(normal(50, 5, 3, seed=2))
    options = {"decay": 0.95, "every": 1, "threshold": threshold}
    updates, pairs = method(gradients, inputs, cotangents, **options)
    left, right = pairs[-1]
    expected = np.linalg.solve(left, gradients[-1]) @ np.linalg.inv(right)
    expected *= np.linalg.norm(gradients[-1]) / np.linalg.norm(expected)
    expect_equal(updates[-1:], [expected], 1e-10)
    assert np.min(np.linalg.eigvalsh(left)) > 0


def test_mkor_dense_matrices_are_running_averages():
    x = normal(4)
    inverse = published.sherman_morrison(np.linalg.inv(positive_definite(4, 1)), x, 0.9)
    dense = 0.9 * positive_definite(4, 1) + 0.1 * np.outer(x, x)
    np.testing.assert_allclose(inverse @ dense, np.eye(4), atol=1e-12)
    inverse = published.sherman_morrison_reference(positive_definite(4, 1), x, 0.9)
    mixed = 0.9 * positive_definite(4, 1) + 0.1 * np.eye(4)
    dense = np.linalg.inv(mixed) + np.outer(x, x)
    np.testing.assert_allclose(inverse @ dense, np.eye(4), atol=1e-12)


# --- PSGD -----------------------------------------------------------------------------------------


def test_psgd_converges_to_the_inverse_of_the_absolute_hessian():
    hessian, vs = positive_definite(6, 1), normal(3000, 6)
    hessian[:, 0] *= -1  # P H^2 P = I has no use for signs
    hessian[0] *= -1
    q = published.psgd_dense(list(vs @ hessian), list(vs), step=1.0)[-1]
    p = q.T @ q
    error = np.linalg.norm(p @ hessian @ hessian @ p - np.eye(6)) / np.sqrt(6)
    assert error < 1e-4
    assert not np.any(np.tril(q, -1))


def test_psgd_diagonal_converges():
    diagonal, vs = np.array([3.0, -1.0, 0.1]), normal(300, 3)
    q = published.psgd_diagonal(list(vs * diagonal), list(vs), step=1.0)[-1]
    np.testing.assert_allclose(q**2, 1 / np.abs(diagonal), rtol=1e-8)


@pytest.mark.parametrize("norm", ["exact", "power"])
def test_psgd_kron_converges_on_a_kronecker_hessian(norm):
    a, b, vs = positive_definite(4, 1), positive_definite(3, 2), normal(1500, 4, 3)
    factors = np.eye(4), np.eye(3)
    for v in vs:
        factors, _ = published.psgd_kron_fit(factors, a @ v @ b, v, step=0.7, norm=norm)
    p1, p2 = (q.T @ q for q in factors)
    np.testing.assert_allclose(np.kron(p1 @ a, p2 @ b), np.eye(12), atol=1e-6)


def test_psgd_kron_has_the_dense_form_of_its_two_factors():
    (g,), (v,) = normal(1, 4, 3), normal(1, 4, 3, seed=1)
    (q1, q2), _ = published.psgd_kron_fit((np.eye(4), np.eye(3)), g, v, step=0.5)
    (again1, _), _ = published.psgd_kron_fit((q1, q2), g, v, step=0.5)
    q = np.kron(q1, q2)  # of row-major vectors
    a, b = (q @ g.ravel()).reshape(4, 3), np.linalg.solve(q.T, v.ravel()).reshape(4, 3)
    size = np.linalg.eigvalsh(a @ a.T + b @ b.T)[-1]
    np.testing.assert_allclose(again1, q1 - 0.5 / size * np.triu(a @ a.T - b @ b.T) @ q1)
    options = {"step": 0.5, "noise": 0.0, "b1": 0.0}
    (update,) = published.psgd_kron([g], [v], rms_clip=None, **options)
    np.testing.assert_allclose(update.ravel(), q.T @ q @ g.ravel(), rtol=1e-12)
    (clipped,) = published.psgd_kron([100 * g], [None], **options)
    np.testing.assert_allclose(np.sqrt(np.mean(clipped**2)), 1.1, rtol=1e-12)


def test_psgd_fits_at_every_step_at_first_and_seldom_later():
    fits = published.psgd_schedule(6000)
    assert all(fits[:501]) and not all(fits[:510])
    assert sum(fits[-340:]) in (9, 10, 11)


# --- self-scaled Broyden --------------------------------------------------------------------------


def rosenbrock(x):
    return np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def rosenbrock_gradient(x):
    difference = x[1:] - x[:-1] ** 2
    g = np.zeros_like(x)
    g[1:] += 200 * difference
    g[:-1] -= 400 * x[:-1] * difference + 2 * (1 - x[:-1])
    return g


def backtracking(fun, x, p, g):
    alpha = 1.0
    while fun(x + alpha * p) > fun(x) + 1e-4 * alpha * (g @ p):
        alpha /= 2
    return alpha


@pytest.mark.parametrize("kind", ["ssbroyden", "ssbfgs"])
def test_self_scaled_broyden_is_secant_positive_and_converges(kind):
    x0 = np.array([-1.2, 1.0, -0.5, 1.5])
    iterates, inverses = published.ssbroyden(
        rosenbrock, rosenbrock_gradient, x0, [backtracking] * 150, kind=kind
    )
    assert np.linalg.norm(rosenbrock_gradient(iterates[-1])) < 1e-8
    checked = 0
    for before, x, inverse in zip(iterates[:60], iterates[1:], inverses[1:], strict=False):
        s, y = x - before, rosenbrock_gradient(x) - rosenbrock_gradient(before)
        if y @ s > 0 and np.linalg.norm(s) > 1e-6:
            np.testing.assert_allclose(inverse @ y, s, rtol=0, atol=1e-8 * np.linalg.norm(s))
            assert np.min(np.linalg.eigvalsh(inverse)) > 0
            checked += 1
    assert checked > 20


def test_the_first_update_scales_the_initial_matrix():
    hessian, x0 = positive_definite(4, 1), normal(4)
    options = {"fun": None, "grad": lambda x: hessian @ x, "x0": x0, "kind": "ssbfgs"}
    (x, next_x), (_, inverse) = published.ssbroyden(steps=[0.1], **options)
    s, y = next_x - x, hessian @ (next_x - x)
    z = np.linalg.svd(np.stack([s, y]))[2][-1]  # orthogonal to both
    np.testing.assert_allclose(inverse @ z, (y @ s) / (y @ y) * z, atol=1e-12)
    _, (_, inverse) = published.ssbroyden(steps=[0.1], initial_scaling=False, **options)
    bound = min(1, s @ y / (s @ s))  # tau = min(1, 1/b), b = s.s / y.s
    np.testing.assert_allclose(inverse @ z, z / bound, atol=1e-12)


def test_self_scaled_broyden_pair_are_inverses():
    direct, s = positive_definite(5, 1), normal(5)
    y = positive_definite(5, 2) @ s
    inverse, b = np.linalg.inv(direct), s @ direct @ s / (y @ s)
    for theta, tau in [(0.0, 1.0), (0.3, 0.7), (-0.05, 1.4)]:
        new_inverse = published.broyden_inverse_update(inverse, s, y, b, theta, tau)
        new_direct = published.broyden_direct_update(direct, s, y, theta, tau)
        np.testing.assert_allclose(new_inverse @ new_direct, np.eye(5), atol=1e-10)
        np.testing.assert_allclose(new_inverse @ y, s, atol=1e-12)


@pytest.mark.parametrize("kind", ["ssbroyden", "ssbfgs"])
def test_self_scaled_broyden_skips_negative_curvature(kind):
    hessian = np.diag([1.0, -3.0])
    fun, grad = lambda x: x @ hessian @ x / 2, lambda x: hessian @ x
    _, inverses = published.ssbroyden(fun, grad, [0.1, 1.0], [0.5, 0.5], kind=kind)
    np.testing.assert_array_equal(inverses[1], np.eye(2))
    assert np.all(np.isfinite(inverses[2]))


@pytest.mark.parametrize("curvature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("size", [1, 3])
def test_self_scaled_broyden_is_finite_where_s_and_hy_are_parallel(curvature, size):
    fun, grad = lambda x: curvature * x @ x / 2, lambda x: curvature * x
    x0 = np.arange(1.0, size + 1)
    options = {"kind": "ssbroyden", "initial_scaling": False}
    _, inverses = published.ssbroyden(fun, grad, x0, [0.1, 0.1], **options)
    direction = x0 / np.linalg.norm(x0)
    for inverse in inverses[1:]:
        assert np.min(np.linalg.eigvalsh(inverse)) > 0
        np.testing.assert_allclose(inverse @ direction, direction / curvature, rtol=1e-12)
