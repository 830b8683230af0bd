"""A block's curvature as one Kronecker product, or as the sum of two.

Two there are where weights are tied, and in an objective of two parts. Uses that multiply by the
kernel's transpose have their input on the outputs' side. With `A1 x G1` of the uses and `A2 x G2`
of those of the transpose (A2 from output-cotangents, G2 from inputs) the block is
`A1 x G1 + A2 x G2`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax._trees import safe_divide
from curvax.kron._factors import BlockFactors
from curvax.kron._kron_factor import STRUCTURES, KronFactor, Pencil, PerSlice, added, scaled

FactorPair: TypeAlias = tuple[KronFactor, KronFactor]
"""A and G of one Kronecker product."""


def kron_products(structures: tuple[str, str], factors: BlockFactors) -> list[FactorPair]:
    """Return A and G of every Kronecker product whose sum is a block of these structures."""
    a_structure, g_structure = (STRUCTURES[name] for name in structures)

    def pair(a: Array, g: Array) -> FactorPair:
        return a_structure.from_moment(a), g_structure.from_moment(g)

    products = [pair(factors.a.mean, factors.g.mean)]
    if factors.second is not None:
        a, g = factors.second
        products.append(pair(a.mean, g.mean))
    return products


# The jit is for the time to trace: blocks of equal structures and shapes are traced once.
@partial(jax.jit, static_argnums=0)
def combined_factors(structures: tuple[str, str], factors: BlockFactors) -> FactorPair:
    """Return A and G of a block, of two products those of one that is near to their sum.

    Each product is first balanced, so that both its factors have the trace
    `r_k = sqrt(tr A_k tr G_k)`. Then factors add up by side, `A = c sum_k A_k r_k / tr A_k` and
    likewise G, with `c^2 = sum_k r_k^2 / (sum_k r_k)^2`, so that the trace of the result is the sum
    of the traces. Exact where one product vanishes, or both are multiples of each other.
    """
    first, *others = kron_products(structures, factors)
    if not others:
        return first
    (second,) = others
    # r_k is the trace that both factors of a product have once they are balanced.
    root1, root2 = _trace_root(first), _trace_root(second)
    squares = root1**2 + root2**2
    square_of_sum = (root1 + root2) ** 2
    c = jnp.sqrt(safe_divide(squares, square_of_sum))

    def add_up(x: KronFactor, y: KronFactor) -> KronFactor:
        weight1 = safe_divide(root1, x.trace())
        weight2 = safe_divide(root2, y.trace())
        return added(scaled(x, c * weight1), scaled(y, c * weight2))

    (a1, g1), (a2, g2) = first, second
    return add_up(a1, a2), add_up(g1, g2)


def damped_factors(a: KronFactor, g: KronFactor, damping: Any) -> FactorPair:
    """Damp both factors, `(A + pi sqrt(damping) I) x (G + sqrt(damping) / pi I)`.

    `pi^2 = (tr A / dim A) / (tr G / dim G)`: Martens and Grosse (2015), section 6.3. Where one
    factor is a multiple of the identity the damping goes to the other, which is exact:
    `c I x G + damping I = I x (c G + damping I)`.
    """
    # (I x (c G + damping I)) where A = c I, and the same with the sides exchanged.
    c = a.as_multiple()
    if c is not None:
        unit = jax.tree.map(jnp.ones_like, a)
        return unit, scaled(g, c).damped(damping)
    c = g.as_multiple()
    if c is not None:
        unit = jax.tree.map(jnp.ones_like, g)
        return scaled(a, c).damped(damping), unit
    # Section 6.3: pi balances the damping by the mean eigenvalues.
    mean_a = a.mean_eigenvalue()
    mean_g = g.mean_eigenvalue()
    # Without curvature in one of them (0/0, or infinite), pi is 1: both get the same.
    both = (mean_a > 0) & (mean_g > 0)
    numerator = jnp.where(both, mean_a, 1)
    denominator = jnp.where(both, mean_g, 1)
    pi = jnp.sqrt(numerator / denominator)
    root = damping**0.5
    return a.damped(pi * root), g.damped(root / pi)


def pencils(first: FactorPair, damped_second: FactorPair) -> tuple[Pencil, Pencil]:
    """Make a sum of two Kronecker products diagonal, exactly.

    With `K_A' A2 K_A = I`, `K_A' A1 K_A = D_A`, and likewise G,

      `A1 x G1 + A2 x G2 = (K_A x K_G)^-T (D_A x D_G + I) (K_A x K_G)^-1`.

    Args:
      first: A1 and G1, positive semidefinite.
      damped_second: A2 and G2, positive definite.
    """
    (a1, g1), (a2, g2) = first, damped_second
    return a1.pencil(a2), g1.pencil(g2)


def _trace_root(product: FactorPair) -> PerSlice:
    """Return the trace that both factors have once they are balanced."""
    a, g = product
    return jnp.sqrt(a.trace() * g.trace())
