"""Direct solves with the low-rank Fisher matrix of a window of gradients."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from curvax._checks import check_damping
from curvax._types import Params
from curvax.solve._damped import check_system, damped, finished
from curvax.solve._result import Result, SolveInfo
from curvax.solve._window import Window, window_inverse, window_product


def woodbury(
    window: Window,
    b: Params,
    *,
    damping: Any,
    tol: float | Array = 1e-5,
    divisor: str = "window",
) -> tuple[Params, SolveInfo]:
    """Solve `(F + damping I) x = b` with `F = (1/N) sum_i g_i g_i'` of a window of gradients.

    Args:
      window: a `Window`, as `curvax.solve.fisher_window` or `curvax.solve.window_of` returns it.
      b: a tree like a row of the window.
      damping: a positive number, in units of an eigenvalue of F.
      tol: the relative residual above which the code is STALLED.
      divisor: N, as in `curvax.solve.window_inverse`.

    Returns:
      x, a tree like b in its dtypes, and a `SolveInfo`.

    Raises:
      ValueError: damping is not positive, the divisor is unknown, or b is unlike the window's rows
        (the message names the path).

    Cost: `m^3 / 3` multiplications, two passes over the m d stored numbers for x and two for the
      residual. For many b, or to precondition `curvax.cg`: `curvax.solve.window_inverse`.

    Example: `F = diag(2, 8, 0)`.
      >>> import jax.numpy as jnp, curvax
      >>> window = curvax.solve.window_of(jnp.array([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
      >>> x, info = curvax.solve.woodbury(window, jnp.ones(3), damping=0.5)
      >>> [round(v, 4) for v in x.tolist()], bool(info.converged)
      ([0.4, 0.1176, 2.0], True)

    References: Woodbury (1950), Inverting modified matrices.
    """
    check_damping(damping)
    check_system(b, damping, tol, 1, None)
    x = window_inverse(window, damping, divisor=divisor)(b)
    # The residual is of products with the rows, not of the Gram matrix by which x was computed.
    apply = damped(window_product(window, divisor=divisor), damping, b)
    code = jnp.int32(Result.CONVERGED)
    return finished(apply, x, b, jnp.int32(0), code, tol)
