"""How much longer a step takes with K-FAC and EK-FAC than with Adam, amortized over intervals.

    python examples/benchmarks/kfac.py                    # a few minutes
    python examples/benchmarks/kfac.py --json kfac.json

Every figure is the mean time of a step over a cycle of ten, divided by Adam's in the same run: all
optimizers take turns, and the median over rounds is printed. "limit" is the same ratio in
floating-point operations, for the gradient, a backward pass without kernels' gradients, symmetric
products of inputs and cotangents, Cholesky inverses, and the two products of the step; no
implementation that does this work can be faster, unless its operations run at a higher rate than
Adam's. "bound" is what we aim at on two CPU cores. Memory is that of the optimizer's state, without
momentum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from _harness import Problem, Transformer, parser, report, seconds, write_json

import curvax
from curvax.kron._plan import layout_plan

CYCLE = 10


class Autoencoder(nn.Module):
    widths: tuple[int, ...] = (1000, 500, 250)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dense(30)(x)
        for width in reversed(self.widths):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(64)(x)


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 64):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Setting(NamedTuple):
    """Intervals, the fraction of the batch that factors are estimated on, the bound for the ratio
    (None: no bound), and the tolerance within which EK-FAC keeps a basis.
    """

    method: str
    curvature_every: int
    inverse_every: int
    fraction: float
    bound: float | None
    tolerance: float = 0.0

    def __str__(self) -> str:
        part = f", {self.fraction:g} of the batch" if self.fraction < 1 else ""
        kept = f", bases within {self.tolerance:g}" if self.tolerance else ""
        return f"{self.method} {self.curvature_every}/{self.inverse_every}{part}{kept}"


SETTINGS = {
    "autoencoder": [
        Setting("kfac", 1, 1, 1.0, 7.0),
        Setting("kfac", 1, 10, 1.0, 3.6),
        Setting("kfac", 10, 10, 1.0, 2.5),
        Setting("kfac", 1, 10, 0.25, 2.9),
        Setting("ekfac", 1, 10, 1.0, None),
        Setting("ekfac", 1, 10, 0.25, 5.0, 0.1),
        Setting("ekfac", 10, 10, 1.0, 5.0, 0.1),
    ],
    "cnn": [
        Setting("kfac", 1, 10, 1.0, 2.2),
        Setting("kfac", 10, 10, 1.0, None),
        Setting("ekfac", 1, 10, 1.0, None),
    ],
    "transformer": [
        Setting("kfac", 1, 1, 1.0, 2.3),
        Setting("kfac", 1, 10, 1.0, 1.8),
        Setting("kfac", 10, 10, 1.0, None),
        Setting("ekfac", 1, 10, 1.0, None),
    ],
}


def problems(smoke: bool) -> list[Problem]:
    """The autoencoder of the K-FAC paper on 8x8 images, a small convolutional network, a character
    transformer.
    """
    key = jax.random.key(0)

    def problem(
        name: str, module: nn.Module, loss: Any, inputs: jax.Array, targets: jax.Array
    ) -> Problem:
        params = jax.jit(module.init)(key, inputs)
        return Problem(name, curvax.Objective(module.apply, loss), params, (inputs, targets))

    size = 64 if smoke else 512
    pixels = jax.random.uniform(key, (size, 64))
    # Compiling is all that a smoke run is for.
    network = Autoencoder((40, 20)) if smoke else Autoencoder()
    autoencoder = problem(
        "autoencoder", network, curvax.losses.sigmoid_cross_entropy(), pixels, pixels
    )
    if smoke:
        return [autoencoder]
    labels = curvax.losses.softmax_cross_entropy()
    tokens = jax.random.randint(key, (32, 64), 0, 96)
    return [
        autoencoder,
        problem("cnn", Cnn(), labels, jax.random.normal(key, (256, 8, 8, 1)), jnp.arange(256) % 10),
        problem("transformer", Transformer(), labels, tokens, jnp.roll(tokens, -1, axis=1)),
    ]


def optimizer(
    setting: Setting, problem: Problem, layout: curvax.kron.Layout
) -> optax.GradientTransformationExtraArgs:
    """Compose the optimizer of a setting, without momentum (which Adam has two buffers of)."""
    objective = problem.objective
    rule, estimate = {
        "kfac": (curvax.scale_by_kfac, curvax.kron_factors),
        "ekfac": (curvax.scale_by_ekfac, curvax.kron.eigen_curvature),
    }[setting.method]
    estimator = lambda params, batch, key: estimate(objective, layout, params, batch, key)
    if setting.fraction < 1:
        estimator = curvax.on_fraction(estimator, setting.fraction)
    options = {"tolerance": setting.tolerance} if setting.tolerance else {}
    scaled = rule(layout, 1e-2, setting.inverse_every, **options)
    tx = curvax.estimating(scaled, estimator, setting.curvature_every)
    return optax.chain(tx, optax.scale_by_learning_rate(1e-3))


def cycle(tx: Any, problem: Problem) -> tuple[Callable[[], Any], float, int, float]:
    """Return a function that runs a cycle of steps, the seconds of the first step, bytes of state,
    and FLOPs of a step.
    """
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(problem.objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    carry = jax.tree.map(jnp.copy, problem.params), tx.init(problem.params)
    size = sum(x.nbytes for x in jax.tree.leaves(carry[1]))
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, problem.batch).compile()
    carry = jax.block_until_ready(compiled(*carry, problem.batch))
    first = time.perf_counter() - start

    def run() -> Any:
        nonlocal carry
        for _ in range(CYCLE):
            carry = compiled(*carry, problem.batch)
        return carry

    return run, first, size, compiled.cost_analysis()["flops"]


def limit(setting: Setting, problem: Problem, layout: curvax.kron.Layout, adam: float) -> float:
    """Ratio of the operations that a step needs to those of Adam's step."""
    plan = layout_plan(
        problem.objective, layout, problem.params, problem.batch[0], per_example=False
    )
    recorded = lambda p, x: curvax.capture.record(plan, p, x).inputs
    inputs = jax.eval_shape(recorded, problem.params, problem.batch[0])
    products = power = inverse = 0
    for block in layout.blocks:
        stack, rows, columns = block.shape
        square = lambda size, structure: size**2 if structure == "full" else size
        for use in inputs[block.name]:
            products += math.prod(use.shape[:3]) * (
                square(rows, block.a_structure) + square(columns, block.g_structure)
            )
        power += (
            2
            * stack
            * rows
            * columns
            * sum(
                n
                for n, s in ((rows, block.a_structure), (columns, block.g_structure))
                if s == "full"
            )
        )
        inverse += stack * (
            rows**3 * (block.a_structure == "full") + columns**3 * (block.g_structure == "full")
        )
    backward = adam / 3 if setting.fraction == 1 and setting.curvature_every == 1 else 2 * adam / 3
    estimate = setting.fraction * (backward + products) / setting.curvature_every
    return (adam + estimate + power + inverse / setting.inverse_every) / adam


def measure(problem: Problem, rounds: int, smoke: bool) -> list[dict[str, Any]]:
    """Time all settings of a problem (with `smoke` the first) and Adam, taking turns."""
    layout = curvax.kron_layout(problem.objective, problem.params, problem.batch)
    settings = {str(setting): setting for setting in SETTINGS[problem.name][: 1 if smoke else None]}
    built = {
        name: cycle(optimizer(setting, problem, layout), problem)
        for name, setting in settings.items()
    }
    built["adam"] = cycle(optax.adam(1e-3), problem)
    times = seconds({name: run for name, (run, *_) in built.items()}, rounds)
    flops = built["adam"][3]
    rows: list[dict[str, Any]] = []
    for name, (_, first, size, _) in built.items():
        setting = settings.get(name)
        rows.append(
            {
                "problem": problem.name,
                "optimizer": name,
                "ms per step": 1e3 * times[name] / CYCLE,
                "ratio to Adam": times[name] / times["adam"],
                "bound": (setting.bound if setting else None) or "",
                "limit": limit(setting, problem, layout, flops) if setting else 1.0,
                "state MB": size / 1e6,
                "first step s": first,
            }
        )
    return rows


def main() -> None:
    flags = parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for problem in problems(flags.smoke):
        found = measure(problem, 1 if flags.smoke else flags.rounds, flags.smoke)
        report(f"{problem.name}: time of a step (curvature every / inverse every)", found)
        rows += found
    write_json(flags.json, {"kfac": rows})


if __name__ == "__main__":
    main()
