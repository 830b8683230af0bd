"""The curvature that influence divides by, method by method, and its damping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import keystr
from jaxtyping import Array

from curvax._checks import check_choice, check_damping, describe
from curvax._host import OnHost
from curvax._stream import check_rereadable, on_device
from curvax._types import Batch, Matvec, Params
from curvax.apps.influence._fitting import Fitted
from curvax.kron._inverse import kron_inverse
from curvax.kron._layout import Layout
from curvax.kron._operator import EigenOperator, KronOperator, apply, damping_of
from curvax.kron._two_products import combined_factors
from curvax.objective import Objective
from curvax.products import ggnvp, streamed
from curvax.solve import SolveInfo, Window, window_inverse, window_of
from curvax.solve._window import num_rows

Solve: TypeAlias = Callable[..., tuple[Params, SolveInfo]]
"""`(matvec, b, *, damping, preconditioner) -> (x, SolveInfo)`."""

SERVES = {
    "ekfac": ("ekfac", "kfac", "cg", "identity"),
    "kfac": ("kfac", "identity"),
    "diagonal": ("diagonal", "identity"),
    "identity": ("identity",),
    "mfac": ("mfac", "identity"),
}
"""Which methods a fit of a method can be used for."""


def check_fitted(fitted: Fitted, method: str | None) -> str:
    """Return the method, or raise unless the fit is complete and serves it."""
    if fitted.missing:
        raise ValueError(
            f"the fit is not complete: its passes over {' and '.join(fitted.missing)} did not come to the end. "
            "Call fit again with the same arguments and folder; it goes on where it was."
        )
    layout = fitted.layout
    if not layout.blocks and all(leaf.outside != "diagonal" for leaf in layout.leaves):
        raise ValueError(
            'the layout holds every leaf fixed (kind="identity"): nothing is left that has influence.'
        )
    method = fitted.method if method is None else method
    check_choice(
        "method", method, dict.fromkeys(name for names in SERVES.values() for name in names)
    )
    if method not in SERVES[fitted.method]:
        makes = [name for name, names in SERVES.items() if method in names]
        raise ValueError(
            f"a fit of {fitted.method!r} serves {', '.join(map(repr, SERVES[fitted.method]))}; {method!r} needs one of "
            f"{', '.join(map(repr, makes))}: fit(..., method=...), or influence.of_window for 'mfac'."
        )
    if {"kfac": fitted.factors, "mfac": fitted.window, "identity": fitted.terms}.get(
        method, fitted.eigen
    ) is None:
        raise ValueError(
            f"the fit is not complete: it does not hold what {method!r} divides by. Make it by influence.fit."
        )
    return method


def of_window(layout: Layout, window: Window, terms: Any) -> Fitted:
    """Take a window of examples' gradients (M-FAC) as the curvature.

    Args:
      layout: whose blocks and leaves influence is followed through.
      window: such as `curvax.solve.window_of(curvax.per_example_grads(objective, params, batch))`, for the empirical Fisher of
        these examples.
      terms: N, how many terms the training loss is a mean over.

    Returns:
      `Fitted`, of method "mfac".

    Cost: the inner products of the rows, `m^2 d / 2` multiplications; a copy of them.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> window = curvax.solve.window_of(curvax.per_example_grads(objective, params, batch))           # F = I / 2
      >>> fitted = influence.of_window(curvax.kron_layout(objective, params, batch), window, terms=2)
      >>> result, _ = influence.influence(fitted, objective, params, batch, [batch], damping=0.5)
      >>> abs(result.change_if_removed).round(4).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    rows: Params = jax.vmap(lambda row: without_fixed(layout, row))(window.rows)
    own = window_of(rows)._replace(count=window.count)
    return Fitted(
        None,
        None,
        own,
        jax.tree.map(lambda n: jnp.asarray(n, own.gram.dtype), terms),
        layout,
        "mfac",
    )


def mean_eigenvalues(fitted: Fitted, method: str | None = None) -> dict[str, Array]:
    """Return the mean eigenvalue of every block of the curvature, as a scale for its damping.

    Args:
      fitted: of `fit`.
      method: as in `influence`.

    Returns:
      for each block `[stack]`, for each leaf with a diagonal a number, by path; for "mfac" one number, under "". A block in
      which nothing was counted gets the largest of the others.

    Raises:
      ValueError: a fit that is not complete, or does not serve the method.

    Cost: a pass over the eigenvalues.

    Example: damping of a hundredth of the mean eigenvalue, in place of a tenth.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), fisher="exact", progress=False)
      >>> means = influence.mean_eigenvalues(fitted)                                # of 1/2 and 9/2
      >>> means[""].tolist(), {name: 0.01 * x for name, x in means.items()}[""].shape
      ([2.5], (1,))
    """
    method = check_fitted(fitted, method)
    means = _means(fitted, method)
    largest = jnp.max(jnp.concatenate([jnp.ravel(x) for x in means.values()])) if means else 0.0
    return {name: jnp.where(x > 0, x, largest) for name, x in means.items()}


def _means(fitted: Fitted, method: str) -> dict[str, Array]:
    layout = fitted.layout
    if fitted.window is not None:
        free = without_fixed(
            layout, jax.tree.map(lambda x: jnp.ones(x.shape[1:], x.dtype), fitted.window.rows)
        )
        trace_of_all = jnp.trace(fitted.window.gram[0]) / num_rows(fitted.window, "count")
        return {"": trace_of_all / optax.tree.sum(free)}
    if method == "kfac" and fitted.factors is not None:
        both = {
            block.name: combined_factors(block.structures, fitted.factors.blocks[block.name])
            for block in layout.blocks
        }
        means = {name: a.mean_eigenvalue() * g.mean_eigenvalue() for name, (a, g) in both.items()}
        diagonal = fitted.factors.diagonal
    elif fitted.eigen is not None:
        means = {
            name: jnp.mean(moments.mean, axis=(1, 2))
            for name, moments in fitted.eigen.moments.items()
        }
        diagonal = fitted.eigen.diagonal
    else:
        return {}
    own = {path: jnp.mean(x.mean, where=layout.uncovered(path)) for path, x in diagonal.items()}
    return means | own


def dampings(fitted: Fitted, method: str, damping: Any) -> Any:
    """Return the damping in use: what is given, or a tenth of the mean eigenvalue of every block.

    Raises:
      ValueError: damping that is not positive.
    """
    means = mean_eigenvalues(fitted, method)
    if damping is None:
        for x in means.values():
            if not isinstance(x, jax.core.Tracer) and not (np.asarray(x) > 0).all():
                raise ValueError(
                    "the curvature is zero everywhere, or not finite: there is no mean eigenvalue to take a tenth of. "
                    "Look for a constant loss, or NaN in params and data; or give damping a number."
                )
        return {name: 0.1 * x for name, x in means.items()}
    for name, x in means.items():
        if isinstance(damping, Mapping) and name not in damping:
            raise ValueError(
                f"damping has no entry for {name}; it needs one for each of {', '.join(means)}."
            )
        own, shapes = (
            damping_of(damping, name),
            {(), jnp.shape(x) if isinstance(damping, Mapping) else ()},
        )
        if jnp.shape(own) not in shapes:
            raise ValueError(
                f"damping of {name} must be of shape {' or '.join(map(str, shapes))}, got {describe(own)}."
            )
        if not isinstance(own, jax.core.Tracer):
            check_damping(float(np.min(np.asarray(own))))
    return damping


def inverse(fitted: Fitted, method: str, damping: Any) -> Matvec:
    """Build the product with the damped inverse, of all methods but "cg"."""
    if method == "identity":
        return lambda v: v
    if fitted.window is not None:
        return window_inverse(fitted.window, damping_of(damping, ""), divisor="count")
    if method == "kfac":
        assert fitted.factors is not None
        return kron_inverse(fitted.layout, fitted.factors, damping)
    assert fitted.eigen is not None
    return kron_inverse(fitted.layout, fitted.eigen, damping)


def solve_each(
    fitted: Fitted,
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    vectors: Params,
    damping: Any,
    solver: Solve,
) -> tuple[Params, SolveInfo]:
    """Solve with the Gauss-Newton matrix of the batches for every vector, a tree with a leading axis; EK-FAC preconditions.

    Damping by block becomes part of the matrix.
    """
    check_rereadable(batches)
    found: tuple[Params, SolveInfo]
    if isinstance(batches, Sized) and len(batches) == 1:
        found = _solve_together(
            objective, solver, fitted, params, next(on_device(batches)), vectors, damping
        )
        return found
    product, number = streamed(ggnvp, objective, params, batches), len(jax.tree.leaves(vectors)[0])
    rows = [jax.tree.map(lambda x, i=i: x[i], vectors) for i in range(number)]
    solved = [_solve(solver, fitted, product, damping, row) for row in rows]
    found = jax.tree.map(lambda *x: jnp.stack(x), *solved)
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _solve_together(
    objective: Objective,
    solver: Solve,
    fitted: Fitted,
    params: Params,
    batch: Batch,
    vectors: Params,
    damping: Any,
) -> tuple[Params, SolveInfo]:
    product = ggnvp(objective, params, batch)
    found: tuple[Params, SolveInfo] = lax.map(
        partial(_solve, solver, fitted, product, damping), vectors
    )
    return found


def _solve(
    solver: Solve, fitted: Fitted, product: Matvec, damping: Any, v: Params
) -> tuple[Params, SolveInfo]:
    layout = fitted.layout
    ridge = _ridge(layout, fitted, damping)
    damped = lambda v: optax.tree.add(without_fixed(layout, product(v)), ridge(v))
    matvec = OnHost(damped) if isinstance(product, OnHost) else damped
    x, info = solver(matvec, v, damping=0.0, preconditioner=inverse(fitted, "ekfac", damping))
    return x, SolveInfo(info.residual, info.steps, info.code)


def without_fixed(layout: Layout, tree: Params) -> Params:
    """Put zeros where a layout holds entries fixed, the kind "identity"."""
    leaves = {leaf.path: leaf for leaf in layout.leaves}

    def own(path: Any, x: Array) -> Array:
        leaf = leaves[keystr(path)]
        return jnp.where(layout.uncovered(leaf.path), 0 * x, x) if leaf.outside == "identity" else x

    free: Params = jax.tree.map_with_path(own, tree)
    return free


def _ridge(layout: Layout, fitted: Fitted, damping: Any) -> Matvec:
    """Return the product with the damping itself."""
    assert fitted.eigen is not None
    ones = lambda name: jnp.ones((1, 1, 1)) * jnp.reshape(damping_of(damping, name), (-1, 1, 1))
    blocks = {block.name: EigenOperator(None, None, ones(block.name)) for block in layout.blocks}
    return partial(
        apply,
        layout,
        KronOperator(blocks, {p: damping_of(damping, p) for p in fitted.eigen.diagonal}),
    )
