"""Several kinds of outputs at once, with labels that are partly missing.

Each head is a mean over its own terms: labels of -1 are left out, and so are masked boxes. The box
has a learned variance, of which the curvature is the Fisher.
"""

import jax
import jax.numpy as jnp
import pytest
from loop import dense, mlp, train

import curvax
from curvax import losses

CLASSES = 3
LOSS = losses.weighted_sum(
    {
        "label": (1.0, losses.softmax_cross_entropy(ignore_index=-1)),
        "box": (0.5, losses.masked(losses.gaussian())),
        "count": (0.2, losses.poisson()),
    }
)
TRUE = jax.random.normal(jax.random.key(5), (6, CLASSES))


def model(params, x):
    f = mlp(params, x)
    box = f[:, CLASSES : CLASSES + 2], f[:, CLASSES + 2 : CLASSES + 4]
    return {"label": f[:, :CLASSES], "box": box, "count": f[:, -1:]}


def batch_of(key):
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (256, 6))
    y = x @ TRUE
    has_label, has_box = (jax.random.bernoulli(k, 0.7, (256,)) for k in keys[1:3])
    box = y[:, :2] + 0.1 * jax.random.normal(keys[3], (256, 2))
    targets = {
        "label": jnp.where(has_label, jnp.argmax(y, axis=1), -1),
        "box": (jnp.where(has_box[:, None], box, jnp.nan), has_box),
        "count": jax.random.poisson(keys[4], jnp.exp(0.5 * y[:, :1])),
    }
    return x, targets


@pytest.mark.parametrize("build", [curvax.kfac, curvax.ekfac])
def test_all_heads_train_together(build):
    objective, params = curvax.Objective(model, LOSS), dense(1, 6, 16, CLASSES + 5)
    layout = curvax.kron_layout(objective, params, batch_of(jax.random.key(0)))
    tx = build(0.1, objective, layout, damping=1e-2)
    _, loss = train(tx, objective, params, batch_of, 60)
    assert loss.max() < 1.3 * loss[0] and loss[-5:].mean() < 0.5 * loss[0]
