"""How the Hessian's spectrum of a classifier changes in training: outliers, bulk, and where the
gradient lies.

    python examples/spectrum.py                                     # digits, about a minute
    python examples/spectrum.py --data folder/with/mnist-idx-files
    python examples/spectrum.py --smoke                             # does it run? 20 seconds

At several times in training by SGD: the loss; the largest and the smallest eigenvalue of the
Hessian of the training loss over all data, in batches; how many outliers stand above the bulk (the
largest ratio between neighbours among the top eigenvalues is where they end), to be compared with
the number of classes; the share of the gradient's squared length in the span of the top
eigenvectors, one for each class, and what a random subspace would hold; the overlap of that span
with the one before. The picture shows the spectral densities, with the outliers marked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_split, print_table
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax
import curvax.plot
from curvax import spectra

MODEL = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(32), nn.tanh, nn.Dense(10)])
OBJECTIVE = curvax.Objective(MODEL.apply, curvax.losses.softmax_cross_entropy())
CLASSES, ROWS = 10, 1024
Batch = tuple[np.ndarray, np.ndarray]


class Spectrum(NamedTuple):
    """What is found at one time in training."""

    step: int
    loss: float
    accuracy: float
    top: np.ndarray
    smallest: float
    fraction: float
    vectors: Any
    density: spectra.Density


def outliers(top: np.ndarray) -> int:
    """Count the eigenvalues above the widest gap, by ratio, in descending ones; one that is not
    positive ends the list.
    """
    positive = top[: np.argmax(top <= 0)] if (top <= 0).any() else top
    return int(np.argmax(positive[:-1] / positive[1:])) + 1 if len(positive) > 1 else len(positive)


@jax.jit
def train_step(params: Any, state: Any, batch: Batch, rate: jax.Array) -> tuple[Any, Any]:
    updates, state = optax.trace(0.9).update(jax.grad(OBJECTIVE)(params, batch), state)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state


value_and_grad = jax.jit(jax.value_and_grad(OBJECTIVE))


def over_all(params: Any, batches: list[Batch]) -> tuple[float, Any]:
    """Return loss and gradient over all batches."""
    total = sum(len(labels) for _, labels in batches)
    parts = [
        jax.tree.map(lambda x, b=b: x * len(b[1]) / total, value_and_grad(params, b))
        for b in batches
    ]
    return jax.tree.map(lambda *x: sum(x), *parts)


def measure(
    step: int, params: Any, batches: list[Batch], test: Batch, probes: int, steps: int
) -> Spectrum:
    key = jax.random.key(step)
    loss, gradient = over_all(params, batches)
    matvec = curvax.streamed(curvax.hvp, OBJECTIVE, params, batches)
    (top, vectors), info = spectra.eigsh(matvec, params, 2 * CLASSES, key, tol=1e-3)
    if not info.converged:
        tqdm.write(f"step {step}: {info.message}")
    density, _ = spectra.spectral_density(matvec, params, key, probes, steps)
    first = jax.tree.map(lambda x: x[:CLASSES], vectors)
    fraction = float(spectra.fraction_in_subspace(first, gradient))
    accuracy = float(jnp.mean(jnp.argmax(OBJECTIVE.outputs(params, test[0]), -1) == test[1]))
    smallest = float(jnp.min(density.nodes))  # at its ends, nodes are eigenvalues
    return Spectrum(
        step, float(loss), accuracy, np.asarray(top), smallest, fraction, first, density
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    flags.add_argument("--steps", type=int, default=2000, help="of training")
    flags.add_argument(
        "--rate", type=float, default=0.03, help="learning rate of SGD with momentum 0.9"
    )
    flags.add_argument("--probes", type=int, default=4, help="of each density")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="few steps, short densities")
    args = flags.parse_args()
    times, lanczos_steps = [0, args.steps // 20, args.steps // 4, args.steps], 80
    if args.smoke:
        times, lanczos_steps, args.probes = [0, 100], 20, 2
    images, labels, num_train = load_split(args.data)
    inputs = images.reshape(len(images), -1)
    test = (inputs[num_train:], labels[num_train:])
    train = inputs[:num_train], labels[:num_train]
    batches = [(train[0][i : i + ROWS], train[1][i : i + ROWS]) for i in range(0, num_train, ROWS)]

    params = jax.jit(MODEL.init)(jax.random.key(0), inputs[:1])
    state, rng, found = optax.trace(0.9).init(params), np.random.default_rng(0), []
    for step in tqdm(range(times[-1] + 1), unit="step", leave=False):
        if step in times:
            found.append(measure(step, params, batches, test, args.probes, lanczos_steps))
        rows = rng.integers(0, num_train, 64)
        params, state = train_step(params, state, (train[0][rows], train[1][rows]), args.rate)
    report(found, sum(x.size for x in jax.tree.leaves(params)))
    plot(found, args.out / "spectrum.png")


def report(found: list[Spectrum], dimension: int) -> None:
    header = (
        "step",
        "loss",
        "test acc.",
        "largest",
        "smallest",
        "outliers",
        "gradient in top 10",
        "overlap with before",
    )
    rows = []
    for before, now in zip([None, *found], found, strict=False):
        overlap = (
            ""
            if before is None
            else f"{float(spectra.subspace_overlap(before.vectors, now.vectors)):.2f}"
        )
        numbers = (
            f"{now.loss:.4f}",
            f"{100 * now.accuracy:.1f} %",
            f"{now.top[0]:.3g}",
            f"{now.smallest:.3g}",
        )
        rows.append(
            (
                str(now.step),
                *numbers,
                str(outliers(now.top)),
                f"{100 * now.fraction:.1f} %",
                overlap,
            )
        )
    print_table(f"Hessian of {dimension} parameters; {CLASSES} classes", header, rows)
    print(
        f"a random subspace of {CLASSES} dimensions holds "
        f"{100 * CLASSES / dimension:.2f} % of a gradient"
    )
    print("top eigenvalues at the end:", ", ".join(f"{x:.3g}" for x in found[-1].top))


def plot(found: list[Spectrum], path: Path) -> None:
    figure = Figure(figsize=(4 * len(found), 3.5), layout="constrained")
    for ax, now in zip(np.ravel(figure.subplots(1, len(found))), found, strict=True):
        curvax.plot.spectral_density(now.density, eigenvalues=now.top[: outliers(now.top)], ax=ax)
        ax.set_title(f"step {now.step}, loss {now.loss:.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main()
