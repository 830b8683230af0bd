"""Prune a classifier by magnitude, diagonal Fisher, optimal brain apoptosis, and optimal brain
surgeon with M-FAC.

    python examples/pruning.py                                      # digits, about three minutes
    python examples/pruning.py --data folder/with/mnist-idx-files
    python examples/pruning.py --smoke                              # does it run? 20 seconds

Every network (one for each seed) is pruned to several sparsities by every method, and then
fine-tuned with what was removed kept at zero. "surgeon" scores, removes and corrects in one go,
"surgeon 16x" in sixteen rounds. The table gives test accuracy in percent, mean and standard error
over seeds.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_split, print_table, with_error
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax
from curvax.apps import pruning

WINDOW, DAMPING = 64, 1e-5
Data = tuple[jax.Array, jax.Array]


class Problem(NamedTuple):
    """A network to prune: trained params, data, and batches of 32 for gradients."""

    params: Any
    train: Data
    test: Data
    batches: list[Data]


@functools.partial(jax.jit, static_argnums=(0, 5))
def fit(
    objective: curvax.Objective,
    params: Any,
    masks: Any,
    rate: float,
    data: Data,
    steps: int,
    seed: int,
) -> Any:
    """Train what the masks keep, by Adam with batches of 64."""
    tx = optax.chain(optax.adam(rate), pruning.keep_pruned(masks))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(data[0]))
        grads = jax.grad(objective)(params, (data[0][rows], data[1][rows]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(
        step, (params, tx.init(params)), jax.random.split(jax.random.key(seed), steps)
    )[0][0]


MODEL = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
OBJECTIVE = curvax.Objective(MODEL.apply, curvax.losses.softmax_cross_entropy())


def trained(
    images: np.ndarray, labels: np.ndarray, num_train: int, steps: int, seed: int
) -> Problem:
    inputs, targets = jnp.asarray(images.reshape(len(images), -1)), jnp.asarray(labels, jnp.int32)
    train, test = (
        (inputs[:num_train], targets[:num_train]),
        (inputs[num_train:], targets[num_train:]),
    )
    params = MODEL.init(jax.random.key(seed), inputs[:1])
    params = fit(OBJECTIVE, params, everything(params), 1e-3, train, steps, seed)
    order = (
        np.random.default_rng(seed).permutation(num_train)[: num_train // 32 * 32].reshape(-1, 32)
    )
    return Problem(params, train, test, [(inputs[rows], targets[rows]) for rows in order])


def everything(params: Any) -> Any:
    return jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)


def by_scores(scores: Callable[[Problem], Any]) -> Callable[[Problem, float], tuple[Any, Any]]:
    """Remove the weights of lowest score; correct nothing."""

    def method(problem: Problem, sparsity: float) -> tuple[Any, Any]:
        masks = pruning.unstructured()(scores(problem), everything(problem.params), sparsity)
        return pruning.apply_masks(problem.params, masks), masks

    return method


def surgeon(rounds: int) -> Callable[[Problem, float], tuple[Any, Any]]:
    def method(problem: Problem, sparsity: float) -> tuple[Any, Any]:
        repeated = (problem.batches[i % len(problem.batches)] for i in range(rounds * WINDOW))
        options = {"window_size": WINDOW, "damping": DAMPING, "recomputations": rounds}
        return pruning.prune(OBJECTIVE, problem.params, repeated, sparsity, **options)[:2]

    return method


METHODS = {
    "magnitude": by_scores(lambda p: pruning.magnitude(p.params)),
    "diagonal Fisher": by_scores(lambda p: pruning.diagonal_fisher(OBJECTIVE, p.params, p.train)),
    "apoptosis": by_scores(lambda p: pruning.apoptosis(OBJECTIVE, p.params, p.train)),
    "surgeon": surgeon(1),
    "surgeon 16x": surgeon(16),
}


def accuracy(problem: Problem, params: Any) -> float:
    outputs = OBJECTIVE.outputs(params, problem.test[0])
    return 100 * float(jnp.mean(jnp.argmax(outputs, -1) == problem.test[1]))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    flags.add_argument("--seeds", type=int, default=5, help="networks")
    flags.add_argument(
        "--steps", type=int, default=1000, help="of training; fine-tuning takes a fifth"
    )
    flags.add_argument("--sparsities", default="0.5,0.75,0.9,0.95", help="separated by commas")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="one network, one sparsity, few steps")
    args = flags.parse_args()
    sparsities = [float(x) for x in args.sparsities.split(",")]
    methods = METHODS
    if args.smoke:
        args.seeds, args.steps, sparsities = 1, 100, [0.9]
        methods = {name: METHODS[name] for name in ("magnitude", "surgeon")}
    images, labels, num_train = load_split(args.data)
    shape = (len(methods), len(sparsities), args.seeds)
    pruned, tuned, dense = np.zeros(shape), np.zeros(shape), []
    with tqdm(total=int(np.prod(shape)), unit="model", leave=False) as bar:
        for seed in range(args.seeds):
            problem = trained(images, labels, num_train, args.steps, seed)
            dense.append(accuracy(problem, problem.params))
            for i, (name, method) in enumerate(methods.items()):
                for j, sparsity in enumerate(sparsities):
                    bar.set_postfix_str(f"{name} {sparsity:g}")
                    params, masks = method(problem, sparsity)
                    pruned[i, j, seed] = accuracy(problem, params)
                    params = fit(
                        OBJECTIVE, params, masks, 3e-4, problem.train, args.steps // 5, seed + 1
                    )
                    tuned[i, j, seed] = accuracy(problem, params)
                    bar.update()
    report(list(methods), sparsities, dense, pruned, tuned)
    plot(list(methods), sparsities, dense, pruned, tuned, args.out / "pruning.png")


def report(
    names: list[str],
    sparsities: list[float],
    dense: list[float],
    pruned: np.ndarray,
    tuned: np.ndarray,
) -> None:
    print(f"accuracy before pruning: {np.mean(dense):.2f} %, of {len(dense)} network(s)")
    header = ("method", *(f"{100 * s:g} % gone" for s in sparsities))
    for title, values in (("one-shot", pruned), ("fine-tuned", tuned)):
        rows = [[name, *map(with_error, values[i])] for i, name in enumerate(names)]
        print_table(f"test accuracy, {title}", header, rows)


def plot(
    names: list[str],
    sparsities: list[float],
    dense: list[float],
    pruned: np.ndarray,
    tuned: np.ndarray,
    path: Path,
) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for ax, values, title in zip(
        figure.subplots(1, 2, sharey=True), (pruned, tuned), ("one-shot", "fine-tuned"), strict=True
    ):
        for i, name in enumerate(names):
            mean = values[i].mean(1)
            spread = values[i].std(1) / np.sqrt(values.shape[2])
            ax.plot(sparsities, mean, marker="o", label=name)
            ax.fill_between(sparsities, mean - spread, mean + spread, alpha=0.2)
        ax.axhline(np.mean(dense), color="black", linestyle=":", linewidth=1)
        ax.set(xlabel="share of weights removed", title=title)
        ax.grid(alpha=0.2)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.axes[0].legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main()
