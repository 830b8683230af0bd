"""Fit the curvature that influence functions divide by, in passes over a data set of any size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import jax
from jaxtyping import PyTree

from curvax._checks import check_choice
from curvax._types import Batch, Params, PRNGKey, Scalar
from curvax.kron._factors import Factors
from curvax.kron._fit import fit_passes, read_passes
from curvax.kron._fit_passes import (
    FitResults,
    counting_passes,
    diagonal_passes,
    factor_passes,
    fit_options,
    moment_passes,
)
from curvax.kron._layout import Layout
from curvax.kron._moments import EigenFactors
from curvax.kron._storage import Saving, facts_of, open_store, read_facts
from curvax.objective import Objective
from curvax.solve import Window

T = TypeVar("T")

# Grosse et al. (2023), section 3: EK-FAC takes the covariances, their eigenbases, and eigenvalues
# in these. K-FAC ends with the covariances. The diagonal takes eigenvalues in the basis of the
# entries themselves.

PASSES_OF = {
    "ekfac": moment_passes,
    "kfac": factor_passes,
    "diagonal": diagonal_passes,
    "identity": counting_passes,
}
"""For every method the function `(objective, layout, options) -> passes`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fitted:
    """The fitted curvature of a data set; a pytree.

    Attributes:
      factors: the Kronecker factors; None unless the method is "ekfac" or "kfac".
      eigen: for "ekfac" the second moments in the eigenbasis of the factors, for "diagonal" those
        of the entries themselves, which are the diagonal of the Fisher; otherwise None.
      window: for "mfac" the `curvax.solve.Window` of examples' gradients; otherwise None.
      terms: N, the number of terms that the mean loss is over; of a `weighted_sum` a dict by head.
        It counts the data that were fitted: if these were a part of the training set, use
        `dataclasses.replace(fitted, terms=...)`.
      layout: the `Layout` that the curvature was fitted with.
      method: the method that the curvature was fitted for.
      missing: the names of the passes that have not been completed.
    """

    factors: Factors | None
    eigen: EigenFactors | None
    window: Window | None
    terms: PyTree[Scalar]
    layout: Layout = field(metadata={"static": True})
    method: str = field(metadata={"static": True})
    missing: tuple[str, ...] = field(default=(), metadata={"static": True})

    def require_factors(self) -> Factors:
        """Return the Kronecker factors, or raise if this fit has none."""
        return self._require(self.factors, "Kronecker factors", "'ekfac' or 'kfac'")

    def require_eigen(self) -> EigenFactors:
        """Return the second moments in their basis, or raise if this fit has none."""
        return self._require(self.eigen, "second moments", "'ekfac' or 'diagonal'")

    def require_window(self) -> Window:
        """Return the window of gradients, or raise if this fit has none."""
        return self._require(self.window, "window of gradients", "'mfac' (influence.of_window)")

    def _require(self, value: T | None, what: str, methods: str) -> T:
        """Return the value, or raise and say which methods' fits have it."""
        # A fit that was interrupted has the method, but not yet the curvature.
        if value is None:
            raise ValueError(
                f"the fit is of method {self.method!r} and holds no {what}; a fit of method "
                f"{methods} holds them once it is complete."
            )
        return value


def fit(
    objective: Objective,
    layout: Layout,
    params: Params,
    batches: Iterable[Batch],
    key: PRNGKey,
    *,
    method: str = "ekfac",
    fisher: str = "mc",
    microbatch: int | None = None,
    folder: Path | str | Saving | None = None,
    progress: bool = True,
) -> Fitted:
    """Fit the curvature of the mean loss over a data set, for `influence` and `self_influence`.

    The method "ekfac" makes three passes: over the covariances of inputs and output-gradients, over
    the eigenbases of both (without data), and over the second moments of the examples' gradients in
    these bases, which correct the eigenvalues. Each pass is a sum over batches. For a
    `weighted_sum` of losses a pass before them counts the terms.

    One fit serves every query, at any damping, and also the methods "kfac", "identity" and "cg" of
    `influence`.

    Args:
      objective: the `curvax.Objective` whose curvature is fitted.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`. Leaves (and
        parts of leaves) of kind "identity" are held fixed: they take no part in influence. Leave
        out embeddings or norms by `layout.edit(path, kind="identity")`.
      params: pytree of float arrays.
      batches: as in `curvax.kron.fit_moments`.
      key: JAX key, for "mc".
      method: "ekfac"; "kfac", which saves one pass; "diagonal", the diagonal of the Fisher; or
        "identity", which counts terms only.
      fisher: as in `curvax.kron.fit_factors`.
      microbatch: the number of rows worked on at a time.
      folder: the folder in which the passes are saved, as in `curvax.kron.fit_factors`.
      progress: whether a progress bar is shown for each pass.

    Returns:
      `Fitted`. Parts of a data set can also be fitted separately and merged, as in the example.
      (`curvax.kron.merge` says for which losses and estimators that is exact; `fit` always is.)

    Raises:
      ValueError, TypeError: as `curvax.kron.fit_moments`.

    Cost: for each example a forward and a backward pass in each of the two passes over the data,
      and the products there (see `kron_factors` and `kron_moments`), and an eigendecomposition of
      every full factor. Memory: one batch, and twice the factors.

    Example: the fits of two halves of the data, perhaps from two machines, merged and completed.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 1))
      >>> params, halves = jnp.zeros((2, 1)), [(x[:1], y[:1]), (x[1:], y[1:])]
      >>> layout, key = curvax.kron_layout(objective, params, (x, y)), jax.random.key(0)
      >>> fitted = influence.fit(
      ...     objective, layout, params, halves, key, fisher="exact", progress=False
      ... )
      >>> fitted.eigen.moments[""].mean.ravel().tolist(), fitted.terms.item()
      ([0.5, 4.5], 2.0)
      >>> factors = curvax.kron.estimator(objective, layout, fisher="exact")
      >>> merged = curvax.kron.merge(*[factors(params, half, key) for half in halves])
      >>> basis = curvax.kron.kron_basis(layout, merged)
      >>> def moments(half):
      ...     return curvax.kron.kron_moments(
      ...         objective, layout, basis, params, half, key, fisher="exact"
      ...     )
      >>> eigen = curvax.kron.merge(*map(moments, halves))
      >>> completed = influence.Fitted(
      ...     factors=merged, eigen=eigen, window=None, terms=jnp.array(2.0), layout=layout,
      ...     method="ekfac",
      ... )
      >>> bool(jnp.allclose(eigen.moments[""].mean, fitted.eigen.moments[""].mean))
      True

    References: Grosse et al. (2023), Studying large language model generalization with influence
      functions, section 3, https://arxiv.org/abs/2308.03296.

    Deviates: all leaves that are not held fixed take part, and those in no block with the diagonal
      of the Fisher; the paper keeps only the weights of the multilayer perceptrons.
    """
    # The method only chooses the passes; what a pass does is stated in `kron._fit_passes`.
    check_choice("method", method, PASSES_OF)
    options = fit_options(fisher, microbatch)
    passes = PASSES_OF[method](objective, layout, options)
    results = fit_passes(
        passes,
        layout,
        params,
        batches,
        key,
        method=method,
        options=options,
        folder=folder,
        progress=progress,
    )
    return _fitted(results, layout, method, missing=())


def load(folder: Path | str, objective: Objective, layout: Layout, params: Params) -> Fitted:
    """Read what `fit` has saved in a folder.

    Args:
      folder: the folder that was given to `fit`, or to `curvax.kron.fit_factors` or `fit_moments`.
      objective: the `curvax.Objective` that was fitted.
      layout: the `Layout` that it was fitted with.
      params: the params at which it was fitted.

    Returns:
      `Fitted`. If the fit was interrupted, `missing` names the passes that are not complete, and
      `influence` refuses it: call `fit` again with the same arguments.

    Raises:
      ValueError: the folder holds a fit of other leaves, of other values of params (named by path),
        or of another layout.
      FileNotFoundError: the folder holds no fit.

    Cost: that of reading the files.

    Example: `fitted = influence.load("out/fit", objective, layout, params)`, after
      `fit(..., folder="out/fit")`.
    """
    # The folder says which method and which Fisher were fitted; the rest must be as it is given.
    saved = read_facts(folder)
    store = open_store(Saving(folder), facts_of(layout, params))
    # A microbatch changes no shape of what is saved, and need not be known.
    options = fit_options(saved["fisher"], microbatch=None)
    method: str = saved["method"]
    check_choice("method", method, PASSES_OF)
    passes = PASSES_OF[method](objective, layout, options)
    results, missing = read_passes(passes, params, store)
    return _fitted(results, layout, method, missing)


def _fitted(results: FitResults, layout: Layout, method: str, missing: tuple[str, ...]) -> Fitted:
    """Assemble the results of the passes, as far as they are complete."""
    # A window is not fitted in passes: `influence.of_window` takes one that the user has made.
    return Fitted(
        factors=results.factors,
        eigen=results.eigen,
        window=None,
        terms=results.terms,
        layout=layout,
        method=method,
        missing=missing,
    )
