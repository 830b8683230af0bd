"""The training loop of all recipes: any of curvax's optimizers is told the batch, no more."""

import jax
import optax
from jax import lax


def train(tx, objective, params, batch_of, num_steps):
    """Train on `batch_of(key)`; return the params and the loss before every step."""

    def step(carry, key):
        params, state = carry
        batch = batch_of(key)
        loss, grads = jax.value_and_grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(jax.random.key(0), num_steps)
    run = jax.jit(lambda params: lax.scan(step, (params, tx.init(params)), keys))
    (params, _), losses = run(params)
    return params, losses


def dense(seed, *widths):
    """Kernels and biases of a network of dense layers."""
    keys = jax.random.split(jax.random.key(seed), len(widths))
    return [
        {"w": jax.random.normal(k, (i, o)) / i**0.5, "b": jax.numpy.zeros(o)}
        for k, i, o in zip(keys, widths, widths[1:], strict=False)
    ]


def mlp(layers, x):
    for layer in layers[:-1]:
        x = jax.numpy.tanh(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]
