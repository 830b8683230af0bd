"""The energy of a wavefunction, by local energies at draws from its square."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._checks import describe
from curvax._trees import safe_divide
from curvax._types import PRNGKey, Scalar, at_least_float32
from curvax.losses._loss import Loss, from_function

LocalEnergies: TypeAlias = Array | tuple[Array, Array]
"""Those of all draws, like the outputs or complex; or a pair of them and of weights `[batch]`."""

# f: log psi, E: local energies, both [b] or [b, c]; p: weights of the draws, [b], with the sum 1


def local_energy() -> Loss:
    """Mean local energy of a wavefunction, with its gradient and the metric of wavefunctions.

    For draws x_i from `|psi|^2` and `E_i = (H psi)(x_i) / psi(x_i)`, the value is the mean of the
    real parts, and the gradient in the outputs `f_i = log psi(x_i)` is `2 (E_i - mean E) / n`. Over
    parameters that is the gradient of the energy, `2 Re <(E - mean E)^* O>` with `O = d log psi`.
    The curvature is that of `curvax.losses.variance`, so that the Gauss-Newton matrix is the
    overlap matrix `S = Re <(O - mean O)^* (O - mean O)>`, a quarter of the Fisher matrix of
    `|psi|^2` where psi is real. Every method that takes an objective is stochastic reconfiguration
    then: `curvax.gauss_newton` over parameters, `curvax.engd` over draws (minSR), `curvax.spring`
    with momentum, `curvax.kfac` with Kronecker factors.

    It is no function of the outputs: the energies are those of the parameters as they are. What
    compares its value at two parameters on one batch (`curvax.line_search`,
    `curvax.levenberg_marquardt`) sees no change, and is of no use with it.

    Returns:
      A `Loss` for float outputs: log of |psi| as `[batch]` or `[batch, 1]`, where psi is real (its
      sign is of no consequence); or `[batch, 2]`, the real and imaginary part of log psi. Targets
      are the local energies in the shape of the outputs, or complex `[batch]` for pairs. They are
      not differentiated. `(energies, weights)` weighs draws, by `weights / sum(weights)`, for sums
      over all configurations or importance sampling. Clip energies before they come here.

    Raises:
      ValueError: outputs, energies or weights do not fit (at trace time).

    Example: the harmonic oscillator `(-psi'' + x^2 psi) / 2` with `log psi = -w x^2`, whose local
    energy is `w + (1/2 - 2 w^2) x^2`; `<x^2> = 1 / 4w`, so that at w = 1 it is 5/8.
      >>> import jax, jax.numpy as jnp, curvax
      >>> w, x = jnp.array(1.0), jnp.array([-1.0, 0.0, 1.0])
      >>> objective = curvax.Objective(lambda w, x: -w * x**2, curvax.losses.local_energy())
      >>> batch = x, (1 - 1.5 * x**2, jnp.array([1.0, 6.0, 1.0]))                   # <x^2> = 1/4
      >>> energy, gradient = jax.value_and_grad(objective)(w, batch)
      >>> energy.item(), gradient.item()          # 2 cov(-x^2, -1.5 x^2) = 3 var(x^2)
      (0.625, 0.5625)
      >>> curvax.ggnvp(objective, w, batch)(w).item()                            # var(x^2)
      0.1875

    References: Sorella (1998), Green function Monte Carlo with stochastic reconfiguration,
      https://arxiv.org/abs/cond-mat/9803107; Chen and Heyl (2024), Empowering deep neural quantum
      states through efficient optimization, https://arxiv.org/abs/2302.01941, for the form over
      draws. The equations are derived and tested against dense matrices; sources of NetKet and
      vmcnet were read for their factors.

    Deviates: the gradient is that of the energy, with its factor 2, as in NetKet. vmcnet and the
      SPRING paper solve for half of it, so that their learning rate is twice ours.
    """

    # The value is mean E for any f, with the derivative 2 p (E - mean E) in f.
    def value(outputs: Array, targets: LocalEnergies) -> Scalar:
        f, energies, p = _checked(outputs, targets)
        mean = jnp.sum(p * energies, axis=0)
        centered = p * (energies - mean)
        # Zero, unless log psi is not finite, which the value then shows.
        change = f - jax.lax.stop_gradient(f)
        return mean[0] + 2 * jnp.sum(centered * change)

    # S v = p (v - p'v), which is (I - 11'/n) v / n for equal weights
    def curvature_product(outputs: Array, targets: LocalEnergies, v: Array) -> Array:
        _, _, p = _checked(outputs, targets)
        wide = at_least_float32(v).reshape(len(p), -1)
        product = p * (wide - jnp.sum(p * wide, axis=0))
        return product.reshape(outputs.shape).astype(outputs.dtype)

    # R z of normal z has the covariance R R' = S.
    def pseudo_gradient(key: PRNGKey, outputs: Array, targets: LocalEnergies) -> Array:
        f, _, p = _checked(outputs, targets)
        z = jax.random.normal(key, f.shape, f.dtype)
        r: Array = times_root(p[:, 0], z)
        return r.reshape(outputs.shape).astype(outputs.dtype)

    def weights_of(outputs: Array, targets: LocalEnergies) -> Float[Array, " b"]:
        return _checked(outputs, targets)[2][:, 0]

    loss = from_function(
        value,
        curvature_product=curvature_product,
        pseudo_gradient=pseudo_gradient,
        couples_examples=True,
    )
    return dataclasses.replace(loss, centering_weights=weights_of)


def times_root(p: Float[Array, " b"], v: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Return `R v` with `R R' = diag(p) - p p'`, for weights p with the sum 1."""
    # u = sqrt(p) has the norm 1. With R = diag(u) (I - u u'), whose second factor is a projection,
    # R R' = diag(u) (I - u u') diag(u).
    u = jnp.sqrt(p)[:, None]
    return u * (v - u * jnp.sum(u * v, axis=0))


def times_transposed_root(p: Float[Array, " b"], v: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Return `R'v = (I - u u') diag(u) v`."""
    u = jnp.sqrt(p)[:, None]
    scaled = u * v
    return scaled - u * jnp.sum(u * scaled, axis=0)


def divided_by_root(p: Float[Array, " b"], r: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Return q with `R q = r` and no part along u, for r with the sum 0."""
    # R q = u q then. Where a weight is 0, r is 0 too.
    u = jnp.sqrt(p)[:, None]
    q = safe_divide(r, u)
    return q - u * jnp.sum(u * q, axis=0)


def _checked(
    outputs: Array, targets: LocalEnergies
) -> tuple[Float[Array, "b c"], Float[Array, "b c"], Float[Array, "b 1"]]:
    """Return log psi, local energies and normalized weights in at least float32; raise if unfit."""
    dtype = getattr(outputs, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not is_float or jnp.shape(outputs)[1:] not in ((), (1,), (2,)):
        raise ValueError(
            "local_energy needs float outputs [batch], or [batch, 2] with the real and imaginary "
            f"part of log psi; got {describe(outputs)}. Of complex log psi return "
            "jnp.stack([log_psi.real, log_psi.imag], axis=-1)."
        )
    energies, weights = targets if isinstance(targets, tuple) else (targets, None)
    size = outputs.shape[0]
    is_pair = outputs.shape[1:] == (2,)
    if is_pair and jnp.shape(energies) == (size,) and jnp.iscomplexobj(energies):
        energies = jnp.stack([energies.real, energies.imag], axis=-1)
    if jnp.shape(energies) != outputs.shape or jnp.iscomplexobj(energies):
        complex_too = f", or complex ones of shape [{size}]" if is_pair else ""
        raise ValueError(
            f"local energies {describe(energies)} do not fit outputs {describe(outputs)}: "
            f"local_energy needs real ones of shape {list(outputs.shape)}{complex_too}."
        )
    if weights is None:
        weights = jnp.ones(size)
    elif jnp.shape(weights) != (size,):
        raise ValueError(f"local_energy needs weights of shape [{size}], got {describe(weights)}.")
    f = at_least_float32(outputs).reshape(size, -1)
    e = jax.lax.stop_gradient(jnp.asarray(energies, f.dtype).reshape(size, -1))
    p = jax.lax.stop_gradient(jnp.asarray(weights, f.dtype))
    # Weights of the sum 0 leave nothing to take a mean of: all is 0 then.
    return f, e, safe_divide(p, jnp.sum(p))[:, None]
