"""Conditional work: under `vmap` it stays conditional, and without it runs one branch alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.optim import refresh_if


def chosen(pred, x):
    return refresh_if(pred, lambda x: jnp.sin(x) + 1, lambda x: x @ x, x)


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 4)), jnp.float32)
NEW, OLD = np.sin(X) + 1, np.asarray(X) @ np.asarray(X)


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


@pytest.mark.parametrize("pred", [True, False])
def test_without_vmap_a_branch_does_not_run_the_other_one(pred):
    program = compiled(chosen, jnp.array(pred), X[0, 0])
    want = NEW if pred else OLD
    np.testing.assert_allclose(program(jnp.array(pred), X[0, 0]), want[0, 0], rtol=1e-5)
    # The product is in the branch that keeps: once, and not in the other one beside the sine.
    text = program.as_text()
    assert text.count(" conditional(") == 1 and text.count(" dot(") == 1


def test_members_of_nested_vmaps_each_get_their_branch():
    preds = jnp.array([[True, False, False], [False, False, False]])
    twice = jax.vmap(jax.vmap(chosen))
    program = compiled(twice, preds, X)
    assert " conditional(" in program.as_text()
    want = np.where(np.asarray(preds)[:, :, None, None], NEW, OLD)
    np.testing.assert_allclose(program(preds, X), want, rtol=1e-5, atol=1e-6)
    # A predicate that only the outer, or only the inner one maps, or none.
    outer = jax.jit(jax.vmap(jax.vmap(chosen, (None, 0))))(preds[:, 0], X)
    np.testing.assert_allclose(outer, np.stack([NEW[0], OLD[1]]), rtol=1e-5, atol=1e-6)
    inner = jax.jit(jax.vmap(jax.vmap(chosen), (None, 0)))(preds[0], X)
    by_member = np.where(np.asarray(preds)[:1, :, None, None], NEW, OLD)
    np.testing.assert_allclose(inner, by_member, rtol=1e-5, atol=1e-6)
    for pred, expected in ((True, NEW), (False, OLD)):
        both = jax.jit(jax.vmap(jax.vmap(chosen, (None, 0)), (None, 0)))(jnp.array(pred), X)
        np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-6)
