"""A variational auto-encoder: the ELBO is a weighted sum of two outputs of one model.

Its reconstruction is a likelihood like any other, and its divergence from the prior is
`gaussian_kl`, which has the Fisher information of the code's Gaussian as curvature. (An ELBO as one
function of all outputs works too, for its gradient; but nothing could be sampled from it.)
"""

import jax
import jax.numpy as jnp
import pytest
from loop import dense, mlp, train
from sklearn.datasets import load_digits

import curvax
from curvax import losses

CODE = 4


def model(params, inputs):
    mean, log_variance = jnp.split(mlp(params["encoder"], inputs["x"]), 2, axis=1)
    # The noise comes with the inputs, a row for each example: the model itself is deterministic.
    code = mean + jnp.exp(log_variance / 2) * inputs["noise"]
    return {"reconstruction": mlp(params["decoder"], code), "kl": (mean, log_variance)}


ELBO = losses.weighted_sum(
    {
        "reconstruction": (1.0, losses.sigmoid_cross_entropy()),
        "kl": (1.0, losses.gaussian_kl()),
    }
)
DATA = jnp.asarray(load_digits().data / 16 > 0.5, jnp.float32)


def batch_of(key):
    rows, noise = jax.random.split(key)
    x = DATA[jax.random.randint(rows, (256,), 0, len(DATA))]
    noise = jax.random.normal(noise, (256, CODE))
    return {"x": x, "noise": noise}, {"reconstruction": x, "kl": None}


@pytest.mark.parametrize("build", [curvax.kfac, curvax.ekfac])
def test_an_elbo_trains(build):
    objective = curvax.Objective(model, ELBO)
    params = {"encoder": dense(1, 64, 32, 2 * CODE), "decoder": dense(2, CODE, 32, 64)}
    layout = curvax.kron_layout(objective, params, batch_of(jax.random.key(0)))
    tx = build(0.1, objective, layout, damping=1e-2)
    _, negative_elbo = train(tx, objective, params, batch_of, 60)
    assert negative_elbo.max() < 1.5 * negative_elbo[0]
    assert negative_elbo[-5:].mean() < 0.6 * negative_elbo[0]
