"""A second process finds every program of a training step in JAX's persistent cache."""

import os
import subprocess
import sys

SCRIPT = """
import sys
import jax, jax.numpy as jnp, optax

misses = []
def count(event, **labels):
    if event == "/jax/compilation_cache/cache_misses":
        misses.append(event)

jax.monitoring.register_event_listener(count)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

import curvax
assert "scipy.stats" not in sys.modules, "takes longer to import than all of curvax"

def model(params, x):
    x = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return x @ params["head"]["w"] + params["head"]["b"]

params = {
    "hidden": {"w": jnp.full((3, 4), 0.1), "b": jnp.zeros(4)},
    "head": {"w": jnp.full((4, 2), 0.1), "b": jnp.zeros(2)},
}
objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
batch = jnp.ones((5, 3)), jnp.arange(5) % 2
layout = curvax.kron_layout(objective, params, batch)
for tx in (
    curvax.kfac(0.1, objective, layout, inverse_every=10),
    curvax.ekfac(0.1, objective, layout, inverse_every=10),
    curvax.sophia_h(0.1, objective),
    curvax.mfac(0.1, 4),
    curvax.gauss_newton(0.1, objective),
):
    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    step(params, tx.init(params), batch)
print(len(misses))
"""


def count_misses(cache, hash_seed):
    """Take a step with several optimizers in a new process; return how many programs it compiled.

    What Python orders by hash differs between processes, and must not get into a program.
    """
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    script = SCRIPT.replace("CACHE", repr(str(cache)))
    run = [sys.executable, "-c", script]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_a_second_process_compiles_nothing(tmp_path):
    assert count_misses(tmp_path, hash_seed=1) > 5
    assert count_misses(tmp_path, hash_seed=2) == 0
