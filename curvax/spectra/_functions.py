"""Functions of a large matrix times a vector, through the small tridiagonal matrix of Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._checks import check_count, check_damping, check_params
from curvax._trees import cast_like, combine_rows, dimension, norm
from curvax._types import Matvec, Params, Scalar, tree_at_least_float32
from curvax.solve._damped import checked
from curvax.solve._result import Result, SolveInfo, code_of
from curvax.spectra._lanczos import Lanczos, lanczos, tridiagonal

# m: steps; T: [m, m], tridiagonal; V: [m, d], its rows orthonormal; A V' ~ V' T


def matrix_function(
    matvec: Matvec,
    b: Params,
    fn: Callable[[Float[Array, " m"]], Float[Array, " m"]],
    num_steps: int,
) -> tuple[Params, Scalar]:
    """Approximate `f(A) b` by `|b| V' f(T) e_1`, exact for polynomials f of degree below m.

    Args:
      matvec: `v -> A v` on trees like b, A symmetric.
      b: a tree of d float numbers.
      fn: f, elementwise on eigenvalues.
      num_steps: the number of products m; above d it is cut to d, where the result is exact.

    Returns:
      f(A) b, a tree like b in its dtypes; the change of it by the last step, relative to its norm.

    Raises:
      ValueError, TypeError: as `curvax.spectra.lanczos`.

    Cost: m products, four passes over m trees each. Memory: m trees.

    Example: the square root of a matrix, times a vector.
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import matrix_function
      >>> matvec = lambda v: jnp.array([4.0, 9.0]) * v
      >>> x, _ = matrix_function(matvec, jnp.ones(2), jnp.sqrt, num_steps=2)
      >>> [round(v, 4) for v in x.tolist()]
      [2.0, 3.0]

    References: Golub and Meurant (2010), Matrices, moments and quadrature with applications.
    """
    krylov, length = krylov_space(matvec, b, num_steps)
    m = len(krylov.diagonal)

    def coordinates(m: int) -> Float[Array, " m"]:
        # |b| f(T) e_1 = |b| S f(theta) S'e_1, with T = S theta S' of the first m steps
        T = tridiagonal(krylov.diagonal[:m], krylov.off_diagonal[:m])
        theta, S = jnp.linalg.eigh(T)
        c: Array = length * S @ (fn(theta) * S[0])
        return c

    # The rows of V are orthonormal, so that coordinates have the norms of the vectors.
    last = coordinates(m)
    previous = jnp.pad(coordinates(m - 1), (0, 1)) if m > 1 else jnp.zeros_like(last)
    size = jnp.linalg.norm(last)
    change = jnp.linalg.norm(last - previous) / jnp.where(size > 0, size, 1)
    x = combine_rows(last, krylov.basis)
    x = jax.tree.map(lambda v: jnp.where(length > 0, v, 0), x)
    return cast_like(x, b), change


def krylov_space(matvec: Matvec, b: Params, num_steps: int) -> tuple[Lanczos, Scalar]:
    """Return the Krylov space of A and b, of at most d dimensions, and |b|.

    Products are of vectors in the dtypes of b, everything else is in at least float32.
    """
    check_params(b)
    check_count(1, num_steps=num_steps)
    wide = tree_at_least_float32(b)
    length = norm(wide)

    def wide_matvec(v: Params) -> Params:
        return tree_at_least_float32(checked(matvec, cast_like(v, b)))

    # Any start does where b is zero, for its coordinates |b| e_1 are zero then.
    start = jax.tree.map(lambda x: jnp.where(length > 0, x, 1), wide)
    return lanczos(wide_matvec, start, min(num_steps, dimension(b))), length


def absolute_krylov(
    matvec: Matvec,
    b: Params,
    *,
    damping: Any,
    tol: float | Array = 1e-2,
    num_steps: int = 20,
) -> tuple[Params, SolveInfo]:
    """Approximate `(|A| + damping I)^-1 b`, where `|A|` has the absolute eigenvalues of A.

    With b a gradient and A the Hessian, this is the saddle-free Newton direction. b lies in the
    Krylov space in which it is computed, so `b'x > 0` whatever A is.

    Args:
      matvec: `v -> A v` on trees like b, A symmetric, such as `curvax.hvp(...)`.
      b: a tree of float arrays.
      damping: a positive number, in units of an eigenvalue of A.
      tol: the change by the last step up to which the code is CONVERGED.
      num_steps: the dimension of the Krylov space.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`. Its `residual` is the relative change of x
      by the last step (there is no product with |A| to compute a residual); its code is CONVERGED,
      MAX_STEPS or NOT_FINITE, where x is 0.

    Raises:
      ValueError: damping is not positive, or num_steps is below 1.
      TypeError: the matvec changes dtypes.

    Cost: `num_steps` products. Memory: as many trees.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import absolute_krylov
      >>> matvec = lambda v: jnp.array([1.5, -0.5]) * v
      >>> x, info = absolute_krylov(matvec, jnp.array([2.0, 2.0]), damping=0.5)
      >>> [round(v, 4) for v in x.tolist()]
      [1.0, 2.0]

    References: Dauphin et al. (2014), Identifying and attacking the saddle point problem in
      high-dimensional non-convex optimization, https://arxiv.org/abs/1406.2572, section 6.
    """
    check_damping(damping)

    def inverse(values: Float[Array, " m"]) -> Float[Array, " m"]:
        return jnp.reciprocal(jnp.abs(values) + damping)

    x, change = matrix_function(matvec, b, inverse, num_steps)
    finite = jnp.isfinite(change)
    size = dimension(b)
    # With d steps nothing is left to change, whatever the last step did.
    code = code_of(
        (~finite, Result.NOT_FINITE),
        ((change <= tol) | (num_steps >= size), Result.CONVERGED),
        otherwise=Result.MAX_STEPS,
    )
    x = jax.tree.map(lambda v: jnp.where(finite, v, 0), x)
    residual = jnp.where(finite, change, jnp.inf)
    return x, SolveInfo(residual, jnp.int32(min(num_steps, size)), code)
