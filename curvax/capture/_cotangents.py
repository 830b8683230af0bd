"""Square roots of the output-space curvature: the cotangents that are pulled back.

With `S = sum_k u_k v_k'` the curvature of the mean loss in output space, the Fisher is
`sum_k (J'u_k)(J'v_k)'`, and its block for a use is made of the cotangents of its output alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax._batch import map_examples
from curvax._checks import check_choice, check_count
from curvax._shared import unwrap
from curvax._types import Outputs, PRNGKey, Targets
from curvax.losses import Loss
from curvax.losses._linear import check_curved
from curvax.losses._shares import pseudo_gradient_by_example
from curvax.losses._terms import signs_by_term

ESTIMATORS = {
    "mc": "sampled",
    "exact": "every output",
    "empirical": "the batch's own targets, by example",
    "empirical_by_term": "the batch's own targets, by term of the loss",
}
SAMPLING = ("mc", "empirical_by_term")


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
    if num_samples > 1 and fisher not in SAMPLING:
        raise ValueError(
            f'num_samples is of fisher="mc" and "empirical_by_term"; {fisher!r} does not sample, '
            f"got num_samples={num_samples}."
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

    S has a block for each example, so that one direction serves them all. Where the loss compares
    examples it has not, and k goes through the entries of all of them. The pairs are not symmetric:
    what sums products of them takes the symmetric part.
    """
    check_curved(loss, outputs, unwrap(targets))
    leaves, structure = jax.tree.flatten(outputs)
    # The axis of examples is 1 long where one direction serves all.
    shapes = [x.shape if loss.couples_examples else (1, *x.shape[1:]) for x in leaves]
    sizes = [math.prod(shape) for shape in shapes]

    def pair(k: Array) -> tuple[Outputs, Outputs]:
        unit, first = [], 0
        for x, shape, size in zip(leaves, shapes, sizes, strict=True):
            # 1 at entry k of all leaves laid side by side.
            e_k = (jnp.arange(size) == k - first).reshape(shape)
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


def empirical(loss: Loss, outputs: Outputs, targets: Targets) -> CotangentPairs:
    """Take the pseudo-gradient r at the batch's own targets, whose rows are those of examples.

    Martens (2020), section 11: `sum_b (J_b' r_b)(J_b' r_b)'` is the empirical Fisher, of the unit
    of the Fisher, which it would be in expectation if the targets were the model's own.
    """
    r = loss.empirical_gradient(outputs, unwrap(targets))

    def pair(k: Array) -> tuple[Outputs, None]:
        del k
        return r, None

    return CotangentPairs(1, pair)


def empirical_by_term(
    loss: Loss,
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
    index: Array,
    num_samples: int,
) -> CotangentPairs:
    """Give every term of r a random sign, so that terms of one example are apart in expectation.

    `E[(s * r)(s * r)'] = sum_n r_n r_n'` over terms n, with one backward pass for all of them. The
    signs of a row depend on its number `index` only.
    """
    r = loss.empirical_gradient(outputs, unwrap(targets))

    def pair(k: Array) -> tuple[Outputs, None]:
        key_of_round = jax.random.fold_in(key, k)

        # f, y: outputs and targets of one row; i: [1] its number
        def draw(row: tuple[Outputs, Targets, Array]) -> Outputs:
            f, y, i = row
            row_key = jax.random.fold_in(key_of_round, i[0])
            return signs_by_term(loss, row_key, f, unwrap(y))

        signs = map_examples(draw, (outputs, targets, index))

        # Each draw is a batch of one.
        def signed(s: Array, x: Array) -> Array:
            product: Array = s[:, 0] * x / num_samples**0.5
            return product.astype(x.dtype)

        return jax.tree.map(signed, signs, r), None

    return CotangentPairs(num_samples, pair)
