"""Contrastive learning: `contrastive` on pairs of embeddings, each against all of the batch.

The loss compares the examples of a batch, so its curvature is that of the whole batch: K-FAC takes
it, what works on single examples (EK-FAC, microbatches) refuses it by name.
"""

import jax
import jax.numpy as jnp
import pytest
from loop import dense, mlp, train

import curvax
from curvax import losses


def model(params, views):
    embeddings = [mlp(params, view) for view in views]
    return tuple(x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in embeddings)


def batch_of(key):
    """Two noisy views of the same points, the noise in eight coordinates of sixteen."""
    points, *keys = jax.random.split(key, 3)
    x = jax.random.normal(points, (64, 8))
    views = [jnp.concatenate([x, 3 * jax.random.normal(k, (64, 8))], axis=1) for k in keys]
    return tuple(views), None


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_pairs_find_each_other(fisher):
    objective = curvax.Objective(model, losses.contrastive(temperature=0.2, symmetric=True))
    params = dense(1, 16, 16, 4)
    layout = curvax.kron_layout(objective, params, batch_of(jax.random.key(0)))
    tx = curvax.kfac(0.1, objective, layout, damping=1e-2, fisher=fisher)
    _, info_nce = train(tx, objective, params, batch_of, 60)
    assert info_nce.max() < 1.1 * info_nce[0]
    assert info_nce[-5:].mean() < 0.7 * info_nce[0]
