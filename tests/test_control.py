"""Convolutions inside loops and branches, and the evaluator that rewrites them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import curvax
from curvax._jaxpr import replacing
from curvax._xla import fast_convs_in_loops


class Convolutions(nn.Module):
    """Strided, dilated, transposed, grouped, one- and three-dimensional."""

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Conv(4, (3, 3), strides=2)(x))
        h = nn.tanh(nn.Conv(4, (3, 2), kernel_dilation=(1, 2), feature_group_count=2)(h))
        h = nn.tanh(nn.ConvTranspose(3, (2, 2), strides=(2, 2))(h))
        one = nn.Conv(2, (3,))(h.mean(1))
        three = nn.Conv(2, (2, 2, 2))(h[..., None])
        return jnp.concatenate([one.mean(1), three.mean((1, 2, 3))], axis=-1)


def convolutions(text):
    """Layouts of the convolutions of a program, as the compiler prints them."""
    return {
        line.split("dim_labels=")[1].split(",")[0]
        for line in text.splitlines()
        if "dim_labels=" in line
    }


@functools.cache
def convolutional():
    """A module, its params, a batch and the gradient there."""
    module, x = Convolutions(), jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    params, batch = jax.jit(module.init)(jax.random.key(1), x), (x, jnp.ones((3, 4)))
    gradient = jax.jit(jax.grad(curvax.Objective(module.apply, curvax.losses.squared_error())))
    return module, params, batch, gradient(params, batch)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_a_body_is_the_same_function_with_convolutions_in_the_standard_layout(wrap):
    module, params, batch, plain = convolutional()
    objective = curvax.Objective(wrap(module.apply), curvax.losses.squared_error())
    fast = jax.jit(fast_convs_in_loops(jax.grad(objective)))
    chex.assert_trees_all_close(fast(params, batch), plain, rtol=1e-5, atol=1e-6)
    lowered = fast.lower(params, batch).as_text()
    layouts = {
        line.split("dim_numbers = ")[1].split(",window")[0]
        for line in lowered.splitlines()
        if "dim_numbers =" in line
    }
    assert {layout.replace(" ", "").split("window")[0].rstrip(",") for layout in layouts} == {
        "[b,0,f]x[0,i,o]->[b,0,f]",
        "[b,0,1,f]x[0,1,i,o]->[b,0,1,f]",
        "[b,0,1,2,f]x[0,1,2,i,o]->[b,0,1,2,f]",
    }


def test_refreshes_probes_and_chunks_of_a_convolutional_model_have_no_slow_layout():
    """Convolutions in a loop or branch of curvax have the layout with a fast kernel only."""

    class Cnn(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            return nn.Dense(10)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))

    module, x = Cnn(), jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    objective = curvax.Objective(module.apply, curvax.losses.softmax_cross_entropy())
    batch, key = (x, jax.ShapeDtypeStruct((8,), jnp.int32)), jax.random.key(0)
    tx = curvax.sophia_h(0.1, objective)
    programs = {
        "refresh": lambda p, b: tx.update(p, tx.init(p), p, batch=b),
        "probes": lambda p, b: curvax.hutchinson_diagonal(curvax.hvp(objective, p, b), p, key, 4),
        "chunks": lambda p, b: curvax.hvp(objective, p, b, microbatch=2)(p),
        "examples": lambda p, b: curvax.empirical_fishervp(objective, p, b, microbatch=2)(p),
    }
    for name, program in programs.items():
        layouts = convolutions(jax.jit(program).lower(params, batch).compile().as_text())
        assert layouts == {"b01f_01io->b01f"}, name


def test_replacing_enters_jit_and_remat_and_leaves_the_rest_alone():
    def fun(x):
        inner = jax.jit(lambda x: jnp.sin(x) * 2)
        remat = jax.checkpoint(lambda x: jnp.sin(x) + 1)
        loop = lax.fori_loop(0, 3, lambda i, c: jnp.sin(c), x)
        return inner(x) + remat(x), {"loop": loop, "same": x}, 5.0

    x = jnp.linspace(0, 1, 4)
    replaced = replacing(fun, {"sin": lambda x, **_: 10 * x})
    total, rest, constant = replaced(x)
    np.testing.assert_allclose(total, 30 * x + 1, rtol=1e-6)
    np.testing.assert_allclose(rest["loop"], fun(x)[1]["loop"], rtol=1e-6)
    np.testing.assert_array_equal(rest["same"], x)
    assert constant == 5.0
    chex.assert_trees_all_close(replacing(fun, {"no_such": None})(x), fun(x))
    np.testing.assert_allclose(jax.grad(lambda x: replaced(x)[0].sum())(x), 30, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(lambda s: replaced(s * x)[0])(jnp.arange(2.0))[1], total, rtol=1e-6
    )
    closed_over = jax.vmap(
        lambda s: replacing(lambda x: jnp.sin(s * x), {"sin": lambda x, **_: x})(x)
    )(jnp.arange(2.0))
    np.testing.assert_allclose(closed_over[1], x)
