"""Distillation: cross-entropy with soft targets, beside that with the labels.

`softmax_cross_entropy` has labels as targets. For probabilities `from_function` needs the value and
how targets are drawn from the model; the Hessian `diag(p) - p p'` comes by itself.
"""

import jax
import jax.numpy as jnp
import pytest
from loop import dense, mlp, train
from sklearn.datasets import load_digits

import curvax
from curvax import losses

TEMPERATURE = 2.0


def soft_cross_entropy(logits, probabilities):
    return -jnp.mean(jnp.sum(probabilities * jax.nn.log_softmax(logits), axis=-1))


def sample(key, logits, probabilities):
    labels = jax.random.categorical(key, logits)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=probabilities.dtype)


SOFT = losses.from_function(soft_cross_entropy, sample=sample)
# Soft targets give gradients smaller by the square of the temperature, which the weight undoes.
LOSS = losses.weighted_sum(
    {"soft": (0.7 * TEMPERATURE**2, SOFT), "hard": (0.3, losses.softmax_cross_entropy())}
)


def student(params, x):
    logits = mlp(params, x)
    return {"soft": logits / TEMPERATURE, "hard": logits}


IMAGES, LABELS = (jnp.asarray(x) for x in load_digits(return_X_y=True))
IMAGES = IMAGES / 16
TEACHER = dense(7, 64, 10)


def teacher(x):
    """Stand in for a trained network: it is sure of the label, and less so of others."""
    return 4 * jax.nn.one_hot(LABELS, 10) + mlp(TEACHER, x)


PROBABILITIES = jax.nn.softmax(teacher(IMAGES) / TEMPERATURE)


def batch_of(key):
    rows = jax.random.randint(key, (256,), 0, len(IMAGES))
    return IMAGES[rows], {"soft": PROBABILITIES[rows], "hard": LABELS[rows]}


@pytest.mark.parametrize("build", [curvax.kfac, curvax.ekfac])
def test_a_student_learns_from_both(build):
    objective, params = curvax.Objective(student, LOSS), dense(1, 64, 32, 10)
    layout = curvax.kron_layout(objective, params, batch_of(jax.random.key(0)))
    tx = build(0.1, objective, layout, damping=1e-2)
    params, loss = train(tx, objective, params, batch_of, 60)
    # Of the loss there remains the entropy of the soft targets.
    entropy = soft_cross_entropy(jnp.log(PROBABILITIES), PROBABILITIES)
    excess = loss - 0.7 * TEMPERATURE**2 * entropy
    assert excess.max() < 1.2 * excess[0] and excess[-5:].mean() < 0.3 * excess[0]
    accuracy = jnp.mean(jnp.argmax(mlp(params, IMAGES), axis=1) == LABELS)
    assert accuracy > 0.85
