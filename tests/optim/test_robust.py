"""Optimizers as their docstrings call them, trained for a few hundred mini-batch steps:
none may diverge.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import curvax

NUM_STEPS, BATCH_SIZE = 200, 512


class Classifier(nn.Module):
    """Three dense layers: the network of the README, one layer deeper."""

    @nn.compact
    def __call__(self, x):
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Attention(nn.Module):
    """One layer of self-attention over the eight rows of an image."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(16)(x.reshape(len(x), 8, 8))
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h))
        return nn.Dense(10)(h.mean(axis=1))


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)


@functools.cache
def task(module):
    objective = curvax.Objective(module.apply, curvax.losses.softmax_cross_entropy())
    params = module.init(jax.random.key(0), digits()[0][:2])
    return objective, params, curvax.kron_layout(objective, params, digits())


def train(tx, objective, params):
    """Train on random mini-batches; return the loss of all data before and after,
    and that of every batch.
    """
    images, labels = digits()
    drawn = np.random.default_rng(0).integers(0, len(labels), (NUM_STEPS, BATCH_SIZE))

    def step(carry, rows):
        params, state = carry
        batch = images[rows], labels[rows]
        loss, grads = jax.value_and_grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(drawn)))
    (trained, _), batch_losses = run(params)
    return objective(params, digits()), objective(trained, digits()), batch_losses


@pytest.mark.parametrize("module", [Classifier(), Attention()], ids=["classifier", "attention"])
@pytest.mark.parametrize("build", [curvax.kfac, curvax.ekfac], ids=["kfac", "ekfac"])
def test_the_call_of_the_readme_trains(build, module):
    objective, params, layout = task(module)
    tx = build(0.1, objective, layout, damping=1e-2, inverse_every=10)
    before, after, batch_losses = train(tx, objective, params)
    assert after < 0.15 * before
    assert batch_losses.max() < 1.6 * before  # and on the way it never was much above the start


def test_without_the_limit_on_the_step_the_same_call_diverges():
    objective, params, layout = task(Classifier())
    tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10, max_kl=None)
    before, after, _ = train(tx, objective, params)
    assert not after < before
