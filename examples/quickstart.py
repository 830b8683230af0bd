"""Train a classifier of digits with K-FAC; then compare optimizers on it and on an autoencoder.

    python examples/quickstart.py                                   # six minutes on two cores
    python examples/quickstart.py --smoke                           # does it run? about 20 seconds
    python examples/quickstart.py --optimizers adam,kfac --steps 2000
    python examples/quickstart.py --data folder/with/mnist-idx-files

`train_with_kfac` is a training loop as you would write it, complete. The comparison below it
gives every optimizer the same initial parameters and batches, and its own learning rates to choose
from; `_compare.py` says how the table is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_split
from _compare import Batch, Method, Task, compare, grid, parse, parser
from sklearn.datasets import load_digits

import curvax


def train_with_kfac(num_steps: int) -> None:
    """Train a perceptron on scikit-learn's digits, and print the loss before and after."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)

    # The loss is an `Objective`, which keeps the model and the loss on its outputs apart.
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    objective = curvax.Objective(model.apply, curvax.losses.softmax_cross_entropy())
    params = model.init(jax.random.key(0), pixels[:1])

    # The layout says where each parameter enters a linear map; a few rows are enough to find out.
    layout = curvax.kron_layout(objective, params, (pixels[:2], labels[:2]))
    tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(objective)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(0)
    losses = []
    for _ in range(num_steps):
        rows = rng.integers(len(labels), size=256)
        params, opt_state, loss = step(params, opt_state, (pixels[rows], labels[rows]))
        losses.append(float(loss))
    print(f"K-FAC, {num_steps} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}\n")


# From here on: the comparison.

# Cautious at first, while the factors are those of a few batches; without, K-FAC needs ten times
# smaller rates.
DAMPING = optax.exponential_decay(1.0, transition_steps=10, decay_rate=0.5, end_value=1e-2)


def on_matrices(one_liner: Callable[..., optax.GradientTransformation], *rates: float) -> Method:
    """A rule on gradients, on the matrices that the model uses."""
    return Method(lambda task, rate: one_liner(rate, task.layout), grid(rate=rates))


# To compare another method, add a row. Sophia's weight decay is off, since the others have none.
METHODS = {
    "adam": Method(lambda task, rate: optax.adam(rate), grid(rate=(1e-3, 3e-3, 1e-2, 3e-2))),
    "adahessian": Method(
        lambda task, rate: curvax.adahessian(rate, task.objective),
        grid(rate=(0.01, 0.03, 0.1, 0.3)),
    ),
    "sophia_h": Method(
        lambda task, rate: curvax.sophia_h(rate, task.objective, weight_decay=0.0),
        grid(rate=(1e-4, 3e-4, 1e-3, 3e-3)),
    ),
    "sophia_g": Method(
        lambda task, rate: curvax.sophia_g(rate, task.objective, weight_decay=0.0),
        grid(rate=(1e-4, 3e-4, 1e-3, 3e-3)),
    ),
    "kfac": Method(
        lambda task, rate: curvax.kfac(
            rate, task.objective, task.layout, DAMPING, inverse_every=10
        ),
        grid(rate=(0.01, 0.03, 0.1, 0.3)),
    ),
    "ekfac": Method(
        lambda task, rate: curvax.ekfac(
            rate, task.objective, task.layout, DAMPING, inverse_every=10
        ),
        grid(rate=(0.003, 0.01, 0.03, 0.1)),
    ),
    "mfac": Method(
        lambda task, rate, damping: curvax.mfac(rate, 64, damping, momentum=0.9, divisor="count"),
        grid(rate=(0.003, 0.01), damping=(1e-3, 1e-2)),
    ),
    "shampoo": on_matrices(curvax.shampoo, 1e-3, 3e-3, 1e-2, 3e-2),
    "soap": on_matrices(curvax.soap, 1e-3, 3e-3, 1e-2, 3e-2),
    "kl_shampoo": on_matrices(curvax.kl_shampoo, 1e-3, 3e-3, 1e-2, 3e-2),
    "kl_soap": on_matrices(curvax.kl_soap, 1e-3, 3e-3, 1e-2, 3e-2),
    "asgo": on_matrices(curvax.asgo, 1e-3, 3e-3, 1e-2, 3e-2),
    "muon": on_matrices(curvax.muon, 3e-3, 1e-2, 3e-2, 0.1),
    "fismo": on_matrices(curvax.fismo, 1e-4, 1e-3, 1e-2),
    "psgd": on_matrices(lambda rate, layout: curvax.psgd(rate, layout=layout), 1e-3, 3e-3, 1e-2),
    "newton_muon": Method(
        lambda task, rate: curvax.newton_muon(rate, task.objective, task.layout),
        grid(rate=(3e-3, 1e-2, 3e-2, 0.1)),
    ),
    "mkor": Method(
        lambda task, rate: curvax.mkor(rate, task.objective, task.layout),
        grid(rate=(0.003, 0.01, 0.03, 0.1)),
    ),
}
SMOKE = ("adam", "kfac")


def classifier(images: np.ndarray, labels: np.ndarray, num_train: int, key: jax.Array) -> Task:
    """A perceptron with two hidden layers, softmax cross-entropy.

    Not a convolutional network: XLA runs convolutions within `scan` and `cond` many times slower
    on a CPU (https://github.com/jax-ml/jax/issues/12868), and this script is for laptops.
    """
    pixels = jnp.asarray(images.reshape(len(images), -1))
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
    objective = curvax.Objective(model.apply, curvax.losses.softmax_cross_entropy())

    def accuracy(params: Any, batch: Batch) -> jax.Array:
        return jnp.mean(jnp.argmax(objective.outputs(params, batch[0]), axis=-1) == batch[1])

    labels = jnp.asarray(labels)
    train, test = (pixels[:num_train], labels[:num_train]), (pixels[num_train:], labels[num_train:])
    return Task(
        "classifier", objective, model.init(key, pixels[:1]), train, test, "test accuracy", accuracy
    )


def autoencoder(images: np.ndarray, num_train: int, key: jax.Array) -> Task:
    """A deep autoencoder with a code of 16 numbers, half the squared error summed over pixels."""
    pixels = jnp.asarray(images.reshape(len(images), -1))
    layers: list[Any] = []
    for width in (256, 64, 16, 64, 256):
        layers += [nn.Dense(width), nn.tanh]
    model = nn.Sequential([*layers, nn.Dense(pixels.shape[1])])
    objective = curvax.Objective(model.apply, curvax.losses.squared_error())
    train, test = (pixels[:num_train],) * 2, (pixels[num_train:],) * 2
    return Task(
        "autoencoder", objective, model.init(key, pixels[:1]), train, test, "test loss", objective
    )


def main() -> None:
    flags = parser(__doc__, METHODS, steps=1000, batch=256, smoke=SMOKE)
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    args = parse(flags, METHODS)
    train_with_kfac(num_steps=10 if args.smoke else 200)
    images, labels, num_train = load_split(args.data)
    keys = jax.random.split(jax.random.key(args.seed))
    tasks = classifier(images, labels, num_train, keys[0]), autoencoder(images, num_train, keys[1])
    compare(tasks, args, "quickstart.png")


if __name__ == "__main__":
    main()
