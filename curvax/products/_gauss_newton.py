"""Gauss-Newton and Fisher products: `v -> J' M J v`, with M a matrix on the model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from curvax._batch import batch_size
from curvax._checks import check_count, describe
from curvax._shared import unwrap
from curvax._types import Batch, Matvec, Outputs, Params, PRNGKey, Targets, tree_at_least_float32
from curvax.losses import Loss
from curvax.losses._shares import pseudo_gradient_by_example
from curvax.objective import Objective
from curvax.products._linear import linearize, over_batch

OutputMatvec: TypeAlias = Callable[[Outputs], Outputs]
OutputCurvature: TypeAlias = Callable[[Loss, Outputs, Targets, Array], OutputMatvec]
"""From a loss, outputs, targets (with their `Shared` parts still wrapped) and row numbers to the matrix M."""


def ggnvp(
    objective: Objective, params: Params, batch: Batch, *, microbatch: int | None = None
) -> Matvec:
    """Build the product with the generalized Gauss-Newton matrix of the mean loss, `v -> J' S J v`.

    J is the Jacobian of the model's outputs, S the output-space curvature `loss.curvature_product` (scaled by 1 / num_terms, as that of
    the mean). Positive semidefinite whenever S is; equal to the Hessian for models linear in params, and to the Fisher
    for losses that are negative log-likelihoods in their natural parameter.

    Args:
      objective: a `curvax.Objective`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      microbatch: rows worked on at a time; the same result in bounded memory.

    Returns:
      `matvec(v) -> tree like v`: linear, self-adjoint, differentiable, a pytree that may be passed through `jit`.

    Raises:
      ValueError: `microbatch` below 1; v unlike params (the first differing path is named).
      TypeError: params that are not float; a kernel with a backward pass only.

    Cost: building: one forward pass and its linearization, whose residuals are kept. Each product: about 4/3 gradients
      in FLOPs. With `microbatch`: a forward pass more for each product, and the residuals of one chunk.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])                                 # GGN x'x / 2
      >>> curvax.ggnvp(objective, jnp.zeros(2), (x, jnp.zeros(2)))(jnp.ones(2)).tolist()
      [0.5, 4.5]

    References: Schraudolph (2002), Fast curvature matrix-vector products; Martens (2020), section 8.
    """

    def curvature(loss: Loss, outputs: Outputs, targets: Targets, index: Array) -> OutputMatvec:
        del index
        return Partial(
            lambda outputs, targets, u: loss.curvature_product(outputs, targets, u),
            outputs,
            unwrap(targets),
        )

    return _through_outputs(curvature, objective, params, batch, microbatch)


def fishervp(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKey,
    num_samples: int = 1,
    *,
    microbatch: int | None = None,
) -> Matvec:
    """Build the product with the Monte-Carlo Fisher, `1/K sum_k sum_b (J_b' r_bk)(J_b' r_bk)'`.

    `r_bk` is the k-th pseudo-gradient of example b: targets sampled from the model, scaled so that the expectation is the
    Fisher of the mean loss. No per-example gradient is formed: `v -> J' r (r . J v)`, row by row of the outputs.

    Args:
      objective: a `curvax.Objective`; its loss must sample.
      params: pytree of float arrays.
      batch: `(inputs, targets)`; targets say which terms count.
      key: JAX key. The draws of an example depend on key and row number only: not on `microbatch`, not on devices.
      num_samples: K, samples per example.
      microbatch: rows worked on at a time; the same result in bounded memory.

    Returns:
      `matvec(v) -> tree like v`: linear, self-adjoint, positive semidefinite.

    Raises:
      ValueError: `num_samples` or `microbatch` below 1; outputs without the batch's leading axis; v unlike params.
      TypeError: a loss that cannot sample; a kernel with a backward pass only.

    Cost: as `ggnvp`, and K draws per example.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])                                 # expectation x'x / 2
      >>> mv = curvax.fishervp(objective, jnp.zeros(2), (x, jnp.zeros(2)), jax.random.key(0), num_samples=10_000)
      >>> bool(jnp.allclose(mv(jnp.ones(2)), jnp.array([0.5, 4.5]), rtol=0.05))
      True

    References: Martens (2020), New insights and perspectives on the natural gradient method, section 5.
    """
    check_count(1, num_samples=num_samples)

    def curvature(loss: Loss, outputs: Outputs, targets: Targets, index: Array) -> OutputMatvec:
        _check_rows(outputs, index.size)
        keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(
            jnp.arange(num_samples, dtype=jnp.uint32)
        )
        draw = lambda key: pseudo_gradient_by_example(loss, key, outputs, targets, index)
        return Partial(_sum_of_row_outer_products, tree_at_least_float32(jax.vmap(draw)(keys)))

    return _through_outputs(curvature, objective, params, batch, microbatch)


def empirical_fishervp(
    objective: Objective, params: Params, batch: Batch, *, microbatch: int | None = None
) -> Matvec:
    """Build the product with the empirical Fisher `1/B sum_b g_b g_b'`, g_b the rows of `per_example_grads`.

    Not an estimate of the Fisher, since targets are the data's own. No per-example gradient is formed.

    Args:
      objective: a `curvax.Objective`.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      microbatch: rows worked on at a time; the same result in bounded memory.

    Returns:
      `matvec(v) -> tree like v`: linear, self-adjoint, positive semidefinite.

    Raises:
      ValueError: `microbatch` below 1; outputs without the batch's leading axis; v unlike params.
      TypeError: params that are not float; a kernel with a backward pass only.

    Cost: as `ggnvp`.

    Deviates: for models that mix examples (BatchNorm in training) g_b is the part of the batch's gradient that flows
      through row b of the outputs, where `per_example_grads` evaluates the model on b alone.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([2.0, 1.0]))    # g: (-2, 0), (0, -3)
      >>> curvax.empirical_fishervp(objective, jnp.zeros(2), batch)(jnp.ones(2)).round(4).tolist()
      [2.0, 4.5]

    References: Kunstner, Balles and Hennig (2019), Limitations of the empirical Fisher approximation.
    """
    root = batch_size(batch) ** 0.5

    def curvature(loss: Loss, outputs: Outputs, targets: Targets, index: Array) -> OutputMatvec:
        _check_rows(outputs, index.size)
        residual = tree_at_least_float32(
            jax.grad(loss)(outputs, unwrap(targets))
        )  # row b: g_b = B J_b' residual_b
        return Partial(_sum_of_row_outer_products, jax.tree.map(lambda s: root * s[None], residual))

    return _through_outputs(curvature, objective, params, batch, microbatch)


def _through_outputs(
    curvature: OutputCurvature,
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatch: int | None,
) -> Matvec:
    def build(objective: Objective, params: Params, chunk: Batch, index: Array) -> Matvec:
        inputs, targets = chunk
        outputs, jacobian = linearize(lambda p: objective.outputs(p, inputs), params, _INSTEAD)
        middle = curvature(objective.loss, outputs, targets, index)
        return Partial(_sandwich, jacobian, middle, params)

    return over_batch(build, objective, params, batch, microbatch)


_INSTEAD = (
    'Use what needs reverse mode only: curvax.hvp(..., mode="rev_over_rev"), curvax.gauss_newton_bartlett, '
    "curvax.per_example_grads."
)


def _sandwich(
    jacobian: Callable[[Params], Outputs], middle: OutputMatvec, params: Params, v: Params
) -> Params:
    pushed = jacobian(v)
    pulled = jax.tree.map(lambda u, p: u.astype(p.dtype), middle(pushed), pushed)
    (product,) = jax.linear_transpose(jacobian, params)(pulled)
    return product


# r: a tree of [samples, batch, ...]; u: a tree of [batch, ...]
def _sum_of_row_outer_products(r: PyTree[Float[Array, "samples batch ..."]], u: Outputs) -> Outputs:
    """Apply `1/K sum_k blockdiag_b(r_kb r_kb')` to u, in at least float32."""
    contract = partial(
        jnp.einsum, precision="highest", preferred_element_type=jnp.result_type(*jax.tree.leaves(r))
    )
    pairs = list(zip(jax.tree.leaves(r), jax.tree.leaves(u), strict=True))
    num_samples, size = pairs[0][0].shape[:2]
    dots = sum(
        contract("kbi,bi->kb", r.reshape(num_samples, size, -1), u.reshape(size, -1))
        for r, u in pairs
    )
    return jax.tree.map(
        lambda r, u: (contract("kb,kb...->b...", dots, r) / num_samples).astype(u.dtype), r, u
    )


def _check_rows(outputs: Outputs, size: int) -> None:
    for path, leaf in jax.tree.leaves_with_path(outputs):
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"outputs{jax.tree_util.keystr(path)} is {describe(leaf)}; the Fisher products need the batch's leading "
                f"axis of {size} rows on every output, to tell the examples apart."
            )
