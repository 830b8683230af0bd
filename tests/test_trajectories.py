"""What users compute stays what it was while the house is rebuilt: recorded before the first step, compared to 1e-9.

`python tests/test_trajectories.py` records; the test compares. It is removed with the last step of the rebuilding.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import losses
from curvax.apps import influence

RECORD = Path(__file__).with_suffix(".npz")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def sequence_model(p, x):
    """Two layers with biases at every position, a scanned stack between them, and a gain in no block."""
    h = jnp.tanh(x @ p["w1"] + p["b1"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
    return (h @ p["w2"] + p["b2"]) * p["gain"]


def tied_model(p, ids):
    """A table that is looked up and, transposed, the head; a convolution along the sequence between them."""
    h = p["table"][ids]
    h = h + jnp.tanh(
        jax.lax.conv_general_dilated(
            h, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
    )
    return h @ p["table"].T


def tasks():
    shapes = {"w1": (3, 4), "b1": (4,), "stack": (2, 4, 4), "w2": (4, 3), "b2": (3,), "gain": (3,)}
    params = {
        name: jnp.asarray(0.7 * normal(i, *shape)) for i, (name, shape) in enumerate(shapes.items())
    }
    batch = (
        jnp.asarray(normal(10, 8, 2, 3)),
        jnp.asarray(np.random.default_rng(11).integers(0, 3, (8, 2))),
    )
    yield (
        "sequence",
        curvax.Objective(sequence_model, losses.softmax_cross_entropy()),
        params,
        batch,
    )
    params = {
        "table": jnp.asarray(0.5 * normal(0, 7, 4)),
        "conv": jnp.asarray(0.3 * normal(1, 3, 4, 4)),
    }
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 7, (6, 5)))
    yield (
        "tied",
        curvax.Objective(tied_model, losses.softmax_cross_entropy()),
        params,
        (ids, jnp.roll(ids, -1, 1)),
    )


def optimizers(objective, layout):
    yield "adahessian", curvax.adahessian(0.05, objective, curvature_every=2)
    yield "sophia_h", curvax.sophia_h(0.05, objective, curvature_every=2, seed=3)
    yield "sophia_g", curvax.sophia_g(0.05, objective, curvature_every=2)
    for name in ("kfac", "ekfac"):
        build = functools.partial(getattr(curvax, name), 0.05, objective, layout)
        yield name, build(damping=1e-2)
        yield (
            f"{name} every",
            build(damping=lambda t: 0.1 / (t + 1), curvature_every=2, inverse_every=3),
        )
    yield "kfac unlimited", curvax.kfac(1e-3, objective, layout, momentum=0.0, max_kl=None)
    rule = curvax.estimating(scale_by_kfac_exact(layout), factors_of(objective, layout))
    yield (
        "kfac tuned",
        curvax.levenberg_marquardt(
            curvax.quadratic_model(rule, objective), objective, 1.0, every=2
        ),
    )
    yield "mfac", curvax.mfac(0.05, window_size=4, damping=0.1, momentum=0.5)
    yield "gauss_newton", curvax.gauss_newton(0.5, objective, 0.1)
    yield "newton_cg", curvax.newton_cg(0.5, objective, 0.1)
    yield "egn", curvax.egn(0.5, objective, 0.1)
    yield "saddle_free_newton", curvax.saddle_free_newton(0.5, objective, 0.1, num_steps=8)
    yield "lazy_newton", curvax.lazy_newton(0.5, objective, 0.1, curvature_every=2)
    yield (
        "gradient_regularized_newton",
        curvax.gradient_regularized_newton(objective, curvature_every=2),
    )


def scale_by_kfac_exact(layout):
    return curvax.scale_by_kfac(layout, damping_scheme="exact", inverse_every=2, stagger=True)


def factors_of(objective, layout):
    return curvax.kron.estimator(objective, layout)


def trained(tx, objective, params, batch):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(objective)(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    carry = params, tx.init(params)
    for _ in range(5):
        carry = step(*carry)
    return carry[0]


def curvatures(objective, params, batch):
    """Products, estimates, factors, inverses, solves, spectra and scores; each a function of the objective's arrays."""
    key, g = jax.random.key(7), jax.grad(objective)(params, batch)
    ggn, hessian = (
        curvax.ggnvp(objective, params, batch),
        curvax.hvp(objective, params, batch, microbatch=3),
    )
    yield "hvp", hessian(g)
    yield "ggnvp", ggn(g)
    yield "fishervp", curvax.fishervp(objective, params, batch, key, num_samples=2)(g)
    yield "empirical_fishervp", curvax.empirical_fishervp(objective, params, batch, microbatch=3)(g)
    yield "hutchinson_diagonal", curvax.hutchinson_diagonal(ggn, params, key, num_probes=3)
    yield "hutchinson_trace", curvax.hutchinson_trace(ggn, params, key, num_probes=3)
    yield "gauss_newton_bartlett", curvax.gauss_newton_bartlett(objective, params, batch, key)
    yield "cg", curvax.cg(ggn, g, damping=0.1)[0]
    yield "minres", curvax.solve.minres(hessian, g, damping=0.1, tol=1e-12)[0]
    yield "direct", curvax.solve.direct(sample_space(objective, params, batch), g, damping=0.1)[0]
    yield "eigsh", curvax.eigsh(ggn, params, 3, key)[0][0]
    yield "density", curvax.spectral_density(ggn, params, key, num_probes=2, num_steps=10)[0].nodes
    for sharing in ("expand", "reduce"):
        layout = curvax.kron_layout(objective, params, batch, sharing=sharing)
        for fisher, microbatch in (("mc", None), ("exact", 3), ("empirical", None)):
            factors = factors_by(objective, layout, params, batch, key, fisher, microbatch)
            yield f"kron {sharing} {fisher}", curvax.kron_inverse(layout, factors, 0.1)(g)
            yield (
                f"kron root {sharing} {fisher}",
                curvax.kron_inverse(layout, factors, 0.1, power=-0.5)(g),
            )
        yield f"kron factored {sharing}", factored(layout, factors, 0.1)(g)
        moments = moments_by(objective, layout, factors, params, batch, key)
        yield f"moments {sharing}", moments(g)


def sample_space(objective, params, batch):
    return curvax.solve.sample_space(objective, params, batch, space="samples")


def factors_by(objective, layout, params, batch, key, fisher, microbatch):
    return curvax.kron_factors(
        objective, layout, params, batch, key, fisher=fisher, microbatch=microbatch
    )


def factored(layout, factors, damping):
    return curvax.kron_inverse(layout, factors, damping, damping_scheme="factored")


def moments_by(objective, layout, factors, params, batch, key):
    basis = curvax.kron.kron_basis(layout, factors)
    moments = curvax.kron.kron_moments(objective, layout, basis, params, batch, key, microbatch=3)
    return curvax.kron_inverse(layout, moments, 0.1)


def scores(objective, params, batch):
    layout = curvax.kron_layout(objective, params, batch)
    batches = [jax.tree.map(lambda x: x[:4], batch), jax.tree.map(lambda x: x[4:], batch)]
    fitted = influence.fit(objective, layout, params, batches, jax.random.key(3), progress=False)
    queries = jax.tree.map(lambda x: x[:2], batch)
    for method in ("ekfac", "kfac", "cg"):
        result, _ = influence_of(fitted, objective, params, queries, batches, method)
        yield f"influence {method}", result.change_if_removed
    yield "self-influence", influence.self_influence(fitted, objective, params, batches)


def influence_of(fitted, objective, params, queries, batches, method):
    return influence.influence(fitted, objective, params, queries, batches, method=method)


def computed(task):
    """All results of a task as flat arrays, by name."""
    name, objective, params, batch = task
    layout = curvax.kron_layout(objective, params, batch)
    results = {
        key: trained(tx, objective, params, batch) for key, tx in optimizers(objective, layout)
    }
    results |= jax.jit(lambda p, b: dict(curvatures(objective, p, b)))(params, batch)
    results |= dict(scores(objective, params, batch))
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return {f"{name}: {key}": flat(tree) for key, tree in results.items()}


@pytest.mark.parametrize("task", range(2))
def test_results_are_what_they_were(x64, task):
    recorded = np.load(RECORD)
    for name, got in computed(list(tasks())[task]).items():
        want = recorded[name]
        np.testing.assert_allclose(
            got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max(), err_msg=name
        )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    np.savez_compressed(
        RECORD, **{name: x for task in tasks() for name, x in computed(task).items()}
    )
