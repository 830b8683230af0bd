"""Solve Poisson's equation with a network: residuals inside, values on the boundary.

    python examples/pinn.py            # a minute on two cores
    python examples/pinn.py --smoke    # does it run? some seconds

The two conditions have points of their own, and as many as they need. `curvax.total` makes them
parts of one objective, whose batch is a dict; every method of the library takes it. The network
learns u with `-(u_xx + u_yy) = 2 pi^2 sin(pi x) sin(pi y)` on the unit square and u = 0 around it;
the solution is `sin(pi x) sin(pi y)`. After 500 steps Adam's relative error is 9e-2, K-FAC's 1e-3,
and 8e-4 where the Kronecker products of the two parts are inverted as they are.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import print_table

import curvax

Params = list[dict[str, jax.Array]]


def solution(points: jax.Array) -> jax.Array:
    return jnp.prod(jnp.sin(jnp.pi * points), axis=-1, keepdims=True)


def init(key: jax.Array, widths: tuple[int, ...]) -> Params:
    """Initial weights of variance 1 / inputs."""
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        w = jax.random.normal(jax.random.fold_in(key, number), (inputs, outputs)) / inputs**0.5
        layers.append({"w": w, "b": jnp.zeros(outputs)})
    return layers


def network(params: Params, points: jax.Array) -> jax.Array:
    *hidden, last = params
    h = points
    for layer in hidden:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    return h @ last["w"] + last["b"]


def minus_laplacian(params: Params, points: jax.Array) -> jax.Array:
    """Second derivatives of the network at every point; nothing has to be registered for them."""

    def at_point(x: jax.Array) -> jax.Array:
        # By forward mode no kernel is used transposed, and each part is one Kronecker product.
        hessian = jax.jacfwd(jax.jacfwd(lambda x: network(params, x)[0]))(x)
        return -jnp.trace(hessian)[None]

    return jax.vmap(at_point)(points)


def sample(key: jax.Array, num_interior: int, num_boundary: int) -> dict[str, Any]:
    """Points and what is asked there, of both parts."""
    inside, along, side = jax.random.split(key, 3)
    points = jax.random.uniform(inside, (num_interior, 2))
    # Points on the four sides: one coordinate is 0 or 1.
    t = jax.random.uniform(along, (num_boundary, 1))
    sides = jax.random.randint(side, (num_boundary, 1), 0, 4)
    edge = (sides % 2).astype(t.dtype)
    boundary = jnp.where(sides < 2, jnp.hstack([t, edge]), jnp.hstack([edge, t]))
    return {
        "interior": (points, 2 * jnp.pi**2 * solution(points)),
        "boundary": (boundary, jnp.zeros((num_boundary, 1))),
    }


def objective_of_both(weight: float) -> curvax.Objective:
    error = curvax.losses.squared_error()
    parts = {
        "interior": curvax.Objective(minus_laplacian, error),
        "boundary": curvax.Objective(network, error),
    }
    return curvax.total(parts, weights={"boundary": weight})


def train(
    objective: curvax.Objective, tx: Any, params: Params, num_steps: int, seed: int
) -> tuple[jax.Array, float]:
    """Return the relative error of the solution after training, and the seconds it took."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params: Params) -> Params:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            batch = sample(key, 256, 64)
            gradient = jax.grad(objective)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(seed), num_steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params

    compiled = run.lower(params).compile()
    start = time.perf_counter()
    trained = jax.block_until_ready(compiled(params))
    seconds = time.perf_counter() - start
    axis = jnp.linspace(0, 1, 41)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    error = network(trained, grid) - solution(grid)
    return jnp.linalg.norm(error) / jnp.linalg.norm(solution(grid)), seconds


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    flags.add_argument("--steps", type=int, default=500)
    args = flags.parse_args()
    num_steps = 20 if args.smoke else args.steps

    params = init(jax.random.key(0), (2, 32, 32, 1))
    objective = objective_of_both(weight=100.0)
    layout = curvax.kron_layout(objective, params, sample(jax.random.key(1), 4, 4))
    print(layout)
    # Interior and boundary are a Kronecker product each: their sum can be inverted as it is.
    both = layout
    for leaf in layout.leaves:
        if leaf.path.endswith("['w']"):
            both = both.edit(leaf.path, two_products="exact")

    rate = optax.cosine_decay_schedule(1.0, num_steps)
    kfac_rate = lambda count: 0.1 * rate(count)
    methods = {
        "adam": optax.adam(lambda count: 1e-2 * rate(count)),
        "kfac": curvax.kfac(kfac_rate, objective, layout, damping=1e-2),
        "kfac, two products": curvax.kfac(kfac_rate, objective, both, damping=1e-2),
    }
    rows = []
    for name, tx in methods.items():
        error, seconds = train(objective, tx, params, num_steps, seed=2)
        rows.append([name, f"{error:.2e}", f"{seconds:.1f}"])
    print_table(f"{num_steps} steps", ("method", "relative error", "seconds"), rows)


if __name__ == "__main__":
    main()
