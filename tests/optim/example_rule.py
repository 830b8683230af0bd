"""A new rule on gradients: the sign of momentum in a Kronecker eigenbasis.

With V the matrix of a block of the gradient and M that of its momentum,

  L <- b2 L + (1 - b2) V V',   R <- b2 R + (1 - b2) V' V,   u = P sign(P' M Q) Q',

where P and Q are the eigenvectors of L and R. Entries in no block take the sign of their momentum.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.kron import Layout, block_matrices, with_block_matrices
from curvax.optim import StepResult, curvature_rule, zero_count


class EigenSignInfo(NamedTuple):
    num_nonfinite: jax.Array


class EigenSignState(NamedTuple):
    count: Any
    momentum: Any
    left: dict[str, jax.Array]
    right: dict[str, jax.Array]
    info: EigenSignInfo


def scale_by_eigen_sign(layout: Layout, b1=0.9, b2=0.95):
    def init(params):
        zeros = jax.tree.map(
            lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, "float32")), params
        )
        left, right = {}, {}
        for name, V in block_matrices(layout, zeros).items():
            left[name], right[name] = V @ V.mT, V.mT @ V
        return EigenSignState(zero_count(), zeros, left, right, EigenSignInfo(zero_count()))

    def average(state, gradient):
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momentum, gradient)
        left, right = {}, {}
        for name, V in block_matrices(layout, gradient).items():
            left[name] = b2 * state.left[name] + (1 - b2) * V @ V.mT
            right[name] = b2 * state.right[name] + (1 - b2) * V.mT @ V
        return state._replace(momentum=momentum, left=left, right=right)

    def step(state, gradient, context):
        steps = {}
        for name, M in block_matrices(layout, state.momentum).items():
            P, Q = jnp.linalg.eigh(state.left[name])[1], jnp.linalg.eigh(state.right[name])[1]
            rotated = P.mT @ M @ Q
            # Where no gradient has ever been, rounding would decide the sign.
            is_rounding = jnp.abs(rotated) <= 1e-4 * jnp.max(jnp.abs(rotated))
            steps[name] = P @ jnp.where(is_rounding, 0, jnp.sign(rotated)) @ Q.mT
        signs = jax.tree.map(jnp.sign, state.momentum)
        return StepResult(with_block_matrices(layout, steps, signs), state, info={})

    return curvature_rule(init, step, average=average)
