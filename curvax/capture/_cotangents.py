"""What is pulled back to make factors: sampled, exact or empirical square roots of the output-space curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax._checks import check_choice, check_count
from curvax._shared import unwrap
from curvax._types import Outputs, PRNGKey, Targets
from curvax.losses import Loss
from curvax.losses._shares import pseudo_gradient_by_example

ESTIMATORS = {"mc": None, "exact": None, "empirical": None}


class CotangentPairs(NamedTuple):
    """Pairs of cotangents `(u_k, v_k)` of the outputs with `sum_k u_k v_k' =` the output-space curvature.

    Attributes:
      number: of rounds.
      pair: `k -> (u, v)`, trees like outputs; v is None where it equals u.
    """

    number: int
    pair: Callable[[Array], tuple[Outputs, Outputs | None]]


def check_fisher(fisher: str, num_samples: int) -> None:
    """Raise unless the fisher exists and takes that number of samples."""
    check_choice("fisher", fisher, ESTIMATORS)
    check_count(1, num_samples=num_samples)
    if num_samples > 1 and fisher != "mc":
        raise ValueError(
            f'num_samples is of fisher="mc"; {fisher!r} does not sample, got num_samples={num_samples}.'
        )


def sampled(
    loss: Loss,
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
    index: Array | None,
    num_samples: int,
) -> CotangentPairs:
    """Draw `num_samples` pseudo-gradients, each divided by the square root of their number: `E sum_k u_k u_k' = S`.

    With row numbers `index` the draws of a row depend on its number only.
    """

    def pair(k: Array) -> tuple[Outputs, None]:
        drawn_with = jax.random.fold_in(key, k)
        if index is not None:
            r = pseudo_gradient_by_example(loss, drawn_with, outputs, targets, index)
        else:
            r = loss.pseudo_gradient(drawn_with, outputs, unwrap(targets))
        return jax.tree.map(lambda x: (x / num_samples**0.5).astype(x.dtype), r), None

    return CotangentPairs(num_samples, pair)


def exact(loss: Loss, outputs: Outputs, targets: Targets) -> CotangentPairs:
    """Take every entry k of one example's outputs, for all examples at once: `u_k = e_k`, `v_k = S e_k`."""
    leaves, structure = jax.tree.flatten(outputs)
    sizes = [math.prod(x.shape[1:]) for x in leaves]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def pair(k: Array) -> tuple[Outputs, Outputs]:
        one = [
            jnp.broadcast_to(
                (jnp.arange(size) == k - start).reshape(1, *x.shape[1:]), x.shape
            ).astype(x.dtype)
            for x, size, start in zip(leaves, sizes, starts, strict=True)
        ]
        direction = jax.tree.unflatten(structure, one)
        curved = loss.curvature_product(outputs, unwrap(targets), direction)
        return direction, jax.tree.map(lambda c, x: c.astype(x.dtype), curved, outputs)

    return CotangentPairs(sum(sizes), pair)


def empirical(loss: Loss, outputs: Outputs, targets: Targets, size: Any) -> CotangentPairs:
    """Take the gradient at the data's own targets, times the square root of the number of examples in the mean."""
    gradient = jax.grad(lambda f: loss(f, unwrap(targets)))(outputs)
    root = lambda x: jnp.sqrt(jnp.asarray(size, jnp.promote_types(x.dtype, jnp.float32)))
    scaled = jax.tree.map(lambda x: (root(x) * x).astype(x.dtype), gradient)
    return CotangentPairs(1, lambda k: (scaled, None))
