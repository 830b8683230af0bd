"""The Gauss-Newton matrix of a batch in the space of its examples and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float

from curvax._batch import check_batch
from curvax._checks import check_choice, check_params
from curvax._shared import unwrap
from curvax._types import Batch, Outputs, Params, Targets, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.kron._build_layout import kron_layout
from curvax.kron._gram import gram
from curvax.kron._tapping import record
from curvax.losses import Loss
from curvax.objective import Objective
from curvax.products import ggnvp, to_dense
from curvax.products._linear import linearize
from curvax.solve._direct import Dense, Formed, SampleSpace

SPACES = {"auto": "the smaller one", "samples": "examples x outputs", "params": "parameters"}

# b: examples of the batch, c: outputs of an example, n = c b: rows, d: parameters


def sample_space(
    objective: Objective, params: Params, batch: Batch, *, space: str = "auto"
) -> Formed:
    """Form the Gauss-Newton matrix of a batch for exact solves, in the smaller of two spaces.

    `F = J'S J = U U'`, with S the output-space curvature (as in `curvax.ggnvp`), `S = R R'` by example, `U = J'R`. Where
    the batch has fewer outputs n than there are parameters d, `U'U` is formed, and `(F + damping I)^-1` is applied through
    it; else F itself. No Jacobian is formed: `U'U` is the sum over layers of products of inner products of the layers'
    inputs and output-gradients. Negative curvature (of a user's loss) counts as none in sample space.

    Args:
      objective: a `curvax.Objective`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      space: "auto", "samples" or "params".

    Returns:
      what `curvax.solve.direct` takes; a pytree, so it may cross `jit`.

    Raises:
      ValueError: unknown space; in sample space: models that mix examples (BatchNorm in training), outputs without the
        batch's leading axis.
      TypeError: a kernel with a backward pass only.

    Cost: in sample space c backward passes without kernels' gradients, and for each dense layer `n^2 (in / c^2 + out)`
      multiplications; where a kernel meets several positions of an example (convolutions, sequences) `n^2 in out`. Memory:
      `n^2` floats, c times the activations. In parameter space d Gauss-Newton products, `d^2` floats.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])                                     # F = x'x / 2
      >>> space = curvax.kron.sample_space(objective, jnp.zeros(3), (x, jnp.zeros(2)))
      >>> space.gram.round(4).tolist()                                                         # x x' / 2
      [[2.5, 0.0], [0.0, 4.5]]
      >>> step, info = curvax.solve.direct(space, jnp.ones(3), damping=0.5)
      >>> [round(v, 4) for v in step.tolist()]
      [1.0, 0.2, 0.0]

    References: Korbit et al. (2024), Exact Gauss-Newton optimization for training deep neural networks, whose system
      `(S J J' + damping I) q = r` is made symmetric here by the root of S.
    """
    check_choice("space", space, SPACES)
    check_params(params)
    check_batch(batch)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: objective.outputs(params, batch[0])))
    num_rows = sum(math.prod(s.shape) for s in shapes)
    if space == "params" or (
        space == "auto" and num_rows > sum(x.size for x in jax.tree.leaves(params))
    ):
        return Dense(
            at_least_float32(to_dense(ggnvp(objective, params, batch), params, chunk_size=8))
        )
    return _of_rows(objective, params, batch)


def _of_rows(objective: Objective, params: Params, batch: Batch) -> SampleSpace:
    inputs, targets = batch
    outputs, jacobian = linearize(
        lambda p: objective.outputs(p, inputs), params, "Use curvax.gauss_newton_bartlett."
    )
    roots, gradient = _roots(objective.loss, outputs, targets)

    def products(params: Params, batch: Batch, roots: Array) -> Float[Array, "n n"]:
        layout = kron_layout(objective, params, batch, unmatched="diagonal")
        recorded = record(objective, layout, params, batch[0], by_example=True)
        columns = jnp.moveaxis(roots, -1, 0)  # [k, b, c]: the k-th cotangent of every example
        pulled = jax.vmap(lambda r: recorded.pull(_unflatten(r, recorded.outputs)))(columns)
        return gram(layout, recorded, pulled)

    own = with_auto_sharding(products, params, batch, roots)
    push, pull = (
        Partial(_push, jacobian, roots, params),
        Partial(_pull, jacobian, roots, params, outputs),
    )
    return SampleSpace(own, push, pull, gradient)


def _roots(
    loss: Loss, outputs: Outputs, targets: Targets
) -> tuple[Float[Array, "b c c"], Float[Array, " n"]]:
    """Return R with `R_b R_b' = S_b`, the curvature of the mean loss in the outputs of each example, and `R^-1` its
    gradient.
    """
    flat = _flatten(outputs)
    product = lambda e: _flatten(
        loss.curvature_product(
            outputs, unwrap(targets), _unflatten(jnp.broadcast_to(e, flat.shape), outputs)
        )
    )
    curvature = lax.map(
        product, jnp.eye(flat.shape[1], dtype=flat.dtype)
    )  # [c, b, c]: S_b is apart from other examples'
    values, vectors = jnp.linalg.eigh(jnp.moveaxis(curvature, 0, -1))
    values = jnp.sqrt(jnp.maximum(values, 0))
    residual = _flatten(jax.grad(loss)(outputs, unwrap(targets)))
    rotated = jnp.einsum("bck,bc->kb", vectors, residual, precision=lax.Precision.HIGHEST)
    gradient = rotated / jnp.where(values > 0, values, jnp.inf).T
    return vectors * values[:, None, :], gradient.ravel()


def _push(
    jacobian: Callable[[Params], Outputs], roots: Array, params: Params, v: Params
) -> Float[Array, " n"]:
    pushed = jacobian(jax.tree.map(lambda x, p: x.astype(p.dtype), v, params))
    return jnp.einsum(
        "bck,bc->kb", roots, _flatten(pushed), precision=lax.Precision.HIGHEST
    ).ravel()


def _pull(
    jacobian: Callable[[Params], Outputs],
    roots: Array,
    params: Params,
    outputs: Outputs,
    q: Float[Array, " n"],
) -> Params:
    cotangent = jnp.einsum(
        "bck,kb->bc", roots, q.reshape(roots.shape[2], -1), precision=lax.Precision.HIGHEST
    )
    (pulled,) = jax.linear_transpose(jacobian, params)(_unflatten(cotangent, outputs))
    return pulled


def _flatten(outputs: Outputs) -> Float[Array, "b c"]:
    """Put each example's outputs side by side."""
    leaves = [at_least_float32(x) for x in jax.tree.leaves(outputs)]
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)


def _unflatten(rows: Float[Array, "b c"], like: Outputs) -> Outputs:
    leaves, structure = jax.tree.flatten(like)
    sizes = [math.prod(x.shape[1:]) for x in leaves]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [
        rows[:, s : s + n].reshape(x.shape).astype(x.dtype)
        for s, n, x in zip(starts, sizes, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)
