"""Square roots of the output-space curvature: the cotangents that are pulled back.

With `S = sum_k u_k v_k'` the curvature of the mean loss in output space, the Fisher is
`sum_k (J'u_k)(J'v_k)'`, and its block for a use is made of the cotangents of its output alone.
"""

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

ESTIMATORS = {"mc": "sampled", "exact": "every output", "empirical": "the batch's own targets"}


class CotangentPairs(NamedTuple):
    """Pairs of cotangents `(u_k, v_k)` of the outputs with `sum_k u_k v_k' = S`.

    Attributes:
      number: the number of pairs.
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
            f'num_samples is of fisher="mc"; {fisher!r} does not sample, got '
            f"num_samples={num_samples}."
        )


def sampled(
    loss: Loss,
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
    index: Array | None,
    num_samples: int,
) -> CotangentPairs:
    """Draw pseudo-gradients r with `E[r r'] = S`, divided by the root of their number.

    With row numbers `index` the draws of a row depend on its number only.
    """

    def pair(k: Array) -> tuple[Outputs, None]:
        # Every round draws apart, and the same again where it is traced again.
        key_of_round = jax.random.fold_in(key, k)
        # By row number, a row draws the same in whatever chunk or device it lies.
        if index is not None:
            r = pseudo_gradient_by_example(loss, key_of_round, outputs, targets, index)
        else:
            r = loss.pseudo_gradient(key_of_round, outputs, unwrap(targets))
        # E sum_k u_k u_k' = S
        return jax.tree.map(lambda x: (x / num_samples**0.5).astype(x.dtype), r), None

    return CotangentPairs(num_samples, pair)


def exact(loss: Loss, outputs: Outputs, targets: Targets) -> CotangentPairs:
    """Take every entry k of an example's outputs, for all examples at once: `(e_k, S e_k)`.

    S has a block for each example, so that one direction serves them all. The pairs are not
    symmetric: what sums products of them takes the symmetric part.
    """
    leaves, structure = jax.tree.flatten(outputs)
    sizes = [math.prod(x.shape[1:]) for x in leaves]

    def pair(k: Array) -> tuple[Outputs, Outputs]:
        unit, first = [], 0
        for x, size in zip(leaves, sizes, strict=True):
            # 1 at entry k of all leaves laid side by side, for every example.
            e_k = (jnp.arange(size) == k - first).reshape(1, *x.shape[1:])
            unit.append(jnp.broadcast_to(e_k, x.shape).astype(x.dtype))
            first += size
        direction = jax.tree.unflatten(structure, unit)
        # S e_k, from the loss; for a Gaussian it is the Fisher, not the Hessian.
        product = loss.curvature_product(outputs, unwrap(targets), direction)
        return direction, jax.tree.map(
            lambda c, x: c.astype(x.dtype),
            product,
            outputs,
        )

    return CotangentPairs(sum(sizes), pair)


def empirical(
    loss: Loss,
    outputs: Outputs,
    targets: Targets,
    size: Any,
) -> CotangentPairs:
    """Take the gradient at the batch's own targets, times the root of its number of examples.

    Row b of the gradient of the mean loss is `g_b / n`: then the sum over examples of
    `(sqrt(n) g_b / n)(...)'` is the mean of `g_b g_b'`.
    """

    def value(f: Outputs) -> Array:
        return loss(f, unwrap(targets))

    def scaled(x: Array) -> Array:
        # In float32 at least: a float16 counts no further than 65504.
        root = jnp.sqrt(jnp.asarray(size, jnp.promote_types(x.dtype, jnp.float32)))
        return (root * x).astype(x.dtype)

    gradient = jax.tree.map(scaled, jax.grad(value)(outputs))

    def pair(k: Array) -> tuple[Outputs, None]:
        del k
        return gradient, None

    return CotangentPairs(1, pair)
