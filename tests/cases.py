"""Small models with their objectives, params and batches,
shared by all tests that compare with dense matrices.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import curvax
from curvax import losses


class Case(NamedTuple):
    objective: curvax.Objective
    params: object
    batch: tuple
    mixes_examples: bool = False


class Mlp(nn.Module):
    features: tuple = (4, 3)

    @nn.compact
    def __call__(self, x):
        for width in self.features[:-1]:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(self.features[-1])(x)


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (2, 2))(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(nn.LayerNorm()(x))
        return nn.Dense(3)(x + h)


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=x.dtype))(x))


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(4)(x))
        return {"label": nn.Dense(3)(h), "box": nn.Dense(2)(h)}


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.result_type(float))


def _labels(seed, shape, classes):
    return jax.random.randint(jax.random.key(seed), shape, 0, classes)


def once(build):
    """Build a case once in each precision; its tests share it."""
    built = functools.cache(lambda dtype: build())
    return functools.wraps(build)(lambda: built(jnp.result_type(float)))


def _linen(module, x, loss, targets):
    moved = lambda p: (
        p.astype(x.dtype) + 0.1 * jax.random.normal(jax.random.key(2), p.shape, x.dtype)
    )
    params = jax.jit(lambda x: jax.tree.map(moved, module.init(jax.random.key(1), x)["params"]))(x)
    return Case(
        curvax.Objective(lambda p, x: module.apply({"params": p}, x), loss), params, (x, targets)
    )


@once
def mlp():
    return _linen(
        Mlp(),
        _normal(0, 7, 3),
        losses.softmax_cross_entropy(label_smoothing=0.1),
        _labels(1, (7,), 3),
    )


@once
def cnn():
    return _linen(
        Cnn(), _normal(0, 5, 4, 4, 1), losses.softmax_cross_entropy(), _labels(1, (5,), 3)
    )


@once
def attention():
    return _linen(
        Attention(), _normal(0, 4, 3, 3), losses.softmax_cross_entropy(), _labels(1, (4, 3), 3)
    )


@once
def lstm():
    return _linen(Lstm(), _normal(0, 4, 3, 2), losses.squared_error(), _normal(1, 4, 3, 2))


@once
def masked_sequence():
    labels = _labels(1, (5, 4), 3).at[0, 1:].set(-1).at[2].set(-1).at[4, 3].set(-1)
    return _linen(Mlp(), _normal(0, 5, 4, 3), losses.softmax_cross_entropy(ignore_index=-1), labels)


@once
def masked_regression():
    mask = jnp.array([[1, 1, 0.5], [1, 0, 0], [0, 0, 0], [2, 1, 1]])
    return _linen(
        Mlp((4, 2)),
        _normal(0, 4, 3, 3),
        losses.masked(losses.squared_error()),
        (_normal(1, 4, 3, 2), mask),
    )


@once
def user_loss():
    def pseudo_huber(outputs, targets):
        return jnp.mean(jnp.sum(jnp.sqrt(1 + (outputs - targets) ** 2), axis=-1))

    return _linen(Mlp((4, 2)), _normal(0, 5, 3), pseudo_huber, _normal(1, 5, 2))


@once
def multi_head():
    loss = losses.weighted_sum(
        {
            "label": (0.7, losses.softmax_cross_entropy(ignore_index=-1)),
            "box": (2.0, losses.squared_error()),
        }
    )
    targets = {"label": _labels(1, (5,), 3).at[jnp.array([1, 2])].set(-1), "box": _normal(2, 5, 2)}
    return _linen(TwoHeads(), _normal(0, 5, 3), loss, targets)


@once
def sigmoid():
    return _linen(
        Mlp((4, 2)), _normal(0, 5, 3), losses.sigmoid_cross_entropy(), _labels(1, (5, 2), 2)
    )


@once
def poisson():
    return _linen(Mlp((4, 2)), _normal(0, 5, 3), losses.poisson(), _labels(1, (5, 2), 4))


@once
def gaussian():
    case = _linen(Mlp((4, 4)), _normal(0, 5, 3), losses.gaussian(), _normal(1, 5, 2))
    model = lambda p, x: tuple(jnp.split(case.objective.model(p, x), 2, axis=-1))
    return case._replace(objective=curvax.Objective(model, losses.gaussian()))


@once
def shared_statistics():
    """Dropout key and running statistics in the inputs, aux from the model."""

    def model(params, inputs):
        keep = jax.random.bernoulli(inputs["key"], 0.8, (3,))
        h = jnp.tanh((inputs["x"] - inputs["mean"]) * keep @ params[0])
        return h @ params[1], {"activation": h.mean()}

    objective = curvax.Objective(model, losses.squared_error(), has_aux=True)
    inputs = {
        "x": _normal(0, 5, 3),
        "mean": curvax.Shared(_normal(3, 3)),
        "key": curvax.Shared(jax.random.key(5)),
    }
    return Case(objective, [_normal(1, 3, 4), _normal(2, 4, 2)], (inputs, _normal(4, 5, 2)))


@once
def shared_targets():
    """Weights of the output entries come with the targets, for all examples."""

    def value(f, y):
        return jnp.mean(jnp.sum(y["weights"] * (f - y["values"]) ** 2, axis=-1)) / 2

    def sample(key, f, y):
        return {
            **y,
            "values": f + jax.random.normal(key, f.shape, f.dtype) / jnp.sqrt(y["weights"]),
        }

    targets = {"values": _normal(1, 2, 2), "weights": curvax.Shared(jnp.array([1.0, 9.0]))}
    return _linen(
        Mlp((4, 2)), _normal(0, 2, 3), losses.from_function(value, sample=sample), targets
    )


CASES = {
    f.__name__: f
    for f in (
        mlp,
        cnn,
        attention,
        lstm,
        masked_sequence,
        masked_regression,
        user_loss,
        multi_head,
        sigmoid,
        poisson,
    )
} | {f.__name__: f for f in (gaussian, shared_statistics, shared_targets)}
SAMPLED = [name for name in CASES if name != "user_loss"]
