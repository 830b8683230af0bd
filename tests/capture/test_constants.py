"""Kernels that constants gather, multiply, mask and round, against dense matrices: the blocks of
single layers, for which K-FAC and EK-FAC are exact.
"""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from zoo import normal

import curvax
from curvax import losses

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
DAMPING = 0.1


def correlated(*shape):
    """Inputs of mean one, with correlated entries."""
    mixing = normal(8, shape[-1], shape[-1])
    return normal(9, *shape) @ mixing + 1


def problem(model, params, inputs, **kwargs):
    objective = curvax.Objective(model, losses.squared_error())
    outputs = jax.eval_shape(model, params, inputs)
    batch = inputs, jnp.zeros(outputs.shape)
    return objective, batch, curvax.kron_layout(objective, params, batch, **kwargs)


def dense(matvec, params):
    return curvax.to_dense(matvec, params)


def exact_and_blocks(objective, layout, params, batch):
    """The dense Gauss-Newton matrix, K-FAC and EK-FAC curvature, and their damped inverses."""

    def compute(params, batch):
        factors = curvax.kron_factors(objective, layout, params, batch, KEY, fisher="exact")
        basis = curvax.kron.kron_basis(layout, factors)
        moments = curvax.kron.kron_moments(
            objective, layout, basis, params, batch, KEY, fisher="exact"
        )
        power = lambda which, p, damping: dense(
            curvax.kron_inverse(layout, which, damping, power=p), params
        )
        curvatures = [power(which, 1.0, 0.0) for which in (factors, moments)]
        inverses = [power(which, -1.0, DAMPING) for which in (factors, moments)]
        return dense(curvax.ggnvp(objective, params, batch), params), curvatures, inverses

    return jax.jit(compute)(params, batch)


CIRCULANT = (np.arange(4)[None] - np.arange(4)[:, None]) % 4
FEATURES = lambda p, x: jnp.einsum("bhi,iohg->bgo", x, p["w"][..., CIRCULANT]) + p["b"]
X, IMAGES = correlated(7, 4), correlated(5, 4, 2)
ROWS = jnp.array([2, 0, 3, 1])

# Model, shapes of the leaves, and the inputs.
SINGLE = {
    "rows": (lambda p, x: x @ p["w"][ROWS], {"w": (4, 3)}, X),
    "taken": (lambda p, x: x @ jnp.take(p["w"], ROWS - 4, axis=0), {"w": (4, 3)}, X),
    "columns": (lambda p, x: x @ p["w"][:, ROWS] + p["b"][ROWS], {"w": (4, 4), "b": (4,)}, X),
    "columns, bias": (lambda p, x: x @ p["w"][:, ROWS] + p["b"], {"w": (4, 4), "b": (4,)}, X),
    "anything": (
        lambda p, x: x @ p["w"].ravel()[np.random.default_rng(0).permutation(12).reshape(4, 3)],
        {"w": (4, 3)},
        X,
    ),
    "computed": (lambda p, x: x @ p["w"][(3 * jnp.arange(4) + 1) % 4], {"w": (4, 3)}, X),
    "equal rows": (lambda p, x: x @ p["w"][jnp.array([1, 0, 1, 1])], {"w": (2, 3)}, X),
    "equal columns": (lambda p, x: x @ p["w"][:, jnp.array([1, 0, 1])], {"w": (4, 2)}, X),
    "group": (lambda p, x: x @ p["w"][CIRCULANT], {"w": (4,)}, X),
    "group, features": (FEATURES, {"w": (2, 3, 4), "b": (3,)}, IMAGES),
    "group, flat": (
        lambda p, x: (
            x.reshape(len(x), -1) @ p["w"][..., CIRCULANT].transpose(2, 0, 3, 1).reshape(8, 12)
        ),
        {"w": (2, 3, 4)},
        IMAGES,
    ),
    "group, rotations": (
        lambda p, x: lax.conv_general_dilated(
            x,
            jnp.concatenate([jnp.rot90(p["w"], k) for k in range(4)], axis=3),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        {"w": (2, 2, 2, 2)},
        correlated(3, 3, 3, 2),
    ),
    "number": (lambda p, x: x @ (p["w"] * 0.5) + p["b"], {"w": (4, 3), "b": (3,)}, X),
    "root": (lambda p, x: x @ (-p["w"] / jnp.sqrt(4)) + 2 * p["b"], {"w": (4, 3), "b": (3,)}, X),
    "output times": (
        lambda p, x: (x @ (p["w"] * 2)) * 0.25 - 3 * p["b"],
        {"w": (4, 3), "b": (3,)},
        X,
    ),
    "each": (
        lambda p, x: x @ (p["w"] * jnp.outer(jnp.arange(1.0, 5), jnp.array([2, -1, 0.5]))),
        {"w": (4, 3)},
        X,
    ),
    "gathered and scaled": (
        lambda p, x: x @ (p["w"][ROWS] * jnp.array([2, -1, 0.5])) + p["b"] * jnp.array([4, -2, 1]),
        {"w": (4, 3), "b": (3,)},
        X,
    ),
    "masked outputs": (
        lambda p, x: x @ (p["w"] * (jnp.arange(3) > 0)),
        {"w": (4, 3)},
        X,
    ),
    "masked inputs": (lambda p, x: x @ (p["w"] * (jnp.arange(4) > 1)[:, None]), {"w": (4, 3)}, X),
    "rounded": (
        lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"])) + p["b"],
        {"w": (4, 3), "b": (3,)},
        X,
    ),
    "merged": (
        lambda p, x: x @ (p["w"] + lax.stop_gradient(p["a"]) @ jnp.ones((2, 3))),
        {"w": (4, 3), "a": (4, 2)},
        X,
    ),
    "table": (
        lambda p, ids: jax.vmap(lambda i: p["w"][i] / 2)(ids),
        {"w": (5, 3)},
        jnp.array([0, 3, 3, 1, 4, 0]),
    ),
    "permuted table": (
        lambda p, ids: p["w"][jnp.array([4, 2, 0, 1, 3])][ids],
        {"w": (5, 3)},
        jnp.array([0, 3, 3, 1, 4, 0]),
    ),
    "equinox": (
        lambda p, ids: jax.vmap(equinox.nn.Embedding(weight=p["w"]))(ids),
        {"w": (5, 3)},
        jnp.array([0, 3, 3, 1, 4, 0]),
    ),
    "positions": (lambda p, x: x + p["w"], {"w": (4, 2)}, IMAGES),
    "repeated": (lambda p, x: x[:, :1] + p["w"], {"w": (4, 2)}, IMAGES),
    "first positions": (lambda p, x: x + 0.5 * p["w"][None, :4], {"w": (6, 2)}, IMAGES),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_layers_are_exact(name):
    model, shapes, inputs = SINGLE[name]
    inputs = inputs.astype(int if inputs.dtype.kind == "i" else float)  # in double precision
    params = {path: normal(i, *shape) for i, (path, shape) in enumerate(shapes.items())}
    objective, batch, layout = problem(model, params, inputs)
    for leaf in layout.leaves:
        assert leaf.path == "['a']" or (leaf.kind, leaf.unmatched) == ("kron", None), leaf
    exact, curvatures, inverses = exact_and_blocks(objective, layout, params, batch)
    inverse = np.linalg.inv(exact + DAMPING * np.eye(len(exact)))
    for curvature, inverse_of_block in zip(curvatures, inverses, strict=True):
        np.testing.assert_allclose(curvature, exact, rtol=0, atol=1e-12 * abs(exact).max())
        np.testing.assert_allclose(
            inverse_of_block, inverse, rtol=0, atol=1e-11 * abs(inverse).max()
        )


def test_a_mask_leaves_the_block_of_the_entries_that_are_there():
    mask = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]])
    model = lambda p, x: x @ (p["w"] * mask) + p["b"]
    params = {"w": normal(1, 4, 3), "b": normal(2, 3)}
    objective, batch, layout = problem(model, params, X.astype(float))
    assert "constant mask: 7 of 12 entries" in str(layout)
    exact, curvatures, inverses = exact_and_blocks(objective, layout, params, batch)
    # K-FAC: `mask * A (mask * V) G` is exact. EK-FAC: the moments are those of masked gradients.
    np.testing.assert_allclose(curvatures[0], exact, rtol=0, atol=1e-12 * abs(exact).max())
    there = np.concatenate([np.ones(3), mask.ravel()]) > 0
    assert not exact[~there].any()
    for inverse in inverses:
        assert (
            np.isfinite(inverse).all()
            and not inverse[~there].any()
            and not inverse[:, ~there].any()
        )
        assert np.linalg.eigvalsh(inverse[there][:, there]).min() > 0


def test_moments_behind_a_mask_have_the_trace_of_the_fisher():
    mask = np.tril(np.ones((4, 3)))
    model = lambda p, x: jnp.tanh(x @ (p["w"] * mask))
    params = {"w": normal(1, 4, 3)}
    objective, batch, layout = problem(model, params, X.astype(float))
    (name,) = (block.name for block in layout.blocks)

    def traces(params, batch):
        factors = curvax.kron_factors(objective, layout, params, batch, KEY, fisher="exact")
        basis = curvax.kron.kron_basis(layout, factors)
        moments = curvax.kron.kron_moments(
            objective, layout, basis, params, batch, KEY, fisher="exact"
        )
        exact = jnp.trace(dense(curvax.ggnvp(objective, params, batch), params))
        return moments.moments[name].mean.sum(), exact

    moments, exact = jax.jit(traces)(params, batch)
    np.testing.assert_allclose(moments, exact, rtol=1e-12)


def test_pooled_group_convolutions_are_exact_when_reduced():
    model = lambda p, x: FEATURES(p, x).mean(axis=1)
    params = {"w": normal(1, 2, 3, 4), "b": normal(2, 3)}
    objective, batch, layout = problem(model, params, IMAGES.astype(float), sharing="reduce")
    exact, curvatures, _ = exact_and_blocks(objective, layout, params, batch)
    for curvature in curvatures:
        np.testing.assert_allclose(curvature, exact, rtol=0, atol=1e-12 * abs(exact).max())


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_added_positions_are_a_lookup(fisher):
    """The same factors as where the rows are looked up by numbers in the inputs."""
    numbers = jnp.broadcast_to(jnp.arange(3), (5, 3))
    inputs = {"x": normal(1, 5, 3, 2), "numbers": numbers}
    params = {"positions": normal(2, 4, 2), "w": normal(3, 2, 2)}
    ways = [
        lambda table, inputs: table[inputs["numbers"]],
        lambda table, inputs: table[:3],
        lambda table, inputs: table[jnp.arange(3)][None],
    ]

    def factors_of(rows):
        model = lambda p, x: jnp.tanh(x["x"] + rows(p["positions"], x)) @ p["w"]
        objective, batch, layout = problem(model, params, inputs)
        assert [leaf.kind for leaf in layout.leaves] == ["kron", "kron"]
        estimate = lambda p: curvax.kron_factors(objective, layout, p, batch, KEY, fisher=fisher)
        return jax.jit(estimate)(params)

    first, *others = map(factors_of, ways)
    for other in others:
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(first), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)
    counts = first.blocks["['positions']"].a.mean[0]
    np.testing.assert_allclose(counts, [1 / 3, 1 / 3, 1 / 3, 0])


def test_experts_of_a_ragged_product_are_a_stack():
    """The same factors as where rows are dispatched to the experts by zeros and ones."""
    sizes = jnp.array([2, 0, 4])
    gate = jnp.repeat(jnp.eye(3), np.array(sizes), axis=0)

    def ragged(p, x):
        h = jnp.tanh(lax.ragged_dot(x, p["w"], sizes))
        return lax.ragged_dot(h, p["v"], sizes)

    def dispatched(p, x):
        h = jnp.tanh(jnp.einsum("eti,eio->eto", jnp.einsum("te,ti->eti", gate, x), p["w"]))
        return jnp.einsum("te,eto->to", gate, jnp.einsum("eti,eio->eto", h, p["v"]))

    params = {"w": normal(1, 3, 4, 3), "v": normal(2, 3, 3, 2)}

    def factors_of(model):
        objective, batch, layout = problem(model, params, normal(3, 6, 4))
        assert [block.shape[0] for block in layout.blocks] == [3, 3]
        return jax.jit(lambda p: curvax.kron_factors(objective, layout, p, batch, KEY))(params)

    first, second = factors_of(ragged), factors_of(dispatched)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)
    assert not first.blocks["['w']"].g.mean[1].any() and first.blocks["['w']"].g.mean[2].any()


def custom(w, x):
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))
    return product(w, x)


W43 = {"w": (4, 3)}
WITH_BIAS = {"w": (4, 3), "b": (3,)}
TOEPLITZ = np.arange(4)[:, None] - np.arange(3) + 2
REASONS = {
    "tied otherwise": (
        lambda p, x: x @ p["w"][TOEPLITZ],
        {"w": (6,)},
        "w",
        "several times, not as the rounds",
    ),
    "out of range": (
        lambda p, x: x @ jnp.take(p["w"], jnp.array([0, 1, 2, 4]), axis=0),
        W43,
        "w",
        "out of range",
    ),
    "times zero": (lambda p, x: x @ (p["w"] * 0.0), W43, "w", "multiplied by zero"),
    "times anything": (
        lambda p, x: x @ (p["w"] * np.arange(1.0, 13).reshape(4, 3) ** 2),
        W43,
        "w",
        "neither a mask nor a product",
    ),
    "times data": (lambda p, x: x @ (p["w"] * x.sum()), W43, "w", "enters `mul`"),
    "masked by data": (lambda p, x: x @ jnp.where(x.sum() > 0, p["w"], 0), W43, "w", "select_n"),
    "gathered and read": (
        lambda p, x: x @ p["w"][ROWS] + p["w"][ROWS].sum(),
        W43,
        "w",
        "reduce_sum",
    ),
    "complex": (
        lambda p, x: jnp.real(x.astype(complex) @ p["w"].astype(complex)),
        W43,
        "w",
        "becomes complex in `convert_element_type`; blocks are of real linear maps",
    ),
    "pairs": (
        lambda p, x: jnp.real(x @ (p["w"][:2] + 1j * p["w"][2:]).repeat(2, 0)),
        W43,
        "w",
        "becomes complex",
    ),
    "bias of none": (
        lambda p, x: x @ jnp.exp(p["w"]) + p["b"],
        WITH_BIAS,
        "b",
        "its map is in no block: ['w'] enters `exp`",
    ),
    "bias of a nested map": (
        lambda p, x: jnp.einsum("bi,io->bo", x, jnp.exp(p["w"]))[:, None] + p["b"],
        WITH_BIAS,
        "b",
        "its map is in no block: ['w'] enters `exp`",
    ),
    "bias of a refused map": (
        lambda p, x: (x @ p["w"] + p["b"]) * p["w"].sum(),
        WITH_BIAS,
        "b",
        "its map is in no block: ['w'] enters `reduce_sum`",
    ),
    "its own derivative": (
        lambda p, x: custom(p["w"], x) + p["b"],
        WITH_BIAS,
        "w",
        "DirectAdjoint",
    ),
    "bias of such": (
        lambda p, x: custom(p["w"], x) + p["b"],
        WITH_BIAS,
        "b",
        "its map is in no block",
    ),
    "bias times anything": (
        lambda p, x: x @ p["w"] + p["b"] * jnp.arange(1.0, 4),
        WITH_BIAS,
        "b",
        "axes other than a bias has",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_followed_has_its_reason(name):
    model, shapes, leaf, reason = REASONS[name]
    params = {path: normal(i, *shape) for i, (path, shape) in enumerate(shapes.items())}
    _, _, layout = problem(model, params, X.astype(float))
    leaves = {each.path: each for each in layout.leaves}
    assert reason in leaves[f"['{leaf}']"].reason and leaves[f"['{leaf}']"].kind == "diagonal"


def test_rows_at_constant_numbers_that_are_no_kernel_are_looked_up():
    """Biases of attention by distance, as T5 has them."""
    distance = abs(np.arange(4)[:, None] - np.arange(4))

    def model(p, x):
        bias = p["distances"][jnp.array(distance)].transpose(2, 0, 1)  # [heads, 4, 4]
        return jax.nn.softmax(x[:, None] * x[:, None].swapaxes(2, 3) + bias) @ x[:, None]

    params = {"distances": normal(1, 4, 2)}
    _, _, layout = problem(model, params, normal(2, 3, 4, 1))
    (block,) = layout.blocks
    assert block.uses[0].kind == "lookup" and block.shape == (1, 4, 2)


def test_the_table_says_how_much_is_in_blocks_and_warns():
    model = lambda p, x: (x @ p["w"]) * p["gain"].sum()
    for size, ending in ((12, "50 % of the parameters are in blocks (12 of 24)"), (13, "48 %")):
        params = {"w": jnp.ones((4, 3)), "gain": jnp.ones(size)}
        _, _, layout = problem(model, params, X)
        last = str(layout).splitlines()[-1]
        assert ending in last and last.startswith("WARNING: only") == (size == 13)


@pytest.mark.parametrize("rule", [curvax.kfac, curvax.ekfac])
def test_rules_train_behind_constants(rule):
    """Entries behind a mask stay as they are, all others move, and the loss falls."""
    mask = np.tril(np.ones((4, 4)))

    def model(p, x):
        h = jnp.tanh(x @ (p["w"] * mask) + 0.5 * p["b"])
        return h[:, None] @ p["v"][..., CIRCULANT].reshape(4, 2, 16)[:, 1] + p["t"]

    params = {
        "w": normal(1, 4, 4),
        "b": normal(2, 4),
        "v": normal(3, 4, 2, 4),
        "t": normal(4, 2, 16),
    }
    objective, batch, layout = problem(model, params, X.astype(float))
    tx = rule(0.1, objective, layout, damping=1e-2)

    @jax.jit
    def steps(params):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(objective)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = lax.scan(step, (params, tx.init(params)), None, 5)
        return params, losses

    after, values = steps(params)
    assert values[-1] < values[0]
    moved = after["w"] != params["w"]
    assert np.array_equal(moved, mask > 0) and np.all(after["b"] != params["b"])


def test_a_traced_mask_is_no_constant():
    params, batch = {"w": normal(1, 4, 3)}, (X.astype(float), jnp.zeros((7, 3)))
    masked = lambda mask: curvax.Objective(lambda p, x: x @ (p["w"] * mask), losses.squared_error())
    mask = jnp.ones((4, 3)).at[0, 0].set(0)
    layout = curvax.kron_layout(masked(mask), params, batch)
    reasons = []

    def traced(mask):
        reasons.append(curvax.kron_layout(masked(mask), params, batch).leaves[0].reason)
        return curvax.kron_factors(masked(mask), layout, params, batch, KEY)

    with pytest.raises(ValueError, match=r"another model.*masks.*not traced"):
        jax.jit(traced)(mask)
    assert reasons == ["enters `mul`"]


def test_constants_are_not_rounded_to_bfloat16():
    """Cotangents are multiplied in float32: G is that of the scaled kernel times the square."""
    w, x = normal(1, 4, 3).astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    constant = jnp.array(0.3, jnp.bfloat16)

    def g_of(model, w):
        objective, batch, layout = problem(model, {"w": w}, x)
        batch = x, jnp.zeros((7, 3), jnp.bfloat16)
        factors = curvax.kron_factors(objective, layout, {"w": w}, batch, KEY)
        return factors.blocks["['w']"].g.total

    scaled = g_of(lambda p, x: x @ (p["w"] * constant), w)
    plain = g_of(lambda p, x: x @ p["w"], w * constant)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, float(constant) ** 2 * plain, rtol=1e-6)
