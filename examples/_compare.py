"""A comparison of optimizers on equal terms, for the example scripts.

Every optimizer gets the same initial parameters and the same batches. Of its runs, one for each of
its settings, the one with the lowest final train loss goes into the table. The target is the final
train loss of the best run of the reference, which is the first optimizer of those chosen. Seconds
are steps times the step time, which is measured after training, without compilation, with all
optimizers taking turns: so whatever else the machine does slows them alike.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
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

# Steps in one compiled call; refresh intervals of curvature should divide it, for a step time that
# is typical.
CHUNK = 10
WINDOW = 50  # "train loss" is the mean over the batches of the last 50 steps

Batch = tuple[jax.Array, jax.Array]  # inputs, targets
Setting = dict[str, float]


class Task(NamedTuple):
    """A model to train: its objective, initial parameters, data (inputs, targets), and what to
    measure in the end.
    """

    name: str
    objective: curvax.Objective
    params: Any
    train: Batch
    test: Batch
    measure: str
    evaluate: Callable[[Any, Batch], jax.Array]

    @property
    def layout(self) -> curvax.kron.Layout:
        """The Kronecker blocks of the model."""
        return curvax.kron_layout(
            self.objective, self.params, jax.tree.map(lambda x: x[:2], self.train)
        )


class Method(NamedTuple):
    """An optimizer: `build(task, **setting) -> optax transformation`, and the settings to try."""

    build: Callable[..., optax.GradientTransformation]
    settings: tuple[Setting, ...]


class Run(NamedTuple):
    """One training run: train loss after each chunk, seconds in all, and the test result."""

    setting: Setting
    losses: np.ndarray
    seconds: float
    test: float


class Result(NamedTuple):
    """What came out of one task, by optimizer: all runs, the one in the table, and seconds per
    step.
    """

    task: Task
    runs: dict[str, list[Run]]
    chosen: dict[str, Run]
    step_times: dict[str, float]

    @property
    def reference(self) -> str:
        return next(iter(self.runs))

    @property
    def target(self) -> float:
        return self.chosen[self.reference].losses[-1]

    def steps(self, name: str) -> int | None:
        """Return the number of steps to the target."""
        below = np.flatnonzero(self.chosen[name].losses <= self.target)
        return CHUNK * (int(below[0]) + 1) if len(below) else None


def grid(**choices: Sequence[float]) -> tuple[Setting, ...]:
    """Return all combinations."""
    return tuple(
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )


def parser(
    doc: str,
    methods: Mapping[str, Method],
    steps: int,
    batch: int,
    smoke: Sequence[str] | None = None,
) -> argparse.ArgumentParser:
    """The flags that every comparison has; `smoke`: the methods of a smoke run, by default all."""
    flags = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    flags.add_argument(
        "--optimizers",
        help=f"separated by commas, the first is the reference; default: {', '.join(methods)}",
    )
    flags.set_defaults(of_smoke=list(smoke or methods))
    flags.add_argument(
        "--steps", type=int, default=steps, help=f"of each run, rounded up to a multiple of {CHUNK}"
    )
    flags.add_argument("--batch", type=int, default=batch, help="rows in a batch")
    flags.add_argument(
        "--seed", type=int, default=0, help="of the initial parameters and the batches"
    )
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument(
        "--smoke",
        action="store_true",
        help="30 steps with one setting each, compiled fast rather than well",
    )
    return flags


def parse(flags: argparse.ArgumentParser, methods: Mapping[str, Method]) -> argparse.Namespace:
    """Parse and check the flags of `parser`."""
    args = flags.parse_args()
    names = dict.fromkeys(args.of_smoke if args.smoke else methods)
    if args.optimizers is not None:
        names = dict.fromkeys(name for name in args.optimizers.split(",") if name)
    unknown = [name for name in names if name not in methods]
    if unknown or not names:
        flags.error(
            f"--optimizers: got {', '.join(unknown) or 'none'}; choose from {', '.join(methods)}"
        )
    for flag in ("steps", "batch"):
        if getattr(args, flag) < 1:
            flags.error(f"--{flag}: at least 1, got {getattr(args, flag)}")
    args.methods = {name: methods[name] for name in names}
    if args.smoke:
        args.steps = 3 * CHUNK
        args.methods = {
            name: Method(build, settings[1:2]) for name, (build, settings) in args.methods.items()
        }
    args.num_chunks = -(-args.steps // CHUNK)
    return args


def compare(tasks: Sequence[Task], args: argparse.Namespace, picture: str) -> None:
    """Train on all tasks, print what comes out, and draw it."""
    began = time.perf_counter()
    print(
        f"{args.num_chunks * CHUNK} steps with batches of {args.batch} "
        f"on {jax.devices()[0].device_kind}"
    )
    results = [run_all(task, args) for task in tasks]
    for result in results:
        report(result)
    plot(results, args.out / picture)
    print(f"total {time.perf_counter() - began:.0f} s")


def run_all(task: Task, args: argparse.Namespace) -> Result:
    """Train with every optimizer and setting, printing what comes out, and time the steps."""
    print(f"\n{task.name}: {sum(x.size for x in jax.tree.leaves(task.params)):,} parameters")
    batches = draw_batches(len(task.train[0]), args)
    runs: dict[str, list[Run]] = {}
    steps = {}  # by optimizer, ten steps from where its best run ended
    for name, method in args.methods.items():
        began = time.perf_counter()
        chunk = compile_chunk(method, task, batches[0], level=0 if args.smoke else 3)
        print(f"  {name}, compiled in {time.perf_counter() - began:.1f} s")
        runs[name] = []
        width = max(len(describe(setting)) for setting in method.settings)
        for setting in method.settings:
            run, carry = train(name, setting, method, task, chunk, batches)
            runs[name].append(run)
            if run is best(runs[name]):
                steps[name] = (chunk, carry, setting, task.train, batches[0])
            result = f"train loss {run.losses[-1]:<9.4g}  {task.measure} {run.test:<9.4g}"
            label = f"{describe(setting):<{width}}"
            print(f"    {label}  {result}  {run.seconds:.2f} s", flush=True)
    chosen = {name: best(each) for name, each in runs.items()}
    return Result(task, runs, chosen, time_steps(steps, rounds=3 if args.smoke else 15))


def compile_chunk(
    method: Method, task: Task, rows: jax.Array, level: int
) -> Callable[..., tuple[Any, jax.Array]]:
    """Compile `(carry, setting, data, rows [CHUNK, batch]) -> (carry, losses [CHUNK])`, and run it
    once to warm up.

    The numbers of a setting are arguments, so that one compilation serves the whole grid. With a
    low `level` of optimization, XLA compiles in half the time to a slower program.
    """

    @jax.jit
    def chunk(carry: Any, setting: Setting, data: Batch, rows: jax.Array) -> tuple[Any, jax.Array]:
        tx = method.build(task, **setting)

        def step(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            batch = jax.tree.map(lambda x: x[rows], data)
            loss, grads = jax.value_and_grad(task.objective)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, carry, rows)

    arguments = (start(method, task, method.settings[0]), method.settings[0], task.train, rows)
    compiled = chunk.lower(*arguments).compile({"xla_backend_optimization_level": level})
    jax.block_until_ready(compiled(*arguments))
    return compiled


def start(method: Method, task: Task, setting: Setting) -> tuple[Any, Any]:
    """Return the initial (params, optimizer state)."""
    tx = optax.with_extra_args_support(method.build(task, **setting))
    return task.params, tx.init(task.params)


def draw_batches(num_examples: int, args: argparse.Namespace) -> jax.Array:
    """Return row numbers `[num_chunks, CHUNK, batch]`: one shuffled pass over the data after
    another.
    """
    rng, shape = np.random.default_rng(args.seed), (args.num_chunks, CHUNK, args.batch)
    passes = [rng.permutation(num_examples) for _ in range(-(-np.prod(shape) // num_examples))]
    return jnp.asarray(np.concatenate(passes)[: np.prod(shape)].reshape(shape), jnp.int32)


def train(
    name: str,
    setting: Setting,
    method: Method,
    task: Task,
    chunk: Callable[..., Any],
    batches: jax.Array,
) -> tuple[Run, Any]:
    """Train once, with a progress bar; also return the last (params, state)."""
    carry, losses, means, seconds = start(method, task, setting), [], [], 0.0
    label = f"{task.name} {name} {describe(setting)}"
    with tqdm(total=len(batches) * CHUNK, desc=label, unit="step", leave=False) as bar:
        for rows in batches:
            began = time.perf_counter()
            carry, new = jax.block_until_ready(chunk(carry, setting, task.train, rows))
            seconds += time.perf_counter() - began
            losses += new.tolist()
            means.append(np.mean(losses[-WINDOW:]))
            bar.set_postfix(loss=f"{means[-1]:.4g}", refresh=False)
            bar.update(CHUNK)
    test = float(jax.jit(task.evaluate)(carry[0], task.test))
    return Run(setting, np.array(means), seconds, test), carry


def time_steps(steps: Mapping[str, tuple[Any, ...]], rounds: int) -> dict[str, float]:
    """Return seconds per step by optimizer: the median over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (chunk, *arguments) in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(chunk(*arguments))
            times[name].append((time.perf_counter() - began) / CHUNK)
    return {name: float(np.median(each)) for name, each in times.items()}


def best(runs: Sequence[Run]) -> Run:
    """Return the run with the lowest final train loss; a run that diverged loses."""
    return min(runs, key=lambda run: np.nan_to_num(run.losses[-1], nan=np.inf))


def describe(setting: Setting) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def report(result: Result) -> None:
    """Print the table, and who reached the target first."""
    steps = {name: result.steps(name) for name in result.runs if result.steps(name)}
    seconds = {name: number * result.step_times[name] for name, number in steps.items()}
    reference, rows = result.reference, []
    for name, run in result.chosen.items():
        row = [name, describe(run.setting), f"{run.losses[-1]:.4g}", f"{run.test:.4g}"]
        for values, form in ((steps, "d"), (seconds, ".2f")):
            reached = name in values and reference in values
            row += (
                [format(values[name], form), f"{values[name] / values[reference]:.2f}"]
                if reached
                else ["-", "-"]
            )
        step_time = result.step_times[name]
        rows.append(
            [*row, f"{1e3 * step_time:.2f}", f"{step_time / result.step_times[reference]:.2f}"]
        )
    share = f"/ {reference}"
    header = (
        "optimizer",
        "setting",
        "train loss",
        result.task.measure,
        "steps",
        share,
        "seconds",
        share,
        "ms/step",
        share,
    )
    title = (
        f"{result.task.name}: steps and seconds to train loss {result.target:.4g} "
        f"(final, of the best run of {reference})"
    )
    print_table(title, header, rows)
    print(f"best by steps: {lowest(steps)}; best by seconds: {lowest(seconds)}")


def lowest(values: Mapping[str, float]) -> str:
    """Name the lowest of the values, all that tie."""
    return " and ".join(name for name in values if values[name] == min(values.values())) or "none"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw train loss by step and by second, a row of axes for each task; runs not in the table are
    faint.
    """
    figure = Figure(figsize=(11, 4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, sharey="row", squeeze=False)
    for row, result in zip(axes, results, strict=True):
        for i, (name, runs) in enumerate(result.runs.items()):
            for run in runs:
                chosen = run is result.chosen[name]
                label = f"{name}, {describe(run.setting)}" if chosen else None
                style = {
                    "color": f"C{i}",
                    "alpha": 1 if chosen else 0.25,
                    "linewidth": 1.8 if chosen else 0.9,
                }
                steps = CHUNK * np.arange(1, len(run.losses) + 1)
                row[0].plot(steps, run.losses, label=label, **style)
                row[1].plot(steps * result.step_times[name], run.losses, **style)
        for ax, unit in zip(row, ("step", "second"), strict=True):
            ax.axhline(result.target, color="black", linestyle=":", linewidth=1)
            ax.set(yscale="log", xlabel=unit, title=f"{result.task.name}, by {unit}")
            ax.grid(alpha=0.2)
        row[0].set_ylabel(f"train loss (mean of the last {WINDOW} steps)")
        row[1].legend(*row[0].get_legend_handles_labels(), loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\ncurves: {path}")
