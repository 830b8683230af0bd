"""Damped inverses and moments against dense matrices,
made in NumPy from factors or from the Gauss-Newton matrix.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax.tree_util import keystr

import curvax
from curvax import losses
from curvax.kron import WeightedMean, _gradient_pairs
from curvax.kron._factors import init_factors
from curvax.kron._gradient_pairs import Basis
from curvax.kron._kron_factor import Diagonal, Full, invert_all
from curvax.kron._moments import carried_moments
from curvax.kron._two_products import combined_factors

pytestmark = pytest.mark.usefixtures("x64")

POWERS = (-1.0, -0.5, 0.5, 1.0)


class Problem(NamedTuple):
    """An objective, its params and batch, and how its layout is asked for."""

    objective: curvax.Objective
    params: Any
    batch: Any
    options: Any

    def layout(self):
        return curvax.kron_layout(self.objective, self.params, self.batch, **self.options)


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def draw(shapes):
    """Params of a tree of shapes."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(
        structure, [normal(i, *shape, scale=0.7) for i, shape in enumerate(leaves)]
    )


def indices(block, params):
    """Which rows of dense matrices, in the order of `ravel_pytree`, are the entries of a block:
    `[stack, in, out]`.
    """
    sizes = [x.size for x in jax.tree.leaves(params)]
    starts = np.cumsum([0, *sizes])
    leaves = {
        keystr(path): np.arange(start, start + x.size).reshape(x.shape)
        for (path, x), start in zip(jax.tree.leaves_with_path(params), starts, strict=False)
    }
    kernel = block.kernel.read(leaves)
    return (
        kernel
        if block.bias is None
        else np.concatenate([kernel, block.bias.read(leaves)[:, None]], axis=1)
    )


def slices(block, params):
    """For each slice of a block's stack the flat indices of its entries."""
    return indices(block, params).reshape(block.shape[0], -1)


def mean(factor):
    total, weight = np.asarray(factor.total), np.asarray(factor.weight)
    return total / weight.reshape(*weight.shape, *[1] * (total.ndim - weight.ndim))


def full(side, structure):
    """A side as full matrices."""
    if structure == "identity":
        return np.broadcast_to(np.eye(side.shape[1]), (*side.shape[:2], side.shape[1]))
    return np.stack([np.diag(x) for x in side]) if side.ndim == 2 else side


def dense_sides(block, factors):
    """A and G of a block; those of the transposed use are balanced with the others, and added."""
    a, g = full(mean(factors.a), block.a_structure), full(mean(factors.g), block.g_structure)
    if factors.second is None:
        return a, g
    d, c = (full(mean(x), side) for x, side in zip(factors.second, block.structures, strict=True))
    tr = lambda x: np.trace(x, axis1=1, axis2=2)[:, None, None]
    left = a * np.sqrt(tr(g) / tr(a)) + d * np.sqrt(tr(c) / tr(d))
    right = g * np.sqrt(tr(a) / tr(g)) + c * np.sqrt(tr(d) / tr(c))
    norm = np.sqrt((tr(a) * tr(g) + tr(d) * tr(c)) / (tr(left) * tr(right)))
    return norm * left, norm * right


def to_power(matrix, power):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(values, 1e-300) ** power @ vectors.T


def damped_power(block, a, g, damping, power, scheme):
    """A power of `A x G + damping I`, or of the product of damped sides;
    exact where the damping needs no splitting.
    """
    n, m = len(a), len(g)
    if scheme == "exact" or 1 in (n, m) or "identity" in (block.a_structure, block.g_structure):
        return to_power(np.kron(a, g) + damping * np.eye(n * m), power)
    pi = np.sqrt((np.trace(a) / n) / (np.trace(g) / m))
    left, right = a + pi * damping**0.5 * np.eye(n), g + damping**0.5 / pi * np.eye(m)
    return np.kron(to_power(left, power), to_power(right, power))


def dense_power(layout, params, factors, damping, power, scheme):
    """A power of damped curvature as one matrix."""
    parts = []
    for leaf in layout.leaves:
        outside = leaf.outside == "diagonal"
        diagonal = (
            (mean(factors.diagonal[leaf.path]) + damping) ** power
            if outside
            else np.ones(leaf.shape)
        )
        parts.append(diagonal.ravel())
    dense = np.diag(np.concatenate(parts))
    for block in layout.blocks:
        for which, a, g in zip(
            slices(block, params), *dense_sides(block, factors.blocks[block.name]), strict=True
        ):
            dense[np.ix_(which, which)] = damped_power(block, a, g, damping, power, scheme)
    return dense


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@functools.cache
def garden():
    """A layout with every kind of block, and params for it."""

    def model(p, x):
        parts = [
            x @ p["dense"]["w"] + p["dense"]["b"],
            (
                jnp.einsum("ebi,eio->ebo", jnp.stack([x, -x]), p["experts"]["w"])
                + p["experts"]["b"][:, None]
            ).sum(0),
            jnp.tile(x, (1, 2)) @ p["wide"],
            x @ p["thin"],
            x @ p["sliced"][:, 1:3],
            x @ p["permuted"][::-1].T,
            x @ p["one_output"],
            x[:, :1] @ p["one_input"],
            jnp.tanh(x @ p["tied"]["w"] + p["tied"]["b"]) @ p["tied"]["w"].T,
            x @ p["left"] + x @ p["right"],
            x * p["gain"] * p["scale"],
        ]
        return jnp.concatenate(parts, axis=1)

    affine = lambda *shape: {"w": shape, "b": (*shape[:-2], shape[-1])}
    matrices = {
        "wide": (6, 2),
        "thin": (3, 2),
        "sliced": (3, 4),
        "permuted": (2, 3),
        "left": (3, 2),
        "right": (3, 2),
    }
    joined = {"dense": affine(3, 4), "experts": affine(2, 3, 2), "tied": affine(3, 4)}
    params = draw(
        {
            **matrices,
            **joined,
            "one_output": (3, 1),
            "one_input": (1, 3),
            "gain": (3,),
            "scale": (3,),
        }
    )
    objective = curvax.Objective(model, losses.squared_error())
    width = jax.eval_shape(model, params, jnp.ones((1, 3))).shape[1]
    choices = {
        "unmatched": {"": "diagonal", "['scale']": "identity"},
        "max_dim": {"['wide']": 4, "['thin']": 1},
    }
    layout = curvax.kron_layout(
        objective, params, (jnp.ones((5, 3)), jnp.zeros((5, width))), **choices
    )
    layout = layout.edit("['left']", a_structure="identity").edit(
        "['right']", g_structure="identity"
    )
    of = {block.leaves[0]: block for block in layout.blocks}
    assert (of["['wide']"].a_structure, of["['wide']"].g_structure) == ("diagonal", "full")
    assert of["['experts']['w']"].shape == (2, 4, 2) and of["['tied']['w']"].uses[1].transposed
    assert [(leaf.path, leaf.outside) for leaf in layout.leaves if leaf.outside] == [
        ("['gain']", "diagonal"),
        ("['scale']", "identity"),
        ("['sliced']", "diagonal"),
    ]
    return layout, params


def drawn_factors(layout, params):
    """Factors with positive semidefinite sides, of which some are without full rank,
    and weights of all kinds.
    """
    rng = np.random.default_rng(7)

    def side(factor):
        x = rng.normal(
            size=(factor.total.shape[0], factor.total.shape[1], max(1, factor.total.shape[1] - 1))
        )
        return with_weight(
            x @ x.swapaxes(1, 2) if factor.total.ndim == 3 else (x**2).sum(2), factor
        )

    def with_weight(total, factor):
        return WeightedMean(
            jnp.asarray(total), jnp.array(rng.uniform(0.5, 3, factor.weight.shape), float)
        )

    zeros, is_factor = init_factors(layout, params), lambda x: isinstance(x, WeightedMean)
    diagonal = {
        path: with_weight(rng.uniform(0, 2, x.total.shape), x) for path, x in zeros.diagonal.items()
    }
    return zeros._replace(
        blocks=jax.tree.map(side, zeros.blocks, is_leaf=is_factor), diagonal=diagonal
    )


@pytest.mark.parametrize("scheme", ["exact", "factored"])
def test_every_power_of_every_kind_of_block(scheme):
    layout, params = garden()
    factors, damping = drawn_factors(layout, params), 0.3

    @jax.jit
    def compute(factors, damping):
        build = lambda power: curvax.kron_inverse(
            layout, factors, damping, damping_scheme=scheme, power=power
        )
        return {power: curvax.to_dense(build(power), params) for power in POWERS}

    for power, got in compute(factors, damping).items():
        close(got, dense_power(layout, params, factors, damping, power, scheme))
        np.testing.assert_allclose(got, got.T, rtol=1e-12, atol=1e-12)
    # without any data the curvature is the damping
    outside = np.concatenate(
        [np.full(leaf.shape, leaf.kind == "identity").ravel() for leaf in layout.leaves]
    )
    for power, got in compute(init_factors(layout, params), 0.25).items():
        np.testing.assert_allclose(got, np.diag(np.where(outside, 1, 0.25**power)), rtol=1e-12)


def test_sides_of_a_tied_block_add_up_after_balancing():
    layout, params = garden()
    block = next(block for block in layout.blocks if block.uses[-1].transposed)
    factors = drawn_factors(layout, params).blocks[block.name]
    tr = lambda x: np.trace(x, axis1=1, axis2=2)
    left, right = (x.matrix for x in combined_factors(block.structures, factors))
    (a, g), (d, c) = (tuple(map(mean, pair)) for pair in ((factors.a, factors.g), factors.second))
    np.testing.assert_allclose(tr(left) * tr(right), tr(a) * tr(g) + tr(c) * tr(d), rtol=1e-12)
    for got, want in zip((left, right), dense_sides(block, factors), strict=True):
        close(got, want, 1e-12)
    # how a product's scale is split between its sides does not matter
    scale = lambda factor, x: factor._replace(total=x * factor.total)
    split = factors._replace(a=scale(factors.a, 9.0), g=scale(factors.g, 1 / 9))
    for got, want in zip(combined_factors(block.structures, split), (left, right), strict=True):
        close(got.matrix, want, 1e-12)
    # where one of the uses has no curvature, the other's is all there is
    alone = factors._replace(second=tuple(scale(factor, 0.0) for factor in factors.second))
    left, right = (x.matrix for x in combined_factors(block.structures, alone))
    close(np.kron(left[0], right[0]), np.kron(a[0], g[0]), 1e-12)


def test_damping_is_exact_beside_an_identity_that_two_uses_scale():
    objective = curvax.Objective(lambda w, x: jnp.tanh(x @ w) @ w.T, losses.squared_error())
    params, batch = normal(0, 3, 4), (normal(1, 8, 3), normal(2, 8, 3))
    for side in ({"a_structure": "identity"}, {"g_structure": "identity"}):
        layout = curvax.kron_layout(objective, params, batch).edit("", **side)
        factors = drawn_factors(layout, params)
        want = dense_power(layout, params, factors, 0.5, -1.0, "exact")
        for scheme in ("exact", "factored"):
            build = functools.partial(
                curvax.kron_inverse, layout, damping=0.5, damping_scheme=scheme
            )
            close(jax.jit(lambda f, build=build: curvax.to_dense(build(f), params))(factors), want)


@pytest.mark.parametrize("scheme", ["exact", "factored"])
def test_rank_deficient_factors_in_float32(scheme):
    with jax.enable_x64(False):
        x = jax.random.normal(jax.random.key(0), (8, 512))
        objective, params = (
            curvax.Objective(lambda w, x: x @ w, losses.squared_error()),
            jnp.zeros((512, 2)),
        )
        batch = x, jnp.zeros((8, 2))
        layout = curvax.kron_layout(objective, params, batch)

        @jax.jit
        def compute(damping):
            factors = curvax.kron_factors(
                objective, layout, params, batch, jax.random.key(0), fisher="exact"
            )
            matvec = curvax.kron_inverse(layout, factors, damping, damping_scheme=scheme)
            v = jnp.concatenate([x, jax.random.normal(jax.random.key(1), x.shape)])[
                :, :, None
            ] * jnp.array([1.0, -2.0])
            return (
                jax.vmap(matvec)(jnp.eye(1024).reshape(-1, 512, 2)).reshape(1024, 1024),
                v,
                jax.vmap(matvec)(v),
            )

        # with factored damping, even where its root is lost in the rounding of a side
        for damping in (1e-1, 1e-3, 1e-5, 1e-8, *([1e-14] if scheme == "factored" else [])):
            dense, v, products = (np.asarray(x, np.float64) for x in compute(damping))
            assert np.isfinite(dense).all()
            rounding = 512 * np.finfo(np.float32).eps * np.abs(dense).max()
            np.testing.assert_allclose(dense, dense.T, atol=rounding)
            assert np.linalg.eigvalsh(dense + dense.T).min() > -rounding
            assert (
                (v * products).sum((1, 2)) > 0
            ).all()  # along the data, where the inverse is smallest, and elsewhere


@pytest.mark.parametrize("size", [1, 5, 64, 65, 200, 300])
def test_inverse_of_a_side(size):
    """Above 256 rows one triangle is computed and mirrored;
    below, it is one product, whose bits the backend decides.
    """
    x = np.random.default_rng(size).normal(size=(2, size, 2 * size))
    side = x @ x.swapaxes(1, 2) / size + np.eye(size) / 10
    invert = jax.jit(lambda x: Full(x).inverse().matrix)
    got, want = invert(side), np.linalg.inv(side)
    close(got, want, 1e-10)
    np.testing.assert_array_equal(got, got.swapaxes(1, 2)) if size > 256 else close(
        got, got.swapaxes(1, 2), 1e-14
    )
    for where in {
        0,
        size // 3,
        size - 1,
    }:  # in any part of the recursion a negative direction is seen
        bad = side.copy()
        bad[1, where, where] = -1.0
        broken = invert(bad)
        close(broken[0], want[0], 1e-10)
        assert np.isnan(broken[1]).any()


def rayleigh(matrix):
    """The Rayleigh quotient of the column with the largest diagonal entry,
    which power iteration exceeds.
    """
    column = matrix[:, np.argmax(np.diag(matrix))]
    return column @ matrix @ column / (column @ column)


def test_inverses_and_extreme_eigenvalues_of_many_sides():
    """Of some that are worked on together, padded; one that cannot be inverted does not
    spoil the others.
    """
    rng, matrices = np.random.default_rng(0), []
    for stack, size in ((2, 5), (1, 5), (1, 70), (2, 100), (1, 128), (1, 129)):
        x = rng.normal(size=(stack, size, 2 * size))
        matrices.append(x @ x.swapaxes(1, 2) / size + np.eye(size) / 10)
    matrices[3][1, 99, 99] = -1.0
    diagonal = rng.uniform(1, 2, size=(2, 7))
    *done, last = jax.jit(invert_all)([*map(Full, matrices), Diagonal(diagonal)])
    for found, side in zip(done, matrices, strict=True):
        for s, matrix in enumerate(side):
            values = np.linalg.eigvalsh(matrix)
            if values[0] < 0:
                assert np.isnan(found.inverse.matrix[s]).any()
                continue
            inverted = np.linalg.inv(matrix)
            close(found.inverse.matrix[s], inverted, 1e-10)
            assert rayleigh(matrix) < found.largest[s] <= values[-1] * (1 + 1e-12)
            assert values[0] * (1 - 1e-12) <= found.smallest[s] < 1 / rayleigh(inverted)
    np.testing.assert_allclose(last.inverse.entries, 1 / diagonal, rtol=1e-12)
    np.testing.assert_allclose(
        [last.largest, last.smallest], [diagonal.max(1), diagonal.min(1)], rtol=1e-12
    )


def test_matvec_is_a_linear_map_that_crosses_jit_and_vmaps():
    layout, params = garden()
    factors = drawn_factors(layout, params)
    matvec = jax.jit(lambda f: curvax.kron_inverse(layout, f, 0.3))(factors)
    apply, over_rows = jax.jit(lambda mv, v: mv(v)), jax.jit(lambda mv, v: jax.vmap(mv)(v))
    u, v = (
        jax.tree.map(lambda p: np.asarray(p) + 1, params),
        jax.tree.map(lambda p: np.asarray(p) ** 2, params),
    )
    images = apply(matvec, u), apply(matvec, v)
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(np.vdot, a, b)))
    np.testing.assert_allclose(dot(u, images[1]), dot(images[0], v), rtol=1e-12)
    stack = lambda *x: np.stack(x)
    rows = over_rows(matvec, jax.tree.map(stack, u, v))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12),
        rows,
        jax.tree.map(stack, *images),
    )
    half = apply(matvec, jax.tree.map(lambda x: x.astype(jnp.bfloat16), v) | {"thin": v["thin"]})
    for path, x in jax.tree.leaves_with_path(half):
        assert x.dtype == (jnp.float64 if keystr(path) == "['thin']" else jnp.bfloat16)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(images[1]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-2 * scale), half, images[1]
    )


def test_errors_say_what_and_where():
    layout, params = garden()
    factors = init_factors(layout, params)
    inverse = lambda *args, **kwargs: jax.eval_shape(
        lambda: curvax.kron_inverse(layout, factors, *args, **kwargs)
    )
    for damping in (0, 0.0, -1e-3):
        with pytest.raises(ValueError, match=f"damping must be positive, got {damping}"):
            inverse(damping)
        with pytest.raises(ValueError, match="damping must be positive"):
            inverse(damping, power=-0.5)
    inverse(0.0, power=0.5)
    with pytest.raises(ValueError, match="damping must be positive, got -1"):
        inverse(-1, power=1)
    with pytest.raises(
        ValueError, match="unknown damping_scheme 'cholesky'; valid: 'exact', 'factored'"
    ):
        inverse(1.0, damping_scheme="cholesky")
    with pytest.raises(
        TypeError, match=r"takes the Factors of .* or the EigenFactors of .*, got dict"
    ):
        curvax.kron_inverse(layout, {}, 1.0)
    matvec = lambda v: jax.eval_shape(lambda: curvax.kron_inverse(layout, factors, 1.0)(v))
    with pytest.raises(ValueError, match=r"\['gain'\] is \[3\] there, in params \[4\]"):
        matvec(params | {"gain": jnp.zeros(4)})
    with pytest.raises(ValueError, match=r"the layout has a leaf \['wide'\], params has not"):
        matvec({name: x for name, x in params.items() if name != "wide"})
    with pytest.raises(ValueError, match=r"params has a leaf \['more'\], the layout has not"):
        matvec(params | {"more": jnp.zeros(4)})


# -- EK-FAC ------------------------------------------------------------------------------------


def of_case(name, **options):
    case = CASES[name]()
    return Problem(case.objective, case.params, case.batch, options)


def with_labels(model, shapes, inputs, **options):
    """A model whose outputs are logits."""
    params = draw(shapes)
    logits = jax.eval_shape(model, params, inputs)
    labels = np.random.default_rng(3).integers(0, logits.shape[-1], logits.shape[:-1])
    objective = curvax.Objective(model, losses.softmax_cross_entropy())
    return Problem(objective, params, (inputs, jnp.asarray(labels)), options)


def positions():
    """Several positions per example, mixed along the sequence; one side is too long."""
    model = lambda p, x: jnp.cumsum(jnp.tanh(x @ p["w"] + p["b"]), axis=1) @ p["v"]
    return with_labels(
        model, {"w": (3, 4), "b": (4,), "v": (4, 2)}, normal(5, 5, 3, 3), max_dim={"['v']": 3}
    )


def two_uses():
    """One kernel twice, the second time without the bias."""
    model = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"]) @ p["v"]
    return with_labels(model, {"w": (3, 3), "b": (3,), "v": (3, 2)}, normal(5, 5, 3))


def transposed():
    """A kernel with bias, and its transpose; and a gain outside of blocks."""
    model = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T) * p["gain"]
    return with_labels(model, {"w": (3, 4), "b": (4,), "gain": (3,)}, normal(5, 5, 3))


def tied_lookup():
    """A table that is looked up, several times per example, and gives the logits."""
    model = lambda p, ids: (jnp.tanh(p["table"][ids]).sum(1) @ p["v"]) @ p["table"].T
    return with_labels(model, {"table": (4, 3), "v": (3, 3)}, jnp.arange(15).reshape(5, 3) % 4)


def tied_lookup_with_bias():
    """The same with a bias on the logits: the kernel is the table's transpose,
    and the lookup the transposed use.
    """
    model = lambda p, ids: jnp.tanh(p["table"][ids]).sum(1) @ p["table"].T + p["b"]
    return with_labels(model, {"table": (4, 3), "b": (4,)}, jnp.arange(15).reshape(5, 3) % 4)


def lookup():
    """Lookups alone, of which one row is never used."""
    model = lambda p, ids: jnp.tanh(p["table"][ids]).sum(1) @ p["v"]
    return with_labels(model, {"table": (5, 3), "v": (3, 2)}, jnp.arange(15).reshape(5, 3) % 4)


def lookup_with_bias():
    """A bias on what is looked up."""
    model = lambda p, ids: jnp.tanh(p["table"][ids] + p["b"]).sum(1) @ p["v"]
    return with_labels(
        model, {"table": (5, 3), "b": (3,), "v": (3, 2)}, jnp.arange(15).reshape(5, 3) % 4
    )


def lookup_with_bias_and_product():
    """The same for a table that multiplies too, without the bias: its inputs' side is full."""
    model = lambda p, ids: jnp.tanh(jnp.tanh(p["table"][ids] + p["b"]).sum(1) @ p["v"]) @ p["table"]
    return with_labels(
        model, {"table": (4, 3), "b": (3,), "v": (3, 4)}, jnp.arange(15).reshape(5, 3) % 4
    )


def stacks():
    """Two experts, with positions and biases."""
    layer = lambda p, x: jnp.einsum("beti,eio->beto", x, p["w"]) + p["b"][:, None]
    model = lambda p, x: jnp.tanh(layer(p, x)).sum((1, 2)) @ p["v"]
    return with_labels(model, {"w": (2, 3, 2), "b": (2, 2), "v": (2, 3)}, normal(5, 5, 2, 3, 3))


def one_position_stacks():
    """Two experts, one position: squares of rows are enough."""
    model = lambda p, x: jnp.tanh(jnp.einsum("bei,eio->beo", x, p["w"])).sum(1) @ p["v"]
    return with_labels(model, {"w": (2, 3, 2), "v": (2, 3)}, normal(5, 5, 2, 3))


PROBLEMS = {
    f.__name__: f
    for f in (positions, two_uses, transposed, tied_lookup, lookup, stacks, one_position_stacks)
}
PROBLEMS |= {name: functools.partial(of_case, name) for name in ("mlp", "masked_sequence")}
PROBLEMS |= {
    f.__name__: f for f in (tied_lookup_with_bias, lookup_with_bias, lookup_with_bias_and_product)
}
EMPIRICAL = ["mlp", "positions", "two_uses", "tied_lookup"]
EXACT_AND_EMPIRICAL = [
    *[(name, "exact") for name in PROBLEMS],
    *[(name, "empirical") for name in EMPIRICAL],
]


def orthogonal(basis, size):
    return np.broadcast_to(np.eye(size), (1, size, size)) if basis is None else np.asarray(basis)


def rotations(block, basis):
    """For each slice of a block's stack the eigenbasis of the whole slice, `Q_A x Q_G`."""
    _, rows, columns = block.shape
    a, g = orthogonal(basis.a, rows), orthogonal(basis.g, columns)
    return [np.kron(a[s % len(a)], g[s % len(g)]) for s in range(block.shape[0])]


@pytest.mark.parametrize("name, fisher", EXACT_AND_EMPIRICAL)
def test_moments_are_the_diagonal_of_the_fisher_in_the_eigenbasis(name, fisher, monkeypatch):
    """And so EK-FAC has the Fisher's trace, and of all matrices diagonal there is nearest to it:
    nearer than K-FAC.
    """
    problem = PROBLEMS[name]()
    objective, params, batch, _ = problem
    layout = problem.layout()
    matvec_of = {"exact": curvax.ggnvp, "empirical": curvax.empirical_fishervp}[fisher]

    @jax.jit
    def compute(params, batch):
        key = jax.random.key(0)
        factors = curvax.kron_factors(objective, layout, params, batch, key, fisher=fisher)
        basis = curvax.kron.kron_basis(layout, factors)
        estimate = functools.partial(
            curvax.kron.kron_moments,
            objective,
            layout,
            basis,
            params,
            batch,
            key,
            fisher=fisher,
        )
        found = [estimate(), estimate(microbatch=2)]
        with monkeypatch.context() as patch:
            patch.setattr(
                _gradient_pairs, "ENTRIES_AT_A_TIME", 30
            )  # at most two examples at a time, or one
            found.append(estimate())
        curvature = functools.partial(curvax.kron_inverse, layout, damping=0.0, power=1.0)
        matrices = (
            matvec_of(objective, params, batch),
            curvature(factors=found[0]),
            curvature(factors=factors),
        )
        return basis, found, [curvax.to_dense(matvec, params) for matvec in matrices]

    basis, found, (dense, ekfac, kfac) = jax.tree.map(np.asarray, compute(params, batch))
    gains = []
    for block in layout.blocks:
        for s, (which, q) in enumerate(
            zip(slices(block, params), rotations(block, basis[block.name]), strict=True)
        ):
            own = np.ix_(which, which)
            diagonal = np.diag(q.T @ dense[own] @ q)
            for each in found:
                close(mean(each.moments[block.name])[s].ravel(), diagonal, 1e-10)
            close(ekfac[own], q * diagonal @ q.T, 1e-10)
            np.testing.assert_allclose(np.trace(ekfac[own]), np.trace(dense[own]), rtol=1e-10)
            far, near = (np.linalg.norm(dense[own] - x[own]) for x in (kfac, ekfac))
            assert near <= far * (1 + 1e-10)
            gains.append(1 - near / far)
    assert max(gains) > 1e-3
    for path, factor in found[0].diagonal.items():
        for each in found:
            np.testing.assert_allclose(mean(each.diagonal[path]), mean(factor), rtol=1e-10)


def test_ekfac_is_kfac_where_inputs_and_cotangents_are_independent():
    """On a grid of inputs and residuals the Fisher is a Kronecker product."""
    x, y = normal(0, 4, 3), normal(1, 3, 2)
    batch = jnp.repeat(x, 3, axis=0), jnp.tile(y, (4, 1))
    objective, params = (
        curvax.Objective(lambda w, x: x @ w, losses.squared_error()),
        jnp.zeros((3, 2)),
    )
    layout = curvax.kron_layout(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        key, kind = jax.random.key(0), {"fisher": "empirical"}
        factors = curvax.kron_factors(objective, layout, params, batch, key, **kind)
        found = curvax.kron.kron_moments(
            objective, layout, curvax.kron.kron_basis(layout, factors), params, batch, key, **kind
        )
        build = functools.partial(curvax.kron_inverse, layout, damping=0.1)
        return [
            curvax.to_dense(mv, params) for mv in (build(factors=factors), build(factors=found))
        ]

    kfac, ekfac = compute(params, batch)
    want = np.linalg.inv(np.kron(x.T @ x / 4, y.T @ y / 3) + 0.1 * np.eye(6))
    close(kfac, want, 1e-10)
    close(ekfac, want, 1e-10)


@pytest.mark.parametrize("full", [(True, True), (False, True), (True, False)])
def test_carried_moments_are_the_diagonal_in_the_new_basis(full):
    rng, stack, n, m = np.random.default_rng(0), 2, 4, 3
    basis = lambda: Basis(
        *(
            np.linalg.qr(rng.normal(size=(stack, k, k)))[0] if f else None
            for f, k in zip(full, (n, m), strict=True)
        )
    )
    old, new, held = basis(), basis(), rng.uniform(size=(stack, n, m))
    got = jax.jit(carried_moments)(old, new, WeightedMean(held, jnp.array(0.5)))
    assert got.weight == 0.5
    turn = lambda basis, s: np.kron(
        orthogonal(basis.a, n)[s * full[0]], orthogonal(basis.g, m)[s * full[1]]
    )
    for s in range(stack):
        r = turn(new, s).T @ turn(old, s)
        close(got.total[s].ravel(), np.diag(r * held[s].ravel() @ r.T), 1e-12)
    np.testing.assert_allclose(got.total.sum((1, 2)), held.sum((1, 2)), rtol=1e-12)
