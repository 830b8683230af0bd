"""K-FAC with gradients and curvature summed over micro-batches, on digits. --smoke: few steps."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import curvax

digits, num_steps = load_digits(), 50 if "--smoke" in sys.argv else 500
images, labels, num_train = jnp.asarray(digits.data / 16), jnp.asarray(digits.target), 1500
num_micro, micro_size = 4, 64

net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
params = net.init(jax.random.key(0), images[:1])
objective = curvax.Objective(net.apply, curvax.losses.softmax_cross_entropy())
layout = curvax.kron_layout(objective, params, (images[:2], labels[:2]))
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
opt_state = tx.init(params)
estimator = curvax.kron.estimator(objective, layout)


@jax.jit
def step(params, opt_state, micro_batches, key):
    def of_micro_batch(batch_and_key):
        batch, key = batch_and_key
        loss, grads = jax.value_and_grad(objective)(params, batch)
        return loss, grads, estimator(params, batch, key)

    # One micro-batch at a time, so that memory is that of one.
    several = jax.lax.map(of_micro_batch, (micro_batches, jax.random.split(key, num_micro)))
    loss, grads, curvature = jax.tree.map(lambda x: x.mean(axis=0), several)
    # A curvature that is passed is used as it is: no batch is needed.
    updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
    return optax.apply_updates(params, updates), opt_state, loss


shape = (num_steps, num_micro, micro_size)
rows = jax.random.randint(jax.random.key(1), shape, 0, num_train)
for i, row in enumerate(tqdm(rows)):
    micro_batches = images[row], labels[row]
    params, opt_state, loss = step(params, opt_state, micro_batches, jax.random.key(i))

logits = net.apply(params, images[num_train:])
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
