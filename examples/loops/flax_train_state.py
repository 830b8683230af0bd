"""K-FAC in Flax's `TrainState`, on digits, with BatchNorm and dropout. --smoke: few steps."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from sklearn.datasets import load_digits
from tqdm import tqdm

import curvax

digits, num_steps = load_digits(), 50 if "--smoke" in sys.argv else 500
images, labels, num_train = jnp.asarray(digits.data / 16), jnp.asarray(digits.target), 1500


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(not train)(nn.Dense(64)(x)))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))


class TrainState(train_state.TrainState):
    stats: dict


# Statistics and dropout key come in with the inputs, `Shared` as they have no batch axis.
def model(params, inputs):
    x, (stats, rngs) = inputs
    return net.apply({"params": params, **stats}, x, True, rngs=rngs, mutable="batch_stats")


net, key = Net(), jax.random.key(0)
stats = net.init(key, images[:1], train=False)  # statistics and, first, params
params = stats.pop("params")
objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), has_aux=True)
example = (images[:2], curvax.Shared((stats, {"dropout": key}))), labels[:2]
layout = curvax.kron_layout(objective, params, example)
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
state = TrainState.create(apply_fn=net.apply, params=params, tx=tx, stats=stats)


@jax.jit
def step(state, x, y):
    batch = (x, curvax.Shared((state.stats, {"dropout": jax.random.fold_in(key, state.step)}))), y
    (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, batch=batch)
    params = optax.apply_updates(state.params, updates)  # all as `apply_gradients`, but for `batch`
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, stats=stats), loss


rows = jax.random.randint(jax.random.key(1), (num_steps, 256), 0, num_train)
for row in tqdm(rows):
    state, loss = step(state, images[row], labels[row])

logits = net.apply({"params": state.params, **state.stats}, images[num_train:], train=False)
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
