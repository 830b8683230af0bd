"""What the first step costs, and the memory of every step, on each architecture of the test zoo.

    python examples/benchmarks/first_step.py --json first_step.json     # about ten minutes
    python examples/benchmarks/first_step.py --only transformer

For Adam and K-FAC: processor seconds to trace, lower and compile a training step, and its
temporary memory beside that of the gradient alone. "goal" is 2.5 times Adam's seconds and 2 more;
for memory it is 4 times the gradient's. "transformer" has twelve layers without scan.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _harness import Transformer, parser, report, write_json

import curvax

sys.path.append(str(Path(__file__).parents[2] / "tests"))


class Problem(NamedTuple):
    """A model with one batch, both as shapes."""

    objective: curvax.Objective
    params: Any
    batch: Any


def of_zoo(name: str) -> Problem:
    """An architecture of the zoo, with squared errors."""
    from zoo import ARCHITECTURES

    case = ARCHITECTURES[name]()
    objective = curvax.Objective(case.model, curvax.losses.squared_error())
    outputs = jax.eval_shape(case.model, case.params, case.inputs)
    targets = jnp.zeros(outputs.shape, outputs.dtype)
    return Problem(objective, case.params, (case.inputs, targets))


def transformer(layers: int) -> Problem:
    """A character transformer of width 128, without scan."""
    module = Transformer(layers=layers)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)
    objective = curvax.Objective(module.apply, curvax.losses.softmax_cross_entropy())
    return Problem(objective, params, (tokens, tokens))


class Cost(NamedTuple):
    """Processor seconds to the compiled program, and its temporary memory in bytes."""

    seconds: float
    memory: int


def cost(fn: Callable[..., Any], *args: Any) -> Cost:
    """Compile a function for arguments of these shapes."""
    jax.clear_caches()  # what another program has traced
    start = time.process_time()
    compiled = jax.jit(fn).trace(*args).lower().compile()
    seconds = time.process_time() - start
    return Cost(seconds, compiled.memory_analysis().temp_size_in_bytes)


def row_of(name: str, problem: Problem) -> dict[str, Any]:
    """Compare a step of Adam and one of K-FAC."""
    objective, params, batch = problem
    layout = curvax.kron_layout(objective, params, batch)
    steps: dict[str, Cost] = {}
    optimizers = {
        "adam": optax.with_extra_args_support(optax.adam(1e-3)),
        "kfac": curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10),
    }
    for method, tx in optimizers.items():

        def step(params: Any, state: Any, batch: Any, tx: Any = tx) -> Any:
            loss, grads = jax.value_and_grad(objective)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return optax.apply_updates(params, updates), state, loss

        steps[method] = cost(step, params, jax.eval_shape(tx.init, params), batch)
    gradient = cost(jax.value_and_grad(objective), params, batch)
    adam, kfac = steps["adam"], steps["kfac"]
    return {
        "model": name,
        "blocks": len(layout.blocks),
        "adam s": adam.seconds,
        "kfac s": kfac.seconds,
        "goal s": 2.5 * adam.seconds + 2,
        "ratio": kfac.seconds / adam.seconds,
        "gradient kB": gradient.memory / 1e3,
        "kfac kB": kfac.memory / 1e3,
        "memory ratio": kfac.memory / max(gradient.memory, 1),
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--only", nargs="+", help="names of architectures")
    args = flags.parse_args()
    from zoo import ARCHITECTURES

    names = args.only or (["gcnn"] if args.smoke else ["transformer", *ARCHITECTURES])
    rows = []
    for name in names:
        problem = transformer(12) if name == "transformer" else of_zoo(name)
        rows.append(row_of(name, problem))
        print(rows[-1], flush=True)
    report("First step, and temporary memory of a step", rows)
    write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
