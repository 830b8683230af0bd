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
from jaxtyping import Array

from curvax._checks import check_choice, check_damping, describe
from curvax._host import OnHost
from curvax._stream import check_rereadable, on_device
from curvax._types import Batch, Matvec, Params
from curvax.apps.influence._fitting import Fitted
from curvax.kron._block_operators import EigenOperator
from curvax.kron._factors import Factors, WeightedMean
from curvax.kron._gradient_pairs import Basis
from curvax.kron._inverse import kron_inverse
from curvax.kron._layout import Layout, named_leaves
from curvax.kron._moments import EigenFactors, decompose
from curvax.kron._operator import KronOperator, apply, damping_of
from curvax.kron._two_products import combined_factors
from curvax.objective import Objective
from curvax.products import ggnvp, streamed
from curvax.solve import SolveInfo, Window, cg, window_inverse, window_of
from curvax.solve._window import num_rows

Solve: TypeAlias = Callable[..., tuple[Params, SolveInfo]]
"""`(matvec, b, *, damping, preconditioner) -> (x, SolveInfo)`."""

Curvature: TypeAlias = Factors | EigenFactors | Window
"""What a method divides by: Kronecker factors, moments in their eigenbasis, or gradients."""

SERVES = {
    "ekfac": ("ekfac", "kfac", "cg", "identity"),
    "kfac": ("kfac", "identity"),
    "diagonal": ("diagonal", "identity"),
    "identity": ("identity",),
    "mfac": ("mfac", "identity"),
}
"""Which methods a fit of a method can be used for."""

# C: curvature of the mean loss, fitted; A, G: the Kronecker factors of a block, s: stack


def name_and_solver(method: str | Solve | None) -> tuple[str | None, Solve]:
    """Return the name of a method, and the solver of "cg", for which a solver may stand."""
    return (method, cg) if method is None or isinstance(method, str) else ("cg", method)


def check_fitted(fitted: Fitted, method: str | None) -> str:
    """Return the method, or raise unless the fit is complete and serves it."""
    if fitted.missing:
        raise ValueError(
            f"the fit is not complete: its passes over {' and '.join(fitted.missing)} did not come "
            "to the end. Call fit again with the same arguments and folder, and it goes on."
        )
    layout = fitted.layout
    # Nothing would be differentiated: scores would all be zero.
    if not layout.blocks and all(leaf.outside != "diagonal" for leaf in layout.leaves):
        raise ValueError(
            'the layout holds every leaf fixed (kind="identity"): no leaf is left with influence.'
        )
    method = fitted.method if method is None else method
    methods = dict.fromkeys(name for names in SERVES.values() for name in names)
    check_choice("method", method, methods)
    if method not in SERVES[fitted.method]:
        served = ", ".join(map(repr, SERVES[fitted.method]))
        needed = ", ".join(repr(name) for name, names in SERVES.items() if method in names)
        raise ValueError(
            f"a fit of {fitted.method!r} serves {served}; {method!r} needs one of {needed}: "
            "fit(..., method=...), or influence.of_window for 'mfac'."
        )
    # "identity" divides by nothing, but scores are parts of a mean over N terms
    if method != "identity":
        curvature_of(fitted, method)
    elif fitted.terms is None:
        raise _incomplete(method)
    return method


def curvature_of(fitted: Fitted, method: str) -> Curvature:
    """Return what a method other than "identity" divides by, or raise if the fit lacks it."""
    curvature: Curvature | None
    if method == "kfac":
        curvature = fitted.factors
    elif method == "mfac":
        curvature = fitted.window
    else:
        curvature = fitted.eigen
    if curvature is None:
        raise _incomplete(method)
    return curvature


def _incomplete(method: str) -> ValueError:
    return ValueError(
        f"the fit is not complete: it does not hold what {method!r} divides by. "
        "Make it by influence.fit."
    )


def of_window(layout: Layout, window: Window, terms: Any) -> Fitted:
    """Take a window of examples' gradients (M-FAC) as the curvature.

    Args:
      layout: the `Layout` whose blocks and leaves influence is followed through, as returned by
        `curvax.kron_layout(objective, params, batch)`.
      window: a window of gradients, such as
        `curvax.solve.window_of(curvax.per_example_grads(objective, params, batch))`, which is the
        empirical Fisher of these examples.
      terms: N, the number of terms that the training loss is a mean over.

    Returns:
      A `Fitted` of method "mfac".

    Cost: the inner products of the rows, `m^2 d / 2` multiplications, and a copy of the rows.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
      >>> grads = curvax.per_example_grads(objective, params, batch)
      >>> window = curvax.solve.window_of(grads)  # F = I / 2
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> fitted = influence.of_window(layout, window, terms=2)
      >>> result, _ = influence.influence(fitted, objective, params, batch, [batch], damping=0.5)
      >>> abs(result.change_if_removed).round(4).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    # What is fixed has no gradient: neither in the rows, nor in their inner products.
    rows: Params = jax.vmap(partial(without_fixed, layout))(window.rows)
    free_window = window_of(rows)._replace(count=window.count)
    return Fitted(
        factors=None,
        eigen=None,
        window=free_window,
        terms=jax.tree.map(lambda n: jnp.asarray(n, free_window.gram.dtype), terms),
        layout=layout,
        method="mfac",
    )


def mean_eigenvalues(fitted: Fitted, method: str | None = None) -> dict[str, Array]:
    """Return the mean eigenvalue of every block of the curvature, as a scale for its damping.

    Args:
      fitted: the curvature that `fit` or `of_window` returned.
      method: the method as in `influence`; "identity" is that of the fit.

    Returns:
      For each block `[stack]`, for each leaf with a diagonal a number, by path; for "mfac" one
      number, under "". A block in which nothing was counted gets the largest of the others.

    Raises:
      ValueError: the fit is not complete, or does not serve the method.

    Cost: a pass over the eigenvalues.

    Example: damping of a hundredth of the mean eigenvalue, in place of a tenth.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, jnp.zeros((2, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)
      >>> options = {"fisher": "exact", "progress": False}
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), **options)
      >>> means = influence.mean_eigenvalues(fitted)  # of 1/2 and 9/2
      >>> means[""].tolist(), {name: 0.01 * x for name, x in means.items()}[""].shape
      ([2.5], (1,))
    """
    method = check_fitted(fitted, method)
    return _scaled_means(fitted, fitted.method if method == "identity" else method, 1.0)


def _scaled_means(fitted: Fitted, method: str, scale: float) -> dict[str, Array]:
    """Return a multiple of the mean eigenvalue of every block, and of leaves after them."""
    means: dict[str, Array] = _scaled_means_in_a_program(fitted, method, scale)
    # JAX returns a dict in the order of the alphabet.
    blocks = [block.name for block in fitted.layout.blocks if block.name in means]
    return {name: means[name] for name in (*blocks, *means)}


# Many small programs would take most of a second to compile.
@partial(jax.jit, static_argnums=1)
def _scaled_means_in_a_program(fitted: Fitted, method: str, scale: float) -> dict[str, Array]:
    """Compute what `_scaled_means` returns."""
    means = _means(fitted, method)
    if not means:
        return means
    # e.g. rows of an embedding that no batch looked up: any other scale is better than zero
    largest = jnp.max(jnp.concatenate(list(map(jnp.ravel, means.values()))))
    return {name: scale * jnp.where(x > 0, x, largest) for name, x in means.items()}


def _means(fitted: Fitted, method: str) -> dict[str, Array]:
    """Return the trace of each block over its dimension; nothing for a fit of "identity"."""
    if method == "identity":
        return {}
    layout, curvature = fitted.layout, curvature_of(fitted, method)
    if isinstance(curvature, Window):
        return {"": _mean_of_window(layout, curvature)}
    means: dict[str, Array] = {}
    if isinstance(curvature, Factors):
        # tr(A x G) / (in out) = (tr A / in) (tr G / out)
        for block in layout.blocks:
            a, g = combined_factors(block.structures, curvature.blocks[block.name])
            means[block.name] = a.mean_eigenvalue() * g.mean_eigenvalue()
    else:
        # Moments in the eigenbasis take the place of the eigenvalues (EK-FAC).
        for name, moments in curvature.moments.items():
            means[name] = jnp.mean(moments.mean, axis=(1, 2))
    return means | _means_of_diagonals(layout, curvature.diagonal)


def _mean_of_window(layout: Layout, window: Window) -> Array:
    """Return `tr(G'G) / N` over the number of entries that are not held fixed."""
    ones = jax.tree.map(lambda x: jnp.ones(x.shape[1:], x.dtype), window.rows)
    num_free = optax.tree.sum(without_fixed(layout, ones))
    # tr(G'G) = tr(G G'), the Gram matrix of the rows
    return jnp.trace(window.gram[0]) / num_rows(window, "count") / num_free


def _means_of_diagonals(
    layout: Layout,
    diagonal: Mapping[str, WeightedMean],
) -> dict[str, Array]:
    """Return the mean of each leaf's diagonal over its entries that are in no block."""
    means = {}
    for path, entries in diagonal.items():
        # entries in blocks are counted there
        means[path] = jnp.mean(entries.mean, where=layout.uncovered(path))
    return means


def dampings(fitted: Fitted, method: str, damping: Any) -> Any:
    """Return the damping that is used: the argument, or a tenth of each block's mean eigenvalue.

    Grosse et al. (2023) take this tenth.

    Raises:
      ValueError: damping is not positive, or does not have the shapes of the blocks.
    """
    tenths = _scaled_means(fitted, method, 0.1)
    if damping is None:
        # Under `jit` there is nothing to check yet.
        concrete = [x for x in tenths.values() if not isinstance(x, jax.core.Tracer)]
        if not all((np.asarray(x) > 0).all() for x in concrete):
            raise ValueError(
                "the curvature is zero everywhere, or not finite: there is no mean eigenvalue to "
                "take a tenth of. Look for a constant loss, or NaN in params and data; or give "
                "damping a number."
            )
        return tenths
    # One number for all blocks, or a mapping with one entry for each of them.
    for name, tenth in tenths.items():
        _check_damping_of(name, damping, jnp.shape(tenth), list(tenths))
    return damping


def _check_damping_of(
    name: str,
    damping: Any,
    shape: tuple[int, ...],
    names: list[str],
) -> None:
    """Raise unless the damping of one block is there, positive, and a number or of a shape."""
    shapes: set[tuple[int, ...]] = {()}
    if isinstance(damping, Mapping):
        shapes.add(shape)
        if name not in damping:
            raise ValueError(
                f"damping has no entry for {name}; it needs one for each of {', '.join(names)}."
            )
    value = damping_of(damping, name)
    if jnp.shape(value) not in shapes:
        raise ValueError(
            f"damping of {name} must be of shape {' or '.join(map(str, shapes))}, "
            f"got {describe(value)}."
        )
    if not isinstance(value, jax.core.Tracer):
        check_damping(float(np.min(np.asarray(value))))


def divisor_of(fitted: Fitted, method: str) -> Curvature | None:
    """Return what `inverse` inverts: K-FAC's factors in their eigenbasis; None with "identity"."""
    if method == "identity":
        return None
    curvature = curvature_of(fitted, method)
    # Here and not in a program, since the host decomposes in float64.
    return curvature if method != "kfac" else _in_eigenbasis(fitted)


def _in_eigenbasis(fitted: Fitted) -> Curvature:
    """Write K-FAC's curvature as EK-FAC's, with the eigenvalues of `A x G` as moments."""
    layout, factors = fitted.layout, fitted.require_factors()
    # A sum of Kronecker products has no Kronecker eigenbasis.
    if not all(block.is_one_product for block in layout.blocks):
        return factors
    basis, moments = {}, {}
    for name, (a, g) in decompose(layout.blocks, factors).items():
        basis[name] = Basis(a.vectors, g.vectors)
        # d_A d_G', of weight 1
        eigenvalues = a.values[:, :, None] * g.values[:, None, :]
        moments[name] = WeightedMean(eigenvalues, jnp.ones([], eigenvalues.dtype))
    return EigenFactors(basis, moments, factors.diagonal)


def inverse(layout: Layout, divisor: Curvature | None, damping: Any) -> Matvec:
    """Build the product with `(C + damping I)^-1`, of all methods but "cg"."""
    if divisor is None:
        return _same
    if isinstance(divisor, Window):
        return window_inverse(divisor, damping_of(damping, ""), divisor="count")
    return kron_inverse(layout, divisor, damping)


def _same(v: Params) -> Params:
    return v


def solve_each(
    fitted: Fitted,
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    vectors: Params,
    damping: Any,
    solver: Solve,
) -> tuple[Params, SolveInfo]:
    """Solve with the damped Gauss-Newton matrix of the batches for every vector.

    The vectors are a tree with a leading axis. EK-FAC preconditions; damping by block becomes part
    of the matrix.
    """
    check_rereadable(batches)
    solved: tuple[Params, SolveInfo]
    if isinstance(batches, Sized) and len(batches) == 1:
        # One batch fits into one program, with a loop over the vectors.
        batch = next(on_device(batches))
        solved = _solve_together(objective, solver, fitted, params, batch, vectors, damping)
        return solved
    # Several batches are read again for every product, in a loop in Python.
    product = streamed(ggnvp, objective, params, batches)
    solutions = []
    for i in range(len(jax.tree.leaves(vectors)[0])):
        vector = jax.tree.map(lambda x, i=i: x[i], vectors)
        solutions.append(_solve(solver, fitted, product, damping, vector))
    solved = jax.tree.map(lambda *x: jnp.stack(x), *solutions)
    return solved


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
    """Solve for every vector on one batch."""
    product = ggnvp(objective, params, batch)
    solve = partial(_solve, solver, fitted, product, damping)
    solved: tuple[Params, SolveInfo] = lax.map(solve, vectors)
    return solved


def _solve(
    solver: Solve,
    fitted: Fitted,
    product: Matvec,
    damping: Any,
    b: Params,
) -> tuple[Params, SolveInfo]:
    """Solve `(C + D) x = b` in the entries that are not held fixed, D the damping by block."""
    layout = fitted.layout
    ridge = _ridge(layout, damping)

    def damped(v: Params) -> Params:
        return optax.tree.add(without_fixed(layout, product(v)), ridge(v))

    # The preconditioner is EK-FAC's damped inverse, which is near that of C + D.
    # A product over a stream of batches keeps the solver's loop in Python.
    matvec = OnHost(damped) if isinstance(product, OnHost) else damped
    preconditioner = inverse(layout, divisor_of(fitted, "ekfac"), damping)
    x, info = solver(matvec, b, damping=0.0, preconditioner=preconditioner)
    return x, SolveInfo(info.residual, info.steps, info.code)


def without_fixed(layout: Layout, tree: Params) -> Params:
    """Put zeros where a layout holds entries fixed, which is the kind "identity"."""
    leaves = {leaf.path: leaf for leaf in layout.leaves}

    def of_leaf(path: str, x: Array) -> Array:
        if leaves[path].outside != "identity":
            return x
        return jnp.where(layout.uncovered(path), 0 * x, x)

    free = [of_leaf(path, x) for path, x in named_leaves(layout, tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), free)


def _ridge(layout: Layout, damping: Any) -> Matvec:
    """Build the product with the damping itself, `v -> D v`."""
    blocks = {}
    for block in layout.blocks:
        # D is the same number for all entries of a slice: any basis will do.
        scale = jnp.reshape(damping_of(damping, block.name), (-1, 1, 1))
        blocks[block.name] = EigenOperator(None, None, jnp.ones((1, 1, 1)) * scale)
    paths = [leaf.path for leaf in layout.leaves if leaf.outside == "diagonal"]
    diagonal = {path: damping_of(damping, path) for path in paths}
    return partial(apply, layout, KronOperator(blocks, diagonal))
