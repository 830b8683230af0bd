"""Kernels of recurrent networks over time: lags by hand, and inverses against explicit sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.kron import WeightedMean
from curvax.kron._over_time import sum_over_lags

pytestmark = pytest.mark.usefixtures("x64")

BATCH, TIMES, INPUTS, HIDDEN, CLASSES = 8, 5, 2, 3, 4
OVER_TIME = ("time_symmetric", "time_infinite")
KERNEL = "['h']"


def rnn(params, x, perturb=0.0):
    """An Elman network `[b, t, i] -> [b, t, classes]`."""

    def step(h, inputs):
        a, p = inputs
        h = jnp.tanh(a @ params["x"] + h @ params["h"] + p)
        return h, (h @ params["out"], h)

    perturb = jnp.broadcast_to(perturb, (TIMES, len(x), HIDDEN))
    h = jnp.zeros((len(x), HIDDEN), x.dtype)
    _, (outputs, _) = jax.lax.scan(step, h, (x.swapaxes(0, 1), perturb))
    return outputs.swapaxes(0, 1)


LOSS = curvax.losses.softmax_cross_entropy(ignore_index=-1)
OBJECTIVE = curvax.Objective(rnn, LOSS)
RNG = np.random.default_rng(0)
PARAMS = {
    "x": RNG.normal(size=(INPUTS, HIDDEN)),
    "h": 0.7 * RNG.normal(size=(HIDDEN, HIDDEN)),
    "out": RNG.normal(size=(HIDDEN, CLASSES)),
}
LENGTHS = np.array([5, 3, 4, 5, 1, 5, 2, 5])
LABELS = RNG.integers(0, CLASSES, (BATCH, TIMES))
DATA = (
    RNG.normal(size=(BATCH, TIMES, INPUTS)),
    np.where(np.arange(TIMES) < LENGTHS[:, None], LABELS, -1),
)


def layout_of(sharing):
    # On host devices the arrays of NumPy are float64 as soon as they are JAX's.
    return curvax.kron_layout(OBJECTIVE, PARAMS, DATA).edit(KERNEL, sharing=sharing)


@jax.jit
def factors_of(params, batch):
    layout = layout_of("time_infinite")
    return curvax.kron_factors(
        OBJECTIVE, layout, params, batch, jax.random.key(0), fisher="empirical"
    )


def rows_by_hand():
    """Inputs and cotangents of the recurrent kernel, `[b, t, .]`, from a program of its own."""
    x, labels = DATA
    hs = [np.zeros((BATCH, HIDDEN))]
    for t in range(TIMES):
        hs.append(np.tanh(x[:, t] @ PARAMS["x"] + hs[-1] @ PARAMS["h"]))
    loss = lambda p: LOSS(rnn(PARAMS, jnp.asarray(x), p), jnp.asarray(labels))
    by_time = jax.grad(loss)(jnp.zeros((TIMES, BATCH, HIDDEN)))
    # r = sqrt(N) times the gradient of the mean loss of N terms
    g = np.sqrt(LENGTHS.sum()) * np.asarray(by_time).swapaxes(0, 1)
    return np.stack(hs[:-1], axis=1), g


def test_lags_are_those_of_rows_by_hand():
    """Sequences of different lengths: times behind the end have no cotangent and do not count."""
    a, g = rows_by_hand()
    counts = np.any(g != 0, axis=2)
    assert (counts.sum(axis=1) == LENGTHS).all()
    a = a * counts[..., None]
    number = counts.sum()
    block = factors_of(PARAMS, DATA).blocks[KERNEL]
    expected = {
        "A": (block.a.mean[0], np.einsum("bti,btj->ij", a, a) / number),
        "G": (block.g.mean[0], np.einsum("bti,btj->ij", g, g)),
        "A1": (block.lags.a.mean[0], np.einsum("bti,btj->ij", a[:, 1:], a[:, :-1]) / number),
        "G1": (block.lags.g.mean[0], np.einsum("bti,btj->ij", g[:, 1:], g[:, :-1])),
        "T": (block.lags.length.mean[0], LENGTHS.mean()),
    }
    for name, (got, want) in expected.items():
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12, err_msg=name)


def test_factors_are_the_same_in_chunks_and_on_eight_devices():
    whole = factors_of(PARAMS, DATA)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), DATA)
    layout = layout_of("time_infinite")
    in_chunks = curvax.kron_factors(
        OBJECTIVE, layout, PARAMS, DATA, jax.random.key(0), fisher="empirical", microbatch=3
    )
    for got in (factors_of(PARAMS, sharded), in_chunks):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), got, whole
        )


def powers(matrix, number):
    """The powers 0 to number - 1."""
    result = [np.eye(len(matrix))]
    for _ in range(number - 1):
        result.append(result[-1] @ matrix)
    return result


def chain(size, seed, is_symmetric):
    """A moment, its root, and a Psi whose singular values are at most .6."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    root = q * rng.uniform(0.5, 2, size) @ q.T
    psi = rng.normal(size=(size, size))
    psi = psi + psi.T if is_symmetric else psi
    return root @ root, root, 0.6 * psi / np.linalg.norm(psi, 2)


def with_chains(factors, a, g, length):
    """The factors with these moments and lags for the recurrent kernel."""
    one = jnp.ones(1)
    mean = lambda x, weight: WeightedMean(jnp.asarray(x)[None], weight)
    (A, root_a, psi_a), (G, root_g, psi_g) = a, g
    block = factors.blocks[KERNEL]
    lags = block.lags._replace(
        a=mean(root_a @ psi_a @ root_a, one),
        g=mean(root_g @ psi_g @ root_g, jnp.ones(())),
        length=WeightedMean(length * one, one),
    )
    block = block._replace(a=mean(A, one), g=mean(G, jnp.ones(())), lags=lags)
    return factors._replace(blocks=factors.blocks | {KERNEL: block})


@pytest.mark.parametrize("sharing, num_lags", [("time_symmetric", 6), ("time_infinite", 80)])
def test_inverses_are_those_of_the_explicit_sum_over_lags(sharing, num_lags):
    """`F = sum_k c_k A_k x G_k`, with `c_k = 1 - |k| / T` for T = 6 and 1 for infinite T."""
    is_symmetric = sharing == "time_symmetric"
    a, g = chain(HIDDEN, 1, is_symmetric), chain(HIDDEN, 2, is_symmetric)
    factors = with_chains(factors_of(PARAMS, DATA), a, g, 6.0)
    F = np.zeros((HIDDEN**2, HIDDEN**2))
    psi_a, psi_g = powers(a[2], num_lags), powers(g[2], num_lags)
    for k in range(num_lags):
        weight = 1 - k / 6 if is_symmetric else 1.0
        term = weight * np.kron(a[1] @ psi_a[k] @ a[1], g[1] @ psi_g[k] @ g[1])
        F += term if k == 0 else term + term.T
    inverse = curvax.kron_inverse(layout_of(sharing), factors, 1e-28)
    V = {**PARAMS, "h": RNG.normal(size=(HIDDEN, HIDDEN))}
    got = inverse(V)["h"]
    np.testing.assert_allclose(got.ravel(), np.linalg.solve(F, V["h"].ravel()), rtol=1e-8)
    if is_symmetric:
        forward = curvax.kron_inverse(layout_of(sharing), factors, 1e-28, power=1.0)
        np.testing.assert_allclose(forward({**PARAMS, "h": got})["h"], V["h"], rtol=1e-8)


def test_the_sum_over_lags_is_its_closed_form():
    x = np.array([-0.999, -0.5, 0.0, 1e-9, 0.3, 0.9, 1 - 1e-4, 1 - 1e-6])
    for steps in (1, 2, 7, 100):
        k = np.arange(1, steps)[:, None]
        explicit = 1 + 2 * np.sum((1 - k / steps) * x**k, axis=0)
        got = sum_over_lags(jnp.asarray(x), jnp.asarray(float(steps)))
        np.testing.assert_allclose(got, explicit, rtol=1e-8)


@pytest.mark.parametrize("sharing", OVER_TIME)
def test_kfac_trains_a_recurrent_network(sharing):
    """In bfloat16, under `scan`; at the start the hidden states of a step forward are zero."""
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * p, jnp.bfloat16), PARAMS)
    x = jnp.asarray(DATA[0], jnp.bfloat16)
    # Whether the sum of the inputs so far is positive.
    batch = (x, (jnp.cumsum(x.astype(jnp.float32), axis=1)[..., 0] > 0).astype(jnp.int32))
    layout = layout_of(sharing)
    tx = curvax.kfac(0.1, OBJECTIVE, layout, damping=1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(OBJECTIVE)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), length=40)

    (_, state), losses = train(params)
    assert losses[-1] < 0.4 * losses[0]
    lags = optax.tree.get(state, "lags", filtering=lambda path, x: x is not None)
    assert lags.a.total.dtype == jnp.float32
    assert jnp.any(lags.a.total != 0)


def test_what_has_no_times_is_refused():
    x, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
    flat = curvax.Objective(lambda p, x: x @ p["w"], curvax.losses.softmax_cross_entropy())
    layout = curvax.kron_layout(flat, {"w": jnp.ones((2, 3))}, (x, labels))
    edited = layout.edit("['w']", sharing="time_infinite")
    with pytest.raises(ValueError, match="one position of an example only"):
        curvax.kron_factors(flat, edited, {"w": jnp.ones((2, 3))}, (x, labels), jax.random.key(0))
    over_time = layout_of("time_symmetric")
    with pytest.raises(ValueError, match=r"\['h'\] has diagonal and full factors"):
        over_time.edit(KERNEL, a_structure="diagonal")
    with pytest.raises(ValueError, match="no Kronecker eigenbasis"):
        curvax.kron.kron_basis(over_time, factors_of(PARAMS, DATA))
    with pytest.raises(ValueError, match="factors have no lags"):
        plain = curvax.kron_layout(OBJECTIVE, PARAMS, DATA)
        key = jax.random.key(0)
        factors = curvax.kron_factors(OBJECTIVE, plain, PARAMS, DATA, key, fisher="empirical")
        curvax.kron_inverse(over_time, factors, 0.1)
    with pytest.raises(ValueError, match=r"the power -0\.5 is not known"):
        curvax.kron_inverse(over_time, factors_of(PARAMS, DATA), 0.1, power=-0.5)
