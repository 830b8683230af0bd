"""Self-influence: how much each training example's own loss hangs on the example."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._batch import ENTRIES_AT_A_TIME, check_batch, map_chunks, map_examples
from curvax._checks import check_count, check_params
from curvax._shared import unwrap
from curvax._stream import on_device
from curvax._types import Batch, Params, Scalar
from curvax._xla import with_auto_sharding
from curvax.apps.influence._fitting import Fitted
from curvax.apps.influence._methods import check_fitted, dampings
from curvax.apps.influence._scoring import flat, share_gradient
from curvax.capture import record
from curvax.kron._gradient_pairs import Basis, rotated_pairs
from curvax.kron._gradient_products import squares_by_example
from curvax.kron._layout import Layout, check_layout
from curvax.kron._operator import EigenOperator, KronOperator, kron_operator
from curvax.kron._plan import layout_plan
from curvax.losses._shares import term_counts
from curvax.objective import Objective


def self_influence(
    fitted: Fitted,
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    *,
    damping: Any = None,
    method: str | None = None,
    microbatch: int | None = None,
) -> Float[Array, " examples"]:
    """Predict how much each training example's own mean loss would rise if the example were removed, in one pass.

    It is the diagonal of `influence` with the training examples as queries. Large where only memory of the example
    explains it: wrong labels, outliers.

    Args:
      fitted: of `fit`.
      objective: that of training.
      params: that were fitted.
      batches: iterable of `(inputs, targets)`; wrap it in `tqdm.tqdm` to see progress.
      damping: as in `influence`.
      method: None, that of the fit; "ekfac", "kfac", "diagonal" or "identity".
      microbatch: examples worked on at a time; None: as many as bring gradients of a block to 64 MB.

    Raises:
      As `influence`.

    Example: of two examples in one direction each, that which is alone in its own.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import influence
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> params, batch = jnp.zeros((2, 1)), (x, jnp.ones((3, 1)))
      >>> layout = curvax.kron_layout(objective, params, batch)                                       # F = diag(2/3, 1/3)
      >>> fitted = influence.fit(objective, layout, params, [batch], jax.random.key(0), fisher="exact", progress=False)
      >>> own = influence.self_influence(fitted, objective, params, [batch], damping=1e-6)
      >>> own.round(2).tolist()
      [0.5, 0.5, 1.0]

    Cost: for every example a forward and a backward pass (two for a `weighted_sum`), `in^2 + out^2` multiplications a block
      and position, and `in out`, for each position where there are several.
    """
    method = check_fitted(fitted, method)
    if method in ("cg", "mfac"):
        raise ValueError(
            f"self_influence goes by the methods 'ekfac', 'kfac', 'diagonal' and 'identity', got {method!r}. "
            "Call influence with the training examples as queries: its diagonal is their self-influence."
        )
    check_params(params)
    check_layout(fitted.layout, params)
    powers = _powers(
        fitted, method, None if method == "identity" else dampings(fitted, method, damping)
    )
    run = partial(_self_score, (objective, fitted.layout, microbatch), powers, fitted.terms, params)
    found = [run(batch) for batch in on_device(batches)]
    if not found:
        raise ValueError("batches is empty; give at least one (inputs, targets).")
    return jnp.concatenate(found)


def _powers(fitted: Fitted, method: str, damping: Any) -> KronOperator:
    layout = fitted.layout
    if method == "identity":
        blocks = {
            block.name: EigenOperator(None, None, jnp.ones(block.shape)) for block in layout.blocks
        }
        return KronOperator(
            blocks,
            {leaf.path: jnp.ones([]) for leaf in layout.leaves if leaf.outside == "diagonal"},
        )
    factors = fitted.factors if method == "kfac" else fitted.eigen
    assert factors is not None
    return kron_operator(layout, factors, damping)


@partial(jax.jit, static_argnums=0)
def _self_score(
    own: Any, powers: KronOperator, terms: PyTree[Scalar], params: Params, batch: Batch
) -> Array:
    objective, layout, microbatch = own
    check_batch(batch)

    def run(powers: KronOperator, terms: PyTree[Scalar], params: Params, batch: Batch) -> Any:
        of_chunk = lambda chunk: _self_parts(objective, layout, powers, terms, params, chunk)
        auto = max(1, ENTRIES_AT_A_TIME // max([1, *(math.prod(b.shape) for b in layout.blocks)]))
        rows = auto if microbatch is None else microbatch
        check_count(1, microbatch=rows)
        return map_chunks(of_chunk, batch, rows)

    scores: Array = with_auto_sharding(run, powers, terms, params, batch)
    return scores


def _self_parts(
    objective: Objective,
    layout: Layout,
    powers: KronOperator,
    terms: PyTree[Scalar],
    params: Params,
    chunk: Batch,
) -> Float[Array, " examples"]:
    """Return `grad f_b . P grad L_b / N` with f_b the example's mean loss."""
    plan = layout_plan(objective, layout, params, chunk[0], per_example=True)
    recorded = record(plan, params, chunk[0])

    def squares(cotangent: Any) -> Array:
        pulled = recorded.pull(cotangent)
        parts = [
            jnp.sum(flat(x) ** 2 * jnp.where(own, power, 0).ravel(), axis=1)
            for path, x in pulled.outside.items()
            for own, power in [(layout.uncovered(path), powers.diagonal[path])]
        ]
        for block in layout.blocks:
            power, rows = (
                powers.blocks[block.name],
                (recorded.inputs[block.name], pulled.blocks[block.name]),
            )
            assert isinstance(power, EigenOperator)
            basis = Basis(power.left, power.right)
            parts.append(squares_by_example(block, power, rotated_pairs(block, basis, *rows)))
        return jnp.asarray(sum(parts))

    share = share_gradient(objective, recorded, chunk[1], terms)
    rows = recorded.outputs, chunk[1]
    if not objective.loss.heads:  # the example's mean loss is N / n_b of its part of the whole
        counts = map_examples(lambda row: term_counts(objective.loss, *row), rows)
        scores: Array = squares(share) * terms / jnp.maximum(counts, 1)
        return scores
    # With several heads it is not. Then 4 u . P v = |u + v|^2 - |u - v|^2, u brought to the size of v.
    own = map_examples(
        lambda row: jax.grad(lambda f: objective.loss(f, unwrap(row[1])))(row[0]), rows
    )
    size = sum(jax.tree.leaves(terms))
    u = jax.tree.map(lambda x, v: (x[:, 0] / size).astype(v.dtype), own, share)
    plus, minus = (jax.tree.map(lambda x, y, sign=sign: x + sign * y, u, share) for sign in (1, -1))
    return size * (squares(plus) - squares(minus)) / 4
