"""K-FAC in `nnx.Optimizer`, on digits, with BatchNorm and dropout. --smoke: few steps."""

import sys

import jax
import jax.numpy as jnp
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import curvax

digits, num_steps = load_digits(), 50 if "--smoke" in sys.argv else 500
images, labels, num_train = jnp.asarray(digits.data / 16), jnp.asarray(digits.target), 1500


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(64, 64, rngs=rngs), nnx.BatchNorm(64, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


net = Net(nnx.Rngs(0))
graph, params, other = nnx.split(net, nnx.Param, ...)


# As a pure function: what is not differentiated comes in with the inputs, and goes out as aux.
def model(params, inputs):
    x, other = inputs
    net = nnx.merge(graph, params, other, copy=True)
    return net(x), nnx.state(net, nnx.Not(nnx.Param))


objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), has_aux=True)
example = (images[:2], curvax.Shared(other)), labels[:2]
layout = curvax.kron_layout(objective, params, example)
tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)


@nnx.jit
def step(net, optimizer, x, y):
    _, params, other = nnx.split(net, nnx.Param, ...)
    batch = (x, curvax.Shared(other)), y  # `Shared` marks what has no batch axis
    (loss, other), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
    optimizer.update(net, grads, batch=batch)
    nnx.update(net, other)
    return loss


rows = jax.random.randint(jax.random.key(1), (num_steps, 256), 0, num_train)
for row in tqdm(rows):
    loss = step(net, optimizer, images[row], labels[row])

net.eval()
logits = net(images[num_train:])
print(f"loss {loss:.3f}, test accuracy {jnp.mean(logits.argmax(-1) == labels[num_train:]):.3f}")
