"""Direct solves: by a matrix over parameters, or by the Gram matrix of its factor's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jaxtyping import Array, Float

from curvax._checks import check_damping, check_like, describe
from curvax._trees import (
    add_scaled,
    all_finite,
    as_vector,
    cast_like,
    inner_product,
    norm,
    safe_divide,
)
from curvax._types import Matvec, Params, Scalar, at_least_float32, tree_at_least_float32
from curvax.solve._damped import check_system, finished
from curvax.solve._result import Result, SolveInfo, code_of

# n: rows of U'; d: parameters


class SampleSpace(NamedTuple):
    """A matrix `F = U U'` by the inner products of its n rows `U'`.

    Attributes:
      gram: `U'U`, `[n, n]`.
      push: `v -> U'v`, from trees like params to `[n]`; a pytree.
      pull: `q -> U q`, from `[n]` to trees like params; a pytree.
      gradient: q with `U q` the gradient of the batch, `[n]`.
    """

    gram: Float[Array, "n n"]
    push: Callable[[Params], Float[Array, " n"]]
    pull: Callable[[Float[Array, " n"]], Params]
    gradient: Float[Array, " n"]


class Dense(NamedTuple):
    """A symmetric matrix over all entries of params.

    Attributes:
      matrix: `[d, d]`, in the order of `jax.flatten_util.ravel_pytree`, as `curvax.to_dense`
        returns it.
    """

    matrix: Float[Array, "d d"]


Formed: TypeAlias = SampleSpace | Dense


def direct(
    curvature: Formed,
    b: Params,
    *,
    damping: Any,
    tol: float | Array = 1e-5,
) -> tuple[Params, SolveInfo]:
    """Solve `(F + damping I) x = b` by Cholesky, for positive semidefinite F.

    In sample space `x = (b - U (U'U + damping I)^-1 U'b) / damping`. One step of iterative
    refinement recovers the accuracy that rounding takes at small damping.

    Args:
      curvature: what `curvax.solve.sample_space(objective, params, batch)` returns, or
        `Dense(curvax.to_dense(matvec, params))`.
      b: a tree like params.
      damping: a positive number (with `Dense` it may be 0), in units of an eigenvalue of F.
      tol: the relative residual above which the code is STALLED.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`. Where `F + damping I` is not positive
      definite, or not finite, x is 0 and the code NOT_DEFINITE or NOT_FINITE.

    Raises:
      ValueError: damping is not positive, or b has another size.
      TypeError: curvature is neither a `SampleSpace` nor a `Dense`.

    Cost: `n^3 / 3` multiplications and five products with U or U'; with `Dense` `d^3 / 3`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> dense = curvax.solve.Dense(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> x, info = curvax.solve.direct(dense, jnp.array([3.0, 0.0]), damping=0)
      >>> [round(v, 4) for v in x.tolist()], bool(info.converged)
      ([2.0, -1.0], True)
    """
    check_damping(damping, allow_zero=isinstance(curvature, Dense))
    check_system(b, damping, tol, 1, None)
    wide = tree_at_least_float32(b)
    if isinstance(curvature, Dense):
        x, matvec = _by_matrix(curvature, damping, wide)
    elif isinstance(curvature, SampleSpace):
        x, matvec = _by_rows(curvature, damping, wide)
    else:
        raise TypeError(
            "direct takes the result of curvax.solve.sample_space, or curvax.solve.Dense(matrix); "
            f"got {describe(curvature)}. A matvec is for curvax.cg."
        )

    # Cholesky says by NaN that a matrix is not positive definite.
    good = all_finite(x)
    finite_system = all_finite((_trace(curvature[0]), b))
    code = code_of(
        (good, Result.CONVERGED), (finite_system, Result.NOT_DEFINITE), otherwise=Result.NOT_FINITE
    )
    x = jax.tree.map(lambda x: jnp.where(good, x, 0), x)
    return finished(matvec, x, b, jnp.int32(0), code, tol)


def _by_rows(
    curvature: SampleSpace,
    damping: Any,
    b: Params,
) -> tuple[Params, Matvec]:
    """Solve in sample space; return x and the product with the damped matrix.

    b is split into its part along the batch's gradient, for which no division by damping is needed,
    and the remainder, for which Woodbury's identity divides a difference by it.
    """
    solve = _refined_solve(curvature.gram, damping)
    check_like(b, jax.eval_shape(curvature.pull, curvature.gradient), "b", "params")

    def pull(q: Float[Array, " n"]) -> Params:
        return cast_like(curvature.pull(q), b)

    def matvec(v: Params) -> Params:
        return add_scaled(pull(curvature.push(v)), damping, v)

    # b = c g + remainder, with g = U q. A remainder that is nothing but rounding is left out: the
    # division by damping would magnify it.
    gradient = pull(curvature.gradient)
    square = inner_product(gradient, gradient)
    c = safe_divide(inner_product(gradient, b), square)
    remainder = add_scaled(b, -c, gradient)
    negligible = norm(remainder) <= 64 * jnp.finfo(square.dtype).eps * norm(b)

    def divided(x: Array) -> Array:
        return jnp.where(negligible, 0, x / damping).astype(x.dtype)

    remainder = jax.tree.map(divided, remainder)

    # (U U' + damping I)^-1 U q = U (U'U + damping I)^-1 q, and by Woodbury for the remainder
    # v / damping - U (U'U + damping I)^-1 U'v / damping: two right-hand sides of one system
    right = jnp.stack([curvature.gradient, curvature.push(remainder)], axis=1)
    solved = solve(right)
    x = add_scaled(remainder, 1, pull(c * solved[:, 0] - solved[:, 1]))
    return x, matvec


def _by_matrix(
    curvature: Dense,
    damping: Any,
    b: Params,
) -> tuple[Params, Matvec]:
    """Solve with the whole matrix; return x and the product with the damped matrix."""
    flat, to_tree = as_vector(b)
    matrix = at_least_float32(curvature.matrix)
    if matrix.shape != (flat.size, flat.size):
        raise ValueError(f"the matrix is {list(matrix.shape)}, b has {flat.size} entries in all.")

    def matvec(v: Params) -> Params:
        flat_v, _ = as_vector(v)
        product = jnp.matmul(matrix, flat_v, precision=lax.Precision.HIGHEST)
        return to_tree((product + damping * flat_v).astype(flat.dtype))

    x = _refined_solve(matrix, damping)(flat.astype(matrix.dtype))
    return to_tree(x.astype(flat.dtype)), matvec


def _trace(matrix: Float[Array, "n n"]) -> Scalar:
    """Sum the diagonal, and read nothing else."""
    # For `jnp.trace` XLA would form the whole Gram matrix again.
    return jnp.sum(jnp.diagonal(matrix))


def _refined_solve(
    matrix: Float[Array, "n n"],
    damping: Any,
) -> Callable[[Array], Array]:
    """Return `v -> (M + damping I)^-1 v` for a vector or columns, with one step of refinement."""
    # The factor is that of at least the damping that can be told from rounding in the trace; the
    # refinement is of the system as it was asked.
    damping = jnp.asarray(damping, matrix.dtype)
    least = jnp.finfo(matrix.dtype).eps * _trace(matrix)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    factored = matrix + jnp.maximum(damping, least) * identity
    lower = lax.linalg.cholesky(factored, symmetrize_input=False)

    def refined(v: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        x = jax.scipy.linalg.cho_solve((lower, True), v)
        product = jnp.matmul(matrix, x, precision=lax.Precision.HIGHEST)
        residual = v - damping * x - product
        return x + jax.scipy.linalg.cho_solve((lower, True), residual)

    return refined
