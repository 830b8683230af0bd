"""To and from `lineax` operators, an optional dependency: its solvers on our products, ours on its operators."""

from __future__ import annotations

import importlib
from typing import Any

import jax

from curvax._checks import check_params
from curvax._types import Matvec, Params


def to_lineax(matvec: Matvec, params: Params, *, positive_semidefinite: bool = False) -> Any:
    """Return `matvec` as a symmetric `lineax.FunctionLinearOperator`.

    Args:
      matvec: `v -> A v` on trees like params, symmetric.
      params: pytree that gives shapes and dtypes.
      positive_semidefinite: tag it so, as `lineax.CG` asks; true of Gauss-Newton and Fisher matrices.

    Raises:
      ImportError: `lineax` is not installed.

    Example:
      >>> import jax.numpy as jnp, lineax, curvax
      >>> matvec = curvax.hvp(lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0]))                          # diag(12, 48)
      >>> operator = curvax.solve.to_lineax(matvec, jnp.zeros(2), positive_semidefinite=True)
      >>> [round(x, 3) for x in lineax.linear_solve(operator, jnp.ones(2), lineax.CG(1e-6, 1e-6)).value.tolist()]
      [0.083, 0.021]
    """
    check_params(params)
    lineax = _imported()
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tag = lineax.positive_semidefinite_tag if positive_semidefinite else lineax.symmetric_tag
    return lineax.FunctionLinearOperator(matvec, like, tag)


def from_lineax(operator: Any) -> Matvec:
    """Return the product with a `lineax` operator, for solves and spectra here.

    Raises:
      ImportError: `lineax` is not installed.
      ValueError: the operator is not known to be symmetric.

    Example:
      >>> import jax.numpy as jnp, lineax, curvax
      >>> matrix = lineax.MatrixLinearOperator(jnp.diag(jnp.array([2.0, 4.0])), lineax.symmetric_tag)
      >>> curvax.cg(curvax.solve.from_lineax(matrix), jnp.ones(2))[0].round(4).tolist()
      [0.5, 0.25]
    """
    lineax = _imported()
    if not (lineax.is_symmetric(operator) or lineax.is_positive_semidefinite(operator)):
        raise ValueError(
            f"{type(operator).__name__} is not tagged as symmetric; if it is, give it lineax.symmetric_tag."
        )
    matvec: Matvec = operator.mv
    return matvec


def _imported() -> Any:
    try:
        lineax = importlib.import_module("lineax")
    except ImportError as error:
        raise ImportError("this adapter needs lineax: pip install lineax.") from error
    return lineax
