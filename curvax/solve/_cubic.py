"""The minimum of a quadratic model with a cubic term, by one scalar equation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from curvax._checks import check_at_least, check_params, check_precision
from curvax._trees import power_of_two, safe_divide
from curvax._types import Params, Scalar
from curvax.solve._eigen import EigenDecomposition, eigen_coordinates

# lambda: eigenvalues of A, ascending; c: coordinates of the gradient along its eigenvectors;
# M: regularization; r = |s|; sigma = M r / 2, the shift of the eigenvalues, is pole + delta with
# pole = max(0, -lambda_min); gaps = lambda + pole, so that lambda + sigma = gaps + delta

MAX_STEPS = 100  # of Newton's method on the scalar equation, which takes 3 to 10 as a rule


class CubicInfo(NamedTuple):
    """What `cubic_step` tells about its step s.

    Attributes:
      length: `r = |s|`.
      decrease: what the model falls by, `m(0) - m(s) = s'(A + M r / 2 I) s / 2 + M r^3 / 12`.
      residual: `|g + (A + M r / 2 I) s|`, in the unit of the gradient.
      steps: Newton steps on the scalar equation.
      is_hard: whether the equation has no root (the hard case), so that s goes along the lowest
        eigenvector as far as its length asks for.
    """

    length: Scalar
    decrease: Scalar
    residual: Scalar
    steps: Int[Array, ""]
    is_hard: Bool[Array, ""]


def cubic_step(
    eigen: EigenDecomposition, gradient: Params, *, regularization: Any
) -> tuple[Params, CubicInfo]:
    """Minimize `m(s) = g's + s'A s / 2 + M / 6 |s|^3` over all s, whatever A is.

    With `r = |s|` a global minimum is where

        (A + M r / 2 I) s = -g     and     A + M r / 2 I is positive semidefinite,

    so that `|(A + M r / 2 I)^-1 g| = r`, one equation in r. Newton's method solves it as `1 / |s| =
    1 / r`, both sides of which are concave in r: from below the root it rises to it. In the hard
    case (g has no part along the lowest eigenvector, and the lowest eigenvalue is so negative that
    the equation has no root) r is `-2 lambda_min / M`, and s takes what it lacks in length along
    that eigenvector. At a saddle, where g = 0, that is all of s.

    First derivatives of s in the gradient, the eigendecomposition and M are exact outside of the
    hard case.

    Args:
      eigen: the eigendecomposition of A, as `curvax.solve.decompose` returns it.
      gradient: g, a tree of d float numbers.
      regularization: M, a number or scalar array; where A is positive definite it may be 0, for
        Newton's step. Rounding hides what is below `(eps lambda_min)^2 / |g|`, which takes its
        place.

    Returns:
      s, a tree like the gradient, in at least float32, and a `CubicInfo`. Where M is 0 and the
      model falls for ever (A is not positive semidefinite, or g has a part along an eigenvector
      of eigenvalue 0) there is no minimum: s and the Info's numbers are NaN.

    Raises:
      ValueError: the regularization is negative.
      TypeError: the gradient is not float, or the regularization arrives in 16 bits.

    Cost: `2 d^2` multiplications, and some `6 d` for each Newton step.

    Example: along the negative eigenvalue -1 the hard case goes `r = 2`.
      >>> import jax.numpy as jnp, curvax
      >>> eigen = curvax.solve.decompose(curvax.solve.Dense(jnp.diag(jnp.array([2.0, -1.0]))))
      >>> s, info = curvax.solve.cubic_step(eigen, jnp.zeros(2), regularization=1.0)
      >>> abs(s).tolist(), bool(info.is_hard)
      ([0.0, 2.0], True)

    References: Nesterov and Polyak (2006), Cubic regularization of Newton method and its global
      performance, section 5; Conn, Gould and Toint (2000), Trust-region methods, section 7.3, for
      the hard case and the equation of reciprocals; Cartis, Gould and Toint (2011), Adaptive
      cubic regularisation methods for unconstrained optimization, part I, section 6.1. All from
      general knowledge of them; the conditions above are what the tests check.
    """
    check_params(gradient)
    check_at_least(0, regularization=regularization)
    check_precision(regularization=regularization)
    c, to_tree = eigen_coordinates(eigen, gradient)
    units = _units(regularization, eigen.values, c)
    values = eigen.values / units.eigenvalue
    c = c / units.eigenvalue / units.length
    M = jnp.asarray(regularization, values.dtype) / units.eigenvalue * units.length
    has_minimum = (M > 0) | ((values[0] >= 0) & ~jnp.any((values == 0) & (c != 0)))
    M = _resolved(M, values, c)

    # The root without derivatives, for a loop has none in reverse mode.
    inputs = lax.stop_gradient((values, c, M))
    equation = _equation(*inputs)
    root = _root(equation)
    # One Newton step more changes nothing but derivatives: those of an implicit function.
    equation = _equation(values, c, M)
    q, slope = _excess(equation, root.delta)
    correction = (q - 1) / lax.stop_gradient(slope)
    delta = root.delta + jnp.where(equation.is_hard, 0, correction)

    # s = -(A + sigma I)^-1 g; in the hard case what is missing of r = 2 pole / M along the lowest
    # eigenvector, in either direction
    s = -safe_divide(equation.c, equation.gaps + delta)
    missing = (2 * equation.pole / M) ** 2 - jnp.sum(s * s)
    is_longer = equation.is_hard & (missing > 0)
    along = jnp.where(is_longer, jnp.sqrt(jnp.where(is_longer, missing, 1)), 0)
    s = s.at[0].add(along)

    s = jnp.where(has_minimum, s, jnp.nan)
    length = _length(s)
    sigma = M * length / 2
    # m(0) - m(s) as a sum of what is not negative, with g's = -s'(A + sigma I) s
    decrease = jnp.sum((equation.gaps + delta) * s * s) / 2 + sigma * length * length / 6
    info = CubicInfo(
        length=units.length * length,
        decrease=decrease * units.eigenvalue * units.length * units.length,
        residual=_length(c + (values + sigma) * s) * units.length * units.eigenvalue,
        steps=root.steps,
        is_hard=equation.is_hard,
    )
    return to_tree(units.length * s), info


class _Units(NamedTuple):
    """Powers of two by which the problem becomes one of numbers near 1, whose squares are floats.

    The gradient is in units of both, `g = eigenvalue length g'`, and M in `eigenvalue / length`.
    """

    eigenvalue: Scalar
    length: Scalar


def _units(M: Any, values: Float[Array, " d"], c: Float[Array, " d"]) -> _Units:
    """Return units in which eigenvalues, gradient and M are at most about 1."""
    M, gradient = jnp.asarray(M, values.dtype), jnp.max(jnp.abs(c))
    # sigma (lambda + sigma) = M |g| / 2 where one eigenvalue counts: sigma is at most this root.
    root = jnp.sqrt(M) * jnp.sqrt(gradient)
    eigenvalue = power_of_two(jnp.maximum(jnp.max(jnp.abs(values)), root))
    # |s| is |g| / lambda as a rule, and in the hard case -2 lambda_min / M.
    hard = safe_divide(jnp.maximum(-values[0], 0), M)
    return _Units(eigenvalue, power_of_two(jnp.maximum(gradient / eigenvalue, hard)))


class _Equation(NamedTuple):
    """The equation `M |s(delta)| / (2 sigma) = 1` with `sigma = pole + delta`, and its data."""

    c: Float[Array, " d"]
    gaps: Float[Array, " d"]
    pole: Scalar
    M: Scalar
    is_hard: Bool[Array, ""]


class _Root(NamedTuple):
    """The latest delta, and the interval in which the root lies."""

    delta: Scalar
    low: Scalar
    high: Scalar
    steps: Int[Array, ""]
    is_settled: Bool[Array, ""]


def _resolved(M: Any, values: Float[Array, " d"], c: Float[Array, " d"]) -> Scalar:
    """Return M, or where A is positive definite the least M that can be told from none."""
    limits = jnp.finfo(values.dtype)
    # sigma (lambda_min + sigma) <= M |g| / 2, so that this M shifts by at most eps^2 lambda_min.
    hidden = limits.eps * jnp.maximum(values[0], 0)
    least = safe_divide(hidden**2, _length(c))
    return jnp.maximum(jnp.asarray(M, values.dtype), jnp.maximum(least, limits.tiny))


def _equation(values: Float[Array, " d"], c: Float[Array, " d"], M: Scalar) -> _Equation:
    """State the equation relative to its pole, near which sigma itself would lose all digits."""
    pole = jnp.maximum(-values[0], 0)
    gaps = values + pole
    # So small a part, eps^2 of g, is neither of use nor safe to divide by a gap of its size.
    c = jnp.where(jnp.abs(c) > jnp.finfo(c.dtype).eps ** 2 * _length(c), c, 0)

    # |s| falls from its value at the pole; if that is below r = 2 pole / M there is no root.
    is_infinite = jnp.any((gaps == 0) & (c != 0))
    at_pole = _length(safe_divide(c, gaps))
    is_hard = ~is_infinite & (at_pole <= 2 * pole / M)
    return _Equation(c=c, gaps=gaps, pole=pole, M=M, is_hard=is_hard)


def _excess(equation: _Equation, delta: Scalar) -> tuple[Scalar, Scalar]:
    """Return `q = M |s| / (2 sigma)`, above 1 below the root, and Newton's slope of `1/|s| - 1/r`.

    With both divided by `1 / |s|` the Newton step is `(q - 1) / slope`.
    """
    shifted, sigma = equation.gaps + delta, equation.pole + delta
    s = safe_divide(equation.c, shifted)
    length = _length(s)
    q = safe_divide(equation.M * length, 2 * sigma)
    # d/dsigma |s| = -sum s_i^2 / (lambda_i + sigma) / |s|
    share = safe_divide(s, length) ** 2
    slope = jnp.sum(safe_divide(share, shifted)) + safe_divide(q, sigma)
    # Where there is nothing to solve, any slope does.
    return q, jnp.where(slope > 0, slope, 1)


def _root(equation: _Equation) -> _Root:
    """Solve the equation by Newton's method from below, within an interval that holds the root."""
    c, gaps, pole, M, is_hard = equation
    eps = jnp.finfo(c.dtype).eps

    # (pole + delta)(gap + delta) = k + pole gap has this positive solution, if k > 0.
    def positive_root(gap: Array, k: Array) -> Array:
        b, k = pole + gap, jnp.maximum(k, 0)
        return safe_divide(2 * k, b + jnp.sqrt(b * b + 4 * k))

    # |s| is at least |c_i| / (gap_i + delta), at least |c| / (gap_max + delta), and at most
    # |c| / (gap_min + delta); each with |s| = 2 sigma / M bounds the root.
    total = M * _length(c) / 2
    by_part = positive_root(gaps, M * jnp.abs(c) / 2 - pole * gaps)
    by_all = positive_root(gaps[-1], total - pole * gaps[-1])
    low = jnp.maximum(jnp.max(by_part), by_all)
    high = jnp.maximum(positive_root(gaps[0], total), low)

    def step(last: _Root) -> _Root:
        q, slope = _excess(equation, last.delta)
        low = jnp.where(q >= 1, last.delta, last.low)
        high = jnp.where(q <= 1, last.delta, last.high)
        newton = last.delta + (q - 1) / slope
        # Both sides are concave, so only rounding takes a step out of the interval.
        is_inside = (newton >= low) & (newton <= high)
        delta = jnp.where(is_inside, newton, (low + high) / 2)
        # Far above a pole that is large, delta need not be as exact as the length is.
        goes_on = jnp.abs(delta - last.delta) > 2 * eps * delta
        goes_on &= jnp.abs(q - 1) > 8 * eps
        return _Root(
            delta=delta,
            low=low,
            high=high,
            steps=last.steps + 1,
            is_settled=~goes_on,  # also with NaN
        )

    first = _Root(
        delta=jnp.where(is_hard, 0, low),
        low=low,
        high=high,
        steps=jnp.int32(0),
        is_settled=is_hard,
    )
    return lax.while_loop(lambda r: ~r.is_settled & (r.steps < MAX_STEPS), step, first)


def _length(x: Float[Array, " d"]) -> Scalar:
    """Return `|x|`, whatever its size; its derivative at 0 is 0."""
    # Entries that are small beside the unit of the problem have squares that are no floats.
    unit = power_of_two(jnp.max(jnp.abs(x)))
    square = jnp.sum((x / unit) ** 2)
    is_zero = square == 0
    return unit * jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
