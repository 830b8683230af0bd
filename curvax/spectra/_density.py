"""Spectral densities by stochastic Lanczos quadrature; moments, traces of functions and log det."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._checks import check_count, check_damping, check_function, check_params
from curvax._host import compiled, loops_for
from curvax._trees import dimension
from curvax._types import Matvec, Params, PRNGKey, Scalar
from curvax._xla import fast_convs_in_loops
from curvax.estimate._hutchinson import Estimate, Sampler, rademacher
from curvax.solve._result import Result, code_of
from curvax.spectra._lanczos import NOT_FINITE, check_steps, draw, lanczos, tridiagonal
from curvax.spectra._trace import estimate_of

# n: probes; m: steps of Lanczos for each; d: parameters; g: points of a grid
# theta: nodes, w: weights of a quadrature; T: [m, m], the tridiagonal matrix of Lanczos


class Density(NamedTuple):
    """The distribution of a matrix's d eigenvalues, as n discrete ones that each estimate it.

    For a random unit vector v and any f, `v'f(A)v` has the expectation `tr f(A) / d`, and is about
    `sum_j w_j f(theta_j)`.

    Attributes:
      nodes: theta, for each probe in ascending order.
      weights: w, at least 0; each row sums to 1.
      dimension: d.
    """

    nodes: Float[Array, "n m"]
    weights: Float[Array, "n m"]
    dimension: Scalar


class DensityInfo(NamedTuple):
    """How far the nodes can be trusted.

    Attributes:
      residuals: for each node, an eigenvalue of A lies within this distance. They are small at the
        ends of the spectrum, where nodes are eigenvalues; inside, a node stands for many.
      steps: the number of products with A.
      code: a `curvax.solve.Result`, CONVERGED or NOT_FINITE, as int32.
    """

    residuals: Float[Array, "n m"]
    steps: Int[Array, ""]
    code: Int[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether all numbers are finite."""
        return self.code == Result.CONVERGED

    @property
    def message(self) -> str:
        """Say how it ended and what to do; outside of `jit`."""
        return "all numbers are finite." if bool(self.converged) else NOT_FINITE


def spectral_density(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int = 10,
    num_steps: int = 80,
    *,
    sampler: Sampler = rademacher,
) -> tuple[Density, DensityInfo]:
    """Estimate the density of eigenvalues of a symmetric matrix by stochastic Lanczos quadrature.

    m steps of Lanczos from a random unit vector v give T with eigenvalues theta_j and eigenvectors
    s_j. With `w_j = (s_j)_1^2`, `sum_j w_j f(theta_j) = v'f(A)v` exactly for polynomials f of
    degree up to 2 m - 1, and v is such that the expectation is `tr f(A) / d`.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric. It gets vectors of at least float32.
      params: a pytree of d float numbers that gives shapes, dtypes and shardings of the vectors.
      key: a JAX key. Probe i depends on key and i only, not on devices.
      num_probes: n; the errors over probes fall as `1 / sqrt(n d)`.
      num_steps: m, at most d; details finer than about `(largest - smallest) / m` are not resolved,
        except at the ends.
      sampler: `curvax.estimate.rademacher` or `curvax.estimate.normal`; probes are scaled to
        length 1.

    Returns:
      `(density, info)`: a `Density`, for `smooth_density`, `moments`, `spectral_sum` and
      `curvax.plot.spectral_density`; and a `DensityInfo`.

    Raises:
      ValueError: `num_probes` is below 1, `num_steps` lies outside [1, d], or the matvec returns a
        tree of another structure.
      TypeError: params are not float, or the matvec changes dtypes.

    Cost: n m products, one at a time, and `5 m^2 d` multiplications a probe. Memory: m + 3 trees
      like params, whatever n.

    Example: half of the eigenvalues are 1, half are 3.
      >>> import jax, jax.numpy as jnp, curvax
      >>> matvec = lambda v: jnp.tile(jnp.array([1.0, 3.0]), 50) * v
      >>> key = jax.random.key(0)
      >>> density, info = curvax.spectral_density(matvec, jnp.zeros(100), key, 2, num_steps=2)
      >>> [round(x, 4) for x in density.nodes[0].tolist()]
      [1.0, 3.0]
      >>> [round(x, 4) for x in density.weights[0].tolist()]
      [0.5, 0.5]

    References: Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
      quadrature, algorithm 1; Golub and Meurant (2010), Matrices, moments and quadrature with
      applications, for the rule; Ghorbani, Krishnan and Xiao (2019), An investigation into neural
      net optimization via Hessian eigenvalue density, https://arxiv.org/abs/1901.10159.
    """
    check_params(params)
    check_count(1, num_probes=num_probes)
    check_steps(params, num_steps=num_steps)
    check_function(
        "sampler",
        sampler,
        "(key, params) -> z",
        "curvax.estimate.rademacher or curvax.estimate.normal",
    )

    def probe(i: Array) -> tuple[Array, Array, Array]:
        start = _probe(params, key, i, sampler)
        krylov = lanczos(matvec, start, num_steps)
        return _quadrature(krylov.diagonal, krylov.off_diagonal)

    with loops_for(matvec):
        nodes, weights, residuals = lax.map(fast_convs_in_loops(probe), jnp.arange(num_probes))

    finite = jnp.all(jnp.isfinite(nodes))
    code = code_of((finite, Result.CONVERGED), otherwise=Result.NOT_FINITE)
    # A float, as d may be above the range of int32.
    size = jnp.asarray(float(dimension(params)), nodes.dtype)
    info = DensityInfo(residuals, jnp.int32(num_probes * num_steps), code)
    return Density(nodes, weights, size), info


def smooth_density(
    density: Density,
    grid: Float[Array, " g"],
    width: Any,
) -> Estimate:
    """Evaluate a density on a grid, with each node spread by a Gaussian.

    The density at t is `sum_j w_j N(t; theta_j, width^2)`.

    Args:
      density: the `Density` that `spectral_density` returns.
      grid: the points t.
      width: the standard deviation of the Gaussian, in units of an eigenvalue.

    Returns:
      `Estimate(mean, sem)` over probes, `[g]` each. The integral over all t is 1.

    Example: peaks are 3.989 w.
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import Density, smooth_density
      >>> density = Density(jnp.array([[0.0, 2.0]]), jnp.array([[0.25, 0.75]]), jnp.array(4.0))
      >>> smooth = smooth_density(density, jnp.array([0.0, 2.0]), 0.1)
      >>> [round(x, 3) for x in smooth.mean.tolist()]
      [0.997, 2.992]
    """
    # N(t; theta, width^2) = exp(-(t - theta)^2 / (2 width^2)) / (sqrt(2 pi) width)
    peak = 1 / (jnp.sqrt(2 * jnp.pi) * width)

    def of_probe(probe: tuple[Array, Array]) -> Array:
        nodes, weights = probe
        distances = (grid[:, None] - nodes) / width
        return jnp.sum(weights * peak * jnp.exp(-0.5 * distances**2), axis=1)

    # One probe at a time: g m numbers, not n times as many.
    return estimate_of(lax.map(of_probe, (density.nodes, density.weights)))


def moments(density: Density, degree: int) -> Estimate:
    """Estimate `tr(A^i) / d` for i = 0, ..., degree.

    Args:
      density: the `Density` that `spectral_density` returns, with m steps for each probe.
      degree: the highest i; the `v'A^i v` of each probe is exact up to degree 2 m - 1.

    Returns:
      `Estimate(mean, sem)`, `[degree + 1]` each.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import Density, moments
      >>> density = Density(jnp.array([[0.0, 2.0]]), jnp.array([[0.5, 0.5]]), jnp.array(4.0))
      >>> moments(density, 2).mean.tolist()
      [1.0, 1.0, 2.0]
    """
    check_count(0, degree=degree)
    # sum_j w_j theta_j^i
    powers = density.nodes[..., None] ** jnp.arange(degree + 1)
    return estimate_of(jnp.sum(density.weights[..., None] * powers, axis=1))


def spectral_sum(
    density: Density,
    fun: Callable[[Array], Array],
) -> Estimate:
    """Estimate the sum of a function over all eigenvalues, `tr f(A) = d E[v'f(A)v]`.

    Args:
      density: the `Density` that `spectral_density` returns.
      fun: f, from an array of eigenvalues to an array of the same shape: `jnp.exp`, or
        `lambda x: x / (x + damping)` for the effective number of parameters.

    Returns:
      `Estimate(mean, sem)`: unbiased for polynomials of degree up to 2 m - 1; for others as exact
      as such a polynomial comes near f. `sem` is that of the probes alone.

    Example: two eigenvalues are 2, two are 0.
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import Density, spectral_sum
      >>> density = Density(jnp.array([[0.0, 2.0]]), jnp.array([[0.5, 0.5]]), jnp.array(4.0))
      >>> spectral_sum(density, jnp.square).mean.item()
      8.0
    """
    # v'f(A)v ~ sum_j w_j f(theta_j) for each probe
    quadratures = jnp.sum(density.weights * fun(density.nodes), axis=1)
    return estimate_of(density.dimension * quadratures)


def logdet(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int = 10,
    num_steps: int = 40,
    *,
    damping: Any = 0.0,
) -> Estimate:
    """Estimate `log det(A + damping I)` of a positive definite matrix.

    It is the sum of `log(lambda + damping)` over eigenvalues, by stochastic Lanczos quadrature.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric.
      params: a pytree of d float numbers.
      key: a JAX key.
      num_probes: n.
      num_steps: m; the error falls as `((sqrt(c) - 1) / (sqrt(c) + 1))^(2 m)`, c being the
        condition number.
      damping: a number of at least 0, in units of an eigenvalue of A.

    Returns:
      `Estimate(mean, sem)`, NaN where a node plus damping is not positive.

    Raises:
      ValueError: damping is negative; and as `spectral_density`.

    Cost: as `spectral_density`.

    Example: `50 log 3 = 54.93`.
      >>> import jax, jax.numpy as jnp, curvax
      >>> matvec = lambda v: jnp.tile(jnp.array([1.0, 3.0]), 50) * v
      >>> key = jax.random.key(0)
      >>> estimate = curvax.spectra.logdet(matvec, jnp.zeros(100), key, num_steps=2)
      >>> round(float(estimate.mean), 2), round(float(estimate.sem), 2)
      (54.93, 0.0)

    References: Ubaru, Chen and Saad (2017), section 4.
    """
    check_damping(damping, allow_zero=True)
    density, _ = spectral_density(matvec, params, key, num_probes, num_steps)
    return spectral_sum(density, lambda nodes: jnp.log(nodes + damping))


@partial(compiled, static=(3,))
def _probe(
    params: Params,
    key: PRNGKey,
    i: Array,
    sampler: Sampler,
) -> Params:
    return draw(sampler, jax.random.fold_in(key, i), params)


@compiled
def _quadrature(
    diagonal: Float[Array, " m"],
    off_diagonal: Float[Array, " m"],
) -> tuple[Float[Array, " m"], Float[Array, " m"], Float[Array, " m"]]:
    """Return nodes and weights of a tridiagonal matrix, and the nodes' residuals."""
    T = tridiagonal(diagonal, off_diagonal)
    nodes, S = jnp.linalg.eigh(T)
    # w_j = (s_j)_1^2 (Golub and Welsch's rule); they sum to 1 but for rounding.
    weights = S[0] ** 2
    weights = weights / jnp.sum(weights)
    # |A u_j - theta_j u_j| = b_m |(s_j)_m|
    residuals = off_diagonal[-1] * jnp.abs(S[-1])
    return nodes, weights, residuals
