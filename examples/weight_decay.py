"""Tune a weight decay for every parameter by hypergradients, beside one decay for all that is found
by grid.

    python examples/weight_decay.py                            # digits, about a minute and a half
    python examples/weight_decay.py --data folder/with/mnist-idx-files --fit 1000
    python examples/weight_decay.py --smoke                    # does it run? 20 seconds

A softmax regression is fitted to its minimum on some rows, with a penalty `sum_i exp(h_i) w_i^2 /
2`. Decays h follow the hypergradient of the loss on other rows, the validation rows, starting from
the grid's. With as many decays as weights that loss can be driven far below what it means: a third
set of rows, which no gradient has seen, says when to stop. The grid chooses by both. The last line
gives all rows to training instead. Mean and standard error are over random splits; the difference
is to the grid, split by split.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_split, print_table, with_error
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax
from curvax.apps._hypergradient import implicit_gradient

LOSS = curvax.losses.softmax_cross_entropy()
SOLVER = functools.partial(curvax.cg, tol=1e-2, max_steps=200)
GRID = np.arange(
    -6.0, -12.5, -0.5
)  # h, from strong to weak: every fit starts where the last one ended
RATE = 0.1  # of Adam on the decays
Data = tuple[jax.Array, jax.Array]


class Splits(NamedTuple):
    """Rows for fitting, for hypergradients, and for deciding when to stop; a leading axis of
    splits, but for test.
    """

    fit: Data
    validation: Data
    stopping: Data
    test: Data


class Scores(NamedTuple):
    """Losses, test accuracy in percent, and the gradient's norm that the fit ended with; `[steps,
    splits]`.
    """

    validation: np.ndarray
    stopping: np.ndarray
    test: np.ndarray
    accuracy: np.ndarray
    gradient: np.ndarray


def outputs(params: Any, inputs: jax.Array) -> jax.Array:
    return inputs @ params["w"] + params["b"]


def loss(params: Any, data: Data) -> jax.Array:
    return LOSS(outputs(params, data[0]), data[1])


def penalized(params: Any, decays: Any, data: Data) -> jax.Array:
    each = jax.tree.map(lambda p, h: jnp.sum(jnp.exp(h) * p**2) / 2, params, decays)
    return loss(params, data) + optax.tree.sum(each)


def minimize(params: Any, decays: Any, data: Data, steps: int) -> Any:
    """Take Newton steps on the penalized loss, which is convex."""

    def step(params: Any, _: None) -> tuple[Any, None]:
        gradient = jax.grad(penalized)(params, decays, data)
        x, _ = SOLVER(curvax.hvp(penalized, params, decays, data), gradient)
        return optax.tree.sub(params, x), None

    return jax.lax.scan(step, params, length=steps)[0]


def scores(params: Any, decays: Any, splits: Splits) -> Scores:
    right = jnp.argmax(outputs(params, splits.test[0]), -1) == splits.test[1]
    three = [loss(params, data) for data in splits[1:]]
    gradient = optax.tree.norm(jax.grad(penalized)(params, decays, splits.fit))
    return Scores(*three, 100 * jnp.mean(right), gradient)


@functools.partial(jax.jit, static_argnums=0)
def follow(spread: Callable[[Any], Any], params: Any, h: Any, state: Any, splits: Splits) -> Any:
    """Fit, score, and take one step of Adam on h, from which `spread` makes decays; for every
    split.
    """

    def own(params: Any, h: Any, state: Any, fit: Data, validation: Data, stopping: Data) -> Any:
        params = minimize(params, spread(h), fit, 2)
        outer = lambda params, h: loss(params, validation)
        inner = lambda params, h: penalized(params, spread(h), fit)
        gradient, _ = implicit_gradient(outer, inner, params, h, solver=SOLVER)
        updates, state = optax.adam(RATE).update(gradient, state)
        found = scores(params, spread(h), Splits(fit, validation, stopping, splits.test))
        return (params, optax.apply_updates(h, updates), state), found

    return jax.vmap(own)(params, h, state, *splits[:3])


@jax.jit
def fit(params: Any, decays: Any, splits: Splits) -> tuple[Any, Scores]:
    """Fit and score every split."""

    def own(params: Any, decays: Any, *rows: Data) -> tuple[Any, Scores]:
        params = minimize(params, decays, rows[0], 10)
        return params, scores(params, decays, Splits(*rows, splits.test))

    return jax.vmap(own)(params, decays, *splits[:3])


def run_grid(zeros: Any, splits: Splits, grid: np.ndarray) -> tuple[Scores, np.ndarray, Any]:
    """Return scores `[grid, splits]`, the h chosen for each split, and its params."""
    params, found, fits = zeros, [], []
    for h in tqdm(grid, desc="grid", leave=False):
        params, score = fit(params, optax.tree.full_like(zeros, h), splits)
        found.append(score)
        fits.append(params)
    every = stack(found)
    chosen = np.argmin(every.validation + every.stopping, axis=0)
    pick = lambda *x: jnp.stack([x[i][split] for split, i in enumerate(chosen)])
    return every, chosen, jax.tree.map(pick, *fits)


def run_hypergradients(
    name: str, spread: Callable[[Any], Any], h: Any, params: Any, splits: Splits, steps: int
) -> tuple[Scores, list[Any]]:
    """Return scores by step, and what h was."""
    carry, found, decays = (params, h, jax.vmap(optax.adam(RATE).init)(h)), [], []
    for _ in tqdm(range(steps), desc=name, unit="step", leave=False):
        decays.append(carry[1])
        carry, score = follow(spread, *carry, splits)
        found.append(score)
    return stack(found), decays


def stack(found: list[Scores]) -> Scores:
    return Scores(*(np.stack(x) for x in zip(*found, strict=True)))


def at(every: Scores, steps: Any) -> Scores:
    """Scores of one step, or of one for each split: `[splits]`."""
    return Scores(*(x[steps, np.arange(x.shape[1])] for x in every))


def draw_splits(
    images: np.ndarray, labels: np.ndarray, num_train: int, args: argparse.Namespace
) -> Splits:
    inputs, targets = jnp.asarray(images.reshape(len(images), -1)), jnp.asarray(labels)
    if num_train < args.fit + 2 * args.validation:
        raise SystemExit(
            f"--fit and twice --validation need more than the {num_train} images for training"
        )
    rows = np.stack(
        [np.random.default_rng(seed).permutation(num_train) for seed in range(args.splits)]
    )
    ends = (args.fit, args.fit + args.validation, args.fit + 2 * args.validation)
    parts = [rows[:, a:b] for a, b in zip((0, *ends[:2]), ends, strict=True)]
    return Splits(
        *((inputs[part], targets[part]) for part in parts),
        (inputs[num_train:], targets[num_train:]),
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    flags.add_argument("--fit", type=int, default=600, help="rows that a model is fitted to")
    flags.add_argument(
        "--validation",
        type=int,
        default=400,
        help="rows for hypergradients, and as many for stopping",
    )
    flags.add_argument(
        "--splits", type=int, default=10, help="random splits of the training images"
    )
    flags.add_argument("--steps", type=int, default=60, help="of Adam on the decays")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="two splits, few steps")
    args = flags.parse_args()
    grid = GRID
    if args.smoke:
        args.splits, args.steps, grid = 2, 5, GRID[::4]
    images, labels, num_train = load_split(args.data)
    splits = draw_splits(images, labels, num_train, args)
    classes = int(labels.max()) + 1
    shapes = {"w": (args.splits, images[0].size, classes), "b": (args.splits, classes)}
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    gridded, chosen, params = run_grid(zeros, splits, grid)
    start = jnp.asarray(grid[chosen], jnp.float32)
    same = lambda h: jax.tree.map(lambda z: jnp.broadcast_to(h, z.shape[1:]), zeros)
    each = jax.vmap(same)(start)
    runs = {
        "one": run_hypergradients("one decay", same, start, params, splits, args.steps),
        "many": run_hypergradients(
            "a decay for every parameter", lambda h: h, each, params, splits, args.steps
        ),
    }
    stop = np.argmin(runs["many"][0].stopping, axis=0)
    together = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *splits[:3])
    share = np.log(
        args.fit / together[1].shape[1]
    )  # of the rows: the penalty's weight in a sum over rows stays
    all_rows = splits._replace(fit=together)
    rows = {
        "one, grid": at(gridded, chosen),
        "one, hypergradient": at(runs["one"][0], -1),
        f"every parameter, {args.steps} steps": at(runs["many"][0], -1),
        f"every parameter, stopped after {stop.mean():.0f}": at(runs["many"][0], stop),
        "one, all rows for training": fit(zeros, jax.vmap(same)(start + share), all_rows)[1],
    }
    report(rows)
    gradient = max(x.gradient.max() for x in (*rows.values(), *(run for run, _ in runs.values())))
    print(f"largest norm of a gradient that a fit ended with: {gradient:.1e}")
    decays = jnp.stack([runs["many"][1][step]["w"][split] for split, step in enumerate(stop)])
    plot(
        runs["many"][0],
        stop,
        np.mean(decays, (0, 2)).reshape(images[0].shape),
        args.out / "weight_decay.png",
    )


def report(rows: dict[str, Scores]) -> None:
    grid = next(iter(rows.values()))
    table = []
    for name, row in rows.items():
        seen = "all rows" in name  # its losses are those of training
        held_out = (
            ["-", "-"] if seen else [f"{row.validation.mean():.4f}", f"{row.stopping.mean():.4f}"]
        )
        pairs = ((row.test, grid.test, 3), (row.accuracy, grid.accuracy, 2))
        own = [
            with_error(x, digits, sign)
            for ours, base, digits in pairs
            for x, sign in ((ours, ""), (ours - base, "+"))
        ]
        table.append([name, *held_out, *own])
    header = (
        "decays",
        "validation",
        "stopping",
        "test loss",
        "difference",
        "test accuracy",
        "difference",
    )
    print_table("softmax regression: loss by rows, and test accuracy in percent", header, table)


def plot(run: Scores, stop: np.ndarray, decays: np.ndarray, path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for name, values in (
        ("validation", run.validation),
        ("stopping", run.stopping),
        ("test", run.test),
    ):
        mean, spread = values.mean(1), values.std(1) / np.sqrt(values.shape[1])
        left.semilogy(mean, label=name)
        left.fill_between(range(len(mean)), mean - spread, mean + spread, alpha=0.2)
    left.axvline(stop.mean(), color="black", linestyle=":", linewidth=1)
    left.set(xlabel="steps on the decays", ylabel="loss", title="a decay for every parameter")
    left.legend()
    right.set(title="log decay where stopped, mean over classes", xticks=[], yticks=[])
    figure.colorbar(right.imshow(decays), ax=right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main()
