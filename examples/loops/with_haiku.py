"""K-FAC in a Haiku loop, on digits, with BatchNorm and dropout. --smoke: few steps."""

import sys

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import curvax

digits, num_steps = load_digits(), 50 if "--smoke" in sys.argv else 500
images, labels, num_train = jnp.asarray(digits.data / 16), jnp.asarray(digits.target), 1500


@hk.transform_with_state
def net(x, is_training):
    x = hk.BatchNorm(True, True, decay_rate=0.9)(hk.Linear(64)(x), is_training)
    x = jax.nn.relu(x)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.1, x)
    return hk.Linear(10)(x)


# State and dropout key come in with the inputs; the new state goes out as aux.
def model(params, inputs):
    x, (state, key) = inputs
    return net.apply(params, state, key, x, is_training=True)


key = jax.random.key(0)
params, state = net.init(key, images[:2], is_training=True)
objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), has_aux=True)
example = (images[:2], curvax.Shared((state, key))), labels[:2]
layout = curvax.kron_layout(objective, params, example)
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
opt_state = tx.init(params)


@jax.jit
def step(params, opt_state, state, x, y, key):
    batch = (x, curvax.Shared((state, key))), y  # `Shared` marks what has no batch axis
    (loss, state), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
    return optax.apply_updates(params, updates), opt_state, state, loss


rows = jax.random.randint(jax.random.key(1), (num_steps, 256), 0, num_train)
for i, row in enumerate(tqdm(rows)):
    args = images[row], labels[row], jax.random.fold_in(key, i)
    params, opt_state, state, loss = step(params, opt_state, state, *args)

logits, _ = net.apply(params, state, None, images[num_train:], is_training=False)
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
