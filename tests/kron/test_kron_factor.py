"""Every structure of a Kronecker factor, and two products, against dense matrices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses
from curvax.kron import BlockFactors, EigenOperator, Factors, WeightedMean
from curvax.kron._accumulate import kron_factors
from curvax.kron._kron_factor import (
    STRUCTURES,
    Diagonal,
    Full,
    Identity,
    added,
    eigh_all,
    invert_all,
    scaled,
)
from curvax.kron._moments import decompose

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def positive(seed, stack, n):
    x = normal(seed, stack, n, 2 * n)
    return x @ x.swapaxes(1, 2) / n + np.eye(n) / 10


def factor_of(structure, seed=0, stack=2, n=5):
    """A positive definite factor, and its matrices."""
    matrices = positive(seed, stack, n)
    if structure == "full":
        return Full(jnp.asarray(matrices)), matrices
    if structure == "diagonal":
        diagonal = np.diagonal(matrices, axis1=1, axis2=2)
        return Diagonal(jnp.asarray(diagonal)), np.stack([np.diag(x) for x in diagonal])
    scale = matrices[:, 0, 0]
    return Identity(jnp.asarray(scale), n), scale[:, None, None] * np.eye(n)


def dense(factor):
    """What a factor multiplies by."""
    return np.asarray(factor.left(jnp.broadcast_to(jnp.eye(factor.size), (2, *[factor.size] * 2))))


def close(got, want, tolerance=1e-10):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_operations_of_a_factor(structure):
    factor, matrices = factor_of(structure)
    other, others = factor_of(structure, seed=1)
    values = np.linalg.eigvalsh(matrices)
    close(dense(factor), matrices)
    x = normal(2, 2, 5, 5)
    close(factor.left(x), matrices @ x)
    close(factor.right(x), x @ matrices)
    close(factor.trace(), np.trace(matrices, axis1=1, axis2=2))
    close(factor.mean_eigenvalue(), values.mean(1))
    close(factor.diagonal(), np.diagonal(matrices, axis1=1, axis2=2))
    close(factor.logdet(), np.linalg.slogdet(matrices)[1])
    close(dense(factor.inverse()), np.linalg.inv(matrices))
    close(dense(factor.damped(jnp.array([0.5, 2.0]))), matrices + np.eye(5) * [[[0.5]], [[2.0]]])
    close(dense(factor.power(-0.25)), np.stack([root(m, -0.25) for m in matrices]))
    eigen = factor.eigh()
    vectors = np.eye(5)[None] if eigen.vectors is None else np.asarray(eigen.vectors)
    close(vectors * np.asarray(eigen.values)[:, None] @ vectors.swapaxes(1, 2), matrices)
    largest = np.asarray(factor.largest_eigenvalue())
    assert (largest <= values[:, -1] * (1 + 1e-12)).all() and (
        largest > values.mean(1) * 0.99
    ).all()
    close(dense(scaled(factor, jnp.array([2.0, 3.0]))), matrices * [[[2.0]], [[3.0]]])
    close(dense(added(factor, other)), matrices + others)
    # a pytree that keeps its kind
    again = jax.jit(lambda f: jax.tree.map(lambda x: 2 * x, f))(factor)
    assert type(again) is type(factor)
    close(dense(again), 2 * matrices)


def root(matrix, power):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**power @ vectors.T


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_pencil_makes_two_factors_diagonal(structure):
    (x, dense_x), (y, dense_y) = factor_of(structure), factor_of(structure, seed=1)
    pencil = x.pencil(y)
    k = np.eye(5)[None] if pencil.vectors is None else np.asarray(pencil.vectors)
    k = k if pencil.scales is None else k * np.asarray(pencil.scales)[:, None]
    close(k.swapaxes(1, 2) @ dense_y @ k, np.broadcast_to(np.eye(5), (2, 5, 5)))
    close(k.swapaxes(1, 2) @ dense_x @ k, np.stack([np.diag(d) for d in np.asarray(pencil.values)]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_second_moments_accumulate_in_the_shape_of_the_structure(structure):
    cls, x, y = (
        STRUCTURES[structure],
        jnp.asarray(normal(0, 2, 7, 3)),
        jnp.asarray(normal(1, 2, 7, 3)),
    )
    products = np.einsum("sri,srj->sij", x, y)
    symmetric = (products + products.swapaxes(1, 2)) / 2
    want = {
        "full": symmetric,
        "diagonal": np.diagonal(symmetric, axis1=1, axis2=2),
        "identity": np.zeros((2, 3)),
    }[structure]
    close(cls.second_moment(x, y), want)
    close(cls.second_moment(x, None), cls.second_moment(x, x))
    assert cls.second_moment(x, None).shape == cls.moment_shape(2, 3)
    assert cls.with_zero_row(cls.second_moment(x, y)).shape == cls.moment_shape(2, 4)
    # one-hot rows beside a 1, as counts and as rows
    ids = np.random.default_rng(2).integers(0, 3, (2, 7))
    rows = jnp.concatenate([jax.nn.one_hot(ids, 3), jnp.ones((2, 7, 1))], axis=2)
    counts = cls.moment_of_counts(jnp.sum(rows, axis=1), True)
    if structure != "identity":
        close(counts, cls.second_moment(rows, None))
    assert counts.shape == cls.moment_shape(2, 4)


# -- two products ------------------------------------------------------------------------------

DAMPING = 0.3
STRUCTURE_PAIRS = [
    ("full", "full"),
    ("diagonal", "full"),
    ("full", "identity"),
    ("identity", "full"),
]


def tied(a_structure="full", g_structure="full"):
    """The layout of a kernel [4, 3] with a bias that is used transposed too, and params."""
    model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T
    objective = curvax.Objective(model, losses.squared_error())
    params = {"b": jnp.asarray(normal(0, 3)), "w": jnp.asarray(normal(1, 4, 3))}
    batch = jnp.asarray(normal(2, 8, 4)), jnp.asarray(normal(3, 8, 4))
    layout = curvax.kron_layout(objective, params, batch)
    layout = layout.edit("['w']", a_structure=a_structure, g_structure=g_structure)
    return objective, params, batch, layout.edit("['w']", two_products="exact")


def mean_of(structure, seed, n, vanishes=False):
    """An accumulated moment, and the matrix that it stands for."""
    factor, matrices = factor_of(structure, seed, 1, n)
    if vanishes and structure != "identity":
        factor, matrices = jax.tree.map(jnp.zeros_like, factor), 0 * matrices
    if structure == "identity":
        return WeightedMean(jnp.ones((1, n)), jnp.array(1.0)), np.eye(n)
    return WeightedMean(2 * jax.tree.leaves(factor)[0], jnp.array(2.0)), matrices[0]


def drawn(structures, vanishes=None):
    """Factors of the tied kernel, and both products' matrices."""
    a, g = structures
    (first, a1), (second, g1) = (
        mean_of(s, i, n, vanishes == "first") for i, (s, n) in enumerate(((a, 5), (g, 3)))
    )
    (cotangents, a2), (inputs, g2) = (
        mean_of(s, i, n, vanishes == "second") for i, (s, n) in enumerate(((a, 5), (g, 3)), 2)
    )
    block = BlockFactors(first, second, (cotangents, inputs))
    return Factors({"['w']": block}, {}), (a1, g1, a2, g2)


def damped_second(a, g, structures, damping):
    if "identity" in structures:
        damped = [
            x if s == "identity" else x + damping * np.eye(len(x))
            for x, s in zip((a, g), structures, strict=True)
        ]
        return np.kron(*damped)
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g))) if a.any() and g.any() else 1.0
    left = a + pi * damping**0.5 * np.eye(len(a))
    return np.kron(left, g + damping**0.5 / pi * np.eye(len(g)))


def flat_inverse(layout, factors, params, damping=DAMPING):
    """The inverse as a matrix, in the order of `[kernel; bias]` row by row."""
    inverse = curvax.to_dense(curvax.kron_inverse(layout, factors, damping), params)
    order = np.concatenate([np.arange(3, 15), np.arange(3)])  # params are raveled with "b" first
    return np.asarray(inverse)[np.ix_(order, order)]


@pytest.mark.parametrize("vanishes", [None, "first", "second"])
@pytest.mark.parametrize("structures", STRUCTURE_PAIRS)
def test_the_sum_of_two_products_is_inverted_exactly(structures, vanishes):
    _, params, _, layout = tied(*structures)
    factors, (a1, g1, a2, g2) = drawn(structures, vanishes)
    dense_sum = np.kron(a1, g1) + damped_second(a2, g2, structures, DAMPING)
    got = flat_inverse(layout, factors, params)
    close(got, np.linalg.inv(dense_sum), 1e-10)
    assert np.linalg.eigvalsh((got + got.T) / 2).min() > 0
    close(got, got.T, 1e-12)
    if vanishes == "second" and "identity" not in structures:  # damping alone is left of it
        close(got, np.linalg.inv(np.kron(a1, g1) + DAMPING * np.eye(15)), 1e-10)


def test_exact_is_nearer_to_the_inverse_of_the_sum_than_balanced():
    """With little damping, whose cross terms are what is not exact."""
    damping = 1e-4
    _, params, _, layout = tied()
    factors, (a1, g1, a2, g2) = drawn(("full", "full"))
    want = np.linalg.inv(np.kron(a1, g1) + np.kron(a2, g2) + damping * np.eye(15))
    balanced = layout.edit("['w']", two_products="balanced")
    far, near = (
        np.linalg.norm(flat_inverse(each, factors, params, damping) - want)
        for each in (balanced, layout)
    )
    assert near < 0.1 * far


def test_the_spectrum_of_two_products():
    _, _, _, layout = tied()
    factors, (a1, g1, a2, g2) = drawn(("full", "full"))
    build = functools.partial(curvax.kron.kron_operator, layout)
    spectrum = jax.jit(lambda f: build(f, DAMPING).spectra["['w']"])(factors)
    products = np.kron(a1, g1), np.kron(a2, g2)
    values = np.linalg.eigvalsh(products[0] + damped_second(a2, g2, ("full", "full"), DAMPING))
    np.testing.assert_allclose(spectrum.trace, sum(map(np.trace, products)), rtol=1e-12)
    assert values.mean() < spectrum.largest <= values[-1] * (1 + 1e-12)
    assert values[0] * (1 - 1e-12) <= spectrum.smallest < values.mean()


def test_optimizers_and_refusals_of_exact_products():
    objective, params, batch, layout = tied()
    assert "two products: exact" in str(layout)
    key = jax.random.key(0)
    factors = kron_factors(objective, layout, params, batch, key, fisher="exact")
    gradient = jax.grad(objective)(params, batch)
    rule = curvax.scale_by_kfac(layout, DAMPING)
    step, state = jax.jit(lambda g: rule.update(g, rule.init(params), curvature=factors))(gradient)
    want = curvax.kron_inverse(layout, factors, DAMPING)(gradient)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), step, want)
    assert isinstance(state.block_state["['w']"], EigenOperator)
    assert state.info.blocks["['w']"].condition > 1
    with pytest.raises(ValueError, match=r"gives its inverse only, not the power -0\.5"):
        curvax.kron_inverse(layout, factors, DAMPING, power=-0.5)
    for refused in (
        lambda: curvax.kron.kron_basis(layout, factors),
        lambda: decompose(layout.blocks, factors),
        lambda: curvax.scale_by_ekfac(layout).init(params),
    ):
        with pytest.raises(ValueError, match="has no Kronecker eigenbasis, which EK-FAC needs"):
            refused()
    alone = curvax.kron_layout(
        curvax.Objective(lambda w, x: x @ w, losses.squared_error()),
        jnp.ones((3, 2)),
        (jnp.ones((4, 3)), jnp.ones((4, 2))),
    )
    with pytest.raises(ValueError, match=r'1 Kronecker product.*exact" is for two'):
        alone.edit("", two_products="exact")
    with pytest.raises(ValueError, match="unknown two_products 'both'; valid: 'balanced', 'exact'"):
        layout.edit("['w']", two_products="both")


# -- entries in no block -----------------------------------------------------------------------


def test_uncovered_entries_are_a_static_mask():
    model = lambda p, x: x @ p["w"][1:4, ::2] * p["gain"]
    objective = curvax.Objective(model, losses.squared_error())
    params = {"w": jnp.ones((5, 4)), "gain": jnp.ones(2)}
    layout = curvax.kron_layout(objective, params, (jnp.ones((6, 3)), jnp.ones((6, 2))))
    want = np.ones((5, 4), bool)
    want[1:4, ::2] = False
    np.testing.assert_array_equal(layout.uncovered("['w']"), want)
    np.testing.assert_array_equal(layout.uncovered("['gain']"), [True, True])
    assert layout.uncovered("['w']") is layout.uncovered("['w']")


def test_bfloat16_diagonals_are_widened_before_they_are_squared():
    """And so are the same from `kron_factors` and from `kron_moments`."""
    with jax.enable_x64(False):
        x = jnp.asarray(normal(0, 64, 3), jnp.bfloat16)
        params = {"gain": jnp.ones(3, jnp.bfloat16)}
        batch = x, jnp.asarray(normal(1, 64, 3), jnp.bfloat16)
        objective = curvax.Objective(lambda p, x: x * p["gain"], losses.squared_error())
        layout, key = curvax.kron_layout(objective, params, batch), jax.random.key(0)
        factors = curvax.kron_factors(objective, layout, params, batch, key, fisher="empirical")
        moments = curvax.kron.kron_moments(
            objective, layout, {}, params, batch, key, fisher="empirical"
        )
        grads = curvax.per_example_grads(objective, params, batch)["gain"].astype(jnp.float32)
    got = factors.diagonal["['gain']"].mean
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, moments.diagonal["['gain']"].mean)
    np.testing.assert_allclose(got, np.mean(np.square(grads), axis=0), rtol=5e-3)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls of LAPACK are of CPUs")
def test_members_of_a_vmap_are_decomposed_one_after_another():
    """Calls of LAPACK for several matrices at once wait for each other, for ever on two cores."""

    def decompose(matrices):
        factors = [Full(x) for x in matrices]
        inverses = [x.inverse.matrix for x in invert_all(factors)]
        return inverses, [x.values for x in eigh_all(factors)]

    members = [jnp.stack([jnp.eye(n)[None], 2 * jnp.eye(n)[None]]) for n in (3, 4, 9)]
    compiled = jax.jit(jax.vmap(decompose)).lower(members).compile()
    call = r"= \(?f64\[([\d,]+)\]\S* .*custom_call_target=\"lapack_d"
    shapes = re.findall(call, compiled.as_text())
    assert len(shapes) >= 3
    for shape in shapes:
        *stack, _, _ = map(int, shape.split(","))
        assert np.prod(stack, dtype=int) == 1, shape
    inverses, values = compiled(members)
    for x, inverse, eigenvalues in zip(members, inverses, values, strict=True):
        np.testing.assert_allclose(inverse, jnp.linalg.inv(x), atol=1e-6)
        np.testing.assert_allclose(eigenvalues, jnp.linalg.eigvalsh(x), atol=1e-6)


def test_derivatives_go_through_inverses_and_decompositions():
    matrix = positive(0, 1, 5)[0]

    def of_inverse(x):
        first, second = invert_all([Full(x[None]), Full(2 * x[None])])
        return jnp.sum(first.inverse.matrix**3) + jnp.sum(second.inverse.matrix**2)

    def expected(x):
        return jnp.sum(jnp.linalg.inv(x) ** 3) + jnp.sum(jnp.linalg.inv(2 * x) ** 2)

    # Of a function of symmetric matrices, so the derivative is compared along one.
    direction = positive(1, 1, 5)[0]
    along = lambda fn: jnp.sum(jax.jit(jax.grad(fn))(matrix) * direction)
    np.testing.assert_allclose(along(of_inverse), along(expected), rtol=1e-10)
    of_values = lambda x: jnp.sum(eigh_all([Full(x[None])])[0].values ** 3)
    np.testing.assert_allclose(
        along(of_values), jnp.trace(3 * matrix @ matrix @ direction), rtol=1e-10
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_the_largest_eigenvalue_is_bounded_in_every_unit(scale):
    matrix = jnp.asarray(scale * positive(0, 1, 6), jnp.float32)
    largest = Full(matrix).largest_eigenvalue()[0]
    exact = scale * np.linalg.eigvalsh(positive(0, 1, 6))[0, -1]
    assert 0.3 * exact < largest < exact * (1 + 1e-5)


def test_where_diagonal_entries_are_alike_one_of_them_is_the_start():
    """Their sum is a vector that this matrix maps to zero."""
    matrix = jnp.eye(4) - jnp.ones((4, 4)) / 4
    np.testing.assert_allclose(Full(matrix[None]).largest_eigenvalue(), 1, rtol=1e-6)
