"""To and from `lineax` operators, an optional dependency: its solvers on our products, and back."""

from __future__ import annotations

from typing import Any

import jax

from curvax._checks import check_params
from curvax._types import Matvec, Params


def to_lineax(
    matvec: Matvec,
    params: Params,
    *,
    positive_semidefinite: bool = False,
) -> Any:
    """Return `matvec` as a symmetric `lineax.FunctionLinearOperator`.

    Args:
      matvec: `v -> A v` on trees like params, symmetric.
      params: a pytree that gives shapes and dtypes.
      positive_semidefinite: whether to tag the operator so, as `lineax.CG` asks; it is true of
        Gauss-Newton and Fisher matrices.

    Raises:
      ImportError: `lineax` is not installed.

    Example: the Hessian is `diag(12, 48)`.
      >>> import jax.numpy as jnp, lineax, curvax
      >>> matvec = curvax.hvp(lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0]))
      >>> operator = curvax.solve.to_lineax(matvec, jnp.zeros(2), positive_semidefinite=True)
      >>> x = lineax.linear_solve(operator, jnp.ones(2), lineax.CG(1e-6, 1e-6)).value
      >>> [round(x, 3) for x in x.tolist()]
      [0.083, 0.021]
    """
    check_params(params)
    lineax = _imported()
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tag = lineax.positive_semidefinite_tag if positive_semidefinite else lineax.symmetric_tag
    return lineax.FunctionLinearOperator(matvec, like, tag)


def from_lineax(operator: Any) -> Matvec:
    """Return the product with a `lineax` operator, for the solves and spectra of curvax.

    Args:
      operator: a `lineax.AbstractLinearOperator` that is tagged as symmetric.

    Raises:
      ImportError: `lineax` is not installed.
      ValueError: the operator is not known to be symmetric.

    Example:
      >>> import jax.numpy as jnp, lineax, curvax
      >>> diagonal = jnp.diag(jnp.array([2.0, 4.0]))
      >>> operator = lineax.MatrixLinearOperator(diagonal, lineax.symmetric_tag)
      >>> curvax.cg(curvax.solve.from_lineax(operator), jnp.ones(2))[0].round(4).tolist()
      [0.5, 0.25]
    """
    lineax = _imported()
    if not (lineax.is_symmetric(operator) or lineax.is_positive_semidefinite(operator)):
        raise ValueError(
            f"{type(operator).__name__} is not tagged as symmetric; "
            "if it is, give it lineax.symmetric_tag."
        )
    matvec: Matvec = operator.mv
    return matvec


def _imported() -> Any:
    # Here and not at the top of the module, so that curvax imports without it.
    try:
        import lineax
    except ImportError as error:
        raise ImportError("this adapter needs lineax: pip install lineax.") from error
    return lineax
