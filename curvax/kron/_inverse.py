"""The damped inverse, and other powers, of Kronecker-factored curvature as a matvec."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial

from curvax._checks import check_choice, check_damping, describe
from curvax._types import Matvec
from curvax.kron._factors import Factors
from curvax.kron._layout import Layout
from curvax.kron._moments import EigenFactors
from curvax.kron._operator import DAMPING_SCHEMES, apply, kron_operator


def kron_inverse(
    layout: Layout,
    factors: Factors | EigenFactors,
    damping: Any,
    *,
    damping_scheme: str = "exact",
    power: float = -1.0,
) -> Matvec:
    """Build the product with the damped inverse, `v -> (A x G + damping I)^-1 v`.

    Args:
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      factors: the `Factors` of `curvax.kron_factors`, or the `EigenFactors` of
        `curvax.kron.kron_moments`: then second moments in the eigenbasis take the place of products
        of eigenvalues (EK-FAC).
      damping: positive scalar, in units of an eigenvalue of the curvature; may be traced. With a
        positive `power` also 0. Or a mapping with one for each block by name (a number, or
        `[stack]`) and for each leaf in `factors.diagonal`.
      damping_scheme: "exact", `A x G + damping I` by eigendecompositions; "factored", the cheaper
        `(A + pi sqrt(damping) I) x (G + sqrt(damping) / pi I)` by Cholesky, with
        `pi^2 = (tr A / dim A) / (tr G / dim G)`, which damps some directions more.
      power: exponent of the damped curvature; -1/2 and 1/2 are square roots, 1 is the product with
        the curvature itself.

    Returns:
      `matvec(v) -> tree like v` (a tree like params), self-adjoint and positive definite, that may
      be passed through `jit`. Entries in no block are divided by damped diagonal entries, or left
      as they are (identity).

    Raises:
      ValueError: damping is zero or negative, or lacks a block; the scheme is unknown; v is unlike
        the layout's params; another power than -1 is asked of a block with `two_products="exact"`,
        or one that is not known of a block over time.
      TypeError: factors are of another kind.

    Cost: to build it takes an eigendecomposition of every full factor (about 10 n^3), or a Cholesky
      inverse (n^3). Each product takes `in out (in + out)` multiplications a block, in the
      eigenbasis twice that.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params = jnp.zeros((2, 1))
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 1))
      >>> layout = curvax.kron_layout(objective, params, batch)    # curvature diag(1/2, 9/2)
      >>> factors = curvax.kron_factors(
      ...     objective, layout, params, batch, jax.random.key(0), fisher="exact")
      >>> inverse = curvax.kron_inverse(layout, factors, damping=0.5)
      >>> [round(x, 6) for x in inverse(jnp.ones((2, 1))).ravel().tolist()]
      [1.0, 0.2]

    References: Martens and Grosse (2015), section 6.3; George et al. (2018); Martens, Ba and
      Johnson (2018), Kronecker-factored curvature approximations for recurrent neural networks,
      whose two options are `sharing="time_symmetric"` and "time_infinite" in the layout.

    Deviates: damping is not factored where a factor has one row, or is the identity: all of it then
      goes to the other factor, which is exact. Damping of a factor is at least its trace times the
      precision of its floats. The curvature of a kernel that is used transposed too is a sum of two
      Kronecker products, `A1 x G1 + A2 x G2`, and the paper has no such case. With
      `layout.edit(path, two_products="balanced")`, the default, it is approximated by one product;
      with "exact", `A1 x G1 + (A2 + pi sqrt(damping) I) x (G2 + sqrt(damping) / pi I)` is inverted
      exactly under both schemes, since `damping I` would be a third product. The same choice is
      there for a kernel in two parts of a `curvax.total`, whose one product by default is in
      `curvax.kron_factors`. Penalties on params add to the damping of a block. A block over time is
      inverted by the formulas of `curvax/kron/_over_time.py` under both schemes, with damping that
      is factored into A and G before lags are taken relative to them; T is the mean length of the
      sequences, rounded.
    """
    if not isinstance(factors, Factors | EigenFactors):
        raise TypeError(
            "kron_inverse takes the Factors of curvax.kron_factors or the EigenFactors of "
            f"curvax.kron.kron_moments, got {describe(factors)}."
        )
    check_choice("damping_scheme", damping_scheme, DAMPING_SCHEMES)
    _check_dampings(layout, factors, damping, power)
    operator = kron_operator(layout, factors, damping, damping_scheme, power)
    # A pytree and no closure: jit traces its arrays as arguments, not as constants of a program.
    # Spectra play no part in the product, and are not carried along.
    return Partial(partial(apply, layout), operator._replace(spectra={}))


def _check_dampings(
    layout: Layout, factors: Factors | EigenFactors, damping: Any, power: float
) -> None:
    """Raise unless damping is positive, and there is one for all that is damped."""
    if not isinstance(damping, Mapping):
        # A positive power of a singular matrix is finite, so that it needs no damping.
        check_damping(damping, allow_zero=power > 0)
        return
    # Slices of a stack are matrices apart, each with a damping; a leaf's diagonal has one.
    stacks = {block.name: (block.shape[0],) for block in layout.blocks}
    names = [*stacks, *factors.diagonal]
    for name in names:
        if name not in damping:
            raise ValueError(
                f"damping has no entry for {name}; it needs one for each of {', '.join(names)}."
            )
        shape = stacks.get(name, ())
        if jnp.shape(damping[name]) not in ((), shape):
            raise ValueError(
                f"damping of {name} must be a number or {list(shape)}, got "
                f"{describe(damping[name])}."
            )
        check_damping(damping[name], allow_zero=power > 0)
