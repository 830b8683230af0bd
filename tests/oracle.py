"""Explicitly formed matrices: the reference of every product and estimate."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from curvax._batch import unwrap


def flat(tree):
    return ravel_pytree(tree)[0]


def hessian(case):
    flat_params, unravel = ravel_pytree(case.params)
    return jax.jit(jax.hessian(lambda p: case.objective.value(unravel(p), case.batch)))(flat_params)


def outputs(case):
    return jax.jit(lambda p: case.objective.outputs(p, case.batch[0]))(case.params)


def targets(case):
    """Targets as the loss gets them."""
    return unwrap(case.batch[1])


def jacobian(case):
    """[outputs, params], rows in the order of the flattened outputs."""
    flat_params, unravel = ravel_pytree(case.params)
    return jax.jit(jax.jacobian(lambda p: flat(case.objective.outputs(unravel(p), case.batch[0]))))(flat_params)


def output_curvature(case):
    """[outputs, outputs]: the Hessian of the loss in its outputs; for gaussian the Fisher, written out."""
    if isinstance(outputs(case), tuple):
        mean, log_variance = outputs(case)
        return jnp.diag(jnp.concatenate([jnp.exp(-log_variance).ravel(), jnp.full(mean.size, 0.5)])) / len(mean)
    f, unravel = ravel_pytree(outputs(case))
    return jax.jit(jax.hessian(lambda f: case.objective.loss(unravel(f), targets(case))))(f)


def ggn(case):
    J = jacobian(case)
    return J.T @ output_curvature(case) @ J


def sum_over_examples(case, r):
    """`sum_b (J_b' r_b)(J_b' r_b)'` for a cotangent r of the outputs."""
    number = lambda f: jnp.broadcast_to(jnp.arange(len(f)).reshape(-1, *(1,) * (f.ndim - 1)), f.shape)
    example = flat(jax.tree.map(number, outputs(case)))  # of each flattened output
    r = flat(r) * (example == jnp.arange(example.max() + 1)[:, None])  # [examples, outputs]
    gradients = r @ jacobian(case)
    return gradients.T @ gradients
