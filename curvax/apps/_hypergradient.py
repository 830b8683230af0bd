"""Hypergradients: how the loss on held-out data changes with hyperparameters of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._checks import check_floats, check_function, check_params, check_scalar
from curvax._types import Params, Scalar, at_least_float32
from curvax.products import hvp
from curvax.solve import SolveInfo, Solver, cg

Hyper: TypeAlias = PyTree[Float[Array, "..."]]
"""Hyperparameters that a loss is differentiable in: log-penalties, weights of examples or tasks, data augmentation."""

# H: Hessian of inner in params; v: gradient of outer in params


def implicit_gradient(
    outer: Callable[[Params, Hyper], Scalar],
    inner: Callable[[Params, Hyper], Scalar],
    params: Params,
    hyper: Hyper,
    *,
    solver: Solver = cg,
    damping: Any = 0.0,
    matvec: Any = None,
) -> tuple[Hyper, SolveInfo]:
    """Differentiate `outer(p(h), h)` in h, where `p(h)` minimizes `inner(p, h)`, by the implicit function theorem.

    `d outer / d h = d_h outer - (d_h d_p inner)' x` with `(H + damping I) x = d_p outer` and `H = d_p^2 inner`. Nothing of
    the training is stored or run again.

    The result is the derivative if params are at the minimum. Anywhere else it is that for the loss `inner - g . p`, g the
    gradient of inner at params held constant, which has its stationary point there; so it is wrong by an amount that falls
    with |g|, which nothing here tells: look at `jax.grad(inner)(params, hyper)`.

    Args:
      outer: `(params, hyper) -> scalar`, such as the loss on validation data.
      inner: `(params, hyper) -> scalar`, what params were trained with, penalties included, on all of its data.
      params: pytree of float arrays that minimize `inner(params, hyper)`.
      hyper: pytree of floats.
      solver: `(matvec, b, *, damping) -> (x, SolveInfo)`: `curvax.cg` where inner curves upwards, `curvax.solve.minres` also
        where it does not, `functools.partial(curvax.solve.neumann, scale=1 / learning_rate, max_steps=20, tol=0)` for little
        time; with an inverse of your own `lambda matvec, b, *, damping: (inverse(b), None)`.
      damping: at least 0; in units of an eigenvalue of H. Positive where H is singular: where inner is flat in some
        directions, or has been trained down to next to nothing.
      matvec: in place of H; what the solver takes, e.g. a Gauss-Newton product with the penalty's curvature added, or
        `curvax.solve.Dense(matrix)` for `curvax.solve.direct`.

    Returns:
      the gradient, a tree like hyper, and what the solver tells. Unless `info.converged` (print `info.message`), the
      gradient is that of the solve as far as it came.

    Raises:
      ValueError, TypeError: at trace time; params or hyper that are not float (by path), outer or inner not scalar, a
        solver that is no function; what the solver raises.

    Cost: a gradient of outer, the solver's products, and one product of the second derivatives in params and hyper. Memory:
      that of the solver.

    Example: `p(h) = 1 / (1 + e^h)`, and `d outer / d h = (p - 2) p'(h) = 3/8` at h = 0.
      >>> import jax.numpy as jnp
      >>> from curvax.apps._hypergradient import implicit_gradient
      >>> inner = lambda p, h: (p - 1) ** 2 / 2 + jnp.exp(h) * p**2 / 2
      >>> gradient, info = implicit_gradient(lambda p, h: (p - 2) ** 2 / 2, inner, jnp.array(0.5), 0.0)
      >>> gradient.item(), info.message
      (0.375, 'converged to the tolerance.')

    References: Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit differentiation,
      algorithms 2 and 3.
    """
    check_params(params)
    hyper = jax.tree.map(jnp.asarray, hyper)
    check_floats(hyper, "hyper", "Close over what is not differentiated.")
    check_function(
        "solver",
        solver,
        "(matvec, b, *, damping) -> (x, info)",
        "curvax.cg, curvax.solve.minres or curvax.solve.neumann",
    )
    outer_value = lambda p, h: check_scalar(outer(p, h), "outer")
    inner_value = lambda p, h: check_scalar(inner(p, h), "inner")
    v, direct = jax.grad(outer_value, argnums=(0, 1))(params, hyper)
    curvature = hvp(inner_value, params, hyper) if matvec is None else matvec
    x, info = solver(curvature, v, damping=damping)
    _, mixed = jax.vjp(lambda h: jax.grad(inner_value)(params, h), hyper)
    (implicit,) = mixed(x)
    difference = lambda a, b: (at_least_float32(a) - at_least_float32(b)).astype(a.dtype)
    return jax.tree.map(difference, direct, implicit), info
