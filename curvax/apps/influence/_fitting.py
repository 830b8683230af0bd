"""Fit the curvature that influence functions divide by, in passes over a data set of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm

from curvax._batch import batch_size
from curvax._checks import check_choice, check_count, check_params
from curvax._stream import check_rereadable, on_device
from curvax._types import Batch, Params, PRNGKey, Scalar
from curvax._xla import with_auto_sharding
from curvax.apps.influence._storage import (
    Position,
    Store,
    checksum,
    facts_of,
    open_store,
    read_facts,
)
from curvax.capture._cotangents import check_fisher
from curvax.kron._factors import (
    Factors,
    PassOptions,
    StreamPosition,
    WeightedMean,
    accumulate,
    factor_sums,
    init_factors,
    make_factors,
)
from curvax.kron._gradient_pairs import Basis
from curvax.kron._layout import Layout, check_layout
from curvax.kron._moments import EigenFactors, kron_basis, make_moments, moment_sums
from curvax.losses import Loss
from curvax.objective import Objective, total_terms
from curvax.solve import Window

PASSES = {
    "ekfac": ("covariances", "eigenbases", "eigenvalues"),
    "kfac": ("covariances",),
    "diagonal": ("eigenvalues",),
    "identity": ("terms",),
}
"""What a method goes through, in order. "eigenbases" needs no data."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fitted:
    """Curvature of a data set; a pytree.

    Attributes:
      factors: Kronecker factors, or None.
      eigen: of "ekfac" second moments in their eigenbasis, of "diagonal" in the basis of the entries themselves; or None.
      window: of "mfac", a `curvax.solve.Window` of examples' gradients; or None.
      terms: N, how many terms the mean loss is over; of a `weighted_sum` a dict by head. It is that of the data that was
        fitted: `dataclasses.replace(fitted, terms=...)` where that was a part of the training set.
      layout: that it was fitted with.
      method: that it was fitted for.
      missing: passes that have not come to their end.
    """

    factors: Factors | None
    eigen: EigenFactors | None
    window: Window | None
    terms: PyTree[Scalar]
    layout: Layout = field(metadata={"static": True})
    method: str = field(metadata={"static": True})
    missing: tuple[str, ...] = field(default=(), metadata={"static": True})


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
    folder: Path | str | None = None,
    save_every: int = 100,
    progress: bool = True,
) -> Fitted:
    """Fit the curvature of the mean loss over a data set, for `influence` and `self_influence`.

    "ekfac" goes through three passes: covariances of inputs and output-gradients, eigenbases of both (without data), and
    second moments of the examples' gradients in those bases, which correct the eigenvalues. Each is a sum over batches. (Of
    a `weighted_sum` of losses, and with "empirical", terms are counted first, in a pass of their own.)

    One fit serves every query, at any damping, and also the methods "kfac", "identity" and "cg" of `influence`.

    Args:
      objective: a `curvax.Objective`.
      layout: of `kron_layout(objective, params, batch)`. Leaves (and rests of leaves) of kind "identity" are held fixed:
        they take no part in influence. Leave out embeddings or norms by `layout.edit(path, kind="identity")`.
      params: pytree of float arrays.
      batches: iterable of `(inputs, targets)` that can be gone through again and again, in the same order: a list, a
        PyTorch DataLoader; arrays of NumPy, JAX or PyTorch, also sharded over devices.
      key: JAX key, for "mc". A row's draws depend on its number in the stream, not on the batch that it is in.
      method: "ekfac", "kfac" (one pass less), "diagonal" (of the Fisher), or "identity" (counts terms only).
      fisher: "mc", targets sampled from the model; "exact", their expectation; "empirical", the data's own targets.
      microbatch: rows worked on at a time.
      folder: where passes are saved. A fit that was interrupted, even killed, goes on from there when it is called again
        with the same arguments, to a result equal in every bit; one that is complete is read back. That leaves, params,
        choices and batches are the same is checked; of the objective nothing is saved to compare.
      save_every: batches between saves.
      progress: show a bar for each pass.

    Returns:
      `Fitted`. Parts of a data set may also be gone through apart, and merged: see the example. (`curvax.kron.merge` says for
      which losses and estimators that is exact; here it always is.)

    Raises:
      ValueError: no batch; a layout of other params; a folder with a fit of other leaves, values of params, key or choices
        (by path); passes that go through other batches than an earlier one, or than before an interruption.
      TypeError: batches that can be gone through but once.
      As `kron_moments`.

    Cost: a forward and a backward pass for an example in each of two passes over the data, and its products there: see
      `kron_factors`, `kron_moments`. An eigendecomposition for every side. Memory: one batch, two times the factors.

    Example: a fit of two halves of the data, that could have been made on two machines; merged, then completed.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros((2, 1)))
      >>> layout, key = curvax.kron_layout(objective, params, batch), jax.random.key(0)
      >>> whole = influence.fit(objective, layout, params, [batch], key, fisher="exact", progress=False)
      >>> whole.eigen.moments[""].mean.ravel().tolist(), whole.terms.item()
      ([0.5, 4.5], 2.0)
      >>> halves = [jax.tree.map(lambda x: x[i : i + 1], batch) for i in range(2)]
      >>> own = lambda half: curvax.kron_factors(objective, layout, params, half, key, fisher="exact")
      >>> factors = curvax.kron.merge(*map(own, halves))
      >>> basis = curvax.kron.kron_basis(layout, factors)
      >>> own = lambda half: curvax.kron.kron_moments(objective, layout, basis, params, half, key, fisher="exact")
      >>> merged = influence.Fitted(factors, curvax.kron.merge(*map(own, halves)), None, jnp.array(2.0), layout, "ekfac")
      >>> bool(jnp.allclose(merged.eigen.moments[""].mean, whole.eigen.moments[""].mean))
      True

    References: Grosse et al. (2023), Studying large language model generalization with influence functions, section 3.

    Deviates: all leaves that are not held fixed take part, those in no block with the diagonal of the Fisher; the paper
      keeps the weights of perceptrons only.
    """
    check_choice("method", method, PASSES)
    passes = passes_of(method, objective, fisher)
    check_params(params)
    check_layout(layout, params)
    check_fisher(fisher, 1)
    check_count(1, save_every=save_every)
    if len(passes) > 1:
        check_rereadable(batches)
    if microbatch is not None:
        check_count(1, microbatch=microbatch)
    choices = {"method": method, "fisher": fisher}
    facts = (
        {} if folder is None else facts_of(layout, params) | choices | {"key": int(checksum(key))}
    )
    store = open_store(folder, facts, save_every)
    own = objective, layout, PassOptions(fisher, 1, microbatch, by_example=True)
    found: dict[str, Any] = {}
    before = None
    for number, name in enumerate(passes):
        if name == "eigenbases":
            found[name] = _eigenbases(layout, found["covariances"][0], store)
            continue
        basis = found.get("eigenbases", _entries(layout))
        whole = found.get("terms", (None, None))  # examples, and terms
        part = partial(_part, name, own, basis, params, jax.random.fold_in(key, number), whole)
        found[name], at = _gather(
            name, part, _nothing(name, objective, layout, params), batches, store, progress
        )
        if before not in (None, at):
            raise ValueError(
                f"the pass over {name} went through {at.examples} examples in {at.batches} batches, the one before through "
                f"{before.examples} in {before.batches}, or through others. {_ADVICE}"
            )
        before = at
    return _fitted(method, passes, layout, found)


def load(folder: Path | str, objective: Objective, layout: Layout, params: Params) -> Fitted:
    """Read what `fit` has saved in a folder.

    Args:
      folder: of the fit.
      objective: that was fitted.
      layout: that it was fitted with.
      params: that it was fitted at.

    Returns:
      `Fitted`. If it was interrupted, `missing` names the passes that have not come to their end, and `influence` does not
      take it: call `fit` again, with the arguments that it had.

    Raises:
      ValueError: a fit of other leaves or values of params (by path), or of another layout.
      FileNotFoundError: a folder without a fit.

    Cost: reading.

    Example: `fitted = influence.load("out/fit", objective, layout, params)`, after `fit(..., folder="out/fit")`.
    """
    facts = read_facts(folder)
    passes = passes_of(facts["method"], objective, facts["fisher"])
    store, found = open_store(folder, facts_of(layout, params), 1), dict[str, Any]()
    for name in passes:
        like = (
            _bases_like(layout, params)
            if name == "eigenbases"
            else _nothing(name, objective, layout, params)
        )
        saved = store.read(name, like)
        if saved is not None and saved[1].complete:
            found[name] = saved[0]
    return _fitted(facts["method"], passes, layout, found)


def passes_of(method: str, objective: Objective, fisher: str) -> tuple[str, ...]:
    """Return the passes of a fit: terms are counted first where batches do not merge by their own terms."""
    apart = PASSES[method] != ("terms",) and (objective.loss.heads or fisher == "empirical")
    return ("terms", *PASSES[method]) if apart else PASSES[method]


def _fitted(
    method: str, passes: tuple[str, ...], layout: Layout, found: Mapping[str, Any]
) -> Fitted:
    """Put together what passes have found, those that are missing left out."""
    factors, _ = found.get("covariances", (None, None))
    basis = found.get("eigenbases", _entries(layout))
    eigen = EigenFactors(basis, *found["eigenvalues"][0]) if "eigenvalues" in found else None
    terms = next((found[name][1] for name in found if name != "eigenbases"), None)
    missing = tuple(name for name in passes if name not in found)
    return Fitted(factors, eigen, None, terms, layout, method, missing)


def _gather(
    name: str,
    part: Callable[..., Any],
    nothing: Any,
    batches: Iterable[Batch],
    store: Store,
    progress: bool,
) -> tuple[Any, Position]:
    """Sum `part(batch, number of its first row)` over batches, from where the store has it; save as it goes."""
    sums, saved = store.read(name, nothing) or (nothing, Position())
    at = Position()
    for batch in on_device(
        tqdm(batches, desc=name, unit="batch", disable=saved.complete or not progress)
    ):
        first, at = at.examples, at.after(batch, with_digest=store.folder is not None)
        if saved.batches and at.begin != saved.begin:
            raise ValueError(
                f"the pass over {name} that is saved began with another batch. {_ADVICE}"
            )
        if saved.complete:
            return sums, saved
        if at.batches <= saved.batches:  # taken in before the interruption
            if at.batches == saved.batches and at != saved:
                raise ValueError(
                    f"the pass over {name} was interrupted after {saved.batches} batches, {saved.examples} examples; the "
                    f"first {at.batches} batches now are not the same, with {at.examples} examples. {_ADVICE}"
                )
            continue
        jax.block_until_ready(sums)  # one batch is worked on while the next one is fetched, no more
        sums = _add(sums, part(batch, np.uint32(first)))
        if at.batches % store.every == 0:
            store.write(name, sums, at)
    if at.batches == 0 or at.batches < saved.batches:
        raise ValueError(
            f"the pass over {name} found {at.batches} batches where {saved.batches or 'at least 1'} were expected."
        )
    at = at._replace(complete=True)
    store.write(name, sums, at)
    return sums, at


_ADVICE = "Give the same batches in the same order, or another folder."


@partial(jax.jit, static_argnums=(0, 1))
def _part(
    name: str,
    own: Any,
    basis: Any,
    params: Params,
    key: PRNGKey,
    whole: tuple[Any, Any],
    batch: Batch,
    first: Array,
) -> tuple[Any, Any]:
    """Return what a batch adds to a pass, and its number of terms."""
    (objective, layout, how), (examples, totals) = own, whole
    count = lambda params, batch: total_terms(objective, params, batch, how.microbatch)
    counted = with_auto_sharding(count, params, batch)
    if name == "terms":
        return jnp.int32(batch_size(batch)), counted
    statistic = factor_sums(layout) if name == "covariances" else moment_sums(layout, basis)
    sums, terms = accumulate(
        objective,
        layout,
        params,
        batch,
        key,
        statistic,
        how,
        StreamPosition(first, totals, examples),
    )
    if name == "covariances":
        inputs, products, squares = sums
        return make_factors(inputs, products, squares, terms), counted
    return make_moments(sums, terms), counted


@partial(jax.jit, donate_argnums=0)
def _add(sums: Any, part: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, part)


def _nothing(name: str, objective: Objective, layout: Layout, params: Params) -> tuple[Any, Any]:
    """Return what a pass begins with."""
    terms = _no_terms(objective.loss, jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
    if name == "terms":
        return jnp.int32(0), terms
    factors = init_factors(layout, params)
    if name == "covariances":
        return factors, terms
    dtypes = {block.name: factors.blocks[block.name].g.total.dtype for block in layout.blocks}
    zeros = {
        b.name: WeightedMean(jnp.zeros(b.shape, dtypes[b.name]), jnp.zeros([], dtypes[b.name]))
        for b in layout.blocks
    }
    return (zeros, factors.diagonal), terms


def _no_terms(loss: Loss, dtype: Any) -> PyTree[Scalar]:
    return (
        {name: _no_terms(head, dtype) for name, _, head in loss.heads}
        if loss.heads
        else jnp.zeros([], dtype)
    )


def _entries(layout: Layout) -> dict[str, Basis]:
    """Return the basis of the entries themselves, for every block."""
    return {block.name: Basis(None, None) for block in layout.blocks}


def _bases_like(layout: Layout, params: Params) -> Any:
    return jax.eval_shape(partial(kron_basis, layout), init_factors(layout, params))


def _eigenbases(layout: Layout, factors: Factors, store: Store) -> dict[str, Basis]:
    saved = store.read("eigenbases", jax.eval_shape(partial(kron_basis, layout), factors))
    if saved is not None:
        read: dict[str, Basis] = saved[0]
        return read
    basis: dict[str, Basis] = _decompose(layout, factors)
    store.write("eigenbases", basis, Position(complete=True))
    return basis


@partial(jax.jit, static_argnums=0)
def _decompose(layout: Layout, factors: Factors) -> dict[str, Basis]:
    return with_auto_sharding(partial(kron_basis, layout), factors)
