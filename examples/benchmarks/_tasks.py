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
from jax.scipy.stats import norm
from sklearn.datasets import load_digits, make_moons

import curvax
from curvax._xla import fast_convs_in_loops

NUM_SYMBOLS, LENGTH = 96, 32


class Task(NamedTuple):
    """A model with its objective and data.

    Attributes:
      name: one word.
      objective: what is minimized.
      init: `key -> params`.
      draw: `key -> batch`, a random mini-batch.
      fisher: which Fisher matrix exists for this loss.
    """

    name: str
    objective: curvax.Objective
    init: Callable[[jax.Array], Any]
    draw: Callable[[jax.Array], Any]
    fisher: str = "mc"

    def layout(self) -> curvax.kron.Layout:
        """Its layout, from shapes alone."""
        key = jax.random.key(0)
        params, batch = jax.eval_shape(lambda key: (self.init(key), self.draw(key)), key)
        return curvax.kron_layout(self.objective, params, batch)


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


class Vae(nn.Module):
    """An encoder to a Gaussian over codes, and a decoder from one draw of it."""

    code: int = 4

    @nn.compact
    def __call__(self, inputs):
        h = nn.tanh(nn.Dense(32)(inputs["x"]))
        mean, log_variance = jnp.split(nn.Dense(2 * self.code)(h), 2, axis=1)
        code = mean + jnp.exp(log_variance / 2) * inputs["noise"]
        pixels = nn.Dense(64)(nn.tanh(nn.Dense(32)(code)))
        return {"pixels": pixels, "kl": (mean, log_variance)}


class Flow(nn.Module):
    """Four coupling layers in two dimensions, which begin as the identity."""

    @nn.compact
    def __call__(self, x):
        log_det = 0.0
        for _ in range(4):
            h = nn.tanh(nn.Dense(16)(x[:, :1]))
            h = nn.Dense(2, kernel_init=nn.initializers.zeros)(h)
            log_scale, shift = jnp.tanh(h[:, 0]), h[:, 1]
            x = jnp.stack([x[:, 1] * jnp.exp(log_scale) + shift, x[:, 0]], axis=1)
            log_det += log_scale
        return norm.logpdf(x).sum(axis=1) + log_det


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


def _supervised(
    name: str, module: nn.Module, loss: Any, inputs: Any, targets: Any, batch_size: int = 256
) -> Task:
    """A network with a loss, on rows of data that are drawn with replacement."""
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)

    def init(key: jax.Array) -> Any:
        return module.init(key, inputs[:2])

    def draw(key: jax.Array) -> Any:
        rows = jax.random.randint(key, (batch_size,), 0, len(inputs))
        return inputs[rows], targets[rows]

    return Task(name, curvax.Objective(module.apply, loss), init, draw)


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
    return _supervised("resnet", ResNet(), loss, *_digits(), batch_size=32)


def char_transformer() -> Task:
    windows = _windows_of_text()
    loss = curvax.losses.softmax_cross_entropy()
    inputs, targets = windows[:, :-1], windows[:, 1:]
    return _supervised("characters", CharTransformer(), loss, inputs, targets, batch_size=32)


def autoencoder() -> Task:
    images, _ = _digits()
    loss = curvax.losses.sigmoid_cross_entropy()
    return _supervised("autoencoder", Autoencoder(), loss, images, images)


def vae() -> Task:
    """The ELBO: a likelihood and a divergence, two heads of one model whose noise is an input."""
    images = jnp.asarray(_digits()[0])
    kinds = {"pixels": curvax.losses.sigmoid_cross_entropy(), "kl": curvax.losses.gaussian_kl()}
    loss = curvax.losses.weighted_sum({name: (1.0, kind) for name, kind in kinds.items()})

    def draw(key: jax.Array) -> Any:
        key_rows, key_noise = jax.random.split(key)
        x = images[jax.random.randint(key_rows, (256,), 0, len(images))]
        noise = jax.random.normal(key_noise, (256, Vae.code))
        return {"x": x, "noise": noise}, {"pixels": x, "kl": None}

    def init(key: jax.Array) -> Any:
        return Vae().init(key, draw(key)[0])

    return Task("vae", curvax.Objective(Vae().apply, loss), init, draw)


def flow() -> Task:
    """Log densities of points about two half circles."""
    points = make_moons(2048, noise=0.1, random_state=0)[0].astype(np.float32)

    def draw(key: jax.Array) -> Any:
        return jnp.asarray(points)[jax.random.randint(key, (256,), 0, len(points))], None

    def init(key: jax.Array) -> Any:
        return Flow().init(key, draw(key)[0])

    objective = curvax.Objective(Flow().apply, curvax.losses.negative_log_density())
    return Task("flow", objective, init, draw, fisher="empirical")


TASKS = {
    "classifier": classifier,
    "deep": deep_classifier,
    "zero-head": zero_head,
    "resnet": resnet,
    "characters": char_transformer,
    "autoencoder": autoencoder,
    "vae": vae,
    "flow": flow,
}


class Run(NamedTuple):
    """Losses of members, of which each has a rate and a seed; each axis is `[member, ...]`.

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
    data = [task.draw(jax.random.key(-1 - i)) for i in range(4)]
    value_and_grad = fast_convs_in_loops(jax.value_and_grad(task.objective))

    def evaluate(params: Any) -> jax.Array:
        return sum(task.objective(params, batch) for batch in data) / len(data)

    def run(rate: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        key_params, key_batches = jax.random.split(jax.random.key(seed))
        params = task.init(key_params)
        tx = optax.with_extra_args_support(build(rate))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            batch = task.draw(key)
            loss, grads = value_and_grad(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        keys = jax.random.split(key_batches, num_steps)
        (trained, _), batches = jax.lax.scan(step, (params, tx.init(params)), keys)
        return evaluate(params), evaluate(trained), batches

    pairs = [(rate, seed) for rate in rates for seed in seeds]
    rate, seed = (jnp.asarray(column) for column in zip(*pairs, strict=True))
    # One after another: members side by side would have convolutions in groups, which are slow.
    members = jax.jit(lambda pairs: jax.lax.map(lambda pair: run(*pair), pairs))
    return Run(*map(np.asarray, members((rate, seed))))
