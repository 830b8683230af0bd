"""One of two processes, with two devices each, that fit together what one process fits alone.

`python processes.py PORT RANK FOLDER`: the first process compares, and exits with 0 if all is well.
"""

import contextlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax._host import on_host
from curvax.apps import influence


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def means(tree):
    is_mean = lambda x: isinstance(x, curvax.kron.WeightedMean)
    return on_host(jax.tree.map(lambda x: x.mean, tree, is_leaf=is_mean))


class Interrupted(Exception):
    pass


def first_of(batches):
    yield batches[0]
    raise Interrupted


class EndsEarly:
    """Batches whose second reading ends after the first of them."""

    def __init__(self, batches):
        self.batches, self.readings = batches, 0

    def __iter__(self):
        self.readings += 1
        return first_of(self.batches) if self.readings == 2 else iter(self.batches)


def main(port, rank, folder):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    draws = np.random.default_rng(0)
    params = {"w": draws.normal(size=(4, 8)), "v": draws.normal(size=(8, 3))}
    rows = draws.normal(size=(16, 4)), np.arange(16) % 3
    batches = [tuple(x[:8] for x in rows), tuple(x[8:] for x in rows)]
    objective, key = (
        curvax.Objective(model, curvax.losses.softmax_cross_entropy()),
        jax.random.key(5),
    )
    alone = jax.tree.map(jnp.asarray, (params, rows))
    layout = curvax.kron_layout(objective, *alone)

    def spread(rows):
        sharding = NamedSharding(mesh, P("data"))
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    def fit(params, batches, folder):
        options = {"fisher": "exact", "folder": folder, "progress": False}
        return influence.fit(objective, layout, params, batches, key, **options)

    together = jax.tree.map(spread, (params, batches))
    saving = curvax.kron.Saving(folder, every=1)
    with contextlib.suppress(Interrupted):
        fit(together[0], EndsEarly(together[1]), saving)
    fits = [fit(*together, saving), influence.load(folder, objective, layout, together[0])]
    # What each process computes from all rows, on a device of its own.
    arguments = objective, layout, *alone, key
    factors = curvax.kron_factors(*arguments, fisher="exact")
    for fitted in fits:
        assert not fitted.missing
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        jax.tree.map(close, means(fitted.factors), means(factors))
        basis = jax.tree.map(jnp.asarray, on_host(fitted.eigen.basis))
        eigen = curvax.kron.kron_moments(objective, layout, basis, *alone, key, fisher="exact")
        jax.tree.map(close, means(fitted.eigen.moments), means(eigen.moments))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
