"""Cubic steps: both conditions of a global minimum, the hard case, derivatives, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.solve import Dense, EigenDecomposition, cubic_step, decompose

D = 6
# Spectra: indefinite over many scales, definite, singular, repeated at the bottom, all negative.
SPECTRA = {
    "scales": np.array([-1e-3, 1e-6, 0.1, 1.0, 30.0, 1e3]),
    "indefinite": np.linspace(-2.0, 3.0, D),
    "definite": np.linspace(0.5, 3.0, D),
    "singular": np.array([0.0, 0.0, 1.0, 2.0, 3.0, 4.0]),
    "repeated": np.array([-1.0, -1.0, -1.0, 0.5, 1.0, 2.0]),
    "negative": np.linspace(-3.0, -1.0, D),
}
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]


def systems():
    """Every spectrum with gradients that have and have not a part along the lowest eigenvector."""
    rng = np.random.default_rng(1)
    for values in SPECTRA.values():
        for size in (0.0, 1e-6, 1.0, 1e3):
            for lowest in (1.0, 1e-12, 0.0):
                c = size * rng.normal(size=D)
                # "repeated": no part along any vector of the lowest eigenspace
                c[np.isclose(values, values[0])] *= lowest
                for M in (1e-2, 1.0, 1e3):
                    yield values, c, M


@jax.jit
@jax.vmap
def step(values, c, M):
    rotation = jnp.asarray(ROTATION, values.dtype)
    eigen = EigenDecomposition(values, rotation)
    return cubic_step(eigen, {"w": rotation @ c}, regularization=M)


@pytest.mark.parametrize(("name", "tol"), [("float64", 1e-10), ("float32", 1e-5)])
def test_both_conditions_of_a_global_minimum_hold(name, tol):
    """`(A + M r / 2 I) s = -g` and `A + M r / 2 I >= 0`, hard case included."""
    with jax.enable_x64(name == "float64"):
        values, c, M = map(np.array, zip(*systems(), strict=True))
        s, info = step(*(jnp.asarray(x, name) for x in (values, c, M)))
        info = jax.tree.map(np.asarray, info)
    g, s = c @ ROTATION.T, np.asarray(s["w"], np.float64)
    r = np.linalg.norm(s, axis=1)
    matrices = np.einsum("ij,nj,kj->nik", ROTATION, values, ROTATION)
    shifted = matrices + (M * r / 2)[:, None, None] * np.eye(D)
    size = np.abs(values).max(axis=1) + M * r / 2
    scale = np.linalg.norm(g, axis=1) + size * r
    residual = np.linalg.norm(np.einsum("nij,nj->ni", shifted, s) + g, axis=1)
    assert (residual <= tol * scale).all()
    assert (np.linalg.eigvalsh(shifted)[:, 0] >= -tol * size).all()
    # The Info: length, decrease of the model, and that the hard case was met at all.
    np.testing.assert_allclose(info.length, r, rtol=tol)
    model = (
        np.einsum("ni,ni->n", g, s) + np.einsum("ni,nij,nj->n", s, matrices, s) / 2 + M * r**3 / 6
    )
    np.testing.assert_allclose(info.decrease, -model, rtol=100 * tol, atol=tol * (scale * r).max())
    assert (info.residual <= tol * scale).all() and info.steps.max() < 12
    # Without a gradient: no step where nothing curves down, and r = -2 lambda_min / M elsewhere.
    still = np.linalg.norm(g, axis=1) == 0
    expected = np.maximum(0, -2 * values[:, 0] / M)
    np.testing.assert_allclose(r[still], expected[still], rtol=tol)
    assert info.is_hard[still].all()
    # With one, the hard case but for rounding: the lowest eigenvector adds to the same length.
    assert np.isclose(r, expected, rtol=1e-6)[~still].sum() > 10


def test_no_other_step_has_a_lower_model(x64):
    """Against many random steps, in the hard case."""
    values, c = SPECTRA["indefinite"], np.array([0.0, 1.0, -0.3, 0.2, 0.1, 0.5])
    eigen = EigenDecomposition(jnp.asarray(values), jnp.eye(D))
    s, info = cubic_step(eigen, jnp.asarray(c), regularization=1.0)
    others = np.random.default_rng(0).normal(size=(20_000, D)) * 3
    others = np.concatenate([others, s + 0.01 * others])
    length = np.linalg.norm(others, axis=1)
    model = others @ c + others**2 @ values / 2 + length**3 / 6
    assert info.is_hard and (model >= -info.decrease - 1e-12).all()


def test_without_regularization_it_is_newtons_step(x64):
    matrix = (ROTATION * SPECTRA["definite"]) @ ROTATION.T
    g = np.arange(1.0, 1 + D)
    s, info = cubic_step(decompose(Dense(jnp.asarray(matrix))), jnp.asarray(g), regularization=0.0)
    np.testing.assert_allclose(s, -np.linalg.solve(matrix, g), rtol=1e-12)
    np.testing.assert_allclose(info.decrease, -g @ s / 2, rtol=1e-12)


def test_a_step_does_not_depend_on_the_unit_of_the_loss_or_of_params():
    """Units of 1e-20 to 1e20 in float32, whose squares it has not: s, its length and residual."""
    values = np.float32([SPECTRA["indefinite"], SPECTRA["definite"], SPECTRA["indefinite"]])
    c = np.float32([np.arange(1.0, 1 + D), np.arange(1.0, 1 + D), np.zeros(D)])
    expected, info = step(values, c, np.ones(3, np.float32))
    # A in units a, s in units b: g is in a b, and M in a / b.
    for a, b in ((1e20, 1.0), (1e20, 1e10), (1e-20, 1.0), (1e-20, 1e10), (1.0, 1e-20), (1.0, 1e20)):
        a, b = np.float32(a), np.float32(b)
        s, got = step(a * values, a * b * c, np.full(3, a / b))
        np.testing.assert_allclose(s["w"] / b, expected["w"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.length / b, info.length, rtol=1e-4)
        assert (got.residual / a / b < 1e-4).all() and (got.is_hard == info.is_hard).all()


def test_a_model_that_falls_for_ever_has_no_step():
    """Without M: NaN where A has a negative eigenvalue, or g a part along one of eigenvalue 0."""
    values = np.float32([[-1.0] + [1.0] * 5, [0.0] + [1.0] * 5, [0.0] + [1.0] * 5])
    c = np.ones((3, D), np.float32)
    c[2, 0] = 0
    s, info = jax.jit(
        jax.vmap(lambda a, c: cubic_step(EigenDecomposition(a, jnp.eye(D)), c, regularization=0.0))
    )(values, c)
    assert np.isnan(s[:2]).all() and np.isnan(info.decrease[:2]).all()
    np.testing.assert_allclose(s[2], -c[2], rtol=1e-6)


def test_first_derivatives_equal_differences(x64):
    """In the matrix, the gradient and M, through the decomposition."""
    matrix = jnp.asarray((ROTATION * SPECTRA["indefinite"]) @ ROTATION.T)
    inputs = (matrix, jnp.arange(1.0, 1 + D), jnp.asarray(0.7))
    directions = (ROTATION + ROTATION.T, jnp.cos(jnp.arange(D)), 1.0)

    def fun(t):
        A, g, M = jax.tree.map(lambda x, d: x + t * d, inputs, directions)
        s, _ = cubic_step(decompose(Dense(A)), g, regularization=M)
        return jnp.sum(jnp.sin(s))

    compiled = jax.jit(fun)
    differences = (compiled(1e-5) - compiled(-1e-5)) / 2e-5
    for derivative in (jax.grad(fun), jax.jacfwd(fun)):
        np.testing.assert_allclose(jax.jit(derivative)(0.0), differences, rtol=1e-7)


def test_errors():
    eigen = EigenDecomposition(jnp.ones(2), jnp.eye(2))
    with pytest.raises(ValueError, match="regularization must be at least 0, got -1"):
        curvax.solve.cubic_step(eigen, jnp.ones(2), regularization=-1.0)
    with pytest.raises(TypeError, match="regularization arrives as bfloat16"):
        cubic_step(eigen, jnp.ones(2), regularization=jnp.bfloat16(1))
    with pytest.raises(TypeError, match="params must hold float arrays"):
        cubic_step(eigen, jnp.arange(2), regularization=1.0)
