"""The objective under value_and_grad, with aux and shared inputs; chunks of the batch axis."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import curvax
from curvax import losses
from curvax._batch import map_chunks, sum_over_chunks
from curvax._shared import unwrap
from curvax.objective import scaled_to_share, total_terms


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def test_batchnorm_and_dropout_through_shared_inputs_and_aux():
    module, x = Normed(), jax.random.normal(jax.random.key(0), (8, 5))
    variables = jax.jit(lambda x: module.init(jax.random.key(1), x, False))(x)

    def model(params, inputs):
        return module.apply(
            {"params": params, "batch_stats": inputs["stats"]},
            inputs["x"],
            True,
            rngs={"dropout": inputs["key"]},
            mutable="batch_stats",
        )

    objective = curvax.Objective(model, losses.softmax_cross_entropy(), has_aux=True)
    inputs = {
        "x": x,
        "stats": curvax.Shared(variables["batch_stats"]),
        "key": curvax.Shared(jax.random.key(2)),
    }
    batch = (inputs, jnp.arange(8) % 3)
    gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, aux), grads = gradient(variables["params"], batch)
    logits, expected_aux = jax.jit(model)(variables["params"], unwrap(inputs))
    np.testing.assert_allclose(value, losses.softmax_cross_entropy()(logits, batch[1]), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), aux, expected_aux
    )
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    another = ({**inputs, "key": curvax.Shared(jax.random.key(3))}, batch[1])
    assert gradient(variables["params"], another)[0][0] != value  # the key reaches the dropout
    product = jax.jit(lambda p, b: curvax.ggnvp(objective, p, b)(p))(variables["params"], batch)
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(product))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_shares_of_any_partition_sum_to_the_objective(name):
    objective, params, batch, _ = CASES[name]()

    def in_chunks(params, batch, microbatch):
        totals = total_terms(objective, params, batch, microbatch)
        value = lambda chunk: scaled_to_share(objective, params, chunk, totals).value(params, chunk)
        return sum_over_chunks(value, batch, microbatch)

    whole, *chunked = jax.jit(
        lambda p, b: [objective.value(p, b)] + [in_chunks(p, b, m) for m in (1, 3)]
    )(params, batch)
    np.testing.assert_allclose(chunked, [whole] * 2, rtol=1e-12)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 7, 9])
def test_chunks_cover_every_row_once_and_keep_the_order(microbatch):
    rows = {"x": jnp.arange(14.0).reshape(7, 2), "shared": curvax.Shared(jnp.ones(3))}
    seen = []

    def double(chunk):
        seen.append(chunk["x"].shape[0])
        assert chunk["shared"].value.shape == (3,)
        return 2 * chunk["x"]

    np.testing.assert_array_equal(map_chunks(double, rows, microbatch), 2 * rows["x"])
    assert max(seen) <= microbatch
    np.testing.assert_allclose(
        sum_over_chunks(lambda c: c["x"].sum(), rows, microbatch), rows["x"].sum()
    )


def test_errors_say_what_and_where():
    objective = curvax.Objective(lambda w, x: x @ w, losses.squared_error(), has_aux=True)
    with pytest.raises(TypeError, match=r"must return \(outputs, aux\), got float32\[2, 1\]"):
        objective(jnp.ones((3, 1)), (jnp.ones((2, 3)), jnp.ones((2, 1))))
    vector = curvax.Objective(lambda w, x: x @ w, lambda f, y: (f - y) ** 2)
    with pytest.raises(TypeError, match=r"a loss must return a real scalar, got float32\[2, 1\]"):
        vector(jnp.ones((3, 1)), (jnp.ones((2, 3)), jnp.ones((2, 1))))
    with pytest.raises(
        ValueError, match=r"batch\[0\]\['a'\] has 2 rows, batch\[0\]\['b'\] is float32\[3\]"
    ):
        objective(jnp.ones((3, 1)), ({"a": jnp.ones(2), "b": jnp.ones(3)}, jnp.ones(2)))
    with pytest.raises(ValueError, match="no array with a batch axis"):
        objective(jnp.ones(3), (curvax.Shared(jnp.ones(3)), None))
