"""Explicitly formed matrices: the reference of every product and estimate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES
from jax.flatten_util import ravel_pytree

from curvax._shared import unwrap


class Matrices(NamedTuple):
    """Those of a case, in NumPy: `ggn = J' S J`, with J the jacobian and S the curvature of the
    loss in the outputs.
    """

    outputs: object
    jacobian: np.ndarray
    output_curvature: np.ndarray
    ggn: np.ndarray


@functools.cache
def of(name):
    """The matrices of one of `CASES`, made once for all tests."""
    case = CASES[name]()

    @jax.jit
    def compute(params, batch):
        on = case._replace(params=params, batch=batch)
        return outputs(on), jacobian(on), output_curvature(on)

    f, J, S = jax.tree.map(np.asarray, compute(case.params, case.batch))
    return Matrices(f, J, S, J.T @ S @ J)


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
    return jax.jit(jax.jacobian(lambda p: flat(case.objective.outputs(unravel(p), case.batch[0]))))(
        flat_params
    )


def output_curvature(case):
    """[outputs, outputs]: the Hessian of the loss in its outputs;
    for gaussian the Fisher, written out.
    """
    if isinstance(outputs(case), tuple):
        mean, log_variance = outputs(case)
        return jnp.diag(
            jnp.concatenate([jnp.exp(-log_variance).ravel(), jnp.full(mean.size, 0.5)])
        ) / len(mean)
    f, unravel = ravel_pytree(outputs(case))
    return jax.jit(jax.hessian(lambda f: case.objective.loss(unravel(f), targets(case))))(f)


def ggn(case):
    J = jacobian(case)
    return J.T @ output_curvature(case) @ J


def empirical_gradient(loss, outputs, targets):
    """`sqrt(N)` times the gradient of a loss of N terms; by head, with the root of its weight.
    A position of weight m has m times the gradient of its term, and m times its curvature.
    """
    if loss.heads:
        return {
            name: jax.tree.map(
                lambda x, w=w: np.sqrt(w) * x,
                empirical_gradient(head, outputs[name], targets[name]),
            )
            for name, w, head in loss.heads
        }
    root = np.sqrt(loss.num_terms(outputs, targets))
    gradient = jax.jit(jax.grad(loss))(outputs, targets)
    if isinstance(targets, tuple):
        mask = np.asarray(targets[1], float)
        root = root / np.sqrt(np.where(mask > 0, mask, 1))[..., None]
    return jax.tree.map(lambda x: root * np.asarray(x), gradient)


def empirical_fisher_by_term(case, matrices):
    """`sum_n (J'r_n)(J'r_n)'`, for outputs `[*terms, entries]` by head."""
    r = empirical_gradient(case.objective.loss, matrices.outputs, targets(case))
    sizes = [np.full(x.shape[:-1], x.shape[-1]).ravel() for x in jax.tree.leaves(r)]
    ends = np.cumsum(np.concatenate(sizes))
    flat_r = np.concatenate([np.ravel(x) for x in jax.tree.leaves(r)])
    gradients = np.stack(
        [
            flat_r[start:end] @ matrices.jacobian[start:end]
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
    )
    return gradients.T @ gradients


def blocks(outputs, targets):
    """Of each flattened output the number of its diagonal block of the curvature: a label of a
    cross-entropy, a row of a user's loss (with a dict of targets), else an entry (a Gaussian's mean
    and variance together); by head.
    """
    if isinstance(outputs, dict):
        numbers, first = [], 0
        for name in sorted(outputs):
            numbers.append(first + blocks(outputs[name], targets[name]))
            first = numbers[-1].max() + 1
        return np.concatenate(numbers)
    if isinstance(outputs, tuple):
        return np.tile(np.arange(outputs[0].size), len(outputs))
    if isinstance(targets, dict):
        return np.arange(outputs.size) // (outputs.size // len(outputs))
    labels = targets[0] if isinstance(targets, tuple) else targets
    return np.arange(outputs.size) // (outputs.shape[-1] if labels.ndim < outputs.ndim else 1)


def sum_over_blocks(case, matrices, r):
    """`sum_n (J_n' r_n)(J_n' r_n)'` for a cotangent r of the outputs, n the blocks."""
    number = blocks(matrices.outputs, targets(case))
    r = np.concatenate([np.ravel(x) for x in jax.tree.leaves(r)])
    r = r * (number == np.arange(number.max() + 1)[:, None])  # [blocks, outputs]
    gradients = r @ matrices.jacobian
    return gradients.T @ gradients


def sum_over_examples(matrices, r):
    """`sum_b (J_b' r_b)(J_b' r_b)'` for a cotangent r of the outputs."""
    number = lambda f: np.broadcast_to(
        np.arange(len(f)).reshape(-1, *(1,) * (f.ndim - 1)), f.shape
    ).ravel()
    example = np.concatenate(
        [number(f) for f in jax.tree.leaves(matrices.outputs)]
    )  # of each flattened output
    r = np.concatenate([np.ravel(x) for x in jax.tree.leaves(r)])
    r = r * (example == np.arange(example.max() + 1)[:, None])  # [examples, outputs]
    gradients = r @ matrices.jacobian
    return gradients.T @ gradients
