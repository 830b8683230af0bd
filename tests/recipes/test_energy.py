"""An energy-based model: its Fisher matrix is the covariance of gradients of the energy.

With p(x) proportional to exp(-E(x)) the gradient of the loss is the mean of E's gradients over the
data minus that over draws from the model, and the Fisher matrix is the covariance of E's gradients
over those draws. The objective therefore states the metric alone, `variance` of the energies; the
gradient is computed apart, and both meet in `update`. Stochastic reconfiguration of a wave function
is the same, with log psi for the energy.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from loop import dense, mlp

import curvax
from curvax import losses

# In one dimension the model can be drawn from exactly, and its loss be computed.
GRID = jnp.linspace(-4, 4, 200)[:, None]


def energy(params, x):
    return mlp(params, x)[:, 0] + 0.5 * x[:, 0] ** 2


def loss(params, data):
    log_partition = jax.nn.logsumexp(-energy(params, GRID))
    return jnp.mean(energy(params, data)) + log_partition


def draw(params, key, number):
    return GRID[jax.random.categorical(key, -energy(params, GRID), shape=(number,))]


def draw_data(key):
    sign = jax.random.rademacher(key, (256, 1), jnp.float32)
    return 2 * sign + 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (256, 1))


def test_a_density_of_two_modes_is_learned():
    metric = curvax.Objective(energy, losses.variance())
    params = dense(1, 1, 16, 1)
    layout = curvax.kron_layout(metric, params, (GRID, None))
    tx = curvax.kfac(0.1, metric, layout, damping=1e-2)

    def step(carry, key):
        params, state = carry
        data, draws = draw_data(key), draw(params, jax.random.fold_in(key, 2), 256)

        def contrast(params):
            return jnp.mean(energy(params, data)) - jnp.mean(energy(params, draws))

        grads = jax.grad(contrast)(params)
        updates, state = tx.update(grads, state, params, batch=(draws, None))
        return (optax.apply_updates(params, updates), state), loss(params, data)

    keys = jax.random.split(jax.random.key(2), 60)
    run = jax.jit(lambda params: lax.scan(step, (params, tx.init(params)), keys))
    _, losses_of_steps = run(params)
    assert losses_of_steps.max() < losses_of_steps[0] + 0.5
    assert losses_of_steps[-5:].mean() < losses_of_steps[0] - 1


def test_the_metric_refuses_ekfac_by_name():
    metric, params = curvax.Objective(energy, losses.variance()), dense(1, 1, 16, 1)
    tx = curvax.ekfac(0.1, metric, curvax.kron_layout(metric, params, (GRID, None)))
    with pytest.raises(TypeError, match="no sum over examples, of which EK-FAC takes"):
        tx.update(params, tx.init(params), params, batch=(GRID, None))
