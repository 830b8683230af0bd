"""The norm of the gradient as a penalty, with finite differences for its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._checks import (
    check_at_least,
    check_params,
    check_positive,
    check_scalar,
    describe,
    look_up,
)
from curvax._trees import add_scaled, cast_like, inner_product, safe_divide
from curvax._types import Params, Scalar, tree_at_least_float32
from curvax.apps.penalties._in_chunks import mean_loss
from curvax.objective import Objective

# L: the loss, g: its gradient at params w, rho: the length of a difference in units of g

DIFFERENCES = {"forward": (0, 1), "backward": (-1, 0), "centred": (-1, 1)}
"""Where the gradients of a difference are taken, in units of rho g from w."""


def gradient_norm(
    objective: Callable[..., Any],
    gamma: Any,
    eps: Any,
    *,
    difference: str = "forward",
    normalized: bool = False,
    microbatch: int | None = None,
) -> Callable[..., Any]:
    """Add the squared norm of the gradient to a loss, `L + gamma/2 |g|^2`, for flat minima.

    The result is a function like the objective. Its value is exact. Its gradient
    `g + gamma H g` has a finite difference of gradients in place of the product `H g`, so that no
    second derivatives are needed:

        forward:   g + gamma/rho (grad L(w + rho g) - g)
        backward:  g + gamma/rho (g - grad L(w - rho g))
        centred:   g + gamma/(2 rho) (grad L(w + rho g) - grad L(w - rho g))

    with `rho = eps`, or `eps / |g|` where normalized. All are exact where L is quadratic. Elsewhere
    the first two are wrong by O(rho) and the centred one by O(rho^2). With `gamma = rho` the
    forward one is `grad L(w + rho g)`, the gradient of sharpness-aware minimization.

    Args:
      objective: a `curvax.Objective`, or any function `(params, *args) -> scalar`.
      gamma: the weight of the penalty, at least 0; may be traced.
      eps: the length of the step between the gradients, positive; may be traced. In units of g, or
        with `normalized` in units of params, where 0.01 to 0.1 is usual.
      difference: "forward" (a step up along the gradient), "backward" or "centred".
      normalized: whether the step has the length eps, whatever the length of the gradient. Where
        that is 0 there is no step, and the gradient is 0.
      microbatch: rows worked on at a time, for an Objective without aux; the same result in bounded
        memory.

    Returns:
      `regularized(params, *args) -> scalar`, or `(scalar, aux)` for an Objective with aux, whose
      aux is that of w and has no derivative. Take `jax.value_and_grad` of it, in params, in what is
      float among the args, or both. It has first derivatives in reverse mode only: curvature is
      that of the objective itself.

    Raises:
      ValueError: gamma is negative, eps is not positive, or the difference is unknown.
      TypeError: params are not float or the objective is not scalar; `microbatch` comes with a
        function or with aux; a derivative in forward mode is asked for.

    Cost: one gradient more than that of the objective, two where centred. 16-bit params are widened
      to float32 for all of them, since they could not hold the difference.

    Example: L = w^3 has `g + gamma H g = 3 w^2 + 18 gamma w^3`.
      >>> import jax, jax.numpy as jnp, curvax
      >>> cubic = lambda w: w**3
      >>> regularized = curvax.apps.penalties.gradient_norm(cubic, 0.5, 0.01, difference="centred")
      >>> value, gradient = jax.value_and_grad(regularized)(1.0)
      >>> round(value.item(), 4), round(gradient.item(), 4)
      (3.25, 12.0)

    References: Karakida et al. (2023), Understanding gradient regularization in deep learning:
      efficient finite-difference computation and implicit bias, https://arxiv.org/abs/2210.02720,
      which finds forward differences with a rather large eps best; Foret et al. (2021),
      Sharpness-aware minimization, https://arxiv.org/abs/2010.01412. Both are from memory, not
      read again; the identities are derived, and tested.

    Deviates: the centred difference and the derivative in the args are ours.
    """
    points = look_up("difference", difference, DIFFERENCES)
    check_at_least(0, gamma=gamma)
    check_positive(eps=eps)
    loss, has_aux = _loss_with_aux(objective, microbatch)
    evaluated = _with_cotangents(loss, points, normalized)

    def regularized(params: Params, *args: Any) -> Any:
        """Return the loss and its penalty, and aux if there is any."""
        params = jax.tree.map(jnp.asarray, params)
        check_params(params)
        value, aux = evaluated(jnp.asarray(gamma), jnp.asarray(eps), params, args)
        return (value, aux) if has_aux else value

    return regularized


def _loss_with_aux(
    objective: Callable[..., Any], microbatch: int | None
) -> tuple[Callable[..., tuple[Scalar, Any]], bool]:
    """Return `(params, *args) -> (loss, aux)`, and whether there is any aux; else it is None."""
    has_aux = isinstance(objective, Objective) and objective.has_aux
    function: Callable[..., Any] = objective
    if microbatch is not None:
        if not isinstance(objective, Objective) or has_aux:
            raise TypeError(
                "microbatch needs the objective to be a curvax.Objective without aux, got "
                f"{describe(objective)}{' with aux' if has_aux else ''}: only that says how many "
                "terms the mean of a chunk is over. Wrap model and loss, or leave microbatch out."
            )
        function = mean_loss(objective, microbatch)

    def loss(params: Params, *args: Any) -> tuple[Scalar, Any]:
        result = function(params, *args)
        value, aux = result if has_aux else (result, None)
        return check_scalar(value, "the objective"), aux

    return loss, has_aux


class _Gradient(NamedTuple):
    """What the loss is, and its derivatives in params and in the floats among the args."""

    value: Scalar
    aux: Any
    of_params: Params
    of_floats: list[Array]


def _with_cotangents(
    loss: Callable[..., tuple[Scalar, Any]], points: tuple[int, int], normalized: bool
) -> Callable[..., tuple[Scalar, Any]]:
    """Return `(gamma, eps, params, args) -> (value, aux)` with the finite difference's gradient."""

    def gradient_at(params: Params, args: tuple[Any, ...]) -> _Gradient:
        floats, with_floats = _floats_of(args)

        def of_floats(p: Params, x: list[Array]) -> tuple[Scalar, Any]:
            return loss(p, *with_floats(x))

        gradient = jax.value_and_grad(of_floats, argnums=(0, 1), has_aux=True)
        (value, aux), (by_params, by_floats) = gradient(params, floats)
        return _Gradient(value, aux, by_params, by_floats)

    def value_of(gamma: Array, here: _Gradient) -> Scalar:
        # L + gamma/2 |g|^2
        return here.value + gamma / 2 * inner_product(here.of_params, here.of_params)

    # All that may be traced or mapped is an argument, gamma and eps too.
    @jax.custom_vjp
    def evaluated(
        gamma: Array, eps: Array, params: Params, args: tuple[Any, ...]
    ) -> tuple[Scalar, Any]:
        here = gradient_at(tree_at_least_float32(params), args)
        return value_of(gamma, here), here.aux

    def forward(
        gamma: Array, eps: Array, params: Params, args: tuple[Any, ...]
    ) -> tuple[tuple[Scalar, Any], Any]:
        """Return value and aux, and beside them the derivatives in all arguments."""
        wide = tree_at_least_float32(params)
        here = gradient_at(wide, args)
        g = here.of_params
        square = inner_product(g, g)

        # Both steps are steps times g; 1 / rho is |g| / eps, where g = 0 that is 0.
        length = jnp.sqrt(square)
        rho = safe_divide(eps, length) if normalized else eps
        inverse = length / eps if normalized else 1 / eps

        def at(point: int) -> _Gradient:
            return here if point == 0 else gradient_at(add_scaled(wide, point * rho, g), args)

        low, high = (at(point) for point in points)
        scale = gamma * inverse / (points[1] - points[0])

        # The same difference, of derivatives in the args, is that of gamma/2 |g|^2 in them.
        def regularized(x: Array, y_low: Array, y_high: Array) -> Array:
            return x + scale * (y_high - y_low)

        by_params = jax.tree.map(regularized, g, low.of_params, high.of_params)
        by_floats = jax.tree.map(regularized, here.of_floats, low.of_floats, high.of_floats)
        floats, with_floats = _floats_of(args)
        by_args = with_floats(cast_like(by_floats, floats), otherwise=None)
        derivatives = cast_like(square / 2, gamma), cast_like(by_params, params), by_args
        return (value_of(gamma, here), here.aux), derivatives

    def backward(derivatives: Any, cotangents: tuple[Scalar, Any]) -> tuple[Any, ...]:
        cotangent, _ = cotangents  # aux has no derivative

        def times(x: Array) -> Array:
            return (cotangent * x).astype(x.dtype)

        by_gamma, by_params, by_args = jax.tree.map(times, derivatives)
        # The value does not depend on eps, nor on what is no float: None stands for zero.
        return by_gamma, None, by_params, by_args

    evaluated.defvjp(forward, backward)
    return evaluated


def _floats_of(args: PyTree) -> tuple[list[Array], Callable[..., Any]]:
    """Return the float leaves of a tree, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(args)
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]
    floats = [x for x, chosen in zip(leaves, is_float, strict=True) if chosen]

    def with_floats(replacements: list[Array], **otherwise: None) -> PyTree:
        """Return the tree with these floats; what is no float stays, or is `otherwise`."""
        remaining = iter(replacements)
        ordered = []
        for x, chosen in zip(leaves, is_float, strict=True):
            ordered.append(next(remaining) if chosen else otherwise.get("otherwise", x))
        return jax.tree.unflatten(structure, ordered)

    return floats, with_floats
