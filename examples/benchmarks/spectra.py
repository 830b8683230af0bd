"""What Lanczos costs beside its products, the memory of a spectral density, and an exact
Gauss-Newton step.

    python examples/benchmarks/spectra.py                     # about five minutes, 2 GB
    python examples/benchmarks/spectra.py --json spectra.json

"time": Lanczos with 30 steps on the Gauss-Newton matrix and on the Hessian of a perceptron with a
million parameters, as a multiple of the time of 30 products alone; the bound we aim at is 1.15.
"GB" is what orthogonalizing reads and writes in all steps, counted: four passes over the basis and
about twenty over single vectors a step; "GB/s" that over the time beside the products.

"memory": a spectral density of the same network with 10 probes of 80 steps, in copies of the
parameters, the parameters themselves, the batch and all activations included; the bound is 85.

"exact step": a training step of `curvax.egn` (gradient, system of batch x outputs, its solve) on
digits, 64-100-24-10 with a batch of 128, in units of one Cholesky factorization of a matrix of that
size; the bound is 4. "memory" is what the step needs for its work, "jacobian" what the Jacobian of
the outputs would take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from _harness import Problem, parser, report, seconds, write_json
from sklearn.datasets import load_digits

import curvax
from curvax.spectra import lanczos

PRODUCTS = {"ggn": curvax.ggnvp, "hessian": curvax.hvp}


def perceptron(widths: tuple[int, ...], batch_size: int) -> Problem:
    """Return a network on random images with labels."""
    key = jax.random.key(0)
    module = nn.Sequential(
        [*(layer for w in widths for layer in (nn.Dense(w), nn.tanh)), nn.Dense(10)]
    )
    batch = (jax.random.normal(key, (batch_size, 784)), jnp.arange(batch_size) % 10)
    params = jax.jit(module.init)(key, batch[0])
    return Problem(
        "mlp", curvax.Objective(module.apply, curvax.losses.softmax_cross_entropy()), params, batch
    )


def num_params(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def time(
    name: str, widths: tuple[int, ...], batch_size: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Time Lanczos and as many products, called one after the other; both start from the
    linearization.
    """
    problem = perceptron(widths, batch_size)
    matvec = PRODUCTS[name](problem.objective, problem.params, problem.batch)
    start = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), problem.params)

    @jax.jit
    def krylov(matvec: Callable[[Any], Any], v: Any) -> Any:
        found = lanczos(matvec, v, steps)
        return found.diagonal, found.off_diagonal

    product = jax.jit(lambda matvec, v: matvec(v))

    def products(matvec: Callable[[Any], Any], v: Any) -> Any:
        for _ in range(steps):
            v = product(matvec, v)
        return v

    times = seconds({f.__name__: lambda f=f: f(matvec, start) for f in (products, krylov)}, rounds)
    d = num_params(problem.params)
    moved = 4 * d * steps * (4 * steps + 20)
    beside = times["krylov"] - times["products"]
    return {
        "matrix": name,
        "d": d,
        "batch": batch_size,
        "steps": steps,
        "products s": times["products"],
        "lanczos s": times["krylov"],
        "ratio": times["krylov"] / times["products"],
        "GB": moved / 1e9,
        "GB/s": moved / 1e9 / beside if beside > 0 else float("inf"),
    }


def memory(
    name: str, widths: tuple[int, ...], batch_size: int, probes: int, steps: int
) -> dict[str, Any]:
    """Compile a density, from parameters and batch to nodes and weights, and read what it needs."""
    problem = perceptron(widths, batch_size)

    def density(params: Any, batch: Any, key: jax.Array) -> Any:
        matvec = PRODUCTS[name](problem.objective, params, batch)
        return curvax.spectra.spectral_density(matvec, params, key, probes, steps)

    arguments = (problem.params, problem.batch, jax.random.key(0))
    needed = jax.jit(density).lower(*arguments).compile().memory_analysis()
    d = num_params(problem.params)
    copies = lambda size: size / (4 * d)
    total = needed.temp_size_in_bytes + needed.argument_size_in_bytes + needed.output_size_in_bytes
    return {
        "matrix": name,
        "d": d,
        "batch": batch_size,
        "probes": probes,
        "steps": steps,
        "GB": total / 1e9,
        "arguments": copies(needed.argument_size_in_bytes),
        "temporary": copies(needed.temp_size_in_bytes),
        "copies of params": copies(total),
    }


def exact_step(batch_size: int, rounds: int) -> dict[str, Any]:
    """Time an exact step, one of Adam, and a factorization of the step's size, taking turns."""
    images, labels = load_digits(return_X_y=True)
    batch = (jnp.asarray(images[:batch_size] / 16, jnp.float32), jnp.asarray(labels[:batch_size]))
    module = nn.Sequential([nn.Dense(100), nn.tanh, nn.Dense(24), nn.tanh, nn.Dense(10)])
    objective = curvax.Objective(module.apply, curvax.losses.softmax_cross_entropy())
    params = jax.jit(module.init)(jax.random.key(0), batch[0])

    def training(tx: Any) -> tuple[Callable[..., Any], Any]:
        def step(params: Any, state: Any, batch: Any) -> Any:
            updates, state = tx.update(
                jax.grad(objective)(params, batch), state, params, batch=batch
            )
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        return jax.jit(step).lower(params, state, batch).compile(), state

    methods = {
        "egn": curvax.egn(1.0, objective),
        "adam": optax.with_extra_args_support(optax.adam(1e-3)),
    }
    programs = {name: training(tx) for name, tx in methods.items()}
    n = 10 * batch_size
    matrix = jnp.eye(n) + jnp.ones((n, n)) / n
    factorize = jax.jit(jnp.linalg.cholesky).lower(matrix).compile()
    runs = {
        name: lambda run=run, state=state: run(params, state, batch)
        for name, (run, state) in programs.items()
    }
    times = seconds(runs | {"cholesky": lambda: factorize(matrix)}, rounds)
    return {
        "d": num_params(params),
        "n": n,
        "cholesky ms": 1e3 * times["cholesky"],
        "step ms": 1e3 * times["egn"],
        "ratio": times["egn"] / times["cholesky"],
        "in adam steps": times["egn"] / times["adam"],
        "memory MB": programs["egn"][0].memory_analysis().temp_size_in_bytes / 1e6,
        "jacobian MB": 4 * n * num_params(params) / 1e6,
    }


def main() -> None:
    flags = parser(__doc__).parse_args()
    widths, steps, rounds = ((1024, 192), 30, flags.rounds) if not flags.smoke else ((32,), 4, 2)
    few = min(rounds, 5)  # ten seconds each
    times = [time(name, widths, 64 if flags.smoke else 4096, steps, few) for name in PRODUCTS]
    report("time of Lanczos", times)
    needs = [memory(name, widths, 64, 10, 8 if flags.smoke else 80) for name in PRODUCTS]
    report("memory of a density", needs)
    step = [exact_step(16 if flags.smoke else 128, rounds)]
    report("exact Gauss-Newton step", step)
    write_json(flags.json, {"spectra": {"time": times, "memory": needs, "exact step": step}})


if __name__ == "__main__":
    main()
