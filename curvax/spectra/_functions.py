"""Functions of a large matrix times a vector, through the small tridiagonal matrix of Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._checks import check_count, check_damping, check_params
from curvax._trees import combine_rows, norm
from curvax._types import Matvec, Params, Scalar, tree_at_least_float32
from curvax.solve._damped import checked
from curvax.solve._result import Result, SolveInfo, code_of
from curvax.spectra._lanczos import lanczos

# m: steps, T: [m, m], tridiagonal, V: [m, d], A V' ~ V' T


def matrix_function(
    matvec: Matvec,
    b: Params,
    fn: Callable[[Float[Array, " m"]], Float[Array, " m"]],
    num_steps: int,
) -> tuple[Params, Scalar]:
    """Approximate `f(A) b` by `|b| V' f(T) e_1`, exact for polynomials f of degree below `num_steps`.

    Args:
      matvec: `v -> A v` on trees like b, A symmetric.
      b: tree of d float numbers.
      fn: f, elementwise on eigenvalues.
      num_steps: products m; more than d are cut to d, where the result is exact.

    Returns:
      f(A) b, a tree like b in its dtypes; how much of it the last step changed, relative to its norm.

    Raises:
      ValueError, TypeError: as `curvax.spectra.lanczos`.

    Cost: m products, four passes over m trees each. Memory: m trees.

    Example: the square root of a matrix, times a vector.
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import matrix_function
      >>> x, _ = matrix_function(lambda v: jnp.array([4.0, 9.0]) * v, jnp.ones(2), jnp.sqrt, num_steps=2)
      >>> [round(v, 4) for v in x.tolist()]
      [2.0, 3.0]

    References: Golub and Meurant (2010), Matrices, moments and quadrature with applications.
    """
    check_params(b)
    check_count(1, num_steps=num_steps)
    wide = tree_at_least_float32(b)
    size = norm(wide)
    m = min(num_steps, sum(x.size for x in jax.tree.leaves(b)))
    own = lambda v: tree_at_least_float32(
        checked(matvec, jax.tree.map(lambda x, p: x.astype(p.dtype), v, b))
    )
    start = jax.tree.map(lambda x: jnp.where(size > 0, x, 1), wide)
    found = lanczos(own, start, m)

    def weights(m: int) -> Float[Array, " m"]:
        off = found.off_diagonal[: m - 1]
        values, vectors = jnp.linalg.eigh(
            jnp.diag(found.diagonal[:m]) + jnp.diag(off, 1) + jnp.diag(off, -1)
        )
        weights: Array = size * vectors @ (fn(values) * vectors[0])
        return weights

    last = weights(m)
    before = jnp.pad(weights(m - 1), (0, 1)) if m > 1 else jnp.zeros_like(last)
    length = jnp.linalg.norm(last)
    change = jnp.linalg.norm(last - before) / jnp.where(length > 0, length, 1)
    x = combine_rows(last, found.basis)
    return jax.tree.map(lambda x, p: jnp.where(size > 0, x, 0).astype(p.dtype), x, b), change


def absolute_krylov(
    matvec: Matvec, b: Params, *, damping: Any, tol: float | Array = 1e-2, num_steps: int = 20
) -> tuple[Params, SolveInfo]:
    """Approximate `(|A| + damping I)^-1 b`, where `|A|` has the absolute eigenvalues of A: the saddle-free Newton
    direction.

    b lies in the Krylov space in which it is computed, so `b'x > 0` whatever A is.

    Args:
      matvec: `v -> A v` on trees like b, A symmetric, such as `curvax.hvp(...)`.
      b: tree of float arrays.
      damping: positive; in units of an eigenvalue of A.
      tol: change by the last step up to which the code is CONVERGED.
      num_steps: dimension of the Krylov space.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo` whose `residual` is the relative change of x by the last step (there
      is no product with |A| to compute one), and whose code is CONVERGED, MAX_STEPS or NOT_FINITE, where x is 0.

    Raises:
      ValueError: damping that is not positive, num_steps below 1.
      TypeError: a matvec that changes dtypes.

    Cost: `num_steps` products. Memory: as many trees.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import absolute_krylov
      >>> x, info = absolute_krylov(lambda v: jnp.array([1.5, -0.5]) * v, jnp.array([2.0, 2.0]), damping=0.5)
      >>> [round(v, 4) for v in x.tolist()]
      [1.0, 2.0]

    References: Dauphin et al. (2014), Identifying and attacking the saddle point problem in high-dimensional non-convex
      optimization, section 6.
    """
    check_damping(damping)
    x, change = matrix_function(
        matvec, b, lambda values: 1 / (jnp.abs(values) + damping), num_steps
    )
    finite = jnp.isfinite(change)
    size = sum(x.size for x in jax.tree.leaves(b))
    code = code_of(
        (~finite, Result.NOT_FINITE),
        ((change <= tol) | (num_steps >= size), Result.CONVERGED),
        otherwise=Result.MAX_STEPS,
    )
    x = jax.tree.map(lambda v: jnp.where(finite, v, 0), x)
    return x, SolveInfo(jnp.where(finite, change, jnp.inf), jnp.int32(min(num_steps, size)), code)
