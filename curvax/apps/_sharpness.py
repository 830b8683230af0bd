"""Sharpness: is a learning rate stable for gradient descent, and for SGD, at these parameters?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._batch import batch_size
from curvax._checks import check_at_least, check_count, check_params
from curvax._trees import dimension, safe_divide
from curvax._types import Batch, Matvec, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax.estimate._hutchinson import Estimate, normal
from curvax.objective import Objective
from curvax.products import hvp, streamed
from curvax.solve._result import Result
from curvax.spectra import eigsh, lanczos, traces_over
from curvax.spectra._lanczos import tridiagonal

# n: examples of the data set, B: examples of a batch, eta: learning rate,
# H: curvature of the mean loss over the data set; L and mu: its largest and smallest eigenvalue


class HeavyBall(NamedTuple):
    """Learning rate and momentum of gradient descent, for eigenvalues between two numbers.

    Attributes:
      learning_rate: `(2 / (sqrt(L) + sqrt(mu)))^2`.
      momentum: `beta = ((sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)))^2`, for `optax.sgd`.
      largest: L.
      smallest: mu.
    """

    learning_rate: Scalar
    momentum: Scalar
    largest: Scalar
    smallest: Scalar


def heavy_ball(eigenvalues: Float[Array, " m"], floor: float | Array = 1e-4) -> HeavyBall:
    """Return the rate and momentum of gradient descent that are best for a quadratic.

    `x += momentum (x - x_before) - learning_rate g` shrinks the error along every eigenvector with
    an eigenvalue in [mu, L] by `sqrt(beta)` a step, up to a factor that grows as the number of
    steps; no other constants do better at both ends.

    Args:
      eigenvalues: of the curvature, or Ritz values, which lie among them.
      floor: mu is the smallest of them above `floor` times the largest; what is below counts as
        flat.

    Returns:
      A `HeavyBall`. Where no eigenvalue is positive its rate is infinite; where one is NaN, all is.

    Cost: none to speak of.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> best = curvax.apps.heavy_ball(jnp.array([4.0, 2.0, 1.0, -1.0]))
      >>> round(best.learning_rate.item(), 4), round(best.momentum.item(), 4)
      (0.4444, 0.1111)

    References: Polyak (1964), Methods of speeding up the convergence of iteration methods.
    """
    check_at_least(0, floor=floor)
    largest = jnp.max(eigenvalues)
    is_above = (eigenvalues > floor * largest) & (eigenvalues > 0)
    smallest = jnp.min(jnp.where(is_above, eigenvalues, largest))
    # Nothing curves upwards: both count as 0, and the rate is without a bound.
    root_largest, root_smallest = (jnp.sqrt(jnp.maximum(x, 0)) for x in (largest, smallest))
    total = root_largest + root_smallest
    beta = safe_divide(root_largest - root_smallest, total) ** 2
    # Not `total > 0`, by which NaN would be without a bound too.
    rate = jnp.where(total == 0, jnp.inf, safe_divide(2, total) ** 2)
    return HeavyBall(rate, beta, largest, smallest)


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
      heavy_ball: `HeavyBall`, rate and momentum for gradient descent, if Ritz values were asked
        for.
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
    heavy_ball: HeavyBall | None = None

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
        if self.heavy_ball is not None:
            best = self.heavy_ball
            between = f"for eigenvalues from {best.smallest:.3g} to {best.largest:.3g}"
            lines += [
                ("heavy ball, rate", f"{best.learning_rate:.3g}", between),
                ("heavy ball, momentum", f"{best.momentum:.3g}", "from Ritz values, a guide"),
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
    ritz_steps: int = 0,
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
      ritz_steps: the steps of Lanczos from whose Ritz values and the largest eigenvalue
        `curvax.apps.heavy_ball` computes a rate and a momentum; 0 leaves them out.

    Returns:
      A `SharpnessReport`; `curvax.plot.sharpness` draws several of them over training.

    Raises:
      ValueError: there is no batch, or the learning rate is negative, or num_probes is below 1.

    Cost: `num_probes` products with the whole data set, some 20 to 50 for the
      eigenvalue, and `ritz_steps`. Memory: one batch at a time, and 20 trees like params.

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
      Rate and momentum are inspired by Granziol et al., who learn both from stochastic Lanczos
      quadrature; only an abstract was read, and the rule is Polyak's for a quadratic.

    Deviates: the factor for batches of B examples is derived for the model of orthogonal gradients
      of equal length.
    """
    check_params(params)
    check_count(1, num_probes=num_probes)
    check_at_least(0, learning_rate=learning_rate)
    check_count(0, ritz_steps=ritz_steps)
    if not batches:
        raise ValueError("batches is empty; give at least one (inputs, targets).")
    sizes = [batch_size(batch) for batch in batches]
    first_size, n = sizes[0], sum(sizes)
    start, probes = jax.random.split(jax.random.key(0) if key is None else key)
    ritz_key = jax.random.fold_in(start, 1)

    # lambda_max: one batch is a single program, several are gone through for each product.
    if len(batches) == 1:
        of_batch = (matvec_of, objective, params, batches[0])
        (values, _), info = _largest(*of_batch, start, tol)
        ritz = _ritz_values(*of_batch, ritz_key, ritz_steps) if ritz_steps else None
    else:
        product = streamed(matvec_of, objective, params, batches)
        (values, _), info = eigsh(product, params, 1, start, tol=tol)
        ritz = _ritz(product, params, ritz_key, ritz_steps) if ritz_steps else None
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
        heavy_ball=None if ritz is None else heavy_ball(jnp.append(ritz, values[0])),
    )


def _threshold(ratio_per_rate: Scalar) -> Scalar:
    """Return the learning rate whose ratio is 1: infinity where nothing curves upwards, or NaN."""
    is_flat = ratio_per_rate <= 0
    return jnp.where(is_flat, jnp.inf, 1 / jnp.where(is_flat, 1, ratio_per_rate))


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


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _ritz_values(
    matvec_of: Callable[..., Matvec],
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    num_steps: int,
) -> Float[Array, " m"]:
    """Return Ritz values on one batch, compiled as one program."""
    return _ritz(matvec_of(objective, params, batch), params, key, num_steps)


def _ritz(matvec: Matvec, params: Params, key: PRNGKey, num_steps: int) -> Float[Array, " m"]:
    """Return the Ritz values of some steps of Lanczos from a random vector, at most d of them."""
    num_rows = min(num_steps, dimension(params))
    krylov = lanczos(matvec, normal(key, tree_at_least_float32(params)), num_rows, key)
    values: Array = jnp.linalg.eigvalsh(tridiagonal(krylov.diagonal, krylov.off_diagonal))
    return values


def _verdict(ratio: Scalar, method: str) -> str:
    if jnp.isnan(ratio):
        return f"whether {method} is stable is unknown: the curvature is not a number"
    return f"{method} is {'stable' if ratio <= 1 else 'not stable'} here"
