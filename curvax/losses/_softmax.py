"""Softmax cross-entropy with integer labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvax._checks import describe
from curvax._trees import out_of_range_if_negative, wide_dtype
from curvax._types import PRNGKey, Scalar, at_least_float32
from curvax.losses._loss import Loss, from_function

Logits = Float[Array, "*terms classes"]
Labels = Int[Array, "*terms"]


def softmax_cross_entropy(ignore_index: int | None = None, label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy of logits with integer labels, mean over labels that count.

    Per label, with `p = softmax(f)` over C classes and smoothing s:
    `-(1 - s) log p_y - s/C sum_c log p_c`. Its Hessian `diag(p) - p p'` depends on neither label
    nor smoothing, so targets of the pseudo-gradient `p - e_y` are drawn from p and not smoothed.

    Args:
      ignore_index: labels of this value do not count: they are left out of the mean and of every
        curvature.
      label_smoothing: s in [0, 1).

    Returns:
      A `Loss` for outputs `[batch, ..., classes]` (any float dtype; worked on in at least float32)
      and integer targets `[batch, ...]`. A label outside `0..C-1` gives NaN, never a silent wrong
      value.

    Raises:
      ValueError: `label_smoothing` is outside [0, 1), or shapes do not fit (at trace time).
      TypeError: the labels are not integers.

    Cost: the curvature product is two passes over the logits.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.softmax_cross_entropy(ignore_index=-1)
      >>> labels = jnp.array([[0, 1, -1], [2, -1, -1]])
      >>> round(loss(jnp.zeros((2, 3, 4)), labels).item(), 4)             # log 4
      1.3863
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")

    # f: [..., C] logits, y: [...] labels, counts: [...] bool
    def read(outputs: Logits, targets: Labels) -> tuple[Logits, Labels, Array]:
        _check_labels(outputs, targets)
        f = at_least_float32(outputs)
        if ignore_index is None:
            return f, targets, jnp.ones(targets.shape, bool)
        counts = targets != ignore_index
        # Logits of ignored labels may be NaN (a fully masked attention row): keep them out of
        # value and derivatives.
        return jnp.where(counts[..., None], f, 0), jnp.where(counts, targets, 0), counts

    def num_terms(outputs: Logits, targets: Labels) -> Scalar:
        number: Any = targets.size
        if ignore_index is not None:
            number = jnp.sum(targets != ignore_index)
        return jnp.asarray(number, wide_dtype(outputs))

    # N; a batch of ignored labels alone has value 0, not 0/0.
    def positive_terms(outputs: Logits, targets: Labels) -> Scalar:
        return jnp.maximum(num_terms(outputs, targets), 1)

    def value(
        outputs: Logits,
        targets: Labels,
        smoothing: float,
    ) -> Scalar:
        """Return the mean of `-(1 - s) log p_y - s/C sum_c log p_c` over labels that count."""
        f, y, counts = read(outputs, targets)
        log_p = jax.nn.log_softmax(f)
        # log p_y, and NaN for a label that is no class.
        ids = out_of_range_if_negative(y, f.shape[-1])[..., None]
        chosen = jnp.take_along_axis(log_p, ids, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
        terms = chosen
        if smoothing:
            terms = (1 - smoothing) * chosen + smoothing * jnp.mean(log_p, axis=-1)
        return -jnp.sum(jnp.where(counts, terms, 0)) / positive_terms(outputs, targets)

    # (diag(p) - p p') u / N = p * (u - p'u) / N, without forming the C x C matrix.
    def curvature_product(
        outputs: Logits,
        targets: Labels,
        v: Array,
    ) -> Logits:
        """Multiply by the Hessian of the mean with respect to the logits."""
        f, _, counts = read(outputs, targets)
        p, u = jax.nn.softmax(f), at_least_float32(v)
        mean = jnp.sum(p * u, axis=-1, keepdims=True)
        product = p * (u - mean)
        weight = counts / positive_terms(outputs, targets)
        return (weight[..., None] * product).astype(outputs.dtype)

    # Ignored labels stay as they are, so that what is drawn says which terms count.
    def sample(
        key: PRNGKey,
        outputs: Logits,
        targets: Labels,
    ) -> Labels:
        f, _, counts = read(outputs, targets)
        # In int32, also where labels are bytes and the classes more than those can number.
        drawn = jax.random.categorical(key, f)
        return drawn if ignore_index is None else jnp.where(counts, drawn, targets)

    def plain_value(outputs: Logits, targets: Labels) -> Scalar:
        return value(outputs, targets, 0.0)

    def smoothed_value(outputs: Logits, targets: Labels) -> Scalar:
        return value(outputs, targets, label_smoothing)

    # A label is a term, on whatever axes labels have.
    def term_axes(outputs: Logits, targets: Labels) -> int:
        del outputs
        return targets.ndim

    # The pseudo-gradient is the score of the unsmoothed likelihood, from which labels are drawn;
    # the gradients of the data are those of the loss.
    plain = from_function(
        plain_value,
        curvature_product=curvature_product,
        sample=sample,
        num_terms=num_terms,
        term_axes=term_axes,
    )
    smoothed = from_function(smoothed_value, num_terms=num_terms)
    return dataclasses.replace(
        plain, value=smoothed_value, empirical_gradient=smoothed.empirical_gradient
    )


def _check_labels(outputs: Any, targets: Any) -> None:
    """Raise unless outputs are float logits, and targets an integer for each of their rows."""
    if getattr(outputs, "ndim", 0) < 2 or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            "softmax_cross_entropy needs float outputs [batch, ..., classes], "
            f"got {describe(outputs)}."
        )
    dtype = getattr(targets, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"softmax_cross_entropy needs integer labels, got targets {describe(targets)}; "
            "of one-hot targets pass jnp.argmax(targets, axis=-1)."
        )
    if targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"targets {describe(targets)} do not fit outputs {describe(outputs)}: "
            f"softmax_cross_entropy needs labels of shape {list(outputs.shape[:-1])}."
        )
