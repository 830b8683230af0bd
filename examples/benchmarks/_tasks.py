"""Small training tasks of different kinds, and training on them over many seeds and rates at once.

Each is a network on data that comes with Python or scikit-learn, small enough that two hundred
steps take seconds, and each has something that breaks second-order methods: layers whose curvature
is zero at the start, convolutions, attention, a deep bottleneck, outputs that are a distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits, make_moons

import curvax

NUM_SYMBOLS, LENGTH = 96, 32


class Task(NamedTuple):
    """A model with its objective and data.

    Attributes:
      name: one word.
      objective: what is minimized.
      init: `key -> params`.
      inputs: rows of inputs.
      targets: rows of targets.
      batch_size: rows of a mini-batch.
      fisher: which Fisher matrix exists for this loss.
    """

    name: str
    objective: curvax.Objective
    init: Callable[[jax.Array], Any]
    inputs: jax.Array
    targets: jax.Array
    batch_size: int = 256
    fisher: str = "mc"


class Classifier(nn.Module):
    """Dense layers with rectifiers; `zero_head` starts the last one at zero."""

    widths: tuple[int, ...] = (64, 64)
    zero_head: bool = False

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        head = nn.initializers.zeros if self.zero_head else nn.initializers.lecun_normal()
        return nn.Dense(10, kernel_init=head)(x)


class ResNet(nn.Module):
    """Two residual blocks of convolutions, each of which starts as the identity (zero gammas)."""

    channels: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.channels, (3, 3))(x.reshape(len(x), 8, 8, 1)))
        for _ in range(2):
            h = nn.relu(nn.GroupNorm(4)(nn.Conv(self.channels, (3, 3))(x)))
            h = nn.Conv(self.channels, (3, 3))(h)
            x = nn.relu(x + nn.GroupNorm(4, scale_init=nn.initializers.zeros)(h))
        return nn.Dense(10)(x.mean((1, 2)))


class CharTransformer(nn.Module):
    """One layer of causal attention and a perceptron, over characters."""

    width: int = 32

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(NUM_SYMBOLS, self.width)(tokens)
        h = h + self.param("position", nn.initializers.normal(0.02), (LENGTH, self.width))
        mask = nn.make_causal_mask(tokens)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h), mask=mask)
        h = h + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        return nn.Dense(NUM_SYMBOLS)(nn.LayerNorm()(h))


class Autoencoder(nn.Module):
    """Tanh layers down to eight numbers and up again."""

    @nn.compact
    def __call__(self, x):
        for width in (48, 24):
            x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dense(8)(x)
        for width in (24, 48):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(64)(x)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


@functools.cache
def _windows_of_text() -> np.ndarray:
    """Windows of 33 characters from a source file of the standard library."""
    text = Path(functools.__file__).read_text(encoding="utf-8", errors="replace")
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32) - 32
    codes = np.where((codes < 0) | (codes >= NUM_SYMBOLS), NUM_SYMBOLS - 1, codes)
    num_windows = len(codes) // (LENGTH + 1)
    return codes[: num_windows * (LENGTH + 1)].reshape(num_windows, LENGTH + 1)


def _supervised(name: str, module: nn.Module, loss: Any, inputs: Any, targets: Any, **options: Any):
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
    objective = curvax.Objective(module.apply, loss)
    init = lambda key: module.init(key, inputs[:2])
    return Task(name, objective, init, inputs, targets, **options)


def classifier() -> Task:
    return _supervised(
        "classifier", Classifier(), curvax.losses.softmax_cross_entropy(), *_digits()
    )


def deep_classifier() -> Task:
    module = Classifier((64, 64, 64))
    return _supervised("deep", module, curvax.losses.softmax_cross_entropy(), *_digits())


def zero_head() -> Task:
    module = Classifier(zero_head=True)
    return _supervised("zero-head", module, curvax.losses.softmax_cross_entropy(), *_digits())


def resnet() -> Task:
    loss = curvax.losses.softmax_cross_entropy()
    return _supervised("resnet", ResNet(), loss, *_digits(), batch_size=128)


def char_transformer() -> Task:
    windows = _windows_of_text()
    loss = curvax.losses.softmax_cross_entropy()
    inputs, targets = windows[:, :-1], windows[:, 1:]
    return _supervised("characters", CharTransformer(), loss, inputs, targets, batch_size=32)


def autoencoder() -> Task:
    images, _ = _digits()
    loss = curvax.losses.sigmoid_cross_entropy()
    return _supervised("autoencoder", Autoencoder(), loss, images, images)


class Run(NamedTuple):
    """Losses of members trained side by side; each axis is `[member, ...]`.

    Attributes:
      before: on data fixed for all, before the first step.
      after: on the same data after the last step.
      batches: of every mini-batch, `[member, step]`.
    """

    before: np.ndarray
    after: np.ndarray
    batches: np.ndarray


def train(
    task: Task,
    build: Callable[[jax.Array], optax.GradientTransformation],
    rates: Any,
    seeds: Any,
    num_steps: int,
) -> Run:
    """Train every pair of a rate and a seed, all of them in one compiled program."""
    num_eval = min(len(task.inputs), 1024)
    data = task.inputs[:num_eval], task.targets[:num_eval]

    def run(rate: jax.Array, seed: jax.Array):
        key_params, key_rows = jax.random.split(jax.random.key(seed))
        params = task.init(key_params)
        tx = optax.with_extra_args_support(build(rate))
        shape = num_steps, task.batch_size
        rows = jax.random.randint(key_rows, shape, 0, len(task.inputs))

        def step(carry, drawn):
            params, state = carry
            batch = task.inputs[drawn], task.targets[drawn]
            loss, grads = jax.value_and_grad(task.objective)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        (trained, _), batches = jax.lax.scan(step, (params, tx.init(params)), rows)
        return task.objective(params, data), task.objective(trained, data), batches

    pairs = [(rate, seed) for rate in rates for seed in seeds]
    rate, seed = (jnp.asarray(column) for column in zip(*pairs, strict=True))
    return Run(*map(np.asarray, jax.jit(jax.vmap(run))(rate, seed)))
