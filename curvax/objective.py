"""The objective: a model and a loss, as one function of params and batch that keeps both visible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import PyTree

from curvax._batch import check_batch, sum_over_chunks
from curvax._checks import check_scalar, describe
from curvax._shared import unwrap
from curvax._types import Batch, Outputs, Params, Scalar
from curvax.losses import Loss, as_loss
from curvax.losses._shares import share_of, term_counts


@dataclass(frozen=True)
class Objective:
    """Mean loss of a model over a batch, `L(params) = loss(model(params, inputs), targets)`.

    Use it wherever a loss function goes (`jax.value_and_grad(objective)(params, batch)`); curvature, which needs the
    model's outputs, takes the same object.

    Args:
      model: pure function `(params, inputs) -> outputs`, or with `has_aux` `-> (outputs, aux)`. Parts of inputs marked
        `curvax.Shared` arrive unwrapped.
      loss: one of `curvax.losses`, or any function `(outputs, targets) -> scalar mean`; what else a method may need of
        it, see `curvax.losses.from_function`.
      has_aux: the model returns `(outputs, aux)`, and the objective `(loss, aux)`: batch statistics, metrics.

    Raises:
      TypeError, ValueError: at trace time, when the batch is not a pair with one leading axis, when outputs and targets
        do not fit the loss, or when the loss is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.eye(2), jnp.ones((2, 1)))
      >>> value, gradient = jax.value_and_grad(objective)(jnp.zeros((2, 1)), batch)
      >>> value.item(), gradient.ravel().tolist()
      (0.5, [-0.5, -0.5])
    """

    model: Callable[[Params, Any], Any]
    loss: Loss
    has_aux: bool = False

    def __post_init__(self) -> None:
        """Turn a plain function into a `Loss`."""
        object.__setattr__(self, "loss", as_loss(self.loss))

    def __call__(self, params: Params, batch: Batch) -> Any:
        """Return the mean loss, or `(loss, aux)` with `has_aux`."""
        check_batch(batch)
        inputs, targets = batch
        outputs, aux = self._apply(params, inputs)
        value = check_scalar(self.loss(outputs, unwrap(targets)), "the loss")
        return (value, aux) if self.has_aux else value

    def value(self, params: Params, batch: Batch) -> Scalar:
        """Return the mean loss alone."""
        value: Scalar = self(params, batch)[0] if self.has_aux else self(params, batch)
        return value

    def outputs(self, params: Params, inputs: Any) -> Outputs:
        """Return the model's outputs alone."""
        return self._apply(params, inputs)[0]

    def outputs_of(self, result: Any) -> Outputs:
        """Return the outputs of what the model has returned (or of its shapes), without aux."""
        return self._split(result)[0]

    def _apply(self, params: Params, inputs: Any) -> tuple[Outputs, Any]:
        return self._split(self.model(params, unwrap(inputs)))

    def _split(self, result: Any) -> tuple[Outputs, Any]:
        if not self.has_aux:
            return result, None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"with has_aux=True the model must return (outputs, aux), got {describe(result)}."
            )
        return result


def total_terms(
    objective: Objective, params: Params, batch: Batch, microbatch: int | None
) -> PyTree[Scalar]:
    """Count the terms that the mean over the whole batch is over, `microbatch` rows at a time."""
    count = lambda chunk: _terms(objective, params, chunk)
    return count(batch) if microbatch is None else sum_over_chunks(count, batch, microbatch)


def scaled_to_share(
    objective: Objective, params: Params, chunk: Batch, totals: PyTree[Scalar]
) -> Objective:
    """Return `objective` scaled on `chunk` to its share of the batch's mean: the shares of all chunks sum to the whole.

    With `totals = total_terms(batch)` that holds for any partition, down to single examples, masked terms and heads with
    counts of their own included. The forward pass that the count runs is dead code unless the count depends on it.
    """
    return replace(
        objective, loss=share_of(objective.loss, _terms(objective, params, chunk), totals)
    )


def _terms(objective: Objective, params: Params, chunk: Batch) -> PyTree[Scalar]:
    inputs, targets = chunk
    return term_counts(objective.loss, objective.outputs(params, inputs), targets)
