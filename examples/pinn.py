"""Solve Poisson's equation with a network: residuals inside, values on the boundary.

    python examples/pinn.py                        # 2 dimensions, six methods for 30 seconds each
    python examples/pinn.py --problem 5d           # 5 dimensions, new points in every step
    python examples/pinn.py --smoke                # does it run? some seconds

The two conditions have points of their own, and as many as they need. `curvax.total` makes them
parts of one objective, whose batch is a dict; every method of the library takes it. The problems
are those by which second-order methods for physics-informed networks are compared, in float64:

    2d   -(u_xx + u_yy) = f on the unit square, solution sin(pi x) sin(pi y); a network 2-64-1 of
         257 parameters; a grid of 900 points inside and of 120 on the boundary.
    5d   solution sum_i cos(pi x_i), a network 5-64-1 of 449 parameters; 3,000 points inside and 500
         on the boundary, drawn again in every step.

Published for 2d, with 1,000 seconds on a GPU for each method: relative error 6.2e-8 by energy
natural gradient descent, 2.0e-7 by K-FAC, 9.4e-5 by Adam, 1.6e-4 by L-BFGS (Dangel, Mueller and
Zeinhofer, 2024, https://arxiv.org/abs/2405.15603, from the logs beside its code).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import print_table
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax

Params = list[dict[str, jax.Array]]


class Problem(NamedTuple):
    """An equation `-Laplacian u = source` on the unit cube, with values on its boundary.

    Attributes:
      dimension: of the cube.
      solution: u at points `[n, dimension]`, `[n, 1]`.
      source: f at points.
      points: `key -> (inside, boundary)`.
      damping: of Gauss-Newton steps, in units of an eigenvalue.
    """

    dimension: int
    solution: Callable[[jax.Array], jax.Array]
    source: Callable[[jax.Array], jax.Array]
    points: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    damping: float


def product_of_sines(points: jax.Array) -> jax.Array:
    return jnp.prod(jnp.sin(jnp.pi * points), axis=-1, keepdims=True)


def sum_of_cosines(points: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cos(jnp.pi * points), axis=-1, keepdims=True)


def grid_points(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A grid of 30 by 30 inside of the square, and 30 points on each side."""
    del key
    axis = jnp.linspace(0, 1, 32)[1:-1]
    inside = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    t = jnp.linspace(0, 1, 30)[:, None]
    sides = [jnp.hstack(pair) for edge in (0 * t, 0 * t + 1) for pair in ([t, edge], [edge, t])]
    return inside, jnp.concatenate(sides)


def random_points(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """3,000 points inside of the cube in 5 dimensions, 500 on its faces."""
    for_inside, for_faces, for_axis, for_side = jax.random.split(key, 4)
    inside = jax.random.uniform(for_inside, (3000, 5))
    faces = jax.random.uniform(for_faces, (500, 5))
    # On a face one coordinate is 0 or 1.
    axis = jax.random.randint(for_axis, (500,), 0, 5)
    side = jax.random.bernoulli(for_side, shape=(500,)).astype(faces.dtype)
    return inside, faces.at[jnp.arange(500), axis].set(side)


PROBLEMS = {
    "2d": Problem(
        dimension=2,
        solution=product_of_sines,
        source=lambda x: 2 * jnp.pi**2 * product_of_sines(x),
        points=grid_points,
        damping=1e-13,
    ),
    # Directions that points of one step hardly determine are those in which steps are too long.
    "5d": Problem(
        dimension=5,
        solution=sum_of_cosines,
        source=lambda x: jnp.pi**2 * sum_of_cosines(x),
        points=random_points,
        damping=1e-8,
    ),
}


def init(key: jax.Array, widths: tuple[int, ...]) -> Params:
    """Weights and biases uniform within 1 / sqrt(inputs), as PyTorch has them."""
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        for_w, for_b = jax.random.split(jax.random.fold_in(key, number))
        bound = inputs**-0.5
        w = jax.random.uniform(for_w, (inputs, outputs), minval=-bound, maxval=bound)
        b = jax.random.uniform(for_b, (outputs,), minval=-bound, maxval=bound)
        layers.append({"w": w, "b": b})
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
        u = lambda x: network(params, x)[0]

        # By forward mode no kernel is used transposed, and each part is one Kronecker product.
        def second_derivative(e: jax.Array) -> jax.Array:
            slope = lambda x: jax.jvp(u, (x,), (e,))[1]
            return jax.jvp(slope, (x,), (e,))[1]

        return -jnp.sum(jax.vmap(second_derivative)(jnp.eye(len(x))))[None]

    return jax.vmap(at_point)(points)


def batch_of(problem: Problem, key: jax.Array) -> dict[str, Any]:
    """Points and what is asked there, of both parts."""
    inside, boundary = problem.points(key)
    return {
        "interior": (inside, problem.source(inside)),
        "boundary": (boundary, problem.solution(boundary)),
    }


def objective_of_both() -> curvax.Objective:
    error = curvax.losses.squared_error()
    parts = {
        "interior": curvax.Objective(minus_laplacian, error),
        "boundary": curvax.Objective(network, error),
    }
    return curvax.total(parts)


def kfac(objective: curvax.Objective, damping: float, params: Params, batch: dict[str, Any]) -> Any:
    """K-FAC with little damping, which a line search makes safe."""
    layout = curvax.kron_layout(objective, params, batch)
    # Interior and boundary are a Kronecker product each: their sum can be inverted as it is.
    for leaf in layout.leaves:
        if leaf.path.endswith("['w']"):
            layout = layout.edit(leaf.path, two_products="exact")
    tx = curvax.kfac(1.0, objective, layout, max(damping, 1e-8), max_kl=None)
    return curvax.line_search(tx, objective)


def spring(objective: curvax.Objective, damping: float, momentum: float) -> Any:
    tx = curvax.spring(1.0, objective, damping, momentum)
    return curvax.line_search(tx, objective)


# By name `(objective, damping, params, batch) -> optimizer`, and how many steps run together.
METHODS: dict[str, tuple[Callable[..., Any], int]] = {
    "engd": (lambda objective, damping, *_: spring(objective, damping, 0.0), 20),
    "spring": (lambda objective, damping, *_: spring(objective, damping, 0.3), 20),
    "kfac": (kfac, 20),
    "ssbroyden": (lambda objective, *_: curvax.ssbroyden(objective), 50),
    "lbfgs": (lambda *_: optax.lbfgs(), 50),
    "adam": (lambda *_: optax.adam(1e-3), 200),
}


class Run(NamedTuple):
    """What a training shows: seconds, steps and relative errors at some times, and the network."""

    seconds: list[float]
    steps: list[int]
    errors: list[float]
    params: Params


def train(
    problem: Problem,
    objective: curvax.Objective,
    method: tuple[Any, int],
    params: Params,
    budget: float,
    name: str,
) -> Run:
    """Train for a number of seconds, without those of compiling, and measure on the way."""
    tx, steps_together = method
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(carry: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            batch = batch_of(problem, key)
            loss, gradient = jax.value_and_grad(objective)(params, batch)
            extra = {"batch": batch, "value": loss}
            # The line search of L-BFGS hands all that it gets to the function that it evaluates.
            if name == "lbfgs":
                extra = {"value": loss, "grad": gradient, "value_fn": lambda p: objective(p, batch)}
            updates, state = tx.update(gradient, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, jax.random.split(key, steps_together))[0]

    @jax.jit
    def relative_error(params: Params) -> jax.Array:
        points = jax.random.uniform(jax.random.key(99), (9000, problem.dimension))
        truth = problem.solution(points)
        return jnp.linalg.norm(network(params, points) - truth) / jnp.linalg.norm(truth)

    carry = params, tx.init(params)
    compiled = run.lower(carry, jax.random.key(0)).compile()
    seconds, steps, errors = [0.0], [0], [float(relative_error(params))]
    with tqdm(total=round(budget, 1), desc=name, unit="s", leave=False) as bar:
        while seconds[-1] < budget:
            start = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(1), steps[-1])
            carry = jax.block_until_ready(compiled(carry, key))
            elapsed = time.perf_counter() - start
            seconds.append(seconds[-1] + elapsed)
            steps.append(steps[-1] + steps_together)
            errors.append(float(relative_error(carry[0])))
            bar.update(min(elapsed, bar.total - bar.n))
            bar.set_postfix(error=f"{errors[-1]:.1e}", steps=steps[-1])
    return Run(seconds, steps, errors, carry[0])


def row_of(name: str, run: Run, budget: float) -> list[str]:
    """The error after tenths of the time and all of it, the least one, and the steps."""
    cells = [name]
    for fraction in (0.03, 0.1, 0.3, 1.0):
        number = np.searchsorted(run.seconds, fraction * budget)
        cells.append(f"{run.errors[min(number, len(run.errors) - 1)]:.1e}")
    return [*cells, f"{np.nanmin(run.errors):.1e}", str(run.steps[-1])]


def picture(problem: Problem, runs: dict[str, Run], path: Path) -> None:
    """Save the best solution and its error on a plane, and the errors of all methods by time."""
    best = min(runs, key=lambda name: runs[name].errors[-1])

    @jax.jit
    def on_plane(params: Params) -> tuple[jax.Array, jax.Array]:
        axis = jnp.linspace(0, 1, 101)
        plane = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        # All other coordinates are in the middle.
        middle = jnp.full((len(plane), problem.dimension - 2), 0.5)
        points = jnp.hstack([plane, middle])
        u = network(params, points)
        return u.reshape(101, 101), (u - problem.solution(points)).reshape(101, 101)

    u, error = on_plane(runs[best].params)

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle_axes, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    for axes, values, title in ((left, u, f"u by {best}"), (middle_axes, error, "its error")):
        image = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r")
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set(title=title, xlabel="x", ylabel="y")
    for name, run in runs.items():
        right.loglog(run.seconds[1:], run.errors[1:], label=name)
    right.set(xlabel="seconds", ylabel="relative error")
    right.grid(alpha=0.3)
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--problem", choices=PROBLEMS, default="2d")
    flags.add_argument("--seconds", type=float, default=30.0, help="of each method")
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    flags.add_argument("--seed", type=int, default=0, help="of the initial weights")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="one method, for a moment")
    args = flags.parse_args()
    jax.config.update("jax_enable_x64", True)

    problem, objective = PROBLEMS[args.problem], objective_of_both()
    # Compiled whole, which takes less time than operation by operation.
    params = jax.jit(init, static_argnums=1)(jax.random.key(args.seed), (problem.dimension, 64, 1))
    batch = jax.jit(batch_of, static_argnums=0)(problem, jax.random.key(0))
    # Compiling takes most of a short run.
    chosen = ["spring"] if args.smoke else args.methods
    budget = 0.1 if args.smoke else args.seconds
    runs = {}
    for name in chosen:
        build, steps_together = METHODS[name]
        tx = build(objective, problem.damping, params, batch)
        runs[name] = train(problem, objective, (tx, steps_together), params, budget, name)

    times = [f"{fraction * budget:.2g} s" for fraction in (0.03, 0.1, 0.3, 1.0)]
    rows = [row_of(name, run, budget) for name, run in runs.items()]
    header = ("method", *times, "least", "steps")
    print_table("relative error of the solution in L2, after", header, rows)
    path = args.out / f"pinn_{args.problem}.png"
    picture(problem, runs, path)
    print(f"\nsaved {path}")


if __name__ == "__main__":
    main()
