"""What influence functions cost: a fit and its passes, scores of training examples, and memory over
a long stream.

    python examples/benchmarks/influence.py                      # about three minutes, 2 GB
    python examples/benchmarks/influence.py --json influence.json

"passes": time for a batch, in gradients of the same batch (of all parameters), by the clock and by
the compiler's count of operations. The bounds we aim at, on the transformer, are 3.5 gradients for
the covariances, 5 for the eigenvalues, 3 for scores of 64 queries at once. "rank 16" are scores of
compressed queries, "by token" scores of each position, "self" self-influence. Where an example has
one position (the perceptron), scores of q queries take q/3 gradients by count, with no sum over
positions to share; a low rank helps.

"memory": the most that the process holds (resident) after a fit and scores of a stream of n
batches, kept nowhere, with a few and with eight times as many.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from _harness import Problem, parser, problems, report, seconds, write_json

import curvax
from curvax.apps import influence

KEY = jax.random.key(0)
BOUNDS = {"covariances": 3.5, "eigenvalues": 5.0, "scores": 3.0}  # on the transformer
RANK = 16


class Stream(NamedTuple):
    """Batches that are made as they are asked for."""

    batch: Any
    length: int

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.length):
            yield jax.tree.map(
                lambda x, number=number: np.roll(np.asarray(x), number, axis=0), self.batch
            )


def passes(problem: Problem, num_queries: int, rounds: int) -> list[dict[str, Any]]:
    """Time all that is done with a batch, in turns with its gradient."""
    objective, params, batch = problem.objective, problem.params, problem.batch
    layout = curvax.kron_layout(objective, params, batch)
    fitted = influence.fit(objective, layout, params, [batch], KEY, progress=False)
    queries = jax.tree.map(lambda x: x[:num_queries], batch)
    prepared, _ = influence.precondition(fitted, objective, params, queries)
    small, _ = influence.compress(prepared, RANK)
    score = jax.jit(
        lambda prepared, params, batch: influence.score(prepared, objective, params, batch)
    )
    by_token = jax.jit(
        lambda prepared, params, batch: influence.score(
            prepared, objective, params, batch, by="token"
        )
    )
    factors = lambda params, batch: curvax.kron_factors(objective, layout, params, batch, KEY)
    moments = lambda params, batch: curvax.kron.kron_moments(
        objective, layout, fitted.eigen.basis, params, batch, KEY
    )
    compiled: dict[str, tuple[Any, ...]] = {
        "gradient": (jax.jit(jax.grad(objective)), params, batch),
        "covariances": (jax.jit(lambda params, batch: factors(params, batch)), params, batch),
        "eigenvalues": (
            jax.jit(lambda params, batch: moments(params, batch).moments),
            params,
            batch,
        ),
        "scores": (score, prepared, params, batch),
        f"scores, rank {RANK}": (score, small, params, batch),
    }
    if problem.name == "transformer":
        compiled[f"by token, rank {RANK}"] = (by_token, small, params, batch)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda f=f, a=a: f(*a) for name, (f, *a) in compiled.items()
    }
    calls["self"] = lambda: influence.self_influence(fitted, objective, params, [batch])
    times = seconds(calls, rounds)
    rows = []
    for name, time in times.items():
        row = {
            "model": problem.name,
            "what": name,
            "ms": 1e3 * time,
            "gradients": time / times["gradient"],
        }
        bound = BOUNDS.get(name) if problem.name == "transformer" else None
        rows.append({**row, "by count": operations(compiled, name), "bound": bound or "-"})
    return rows


def operations(compiled: dict[str, tuple[Any, ...]], name: str) -> Any:
    """Return what the compiler counts, in gradients; it counts the body of a loop once, so not
    where there are loops.
    """
    if name not in compiled:
        return "-"
    traces = {
        key: f.trace(*args) for key, (f, *args) in compiled.items() if key in (name, "gradient")
    }
    if "scan[" in str(traces[name].jaxpr):
        return "-"
    count = {key: trace.lower().compile().cost_analysis()["flops"] for key, trace in traces.items()}
    return count[name] / count["gradient"]


def memory(problem: Problem, length: int) -> dict[str, Any]:
    """Fit and score a stream."""
    objective, params, stream = problem.objective, problem.params, Stream(problem.batch, length)
    layout = curvax.kron_layout(objective, params, problem.batch)
    fitted = influence.fit(objective, layout, params, stream, KEY, progress=False)
    queries = jax.tree.map(lambda x: x[:8], problem.batch)
    prepared, _ = influence.precondition(fitted, objective, params, queries)
    influence.top_k(prepared, objective, params, stream, k=10)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "model": problem.name,
        "batches": length,
        "examples": length * len(problem.batch[1]),
        "peak MB": held,
    }


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(rounds=7)
    args = flags.parse_args()
    rounds, chosen = (2, 8) if args.smoke else (args.rounds, 64)
    found = problems(args.smoke)
    lengths = (2, 16) if args.smoke else (8, 64)
    results = {
        "memory": [memory(found[0], length) for length in lengths]
    }  # first: a peak does not come down again
    report("memory of the process over streams", results["memory"])
    results["passes"] = [row for problem in found for row in passes(problem, chosen, rounds)]
    report(f"a batch, with {chosen} queries", results["passes"])
    write_json(args.json, results)


if __name__ == "__main__":
    main()
