"""Do influence scores predict retraining? Leave-one-out, and the linear datamodeling score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._checks import check_count, describe
from curvax._types import Params, PRNGKey
from curvax.estimate._hutchinson import Estimate

Train: TypeAlias = Callable[[PRNGKey, Bool[Array, " examples"]], Params]
"""`(key, mask [examples]) -> params`: a training, under `jit` and `vmap`, on the examples that
the mask has: the others weigh nothing."""

Measure: TypeAlias = Callable[[Params], Float[Array, " queries"]]
"""`params -> [queries]`: what is measured on every query."""

# S: a subset of the training set, b: an example, q: a query


class LeaveOneOut(NamedTuple):
    """What happened when single examples were left out.

    Attributes:
      change_if_removed: the change of every query's measurement for every example that was left
        out, `[queries, removed]`; the mean over seeds.
      sem: the standard error of that mean over seeds; NaN for one seed.
    """

    change_if_removed: Float[Array, "queries removed"]
    sem: Float[Array, "queries removed"]


def random_subsets(
    num_examples: int,
    num_subsets: int,
    key: PRNGKey,
    fraction: float = 0.5,
) -> Bool[Array, "subsets n"]:
    """Draw subsets of a training set without replacement, `round(fraction n)` examples in each.

    An entry is True where the example is in the subset.

    Raises:
      ValueError: the fraction is not between 0 and 1.

    Example:
      >>> import jax
      >>> from curvax.apps import influence
      >>> influence.random_subsets(10, 4, jax.random.key(0)).sum(axis=1).tolist()
      [5, 5, 5, 5]
    """
    check_count(1, num_examples=num_examples, num_subsets=num_subsets)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
    # a random order of a mask with the right number of examples
    first = jnp.arange(num_examples) < round(fraction * num_examples)
    keys = jax.random.split(key, num_subsets)
    subsets: Array = jax.vmap(lambda k: jax.random.permutation(k, first))(keys)
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
      train: a function `(key, mask [examples]) -> params`, such as a `lax.scan` over optimizer
        steps whose loss is weighted by the mask. If that loss is divided by the number of all
        examples, those that are there keep their weight against a penalty.
      measure: a function `params -> [queries]`, such as the losses of test examples.
      subsets: a mask of examples for each subset, such as `random_subsets` returns.
      key: a JAX key; all subsets train with the same `num_seeds` keys, so that they do not differ
        in their initial values or in the order of batches.
      num_seeds: the number of trainings of each subset.
      chunk_size: the number of networks that are trained together by `vmap`.

    Returns:
      The measurements, `[seeds, subsets, queries]`.

    Raises:
      ValueError: measure does not return one number for each query.

    Cost: `num_seeds` times as many trainings as there are subsets. Memory: `chunk_size` trainings.

    Example: the "network" is the mean of the numbers that are there.
      >>> import jax, jax.numpy as jnp
      >>> from curvax.apps import influence
      >>> x = jnp.array([1.0, 2.0, 6.0])
      >>> train = lambda key, there: jnp.sum(x * there) / jnp.sum(there)
      >>> measure, key = lambda mean: mean[None], jax.random.key(0)
      >>> subsets = jnp.array([[True, True, False], [False, True, True]])
      >>> influence.retrain(train, measure, subsets, key).ravel().tolist()
      [1.5, 4.0]
    """
    check_count(1, num_seeds=num_seeds, chunk_size=chunk_size)
    seeds = jax.random.split(key, num_seeds)
    # Every seed with every subset, numbered in the order of the result.
    seed_numbers = jnp.repeat(jnp.arange(num_seeds), len(subsets))
    subset_numbers = jnp.tile(jnp.arange(len(subsets)), num_seeds)
    at_a_time = min(chunk_size, len(seed_numbers))

    @jax.jit
    def run(seeds: Array, subsets: Array) -> Any:
        def train_and_measure(numbers: tuple[Array, Array]) -> Array:
            seed, subset = numbers
            return measure(train(seeds[seed], subsets[subset]))

        return lax.map(train_and_measure, (seed_numbers, subset_numbers), batch_size=at_a_time)

    measured: Array = run(seeds, subsets)
    if measured.ndim != 2:
        raise ValueError(
            "measure must return one number for each query, [queries]; "
            f"got {list(measured.shape[1:])}."
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
    """Train without single examples, which `influence` predicts to first order.

    Args:
      train: see `retrain`.
      measure: see `retrain`.
      num_examples: the size of the training set.
      removed: the numbers of the examples to leave out, one at a time.
      key: see `retrain`.
      num_seeds: the number of trainings without each example.
      chunk_size: the number of networks that are trained together.

    Returns:
      A `LeaveOneOut`: the differences to trainings with all examples and the same seeds.

    Raises:
      ValueError: an entry of removed is not the number of an example.

    Cost: `num_seeds (removed + 1)` trainings.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from curvax.apps import influence
      >>> x = jnp.array([1.0, 2.0, 6.0])
      >>> train = lambda key, there: jnp.sum(x * there) / jnp.sum(there)
      >>> measure, removed = lambda mean: mean[None], jnp.array([0, 2])
      >>> result = influence.leave_one_out(train, measure, 3, removed, jax.random.key(0))
      >>> result.change_if_removed.tolist()
      [[1.0, -1.5]]
    """
    removed = jnp.asarray(removed)
    wrong = [number for number in removed.tolist() if not 0 <= number < num_examples]
    if wrong:
        raise ValueError(
            f"removed holds {wrong[0]}, but there are {num_examples} examples, numbered from 0."
        )
    # The first training has all examples, the others lack one each.
    everything = jnp.ones((1, num_examples), bool)
    all_but_one = jnp.arange(num_examples) != removed[:, None]
    subsets = jnp.concatenate([everything, all_but_one])
    measured = retrain(train, measure, subsets, key, num_seeds=num_seeds, chunk_size=chunk_size)
    changes = measured[:, 1:] - measured[:, :1]
    by_query = jnp.swapaxes(changes, 1, 2)  # [seeds, queries, removed]
    sem = jnp.std(by_query, axis=0, ddof=1) / num_seeds**0.5
    return LeaveOneOut(jnp.mean(by_query, axis=0), sem)


def linear_datamodeling_score(
    change_if_removed: Float[Array, "queries examples"],
    subsets: Bool[Array, "subsets examples"],
    measured: Float[Array, "subsets queries"],
) -> Estimate:
    """Return the rank correlation between sums of scores and retraining, averaged over queries.

    For query q it is the Spearman correlation over subsets S of
    `sum_{b not in S} change_if_removed[q, b]` with `measured[S, q]`. 1 is the best possible; how
    much less the chance in training allows is seen from the correlation between seeds.

    Args:
      change_if_removed: the scores of `influence`, or of another method that ranks by sums of
        scores.
      subsets: a mask of examples for each subset, such as `random_subsets` returns.
      measured: the measurements that `retrain` returns, averaged over seeds; several seeds average
        out the chance in training.

    Returns:
      An `Estimate`; `sem` is the standard error over queries.

    Raises:
      ValueError: the shapes do not fit, there are fewer than three subsets, numbers are not finite,
        or a query has the same measurement on all subsets.

    Cost: `queries subsets examples` multiplications.

    Example: numbers whose mean is measured; scores of influence order all subsets as retraining
      does.
      >>> import jax, jax.numpy as jnp
      >>> from curvax.apps import influence
      >>> x = jnp.arange(10.0) ** 2
      >>> subsets = influence.random_subsets(10, 6, jax.random.key(0))
      >>> scores, means = (x.mean() - x) / 10, (subsets @ x) / subsets.sum(axis=1)
      >>> influence.linear_datamodeling_score(scores[None], subsets, means[:, None]).mean.item()
      1.0

    References: Park et al. (2023), TRAK: attributing model behavior at scale,
      https://arxiv.org/abs/2303.14186, section 2; Ilyas et al. (2022), Datamodels,
      https://arxiv.org/abs/2202.00622.
    """
    scores, present, results = map(np.asarray, (change_if_removed, subsets, measured))
    num_subsets, num_queries = len(present), len(scores)
    fits = scores.shape == (num_queries, present.shape[-1])
    if not fits or results.shape != (num_subsets, num_queries) or num_subsets < 3:
        raise ValueError(
            "expected change_if_removed [queries, examples], subsets [subsets, examples] and "
            "measured [subsets, queries], with three subsets at least; "
            f"got {describe(scores)}, {describe(present)} and {describe(results)}."
        )
    for name, values in (("change_if_removed", scores), ("measured", results)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity, which have no rank.")
    constant = np.flatnonzero(np.ptp(results, axis=0) == 0)
    if constant.size:
        raise ValueError(
            f"query {constant[0]} has the same measurement on all subsets: nothing can be ranked."
        )
    # TRAK, section 2: the sum over b not in S of the scores predicts what S measures.
    predicted = ~present.astype(bool) @ scores.T  # [subsets, queries]
    correlations = list(map(_rank_correlation, predicted.T, results.T))
    sem = np.nan
    if num_queries > 1:
        sem = np.std(correlations, ddof=1) / num_queries**0.5
    return Estimate(jnp.asarray(np.mean(correlations)), jnp.asarray(sem))


def _rank_correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Return Spearman's correlation; scores that are all the same predict nothing: 0."""
    if np.ptp(predicted) == 0:
        return 0.0
    # Imported here only: it takes a second, as long as the rest of `import curvax` together.
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, measured).statistic)
