"""Losses that compare the examples of a batch with each other.

Their curvature in the outputs has no block for each example. So single examples and parts of a
batch have no share in it, and what works on those refuses them by name: microbatches, EK-FAC,
gradients of examples. On a whole batch there is everything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._checks import describe
from curvax._trees import cast_like
from curvax._types import PRNGKey, Scalar, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.losses._likelihoods import check_entries
from curvax.losses._loss import Loss, from_function
from curvax.losses._softmax import softmax_cross_entropy

Embeddings = tuple[Array, Array]
"""Of each pair's first and second member, `[batch, d]` each."""

Logits = Float[Array, "anchors batch"]


def contrastive(temperature: float | Array = 0.1, symmetric: bool = False) -> Loss:
    """Contrastive loss (InfoNCE) of pairs of embeddings, each against all others of the batch.

    With similarities `s_ij = u_i'v_j / temperature`, mean over i: `-log softmax_j(s_ij)_i`.
    Symmetric, as in CLIP, it is half of this and half of the same from v to u. The curvature is the
    Gauss-Newton one through the similarities, `J_s' H_s J_s`, with the softmax Hessian
    `diag(p_i) - p_i p_i'` for each row i: it couples all examples.

    Args:
      temperature: a positive number or scalar array. To learn it, let the model scale one of the
        embeddings, and leave 1 here.
      symmetric: whether to add the loss from v to u.

    Returns:
      A `Loss` for outputs `(u, v)`, a pair of float arrays `[batch, d]` (which the model divides by
      their norms, if cosines are wanted). There are no targets: give `None`.

    Raises:
      ValueError: the temperature is not positive, or shapes do not fit (at trace time).

    Cost: `batch^2 d` multiplications. As `fisher="exact"` the curvature takes a pass for every
      entry of the embeddings of the whole batch.

    Example: with equal embeddings every row is uniform over the batch.
      >>> import jax.numpy as jnp, curvax
      >>> loss = curvax.losses.contrastive(temperature=0.5)
      >>> u = jnp.ones((4, 3))
      >>> round(loss((u, u), None).item(), 4)                             # log 4
      1.3863

    References: van den Oord, Li and Vinyals (2018), Representation learning with contrastive
      predictive coding, section 2.3, https://arxiv.org/abs/1807.03748; Radford et al. (2021),
      https://arxiv.org/abs/2103.00020, for the symmetric one.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    cross_entropy = softmax_cross_entropy()

    # u, v: [n, d], s: [n, n], or [2 n, n] with the rows of s' below
    def similarities(outputs: Embeddings) -> Logits:
        """Return the logits of all anchors, in which the right one of anchor i is number i."""
        u, v = map(at_least_float32, outputs)

        # Of a batch that is sharded explicitly every row meets every other.
        def of_all(u: Array, v: Array) -> Logits:
            s = jnp.matmul(u, v.T, precision="highest") / temperature
            return jnp.concatenate([s, s.T]) if symmetric else s

        return with_auto_sharding(of_all, u, v)

    def right_ones(logits: Logits) -> Array:
        num_anchors, n = logits.shape
        return jnp.arange(num_anchors) % n

    def value(outputs: Embeddings, targets: Any) -> Scalar:
        del targets
        _check_embeddings(outputs)
        s = similarities(outputs)
        return cross_entropy(s, right_ones(s))

    # S v = J_s' H_s J_s v
    def curvature_product(
        outputs: Embeddings,
        targets: Any,
        v: Embeddings,
    ) -> Embeddings:
        """Multiply by the Gauss-Newton matrix through the similarities."""
        del targets
        _check_embeddings(outputs)
        s, push = jax.linearize(similarities, outputs)
        product = cross_entropy.curvature_product(s, right_ones(s), push(cast_like(v, outputs)))
        return _pulled(push, product, outputs)

    # r = J_s' r_s with E[r_s r_s'] = H_s: each anchor draws its partner from its own row.
    def pseudo_gradient(
        key: PRNGKey,
        outputs: Embeddings,
        targets: Any,
    ) -> Embeddings:
        """Draw a partner for every anchor, and pull the scores back to the embeddings."""
        del targets
        _check_embeddings(outputs)
        s, push = jax.linearize(similarities, outputs)
        r = cross_entropy.pseudo_gradient(key, s, right_ones(s))
        return _pulled(push, r, outputs)

    return from_function(
        value,
        curvature_product=curvature_product,
        pseudo_gradient=pseudo_gradient,
        couples_examples=True,
    )


def variance() -> Loss:
    """Half the variance of the outputs over the batch, whose curvature is that of their covariance.

    `1/(2 n) sum_i |f_i - mean f|^2`, with the curvature `(I - 11'/n) / n`: the Gauss-Newton matrix
    is the covariance of the outputs' gradients, `J'(I - 11'/n) J / n`. This is the metric where a
    model gives log densities up to a constant: stochastic reconfiguration (f = log psi at draws
    from psi^2, a quarter of the Fisher matrix), and the Fisher matrix of an energy-based model (f
    the energy at draws from the model). The gradient comes from elsewhere then; of the objective
    the curvature alone is used. (For a wavefunction `curvax.losses.local_energy` has both.)

    Returns:
      A `Loss` for float outputs `[batch, ...]`. There are no targets: give `None`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> metric = curvax.Objective(lambda w, x: x @ w, curvax.losses.variance())
      >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])                       # covariance diag(1, 0)
      >>> curvax.ggnvp(metric, jnp.zeros(2), (x, None))(jnp.ones(2)).tolist()
      [1.0, 0.0]

    References: Sorella (1998), Green function Monte Carlo with stochastic reconfiguration,
      https://arxiv.org/abs/cond-mat/9803107.
    """

    def value(outputs: Array, targets: Any) -> Scalar:
        del targets
        check_entries("variance", outputs, outputs)
        return 0.5 * jnp.sum(_centered(outputs) ** 2) / outputs.shape[0]

    # (I - 11'/n) v / n
    def curvature_product(
        outputs: Array,
        targets: Any,
        v: Array,
    ) -> Array:
        del targets
        check_entries("variance", outputs, outputs)
        return (_centered(v) / outputs.shape[0]).astype(outputs.dtype)

    # P = I - 11'/n is a projection: of normal z, P z has the covariance P P' = P.
    def pseudo_gradient(
        key: PRNGKey,
        outputs: Array,
        targets: Any,
    ) -> Array:
        del targets
        check_entries("variance", outputs, outputs)
        z = jax.random.normal(key, outputs.shape, at_least_float32(outputs).dtype)
        r: Array = _centered(z) / outputs.shape[0] ** 0.5
        return r.astype(outputs.dtype)

    def equal_weights(outputs: Array, targets: Any) -> Array:
        del targets
        size = outputs.shape[0]
        return jnp.full(size, 1 / size, at_least_float32(outputs).dtype)

    loss = from_function(
        value,
        curvature_product=curvature_product,
        pseudo_gradient=pseudo_gradient,
        couples_examples=True,
    )
    return dataclasses.replace(loss, centering_weights=equal_weights)


def _centered(x: Array) -> Array:
    """Subtract the mean over the batch, in at least float32."""
    wide = at_least_float32(x)
    return wide - jnp.mean(wide, axis=0)


def _pulled(
    push: Callable[[Embeddings], Logits],
    r: Logits,
    outputs: Embeddings,
) -> Embeddings:
    """Return `J_s' r`, with J_s as the linear map `push`."""
    embeddings: Embeddings
    (embeddings,) = jax.linear_transpose(push, outputs)(r)
    return embeddings


def _check_embeddings(outputs: Any) -> None:
    """Raise unless outputs are two arrays of embeddings of the same shape."""
    if not isinstance(outputs, tuple | list) or len(outputs) != 2:
        raise TypeError(f"contrastive needs outputs (u, v), got {describe(outputs)}.")
    u, v = outputs
    check_entries("contrastive", u, u)
    if jnp.shape(u) != jnp.shape(v) or jnp.ndim(u) != 2:
        raise ValueError(
            "contrastive needs two arrays of embeddings [batch, d] of the same shape, got "
            f"{describe(u)} and {describe(v)}."
        )
