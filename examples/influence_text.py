"""Which training sequences made a small transformer write this? Influence with EK-FAC, down to
single characters.

    python examples/influence_text.py                   # Python's standard library, some minutes
    python examples/influence_text.py --data tinyshakespeare.txt --queries 10
    python examples/influence_text.py --candidates 500  # only those that share rare 4-grams
    python examples/influence_text.py --smoke           # does it run? 20 seconds

The character model of `char_lm.py` is trained with AdamW. A query is a sequence of the validation
text, and what is measured is the log-probability of its last 8 characters given those before: a
function of our own, not the training loss. For every query the training sequences are found whose
removal is predicted to change that most. `change if removed` is in nats: negative where a sequence
raised the log-probability (helpful), positive where it lowered it (harmful).

Printed are the best of them, whether the parts of characters sum to the whole, and how much text
they share with the query, against all sequences. `influence_text.html` in the folder of `--out`
shows each, shaded by the influence of its characters.

Weights and curvature are saved in a folder of `--out` that is named by settings and text: a second
run reads them back, and one that was interrupted while it fitted the curvature goes on from there.
"""

from __future__ import annotations

import argparse
import html
import re
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import print_table
from char_lm import CHARACTERS, LENGTH, Transformer, read_text
from tqdm import tqdm

import curvax
from curvax.apps import influence

MEASURED = 8  # characters at the end of a query
GRAM = 4  # characters that BM25 takes as one token
TRAINING, SCORING = 32, 64  # sequences in a batch
SCORE = jax.jit(influence.score, static_argnums=1, static_argnames="by")
COMPRESS = jax.jit(influence.compress, static_argnums=1)
SIGN = "change if removed, in nats of the log-probability: negative = the sequence raised it"
Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each [sequences, LENGTH]


class Problem(NamedTuple):
    """A trained model, and its text."""

    model: Transformer
    objective: curvax.Objective
    params: Any
    train: Batch
    validation: Batch


class Found(NamedTuple):
    """A training sequence for one query: text, score, and the parts of characters and layers."""

    number: int
    text: str
    change: float
    by_character: np.ndarray
    rest: float
    by_layer: dict[str, float]


class Answer(NamedTuple):
    """One query: text, log-probability of what is measured, and sequences at both ends, the
    furthest first.
    """

    text: str
    log_probability: float
    helpful: list[Found]
    harmful: list[Found]


def split(codes: np.ndarray) -> tuple[Batch, Batch]:
    """Cut a text into sequences; the last tenth is for validation, training gets a whole number of
    batches.
    """
    count = (len(codes) - 1) // LENGTH
    num_train = count * 9 // 10 // SCORING * SCORING
    if num_train == 0 or count == num_train:
        raise SystemExit(f"--data: {len(codes)} characters are too few")
    pairs = tuple(codes[start : start + count * LENGTH].reshape(count, LENGTH) for start in (0, 1))
    return tuple(x[:num_train] for x in pairs), tuple(x[count * 9 // 10 :] for x in pairs)


def trained(
    model: Transformer, objective: curvax.Objective, train: Batch, steps: int, seed: int, path: Path
) -> Any:
    """Train with AdamW, or read what was trained before: scores are of these weights, and so is the
    curvature.
    """
    params = jax.jit(model.init)(jax.random.key(seed), train[0][:2])
    if path.exists():
        print(f"weights read from {path}")
        return jax.tree.map(jnp.asarray, flax.serialization.from_bytes(params, path.read_bytes()))
    tx = optax.adamw(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, rng = tx.init(params), np.random.default_rng(seed)
    for i in (bar := tqdm(range(steps), desc="training", unit="step")):
        rows = rng.integers(0, len(train[0]), TRAINING)
        params, state, loss = step(params, state, tuple(x[rows] for x in train))
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(flax.serialization.to_bytes(params))
    unfinished.replace(path)
    return params


def layout_of(problem: Problem) -> curvax.kron.Layout:
    """Hold norms and embeddings fixed.

    Grosse et al. follow influence through perceptrons only, because they hold most of the weights.
    Here that is all linear maps: of attention, of perceptrons, and of the output. What is left,
    norms and embeddings, is few weights; and an embedding has a part for every character, so that a
    character's mere presence would count.
    """
    two = tuple(x[:2] for x in problem.train)
    layout = curvax.kron_layout(problem.objective, problem.params, two, unmatched="identity")
    for leaf in layout.leaves:
        if "Embed" in leaf.path:
            layout = layout.edit(leaf.path, kind="identity")
    return layout


@partial(jax.jit, static_argnums=0)
def of_targets(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    """Log-probabilities of the targets, `[sequences, LENGTH]`."""
    logits = jax.nn.log_softmax(model.apply(params, batch[0]))
    return jnp.take_along_axis(logits, batch[1][..., None], axis=-1)[..., 0]


def choose_queries(problem: Problem, number: int) -> Batch:
    """Choose validation sequences whose end the model has learned: far more probable than its
    characters' frequencies say.

    Of the tenth that it is surest of, those where it gains most come first, and no two ends share a
    4-gram.
    """
    inputs, targets = problem.validation
    chunks = [(inputs[i : i + 256], targets[i : i + 256]) for i in range(0, len(inputs), 256)]
    own = np.concatenate([of_targets(problem.model, problem.params, chunk) for chunk in chunks])[
        :, -MEASURED:
    ].sum(axis=1)
    frequency = np.bincount(problem.train[1].ravel(), minlength=CHARACTERS) + 1
    by_frequency = np.log(frequency / frequency.sum())[targets[:, -MEASURED:]].sum(axis=1)
    chosen: list[int] = []
    known: set[str] = set()
    for row in np.argsort(by_frequency - own):
        ends = set(grams(text_of(targets[row, -MEASURED:])))
        if own[row] >= np.quantile(own, 0.9) and not ends & known and len(chosen) < number:
            chosen.append(row)
            known |= ends
    return inputs[chosen], targets[chosen]


def text_of(codes: np.ndarray) -> str:
    """Turn numbers into text; the number for all but printable ASCII is most often a newline."""
    return "".join("\n" if code == CHARACTERS - 1 else chr(code + 32) for code in codes)


def texts(batch: Batch) -> list[str]:
    """Each sequence with the target of its last position: LENGTH + 1 characters."""
    return [text_of(np.append(x[:1], y)) for x, y in zip(*batch, strict=True)]


def grams(text: str) -> list[str]:
    return [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]


def candidates(queries: Batch, train: Batch, number: int | None) -> np.ndarray:
    """Return the numbers of training sequences to score: all, or those that BM25 finds for some
    query.
    """
    if number is None:
        return np.arange(len(train[0]))
    found = influence.bm25(
        [grams(text) for text in texts(queries)], map(grams, texts(train)), k=number
    )
    return np.unique(found.documents)


def batches_of(batch: Batch, rows: np.ndarray) -> list[Batch]:
    return [tuple(x[rows[i : i + SCORING]] for x in batch) for i in range(0, len(rows), SCORING)]


def prepare(
    problem: Problem, fitted: influence.Fitted, queries: Batch, rank: int
) -> influence.Queries:
    """Divide the queries' gradients by the curvature, once for all training sequences."""

    def measure(params: Any, query: Batch) -> jax.Array:
        return of_targets(problem.model, params, query)[0, -MEASURED:].sum()

    prepared, _ = influence.precondition(
        fitted, problem.objective, problem.params, queries, measurement=measure
    )
    if rank:
        prepared, info = COMPRESS(prepared, rank)
        print(
            f"queries compressed to rank {rank}: relative error "
            f"{info.error.min():.2f} to {info.error.max():.2f}"
        )
    return prepared


def search(
    problem: Problem, prepared: influence.Queries, queries: Batch, rows: np.ndarray, k: int
) -> list[Answer]:
    """Score the training sequences in `rows`, then the k at both ends of every query by character
    and by layer.
    """
    bar = tqdm(batches_of(problem.train, rows), desc="scoring", unit="batch")
    ends = influence.top_k(prepared, problem.objective, problem.params, bar, k)
    highest, lowest = (
        rows[np.asarray(end.examples)] for end in ends
    )  # numbers in the stream are places in rows
    both = np.unique([highest, lowest])
    batch = tuple(x[both] for x in problem.train)
    own = partial(SCORE, prepared, problem.objective, problem.params, batch)
    by_token, by_layer, text = (
        *(jax.device_get(own(by=by)) for by in ("token", "layer")),
        texts(batch),
    )

    def found(query: int, number: int, change: float) -> Found:
        at = int(np.searchsorted(both, number))
        parts = {short(name): float(x[query, at]) for name, x in by_layer.by_layer.items()}
        return Found(
            number,
            text[at],
            change,
            by_token.by_token[query, at],
            float(by_token.elsewhere[query, at]),
            parts,
        )

    log_probabilities = of_targets(problem.model, problem.params, queries)[:, -MEASURED:].sum(
        axis=1
    )
    answers = []
    for q, (asked, log_probability) in enumerate(
        zip(texts(queries), log_probabilities.tolist(), strict=True)
    ):
        pairs = [
            [
                found(q, *pair)
                for pair in zip(numbers[q].tolist(), end.change_if_removed[q].tolist(), strict=True)
            ]
            for numbers, end in zip((lowest, highest), reversed(ends), strict=True)
        ]
        answers.append(Answer(asked, log_probability, *pairs))
    return answers


def short(path: str) -> str:
    """Shorten the path of a kernel to the names of its layer."""
    names = re.findall(r"'(\w+)'", path)[1:-1]
    aliases = {"ScanLayer_0": "layers", "MultiHeadDotProductAttention_0": "attention"}
    return " ".join(aliases.get(name, name) for name in names) if len(names) > 1 else "output"


def report(answers: list[Answer]) -> None:
    """Print the furthest sequences of every query, and whether parts sum to wholes."""
    print(f"\n{SIGN}")
    for answer in answers:
        context, end = answer.text[:-MEASURED], answer.text[-MEASURED:]
        rows = [
            [escaped(around(found)), kind, str(found.number), f"{found.change:+.4f}"]
            for kind, side in (("helpful", answer.helpful), ("harmful", answer.harmful))
            for found in side[:3]
        ]
        title = (
            f'"{escaped(context[-32:])}" then "{escaped(end)}", '
            f"log-probability {answer.log_probability:.2f}"
        )
        print_table(
            title, ("around its strongest character", "", "sequence", "change if removed"), rows
        )
    every = [found for answer in answers for found in (*answer.helpful, *answer.harmful)]
    gap = lambda parts, whole: abs(parts - whole) / abs(whole)
    characters = max(gap(found.by_character.sum() + found.rest, found.change) for found in every)
    layers = max(gap(sum(found.by_layer.values()), found.change) for found in every)
    print("\nparts sum to the score, largest relative difference of any sequence shown:")
    print(f"characters and the rest {characters:.1e}, layers {layers:.1e}")


def around(found: Found, width: int = 40) -> str:
    """Cut out the text around the character with the most influence."""
    start = int(np.abs(found.by_character).argmax()) + 1 - width // 2
    start = min(max(0, start), len(found.text) - width)
    return found.text[start : start + width]


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def check_meaning(answers: list[Answer], train: Batch) -> None:
    """Print how much text sequences share with what was measured: those found, against all.
    Influence sees no text.

    BM25 is that of the 4-grams that end in a measured character. Chance would put one in a hundred
    into its best hundredth.
    """
    documents = [grams(text) for text in texts(train)]
    asked = [grams(answer.text[-MEASURED - GRAM + 1 :]) for answer in answers]
    ranked = influence.bm25(asked, documents, k=len(documents))
    scores = np.empty_like(ranked.scores)
    np.put_along_axis(scores, ranked.documents, ranked.scores, axis=1)
    rows = []
    for answer, score, order in zip(answers, scores, ranked.documents, strict=True):
        helpful, harmful = (
            [found.number for found in side] for side in (answer.helpful, answer.harmful)
        )
        best = np.isin([helpful, harmful], order[: -(-len(order) // 100)]).sum(axis=1)
        cells = [f"{score[numbers].mean():.2f}" for numbers in (helpful, harmful, slice(None))]
        counts = [f"{count} of {len(helpful)}" for count in best]
        rows.append([f'"{escaped(answer.text[-MEASURED:])}"', *cells, *counts])
    header = ("query", "BM25, helpful", "harmful", "all", "in its best 1 %, helpful", "harmful")
    print_table("text that is shared with what was measured, by mean BM25", header, rows)


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; color: #222;
  background: #fff; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .2rem 0;
  padding: .4rem .7rem; border: 1px solid #ddd; border-radius: 4px; background: #fcfcfc; }
mark { background: #ffe08a; }
small { color: #666; display: block; margin-bottom: .9rem; }
section { border-top: 2px solid #ccc; margin-top: 2rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr));
  gap: 0 1.5rem; }
"""
RAISED, LOWERED = "33,102,172", "214,80,60"


def page(answers: list[Answer], about: str) -> str:
    """Write one page that needs no other file."""
    swatch = lambda color, name: f'<span style="background:rgba({color},.6)">{name}</span>'
    legend = (
        "The log-probability of the characters <mark>marked</mark> was measured. Beneath each "
        "query are the training sequences whose removal is predicted to change it most. Characters "
        f"are shaded by their part: those that {swatch(RAISED, 'raised it')}, and those that "
        f"{swatch(LOWERED, 'lowered it')}. The part of a position is shown on the character that "
        "was predicted there; its gradient holds the losses of later characters, too. Shades are "
        "relative to the strongest character of each sequence. &crarr; is a newline (or no "
        "printable ASCII). "
        f"Scores: {SIGN}. In small print, the parts of layers in percent of the score."
    )
    sections = "\n".join(map(_section, answers))
    head = (
        f'<meta charset="utf-8"><title>Influence on a character model</title><style>{STYLE}</style>'
    )
    title = "<h1>Which training sequences made the model write this?</h1>"
    body = f"{title}<p>{legend}</p><p>{html.escape(about)}</p>{sections}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _section(answer: Answer) -> str:
    context, end = _shown(answer.text[:-MEASURED]), _shown(answer.text[-MEASURED:])
    sides = "".join(
        f"<div><h3>{name}</h3>{''.join(map(_sequence, side))}</div>"
        for name, side in (("Most helpful", answer.helpful), ("Most harmful", answer.harmful))
    )
    query = (
        f"<h2>Log-probability {answer.log_probability:.2f}</h2>"
        f"<pre>{context}<mark>{end}</mark></pre>"
    )
    return f'<section>{query}<div class="sides">{sides}</div></section>'


def _sequence(found: Found) -> str:
    most = np.abs(found.by_character).max() or 1.0
    spans = [_shown(found.text[0])]  # never predicted
    for character, change in zip(found.text[1:], found.by_character, strict=True):
        shade = f"rgba({RAISED if change < 0 else LOWERED},{0.8 * abs(change) / most:.2f})"
        span = f'<span style="background:{shade}" title="{change:+.1e}">{_shown(character)}</span>'
        spans.append(span if abs(change) > 0.02 * most else _shown(character))
    parts = sorted(found.by_layer.items(), key=lambda part: -abs(part[1]))
    shares = ", ".join(
        f"{html.escape(name)} {100 * part / found.change:.0f}" for name, part in parts
    )
    score = f"<b>{found.change:+.4f}</b> if removed, sequence {found.number}"
    return f"<div>{score}</div><pre>{''.join(spans)}</pre><small>{shares}</small>"


def _shown(text: str) -> str:
    return html.escape(text).replace("\n", "&crarr;\n")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument(
        "--data", type=Path, help="a text file; default: sources of Python's standard library"
    )
    flags.add_argument("--width", type=int, default=64, help="of the model")
    flags.add_argument("--steps", type=int, default=1500, help="of training")
    flags.add_argument("--queries", type=int, default=6)
    flags.add_argument(
        "--candidates",
        type=int,
        help="sequences to score for each query, found by BM25; default: all",
    )
    flags.add_argument(
        "--rank", type=int, default=32, help="of the queries' matrices; 0: as they are"
    )
    flags.add_argument(
        "--top", type=int, default=5, help="helpful and harmful sequences to show for each query"
    )
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the page, weights and curvature"
    )
    flags.add_argument("--smoke", action="store_true", help="a tiny model, few sequences and steps")
    args = flags.parse_args()
    limit = 1_000_000
    if args.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # compile fast rather than well
        args.width, args.steps, args.queries, args.rank, limit = 16, 20, 2, 2, 12_000
    began = time.perf_counter()
    codes = read_text(args.data, limit)
    train, validation = split(codes)
    settings = (
        f"width{args.width}-steps{args.steps}-seed{args.seed}-text{zlib.crc32(codes.tobytes()):08x}"
    )
    folder = args.out / f"influence_text-{settings}"
    model = Transformer(args.width, layers=2, heads=4, dtype=jnp.float32)
    objective = curvax.Objective(model.apply, curvax.losses.softmax_cross_entropy())
    params = trained(model, objective, train, args.steps, args.seed, folder / "weights.msgpack")
    problem = Problem(model, objective, params, train, validation)
    losses = [
        -of_targets(model, params, tuple(x[::16] for x in batch)).mean()
        for batch in (train, validation)
    ]
    about = (
        f"{len(train[0]):,} training sequences of {LENGTH} characters; "
        f"loss {losses[0]:.3f}, validation {losses[1]:.3f}"
    )
    print(about)
    layout = layout_of(problem)
    print(layout)
    whole, key = batches_of(train, np.arange(len(train[0]))), jax.random.key(args.seed)
    fitted = influence.fit(
        objective, layout, params, whole, key, method="ekfac", folder=folder / "fit"
    )
    queries = choose_queries(problem, args.queries)
    rows = candidates(queries, train, args.candidates)
    print(f"scoring {len(rows):,} of {len(train[0]):,} sequences")
    answers = search(problem, prepare(problem, fitted, queries, args.rank), queries, rows, args.top)
    report(answers)
    check_meaning(answers, train)
    path = args.out / "influence_text.html"
    path.write_text(page(answers, about))
    print(f"\npage: {path}\ntotal {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
