"""Train a classifier and a deep autoencoder on real digits with Adam and with second-order optimizers, and compare.

    python examples/quickstart.py                                   # one to two minutes on two cores
    python examples/quickstart.py --smoke                           # does it run? about 20 seconds
    python examples/quickstart.py --optimizers adam,sophia_g --steps 1000
    python examples/quickstart.py --data folder/with/mnist-idx-files

Every optimizer gets the same initial parameters, the same batches, and as many learning rates as Adam. Of its runs the
one with the lowest final train loss goes into the table. The target is the final train loss of Adam's best run. Seconds
are steps times the step time, which is measured after training, without compilation, with all optimizers taking turns:
so whatever else the machine does slows them alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_images, print_table
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax

CHUNK = 10  # steps in one compiled call, one refresh of Sophia's curvature among them
WINDOW = 50  # "train loss" is the mean over the batches of the last 50 steps
BATCH = 256

Batch = tuple[jax.Array, jax.Array]  # inputs, targets


class Method(NamedTuple):
    """An optimizer: `build(learning_rate, objective) -> optax transformation`, and the learning rates to try."""

    build: Callable[[Any, curvax.Objective], optax.GradientTransformation]
    rates: tuple[float, ...]


# To compare another method, add a row. Sophia's weight decay is off, since the others have none.
METHODS = {
    "adam": Method(lambda rate, objective: optax.adam(rate), (1e-3, 3e-3, 1e-2, 3e-2)),
    "adahessian": Method(curvax.adahessian, (0.01, 0.03, 0.1, 0.3)),
    "sophia_h": Method(partial(curvax.sophia_h, weight_decay=0.0), (1e-4, 3e-4, 1e-3, 3e-3)),
    "sophia_g": Method(partial(curvax.sophia_g, weight_decay=0.0), (1e-4, 3e-4, 1e-3, 3e-3)),
}


class Task(NamedTuple):
    """A model to train: its objective, initial parameters, data (inputs, targets), and what to measure in the end."""

    name: str
    objective: curvax.Objective
    params: Any
    train: Batch
    test: Batch
    measure: str
    evaluate: Callable[[Any, Batch], jax.Array]


class Run(NamedTuple):
    """One training run: train loss after each chunk, seconds in all, the test result, and the last (params, state)."""

    rate: float
    losses: np.ndarray
    seconds: float
    test: float
    carry: Any


class Result(NamedTuple):
    """What came out of one task, by optimizer: all runs, the one in the table, and seconds per step."""

    task: Task
    runs: dict[str, list[Run]]
    chosen: dict[str, Run]
    step_times: dict[str, float]
    reference: str
    target: float


def classifier(images: jax.Array, labels: jax.Array, num_train: int, key: jax.Array) -> Task:
    """A perceptron with two hidden layers, softmax cross-entropy.

    Not a convolutional network: XLA runs convolutions within `scan` and `cond` many times slower on a CPU
    (https://github.com/jax-ml/jax/issues/12868), and this script is for laptops.
    """
    pixels = images.reshape(len(images), -1)
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
    objective = curvax.Objective(model.apply, curvax.losses.softmax_cross_entropy())

    def accuracy(params: Any, batch: Batch) -> jax.Array:
        return jnp.mean(jnp.argmax(objective.outputs(params, batch[0]), axis=-1) == batch[1])

    train, test = (pixels[:num_train], labels[:num_train]), (pixels[num_train:], labels[num_train:])
    return Task("classifier", objective, model.init(key, pixels[:1]), train, test, "test accuracy", accuracy)


def autoencoder(images: jax.Array, num_train: int, key: jax.Array) -> Task:
    """A deep autoencoder with a code of 16 numbers, half the squared error summed over pixels."""
    pixels = images.reshape(len(images), -1)
    layers: list[Any] = []
    for width in (256, 64, 16, 64, 256):
        layers += [nn.Dense(width), nn.tanh]
    model = nn.Sequential([*layers, nn.Dense(pixels.shape[1])])
    objective = curvax.Objective(model.apply, curvax.losses.squared_error())
    train, test = (pixels[:num_train],) * 2, (pixels[num_train:],) * 2
    return Task("autoencoder", objective, model.init(key, pixels[:1]), train, test, "test loss", objective)


def make_optimizer(method: Method, objective: curvax.Objective) -> optax.GradientTransformationExtraArgs:
    """Put the learning rate into the optimizer's state, so that one compilation serves the whole grid."""
    return optax.inject_hyperparams(lambda learning_rate: method.build(learning_rate, objective))(learning_rate=1.0)


def start(method: Method, task: Task, rate: float) -> tuple[Any, Any]:
    """Return the initial (params, optimizer state)."""
    state = make_optimizer(method, task.objective).init(task.params)
    rates = jax.tree.map(lambda x: jnp.full_like(x, rate), state.hyperparams)
    return task.params, state._replace(hyperparams=rates)


def compile_chunk(method: Method, task: Task, level: int) -> Callable[..., tuple[Any, jax.Array]]:
    """Compile `(carry, data, rows [CHUNK, BATCH]) -> (carry, losses [CHUNK])`, and run it once to warm up.

    With a low `level` of optimization, XLA compiles in half the time to a slower program.
    """
    tx = make_optimizer(method, task.objective)

    @jax.jit
    def chunk(carry: Any, data: Batch, rows: jax.Array) -> tuple[Any, jax.Array]:
        def step(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            batch = jax.tree.map(lambda x: x[rows], data)
            loss, grads = jax.value_and_grad(task.objective)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, carry, rows)

    arguments = (start(method, task, method.rates[0]), task.train, jnp.zeros((CHUNK, BATCH), jnp.int32))
    compiled = chunk.lower(*arguments).compile({"xla_backend_optimization_level": level})
    jax.block_until_ready(compiled(*arguments))
    return compiled


def draw_batches(num_examples: int, num_chunks: int, seed: int) -> jax.Array:
    """Return row numbers `[num_chunks, CHUNK, BATCH]`: one shuffled pass over the data after another."""
    rng = np.random.default_rng(seed)
    num_rows = num_chunks * CHUNK * BATCH
    passes = [rng.permutation(num_examples) for _ in range(-(-num_rows // num_examples))]
    return jnp.asarray(np.concatenate(passes)[:num_rows].reshape(num_chunks, CHUNK, BATCH), jnp.int32)


def train(name: str, rate: float, task: Task, chunk: Callable[..., Any], batches: jax.Array) -> Run:
    """Train once, with a progress bar."""
    carry, losses, means, seconds = start(METHODS[name], task, rate), [], [], 0.0
    with tqdm(total=len(batches) * CHUNK, desc=f"{task.name} {name} {rate:g}", unit="step", leave=False) as bar:
        for rows in batches:
            began = time.perf_counter()
            carry, new = jax.block_until_ready(chunk(carry, task.train, rows))
            seconds += time.perf_counter() - began
            losses += new.tolist()
            means.append(np.mean(losses[-WINDOW:]))
            bar.set_postfix(loss=f"{means[-1]:.4g}", refresh=False)
            bar.update(CHUNK)
    test = float(jax.jit(task.evaluate)(carry[0], task.test))
    return Run(rate, np.array(means), seconds, test, carry)


def time_steps(task: Task, chunks: dict[str, Any], runs: dict[str, Run], rows: jax.Array, rounds: int) -> dict:
    """Return seconds per step by optimizer: the median over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in chunks}
    for _ in range(rounds):
        for name, chunk in chunks.items():
            began = time.perf_counter()
            jax.block_until_ready(chunk(runs[name].carry, task.train, rows))
            times[name].append((time.perf_counter() - began) / CHUNK)
    return {name: float(np.median(each)) for name, each in times.items()}


def compare(task: Task, args: argparse.Namespace) -> Result:
    """Train with every optimizer and learning rate, printing what comes out, and time the steps."""
    print(f"\n{task.name}: {sum(x.size for x in jax.tree.leaves(task.params)):,} parameters")
    batches = draw_batches(len(task.train[0]), args.num_chunks, args.seed)
    runs, chunks = {}, {}
    for name in args.optimizers:
        began = time.perf_counter()
        chunks[name] = compile_chunk(METHODS[name], task, level=0 if args.smoke else 3)
        print(f"  {name}, compiled in {time.perf_counter() - began:.1f} s")
        runs[name] = []
        for rate in METHODS[name].rates[1:2] if args.smoke else METHODS[name].rates:
            run = train(name, rate, task, chunks[name], batches)
            runs[name].append(run)
            line = f"train loss {run.losses[-1]:<9.4g}  {task.measure} {run.test:<6.4g}  {run.seconds:.2f} s"
            print(f"    learning rate {rate:<6g}  {line}", flush=True)
    chosen = {name: best(each) for name, each in runs.items()}
    step_times = time_steps(task, chunks, chosen, batches[0], rounds=3 if args.smoke else 20)
    return Result(task, runs, chosen, step_times, args.reference, chosen[args.reference].losses[-1])


def best(runs: list[Run]) -> Run:
    """Return the run with the lowest final train loss; a run that diverged loses."""
    return min(runs, key=lambda run: np.nan_to_num(run.losses[-1], nan=np.inf))


def report(result: Result) -> None:
    """Print the table, and who reached the target first."""
    task, reference, target = result.task, result.reference, result.target
    steps, seconds, rows = {}, {}, []  # steps and seconds to the target of those that reach it
    for name, run in result.chosen.items():
        step_time, below = result.step_times[name], np.flatnonzero(run.losses <= target)
        if len(below):
            steps[name] = CHUNK * (int(below[0]) + 1)
            seconds[name] = steps[name] * step_time
        cells = [name, f"{run.rate:g}", f"{run.losses[-1]:.4g}", f"{run.test:.4g}"]
        cells += [str(steps[name]), f"{seconds[name]:.2f}"] if len(below) else ["-", "-"]
        rows.append([*cells, f"{1e3 * step_time:.2f}", f"{step_time / result.step_times[reference]:.2f}"])
    header = ("optimizer", "learning rate", "train loss", task.measure, "steps to target", "seconds to target")
    title = f"{task.name}: target train loss {target:.4g} (final, of the best run of {reference})"
    print_table(title, (*header, "ms/step", f"step time / {reference}"), rows)
    print(f"best by steps: {lowest(steps)}; best by seconds: {lowest(seconds)}")


def lowest(values: dict[str, Any]) -> str:
    """Name the lowest of the values, all that tie."""
    return " and ".join(name for name in values if values[name] == min(values.values())) or "none"


def plot(results: list[Result], path: Path) -> None:
    """Draw train loss by step and by second, a row of axes for each task; runs not in the table are faint."""
    figure = Figure(figsize=(11, 4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, sharey="row")
    for row, result in zip(axes, results, strict=True):
        for i, (name, runs) in enumerate(result.runs.items()):
            for run in runs:
                chosen = run is result.chosen[name]
                label = f"{name}, {run.rate:g}" if chosen else None
                style = {"color": f"C{i}", "alpha": 1 if chosen else 0.25, "linewidth": 1.8 if chosen else 0.9}
                steps = CHUNK * np.arange(1, len(run.losses) + 1)
                row[0].plot(steps, run.losses, label=label, **style)
                row[1].plot(steps * result.step_times[name], run.losses, **style)
        for ax, unit in zip(row, ("step", "second"), strict=True):
            ax.axhline(result.target, color="black", linestyle=":", linewidth=1)
            ax.set(yscale="log", xlabel=unit, title=f"{result.task.name}, by {unit}")
            ax.grid(alpha=0.2)
        row[0].set_ylabel(f"train loss (mean of the last {WINDOW} steps)")
        row[1].legend(*row[0].get_legend_handles_labels(), title="optimizer, learning rate", loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\ncurves: {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare optimizers on a classifier and a deep autoencoder.")
    parser.add_argument("--optimizers", nargs="+", default=list(METHODS), help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, default=1000, help=f"of each run, rounded up to a multiple of {CHUNK}")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters and the batches")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits")
    parser.add_argument(
        "--smoke", action="store_true", help="30 steps at one learning rate, compiled fast rather than well"
    )
    args = parser.parse_args()
    args.optimizers = list(dict.fromkeys(name for part in args.optimizers for name in part.split(",") if name))
    unknown = [name for name in args.optimizers if name not in METHODS]
    if unknown or not args.optimizers:
        parser.error(f"--optimizers: got {', '.join(unknown) or 'none'}; choose from {', '.join(METHODS)}")
    if args.steps < 1:
        parser.error(f"--steps: at least 1, got {args.steps}")
    args.num_chunks = 3 if args.smoke else -(-args.steps // CHUNK)
    args.reference = "adam" if "adam" in args.optimizers else args.optimizers[0]
    return args


def main() -> None:
    began = time.perf_counter()
    args = parse_arguments()
    try:
        images, labels = map(jnp.asarray, load_images(args.data))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data: {error}") from error
    num_train = int(0.8 * len(images))  # the first 80% train, in file order
    print(f"{num_train} train, {len(images) - num_train} test images of {images.shape[1]}x{images.shape[2]} pixels")
    print(f"{args.num_chunks * CHUNK} steps of {BATCH} images on {jax.devices()[0].device_kind}")
    keys = jax.random.split(jax.random.key(args.seed))
    tasks = classifier(images, labels, num_train, keys[0]), autoencoder(images, num_train, keys[1])
    results = [compare(task, args) for task in tasks]
    for result in results:
        report(result)
    plot(results, args.out / "quickstart.png")
    print(f"total {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
