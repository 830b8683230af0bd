"""Losses: values and curvature against formulas and autodiff, the law of pseudo-gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax
from curvax import losses
from curvax.losses._shares import pseudo_gradient_by_example

pytestmark = pytest.mark.usefixtures("x64")

key = jax.random.key


def _example(name):
    """(loss, outputs, targets), small enough for a dense E[r r']."""
    f = jax.random.normal(key(0), (3, 4))
    sequence = jax.random.normal(key(1), (2, 3, 3))
    labels = jnp.array([[0, -1, 2], [1, -1, -1]])
    mask = jnp.array([[1, 0, 0.5], [0, 0, 2]])
    heads = {
        "a": (0.3, losses.softmax_cross_entropy(ignore_index=-1, label_smoothing=0.2)),
        "b": (2.0, losses.squared_error()),
    }
    return {
        "softmax": lambda: (losses.softmax_cross_entropy(), f, jnp.array([0, 3, 1])),
        "softmax_smoothed": lambda: (
            losses.softmax_cross_entropy(label_smoothing=0.3),
            f,
            jnp.array([0, 3, 1]),
        ),
        "softmax_sequence": lambda: (
            losses.softmax_cross_entropy(ignore_index=-1),
            sequence,
            labels,
        ),
        "sigmoid": lambda: (losses.sigmoid_cross_entropy(), f, jnp.array(f > 0.3)),
        "squared": lambda: (losses.squared_error(), f, 0.5 * f),
        "poisson": lambda: (losses.poisson(), f, jnp.arange(12).reshape(3, 4) % 5),
        "masked": lambda: (losses.masked(losses.squared_error()), sequence, (0.5 * sequence, mask)),
        "masked_softmax": lambda: (
            losses.masked(losses.softmax_cross_entropy()),
            sequence,
            (abs(labels), mask),
        ),
        "heads": lambda: (
            losses.weighted_sum(heads),
            {"a": sequence, "b": f},
            {"a": labels, "b": 0.5 * f},
        ),
        "gaussian": lambda: (losses.gaussian(), (f, 0.3 * f - 0.2), 0.5 * f),
        "gaussian_kl": lambda: (losses.gaussian_kl(), (f, 0.3 * f - 0.2), None),
        "contrastive": lambda: (losses.contrastive(0.7), (f, 0.5 * f[::-1] + 0.2), None),
        "contrastive_symmetric": lambda: (
            losses.contrastive(0.7, symmetric=True),
            (f, 0.5 * f[::-1] + 0.2),
            None,
        ),
        "variance": lambda: (losses.variance(), f, None),
    }[name]()


NAMES = [
    "softmax",
    "softmax_smoothed",
    "softmax_sequence",
    "sigmoid",
    "squared",
    "poisson",
    "masked",
]
NAMES += ["masked_softmax", "heads", "gaussian"]
COUPLED = ["contrastive", "contrastive_symmetric", "variance"]
WITHOUT_TARGETS = ["gaussian_kl", *COUPLED]


def dense_hvp(loss, f, y):
    flat, unravel = ravel_pytree(f)
    return jax.vmap(lambda e: ravel_pytree(loss.curvature_product(f, y, unravel(e)))[0])(
        jnp.eye(flat.size)
    ).T


@pytest.mark.parametrize("name", NAMES)
def test_hvp_is_the_hessian_of_the_value(name):
    loss, f, y = _example(name)
    if (
        name == "gaussian"
    ):  # its curvature is the Fisher: the Hessian averaged over y ~ N(m, e^s), (y - m)^2 = e^s
        y = f[0] + jnp.exp(0.5 * f[1])

    @jax.jit
    def compute(f, y):
        flat, unravel = ravel_pytree(f)
        return dense_hvp(loss, f, y), jax.hessian(lambda f: loss(unravel(f), y))(flat)

    got, expected = compute(f, y)
    if name == "gaussian":
        cross = np.kron(np.ones((2, 2)) - np.eye(2), np.ones((12, 12))) > 0
        expected = np.where(cross, 0, expected)  # odd in y - m, with mean zero
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_the_curvature_of_the_gaussian_divergence_is_the_fisher_information():
    """The Hessian of KL(N(f) || N(g)) in g at g = f."""
    loss, f, y = _example("gaussian_kl")
    flat, unravel = ravel_pytree(f)

    def divergence(flat_g):
        (m, s), (n, t) = f, unravel(flat_g)
        by_entry = 0.5 * (t - s + jnp.exp(s - t) + (m - n) ** 2 * jnp.exp(-t) - 1)
        return jnp.sum(by_entry) / len(m)

    got, expected = jax.jit(lambda f, g: (dense_hvp(loss, f, y), jax.hessian(divergence)(g)))(
        f, flat
    )
    np.testing.assert_allclose(got, expected, atol=1e-12)
    zero = jax.tree.map(jnp.zeros_like, f)
    to_the_prior = jax.jit(lambda g: divergence(ravel_pytree(g)[0]))(zero)
    np.testing.assert_allclose(loss(f, y), to_the_prior, rtol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_contrastive_loss_is_a_cross_entropy_of_similarities(symmetric):
    """Value, gradient and Gauss-Newton matrix `J' H J` through the similarities."""
    loss = losses.contrastive(0.7, symmetric)
    _, f, _ = _example("contrastive")
    flat, unravel = ravel_pytree(f)
    n = len(f[0])

    def similarities(flat):
        u, v = unravel(flat)
        return jnp.einsum("id,jd->ij", u, v).ravel() / 0.7

    def info_nce(s):
        rows = [s.reshape(n, n), s.reshape(n, n).T][: 1 + symmetric]
        return sum(-jnp.mean(jnp.diag(jax.nn.log_softmax(x))) for x in rows) / len(rows)

    @jax.jit
    def compute(flat):
        J, H = jax.jacobian(similarities)(flat), jax.hessian(info_nce)(similarities(flat))
        value = jax.value_and_grad(lambda flat: info_nce(similarities(flat)))(flat)
        ours = jax.value_and_grad(lambda flat: loss(unravel(flat), None))(flat)
        return (*ours, dense_hvp(loss, unravel(flat), None)), (*value, J.T @ H @ J)

    for got, expected in zip(*compute(flat), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_the_variance_has_the_covariance_of_gradients_as_gauss_newton_matrix():
    x = jax.random.normal(key(1), (6, 3))
    energy = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]
    params = {"a": jax.random.normal(key(2), (3, 2)), "b": jax.random.normal(key(3), (2,))}
    metric = curvax.Objective(energy, losses.variance())

    @jax.jit
    def compute(params, x):
        gradients = jax.vmap(lambda row: jax.grad(energy)(params, row))(x)
        matvec = curvax.ggnvp(metric, params, (x, None))
        gradient = jax.grad(metric)(params, (x, None))
        space = curvax.solve.sample_space(metric, params, (x, None), space="samples")
        step, _ = curvax.solve.direct(space, gradient, damping=0.1)
        return gradients, curvax.to_dense(matvec, params), gradient, step, metric(params, (x, None))

    gradients, ggn, gradient, step, value = compute(params, x)
    rows = np.concatenate([np.reshape(g, (6, -1)) for g in jax.tree.leaves(gradients)], axis=1)
    covariance = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(ggn, covariance, atol=1e-12)
    np.testing.assert_allclose(value, 0.5 * np.var(energy(params, x)), rtol=1e-12)
    want = np.linalg.solve(covariance + 0.1 * np.eye(len(ggn)), ravel_pytree(gradient)[0])
    np.testing.assert_allclose(ravel_pytree(step)[0], want, atol=1e-10)


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *WITHOUT_TARGETS])
def test_pseudo_gradients_have_the_curvature_as_second_moment(name, by_example):
    """Every entry of E[r r'] by z-test over 20,000 draws with fixed keys."""
    loss, f, y = _example(name)
    if by_example and name in COUPLED:
        with pytest.raises(TypeError, match=r"compares the examples.*EK-FAC.*curvax.fishervp"):
            pseudo_gradient_by_example(loss, key(0), f, y, np.arange(3))
        return
    if by_example and name == "heads":
        f = {"a": f["a"], "b": f["b"][:2]}  # the heads of one example share a leading axis
        y = {"a": y["a"], "b": y["b"][:2]}
    index = np.arange(len(jax.tree.leaves(f)[0]))
    if by_example:
        draw = lambda k: pseudo_gradient_by_example(loss, k, f, y, index)
    else:
        draw = lambda k: losses.pseudo_gradient(loss, k, f, y)
    n = 20_000
    draws = jax.vmap(lambda k: ravel_pytree(draw(k))[0])
    r, exact = jax.tree.map(
        np.asarray,
        jax.jit(lambda keys: (draws(keys), dense_hvp(loss, f, y)))(jax.random.split(key(7), n)),
    )
    second, fourth = r.T @ r / n, (r**2).T @ r**2 / n
    # Signs have squares of variance zero, up to rounding.
    sem = np.sqrt(np.maximum(fourth - second**2, 0) / n) + 1e-12
    assert np.abs((second - exact) / sem).max() < 5
    z_mean = r.mean(0) / (r.std(0) / n**0.5 + 1e-12)
    assert np.abs(z_mean).max() < 5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "softmax_smoothed"])
def test_gradients_at_targets_of_the_model_have_the_curvature_as_second_moment(name):
    """So the empirical Fisher has the unit of the Fisher, whatever a term is. (A smoothed label is
    no draw from the model.)
    """
    loss, f, y = _example(name)
    if name == "heads":
        heads = {"a": (0.3, losses.softmax_cross_entropy(ignore_index=-1))}
        loss, f, y = losses.weighted_sum(heads), {"a": f["a"]}, {"a": y["a"]}
    n = 20_000

    @jax.jit
    @jax.vmap
    def draw(k):
        return ravel_pytree(loss.empirical_gradient(f, loss.sample(k, f, y)))[0]

    r, exact = np.asarray(draw(jax.random.split(key(3), n))), np.asarray(dense_hvp(loss, f, y))
    second, fourth = r.T @ r / n, (r**2).T @ r**2 / n
    sem = np.sqrt((fourth - second**2) / n) + 1e-12
    assert np.abs((second - exact) / sem).max() < 5


def test_values_equal_those_of_optax():
    labels = jnp.arange(5) % 4

    @jax.jit
    def pairs(f):
        smooth, y = (
            optax.smooth_labels(jax.nn.one_hot(labels, 4, dtype=float), 0.1),
            jax.nn.sigmoid(2 * f),
        )
        m, s = f[:, :2], f[:, 2:]
        return {
            "softmax": (
                losses.softmax_cross_entropy()(f, labels),
                optax.softmax_cross_entropy_with_integer_labels(f, labels).mean(),
            ),
            "smoothed": (
                losses.softmax_cross_entropy(label_smoothing=0.1)(f, labels),
                optax.softmax_cross_entropy(f, smooth).mean(),
            ),
            "sigmoid": (
                losses.sigmoid_cross_entropy()(f, y),
                optax.sigmoid_binary_cross_entropy(f, y).sum(-1).mean(),
            ),
            "squared": (losses.squared_error()(f, y), optax.l2_loss(f, y).sum(-1).mean()),
            "poisson": (
                losses.poisson()(f, jnp.broadcast_to(labels[:, None], f.shape)),
                -jax.scipy.stats.poisson.logpmf(labels[:, None], jnp.exp(f)).sum(-1).mean(),
            ),
            "gaussian": (
                losses.gaussian()((m, s), y[:, :2]),
                -jax.scipy.stats.norm.logpdf(y[:, :2], m, jnp.exp(s / 2)).sum(-1).mean(),
            ),
        }

    for name, (ours, theirs) in pairs(jax.random.normal(key(0), (5, 4))).items():
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, err_msg=name)


def test_ignored_and_masked_terms_take_no_part():
    loss = losses.softmax_cross_entropy(ignore_index=0)  # a label that is also a class
    f, y = jax.random.normal(key(0), (2, 3, 4)), jnp.array([[1, 0, 3], [0, 0, 2]])
    kept = f[jnp.array([0, 0, 1]), jnp.array([0, 2, 2])]
    np.testing.assert_allclose(
        loss(f, y), losses.softmax_cross_entropy()(kept, jnp.array([1, 3, 2])), rtol=1e-12
    )
    assert loss.num_terms(f, y) == 3
    poisoned = f.at[0, 1].set(jnp.nan)  # a fully masked attention row

    @jax.jit
    def compute(poisoned):
        value, gradient = jax.value_and_grad(loss)(poisoned, y)
        return (
            value,
            gradient,
            loss.curvature_product(poisoned, y, f),
            losses.pseudo_gradient(loss, key(1), poisoned, y),
        )

    value, gradient, product, r = jax.tree.map(np.asarray, compute(poisoned))
    np.testing.assert_allclose(value, loss(f, y))
    assert np.isfinite(gradient).all() and (gradient[0, 1] == 0).all()
    assert np.isfinite(product).all()
    assert (r[0, 1] == 0).all() and np.isfinite(r).all()


@pytest.mark.parametrize("name", ["softmax_sequence", "masked"])
def test_a_batch_in_which_nothing_counts_has_zero_loss_and_curvature(name):
    loss, f, y = _example(name)
    y = (y[0], jnp.zeros_like(y[1])) if name == "masked" else jnp.full_like(y, -1)

    @jax.jit
    def compute(f, y):
        value, gradient = jax.value_and_grad(loss)(f, y)
        return (
            value,
            loss.num_terms(f, y),
            gradient,
            loss.curvature_product(f, y, f),
            losses.pseudo_gradient(loss, key(0), f, y),
        )

    for x in compute(f, y):
        np.testing.assert_array_equal(x, 0)


def test_a_label_out_of_range_is_nan_not_a_wrong_number():
    loss = losses.softmax_cross_entropy()
    assert jnp.isnan(loss(jnp.zeros((2, 3)), jnp.array([0, 3])))
    assert jnp.isnan(loss(jnp.zeros((2, 3)), jnp.array([0, -1])))


@pytest.mark.parametrize("name", [*NAMES, *WITHOUT_TARGETS])
def test_bfloat16_outputs_are_worked_on_in_float32(name):
    loss, f, y = _example(name)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), f)
    assert loss(half, y).dtype != jnp.bfloat16
    exact = loss(jax.tree.map(lambda x: x.astype(float), half), y)
    np.testing.assert_allclose(loss(half, y), exact, rtol=1e-5)
    for fn in (
        lambda f: loss.curvature_product(f, y, f),
        lambda f: losses.pseudo_gradient(loss, key(0), f, y),
    ):
        assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(fn, half))} == {
            jnp.dtype(jnp.bfloat16)
        }


def test_a_users_loss_gets_defaults_and_may_override_them():
    value = lambda f, y: jnp.mean(jnp.sum(jnp.abs(f - y) ** 3, axis=-1))
    loss = losses.as_loss(value)
    f, y = jax.random.normal(key(0), (4, 2)), jnp.zeros((4, 2))
    assert loss.num_terms(f, y) == 4
    both = jax.jit(
        lambda f: (dense_hvp(loss, f, y), jax.hessian(value)(f, y).reshape(f.size, f.size))
    )
    np.testing.assert_allclose(*both(f), atol=1e-12)
    with pytest.raises(TypeError, match=r"no way to sample.*from_function"):
        losses.pseudo_gradient(value, key(0), f, y)

    class WithMethods:
        def __call__(self, f, y):
            return value(f, y)

        def curvature_product(self, f, y, v):
            return v

        def sample(self, key, f, y):
            return f + 1

    own = curvax.Objective(lambda p, x: x * p, WithMethods()).loss
    assert (
        own.curvature_product(f, y, 2 * f) is not None
        and (own.curvature_product(f, y, f) == f).all()
    )
    both = jax.jit(
        lambda f: (losses.pseudo_gradient(own, key(0), f, y), 2 * jax.grad(value)(f, f + 1))
    )
    np.testing.assert_allclose(*both(f))


def test_labels_in_bytes_do_not_bound_the_sampled_classes():
    loss, f = losses.softmax_cross_entropy(), jnp.zeros((4, 300)).at[:, 280].set(50.0)
    labels = jnp.array([0, 1, 2, 255], jnp.uint8)
    assert (loss.sample(key(0), f, labels) == 280).all()
    assert jnp.abs(losses.pseudo_gradient(loss, key(0), f, labels)).max() < 1e-12


def test_negative_labels_in_bytes_give_nan_for_any_number_of_classes():
    loss = losses.softmax_cross_entropy()
    for classes in (3, 200, 300):
        assert jnp.isnan(loss(jnp.zeros((2, classes)), jnp.array([1, -2], jnp.int8)))
        assert not jnp.isnan(loss(jnp.zeros((2, classes)), jnp.array([1, 2], jnp.int8)))


def test_large_poisson_rates_are_sampled_without_overflow():
    f = jnp.full((4000, 1), 30.0)
    counts = losses.poisson().sample(key(0), f, f)
    rate = jnp.exp(30.0)
    assert abs(counts.mean() / rate - 1) < 5 / (rate * 4000) ** 0.5
    assert abs(counts.var() / rate - 1) < 0.15


def test_an_objective_with_array_weights_is_hashable():
    hash(
        curvax.Objective(
            lambda p, x: x, losses.weighted_sum({"a": (jnp.float32(1.0), losses.squared_error())})
        )
    )


def test_errors_say_what_and_where():
    ce, f = losses.softmax_cross_entropy(), jnp.zeros((3, 4))
    with pytest.raises(
        ValueError, match=r"targets int64\[2\] do not fit outputs float64\[3, 4\].*shape \[3\]"
    ):
        ce(f, jnp.zeros(2, int))
    with pytest.raises(TypeError, match=r"integer labels, got targets float64\[3, 4\].*argmax"):
        ce(f, f)
    with pytest.raises(
        ValueError, match=r"float outputs \[batch, \.\.\., classes\], got int64\[3, 4\]"
    ):
        ce(f.astype(int), jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.5"):
        losses.softmax_cross_entropy(label_smoothing=1.5)
    for loss in (losses.squared_error(), losses.sigmoid_cross_entropy(), losses.poisson()):
        with pytest.raises(
            ValueError, match=r"targets float64\[3\] do not fit outputs float64\[3, 1\]"
        ):
            loss(jnp.zeros((3, 1)), jnp.zeros(3))
        with pytest.raises(ValueError, match=r"targets float64\[3\] do not fit"):
            loss.curvature_product(jnp.zeros((3, 1)), jnp.zeros(3), jnp.zeros((3, 1)))
    with pytest.raises(TypeError, match=r"gaussian needs outputs \(mean, log_variance\)"):
        losses.gaussian()(f, f)
    with pytest.raises(ValueError, match=r"outputs by head \['a'\], got \['a', 'b'\]"):
        losses.weighted_sum({"a": (1.0, ce)})({"a": f, "b": f}, {"a": jnp.zeros(3, int)})
    with pytest.raises(ValueError, match=r"weight of head 'a' must be at least 0, got -1"):
        losses.weighted_sum({"a": (-1, ce)})
    with pytest.raises(ValueError, match="at least one head"):
        losses.weighted_sum({})
    with pytest.raises(
        ValueError,
        match=r"outputs is float64\[3, 4\]; its first axes must be those of the mask bool\[2\]",
    ):
        losses.masked(losses.squared_error())(f, (f, jnp.ones(2, bool)))
    with pytest.raises(TypeError, match=r"targets \(targets, mask\)"):
        losses.masked(losses.squared_error())(f, f)
    with pytest.raises(TypeError, match=r"a loss must return a real scalar, got float64\[3\]"):
        losses.as_loss(lambda f, y: jnp.sum(f - y, axis=-1))(f, f)
    with pytest.raises(TypeError, match="loss must be callable"):
        curvax.Objective(lambda p, x: x, "cross_entropy")


def test_log_densities_have_an_empirical_fisher_and_no_gauss_newton_matrix():
    """What would divide by a matrix of zeros raises, for a user's loss and one head of many too."""
    log_density = lambda w, x: -0.5 * (x @ w) ** 2
    linear = losses.from_function(lambda f, y: -jnp.mean(y * f))
    w, x, y = jnp.ones(2), jax.random.normal(key(0), (4, 2)), jnp.arange(4.0)
    flow = curvax.Objective(log_density, losses.negative_log_density())
    np.testing.assert_allclose(flow(w, (x, None)), -jnp.mean(log_density(w, x)), rtol=1e-12)
    rows = jax.vmap(jax.grad(log_density), (None, 0))(w, x)
    fisher = curvax.to_dense(curvax.empirical_fishervp(flow, w, (x, None)), w)
    np.testing.assert_allclose(fisher, rows.T @ rows / 4, atol=1e-12)

    heads = losses.weighted_sum({"a": (1.0, losses.squared_error()), "b": (1.0, linear)})
    both = curvax.Objective(lambda w, x: {"a": x @ w, "b": x @ w}, heads)
    cases = [
        (flow, (x, None), "this loss is linear"),
        (curvax.Objective(log_density, linear), (x, y), "this loss is linear"),
        (curvax.Objective(log_density, losses.masked(linear)), (x, (y, y > 0)), "loss is linear"),
        (both, (x, {"a": y, "b": y}), "head 'b' of this loss is linear"),
    ]
    for objective, batch, message in cases:
        grads = jax.grad(objective)(w, batch)
        for tx in (curvax.gauss_newton(1.0, objective), curvax.egn(1.0, objective)):
            with pytest.raises(TypeError, match=rf"{message}.*fisher=\"empirical\".*newton_cg"):
                jax.eval_shape(tx.update, grads, tx.init(w), w, batch=batch)
        with pytest.raises(TypeError, match=message):
            curvax.ggn_diagonal(objective, w, batch)
        layout = curvax.kron_layout(objective, w, batch)
        with pytest.raises(TypeError, match=message):
            curvax.kron_factors(objective, layout, w, batch, key(0), fisher="exact")
    with pytest.raises(TypeError, match=r"negative_log_density cannot sample.*\"empirical\""):
        curvax.fishervp(flow, w, (x, None), key(0))


@pytest.mark.parametrize("name", ["contrastive", "variance"])
def test_what_compares_examples_refuses_parts_of_a_batch_by_name(name):
    loss, f, _ = _example(name)
    model = (lambda w, x: (x @ w, x)) if name == "contrastive" else (lambda w, x: x @ w)
    objective, w = curvax.Objective(model, loss), jnp.eye(4)
    batch = (jax.tree.leaves(f)[0], None)
    layout = curvax.kron_layout(objective, w, batch)
    problem = objective, w, batch
    kron = objective, layout, w, batch, key(0)
    ekfac = curvax.ekfac(0.1, objective, layout)
    message = "compares the examples of a batch with each other"
    for refused in (
        lambda: curvax.ggnvp(*problem, microbatch=2),
        lambda: curvax.streamed(curvax.ggnvp, objective, w, [batch])(w),
        lambda: curvax.fishervp(*problem, key(0)),
        lambda: curvax.empirical_fishervp(*problem),
        lambda: curvax.empirical_fisher_diagonal(*problem),
        lambda: curvax.per_example_grads(*problem),
        lambda: curvax.kron_factors(*kron, microbatch=2),
        lambda: curvax.kron_factors(*kron, fisher="empirical"),
        lambda: curvax.kron.kron_moments(objective, layout, {}, *kron[2:], fisher="exact"),
        lambda: ekfac.update(w, ekfac.init(w), w, batch=batch),
    ):
        with pytest.raises(TypeError, match=message):
            product = refused()
            product(w)  # some build their chunks only then
    with pytest.raises(ValueError, match=message):
        losses.masked(loss)


@pytest.mark.parametrize("name", ["contrastive", "variance"])
def test_factors_of_what_compares_examples(name):
    """G is the sum over examples of the blocks of S on the diagonal: by enumeration of all entries
    with "exact", by z-test with "mc".
    """
    loss, f, _ = _example(name)
    model = (lambda w, x: (x @ w, x)) if name == "contrastive" else (lambda w, x: x @ w)
    objective, w, x = curvax.Objective(model, loss), jnp.eye(4), jax.tree.leaves(f)[0]
    layout = curvax.kron_layout(objective, w, (x, None))

    def g_of(key, fisher):
        factors = curvax.kron_factors(objective, layout, w, (x, None), key, fisher=fisher)
        return factors.blocks[""].g.mean[0]

    @jax.jit
    def compute(keys):
        S = dense_hvp(loss, model(w, x), None)
        return S, g_of(key(0), "exact"), jax.vmap(lambda k: g_of(k, "mc"))(keys)

    S, exact, draws = map(np.asarray, compute(jax.random.split(key(1), 4000)))
    blocks = S[: x.size, : x.size].reshape(3, 4, 3, 4)
    want = np.einsum("bibj->ij", blocks)
    np.testing.assert_allclose(exact, want, atol=1e-12)
    sem = draws.std(axis=0) / len(draws) ** 0.5
    assert np.abs((draws.mean(axis=0) - want) / sem).max() < 4.5


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["contrastive", "variance"])
def test_what_compares_examples_does_so_across_eight_devices(name, axis_type):
    """Factors and products of a batch that lies on eight devices are those of the whole batch."""
    loss = losses.variance() if name == "variance" else losses.contrastive(0.7)
    model = (lambda w, x: (x @ w, x)) if name == "contrastive" else (lambda w, x: x @ w)
    objective, w = curvax.Objective(model, loss), jax.random.normal(key(1), (3, 3))
    x = jax.random.normal(key(2), (8, 3))
    layout = curvax.kron_layout(objective, w, (x, None))

    @jax.jit
    def compute(w, x):
        problem = objective, layout, w, (x, None), key(0)
        factors = [curvax.kron_factors(*problem, fisher=fisher) for fisher in ("mc", "exact")]
        return factors, curvax.ggnvp(objective, w, (x, None))(w)

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        got = compute(w, jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch"))))
    want = compute(w, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_an_elbo_in_chunks_by_example_and_of_an_ensemble_is_that_of_the_whole():
    """No targets for the divergence: `None`, beside those of the reconstruction."""
    elbo = losses.weighted_sum(
        {"reconstruction": (1.0, losses.sigmoid_cross_entropy()), "kl": (0.5, losses.gaussian_kl())}
    )

    def model(p, x):
        mean, log_variance = x @ p["mean"], x @ p["log_variance"]
        code = mean + jnp.exp(log_variance / 2) * jnp.sin(3 * mean)
        return {"reconstruction": code @ p["decoder"], "kl": (mean, log_variance)}

    objective = curvax.Objective(model, elbo)
    x = jax.random.normal(key(0), (5, 3))
    batch = (x, {"reconstruction": jax.nn.sigmoid(x), "kl": None})
    members = {
        "mean": 0.3 * jax.random.normal(key(1), (2, 3, 2)),
        "log_variance": 0.3 * jax.random.normal(key(2), (2, 3, 2)),
        "decoder": jax.random.normal(key(3), (2, 2, 3)),
    }
    layout = curvax.kron_layout(objective, jax.tree.map(lambda p: p[0], members), batch)

    def every_way(params, microbatch):
        problem = objective, params, batch
        kron = objective, layout, params, batch, key(0)
        gradient = jax.grad(objective)(params, batch)
        rows = curvax.per_example_grads(*problem, microbatch=microbatch)
        return {
            "gradient": gradient,
            "mean": jax.tree.map(lambda g: g.mean(axis=0), rows),
            "ggnvp": curvax.ggnvp(*problem, microbatch=microbatch)(gradient),
            "empirical": curvax.empirical_fishervp(*problem, microbatch=microbatch)(gradient),
            "exact": curvax.kron_factors(*kron, fisher="exact", microbatch=microbatch),
            "g": curvax.kron_factors(*kron, fisher="empirical", microbatch=microbatch),
        }

    @jax.jit
    def compute(members):
        whole = jax.vmap(lambda params: every_way(params, None))(members)
        return whole, jax.lax.map(lambda params: every_way(params, 2), members)

    whole, chunked = compute(members)
    chex.assert_trees_all_close(chunked, whole, atol=1e-12)
    chex.assert_trees_all_close(whole["mean"], whole["gradient"], atol=1e-12)
    masked, mask = losses.masked(losses.gaussian_kl()), jnp.array([1.0, 1, 0, 0, 1])
    f = model(jax.tree.map(lambda p: p[0], members), x)["kl"]
    at_mask = jax.tree.map(lambda x: x[mask > 0], f)
    np.testing.assert_allclose(masked(f, (None, mask)), losses.gaussian_kl()(at_mask, None))
