"""The objective: a model and a loss, as one function of params and batch that keeps both visible.

A mean over parts of a batch: shares
------------------------------------

Curvature is that of the *mean* loss over a batch, but work goes over the batch in parts: chunks of
bounded memory, single examples, batches read from the host. The mean of a part is not what has to
be added up. With N terms in the batch (`curvax.losses` says what a term is) and `N_c` in chunk c,

    L = 1/N sum_i L_i = sum_c N_c/N (1/N_c sum_{i in c} L_i) = sum_c share_c L_c,   share_c = N_c/N.

So every method that works in parts counts N first (`total_terms`), then scales the objective on
each part to its share of the mean (`scaled_to_share`), and adds. The sum over all parts is the
whole exactly, for any partition down to single examples:

* value, gradient and Hessian are linear in the loss, and take the factor `share_c` as it is; so
  does the output-space curvature S of the Gauss-Newton matrix `J' S J`;
* a pseudo-gradient r has `E[r r'] = S`, and takes `sqrt(share_c)`; sums of independent draws of the
  parts then have the second moment of a draw for the batch;
* masks: N counts the positions that count, weights included. A chunk that holds padding alone has
  `N_c = 0` and share 0, and a batch without any term has loss 0 (0/0 is 0), not NaN;
* heads of a `weighted_sum` have counts of their own, `L = sum_h w_h 1/N_h sum_i L_hi`: counts and
  shares are then dicts by head, and each head is scaled by its own `N_hc/N_h`.

What is not linear in the loss needs a factor of its own, which its function states. With `s_b` the
gradient of the share of example b, per-example gradients are `g_b = B s_b`, so that their mean is
the gradient. The empirical Fisher is `1/N sum_b (grad L_b)(grad L_b)' = N sum_b s_b s_b'`, L_b the
sum over the terms of example b: a pseudo-gradient at the targets of the data, `sqrt(N) s_b` by
example, which takes `sqrt(share_c)` on a chunk as every other one does.
"""

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

    Use it wherever a loss function goes (`jax.value_and_grad(objective)(params, batch)`);
    curvature, which needs the model's outputs, takes the same object.

    Args:
      model: the pure function `(params, inputs) -> outputs`, or with `has_aux`
        `-> (outputs, aux)`. Parts of inputs marked `curvax.Shared` arrive unwrapped.
      loss: one of `curvax.losses`, or any function `(outputs, targets) -> scalar mean`;
        `curvax.losses.from_function` says what else a method may need of it.
      has_aux: the model returns `(outputs, aux)`, and the objective `(loss, aux)`; for batch
        statistics and metrics.

    Raises:
      TypeError, ValueError: at trace time, when the batch is not a pair with one leading axis,
        when outputs and targets do not fit the loss, or when the loss is not a scalar.

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
        # A frozen dataclass offers no other way to set a field.
        object.__setattr__(self, "loss", as_loss(self.loss))

    def __call__(
        self,
        params: Params,
        batch: Batch,
    ) -> Any:
        """Return the mean loss, or `(loss, aux)` with `has_aux`."""
        check_batch(batch)
        inputs, targets = batch
        # f = model(params, inputs), L = loss(f, targets)
        outputs, aux = self._apply(params, inputs)
        value = check_scalar(self.loss(outputs, unwrap(targets)), "the loss")
        return (value, aux) if self.has_aux else value

    def value(
        self,
        params: Params,
        batch: Batch,
    ) -> Scalar:
        """Return the mean loss alone."""
        result = self(params, batch)
        value: Scalar = result[0] if self.has_aux else result
        return value

    def outputs(
        self,
        params: Params,
        inputs: Any,
    ) -> Outputs:
        """Return the model's outputs alone."""
        outputs, _ = self._apply(params, inputs)
        return outputs

    def _apply(
        self,
        params: Params,
        inputs: Any,
    ) -> tuple[Outputs, Any]:
        """Run the model; return outputs and aux."""
        return self._split(self.model(params, unwrap(inputs)))

    def outputs_of(self, result: Any) -> Outputs:
        """Return the outputs of what the model has returned (or of its shapes), without aux."""
        return self._split(result)[0]

    def _split(self, result: Any) -> tuple[Outputs, Any]:
        """Return outputs and aux; aux is None for a model without."""
        if not self.has_aux:
            return result, None
        # An array of two rows would unpack too: only a tuple says that aux was meant.
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"with has_aux=True the model must return (outputs, aux), got {describe(result)}."
            )
        return result


def total_terms(
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatch: int | None,
) -> PyTree[Scalar]:
    """Count the terms N that the mean over the batch is over, `microbatch` rows at a time.

    The result is a scalar, or for a weighted sum a dict by head.
    """

    def count(chunk: Batch) -> PyTree[Scalar]:
        return _terms(objective, params, chunk)

    return count(batch) if microbatch is None else sum_over_chunks(count, batch, microbatch)


def scaled_to_share(
    objective: Objective,
    params: Params,
    chunk: Batch,
    totals: PyTree[Scalar],
) -> Objective:
    """Return `objective` scaled on `chunk` to its share of the batch's mean, `N_c / N`.

    With `totals` from `total_terms` of the batch, the shares of all chunks sum to the whole; the
    head of this module says why.
    """
    # Most counts need outputs only for their dtype: the forward pass that they run is dead code.
    counts = _terms(objective, params, chunk)
    return replace(objective, loss=share_of(objective.loss, counts, totals))


def _terms(
    objective: Objective,
    params: Params,
    chunk: Batch,
) -> PyTree[Scalar]:
    # The count has the outputs' dtype; a user's own `num_terms` may look at their values too.
    inputs, targets = chunk
    return term_counts(objective.loss, objective.outputs(params, inputs), targets)
