"""K-FAC with a model in float16 and loss scaling, on digits. --smoke: few steps."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from sklearn.datasets import load_digits
from tqdm import tqdm

import curvax

digits, num_steps = load_digits(), 50 if "--smoke" in sys.argv else 500
images, labels, num_train = jnp.asarray(digits.data / 16), jnp.asarray(digits.target), 1500

# Layers compute in float16; parameters, factors and the loss are in float32.
layers = [nn.Dense(64, dtype=jnp.float16), nn.relu, nn.Dense(10, dtype=jnp.float16)]
net = nn.Sequential([*layers, lambda x: x.astype(jnp.float32)])
params = net.init(jax.random.key(0), images[:1])
objective = curvax.Objective(net.apply, curvax.losses.softmax_cross_entropy())
layout = curvax.kron_layout(objective, params, (images[:2], labels[:2]))
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
# A scale that is too large gives gradients that are not finite: no step, and half the scale.
tx = optax.apply_if_finite(tx, max_consecutive_errors=20)
opt_state = tx.init(params)
scale = DynamicScale(scale=jnp.float32(2**20))  # an array, as later: a number compiles once more


@jax.jit
def step(params, opt_state, scale, batch):
    # Curvature needs no scale: its cotangents do not shrink with the batch as the gradient's do.
    scale, _, loss, grads = scale.value_and_grad(objective)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
    return optax.apply_updates(params, updates), opt_state, scale, loss


rows = jax.random.randint(jax.random.key(1), (num_steps, 256), 0, num_train)
for row in tqdm(rows):
    batch = images[row], labels[row]
    params, opt_state, scale, loss = step(params, opt_state, scale, batch)

print(f"{opt_state.total_notfinite} steps left out, scale {scale.scale:.0f}")
logits = net.apply(params, images[num_train:])
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
