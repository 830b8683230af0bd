"""A generative adversarial network: two objectives, two optimizers, each as usual.

Both losses are `sigmoid_cross_entropy` of the discriminator's logits. The other network goes into
the inputs as `curvax.Shared`: it is followed, and is no parameter.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from loop import dense, mlp

import curvax
from curvax import losses

CENTER, SIZE = jnp.array([2.0, -1.0]), 128


def generate(params, z):
    return mlp(params, z)


def discriminate(params, x):
    return mlp(params, x)[:, 0]


def logits_of_fakes(generator, inputs):
    return discriminate(inputs["discriminator"], generate(generator, inputs["z"]))


# The discriminator tells data (1) from fakes (0); fakes are meant to be taken for data.
DISCRIMINATOR = curvax.Objective(discriminate, losses.sigmoid_cross_entropy())
GENERATOR = curvax.Objective(logits_of_fakes, losses.sigmoid_cross_entropy())


def batches(generator, discriminator, key):
    z = jax.random.normal(key, (SIZE, 2))
    data = CENTER + 0.5 * jax.random.normal(jax.random.fold_in(key, 1), (SIZE, 2))
    both = jnp.concatenate([data, generate(generator, z)])
    labels = jnp.concatenate([jnp.ones(SIZE), jnp.zeros(SIZE)])
    inputs = {"z": z, "discriminator": curvax.Shared(discriminator)}
    return (both, labels), (inputs, jnp.ones(SIZE))


@pytest.mark.parametrize("build", [curvax.kfac, curvax.ekfac])
def test_fakes_move_to_the_data(build):
    generator, discriminator = dense(1, 2, 8, 2), dense(2, 2, 16, 1)
    of_discriminator, of_generator = batches(generator, discriminator, jax.random.key(0))
    tx_d = build(
        0.1,
        DISCRIMINATOR,
        curvax.kron_layout(DISCRIMINATOR, discriminator, of_discriminator),
        damping=1e-1,
        momentum=0.0,
    )
    tx_g = build(
        0.1,
        GENERATOR,
        curvax.kron_layout(GENERATOR, generator, of_generator),
        damping=1e-1,
        momentum=0.0,
    )

    def step(carry, key):
        generator, discriminator, state_g, state_d = carry
        of_discriminator, of_generator = batches(generator, discriminator, key)
        grads = jax.grad(DISCRIMINATOR)(discriminator, of_discriminator)
        updates, state_d = tx_d.update(grads, state_d, discriminator, batch=of_discriminator)
        discriminator = optax.apply_updates(discriminator, updates)
        grads = jax.grad(GENERATOR)(generator, of_generator)
        updates, state_g = tx_g.update(grads, state_g, generator, batch=of_generator)
        generator = optax.apply_updates(generator, updates)
        fakes = generate(generator, of_generator[0]["z"])
        return (generator, discriminator, state_g, state_d), fakes.mean(axis=0)

    carry = generator, discriminator, tx_g.init(generator), tx_d.init(discriminator)
    keys = jax.random.split(jax.random.key(3), 60)
    _, means = jax.jit(lambda carry: lax.scan(step, carry, keys))(carry)
    distances = jnp.linalg.norm(means - CENTER, axis=1)
    assert distances[-5:].mean() < 0.5 * distances[0]
