"""Fit Kronecker-factored curvature to a data set of any size, batch by batch, saved as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm

from curvax._checks import check_count, check_params
from curvax._host import is_first_process
from curvax._stream import check_rereadable, on_device
from curvax._types import Batch, Params, PRNGKey, Scalar
from curvax._xla import with_auto_sharding
from curvax.capture._cotangents import check_fisher
from curvax.kron._accumulate import PassOptions, check_one_part
from curvax.kron._factors import Factors
from curvax.kron._fit_passes import (
    DataPass,
    DerivedPass,
    FitPass,
    FitResults,
    factor_passes,
    fit_options,
    moment_passes,
)
from curvax.kron._layout import Layout, check_layout
from curvax.kron._moments import EigenFactors
from curvax.kron._storage import (
    Position,
    Saving,
    Snapshot,
    Store,
    as_saving,
    checksum,
    facts_of,
    open_store,
)
from curvax.losses import Loss
from curvax.objective import Objective, for_auto_sharding, total_terms

_ADVICE = "Give the same batches in the same order, or another folder."


def fit_factors(
    objective: Objective,
    layout: Layout,
    params: Params,
    batches: Iterable[Batch],
    key: PRNGKey,
    *,
    fisher: str = "mc",
    microbatch: int | None = None,
    folder: Path | str | Saving | None = None,
    progress: bool = True,
) -> Factors:
    """Fit the Kronecker factors of the mean loss over a whole data set, one batch at a time.

    The result is that of `kron_factors` on all batches joined: for "exact" and "empirical" to
    rounding, for "mc" with other draws.

    Args:
      objective: the `curvax.Objective` whose curvature is fitted.
      layout: the `Layout` returned by `curvax.kron_layout(objective, params, batch)`.
      params: pytree of float arrays.
      batches: an iterable of `(inputs, targets)`: a list, a generator, a PyTorch DataLoader; arrays
        of NumPy, JAX or PyTorch, also sharded over devices. It must be possible to iterate over it
        twice, in the same order, if terms are counted first: with a `weighted_sum` of losses.
      key: JAX key, for "mc". The draws of a row depend on its number in the data set, not on the
        batch that it is in.
      fisher: "mc" uses targets sampled from the model, "exact" their expectation, "empirical" the
        targets of the data.
      microbatch: the number of rows worked on at a time.
      folder: the folder in which the fit is saved, every 100 batches, or with another number
        `curvax.kron.Saving(folder, every)`. An interrupted fit, even one whose process was
        killed, resumes when it is called again with the same arguments, and its result is equal in
        every bit. A complete fit is read back. The layout, the values of the params, the key,
        `fisher` and the batches are checked to be the same; the objective is not. Several processes
        need a folder that all of them see.
      progress: whether a progress bar is shown for each pass.

    Returns:
      `Factors`, for `curvax.kron_inverse(layout, factors, damping)`.

    Raises:
      ValueError: there is no batch; the layout belongs to other params; the folder holds a fit of
        other leaves, values of params, key or options (named by path); a pass goes through other
        batches than an earlier pass did, or than before the interruption; the model mixes examples.
      TypeError: `batches` is an iterator, and more than one pass is needed.

    Cost: that of `kron_factors` for each batch, with examples told apart. Memory: one batch in work
      and the next one, and twice the factors.

    Example: a data set in two batches of different size.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
      >>> batches = [(x[:2], jnp.zeros((2, 1))), (x[2:], jnp.zeros((1, 1)))]
      >>> layout, key = curvax.kron_layout(objective, params, batches[0]), jax.random.key(0)
      >>> options = {"fisher": "exact", "progress": False}
      >>> factors = curvax.kron.fit_factors(objective, layout, params, batches, key, **options)
      >>> factors.blocks[""].a.mean[0].tolist()
      [[0.33..., 0.0], [0.0, 3.0]]

    References: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored
      approximate curvature, section 3, https://arxiv.org/abs/1503.05671.
    """
    options = fit_options(fisher, microbatch)
    results = fit_passes(
        factor_passes(objective, layout, options),
        layout,
        params,
        batches,
        key,
        method="kfac",
        options=options,
        folder=folder,
        progress=progress,
    )
    return results.require_factors()


def fit_moments(
    objective: Objective,
    layout: Layout,
    params: Params,
    batches: Iterable[Batch],
    key: PRNGKey,
    *,
    fisher: str = "mc",
    microbatch: int | None = None,
    folder: Path | str | Saving | None = None,
    progress: bool = True,
) -> EigenFactors:
    """Fit the EK-FAC curvature of the mean loss over a whole data set, one batch at a time.

    Three passes: the Kronecker factors of all batches (as `fit_factors`), their eigenbases (which
    need no data), and the second moments of all examples' gradients in these bases. Each pass over
    the data has its own draws.

    Args:
      objective: the `curvax.Objective` whose curvature is fitted.
      layout: its `Layout`.
      params: pytree of float arrays.
      batches: as in `fit_factors`, but iterated over again and again: a list, a DataLoader.
      key: JAX key, for "mc".
      fisher: as in `fit_factors`.
      microbatch: the number of rows worked on at a time.
      folder: as in `fit_factors`.
      progress: whether a progress bar is shown for each pass.

    Returns:
      `EigenFactors`, for `curvax.kron_inverse(layout, eigen_factors, damping)`.

    Raises:
      ValueError: as `fit_factors`.
      TypeError: `batches` is an iterator.

    Cost: that of `kron_factors` and of `kron_moments` for each batch, and an eigendecomposition of
      every full factor, on the host in float64. Memory: as `fit_factors`.

    Example: for a linear model the moments are the eigenvalues of the Gauss-Newton matrix.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> params, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> batches = [(x[:1], jnp.zeros((1, 1))), (x[1:], jnp.zeros((1, 1)))]
      >>> layout, key = curvax.kron_layout(objective, params, batches[0]), jax.random.key(0)
      >>> options = {"fisher": "exact", "progress": False}
      >>> eigen = curvax.kron.fit_moments(objective, layout, params, batches, key, **options)
      >>> eigen.moments[""].mean.ravel().tolist()
      [0.5, 4.5]

    References: George et al. (2018), Fast approximate natural gradient descent in a
      Kronecker-factored eigenbasis, https://arxiv.org/abs/1806.03884.
    """
    options = fit_options(fisher, microbatch)
    results = fit_passes(
        moment_passes(objective, layout, options),
        layout,
        params,
        batches,
        key,
        method="ekfac",
        options=options,
        folder=folder,
        progress=progress,
    )
    return results.require_eigen()


def fit_passes(
    passes: Sequence[FitPass],
    layout: Layout,
    params: Params,
    batches: Iterable[Batch],
    key: PRNGKey,
    *,
    method: str,
    options: PassOptions,
    folder: Path | str | Saving | None,
    progress: bool,
) -> FitResults:
    """Run passes one after the other, each given the results of those before it.

    Args:
      passes: the passes in their order.
      layout: the `Layout` that the passes have.
      params: pytree of float arrays.
      batches: an iterable of `(inputs, targets)`.
      key: JAX key, from which every pass gets one of its own.
      method: a name for the list of passes, saved with the fit.
      options: the `PassOptions` that the passes have.
      folder: the folder in which the fit is saved, as in `fit_factors`.
      progress: whether a progress bar is shown for each pass.

    Returns:
      `FitResults` of all passes.
    """
    check_params(params)
    check_layout(layout, params)
    check_fisher(options.fisher, options.num_samples)
    saving = as_saving(folder)
    for one_pass in passes:
        if isinstance(one_pass, DataPass):
            check_one_part(one_pass.objective)
    # An iterator is exhausted after one pass.
    if len(passes) > 1:
        check_rereadable(batches)
    if options.microbatch is not None:
        check_count(1, microbatch=options.microbatch)
    # A fit that is saved is identified by its layout, params, key and choices; the microbatch is
    # none of them: it changes only the rounding.
    facts: dict[str, Any] = {}
    if saving is not None:
        choices = {"method": method, "fisher": options.fisher, "key": int(checksum(key))}
        facts = facts_of(layout, params) | choices
    store = open_store(saving, facts)
    results = FitResults()
    previous: Position | None = None
    for number, one_pass in enumerate(passes):
        if isinstance(one_pass, DerivedPass):
            results = one_pass.put(results, _derived(one_pass, results, params, store))
            continue
        # Every pass draws for itself: in the basis of the very samples that they are measured on,
        # second moments would come out too large.
        pass_key = jax.random.fold_in(key, number)
        contribution = partial(_contribution, one_pass, results, params, pass_key)
        init, name = _init_counted(one_pass, params), one_pass.name
        snapshot = _sum_over_batches(name, init, contribution, batches, store, progress)
        # All passes must see the same data: the basis belongs to the examples whose moments follow.
        _check_same_data(name, snapshot.position, previous)
        results, previous = _put_counted(one_pass, results, snapshot.value), snapshot.position
    return results


def read_passes(
    passes: Sequence[FitPass], params: Params, store: Store
) -> tuple[FitResults, tuple[str, ...]]:
    """Read the complete passes of a folder; also return the names of the passes that are missing.

    Reading ends at the first pass that is not complete: a later pass that is saved was computed
    from another result of this one.
    """
    results = FitResults()
    for number, one_pass in enumerate(passes):
        put: Callable[[FitResults, Any], FitResults]
        if isinstance(one_pass, DerivedPass):
            like, put = one_pass.shapes(params), one_pass.put
        else:
            like, put = _init_counted(one_pass, params), partial(_put_counted, one_pass)
        snapshot = store.read(one_pass.name, like)
        if snapshot is None or not snapshot.position.complete:
            return results, tuple(missing.name for missing in passes[number:])
        results = put(results, snapshot.value)
    return results, ()


class Counted(NamedTuple):
    """The sum of a pass over data, and the number of terms that it covers.

    Attributes:
      value: the sum of the pass's contributions.
      terms: the number of terms in the batches, which is counted in every pass.
    """

    value: Any
    terms: PyTree[Scalar]


def _init_counted(one_pass: DataPass, params: Params) -> Counted:
    """Return the zeros of a pass and of its count of terms."""
    # Terms are counted in float32 or wider: a user's loss may weigh them.
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))

    def init(params: Params) -> Counted:
        return Counted(one_pass.init(params), _init_terms(one_pass.objective.loss, dtype))

    # From NumPy: zeros of JAX are a program for every shape, half a second to compile.
    shapes = jax.eval_shape(init, params)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    on_device_zeros: Counted = jax.device_put(zeros)
    return on_device_zeros


def _init_terms(loss: Loss, dtype: Any) -> PyTree[Scalar]:
    """Return zero terms; of a `weighted_sum` a dict by head, as `total_terms` returns it."""
    if not loss.heads:
        return jnp.zeros([], dtype)
    return {name: _init_terms(head, dtype) for name, _, head in loss.heads}


def _put_counted(one_pass: DataPass, results: FitResults, counted: Counted) -> FitResults:
    # The first pass's count stands: those of later passes are the same.
    if results.terms is None:
        results = results._replace(terms=counted.terms)
    return one_pass.put(results, counted.value)


@partial(jax.jit, static_argnums=0)
def _contribution(
    one_pass: DataPass,
    results: FitResults,
    params: Params,
    key: PRNGKey,
    batch: Batch,
    first: Array,
) -> Counted:
    """Return what one batch adds to a pass, with its number of terms."""
    objective = for_auto_sharding(one_pass.objective, params, batch)
    count = partial(total_terms, objective, microbatch=one_pass.options.microbatch)
    terms = with_auto_sharding(count, params, batch)
    return Counted(one_pass.contribution(results, params, batch, key, first), terms)


@partial(jax.jit, donate_argnums=0)
def _add(sums: Counted, batch_sums: Counted) -> Counted:
    # In the dtype of the sum, which is float32 at least; its memory is reused (donated).
    total: Counted = jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, batch_sums)
    return total


def _sum_over_batches(
    name: str,
    init: Counted,
    contribution: Callable[[Batch, np.uint32], Counted],
    batches: Iterable[Batch],
    store: Store,
    progress: bool,
) -> Snapshot:
    """Add up the batches' contributions, from where a saved pass ended; save on the way."""
    saved = store.read(name, init) or Snapshot(init, Position())
    # The data are always read from their beginning: batches that are in the saved sums are only
    # compared by checksum, so that a resumed fit cannot go on with other data.
    sums, position = saved.value, Position()
    is_shown = progress and is_first_process() and not saved.position.complete
    bar = tqdm(batches, desc=name, unit="batch", disable=not is_shown)
    for batch in on_device(bar):
        first = np.uint32(position.examples)
        position = position.after(batch, with_digest=store.folder is not None)
        _check_same_batches(name, position, saved.position)
        if saved.position.complete:  # only the first batch was needed, for the check
            return saved
        if position.batches <= saved.position.batches:  # added before the interruption
            continue
        # JAX computes asynchronously. Waiting for the sum up to the batch before keeps one batch in
        # work while the next one is fetched, and no more than these two in memory.
        jax.block_until_ready(sums)
        sums = _add(sums, contribution(batch, first))
        if position.batches % store.save_every == 0:
            store.write(name, sums, position)
    if position.batches == 0 or position.batches < saved.position.batches:
        expected = saved.position.batches or "at least 1"
        raise ValueError(
            f"the pass over {name} found {position.batches} batches where {expected} were expected."
        )
    position = position._replace(complete=True)
    store.write(name, sums, position)
    return Snapshot(sums, position)


def _check_same_batches(name: str, position: Position, saved: Position) -> None:
    """Raise if the batches so far are not those that the saved pass began with."""
    if saved.batches and position.begin != saved.begin:
        raise ValueError(f"the pass over {name} that is saved began with another batch. {_ADVICE}")
    was_interrupted_here = not saved.complete and position.batches == saved.batches
    if was_interrupted_here and position != saved:
        raise ValueError(
            f"the pass over {name} was interrupted after {saved.batches} batches, "
            f"{saved.examples} examples; the first {position.batches} batches now are not the "
            f"same, with {position.examples} examples. {_ADVICE}"
        )


def _check_same_data(name: str, position: Position, previous: Position | None) -> None:
    """Raise if a pass has gone through other batches than the pass before it."""
    if previous not in (None, position):
        raise ValueError(
            f"the pass over {name} went through {position.examples} examples in "
            f"{position.batches} batches, the one before through {previous.examples} in "
            f"{previous.batches}, or through others. {_ADVICE}"
        )


def _derived(one_pass: DerivedPass, results: FitResults, params: Params, store: Store) -> Any:
    """Read the result of a pass that needs no data, or compute and save it."""
    snapshot = store.read(one_pass.name, one_pass.shapes(params))
    if snapshot is not None:
        return snapshot.value
    # There is nothing to resume within it: it is saved when it is complete.
    value = one_pass.derive(results)
    store.write(one_pass.name, value, Position(complete=True))
    return value
