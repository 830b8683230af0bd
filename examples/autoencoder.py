"""Train the deep autoencoder of the K-FAC paper with Adam, SGD with momentum, and K-FAC.

    python examples/autoencoder.py                                  # scikit-learn's digits
    python examples/autoencoder.py --data folder/with/mnist-idx-files --steps 2000
    python examples/autoencoder.py --smoke                          # does it run? about 20 seconds

Hidden layers of 1000-500-250-30-250-500-1000 units, tanh but for the 30 of the code, which are
linear; pixels are probabilities, the loss is their cross-entropy. `_compare.py` says how the table
is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_split
from _compare import Batch, Method, Task, compare, grid, parse, parser

import curvax


def kfac(task: Task, rate: float, damping: float) -> optax.GradientTransformation:
    """K-FAC with a fixed rate.

    Damping comes down to its value in fifty steps: sooner, the first steps go too far.
    """
    schedule = lambda step: damping * (1 + 99 * 0.9**step)
    return curvax.kfac(
        rate, task.objective, task.layout, schedule, curvature_every=5, inverse_every=10
    )


def kfac_lm(task: Task, damping: float) -> optax.GradientTransformation:
    """K-FAC as in the paper: rate and momentum minimize the quadratic model, damping adapts to how
    well that predicts.
    """
    objective, layout = task.objective, task.layout
    estimator = curvax.kron.estimator(objective, layout)
    rule = curvax.estimating(
        curvax.scale_by_kfac(layout, inverse_every=10), estimator, curvature_every=5
    )
    return curvax.levenberg_marquardt(
        curvax.quadratic_model(rule, objective), objective, damping, bounds=(1e-2, 1e8)
    )


METHODS = {
    "adam": Method(lambda task, rate: optax.adam(rate), grid(rate=(3e-4, 1e-3, 3e-3, 1e-2))),
    "sgd": Method(
        lambda task, rate: optax.sgd(rate, momentum=0.9), grid(rate=(1e-3, 3e-3, 1e-2, 3e-2))
    ),
    "kfac": Method(kfac, grid(rate=(0.03, 0.1), damping=(0.3, 1.0, 3.0))),
    "kfac_lm": Method(kfac_lm, grid(damping=(1.0, 10.0))),
}


def autoencoder(images: np.ndarray, num_train: int, widths: list[int], seed: int) -> Task:
    """Encode to `widths[-1]` numbers, and decode in the opposite order."""
    pixels = jnp.asarray(images.reshape(len(images), -1))
    *hidden, code = widths
    layers: list[Any] = []
    for width in hidden:
        layers += [nn.Dense(width), nn.tanh]
    layers.append(nn.Dense(code))
    for width in reversed(hidden):
        layers += [nn.Dense(width), nn.tanh]
    model = nn.Sequential([*layers, nn.Dense(pixels.shape[1])])
    objective = curvax.Objective(model.apply, curvax.losses.sigmoid_cross_entropy())

    def squared_error(params: Any, batch: Batch) -> jax.Array:
        return jnp.mean(
            jnp.sum((nn.sigmoid(objective.outputs(params, batch[0])) - batch[1]) ** 2, axis=-1)
        )

    train, test = (pixels[:num_train],) * 2, (pixels[num_train:],) * 2
    params = model.init(jax.random.key(seed), pixels[:1])
    return Task("autoencoder", objective, params, train, test, "test squared error", squared_error)


def main() -> None:
    flags = parser(__doc__, METHODS, steps=500, batch=512)
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    flags.add_argument(
        "--widths", default="1000,500,250,30", help="of the encoder; the last is the code"
    )
    args = parse(flags, METHODS)
    widths = [64, 8] if args.smoke else [int(width) for width in args.widths.split(",")]
    images, _, num_train = load_split(args.data)
    compare([autoencoder(images, num_train, widths, args.seed)], args, "autoencoder.png")


if __name__ == "__main__":
    main()
