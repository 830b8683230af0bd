"""K-FAC in a loop of plain JAX, on scikit-learn's digits, with dropout. --smoke: few steps."""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import curvax

digits, num_steps = load_digits(), 50 if "--smoke" in sys.argv else 500
images, labels, num_train = jnp.asarray(digits.data / 16), jnp.asarray(digits.target), 1500


def model(params, inputs):
    x, key = inputs
    x = jax.nn.relu(x @ params["hidden"] + params["bias"])
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)
    return x @ params["head"]


keys = jax.random.split(jax.random.key(0), 3)
params = {
    "hidden": jax.random.normal(keys[0], (64, 64)) / 8,
    "bias": jnp.zeros(64),
    "head": jax.random.normal(keys[1], (64, 10)) / 8,
}
objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
# `Shared` marks what has no batch axis.
example = (images[:2], curvax.Shared(keys[2])), labels[:2]
layout = curvax.kron_layout(objective, params, example)
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
opt_state = tx.init(params)


@jax.jit
def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(objective)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
    return optax.apply_updates(params, updates), opt_state, loss


rows = jax.random.randint(jax.random.key(1), (num_steps, 256), 0, num_train)
for i, row in enumerate(tqdm(rows)):
    key = jax.random.fold_in(keys[2], i)
    batch = (images[row], curvax.Shared(key)), labels[row]
    params, opt_state, loss = step(params, opt_state, batch)

logits = model(params, (images[num_train:], None))
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
