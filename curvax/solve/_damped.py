"""What all iterative solves share: the damped matrix in wide precision, checks, and the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from curvax._checks import check_count, check_damping, check_like, check_params, describe
from curvax._trees import add_scaled, all_finite, cast_like, inner_product, norm
from curvax._types import Matvec, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax.estimate._hutchinson import normal
from curvax.solve._result import Result, SolveInfo, code_of


def damped(
    matvec: Matvec,
    damping: Any,
    like: Params,
    name: str = "matvec",
) -> Matvec:
    """Return `v -> (A + damping I) v` on trees in at least float32.

    The matvec itself gets vectors in the dtypes of `like`.
    """

    def apply(v: Params) -> Params:
        product = checked(matvec, cast_like(v, like), name)
        return add_scaled(tree_at_least_float32(product), damping, v)

    return apply


def damped_preconditioner(preconditioner: Matvec | None, like: Params) -> Matvec:
    """Return `v -> M v` on trees in at least float32; with None, M is the identity."""
    if preconditioner is None:
        return lambda v: v
    return damped(preconditioner, 0.0, like, "preconditioner")


def checked(
    matvec: Matvec,
    v: Params,
    name: str = "matvec",
) -> Params:
    """Return `matvec(v)`, or raise unless it has the structure, shapes and dtypes of v."""
    product = matvec(v)
    check_like(product, v, f"{name}(v)", "v")
    leaves = zip(jax.tree.leaves_with_path(v), jax.tree.leaves(product), strict=True)
    for (path, x), y in leaves:
        if jnp.result_type(y) != x.dtype:
            where = f"{name}(v){jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{where} is {describe(y)} where v is {describe(x)}: a matrix on trees must keep "
                "the dtypes of its vector. Cast its result, or the arrays that it closes over."
            )
    return product


def check_system(
    b: Params,
    damping: Any,
    tol: Any,
    max_steps: int,
    x0: Params | None,
) -> None:
    """Check the arguments that all solves have."""
    check_params(b)
    check_damping(damping, allow_zero=True)
    check_count(1, max_steps=max_steps)
    if isinstance(tol, int | float | np.number) and not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}.")
    if x0 is not None:
        check_like(x0, b, "x0", "b")


def largest_residual(tol: Any, norm_of_b: Scalar) -> Scalar:
    """Return the norm of the residual at which an iteration ends: half of `tol |b|`.

    The other half is for rounding: the residual that is reported is computed from x.
    """
    return 0.5 * jnp.asarray(tol) * norm_of_b


def finished(
    apply: Matvec,
    x: Params,
    b: Params,
    steps: Int[Array, ""],
    code: Int[Array, ""],
    tol: Any,
    direction: Any = None,
    norm_of: Callable[[Params], Scalar] = norm,
) -> tuple[Params, SolveInfo]:
    """Return x in the dtypes of b and its `SolveInfo`; one product is for the residual.

    CONVERGED becomes STALLED where the residual is above tol, in the norm of the iteration.
    """
    wide = tree_at_least_float32(b)
    x = cast_like(x, b)
    r = add_scaled(wide, -1, apply(tree_at_least_float32(x)))
    # |b - (A + damping I) x| / |b|; where b = 0, x is 0 or the guess, and |r| itself is told
    residual = _relative(norm(r), norm(wide))
    measured = _relative(norm_of(r), norm_of(wide))
    failed = (code == Result.CONVERGED) & ~(measured <= tol)
    code = code_of(
        (failed & jnp.isfinite(residual), Result.STALLED),
        (failed, Result.NOT_FINITE),
        otherwise=code,
    )
    return x, SolveInfo(residual, steps, code, direction)


def check_symmetric(
    matvec: Matvec, params: Params, key: PRNGKey, rtol: float | None = None
) -> None:
    """Raise unless `u'(A v) = v'(A u)` for two random vectors.

    Solves and spectra take symmetric matrices only.

    Args:
      matvec: `v -> A v` on trees like params.
      params: a pytree that gives shapes and dtypes.
      key: the JAX key of the two vectors.
      rtol: the difference that is allowed, in units of `|u| |A v| + |v| |A u|`. None stands for the
        square root of the floats' epsilon.

    Raises:
      ValueError: the matrix is not symmetric, or a product is not finite.

    Cost: two products. It is not for use inside `jit`.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> rotate = lambda v: jnp.array([[0.0, 1.0], [-1.0, 0.0]]) @ v
      >>> curvax.solve.check_symmetric(rotate, jnp.zeros(2), jax.random.key(0))
      Traceback (most recent call last):
      ...
      ValueError: the matrix is not symmetric: ...
    """
    check_params(params)
    u = tree_at_least_float32(normal(jax.random.fold_in(key, 0), params))
    v = tree_at_least_float32(normal(jax.random.fold_in(key, 1), params))
    apply = damped(matvec, 0.0, params)
    Au, Av = apply(u), apply(v)
    if not bool(all_finite((Au, Av))):
        raise ValueError("the matrix-vector product is not finite for two random vectors.")

    vAu, uAv = inner_product(v, Au), inner_product(u, Av)
    allowed = jnp.sqrt(jnp.finfo(vAu.dtype).eps) if rtol is None else rtol
    # By Cauchy and Schwarz neither product is above its term here; rounding is relative to it.
    scale = norm(u) * norm(Av) + norm(v) * norm(Au)
    if not bool(abs(vAu - uAv) <= allowed * scale):
        raise ValueError(
            f"the matrix is not symmetric: v'(A u) = {vAu:.6g}, u'(A v) = {uAv:.6g} for two random "
            "vectors. Solves and spectra are for symmetric matrices; J'J of a Jacobian J is one."
        )


def _relative(residual: Scalar, size: Scalar) -> Scalar:
    """Return `residual / size`, and the residual itself where size is 0."""
    return residual / jnp.where(size > 0, size, 1)
