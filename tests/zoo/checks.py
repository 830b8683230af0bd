"""What is captured of a model, beside plain autodiff."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

import curvax
from curvax import losses
from curvax.capture import record
from curvax.kron._plan import layout_plan
from zoo._case import normal


def prepare(case, **kwargs):
    """Objective, batch and layout of a case."""
    objective = curvax.Objective(case.model, losses.squared_error())
    outputs = jax.eval_shape(case.model, case.params, case.inputs)
    batch = (case.inputs, jnp.zeros(outputs.shape, outputs.dtype))
    return objective, batch, curvax.kron_layout(objective, case.params, batch, **kwargs)


def by_path(tree):
    return {keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


# e: examples, s: stack, n: positions, i: inputs, o: outputs
def from_taps(block, inputs, cotangents):
    """Gradients `[e, s, i, o]` and `[e, s, o]` of kernel and bias,
    from what the uses were given and their cotangents.
    """
    kernel, bias = [], []
    for member, a, g in zip(block.uses, inputs, cotangents, strict=True):
        if member.kind == "lookup":
            a = jax.nn.one_hot(
                a[..., 0], block.kernel.shape[2 if member.transposed else 1], dtype=g.dtype
            )
        a, g = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a, g))
        kernel.append(
            jnp.einsum("esno,esni->esio" if member.transposed else "esni,esno->esio", a, g)
        )
        bias += [member.one * g.sum(axis=2)] if member.biased else []
    if block.kernel.mask is not None:
        kernel = [jnp.where(block.kernel.mask, x, 0) for x in kernel]
    return (sum(kernel),) if block.bias is None else (sum(kernel), sum(bias))


def from_gradients(block, gradients):
    """The same, from gradients of the leaves for each example."""
    views = (block.kernel,) if block.bias is None else (block.kernel, block.bias)
    return tuple(
        jax.vmap(view.read)({path: gradients[path] for path in view.leaves}) for view in views
    )


def check_leaves(case, layout):
    """Assert that the leaves are in blocks, of the stacks that are expected, or not for the reason
    that is.
    """
    for leaf in layout.leaves:
        if leaf.path in case.diagonal:
            assert leaf.kind == "diagonal" and case.diagonal[leaf.path] in leaf.reason, leaf
        else:
            assert (leaf.kind, leaf.unmatched, leaf.reason) == ("kron", None, ""), leaf
    for block in layout.blocks:
        for path in block.leaves:
            assert block.shape[0] == np.prod(case.stacks.get(path, 1), dtype=int), block


def check_taps(case, objective, layout, tolerance, ways=(False, True)):
    """Assert that taps of the whole batch, and of each example by itself where there is one,
    give the gradients of plain autodiff.
    """
    ways = [by_example for by_example in ways if case.by_example or not by_example]
    outputs = jax.eval_shape(case.model, case.params, case.inputs)
    r = np.asarray(normal(5, *outputs.shape)).astype(outputs.dtype)
    of_row = np.eye(len(r), dtype=r.dtype).reshape(len(r), len(r), *[1] * (r.ndim - 1))

    def compute(params, inputs):
        outputs, pull = jax.vjp(lambda p: case.model(p, inputs), params)
        gradients = by_path(jax.lax.map(lambda row: pull(row * r)[0], of_row))
        blocks = {block.name: from_gradients(block, gradients) for block in layout.blocks}
        want, got = (
            (blocks, {leaf.path: gradients[leaf.path] for leaf in layout.leaves if leaf.outside}),
            [],
        )
        for by_example in ways:
            plan = layout_plan(objective, layout, params, inputs, by_example)
            taps = record(plan, params, inputs)
            pulled = taps.pull(r)
            blocks = {
                b.name: from_taps(b, taps.inputs[b.name], pulled.blocks[b.name])
                for b in layout.blocks
            }
            got.append((taps.outputs, (blocks, pulled.outside)))
        whole = jax.tree.map(lambda x: x.sum(0, keepdims=True), want)
        wanted = [want if by_example else whole for by_example in ways]
        return outputs, wanted, got

    outputs, wanted, results = jax.jit(compute)(case.params, case.inputs)
    for (tapped, got), want in zip(results, wanted, strict=True):
        chex.assert_trees_all_close(tapped, outputs, rtol=tolerance, atol=tolerance)
        chex.assert_trees_all_equal_shapes(got, want)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            x, y = (np.asarray(a, np.promote_types(a.dtype, np.float32)) for a in (x, y))
            assert np.linalg.norm(x - y) <= tolerance * (1 + np.linalg.norm(y))
