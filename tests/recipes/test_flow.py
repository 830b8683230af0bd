"""A normalizing flow: the model returns log densities, and the loss is minus their mean.

That is linear in the outputs, so there is no Gauss-Newton matrix. Two Fisher matrices there are:
that of the gradients at the data, `fisher="empirical"`, and that of the gradients at draws from the
flow, for which the same factors are estimated on a batch of draws.
"""

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from loop import dense, mlp, train

import curvax
from curvax import losses

NUM_LAYERS = 4


def coupling(layers, x):
    """Scale and shift the second coordinate by functions of the first, and exchange the two."""
    log_scale, shift = jnp.split(mlp(layers, x[:, :1]), 2, axis=1)
    return jnp.tanh(log_scale), shift


def log_density(params, x):
    log_det = 0.0
    for layers in params:
        log_scale, shift = coupling(layers, x)
        x = jnp.concatenate([x[:, 1:] * jnp.exp(log_scale) + shift, x[:, :1]], axis=1)
        log_det += log_scale[:, 0]
    return norm.logpdf(x).sum(axis=1) + log_det


def draw(params, key, number):
    x = jax.random.normal(key, (number, 2))
    for layers in reversed(params):
        first = x[:, 1:]
        log_scale, shift = coupling(layers, first)
        x = jnp.concatenate([first, (x[:, :1] - shift) * jnp.exp(-log_scale)], axis=1)
    return x


def batch_of(key):
    """Points about a bent line; a batch without targets."""
    t = jax.random.uniform(key, (256,), minval=-2, maxval=2)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (256, 2))
    return jnp.stack([t, t**2 - 1], axis=1) + 0.2 * noise, None


def problem():
    objective = curvax.Objective(log_density, losses.negative_log_density())
    params = [dense(i, 1, 16, 2) for i in range(NUM_LAYERS)]
    for layers in params:  # the flow begins as the identity
        layers[-1]["w"] = jnp.zeros((16, 2))
    return objective, params, curvax.kron_layout(objective, params, batch_of(jax.random.key(0)))


def check(losses_of_steps):
    assert losses_of_steps.max() < losses_of_steps[0] + 0.5
    assert losses_of_steps[-5:].mean() < losses_of_steps[0] - 1


def test_a_flow_trains_with_the_empirical_fisher():
    objective, params, layout = problem()
    tx = curvax.kfac(0.1, objective, layout, damping=1e-2, fisher="empirical")
    check(train(tx, objective, params, batch_of, 60)[1])
    # EK-FAC's damping is not spread over both factors, and so has to be larger.
    tx = curvax.ekfac(0.1, objective, layout, damping=1e-1, fisher="empirical")
    check(train(tx, objective, params, batch_of, 60)[1])


def test_a_flow_trains_with_the_fisher_of_its_own_draws():
    objective, params, layout = problem()

    def fisher(params, batch, key):
        draws = draw(params, key, len(batch[0])), None
        return curvax.kron_factors(objective, layout, params, draws, key, fisher="empirical")

    rule = curvax.estimating(curvax.scale_by_kfac(layout, damping=1e-2), fisher)
    tx = curvax.kl_clip(rule, learning_rate=0.1)
    check(train(tx, objective, params, batch_of, 60)[1])
