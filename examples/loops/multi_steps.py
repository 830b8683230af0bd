"""K-FAC in `optax.MultiSteps`, on digits: a step for every four calls. --smoke: few steps."""

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
example = images[:2], labels[:2]
layout = curvax.kron_layout(objective, params, example)
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
# Its `gradient_transformation()` would drop what is passed by keyword: `update` does not.
multi_steps = optax.MultiSteps(tx, every_k_schedule=num_micro)
opt_state = multi_steps.init(params)
estimator = curvax.kron.estimator(objective, layout)
curvature = jax.eval_shape(estimator, params, example, jax.random.key(0))
curvature = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), curvature)


@jax.jit
def step(params, opt_state, curvature, batch, key):
    loss, grads = jax.value_and_grad(objective)(params, batch)
    # MultiSteps averages gradients. Curvature, which is kept as sums with their weights, is added
    # up here, from the first micro-batch to the last, in whose call the optimizer steps.
    is_first = opt_state.mini_step == 0
    new = estimator(params, batch, key)
    curvature = jax.tree.map(lambda x, y: jnp.where(is_first, y, x + y), curvature, new)
    updates, opt_state = multi_steps.update(grads, opt_state, params, curvature=curvature)
    return optax.apply_updates(params, updates), opt_state, curvature, loss


shape = (num_steps * num_micro, micro_size)
rows = jax.random.randint(jax.random.key(1), shape, 0, num_train)
for i, row in enumerate(tqdm(rows)):
    args = (images[row], labels[row]), jax.random.key(i)
    params, opt_state, curvature, loss = step(params, opt_state, curvature, *args)

logits = net.apply(params, images[num_train:])
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
