"""Proximal policy optimization: the policy's own Fisher as the curvature of its surrogate.

The clipped surrogate is not convex in the logits and is no likelihood, so its Hessian is no metric.
`from_function` states one: the curvature and the draws of `softmax_cross_entropy`, which is the
Fisher of the policy. The critic is a second head.
"""

import jax
import jax.numpy as jnp
import pytest
from loop import dense, mlp, train

import curvax
from curvax import losses

ACTIONS, FEATURES, CLIP = 5, 6, 0.2
of_policy = losses.softmax_cross_entropy()


def log_probability(logits, actions):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[:, None], axis=1)[:, 0]


def surrogate(logits, targets):
    ratio = jnp.exp(log_probability(logits, targets["action"]) - targets["log_probability"])
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    gain = jnp.minimum(ratio * targets["advantage"], clipped * targets["advantage"])
    entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=1)
    return -jnp.mean(gain + 0.01 * entropy)


POLICY = losses.from_function(
    surrogate,
    curvature_product=lambda f, y, v: of_policy.curvature_product(f, y["action"], v),
    pseudo_gradient=lambda key, f, y: of_policy.pseudo_gradient(key, f, y["action"]),
)
LOSS = losses.weighted_sum({"policy": (1.0, POLICY), "value": (0.5, losses.squared_error())})
BEST = jax.random.normal(jax.random.key(3), (FEATURES, ACTIONS))


def model(params, x):
    return {"policy": mlp(params["policy"], x), "value": mlp(params["value"], x)[:, 0]}


def rollout(params, key):
    """One step of play: states, actions of the policy, and the reward of the best action."""
    x = jax.random.normal(key, (256, FEATURES))
    outputs = model(params, x)
    actions = jax.random.categorical(jax.random.fold_in(key, 1), outputs["policy"])
    reward = (actions == jnp.argmax(x @ BEST, axis=1)).astype(jnp.float32)
    policy = {
        "action": actions,
        "log_probability": log_probability(outputs["policy"], actions),
        "advantage": reward - outputs["value"],
    }
    return (x, {"policy": policy, "value": reward}), reward.mean()


@pytest.mark.parametrize("build", [curvax.kfac, curvax.ekfac])
def test_the_policy_gains_reward(build):
    params = {"policy": dense(1, FEATURES, 16, ACTIONS), "value": dense(2, FEATURES, 16, 1)}
    objective = curvax.Objective(model, LOSS)
    batch, reward_before = rollout(params, jax.random.key(0))
    layout = curvax.kron_layout(objective, params, batch)
    tx = build(0.1, objective, layout, damping=1e-2)

    # A few steps on one batch of play, then new play.
    @jax.jit
    def iteration(params, key):
        batch, reward = rollout(params, key)
        return train(tx, objective, params, lambda key: batch, 5)[0], reward

    for key in jax.random.split(jax.random.key(4), 20):
        params, reward = iteration(params, key)
    assert reward > reward_before + 0.3
