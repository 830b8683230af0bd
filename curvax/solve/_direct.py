"""Direct solves: by a matrix over parameters, or by the Gram matrix of its factor's rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax
from jaxtyping import Array, Bool, Float

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
from curvax._xla import one_after_another, refresh_if
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
    center: Params | None = None,
    pseudo_inverse: bool = False,
) -> tuple[Params, SolveInfo]:
    """Solve `(F + damping I) x = b` by Cholesky, for positive semidefinite F.

    In sample space `x = (b - U (U'U + damping I)^-1 U'b) / damping`. One step of iterative
    refinement recovers the accuracy that rounding takes at small damping.

    With a center y, x minimizes `x'F x / 2 - b'x + damping |x - y|^2 / 2`, so that
    `(F + damping I) x = b + damping y`. It is computed as `y + (F + damping I)^-1 (b - F y)`, where
    F y is in the range of U as the gradient is: nothing is divided by damping.

    Args:
      curvature: what `curvax.solve.sample_space(objective, params, batch)` returns, or
        `Dense(curvax.to_dense(matvec, params))`.
      b: a tree like params.
      damping: a positive number (with `Dense` it may be 0), in units of an eigenvalue of F.
      tol: the relative residual above which the code is STALLED.
      center: y, a tree like b; None stands for zeros.
      pseudo_inverse: where Cholesky fails, take the pseudo-inverse, in which each eigenvalue l of
        the damped matrix becomes `1 / l / (1 + (cut / l)^6)`, with cut n times the precision of
        the largest, and 0 where l is not positive.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`. Where `F + damping I` is not finite, x is 0
      and the code NOT_FINITE. Where it is not positive definite the code is NOT_DEFINITE and x is
      0; with `pseudo_inverse` the code is PSEUDO_INVERSE.

    Raises:
      ValueError: damping is not positive, or b has another size.
      TypeError: curvature is neither a `SampleSpace` nor a `Dense`.

    Cost: `n^3 / 3` multiplications and five products with U or U'; with `Dense` `d^3 / 3`. A
      pseudo-inverse takes about 10 times as many, only where it is needed.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> dense = curvax.solve.Dense(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> x, info = curvax.solve.direct(dense, jnp.array([3.0, 0.0]), damping=0)
      >>> [round(v, 4) for v in x.tolist()], bool(info.converged)
      ([2.0, -1.0], True)

    References: the filter of the pseudo-inverse is that of NetKet's `pinv_smooth`, read in its
      source.
    """
    check_damping(damping, allow_zero=isinstance(curvature, Dense))
    check_system(b, damping, tol, 1, None)
    if not isinstance(curvature, Dense | SampleSpace):
        raise TypeError(
            "direct takes the result of curvax.solve.sample_space, or curvax.solve.Dense(matrix); "
            f"got {describe(curvature)}. A matvec is for curvax.cg."
        )
    wide, y = tree_at_least_float32(b), None
    if center is not None:
        check_like(center, b, "center", "b")
        y = cast_like(center, wide)
    # F, or the Gram matrix U'U in its place.
    matrix = at_least_float32(curvature[0])
    solve, is_definite = _refined_solve(matrix, damping, pseudo_inverse)
    if isinstance(curvature, Dense):
        x, matvec = _by_matrix(curvature, solve, damping, wide, y)
    else:
        x, matvec = _by_rows(curvature, solve, damping, wide, y)

    good = all_finite(x)
    finite_system = all_finite((_trace(matrix), b))
    code = code_of(
        (good & is_definite, Result.CONVERGED),
        (good, Result.PSEUDO_INVERSE),
        (finite_system, Result.NOT_DEFINITE),
        otherwise=Result.NOT_FINITE,
    )
    x = jax.tree.map(lambda x: jnp.where(good, x, 0), x)
    right_side = wide if y is None else add_scaled(wide, damping, y)
    x, info = finished(matvec, x, right_side, jnp.int32(0), code, tol)
    return cast_like(x, b), info


def _by_rows(
    curvature: SampleSpace,
    solve: Callable[[Array], Array],
    damping: Any,
    b: Params,
    center: Params | None,
) -> tuple[Params, Matvec]:
    """Solve in sample space; return x and the product with the damped matrix.

    b is split into its part along the batch's gradient, for which no division by damping is needed,
    and the remainder, for which Woodbury's identity divides a difference by it.
    """
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
    along = c * curvature.gradient
    if center is not None:
        # F y = U (U'y)
        along -= curvature.push(center)
    right = jnp.stack([along, curvature.push(remainder)], axis=1)
    solved = solve(right)
    x = add_scaled(remainder, 1, pull(solved[:, 0] - solved[:, 1]))
    return x if center is None else add_scaled(x, 1, center), matvec


def _by_matrix(
    curvature: Dense,
    solve: Callable[[Array], Array],
    damping: Any,
    b: Params,
    center: Params | None,
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

    right = flat.astype(matrix.dtype)
    if center is None:
        return to_tree(solve(right).astype(flat.dtype)), matvec
    y = as_vector(center)[0].astype(matrix.dtype)
    x = y + solve(right - jnp.matmul(matrix, y, precision=lax.Precision.HIGHEST))
    return to_tree(x.astype(flat.dtype)), matvec


def _trace(matrix: Float[Array, "n n"]) -> Scalar:
    """Sum the diagonal, and read nothing else."""
    # For `jnp.trace` XLA would form the whole Gram matrix again.
    return jnp.sum(jnp.diagonal(matrix))


def _refined_solve(
    matrix: Float[Array, "n n"],
    damping: Any,
    pseudo_inverse: bool,
) -> tuple[Callable[[Array], Array], Bool[Array, ""]]:
    """Return `v -> (M + damping I)^-1 v` for a vector or columns, and whether Cholesky went well.

    There is one step of refinement. Where Cholesky fails the solution is NaN, or by the
    pseudo-inverse.
    """
    # The factor is that of at least the damping that can be told from rounding in the trace; the
    # refinement is of the system as it was asked.
    damping = jnp.asarray(damping, matrix.dtype)
    least = jnp.finfo(matrix.dtype).eps * _trace(matrix)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    factored = matrix + jnp.maximum(damping, least) * identity
    lower = lax.linalg.cholesky(factored, symmetrize_input=False)
    # Cholesky says by NaN that a matrix is not positive definite.
    is_definite = jnp.all(jnp.isfinite(jnp.diagonal(lower)))

    def refined(lower: Array, factored: Array, v: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        x = jax.scipy.linalg.cho_solve((lower, True), v)
        product = jnp.matmul(matrix, x, precision=lax.Precision.HIGHEST)
        residual = v - damping * x - product
        return x + jax.scipy.linalg.cho_solve((lower, True), residual)

    def solve(v: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        if not pseudo_inverse:
            return refined(lower, factored, v)
        return refresh_if(~is_definite, _by_pseudo_inverse, refined, lower, factored, v)

    return solve, is_definite


def _by_pseudo_inverse(
    lower: Float[Array, "n n"],
    factored: Float[Array, "n n"],
    v: Float[Array, "n ..."],
) -> Float[Array, "n ..."]:
    """Return the smooth pseudo-inverse of a symmetric matrix times a vector or columns."""
    del lower
    symmetric = (factored + factored.T) / 2
    values, vectors = _eigh(symmetric)
    cut = len(values) * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    # 1 / l / (1 + (cut / l)^6) goes to 0 with l, without a step at the cut. At l = 0 it is 0.
    positive = jnp.where(values > 0, values, 1)
    inverse = jnp.where(values > 0, 1 / positive / (1 + (cut / positive) ** 6), 0)
    dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return dot(vectors * inverse, dot(vectors.T, v))


@one_after_another
def _eigh(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Return eigenvalues and eigenvectors of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors
