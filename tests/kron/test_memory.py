"""Temporary memory: patches of convolutions, inverses of large factors, steps of K-FAC."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from zoo import ARCHITECTURES

import curvax
from curvax import losses
from curvax.capture import _chunks, _record
from curvax.kron import _kron_factor
from curvax.kron._kron_factor import Full


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def temporary(fn, *args):
    """Bytes of temporary memory of a program."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


# --- patches --------------------------------------------------------------------------------------


def convolution(window, groups=1):
    """A convolution that moves by one place, and a head."""

    def model(p, x):
        h = lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.tanh(h + p["b"]).mean((1, 2)) @ p["v"]

    params = {"w": normal(1, window, window, 2 // groups, 4), "b": normal(2, 4)}
    params["v"] = normal(3, 4, 2)
    return curvax.Objective(model, losses.squared_error()), params


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "sharing, fisher", [("expand", "mc"), ("expand", "exact"), ("reduce", "mc")]
)
def test_chunks_of_patches_have_the_same_factors(x64, monkeypatch, sharing, fisher, groups):
    objective, params = convolution(window=6, groups=groups)
    batch = normal(4, 15, 10, 10, 2), jnp.zeros((15, 2))  # 15 examples in chunks of 2, and one more
    layout = curvax.kron_layout(objective, params, batch).edit("['w']", sharing=sharing)
    sizes = []

    def recorded(use, raw, per_example):
        chunks = _chunks.chunked_inputs(use, raw, per_example)
        sizes.append(chunks and chunks.size)
        return chunks

    def factors():
        estimate = lambda params, batch: curvax.kron_factors(
            objective, layout, params, batch, jax.random.key(0), fisher=fisher
        )
        return jax.jit(estimate)(params, batch)

    monkeypatch.setattr(_chunks, "_ENTRIES", 0)
    monkeypatch.setattr(_record, "chunked_inputs", recorded)
    by_chunks = factors()
    assert sorted(sizes, key=str) == [2, None]  # the convolution, and the head

    monkeypatch.setattr(_record, "chunked_inputs", lambda *args: None)
    chex.assert_trees_all_close(by_chunks, factors(), rtol=1e-12, atol=1e-14)


def test_patches_of_large_windows_take_no_more_memory_than_the_gradient():
    objective, params = convolution(window=8)  # every entry is in 64 patches
    batch = normal(4, 32, 32, 32, 2), jnp.zeros((32, 2))
    layout = curvax.kron_layout(objective, params, batch)
    estimate = lambda params, batch: curvax.kron_factors(
        objective, layout, params, batch, jax.random.key(0)
    )
    needed = temporary(estimate, params, batch)
    assert needed <= 4 * temporary(jax.value_and_grad(objective), params, batch)


# --- inverses -------------------------------------------------------------------------------------


def test_the_inverse_of_a_large_factor_takes_two_and_a_half_copies():
    n = 3000
    matrix = jax.ShapeDtypeStruct((1, n, n), jnp.float32)
    assert temporary(lambda x: Full(x).inverse(), matrix) <= 2.5 * 4 * n**2


def test_batches_of_factors_are_bounded(x64, monkeypatch):
    roots = [normal(seed, 1, 3, 3) for seed in range(5)]
    factors = [Full(x @ x.swapaxes(1, 2) + jnp.eye(3)) for x in roots]
    monkeypatch.setattr(_kron_factor, "ENTRIES_AT_A_TIME", 20)  # two matrices of 9 entries
    batches = _kron_factor._batches(factors, _kron_factor.equal_sizes)
    assert [list(batch) for batch in batches] == [[0, 1], [2, 3], [4]]
    for factor, inverted in zip(factors, _kron_factor.invert_all(factors), strict=True):
        chex.assert_trees_all_close(
            inverted.inverse.matrix, jnp.linalg.inv(factor.matrix), rtol=1e-10
        )


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "actor_critic", "vit", "mamba"])
def test_a_step_takes_four_times_the_memory_of_the_gradient(monkeypatch, name):
    monkeypatch.setattr(_chunks, "_ENTRIES", 0)
    case = ARCHITECTURES[name]()
    # Of few examples, factors and bookkeeping would be most of it.
    inputs = jax.tree.map(lambda x: jnp.tile(x, (64, *[1] * (x.ndim - 1))), case.inputs)
    outputs = jax.eval_shape(case.model, case.params, inputs)
    batch = inputs, jnp.zeros(outputs.shape, outputs.dtype)
    objective = curvax.Objective(case.model, losses.squared_error())
    layout = curvax.kron_layout(objective, case.params, batch)
    tx = curvax.kfac(0.1, objective, layout, damping=1e-2, inverse_every=10)

    def step(params, state, batch):
        gradient = jax.grad(objective)(params, batch)
        return tx.update(gradient, state, params, batch=batch)

    needed = temporary(step, case.params, tx.init(case.params), batch)
    assert needed <= 4 * temporary(jax.grad(objective), case.params, batch)
