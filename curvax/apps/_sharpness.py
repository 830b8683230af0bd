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

# n: examples of the data set, B: examples of a batch, eta: learning rate,
# H: curvature of the mean loss over the data set


class SharpnessReport(NamedTuple):
    """Curvature at some parameters, and what it means for a learning rate; `print` it for a table.

    Attributes:
      largest: the largest eigenvalue of H.
      trace: an `Estimate` of the trace of H.
      learning_rate: eta.
      gradient_descent: `eta largest / 2`; above 1, gradient descent on all data moves away from
        these parameters.
      sgd: `eta trace ((1 - 1/n) / B + 1/n) / 2`; above 1, SGD with batches of B moves away too.
      max_gradient_descent: the learning rate at which `gradient_descent` is 1.
      max_sgd: the learning rate at which `sgd` is 1.
      batch_size: B.
      num_examples: n.
      code: a `curvax.solve.Result` of the eigenvalue, as an int.
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
        """Return a table: one line for each number, with its meaning."""
        of_descent = _verdict(self.gradient_descent, "gradient descent")
        of_sgd = _verdict(self.sgd, "SGD")
        gradients = f"of SGD, {self.num_examples} examples with gradients of like size"
        lines = [
            ("largest eigenvalue", f"{self.largest:.4g}", Result(int(self.code)).message),
            ("trace", f"{self.trace.mean:.4g}", f"standard error {self.trace.sem:.2g}"),
            ("rate x largest / 2", f"{self.gradient_descent:.3g}", of_descent),
            (f"rate x trace / 2, B = {self.batch_size}", f"{self.sgd:.3g}", of_sgd),
            ("largest stable rate", f"{self.max_gradient_descent:.3g}", "of gradient descent"),
            ("", f"{self.max_sgd:.3g}", gradients),
        ]
        # The first two columns are as wide as their longest entry.
        names, numbers, _ = zip(*lines, strict=True)
        width, digits = max(map(len, names)), max(map(len, numbers))
        rows = [f"{name:{width}}  {number:>{digits}}  {note}" for name, number, note in lines]
        return "\n".join([f"at a learning rate of {self.learning_rate:g}", *rows])


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
    """Compare a learning rate with the largest eigenvalue and the trace of the curvature.

    Gradient descent on the whole data is stable at params iff `eta lambda_max <= 2`. SGD needs
    more: where the examples' gradients are orthogonal and of equal length, the second moment of its
    iterates stays bounded iff `eta tr(H) ((1 - 1/n) / B + 1/n) <= 2` (for batches that are drawn
    with replacement). For other data that is a guide, not a threshold.

    Args:
      objective: the `curvax.Objective` of training.
      params: a pytree of float arrays, such as the parameters at the end of training.
      batches: the data set, in batches that can be read several times. B is the size of the first
        batch, n the number of examples in all of them.
      learning_rate: eta, of plain gradient descent; with momentum m, `eta / (1 - m)` is a fair
        stand-in for SGD.
      key: the JAX key for the start vector of the eigenvalue and for the probes of the trace; None
        takes the key of seed 0.
      num_probes: the number of probes of the trace.
      matvec_of: `curvax.hvp`, or `curvax.ggnvp` for the Gauss-Newton matrix.
      tol: the relative tolerance of the eigenvalue.

    Returns:
      A `SharpnessReport`; `curvax.plot.sharpness` draws several of them over training.

    Raises:
      ValueError: there is no batch, or the learning rate is negative, or num_probes is below 1.

    Cost: `num_probes` products with the whole data set, and some 20 to 50 for the eigenvalue.
      Memory: one batch at a time, and 20 trees like params.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.diag(jnp.array([2.0, 1.0])), jnp.zeros(2))  # H = diag(2, 1/2)
      >>> print(curvax.apps.sharpness_report(objective, jnp.ones(2), [batch], learning_rate=0.5))
      at a learning rate of 0.5
      largest eigenvalue           2  converged to the tolerance.
      trace                      2.5  standard error 0
      rate x largest / 2         0.5  gradient descent is stable here
      rate x trace / 2, B = 2  0.469  SGD is stable here
      largest stable rate          1  of gradient descent
                                1.07  of SGD, 2 examples with gradients of like size

    References: Wu and Su (2023), The implicit regularization of dynamical stability in stochastic
      gradient descent, https://arxiv.org/abs/2305.17490; Cohen et al. (2021), Gradient descent on
      neural networks typically occurs at the edge of stability, https://arxiv.org/abs/2103.00065.

    Deviates: the factor for batches of B examples is derived for the model of orthogonal gradients
      of equal length.
    """
    check_params(params)
    check_count(1, num_probes=num_probes)
    check_at_least(0, learning_rate=learning_rate)
    if not batches:
        raise ValueError("batches is empty; give at least one (inputs, targets).")
    sizes = [batch_size(batch) for batch in batches]
    first_size, n = sizes[0], sum(sizes)
    start, probes = jax.random.split(jax.random.key(0) if key is None else key)

    # lambda_max: one batch is a single program, several are gone through for each product.
    if len(batches) == 1:
        (values, _), info = _largest(matvec_of, objective, params, batches[0], start, tol)
    else:
        product = streamed(matvec_of, objective, params, batches)
        (values, _), info = eigsh(product, params, 1, start, tol=tol)
    # tr(H), all leaves together
    traces = traces_over(
        objective, params, batches, num_probes, probes, by=_one_group, matvec_of=matvec_of
    )
    trace = traces["all"]

    # Gradient descent: |1 - eta lambda_max| <= 1 (Cohen et al., 2021).
    descent_per_rate = values[0] / 2
    # SGD: the iterate along gradient i is multiplied by 1 - eta tr(H) k / B, where i is k of the B
    # draws. E[k] = B / n and E[k^2] = (B^2 / n) ((1 - 1/n) / B + 1/n), so that its second moment
    # stays bounded iff eta tr(H) ((1 - 1/n) / B + 1/n) <= 2.
    sgd_per_rate = trace.mean * ((1 - 1 / n) / first_size + 1 / n) / 2
    return SharpnessReport(
        largest=values[0],
        trace=trace,
        learning_rate=learning_rate,
        gradient_descent=learning_rate * descent_per_rate,
        sgd=learning_rate * sgd_per_rate,
        max_gradient_descent=_threshold(descent_per_rate),
        max_sgd=_threshold(sgd_per_rate),
        batch_size=first_size,
        num_examples=n,
        code=info.code,
    )


def _threshold(ratio_per_rate: Scalar) -> Scalar:
    """Return the learning rate whose ratio is 1; infinity where nothing curves upwards."""
    upwards = ratio_per_rate > 0
    return jnp.where(upwards, 1 / jnp.where(upwards, ratio_per_rate, 1), jnp.inf)


def _one_group(path: str) -> str:
    del path  # one trace for all leaves
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
    """Find the largest eigenvalue on one batch, compiled as one program."""
    return eigsh(matvec_of(objective, params, batch), params, 1, key, tol=tol)


def _verdict(ratio: Scalar, method: str) -> str:
    return f"{method} is {'stable' if ratio <= 1 else 'not stable'} here"
