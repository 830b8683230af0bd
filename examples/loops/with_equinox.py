"""K-FAC in an Equinox loop, on digits, with BatchNorm and dropout. --smoke: few steps."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits
from tqdm import tqdm

import curvax

digits, num_steps = load_digits(), 50 if "--smoke" in sys.argv else 500
images, labels, num_train = jnp.asarray(digits.data / 16), jnp.asarray(digits.target), 1500


def build(key):
    keys = jax.random.split(key)
    hidden, head = eqx.nn.Linear(64, 64, key=keys[0]), eqx.nn.Linear(64, 10, key=keys[1])
    norm, relu = eqx.nn.BatchNorm(64, "batch", mode="batch"), eqx.nn.Lambda(jax.nn.relu)
    return eqx.nn.Sequential([hidden, norm, relu, eqx.nn.Dropout(0.1), head])


net, state = eqx.nn.make_with_state(build)(jax.random.key(0))
params, static = eqx.partition(net, eqx.is_inexact_array)


# Statistics come in with the inputs, and go out as aux; every row has a dropout key of its own.
def model(params, inputs):
    x, keys, state = inputs
    net = eqx.combine(params, static)
    of_row = lambda x, key: net(x, state, key=key)
    return jax.vmap(of_row, out_axes=(0, None), axis_name="batch")(x, keys)


objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), has_aux=True)
example = (images[:2], jax.random.split(jax.random.key(0)), curvax.Shared(state)), labels[:2]
layout = curvax.kron_layout(objective, params, example)
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
opt_state = tx.init(params)


@eqx.filter_jit
def step(params, opt_state, state, x, y, key):
    keys = jax.random.split(key, len(x))
    batch = (x, keys, curvax.Shared(state)), y  # `Shared` marks what has no batch axis
    (loss, state), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
    return eqx.apply_updates(params, updates), opt_state, state, loss


rows = jax.random.randint(jax.random.key(1), (num_steps, 256), 0, num_train)
for i, row in enumerate(tqdm(rows)):
    args = images[row], labels[row], jax.random.key(i)
    params, opt_state, state, loss = step(params, opt_state, state, *args)

net = eqx.nn.inference_mode(eqx.combine(params, static))
logits = jax.vmap(lambda x: net(x, state)[0])(images[num_train:])
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
