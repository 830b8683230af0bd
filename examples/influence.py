"""Which training digits made a network say this? Wrong labels found, pictures, and a score for
every method.

    python examples/influence.py                                      # digits, about four minutes
    python examples/influence.py --data folder/with/mnist-idx-files
    python examples/influence.py --smoke                              # does it run? 20 seconds

1. Wrong labels. A tenth of the training labels are flipped. Examples are ranked by self-influence
   (how much their own loss would rise without them) and by loss; the table says how many of the
   wrong labels are found when the first few percent of the ranking are looked at, mean and standard
   error over networks.
2. A picture: the test digits of the highest loss, beside the training digits that help and harm
   them most. Removal of a helpful one would raise the loss on the test digit, that of a harmful one
   would lower it.
3. The linear datamodeling score: networks are trained on random halves of the data, all subsets
   together under `vmap`; a method is as good as its sums of scores rank what came out for every
   test digit (the margin of the right class). "ceiling" is what a method could reach that predicts
   the mean over seeds: the root of the measurement's reliability, by Spearman and Brown from the
   correlation of one half of the seeds with the other.
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
from sklearn.metrics import average_precision_score

import curvax
from curvax.apps import influence

Data = tuple[jax.Array, jax.Array]


class Mlp(nn.Module):
    """Logits of ten digits."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))))


MODEL = Mlp()
OBJECTIVE = curvax.Objective(MODEL.apply, curvax.losses.softmax_cross_entropy())


class Training(NamedTuple):
    """How networks are trained: Adam on random batches, the rate falling to zero, with a penalty
    `decay |w|^2 / 2`.
    """

    steps: int
    batch: int = 64
    rate: float = 3e-3
    decay: float = 1e-4


@functools.partial(jax.jit, static_argnums=0)
def train(training: Training, data: Data, key: jax.Array, there: jax.Array) -> Any:
    """Return params trained on the examples that are there, `[examples]`."""
    (inputs, labels), (start, draws) = data, jax.random.split(key)
    tx = optax.adam(optax.cosine_decay_schedule(training.rate, training.steps))

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(
            MODEL.apply(params, inputs[rows]), labels[rows]
        )
        return jnp.mean(there[rows] * each) + training.decay / 2 * optax.tree.norm(
            params, squared=True
        )

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        rows = jax.random.choice(key, len(labels), (training.batch,))
        updates, state = tx.update(jax.grad(loss)(params, rows), state)
        return (optax.apply_updates(params, updates), state), None

    params = MODEL.init(start, inputs[:1])
    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(draws, training.steps))[
        0
    ][0]


def cut(data: Data, size: int = 512) -> list[Data]:
    return [tuple(x[i : i + size] for x in data) for i in range(0, len(data[1]), size)]


def layout_of(params: Any, data: Data) -> curvax.kron.Layout:
    return curvax.kron_layout(OBJECTIVE, params, tuple(x[:8] for x in data))


def wrong_labels(data: Data, training: Training, seeds: int) -> None:
    """Flip a tenth of the labels, and look for them."""
    looked_at, table = (0.05, 0.1, 0.2, 0.3), {}
    for seed in range(seeds):
        flip, shift, train_key = jax.random.split(jax.random.key(seed), 3)
        wrong = jax.random.permutation(flip, len(data[1])) < len(data[1]) // 10
        other = (data[1] + jax.random.randint(shift, data[1].shape, 1, 10)) % 10
        flipped = data[0], jnp.where(wrong, other, data[1])
        params = train(training, flipped, train_key, jnp.ones(len(data[1])))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            MODEL.apply(params, data[0]), flipped[1]
        )
        fitted = influence.fit(
            OBJECTIVE, layout_of(params, data), params, cut(flipped), train_key, progress=False
        )
        rankings = {
            "self-influence, EK-FAC": influence.self_influence(
                fitted, OBJECTIVE, params, cut(flipped)
            ),
            "self-influence, gradient": influence.self_influence(
                fitted, OBJECTIVE, params, cut(flipped), method="identity"
            ),
            "loss": losses,
        }
        for name, ranking in rankings.items():
            order = np.argsort(-np.asarray(ranking))
            found = [
                np.mean(np.asarray(wrong)[order[: int(share * len(order))]]) * share / 0.1
                for share in looked_at
            ]
            precision = average_precision_score(np.asarray(wrong), np.asarray(ranking))
            table.setdefault(name, []).append([100 * x for x in (*found, precision)])
    rows = [
        [name, *(with_error(column, 1) for column in np.transpose(values))]
        for name, values in table.items()
    ]
    header = (
        "ranked by",
        *(f"in the first {share:.0%}" for share in looked_at),
        "average precision",
    )
    print_table(
        "percent of the wrong labels found; chance finds as many as are looked at", header, rows
    )


def pictures(data: Data, test: Data, training: Training, path: Path) -> None:
    """Draw the test digits of the highest loss beside their most helpful and most harmful training
    digits.
    """
    params = train(training, data, jax.random.key(0), jnp.ones(len(data[1])))
    logits = MODEL.apply(params, test[0])
    print(f"\ntest accuracy {np.mean(np.argmax(logits, -1) == test[1]):.1%}")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, test[1])
    hardest = tuple(x[jnp.argsort(-losses)[:6]] for x in test)
    fitted = influence.fit(OBJECTIVE, layout_of(params, data), params, cut(data), jax.random.key(0))
    prepared, _ = influence.precondition(fitted, OBJECTIVE, params, hardest)
    helpful, harmful = influence.top_k(prepared, OBJECTIVE, params, cut(data), k=5)
    draw(hardest, np.argmax(MODEL.apply(params, hardest[0]), -1), data, helpful, harmful, path)


def draw(
    queries: Data, said: np.ndarray, data: Data, helpful: Any, harmful: Any, path: Path
) -> None:
    side = round(queries[0].shape[1] ** 0.5)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(len(queries[1]), 11)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for q, row in enumerate(axes):
        row[0].imshow(queries[0][q].reshape(side, side), cmap="gray_r")
        row[0].set_title(f"is {queries[1][q]}, said {said[q]}", fontsize=8)
        for found, color, start in ((helpful, "tab:blue", 1), (harmful, "tab:red", 6)):
            for ax, which, change in zip(
                row[start:], found.examples[q], found.change_if_removed[q], strict=False
            ):
                ax.imshow(data[0][which].reshape(side, side), cmap="gray_r")
                ax.set_title(f"{data[1][which]}  {change:+.2g}", fontsize=7, color=color)
    axes[0, 3].text(
        0.5, 1.5, "helpful", transform=axes[0, 3].transAxes, ha="center", color="tab:blue"
    )
    axes[0, 8].text(
        0.5, 1.5, "harmful", transform=axes[0, 8].transAxes, ha="center", color="tab:red"
    )
    figure.suptitle(
        "test digits, and training digits with the change of the test digit's loss "
        "if they were removed"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def margin(params: Any, query: Data) -> jax.Array:
    """How far the logit of the right class is above all others together, for one query."""
    logits, label = MODEL.apply(params, query[0])[0], query[1][0]
    return logits[label] - jax.nn.logsumexp(jnp.where(jnp.arange(10) == label, -jnp.inf, logits))


def scores_by_method(
    params: Any, data: Data, queries: Data, window_size: int
) -> dict[str, jax.Array]:
    """Return `change_if_removed` of the queries' margins by every method."""
    layout, key = layout_of(params, data), jax.random.key(1)
    fit = functools.partial(
        influence.fit, OBJECTIVE, layout, params, cut(data), key, progress=False
    )
    factored, diagonal = fit(), fit(method="diagonal")
    gradients = curvax.per_example_grads(OBJECTIVE, params, tuple(x[:window_size] for x in data))
    window = influence.of_window(layout, curvax.solve.window_of(gradients), terms=len(data[1]))
    run: Callable[..., Any] = lambda fitted, batches, **options: influence.influence(
        fitted, OBJECTIVE, params, queries, batches, measurement=margin, **options
    )
    solver = functools.partial(curvax.cg, tol=1e-2, max_steps=100)
    found = {
        "EK-FAC": run(factored, cut(data)),
        "K-FAC": run(factored, cut(data), method="kfac"),
        "CG, Gauss-Newton": run(factored, [data], method=solver),
        f"M-FAC, {window_size} gradients": run(window, cut(data)),
        "diagonal Fisher": run(diagonal, cut(data)),
        "gradients' product": run(factored, cut(data), method="identity"),
    }
    return {name: result.change_if_removed for name, (result, _) in found.items()}


def datamodeling(data: Data, test: Data, training: Training, args: argparse.Namespace) -> None:
    """Retrain on random halves, and compare with every method's scores, of single networks and
    averaged over them.
    """
    queries = tuple(x[: args.queries] for x in test)
    measure = lambda params: jax.lax.map(
        lambda query: margin(params, jax.tree.map(lambda x: x[None], query)), queries
    )
    subsets = influence.random_subsets(len(data[1]), args.subsets, jax.random.key(2))
    own = functools.partial(train, training, data)
    measured = influence.retrain(own, measure, subsets, jax.random.key(3), num_seeds=args.seeds)
    everything = jnp.ones((args.networks, len(data[1])))
    networks = jax.vmap(own)(jax.random.split(jax.random.key(4), args.networks), everything)
    each = [
        scores_by_method(jax.tree.map(lambda x, i=i: x[i], networks), data, queries, args.window)
        for i in range(args.networks)
    ]
    mean = jnp.mean(measured, axis=0)
    rows = []
    for name in each[0]:
        one = [
            influence.linear_datamodeling_score(scores[name], subsets, mean).mean for scores in each
        ]
        together = sum(scores[name] / args.networks for scores in each)
        whole = influence.linear_datamodeling_score(together, subsets, mean)
        rows.append([name, with_error(one, 3), f"{whole.mean:.3f} ± {whole.sem:.3f}"])
    half = args.seeds // 2
    first, second = jnp.mean(measured[:half], axis=0), jnp.mean(measured[half:], axis=0)
    ranks = lambda x: jnp.argsort(jnp.argsort(x, axis=0), axis=0)
    halves = np.array(
        [np.corrcoef(a, b)[0, 1] for a, b in zip(ranks(first).T, ranks(second).T, strict=True)]
    )
    rows.append(["ceiling", "", with_error(np.sqrt(np.maximum(2 * halves / (1 + halves), 0)), 3)])
    title = (
        f"linear datamodeling score: {args.subsets} halves, {args.seeds} seeds each, "
        f"{args.queries} test digits"
    )
    print_table(
        title,
        ("method", "one network (± over networks)", f"mean of {args.networks} (± over digits)"),
        rows,
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--data", type=Path, help="folder of MNIST idx files; default: scikit-learn's digits"
    )
    flags.add_argument("--steps", type=int, default=1500, help="of training")
    flags.add_argument("--subsets", type=int, default=100, help="random halves to retrain on")
    flags.add_argument("--seeds", type=int, default=6, help="trainings of each half")
    flags.add_argument(
        "--networks", type=int, default=5, help="trained on all data, to compute scores with"
    )
    flags.add_argument("--queries", type=int, default=100, help="test digits to predict")
    flags.add_argument("--window", type=int, default=512, help="gradients of M-FAC")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument(
        "--smoke", action="store_true", help="few steps, few subsets; figures mean nothing"
    )
    args = flags.parse_args()
    images, labels, num_train = load_split(args.data)
    if args.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # compile fast rather than well
        args.steps, args.subsets, args.seeds, args.networks, args.queries, args.window = (
            20,
            4,
            2,
            2,
            5,
            16,
        )
        num_train = 200
    inputs = jnp.asarray(images.reshape(len(images), -1))
    data, test = (
        (inputs[:num_train], jnp.asarray(labels[:num_train])),
        (inputs[num_train:], jnp.asarray(labels[num_train:])),
    )
    training = Training(args.steps)
    wrong_labels(data, training, args.networks)
    pictures(data, test, training, args.out / "influence.png")
    datamodeling(data, test, training, args)


if __name__ == "__main__":
    main()
