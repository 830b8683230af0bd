"""Classify digits at an angle that no training image has, by aligning gradients and Hessians.

    python examples/domains.py                                      # digits, three minutes
    python examples/domains.py --data folder/with/mnist-idx-files
    python examples/domains.py --smoke                              # does it run? 8 seconds

The images are dealt into domains, each rotated by an angle of its own. One domain is left out, and
a network is trained on the others: on the mean loss ("plain"), and with penalties on how far apart
the domains' gradients and Hessians are in the last layer, `curvax.apps.penalties`. The table gives
the accuracy in percent on the domain left out, mean and standard error over seeds, for every domain
and for their mean; the last columns are the difference to plain training, seed by seed, and the
accuracy on test images of the domains that were trained on.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import load_split, print_table, with_error
from matplotlib.figure import Figure
from scipy.ndimage import rotate
from tqdm import tqdm

import curvax
from curvax.apps import penalties

Data = tuple[jax.Array, jax.Array]
MODEL = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(32), nn.relu, nn.Dense(10)])
OBJECTIVE = curvax.Objective(MODEL.apply, curvax.losses.softmax_cross_entropy())
ANGLES = (0, 15, 30, 45, 60, 75)
BATCH = 32  # rows of every domain in a step


def is_head(path: str, leaf: jax.Array) -> bool:
    """Select the last layer of the network, kernel and bias."""
    del leaf
    return "layers_4" in path


def plain(params: Any, domains: Any, key: jax.Array) -> jax.Array:
    del key
    # All domains have as many rows: the mean of their means is the mean of all.
    return jnp.mean(jnp.stack([OBJECTIVE(params, domain) for domain in domains]))


def aligned(form: str, curvature_weight: float, gradient_weight: float) -> Callable[..., Any]:
    return penalties.hessian_alignment(
        OBJECTIVE,
        is_head,
        form=form,
        curvature_weight=curvature_weight,
        gradient_weight=gradient_weight,
        num_probes=10,
    )


LOSSES = {
    "plain": plain,
    "gradients": aligned("hessian_gradient", 0.0, 0.1),
    "H g, as published": aligned("hessian_gradient", 1e-4, 5e-3),
    "H g, stronger": aligned("hessian_gradient", 0.1, 0.1),
    "diag H, as published": aligned("hutchinson", 1e-3, 5e-3),
    "diag H, stronger": aligned("hutchinson", 0.1, 0.1),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def trained(name: str, domains: Data, keys: jax.Array, steps: int) -> Any:
    """Train one network for each seed by Adam, on BATCH rows of each domain in a step.

    `domains` are arrays `[seeds, domains, rows, ...]`.
    """
    tx = optax.adam(2e-3)

    def of_seed(domains: Data, key: jax.Array) -> Any:
        inputs, labels = domains
        params = MODEL.init(key, inputs[0, :1])

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows_key, probes_key = jax.random.split(key)
            rows = jax.random.randint(rows_key, (len(inputs), BATCH), 0, inputs.shape[1])
            batches = [(x[r], y[r]) for x, y, r in zip(inputs, labels, rows, strict=True)]
            grads = jax.grad(LOSSES[name])(params, batches, probes_key)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, tx.init(params)
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]

    return jax.vmap(of_seed)(domains, keys)


@jax.jit
def accuracy(params: Any, data: Data) -> jax.Array:
    """Return the percentage for every seed; both have a leading axis of seeds."""
    outputs = jax.vmap(MODEL.apply)(params, data[0])
    return 100 * jnp.mean(jnp.argmax(outputs, -1) == data[1], axis=1)


def rotated(images: np.ndarray, angles: tuple[int, ...]) -> np.ndarray:
    """Return all images at all angles, `[angles, n, pixels]`."""
    turn = lambda angle: rotate(images, angle, axes=(1, 2), reshape=False, order=1)
    return np.stack([turn(angle).reshape(len(images), -1) for angle in angles])


def deal(
    by_angle: np.ndarray, labels: np.ndarray, rows: np.ndarray, seeds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Deal rows to the angles, without repetition, in another order for each seed.

    The result is `[seeds, angles, n, pixels]` and labels `[seeds, angles, n]`.
    """
    count = len(by_angle)
    orders = [np.random.default_rng(seed).permutation(rows) for seed in range(seeds)]
    dealt = np.stack([order[: len(rows) // count * count].reshape(count, -1) for order in orders])
    return by_angle[np.arange(count)[:, None], dealt], labels[dealt]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    flags.add_argument("--seeds", type=int, default=10, help="networks for each domain left out")
    flags.add_argument("--steps", type=int, default=400, help="of training")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="one network, two methods, few steps")
    args = flags.parse_args()
    names, angles = list(LOSSES), ANGLES
    if args.smoke:
        args.seeds, args.steps, names, angles = 1, 5, ["plain", "H g, as published"], (0, 45, 75)

    images, labels, num_train = load_split(args.data)
    by_angle, rows = rotated(images, angles), np.arange(len(images))
    train = deal(by_angle, labels, rows[:num_train], args.seeds)
    test = deal(by_angle, labels, rows[num_train:], args.seeds)
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    # Accuracies on the domain left out, and on the others.
    shape = len(names), len(angles), args.seeds
    outside, inside = np.zeros(shape), np.zeros(shape)
    with tqdm(total=len(names) * len(angles), unit="run", leave=False) as bar:
        for i, name in enumerate(names):
            bar.set_postfix_str(name)
            for j in range(len(angles)):
                others = np.delete(np.arange(len(angles)), j)
                domains = jax.tree.map(lambda x, others=others: jnp.asarray(x[:, others]), train)
                params = trained(name, domains, keys, args.steps)
                # No row at this angle was trained on: all of them are test data.
                all_rows = [
                    np.concatenate([x[:, j], y[:, j]], 1) for x, y in zip(train, test, strict=True)
                ]
                outside[i, j] = accuracy(params, tuple(map(jnp.asarray, all_rows)))
                seen = [x[:, others].reshape(args.seeds, -1, *x.shape[3:]) for x in test]
                inside[i, j] = accuracy(params, tuple(map(jnp.asarray, seen)))
                bar.update()
    report(names, angles, outside, inside)
    plot(names, angles, outside, args.out / "domains.png")


def report(
    names: list[str], angles: tuple[int, ...], outside: np.ndarray, inside: np.ndarray
) -> None:
    means, table = outside.mean(1), []
    for i, name in enumerate(names):
        by_domain = [with_error(values) for values in outside[i]]
        summary = means[i], means[i] - means[0], inside[i].mean(0)
        table.append([name, *by_domain, *map(with_error, summary)])
    print_table(
        f"accuracy in percent on the domain left out, {outside.shape[2]} seed(s)",
        ("loss", *(f"{angle}°" for angle in angles), "mean", "to plain", "inside"),
        table,
    )


def plot(names: list[str], angles: tuple[int, ...], outside: np.ndarray, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for name, values in zip(names, outside - outside[:1], strict=True):
        error = values.std(1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else 0
        ax.errorbar(angles, values.mean(1), error, marker="o", capsize=3, label=name)
    ax.set(xlabel="angle left out, degrees", ylabel="accuracy above plain training, points")
    ax.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main()
