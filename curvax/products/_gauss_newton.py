"""Gauss-Newton and Fisher products: `v -> J' M J v`, with M a matrix on the model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from curvax._checks import check_choice, check_count, describe
from curvax._shared import unwrap
from curvax._trees import cast_like
from curvax._types import Batch, Matvec, Outputs, Params, PRNGKey, Targets, tree_at_least_float32
from curvax.losses import Loss
from curvax.losses._linear import check_curved
from curvax.losses._shares import pseudo_gradient_by_example
from curvax.losses._terms import (
    GROUPS,
    outer_products,
    outer_products_by_block,
    outer_products_by_term,
)
from curvax.objective import Objective
from curvax.products._linear import linearize, over_batch, product_of_parts

OutputMatvec: TypeAlias = Callable[[Outputs], Outputs]
OutputCurvature: TypeAlias = Callable[[Loss, Outputs, Targets, Array], OutputMatvec]
"""From a loss, outputs, targets (with their `Shared` parts still wrapped) and row numbers to the
matrix M on outputs."""


def ggnvp(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    microbatch: int | None = None,
) -> Matvec:
    """Build the product with the generalized Gauss-Newton matrix of the mean loss, `v -> J' S J v`.

    J is the Jacobian of the model's outputs, S the output-space curvature, which
    `loss.curvature_product` multiplies by (scaled by 1 / num_terms, as that of the mean). The
    matrix is positive semidefinite whenever S is; it is equal to the Hessian for models linear in
    params, and to the Fisher for losses that are negative log-likelihoods in their natural
    parameter.

    Args:
      objective: the `curvax.Objective` whose curvature is meant.
      params: pytree of float arrays.
      batch: the pair `(inputs, targets)`.
      microbatch: rows worked on at a time; the same result in bounded memory.

    Returns:
      `matvec(v) -> tree like v`, which is linear, self-adjoint, differentiable, and a pytree that
      may be passed through `jit`.

    Raises:
      ValueError: `microbatch` is below 1, or v is unlike params (the first differing path is
        named).
      TypeError: params are not float, the loss is linear in the outputs (then the matrix is zero),
        or a kernel has a backward pass only.

    Cost: building: one forward pass and its linearization, whose residuals stay in memory. Each
      product: about 4/3 gradients in FLOPs. With `microbatch`: a forward pass more for each
      product, and the residuals of one chunk.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])                         # GGN x'x / 2
      >>> matvec = curvax.ggnvp(objective, jnp.zeros(2), (x, jnp.zeros(2)))
      >>> matvec(jnp.ones(2)).tolist()
      [0.5, 4.5]

    References: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
      descent; Martens (2020), New insights and perspectives on the natural gradient method,
      section 8, https://arxiv.org/abs/1412.1193.
    """
    if objective.parts:
        of_part = partial(ggnvp, microbatch=microbatch)
        return product_of_parts(of_part, objective, params, batch)

    # M = S
    def curvature(
        loss: Loss,
        outputs: Outputs,
        targets: Targets,
        index: Array,
    ) -> OutputMatvec:
        """Return the product with the loss's own curvature S."""
        del index
        check_curved(loss, outputs, unwrap(targets))

        # A plain function, whatever kind of callable the loss holds: it becomes part of the type
        # of a pytree, which must be comparable.
        def product(outputs: Outputs, targets: Targets, u: Outputs) -> Outputs:
            return loss.curvature_product(outputs, targets, u)

        return Partial(product, outputs, unwrap(targets))

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
    """Build the product with the Monte-Carlo Fisher, `1/K sum_k sum_n (J_n' r_nk)(J_n' r_nk)'`.

    `r_nk` is the k-th pseudo-gradient of block n of the outputs: targets are sampled from the
    model, and the gradient at them is scaled so that the expectation is the Fisher of the mean
    loss. A block is a label of a cross-entropy, an entry of the losses whose entries are
    independent, or an example of your own loss (`Loss.block_axes`): products of different blocks
    have the mean zero, and taking them in would only add variance. No gradient of a block is
    formed: `v -> J' r (r . J v)`, block by block of the outputs.

    Args:
      objective: the `curvax.Objective` whose Fisher is meant; its loss must sample.
      params: pytree of float arrays.
      batch: the pair `(inputs, targets)`; targets say which terms count.
      key: JAX key. The draws of an example depend on key and row number only: not on `microbatch`,
        not on devices.
      num_samples: K, the number of samples of every target; the variance falls as 1/K.
      microbatch: rows worked on at a time; the same result in bounded memory.

    Returns:
      `matvec(v) -> tree like v`, which is linear, self-adjoint and positive semidefinite.

    Raises:
      ValueError: `num_samples` or `microbatch` is below 1, outputs lack the batch's leading axis,
        or v is unlike params.
      TypeError: the loss cannot sample, or a kernel has a backward pass only.

    Cost: as `ggnvp`, and K draws of the targets. Of a language model with 32 labels a sequence we
      measured a twentieth of the variance that outer products of sequences have.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])                         # expectation x'x / 2
      >>> batch, key = (x, jnp.zeros(2)), jax.random.key(0)
      >>> mv = curvax.fishervp(objective, jnp.zeros(2), batch, key, num_samples=10_000)
      >>> bool(jnp.allclose(mv(jnp.ones(2)), jnp.array([0.5, 4.5]), rtol=0.05))
      True

    References: Martens (2020), New insights and perspectives on the natural gradient method,
      section 5, https://arxiv.org/abs/1412.1193.
    """
    check_count(1, num_samples=num_samples)
    if objective.parts:
        of_part = partial(fishervp, num_samples=num_samples, microbatch=microbatch)
        return product_of_parts(of_part, objective, params, batch, key)

    # M = 1/K sum_k blockdiag_n(r_nk r_nk')
    def curvature(
        loss: Loss,
        outputs: Outputs,
        targets: Targets,
        index: Array,
    ) -> OutputMatvec:
        """Draw pseudo-gradients, and return the product with the sum of their outer ones."""
        _check_rows(outputs, index.size)

        # The loss is that of the share of a chunk, whose root the pseudo-gradient holds already.
        def draw(k: Array) -> Outputs:
            round_key = jax.random.fold_in(key, k)
            return pseudo_gradient_by_example(loss, round_key, outputs, targets, index)

        rounds = jnp.arange(num_samples, dtype=jnp.uint32)
        r = tree_at_least_float32(jax.vmap(draw)(rounds))

        # A plain function, as in `ggnvp`.
        def product(y: Targets, r: Outputs, u: Outputs) -> Outputs:
            return outer_products_by_block(loss, y, r, u)

        return Partial(product, unwrap(targets), r)

    return _through_outputs(curvature, objective, params, batch, microbatch)


def empirical_fishervp(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    by: str = "example",
    microbatch: int | None = None,
) -> Matvec:
    """Build the product with the empirical Fisher, `1/N sum_b g_b g_b'` or `1/N sum_n g_n g_n'`.

    `g_n` is the gradient of term n of the loss, of N, and `g_b` the sum of those of example b. With
    one term an example this is the mean over examples of the outer products of
    `curvax.per_example_grads`. Both have the unit of the Fisher of the mean loss, which they would
    be in expectation if targets were drawn from the model; they differ in the products of different
    terms of one example. The matrix is no estimate of the Fisher, since targets are the data's own.
    No gradient of an example is formed.

    Args:
      objective: the `curvax.Objective` whose gradients are meant.
      params: pytree of float arrays.
      batch: the pair `(inputs, targets)`.
      by: "example" or "term", of which outer products are taken.
      microbatch: rows worked on at a time; the same result in bounded memory.

    Returns:
      `matvec(v) -> tree like v`, which is linear, self-adjoint and positive semidefinite.

    Raises:
      ValueError: `by` is unknown, `microbatch` is below 1, outputs lack the batch's leading axis,
        or v is unlike params.
      TypeError: params are not float, the loss compares examples with each other, or a kernel has a
        backward pass only.

    Cost: as `ggnvp`.

    Deviates: for models that mix examples (BatchNorm in training) g_b is the part of the batch's
      gradient that flows through row b of the outputs, where `per_example_grads` evaluates the
      model on b alone. A head of a `weighted_sum` enters with its weight, and not with its square,
      as into every other curvature.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([2.0, 1.0])
      >>> matvec = curvax.empirical_fishervp(objective, jnp.zeros(2), (x, y))
      >>> matvec(jnp.ones(2)).round(4).tolist()                           # g: (-2, 0), (0, -3)
      [2.0, 4.5]

    References: Kunstner, Balles and Hennig (2019), Limitations of the empirical Fisher
      approximation for natural gradient descent, https://arxiv.org/abs/1905.12558.
    """
    check_choice("by", by, GROUPS)
    if objective.parts:
        of_part = partial(empirical_fishervp, microbatch=microbatch, by=by)
        return product_of_parts(of_part, objective, params, batch)

    # With e_b = grad_{f_b} L, row b of the gradient of the mean loss, g_b = N J_b' e_b, so
    # 1/N sum_b g_b g_b' = N sum_b J_b' e_b e_b' J_b: M = blockdiag_b(r_b r_b'), r_b = sqrt(N) e_b.
    def curvature(
        loss: Loss,
        outputs: Outputs,
        targets: Targets,
        index: Array,
    ) -> OutputMatvec:
        """Return the product with the outer products of the rows of r, or of their terms."""
        _check_rows(outputs, index.size)
        y = unwrap(targets)
        gradient = tree_at_least_float32(loss.empirical_gradient(outputs, y))
        # A leading axis of one sample.
        r = jax.tree.map(lambda x: x[None], gradient)
        if by == "example":
            return Partial(partial(outer_products, num_axes=1), r)

        # A plain function, as in `ggnvp`.
        def product(y: Targets, r: Outputs, u: Outputs) -> Outputs:
            return outer_products_by_term(loss, y, r, u)

        return Partial(product, y, r)

    return _through_outputs(curvature, objective, params, batch, microbatch)


def _through_outputs(
    curvature: OutputCurvature,
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatch: int | None,
) -> Matvec:
    """Build the product `J' M J v` on a batch, with M from `curvature`."""

    def build(
        objective: Objective,
        params: Params,
        chunk: Batch,
        index: Array,
    ) -> Matvec:
        """Linearize the model on a chunk, and put M between `J'` and J."""
        inputs, targets = chunk

        def model(p: Params) -> Outputs:
            return objective.outputs(p, inputs)

        # J is linearized once; M is made of outputs that this gives anyway.
        outputs, jacobian = linearize(model, params, _INSTEAD)
        output_matvec = curvature(objective.loss, outputs, targets, index)
        return Partial(_sandwich, jacobian, output_matvec, params)

    return over_batch(build, objective, params, batch, microbatch)


_INSTEAD = (
    'Use what needs reverse mode only: curvax.hvp(..., mode="rev_over_rev"), '
    "curvax.gauss_newton_bartlett, curvax.per_example_grads."
)


def _sandwich(
    jacobian: Callable[[Params], Outputs],
    output_matvec: OutputMatvec,
    params: Params,
    v: Params,
) -> Params:
    """Return `J' M J v`; `params` tell shapes and dtypes of what J takes."""
    u = jacobian(v)
    # A cotangent has the dtype of the output it belongs to.
    r = cast_like(output_matvec(u), u)
    (product,) = jax.linear_transpose(jacobian, params)(r)
    return product


def _check_rows(outputs: Outputs, size: int) -> None:
    """Raise unless every output has one row for each example."""
    for path, leaf in jax.tree.leaves_with_path(outputs):
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"outputs{jax.tree_util.keystr(path)} is {describe(leaf)}; the Fisher products "
                f"need the batch's leading axis of {size} rows on every output, to tell the "
                "examples apart."
            )
