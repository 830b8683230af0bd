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
from curvax.solve import cg

Hyper: TypeAlias = PyTree[Float[Array, "..."]]
"""Hyperparameters in which a loss is differentiable, such as log-penalties."""

# H: Hessian of inner in params, v: gradient of outer in params, x: (H + damping I)^-1 v


def implicit_gradient(
    outer: Callable[[Params, Hyper], Scalar],
    inner: Callable[[Params, Hyper], Scalar],
    params: Params,
    hyper: Hyper,
    *,
    solver: Callable[..., tuple[Params, Any]] = cg,
    damping: Any = 0.0,
    matvec: Any = None,
) -> tuple[Hyper, Any]:
    """Differentiate `outer(p(h), h)` in h by the implicit function theorem.

    Here `p(h)` minimizes `inner(p, h)`, and with `H = d_p^2 inner`

        d outer / d h = d_h outer - (d_h d_p inner)' x,    (H + damping I) x = d_p outer.

    No part of the training is stored or run again.

    The result is the derivative if params are at the minimum. Anywhere else it is the derivative
    for the loss `inner - g . p`, where g is the gradient of inner at params, held constant: that
    loss has its stationary point there. The error then falls with |g|. No check tells you this:
    look at `jax.grad(inner)(params, hyper)`.

    Args:
      outer: the function `(params, hyper) -> scalar` to differentiate, such as a validation loss.
      inner: the function `(params, hyper) -> scalar` that params were trained with, on all of its
        data and with its penalties.
      params: the pytree of float arrays that minimizes `inner(params, hyper)`.
      hyper: a pytree of floats.
      solver: a function `(matvec, b, *, damping) -> (x, SolveInfo)`. Use `curvax.cg` where inner
        curves upwards and `curvax.solve.minres` also where it does not; a cheap one is
        `functools.partial(curvax.solve.neumann, scale=1 / learning_rate, max_steps=20, tol=0)`. An
        inverse of your own goes in as `lambda matvec, b, *, damping: (inverse(b), None)`. Over
        the steps of an outer problem, or for many inner ones of which some are sampled in each
        step, `functools.partial(curvax.solve.tracked, state=state)` goes on from the solution of
        the last step; what it tells is the new state (`curvax.solve.tracked` has the example).
      damping: a number that is at least 0, in units of an eigenvalue of H. It must be positive
        where H is singular: where inner is flat in some directions, or was trained down to almost
        nothing.
      matvec: the curvature that takes the place of H, in the form that the solver expects, e.g. a
        Gauss-Newton product with the curvature of the penalty added, or
        `curvax.solve.Dense(matrix)` for `curvax.solve.direct`.

    Returns:
      The gradient, a tree like hyper, and what the solver tells, a `SolveInfo` as a rule. Unless
      `info.converged` is true (print `info.message`), the gradient belongs to the last iterate of
      the solve.

    Raises:
      TypeError: params or hyper hold leaves that are not float (named by path), outer or inner is
        not scalar, or the solver is not a function. All are found at trace time.
      ValueError: the solver raises it, e.g. for negative damping.

    Cost: a gradient of outer, the solver's products, and one product with the second derivatives in
      params and hyper. Memory: that of the solver.

    Example: `p(h) = 1 / (1 + e^h)`, and `d outer / d h = (p - 2) p'(h) = 3/8` at h = 0.
      >>> import jax.numpy as jnp, curvax
      >>> inner = lambda p, h: (p - 1) ** 2 / 2 + jnp.exp(h) * p**2 / 2
      >>> outer = lambda p, h: (p - 2) ** 2 / 2
      >>> gradient, info = curvax.apps.implicit_gradient(outer, inner, jnp.array(0.5), 0.0)
      >>> gradient.item(), info.message
      (0.375, 'converged to the tolerance.')

    References: Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by
      implicit differentiation, https://arxiv.org/abs/1911.02590, algorithms 2 and 3.
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

    def outer_value(p: Params, h: Hyper) -> Scalar:
        return check_scalar(outer(p, h), "outer")

    def inner_value(p: Params, h: Hyper) -> Scalar:
        return check_scalar(inner(p, h), "inner")

    def inner_gradient(h: Hyper) -> Params:
        return jax.grad(inner_value)(params, h)

    def difference(a: Array, b: Array) -> Array:
        return (at_least_float32(a) - at_least_float32(b)).astype(a.dtype)

    # Lorraine et al. (2020), algorithm 2. Both parts of the gradient of outer: v = d_p outer, d_h
    # outer.
    v, direct = jax.grad(outer_value, argnums=(0, 1))(params, hyper)
    # (H + damping I) x = v: the paper's algorithm 3 is the solver `curvax.solve.neumann`.
    curvature = hvp(inner_value, params, hyper) if matvec is None else matvec
    x, info = solver(curvature, v, damping=damping)
    # The mixed second derivatives enter as one product, (d_h d_p inner)' x.
    _, mixed_product = jax.vjp(inner_gradient, hyper)
    (implicit,) = mixed_product(x)
    return jax.tree.map(difference, direct, implicit), info
