"""Sharpness: is a learning rate stable for gradient descent, and for SGD, at these parameters?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax._batch import batch_size
from curvax._checks import check_at_least, check_count, check_params
from curvax._types import Batch, Matvec, Params, PRNGKey, Scalar
from curvax.estimate._hutchinson import Estimate
from curvax.objective import Objective
from curvax.products import hvp, streamed
from curvax.solve._result import Result
from curvax.spectra import eigsh, traces_over

# n: examples of the data set, B: of a batch, eta: learning rate, H: curvature of the mean loss over the data set


class SharpnessReport(NamedTuple):
    """Curvature at some parameters, and what it means for a learning rate; `print` it for a table.

    Attributes:
      largest: the largest eigenvalue of H.
      trace: of H, an `Estimate`.
      learning_rate: eta.
      gradient_descent: `eta largest / 2`; above 1, gradient descent on all data moves away from here.
      sgd: `eta trace ((1 - 1/n) / B + 1/n) / 2`; above 1, so does SGD with batches of B.
      max_gradient_descent: the learning rate at which the first is 1.
      max_sgd: the learning rate at which the second is 1.
      batch_size: B.
      num_examples: n.
      code: a `curvax.solve.Result` of the eigenvalue, as int.
    """

    largest: Scalar
    trace: Estimate
    learning_rate: float
    gradient_descent: Scalar
    sgd: Scalar
    max_gradient_descent: Scalar
    max_sgd: Scalar
    batch_size: int
    num_examples: int
    code: Any

    @property
    def max_learning_rate(self) -> Scalar:
        """The smaller of both thresholds."""
        return jnp.minimum(self.max_gradient_descent, self.max_sgd)

    def __str__(self) -> str:
        """Say what each number is, line by line."""
        lines = [
            ("largest eigenvalue", f"{self.largest:.4g}", Result(int(self.code)).message),
            ("trace", f"{self.trace.mean:.4g}", f"standard error {self.trace.sem:.2g}"),
            (
                "rate x largest / 2",
                f"{self.gradient_descent:.3g}",
                _verdict(self.gradient_descent, "gradient descent"),
            ),
            (
                f"rate x trace / 2, B = {self.batch_size}",
                f"{self.sgd:.3g}",
                _verdict(self.sgd, "SGD"),
            ),
            ("largest stable rate", f"{self.max_gradient_descent:.3g}", "of gradient descent"),
            (
                "",
                f"{self.max_sgd:.3g}",
                f"of SGD, {self.num_examples} examples with gradients of like size",
            ),
        ]
        width, number = (max(len(line[i]) for line in lines) for i in range(2))
        head = f"at a learning rate of {self.learning_rate:g}\n"
        return head + "\n".join(
            f"{name:{width}}  {value:>{number}}  {note}" for name, value, note in lines
        )


def sharpness_report(
    objective: Objective,
    params: Params,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    key: PRNGKey | None = None,
    num_probes: int = 20,
    matvec_of: Callable[..., Matvec] = hvp,
    tol: float = 1e-3,
) -> SharpnessReport:
    """Measure the largest eigenvalue and the trace of the curvature over a data set, against a learning rate.

    Gradient descent on the whole data is stable at params iff `eta lambda_max <= 2`. SGD needs more: where the examples'
    gradients are orthogonal and of equal length, the second moment of its iterates stays bounded iff
    `eta tr(H) ((1 - 1/n) / B + 1/n) <= 2` (batches drawn with replacement). For other data that is a guide, not a
    threshold.

    Args:
      objective: a `curvax.Objective`.
      params: pytree of float arrays, such as those at the end of training.
      batches: the data set in batches that can be gone through again and again; B is the size of the first, n of all.
      learning_rate: eta, of plain gradient descent; with momentum m, `eta / (1 - m)` is a fair stand-in for SGD.
      key: JAX key of the eigenvalue's start and the trace's probes; None: that of seed 0.
      num_probes: of the trace.
      matvec_of: `curvax.hvp`, or `curvax.ggnvp` for the Gauss-Newton matrix.
      tol: of the eigenvalue.

    Returns:
      `SharpnessReport`; `curvax.plot.sharpness` draws several over training.

    Raises:
      ValueError: no batch, a learning rate or num_probes that is not positive.

    Cost: `num_probes` products with the whole data set, and some 20 to 50 for the eigenvalue. Memory: one batch at a time,
      20 trees like params.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.diag(jnp.array([2.0, 1.0])), jnp.zeros(2))                             # H = diag(2, 1/2)
      >>> print(curvax.apps.sharpness_report(objective, jnp.ones(2), [batch], learning_rate=0.5))
      at a learning rate of 0.5
      largest eigenvalue           2  converged to the tolerance.
      trace                      2.5  standard error 0
      rate x largest / 2         0.5  gradient descent is stable here
      rate x trace / 2, B = 2  0.469  SGD is stable here
      largest stable rate          1  of gradient descent
                                1.07  of SGD, 2 examples with gradients of like size

    References: Wu and Su (2023), The implicit regularization of dynamical stability in stochastic gradient descent; Cohen
      et al. (2021), Gradient descent on neural networks typically occurs at the edge of stability.

    Deviates: the factor for batches of B examples is derived for the model of orthogonal gradients of equal length.
    """
    check_params(params)
    check_count(1, num_probes=num_probes)
    check_at_least(0, learning_rate=learning_rate)
    if not batches:
        raise ValueError("batches is empty; give at least one (inputs, targets).")
    sizes = [batch_size(batch) for batch in batches]
    own, n = sizes[0], sum(sizes)
    start, probes = jax.random.split(jax.random.key(0) if key is None else key)
    if len(batches) == 1:
        (values, _), info = _largest(matvec_of, objective, params, batches[0], start, tol)
    else:
        (values, _), info = eigsh(
            streamed(matvec_of, objective, params, batches), params, 1, start, tol=tol
        )
    trace = traces_over(
        objective, params, batches, num_probes, probes, by=_whole, matvec_of=matvec_of
    )["all"]
    of_descent, of_sgd = values[0] / 2, trace.mean * ((1 - 1 / n) / own + 1 / n) / 2
    limit = lambda x: jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), jnp.inf)
    return SharpnessReport(
        largest=values[0],
        trace=trace,
        learning_rate=learning_rate,
        gradient_descent=learning_rate * of_descent,
        sgd=learning_rate * of_sgd,
        max_gradient_descent=limit(of_descent),
        max_sgd=limit(of_sgd),
        batch_size=own,
        num_examples=n,
        code=info.code,
    )


def _whole(path: str) -> str:
    del path
    return "all"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest(
    matvec_of: Callable[..., Matvec],
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    tol: float,
) -> Any:
    return eigsh(matvec_of(objective, params, batch), params, 1, key, tol=tol)


def _verdict(ratio: Scalar, method: str) -> str:
    return f"{method} is {'stable' if ratio <= 1 else 'not stable'} here"
