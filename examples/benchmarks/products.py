"""Cost of curvature products and of the optimizers built on them, in gradients and Adam steps.

    python examples/benchmarks/products.py [--json FILE] [--rounds N] [--smoke]

Times are medians of interleaved rounds, FLOPs what the compiler counts. A product is well built if
its time ratio is that of its FLOPs; `time/FLOPs` is the quotient of the two ratios, with the bound
that we hold ourselves to.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from _harness import Problem, parser, problems, report, seconds, write_json

import curvax


def flops(compiled: jax.stages.Compiled) -> float:
    """FLOPs of one call, as the compiler counts them."""
    return compiled.cost_analysis()["flops"]


def temporary(compiled: jax.stages.Compiled) -> int:
    """Peak temporary memory of one call, in bytes."""
    return compiled.memory_analysis().temp_size_in_bytes


def train_step(problem: Problem, tx: optax.GradientTransformationExtraArgs) -> Any:
    """One training step, compiled with its state donated as a training loop would."""

    def step(params, state, batch):
        _, grads = jax.value_and_grad(problem.objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return jax.jit(step).lower(problem.params, tx.init(problem.params), problem.batch).compile()


def product_rows(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Time and FLOPs of products and of an AdaHessian step, relative to one gradient."""
    objective, params, batch = problem.objective, problem.params, problem.batch
    v = optax.tree.random_like(jax.random.key(1), params)
    compile = lambda f, *args: (jax.jit(f).lower(*args).compile(), args)
    matvec = curvax.hvp(objective, params, batch)
    adahessian = curvax.adahessian(0.1, objective)
    calls = {
        "gradient": compile(jax.value_and_grad(objective), params, batch),
        "hvp, built and applied once": compile(
            lambda p, b, v: curvax.hvp(objective, p, b)(v), params, batch, v
        ),
        "one more matvec": compile(lambda mv, v: mv(v), matvec, v),
        "ggnvp, built and applied once": compile(
            lambda p, b, v: curvax.ggnvp(objective, p, b)(v), params, batch, v
        ),
        "adahessian step, interval 1": (
            train_step(problem, adahessian),
            (params, adahessian.init(params), batch),
        ),
        "hvp rev_over_rev": compile(
            lambda p, b, v: curvax.hvp(objective, p, b, mode="rev_over_rev")(v), params, batch, v
        ),
    }
    times = seconds(
        {name: lambda f=f, args=args: f(*args) for name, (f, args) in calls.items()}, rounds
    )
    rows = []
    for name, (compiled, _) in calls.items():
        time_ratio = times[name] / times["gradient"]
        flop_ratio = flops(compiled) / flops(calls["gradient"][0])
        bound = "" if name in ("gradient", "hvp rev_over_rev") else 1.15
        row = {
            "model": problem.name,
            "call": name,
            "ms": 1e3 * times[name],
            "time": time_ratio,
            "FLOPs": flop_ratio,
        }
        rows.append(row | {"time/FLOPs": time_ratio / flop_ratio, "bound": bound})
    return rows


def step_rows(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Amortized time of a training step over ten steps from step 0, relative to Adam."""
    optimizers = {
        "adam": (optax.with_extra_args_support(optax.adam(1e-3)), ""),
        "sophia_g, interval 10": (curvax.sophia_g(1e-3, problem.objective), 1.2),
        "sophia_h, interval 10": (curvax.sophia_h(1e-3, problem.objective), 1.4),
    }
    steps = {
        name: (train_step(problem, tx), tx.init(problem.params))
        for name, (tx, _) in optimizers.items()
    }

    def ten_steps(step: Any, state: Any) -> Any:
        params = problem.params
        for _ in range(10):
            params, state = step(params, state, problem.batch)
        return params

    times = seconds(
        {name: lambda s=s: ten_steps(*s) for name, s in steps.items()}, max(rounds // 2, 1)
    )
    return [
        {
            "model": problem.name,
            "step": name,
            "ms": 100 * times[name],
            "time": times[name] / times["adam"],
            "bound": bound,
        }
        for name, (_, bound) in optimizers.items()
    ]


def memory_rows(problem: Problem) -> list[dict[str, Any]]:
    """Peak temporary memory, of many probes and of chunks."""
    objective, params, batch = problem.objective, problem.params, problem.batch
    key = jax.random.key(0)

    def probes(n: int) -> int:
        estimate = lambda p, b: curvax.hutchinson_diagonal(curvax.hvp(objective, p, b), p, key, n)
        return temporary(jax.jit(estimate).lower(params, batch).compile())

    def product(build: Any, chunks: int | None) -> int:
        microbatch = chunks and len(batch[1]) // chunks
        apply = lambda p, b, v: build(objective, p, b, microbatch=microbatch)(v)
        return temporary(jax.jit(apply).lower(params, batch, params).compile())

    pairs = {
        "64 probes / 1 probe": (probes(64), probes(1), 1.3),
        "hvp in 8 chunks / whole": (product(curvax.hvp, 8), product(curvax.hvp, None), 0.4),
        "ggnvp in 8 chunks / whole": (product(curvax.ggnvp, 8), product(curvax.ggnvp, None), 0.4),
    }
    return [
        {
            "model": problem.name,
            "temporary memory": name,
            "MB": a / 1e6,
            "of MB": b / 1e6,
            "ratio": a / b,
            "bound": bound,
        }
        for name, (a, b, bound) in pairs.items()
    ]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    rounds = 2 if arguments.smoke else arguments.rounds
    print(f"device: {jax.devices()[0].device_kind}; jax {jax.__version__}; {rounds} rounds")
    results: dict[str, list[dict[str, Any]]] = {"products": [], "steps": [], "memory": []}
    for problem in problems(arguments.smoke):
        results["products"] += product_rows(problem, rounds)
        results["steps"] += step_rows(problem, rounds)
        results["memory"] += memory_rows(problem)
    report("Products, relative to one gradient", results["products"])
    report("Training steps, amortized over ten, relative to Adam", results["steps"])
    report("Peak temporary memory", results["memory"])
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
