"""What all iterative solves share: the damped matrix in wide precision, its check, and the account at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from curvax._checks import check_count, check_damping, check_like, check_params, describe
from curvax._trees import add_scaled, all_finite, inner_product, norm
from curvax._types import Matvec, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax.estimate._hutchinson import normal
from curvax.solve._result import Result, SolveInfo, code_of


def damped(matvec: Matvec, damping: Any, like: Params, name: str = "matvec") -> Matvec:
    """Return `v -> (A + damping I) v` on trees in at least float32; `matvec` itself gets the dtypes of `like`."""

    def apply(v: Params) -> Params:
        own = jax.tree.map(lambda x, p: x.astype(p.dtype), v, like)
        return add_scaled(tree_at_least_float32(checked(matvec, own, name)), damping, v)

    return apply


def checked(matvec: Matvec, v: Params, name: str = "matvec") -> Params:
    """Return `matvec(v)`, or raise unless it has the structure, shapes and dtypes of v."""
    product = matvec(v)
    check_like(product, v, f"{name}(v)", "v")
    for (path, x), y in zip(jax.tree.leaves_with_path(v), jax.tree.leaves(product), strict=True):
        if jnp.result_type(y) != x.dtype:
            raise TypeError(
                f"{name}(v){jax.tree_util.keystr(path)} is {describe(y)} where v is {describe(x)}: a matrix on trees "
                "returns what it is given. Cast its result, or what it closes over."
            )
    return product


def check_system(b: Params, damping: Any, tol: Any, max_steps: int, x0: Params | None) -> None:
    """Check what all solves are given."""
    check_params(b)
    check_damping(damping, allow_zero=True)
    check_count(1, max_steps=max_steps)
    if isinstance(tol, int | float | np.number) and not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}.")
    if x0 is not None:
        check_like(x0, b, "x0", "b")


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
    """Return x in the dtypes of b, and what can be said of it; one product for the residual.

    CONVERGED becomes STALLED where the residual is above tol, in the norm that the iteration went by.
    """
    wide = tree_at_least_float32(b)
    own = jax.tree.map(lambda x, p: x.astype(p.dtype), x, b)
    left = add_scaled(wide, -1, apply(tree_at_least_float32(own)))
    relative = lambda norm_of: (
        norm_of(left) / jnp.where(norm_of(wide) > 0, norm_of(wide), 1)
    )  # b = 0: x is 0 or the guess
    residual = relative(norm)
    lost = (code == Result.CONVERGED) & ~(relative(norm_of) <= tol)
    code = code_of(
        (lost & jnp.isfinite(residual), Result.STALLED), (lost, Result.NOT_FINITE), otherwise=code
    )
    return own, SolveInfo(residual, steps, code, direction)


def check_symmetric(
    matvec: Matvec, params: Params, key: PRNGKey, rtol: float | None = None
) -> None:
    """Raise unless `u'(A v) = v'(A u)` for two random vectors: solves and spectra take symmetric matrices only.

    Args:
      matvec: `v -> A v` on trees like params.
      params: pytree that gives shapes and dtypes.
      key: JAX key of the two vectors.
      rtol: difference that is allowed, in units of `|u| |A v| + |v| |A u|`; None: the square root of the floats' epsilon.

    Raises:
      ValueError: it is not symmetric, or not finite.

    Cost: two products. Not for use inside `jit`.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> rotate = lambda v: jnp.array([[0.0, 1.0], [-1.0, 0.0]]) @ v
      >>> curvax.solve.check_symmetric(rotate, jnp.zeros(2), jax.random.key(0))
      Traceback (most recent call last):
      ...
      ValueError: the matrix is not symmetric: ...
    """
    check_params(params)
    u, v = (tree_at_least_float32(normal(jax.random.fold_in(key, i), params)) for i in (0, 1))
    product = damped(matvec, 0.0, params)
    of_u, of_v = product(u), product(v)
    one, other = inner_product(v, of_u), inner_product(u, of_v)
    allowed = jnp.sqrt(jnp.finfo(one.dtype).eps) if rtol is None else rtol
    size = norm(u) * norm(of_v) + norm(v) * norm(of_u)
    if not bool(all_finite((of_u, of_v))):
        raise ValueError("the matrix-vector product is not finite for two random vectors.")
    if not bool(abs(one - other) <= allowed * size):
        raise ValueError(
            f"the matrix is not symmetric: v'(A u) = {one:.6g}, u'(A v) = {other:.6g} for two random vectors. "
            "Solves and spectra here are for symmetric matrices; J'J of a Jacobian J is one."
        )
