"""Merge two networks, each fine-tuned on half of the classes from one start, into one for all.

    python examples/merging.py                                      # digits, half a minute
    python examples/merging.py --data folder/with/mnist-idx-files
    python examples/merging.py --smoke                              # does it run? 8 seconds

The start is trained on a few rows of all classes, then fine-tuned on the classes 0 to 4 and, apart
from that, on 5 to 9. Merges see the two networks and the second moments of layers on their data:
the average; Fisher merging; RegMean; and task subspaces by conjugate gradients from the average,
after several numbers of steps. "chosen" takes the number that is best on rows that were held out
of the training set, seed by seed. The table gives test accuracy in percent on all classes and on
both halves, mean and standard error over seeds; the last line was fine-tuned on all rows.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_split, print_table, with_error
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax
from curvax.apps import merging

Data = tuple[jax.Array, jax.Array]
BATCH = 256
MODEL = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
OBJECTIVE = curvax.Objective(MODEL.apply, curvax.losses.softmax_cross_entropy())
NUM_START, NUM_HELD_OUT = (
    100,
    200,
)  # rows that the start is trained on; rows for the choice of steps


@functools.partial(jax.jit, static_argnums=3)
def trained(params: Any, data: Data, key: jax.Array, steps: int) -> Any:
    """Train by Adam with batches of 64."""
    tx = optax.adam(1e-3)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(data[0]))
        grads = jax.grad(OBJECTIVE)(params, (data[0][rows], data[1][rows]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]


@jax.jit
def correct(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.argmax(MODEL.apply(params, inputs), -1) == targets


def accuracies(params: Any, data: Data) -> list[float]:
    """Return percentages on all classes, the first half and the second half."""
    right, first = np.asarray(correct(params, *data)), np.asarray(data[1]) < 5
    return [100 * right.mean(), 100 * right[first].mean(), 100 * right[~first].mean()]


def batches_of(data: Data) -> list[Data]:
    cuts = range(0, len(data[0]), BATCH)
    return [(data[0][i : i + BATCH], data[1][i : i + BATCH]) for i in cuts]


def merges(
    layout: Any,
    models: list[Any],
    halves: list[Data],
    methods: list[str],
    fisher: str,
    steps: list[int],
) -> dict[str, Any]:
    """Merge the models in all ways; one fit per model and curvature, batch by batch."""
    merged = {"average": merging.merge(models)[0]}
    for method in methods:
        of_method = merging.merge_layout(layout, method)
        curvatures = [
            curvax.kron.fit_factors(
                OBJECTIVE,
                of_method,
                model,
                batches_of(data),
                jax.random.key(0),
                fisher=fisher,
                progress=False,
            )
            for model, data in zip(models, halves, strict=True)
        ]
        if method != "subspace":
            merged[method] = merging.merge(models, curvatures, of_method)[0]
            continue
        for count in steps:
            merged[f"subspace, {count} steps"] = merging.merge(
                models, curvatures, of_method, max_steps=count, tol=0.0
            )[0]
    return merged


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    flags.add_argument("--seeds", type=int, default=10, help="pairs of networks")
    flags.add_argument("--steps", type=int, default=300, help="of training, and of fine-tuning")
    flags.add_argument("--fisher", default="exact", choices=("exact", "mc", "empirical"))
    flags.add_argument("--cg-steps", default="1,3,10,30,100", help="separated by commas")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="one pair, few steps")
    args = flags.parse_args()
    counts = [int(x) for x in args.cg_steps.split(",")]
    methods = ["fisher", "regmean", "subspace"]
    if args.smoke:
        methods = ["subspace"]
        args.seeds, args.steps, counts = 1, 20, [3]

    images, labels, num_train = load_split(args.data)
    inputs, targets = jnp.asarray(images.reshape(len(images), -1)), jnp.asarray(labels, jnp.int32)
    test = inputs[num_train:], targets[num_train:]
    results: dict[str, list[list[float]]] = {}
    with tqdm(range(args.seeds), unit="pair", leave=False) as bar:
        for seed in bar:
            order = np.random.default_rng(seed).permutation(num_train)
            held_out, order = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
            key, *keys = jax.random.split(jax.random.key(seed), 5)
            few = order[:NUM_START]
            first = MODEL.init(key, inputs[:1])
            start = trained(first, (inputs[few], targets[few]), keys[0], args.steps)
            # As many rows for all seeds, in full batches: what is compiled serves all of them.
            size = max(int(0.45 * len(order)) // BATCH * BATCH, BATCH)
            is_first = np.asarray(labels[order]) < 5
            of_halves = order[is_first][:size], order[~is_first][:size]
            halves = [(inputs[rows], targets[rows]) for rows in of_halves]
            tuned = [
                trained(start, half, k, args.steps)
                for half, k in zip(halves, keys[1:3], strict=True)
            ]
            layout = curvax.kron_layout(OBJECTIVE, start, batches_of(halves[0])[0])
            merged = merges(layout, tuned, halves, methods, args.fisher, counts)

            # The number of steps that is best on rows which no network has seen.
            validation = inputs[held_out], targets[held_out]
            names = [f"subspace, {count} steps" for count in counts]
            best = max(names, key=lambda name: accuracies(merged[name], validation)[0])
            joint = trained(start, (inputs[order], targets[order]), keys[3], args.steps)
            rows = {
                "start": start,
                "tuned on 0 to 4": tuned[0],
                "tuned on 5 to 9": tuned[1],
                **merged,
                "subspace, chosen": merged[best],
                "tuned on all": joint,
            }
            for name, params in rows.items():
                results.setdefault(name, []).append(accuracies(params, test))
    report(results)
    plot(results, counts, args.out / "merging.png")


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error over the leading axis; no error is known of one value."""
    count = len(values)
    error = values.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(values.shape[1:])
    return values.mean(0), error


def report(results: dict[str, list[list[float]]]) -> None:
    table = []
    for name, values in results.items():
        table.append([name, *map(with_error, np.transpose(values))])
    count = len(results["average"])
    print_table(
        f"test accuracy in percent, {count} pair(s) of networks",
        ("network", "all classes", "0 to 4", "5 to 9"),
        table,
    )


def plot(results: dict[str, list[list[float]]], counts: list[int], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    of_steps = np.asarray([results[f"subspace, {count} steps"] for count in counts])[..., 0]
    means, errors = mean_and_error(of_steps.T)
    ax.errorbar(counts, means, errors, marker="o", label="task subspaces")
    colors = {"average": "C1", "fisher": "C2", "regmean": "C3", "start": "C7"}
    for name, color in colors.items():
        if name not in results:
            continue
        mean, error = mean_and_error(np.asarray(results[name])[:, 0])
        ax.axhline(mean, color=color, label=name)
        ax.axhspan(mean - error, mean + error, color=color, alpha=0.15)
    ax.set(xscale="log", xlabel="steps of conjugate gradients", ylabel="test accuracy, %")
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main()
