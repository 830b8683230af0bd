"""Subspaces of parameter space: what two have in common, and what part of a gradient is in one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from curvax._checks import check_like, check_params
from curvax._trees import inner_product, row_products
from curvax._types import Params, Scalar

# A, B: [k, d], rows that span a subspace; P = A'(A A')^+ A, the projection onto it


def subspace_overlap(
    a: PyTree[Array],
    b: PyTree[Array],
) -> Scalar:
    """Return `tr(P_a P_b) / k`, the mean squared cosine of two subspaces' principal angles.

    It is 1 for equal subspaces of k dimensions and 0 for orthogonal ones; `k / d` is expected of
    two random ones.

    Args:
      a: k vectors that span a subspace, a tree with a leading axis k, such as the eigenvectors that
        `curvax.eigsh` returns; they need not be orthonormal.
      b: k vectors like those of a.

    Returns:
      a number in [0, 1]. Where vectors depend on each other, the subspace has fewer dimensions than
      k, and the overlap is lower.

    Raises:
      ValueError: the trees do not fit.

    Cost: `3 k^2 d` multiplications.

    Example: one of two dimensions is common, the other one is half so; within "w" both are.
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.spectra import subspace_overlap
      >>> a = {"w": jnp.array([[1.0, 0, 0], [0, 1, 0]]), "b": jnp.zeros((2, 1))}
      >>> b = {"w": jnp.array([[1.0, 1, 0], [1, -1, 0]]), "b": jnp.ones((2, 1))}
      >>> round(float(subspace_overlap(a, b)), 3)
      0.75
      >>> round(float(jax.tree.map(subspace_overlap, a, b)["w"]), 3)
      1.0

    References: Gur-Ari, Roberts and Dyer (2018), Gradient descent happens in a tiny subspace,
      https://arxiv.org/abs/1812.04754.
    """
    check_params(a)
    check_like(b, a, "b", "a")
    # tr(P_a P_b) = tr((A A')^+ A B' (B B')^+ B A')
    AB = _products(a, b)
    with jax.default_matmul_precision("highest"):
        inverse_a = _pseudo_inverse(_products(a, a))
        inverse_b = _pseudo_inverse(_products(b, b))
        projections = inverse_a @ AB @ inverse_b @ AB.T
    return jnp.trace(projections) / len(AB)


def fraction_in_subspace(
    vectors: PyTree[Array],
    gradient: Params,
) -> Scalar:
    """Return `|P g|^2 / |g|^2`, the part of a gradient's squared length that lies in a subspace.

    By leaf, `jax.tree.map(fraction_in_subspace, vectors, gradient)` takes the parts that the
    vectors have in it; by layer, so does a call for each subtree. `k / d` is expected of a random
    subspace of k dimensions.

    Args:
      vectors: k vectors that span the subspace, a tree with a leading axis k; they need not be
        orthonormal.
      gradient: a tree like one of them, not zero.

    Returns:
      a number in [0, 1].

    Raises:
      ValueError: the trees do not fit.

    Cost: `k^2 d` multiplications.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.spectra import fraction_in_subspace
      >>> vectors, gradient = jnp.array([[2.0, 0.0]]), jnp.array([3.0, 4.0])
      >>> round(float(fraction_in_subspace(vectors, gradient)), 3)
      0.36

    References: Gur-Ari, Roberts and Dyer (2018), https://arxiv.org/abs/1812.04754; Ben Arous,
      Gheissari, Huang and Jagannath (2024), High-dimensional SGD aligns with emerging outlier
      eigenspaces, for the subspaces of single layers.
    """
    check_params(vectors)
    vector = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), vectors)
    check_like(gradient, vector, "gradient", "a vector")
    # |P g|^2 = g'P g = (A g)'(A A')^+ (A g)
    Ag = row_products(vectors, gradient)
    with jax.default_matmul_precision("highest"):
        inverse = _pseudo_inverse(_products(vectors, vectors))
        squared_projection = Ag @ inverse @ Ag
    return squared_projection / inner_product(gradient, gradient)


def _products(
    a: PyTree[Array],
    b: PyTree[Array],
) -> Float[Array, "k k"]:
    """Return `A B'`, by one pass over A for each row of B."""
    return jnp.asarray(lax.map(lambda row: row_products(a, row), b)).T


def _pseudo_inverse(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Invert where eigenvalues are above the values that rounding makes of zero."""
    smallest = 10 * len(gram) * jnp.finfo(gram.dtype).eps
    symmetric = (gram + gram.T) / 2
    return jnp.asarray(jnp.linalg.pinv(symmetric, rtol=smallest, hermitian=True))
