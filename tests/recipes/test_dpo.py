"""Direct preference optimization: logistic regression on a difference of log probabilities.

The model returns beta times how much more the policy prefers the chosen sequence to the rejected
one than the reference does. The loss is `sigmoid_cross_entropy` with the target 1, whose curvature
`p (1 - p)` is the Fisher of Bradley and Terry's model of preferences. The reference goes into the
inputs as `curvax.Shared`, so that it is no parameter.
"""

import jax
import jax.numpy as jnp
import pytest
from loop import train

import curvax
from curvax import losses

TOKENS, LENGTH, BETA = 8, 6, 0.5


def log_probability(params, tokens):
    """Of sequences `[batch, time]`, each token given the one before."""
    h = jnp.tanh(params["embed"][tokens[:, :-1]])
    log_p = jax.nn.log_softmax(h @ params["head"])
    return jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0].sum(axis=1)


def model(params, inputs):
    def preference(p):
        return log_probability(p, inputs["chosen"]) - log_probability(p, inputs["rejected"])

    return BETA * (preference(params) - preference(inputs["reference"]))


REFERENCE = {
    "embed": jax.random.normal(jax.random.key(1), (TOKENS, 8)),
    "head": jax.random.normal(jax.random.key(2), (8, TOKENS)),
}


def batch_of(key):
    """Of two sequences the one with the smaller sum of tokens is chosen."""
    pair = jax.random.randint(key, (2, 128, LENGTH), 0, TOKENS)
    first_wins = (pair[0].sum(1) < pair[1].sum(1))[:, None]
    inputs = {
        "chosen": jnp.where(first_wins, pair[0], pair[1]),
        "rejected": jnp.where(first_wins, pair[1], pair[0]),
        "reference": curvax.Shared(REFERENCE),
    }
    return inputs, jnp.ones(128)


@pytest.mark.parametrize("build", [curvax.kfac, curvax.ekfac])
def test_preferences_are_learned(build):
    objective = curvax.Objective(model, losses.sigmoid_cross_entropy())
    layout = curvax.kron_layout(objective, REFERENCE, batch_of(jax.random.key(0)))
    tx = build(0.1, objective, layout, damping=1e-2)
    params, loss = train(tx, objective, REFERENCE, batch_of, 60)
    assert loss.max() < 1.2 * loss[0] and loss[-5:].mean() < 0.6 * loss[0]
    margins = objective.outputs(params, batch_of(jax.random.key(9))[0])
    assert jnp.mean(margins > 0) > 0.85
