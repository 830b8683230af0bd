"""Rules on gradients, inside a `shard_map` of the user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax

RULES = {
    "kl_shampoo": curvax.kl_shampoo(0.01),
    "muon": curvax.muon(0.01),
    "mfac": curvax.mfac(0.01, window_size=4),
}


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]


@pytest.mark.usefixtures("x64")
def test_two_steps_are_those_of_one_device():
    """With gradients that the user has averaged, every device takes the same step."""
    objective = curvax.Objective(model, curvax.losses.squared_error())
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 6), "v": (6, 3), "b": (3,)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    batch = tuple(jnp.asarray(rng.standard_normal((16, size))) for size in (4, 3))

    def two_steps(params, batch, mean):
        results = {}
        for name, rule in RULES.items():
            tx = optax.with_extra_args_support(rule)
            stepped, state = params, tx.init(params)
            for _ in range(2):
                gradient = mean(jax.grad(objective)(stepped, batch))
                updates, state = tx.update(gradient, state, stepped)
                stepped = optax.apply_updates(stepped, updates)
            results[name] = stepped
        return results

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    inside = jax.shard_map(
        lambda params, batch: two_steps(params, batch, lambda g: jax.lax.pmean(g, "data")),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    here = jax.jit(inside)(params, batch)
    alone = jax.jit(lambda params, batch: two_steps(params, batch, lambda g: g))(params, batch)
    near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13)
    jax.tree.map(near, here, alone)
