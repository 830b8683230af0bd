"""Stochastic reconfiguration: `local_energy` against exact sums and literal NumPy, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax
from curvax.losses import local_energy, variance
from curvax.losses._energy import divided_by_root, times_root, times_transposed_root

pytestmark = pytest.mark.usefixtures("x64")

key = jax.random.key
LAM, MU = 1e-2, 0.8

# Spins of a ring of four with total magnetization zero, and the Heisenberg Hamiltonian on them.
SPINS = np.array([s for s in itertools.product([1.0, -1.0], repeat=4) if sum(s) == 0])


def heisenberg():
    """`sum_i S_i S_i+1`: diagonal `s s' / 4`, and 1/2 where two unequal neighbours are swapped."""
    H = np.zeros((len(SPINS), len(SPINS)))
    for row, s in enumerate(SPINS):
        for i in range(4):
            j = (i + 1) % 4
            H[row, row] += s[i] * s[j] / 4
            swapped = s.copy()
            swapped[[i, j]] = s[[j, i]]
            if s[i] != s[j]:
                H[row, np.flatnonzero((swapped == SPINS).all(axis=1))[0]] += 0.5
    return H


H = heisenberg()


def log_psi(params, s):
    """Real and imaginary part of log psi, `[b, 2]`."""
    return jnp.tanh(s @ params["w"] + params["b"]) @ params["v"]


def initial():
    shapes = {"w": (4, 3), "b": (3,), "v": (3, 2)}
    return {
        name: jax.random.normal(key(i), shape) for i, (name, shape) in enumerate(shapes.items())
    }


def amplitudes(params):
    f = log_psi(params, SPINS)
    return jnp.exp(f[:, 0] + 1j * f[:, 1])


def exact_energy(params):
    psi = amplitudes(params)
    return jnp.real(psi.conj() @ (H @ psi)) / jnp.sum(jnp.abs(psi) ** 2)


OBJECTIVE = curvax.Objective(log_psi, local_energy())


@jax.jit
def everything(params, targets):
    """Value, gradient, S, and the step by draws and over params, all compiled at once."""
    batch = jnp.array(SPINS), targets
    value, gradient = jax.value_and_grad(OBJECTIVE)(params, batch)
    steps = []
    for space in ("samples", "params"):
        formed = curvax.solve.sample_space(OBJECTIVE, params, batch, space=space)
        steps.append(curvax.solve.direct(formed, gradient, damping=LAM)[0])
    rows = curvax.solve.sample_space(OBJECTIVE, params, batch, space="samples", form_rows=True)
    steps.append(curvax.solve.direct(rows, gradient, damping=LAM)[0])
    S = curvax.to_dense(curvax.ggnvp(OBJECTIVE, params, batch), params)
    flat = [ravel_pytree(tree)[0] for tree in (gradient, *steps)]
    # The rows' own root of the gradient: no part of it is divided by damping.
    return value, *flat, S, ravel_pytree(rows.pull(rows.gradient))[0]


def test_sums_over_all_spins_give_the_energy_its_gradient_and_the_overlap():
    params = initial()
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def expected(flat):
        psi = amplitudes(unravel(flat))

        def infidelity(other):
            phi = amplitudes(unravel(other))
            overlap = jnp.abs(jnp.vdot(psi, phi)) ** 2
            return 1 - overlap / (jnp.vdot(psi, psi) * jnp.vdot(phi, phi)).real

        energy, gradient = jax.value_and_grad(lambda flat: exact_energy(unravel(flat)))(flat)
        # 1 - |<psi|psi'>|^2 = d'S d, to second order in d.
        return psi, energy, gradient, jax.hessian(infidelity)(flat) / 2

    psi, energy, gradient, S = expected(flat)
    psi = np.asarray(psi)
    targets = H @ psi / psi, np.abs(psi) ** 2
    value, g, by_draws, by_params, by_rows, ggn, pulled = everything(params, targets)
    np.testing.assert_allclose(value, energy, rtol=1e-12)
    np.testing.assert_allclose(g, gradient, atol=1e-11)
    np.testing.assert_allclose(pulled, gradient, atol=1e-11)
    np.testing.assert_allclose(ggn, S, atol=1e-10)
    step = np.linalg.solve(S + LAM * np.eye(len(S)), gradient)
    for got in (by_draws, by_params, by_rows):
        np.testing.assert_allclose(got, step, atol=1e-10)

    # A constant in E, and one in log psi, change no step; nor does one weight for all.
    shifted = targets[0] + 3 - 2j, 5 * targets[1]
    for got in everything(params, shifted)[1:5]:
        assert np.abs(got).max() > 1e-3
    for got, want in zip(everything(params, shifted)[1:], [g, step, step, step, S], strict=False):
        np.testing.assert_allclose(got, want, atol=1e-10)


def test_a_draw_of_weight_zero_is_as_if_it_were_not_there():
    params, x = initial(), jnp.array(SPINS)
    energies = jax.random.normal(key(3), (6, 2))
    weights = jnp.array([1.0, 0, 2, 1, 0, 1])
    # Without weights, the draw of weight 2 comes twice.
    rows = np.array([0, 2, 2, 3, 5])

    @jax.jit
    def step(batch):
        space = curvax.solve.sample_space(OBJECTIVE, params, batch, space="samples")
        value, gradient = jax.value_and_grad(OBJECTIVE)(params, batch)
        return value, gradient, curvax.solve.direct(space, gradient, damping=LAM)[0]

    got = step((x, (energies, weights)))
    want = step((x[rows], energies[rows]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
    nothing = step((x, (energies, jnp.zeros(6))))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_roots_of_the_centred_covariance():
    p = np.array([0.5, 0.0, 0.2, 0.3])
    v = np.asarray(jax.random.normal(key(0), (4, 2)))
    r = v - v.mean(axis=0)
    r[1], r[0] = 0, r[0] + r[1]
    R = np.asarray(times_root(p, np.eye(4)))
    np.testing.assert_allclose(R @ R.T, np.diag(p) - np.outer(p, p), atol=1e-14)
    np.testing.assert_allclose(times_transposed_root(p, v), R.T @ v, atol=1e-14)
    np.testing.assert_allclose(R @ divided_by_root(p, r), r, atol=1e-14)


def test_holomorphic_wavefunctions_take_the_complex_step_as_pairs():
    """`2 (O^H O + lam)^-1 O^H e` over complex params, with `O = (o - mean o) / sqrt(n)`."""
    x = jax.random.normal(key(1), (5, 3))
    energies = jax.random.normal(key(2), (5,)) + 1j * jax.random.normal(key(3), (5,))

    def complex_psi(w, x):
        return (x @ w) ** 2 / 2 + jnp.sin(x[:, 0] * w[0])

    def pair(params, x):
        f = complex_psi(params["re"] + 1j * params["im"], x)
        return jnp.stack([f.real, f.imag], axis=-1)

    params = {"re": jax.random.normal(key(4), (3,)), "im": jax.random.normal(key(5), (3,))}
    objective = curvax.Objective(pair, local_energy())
    w = params["re"] + 1j * params["im"]

    @jax.jit
    def step(params, batch):
        space = curvax.solve.sample_space(objective, params, batch)
        gradient = jax.grad(objective)(params, batch)
        delta, _ = curvax.solve.direct(space, gradient, damping=LAM)
        derivative = jax.jacrev(complex_psi, holomorphic=True)(w, batch[0].astype(complex))
        return delta, derivative

    delta, o = step(params, (x, energies))
    rows = (o - o.mean(axis=0)) / 5**0.5
    e = (energies - energies.mean()) / 5**0.5
    want = 2 * np.linalg.solve(rows.conj().T @ rows + LAM * np.eye(3), rows.conj().T @ e)
    np.testing.assert_allclose(delta["re"] + 1j * delta["im"], want, atol=1e-10)


def spring_of(rows, energies):
    """Return the steps of minSR with momentum, as NetKet has them: `e = 2 (E - mean E) / sqrt(n)`.

    rows: d log psi of real and imaginary part, `[n, 2, d]`, which do not change with params here.
    """
    phi, steps, n = 0, [], rows.shape[1]
    for o, E in zip(rows, energies, strict=True):
        centred = (o - o.mean(axis=0)) / n**0.5
        J = np.concatenate([centred[:, 0], centred[:, 1]])
        e = 2 * (E - E.mean()) / n**0.5
        e = np.concatenate([e.real, e.imag])
        T = J @ J.T
        zeta = e - MU * (J @ phi if np.ndim(phi) else 0)
        phi = MU * phi + J.T @ np.linalg.solve(T + LAM * np.eye(2 * n), zeta)
        steps.append(phi)
    return np.array(steps)


def linear(w, x):
    """Log psi that is linear in the params: its derivatives are the inputs, `[n, 2, d]`."""
    return jnp.einsum("bkd,d->bk", x, w)


@pytest.mark.parametrize("num_draws", [3, 12])
def test_spring_is_netkets_recurrence_with_its_factor_two(num_draws):
    """Over draws, and over params where those are fewer."""
    x = jax.random.normal(key(0), (4, num_draws, 2, 7))
    parts = jax.random.normal(key(1), (2, 4, num_draws))
    energies = parts[0] + 1j * parts[1]
    objective = curvax.Objective(linear, local_energy())
    tx = curvax.spring(0.1, objective, damping=LAM, momentum=MU)

    @jax.jit
    def run(w):
        def step(carry, batch):
            w, state = carry
            gradient = jax.grad(objective)(w, batch)
            updates, state = tx.update(gradient, state, w, batch=batch)
            return (w + updates, state), updates

        return jax.lax.scan(step, (w, tx.init(w)), (x, energies))[1]

    want = -0.1 * spring_of(np.asarray(x), np.asarray(energies))
    np.testing.assert_allclose(run(jnp.zeros(7)), want, atol=1e-10)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_draws_on_eight_devices_have_one_mean(axis_type):
    x = jax.random.normal(key(0), (8, 2, 20))
    energies = jax.random.normal(key(1), (8, 2))
    objective, w = curvax.Objective(linear, local_energy()), jnp.zeros(20)
    tx = curvax.spring(1.0, objective, damping=LAM)

    @jax.jit
    def step(w, batch):
        energy, gradient = jax.value_and_grad(objective)(w, batch)
        updates, _ = tx.update(gradient, tx.init(w), w, batch=batch)
        return energy, updates

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("batch"))
        energy, updates = step(w, jax.device_put((x, energies), place))
    np.testing.assert_allclose(energy, energies[:, 0].mean(), rtol=1e-12)
    want = spring_of(np.asarray(x)[None], np.asarray(energies[:, 0] + 1j * energies[:, 1])[None])
    np.testing.assert_allclose(updates, -want[0], atol=1e-10)


def test_outputs_in_sixteen_bits_and_what_is_not_finite():
    loss = local_energy()
    f = jnp.array([0.5, -1.0, 2.0], jnp.bfloat16)
    energies = jnp.array([1.0, 2.0, 6.0], jnp.float32)
    value, gradient = jax.value_and_grad(loss)(f, energies)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, 3.0)
    np.testing.assert_allclose(gradient.astype(float), 2 * np.array([-2, -1, 3]) / 3, rtol=1e-2)
    assert np.isnan(loss(f.at[1].set(jnp.inf), energies))
    assert not np.any(jax.grad(lambda e: loss(f, e))(energies))


def test_wavefunctions_energies_and_weights_that_do_not_fit_are_named():
    loss, f = local_energy(), jnp.ones((4, 2))
    with pytest.raises(ValueError, match=r"float outputs \[batch\], or \[batch, 2\]"):
        loss(jnp.ones(4, complex), jnp.ones(4))
    with pytest.raises(ValueError, match=r"float outputs \[batch\], or \[batch, 2\]"):
        loss(jnp.ones((4, 3)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"real ones of shape \[4, 2\], or complex ones"):
        loss(f, jnp.ones(4))
    with pytest.raises(ValueError, match=r"real ones of shape \[4\]\."):
        loss(f[:, 0], jnp.ones(4, complex))
    with pytest.raises(ValueError, match=r"weights of shape \[4\]"):
        loss(f, (f, jnp.ones((4, 1))))


def test_the_metric_alone_has_the_same_space_as_the_energy():
    x = jax.random.normal(key(0), (5, 2, 4))
    batches = {variance: None, local_energy: jnp.zeros((5, 2))}

    @jax.jit
    def grams_of(w):
        grams = []
        for loss, targets in batches.items():
            objective = curvax.Objective(linear, loss())
            space = curvax.solve.sample_space(objective, w, (x, targets), space="samples")
            grams.append(space.gram)
        return grams

    centred = (x - x.mean(axis=0)).swapaxes(0, 1).reshape(10, 4)
    for gram in grams_of(jnp.ones(4)):
        np.testing.assert_allclose(gram, centred @ centred.T / 5, atol=1e-12)
