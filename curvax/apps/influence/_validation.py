"""Do influence scores predict what retraining gives? Random subsets, leave-one-out, and the linear datamodeling score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._checks import check_count, describe
from curvax._types import Params, PRNGKey
from curvax.estimate._hutchinson import Estimate

Train: TypeAlias = Callable[[PRNGKey, Bool[Array, " examples"]], Params]
"""`(key, which examples are there) -> params`: a whole training, under `jit` and `vmap`; absent examples weigh nothing."""

Measure: TypeAlias = Callable[[Params], Float[Array, " queries"]]
"""`params -> what is measured on every query`."""


class LeaveOneOut(NamedTuple):
    """What happened when single examples were left out.

    Attributes:
      change_if_removed: of every query's measurement, for every example that was left out, `[queries, removed]`; the mean
        over seeds.
      sem: its standard error over seeds; NaN for one seed.
    """

    change_if_removed: Float[Array, "queries removed"]
    sem: Float[Array, "queries removed"]


def random_subsets(
    num_examples: int, num_subsets: int, key: PRNGKey, fraction: float = 0.5
) -> Bool[Array, "subsets n"]:
    """Draw subsets of a training set without replacement: True where an example is there, `round(fraction n)` in each.

    Raises:
      ValueError: a fraction that is not between 0 and 1.

    Example:
      >>> import jax
      >>> from curvax.apps import influence
      >>> influence.random_subsets(10, 4, jax.random.key(0)).sum(axis=1).tolist()
      [5, 5, 5, 5]
    """
    check_count(1, num_examples=num_examples, num_subsets=num_subsets)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
    first = jnp.arange(num_examples) < round(fraction * num_examples)
    subsets: Array = jax.vmap(lambda k: jax.random.permutation(k, first))(
        jax.random.split(key, num_subsets)
    )
    return subsets


def retrain(
    train: Train,
    measure: Measure,
    subsets: Bool[Array, "subsets examples"],
    key: PRNGKey,
    *,
    num_seeds: int = 1,
    chunk_size: int = 100,
) -> Float[Array, "seeds subsets queries"]:
    """Train on every subset and measure, `chunk_size` networks at a time in one program.

    Args:
      train: `(key, mask [examples]) -> params`, such as a `lax.scan` over optimizer steps whose loss is weighted by the
        mask (divided by the number of all examples, those that are there keep their weight against a penalty).
      measure: `params -> [queries]`, such as the losses of test examples.
      key: JAX key; all subsets train with the same `num_seeds` keys, so that initial values and order of batches are no
        difference between them.
      subsets: which examples are there, of `random_subsets`.
      num_seeds: trainings of each subset.
      chunk_size: networks that are trained together by `vmap`.

    Returns:
      what was measured.

    Cost: `num_seeds` times as many trainings as there are subsets. Memory: `chunk_size` trainings.

    Example: the "network" is the mean of the numbers that are there.
      >>> import jax, jax.numpy as jnp
      >>> from curvax.apps import influence
      >>> x = jnp.array([1.0, 2.0, 6.0])
      >>> train = lambda key, there: jnp.sum(x * there) / jnp.sum(there)
      >>> subsets = jnp.array([[True, True, False], [False, True, True]])
      >>> influence.retrain(train, lambda mean: mean[None], subsets, jax.random.key(0)).ravel().tolist()
      [1.5, 4.0]
    """
    check_count(1, num_seeds=num_seeds, chunk_size=chunk_size)
    seeds = jax.random.split(key, num_seeds)
    pairs = (
        jnp.repeat(jnp.arange(num_seeds), len(subsets)),
        jnp.tile(jnp.arange(len(subsets)), num_seeds),
    )

    @jax.jit
    def run(seeds: Array, subsets: Array) -> Any:
        one = lambda pair: measure(train(seeds[pair[0]], subsets[pair[1]]))
        return lax.map(one, pairs, batch_size=min(chunk_size, len(pairs[0])))

    measured: Array = run(seeds, subsets)
    if measured.ndim != 2:
        raise ValueError(
            f"measure must return one number for each query, [queries]; got {list(measured.shape[1:])}."
        )
    return measured.reshape(num_seeds, len(subsets), -1)


def leave_one_out(
    train: Train,
    measure: Measure,
    num_examples: int,
    removed: Int[Array, " removed"],
    key: PRNGKey,
    *,
    num_seeds: int = 1,
    chunk_size: int = 100,
) -> LeaveOneOut:
    """Train without single examples: what `influence` predicts to first order.

    Args:
      train: as in `retrain`.
      measure: as in `retrain`.
      key: as in `retrain`.
      num_examples: of the training set.
      removed: numbers of the examples to leave out, one at a time.
      num_seeds: trainings of each.
      chunk_size: networks that are trained together.

    Returns:
      `LeaveOneOut`, differences to trainings with all examples and the same seeds.

    Raises:
      ValueError: numbers that are not those of examples.

    Cost: `num_seeds (removed + 1)` trainings.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax.apps import influence
      >>> x = jnp.array([1.0, 2.0, 6.0])
      >>> train, measure = lambda key, there: jnp.sum(x * there) / jnp.sum(there), lambda mean: mean[None]
      >>> influence.leave_one_out(train, measure, 3, jnp.array([0, 2]), jax.random.key(0)).change_if_removed.tolist()
      [[1.0, -1.5]]
    """
    removed = jnp.asarray(removed)
    wrong = [number for number in removed.tolist() if not 0 <= number < num_examples]
    if wrong:
        raise ValueError(
            f"removed holds {wrong[0]}, but there are {num_examples} examples, numbered from 0."
        )
    there = jnp.concatenate(
        [jnp.ones((1, num_examples), bool), jnp.arange(num_examples) != removed[:, None]]
    )
    measured = retrain(train, measure, there, key, num_seeds=num_seeds, chunk_size=chunk_size)
    changes = jnp.swapaxes(measured[:, 1:] - measured[:, :1], 1, 2)  # [seeds, queries, removed]
    return LeaveOneOut(jnp.mean(changes, axis=0), jnp.std(changes, axis=0, ddof=1) / num_seeds**0.5)


def linear_datamodeling_score(
    change_if_removed: Float[Array, "queries examples"],
    subsets: Bool[Array, "subsets examples"],
    measured: Float[Array, "subsets queries"],
) -> Estimate:
    """Rank correlation, over subsets, of what sums of scores predict with what retraining gave; mean over queries.

    For query q, the Spearman correlation over subsets S of `sum_{b not in S} change_if_removed[q, b]` with
    `measured[S, q]`. 1 is the most; what chance in training leaves of it is seen from the correlation between seeds.

    Args:
      change_if_removed: of `influence`, or of another method that ranks by its sums.
      subsets: of `random_subsets`.
      measured: of `retrain`, averaged over seeds. Several seeds take chance in training out of it.

    Returns:
      `Estimate`; `sem` is the standard error over queries.

    Raises:
      ValueError: shapes that do not fit, fewer than three subsets, numbers that are not finite, a query with the same
        measurement on all subsets.

    Cost: `queries subsets examples` multiplications.

    Example: numbers whose mean is measured; scores of influence order all subsets as retraining does.
      >>> import jax, jax.numpy as jnp
      >>> from curvax.apps import influence
      >>> x = jnp.arange(10.0) ** 2
      >>> subsets = influence.random_subsets(10, 6, jax.random.key(0))
      >>> means = (subsets @ x) / subsets.sum(axis=1)
      >>> influence.linear_datamodeling_score((x.mean() - x)[None] / 10, subsets, means[:, None]).mean.item()
      1.0

    References: Park et al. (2023), TRAK: attributing model behavior at scale, section 2; Ilyas et al. (2022), Datamodels.
    """
    scores, there, results = (np.asarray(x) for x in (change_if_removed, subsets, measured))
    if (
        scores.shape != (results.shape[-1], there.shape[-1])
        or results.shape != (len(there), len(scores))
        or len(there) < 3
    ):
        raise ValueError(
            "expected change_if_removed [queries, examples], subsets [subsets, examples] and measured [subsets, queries], "
            f"with three subsets at least; got {describe(scores)}, {describe(there)} and {describe(results)}."
        )
    for name, values in (("change_if_removed", scores), ("measured", results)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity, which have no rank.")
    constant = np.flatnonzero(np.ptp(results, axis=0) == 0)
    if constant.size:
        raise ValueError(
            f"query {constant[0]} has the same measurement on all subsets: nothing can be ranked."
        )
    predicted = ~there.astype(bool) @ scores.T  # [subsets, queries]
    each = [_rank_correlation(p, r) for p, r in zip(predicted.T, results.T, strict=True)]
    sem = np.std(each, ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
    return Estimate(jnp.asarray(np.mean(each)), jnp.asarray(sem))


def _rank_correlation(predicted: Any, measured: Any) -> float:
    """Return Spearman's correlation; scores that are all the same predict nothing: 0."""
    return (
        float(scipy.stats.spearmanr(predicted, measured).statistic)
        if np.ptp(predicted) > 0
        else 0.0
    )
