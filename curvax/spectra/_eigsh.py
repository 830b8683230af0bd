"""Extreme eigenpairs of a symmetric matrix on pytrees, by thick-restart Lanczos."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._checks import check_choice, check_count, check_params
from curvax._host import compiled, loops_for
from curvax._trees import add_scaled, dimension, keep_unless, norm
from curvax._types import Matvec, Params, PRNGKey, Scalar
from curvax._xla import fast_convs_in_loops, pin_to_iteration
from curvax.solve._damped import checked
from curvax.solve._result import GOING, Result, code_of
from curvax.spectra._lanczos import NOT_FINITE, Krylov, check_steps, empty_rows, extend

# m: rows of the basis; p: rows that a restart keeps; k: pairs wanted; theta: Ritz values; S: eigenvectors of V A V'

WHICH = {
    "largest": "largest values",
    "smallest": "smallest values",
    "both": "from both ends in turn",
    "magnitude": "largest absolute values",
}
_MESSAGES = {
    Result.MAX_STEPS: "max_restarts were not enough: raise max_restarts, basis_size or tol, or ask for fewer eigenvalues "
    "at an end where they lie close together.",
    Result.STALLED: "the products are not exact enough, or not symmetric, to meet the tolerance (info.residuals): "
    "raise tol, compute in a wider dtype, or see whether curvax.solve.check_symmetric passes.",
    Result.NOT_FINITE: NOT_FINITE,
}


class EigInfo(NamedTuple):
    """What an eigenvalue iteration tells about itself.

    Attributes:
      residuals: `|A u_i - theta_i u_i|`, computed from the results; an eigenvalue lies within this of theta_i.
      steps: products with A, not counting the k for the residuals.
      code: a `curvax.solve.Result`, as int32.
    """

    residuals: Float[Array, " k"]
    steps: Int[Array, ""]
    code: Int[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the tolerance was met."""
        return self.code == Result.CONVERGED

    @property
    def message(self) -> str:
        """Say how it ended and what to do; outside of `jit`."""
        result = Result(int(self.code))
        return _MESSAGES.get(result, result.message)


def eigsh(
    matvec: Matvec,
    params: Params,
    k: int,
    key: PRNGKey,
    *,
    which: str = "largest",
    tol: float | Array = 1e-5,
    basis_size: int | None = None,
    max_restarts: int = 100,
) -> tuple[tuple[Float[Array, " k"], PyTree[Array]], EigInfo]:
    """Find k extreme eigenvalues of a symmetric matrix, with their eigenvectors: `A u_i = theta_i u_i`.

    Lanczos fills a basis of m vectors; of that, the approximate eigenvectors nearest to those wanted are kept, and it is
    filled again, until all k have `|A u_i - theta_i u_i| <= tol |A|`. Where several are wanted at one end, the space
    orthogonal to those found is searched once more from a random vector, so that repeated eigenvalues come as often as they
    occur.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric. It gets vectors of at least float32.
      params: pytree of d float numbers that gives shapes, dtypes and shardings of the vectors.
      k: number of pairs, at most d.
      key: JAX key of the start.
      which: "largest", "smallest", "magnitude" (largest absolute values), or "both": `ceil(k / 2)` of the largest and
        `floor(k / 2)` of the smallest.
      tol: relative to |A|, for which the largest absolute value seen stands. Eigenvalues are more exact than vectors: their
        errors are about `residual^2 / gap` to the next.
      basis_size: m, above k; None: `max(2 k + 1, 20)`, at most d.
      max_restarts: times that the basis is filled again at most.

    Returns:
      `((values, vectors), info)`: values `[k]`, most extreme first ("both": in descending order); vectors a tree with a
      leading axis k, orthonormal; both in at least float32. Print `info.message`.

    Raises:
      ValueError: k above d, basis_size not above k (unless both are d), an unknown `which`; a matvec that returns another
        tree than it is given.
      TypeError: params not float; a matvec that changes dtypes.

    Cost: at least m products, k more for the residuals; four passes over the basis a product. Memory: m trees like params,
      and `(k + m) / 2` more while it restarts.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> matvec = curvax.hvp(lambda w: jnp.sum(w**4) / 12, jnp.arange(6.0))        # Hessian diag(w^2)
      >>> (values, vectors), info = curvax.eigsh(matvec, jnp.zeros(6), 2, jax.random.key(0))
      >>> [round(x, 3) for x in values.tolist()], info.message
      ([25.0, 16.0], 'converged to the tolerance.')
      >>> abs(vectors).round(3).tolist()
      [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]

    References: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems.
    """
    check_params(params)
    check_steps(params, k=k)
    check_choice("which", which, WHICH)
    check_count(0, max_restarts=max_restarts)
    size = _basis_size(params, k, basis_size)
    keep = min((k + size) // 2, size - 1)
    # One vector at each end is found from any start; and the whole space has nothing beside it.
    search = size < dimension(params) and k > (2 if which == "both" else 1)

    def cycle(c: _Carry) -> _Carry:
        krylov, H = _restart(c.krylov, c.theta, c.S, c.start, c.searching, keep)

        def step(j: Array, carry: tuple[Krylov, Array, Scalar]) -> tuple[Krylov, Array, Scalar]:
            krylov, coefficients, rest = extend(
                matvec, carry[0], j, jax.random.fold_in(key, c.restarts)
            )
            return krylov, carry[1].at[:, j].set(coefficients), rest

        krylov, H, rest = lax.fori_loop(
            c.start, size, step, (krylov, H, jnp.zeros_like(krylov.scale))
        )
        theta, S = _ritz(H, which)
        allowed = _allowed(tol, theta)
        # Half of it, so that rounding does not decide what is reported; and nothing is better than products are.
        met = jnp.all(rest * jnp.abs(S[-1, :k]) <= jnp.maximum(allowed / 2, _asymmetry(H, c.start)))
        # A search that finds nothing better leaves those in the first k rows, where it began.
        vain = c.searching & jnp.all(jnp.abs(theta - c.theta)[:k] <= allowed)
        theta, S = keep_unless(vain, (c.theta, jnp.eye(size, dtype=S.dtype)), (theta, S))
        searching = met & ~vain & search
        code = code_of(
            (~jnp.all(jnp.isfinite(theta)), Result.NOT_FINITE),
            (vain | (met & ~searching), Result.CONVERGED),
            (c.restarts >= max_restarts, Result.MAX_STEPS),
            otherwise=GOING,
        )
        start = jnp.where(searching, jnp.int32(k), keep)
        return _Carry(
            krylov, theta, S, start, searching, c.restarts + 1, c.steps + size - c.start, code
        )

    with loops_for(matvec):
        last = lax.while_loop(
            lambda c: c.code == GOING, fast_convs_in_loops(cycle), _begin(params, size)
        )
        values, vectors = _pairs(last.krylov.basis, last.theta, last.S, k, which)
        residuals = lax.map(
            fast_convs_in_loops(partial(_residual, matvec, values, vectors)), jnp.arange(k)
        )
    short = ~jnp.all(residuals <= _allowed(tol, last.theta))
    code = code_of(((last.code == Result.CONVERGED) & short, Result.STALLED), otherwise=last.code)
    return (values, vectors), EigInfo(residuals, last.steps, code)


class _Carry(NamedTuple):
    """What a cycle leaves, and how the next begins: with `start` Ritz vectors, then a random one if it is `searching`."""

    krylov: Krylov
    theta: Float[Array, " m"]
    S: Float[Array, "m m"]
    start: Int[Array, ""]
    searching: Bool[Array, ""]
    restarts: Int[Array, ""]
    steps: Int[Array, ""]
    code: Int[Array, ""]


@partial(compiled, static=(1,))
def _begin(params: Params, size: int) -> _Carry:
    rows = empty_rows(params, size)
    zero = jnp.zeros_like(norm(params))
    krylov = Krylov(rows, jax.tree.map(lambda x: x[0], rows), jnp.array(True), zero)
    theta, S = jnp.zeros(size, zero.dtype), jnp.zeros((size, size), zero.dtype)
    return _Carry(
        krylov,
        theta,
        S,
        jnp.int32(0),
        jnp.array(False),
        jnp.int32(0),
        jnp.int32(0),
        jnp.int32(GOING),
    )


@partial(compiled, donate=(0,), static=(5,))
def _restart(
    krylov: Krylov,
    theta: Float[Array, " m"],
    S: Float[Array, "m m"],
    start: Int[Array, ""],
    searching: Bool[Array, ""],
    keep: int,
) -> tuple[Krylov, Float[Array, "m m"]]:
    """Put the first `start` Ritz vectors, of which `keep` are made at most, in place of the basis."""
    kept = (jnp.arange(theta.size) < start).astype(theta.dtype)
    basis = jax.tree.map(partial(_rotated, (kept * S)[:, :keep]), krylov.basis)
    return krylov._replace(basis=basis, lost=krylov.lost | searching), jnp.diag(kept * theta)


def _rotated(rotation: Float[Array, "m p"], rows: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
    """Return `rotation' rows` in the first p rows, and zeros below; in place, but for p rows."""
    size, keep = rotation.shape
    rows = lax.dynamic_update_slice_in_dim(rows, _combinations(rotation, rows), 0, 0)
    return lax.dynamic_update_slice_in_dim(rows, jnp.zeros_like(rows[: size - keep]), keep, 0)


def _combinations(
    rotation: Float[Array, "m p"], rows: Float[Array, "m ..."]
) -> Float[Array, "p ..."]:
    return jnp.tensordot(rotation.astype(rows.dtype), rows, (0, 0), precision=lax.Precision.HIGHEST)


@partial(compiled, static=(1,))
def _ritz(H: Float[Array, "m m"], which: str) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Return eigenvalues and vectors, most wanted first, of the symmetric matrix whose upper triangle is that of H."""
    theta, S = jnp.linalg.eigh(jnp.triu(H) + jnp.triu(H, 1).T)
    ascending = np.arange(theta.size)
    order = {
        "largest": ascending[::-1],
        "smallest": ascending,
        "both": np.where(ascending % 2, ascending // 2, theta.size - 1 - ascending // 2),
        "magnitude": jnp.argsort(-jnp.abs(theta)),
    }[which]
    return theta[order], S[:, order]


@compiled
def _asymmetry(H: Float[Array, "m m"], start: Int[Array, ""]) -> Scalar:
    """Return the largest entry of the upper triangle that is zero if A is symmetric: the error of products in the basis."""
    row, column = jnp.indices(H.shape)
    return jnp.max(jnp.where((row < column - 1) & (column > start), jnp.abs(H), 0))


@partial(compiled, static=(3, 4))
def _pairs(
    basis: PyTree[Array], theta: Float[Array, " m"], S: Float[Array, "m m"], k: int, which: str
) -> tuple[Float[Array, " k"], PyTree[Array]]:
    order = np.arange(k)
    if which == "both":  # they alternate
        order = np.concatenate([order[::2], order[1::2][::-1]])
    return theta[order], jax.tree.map(partial(_combinations, S[:, order]), basis)


def _residual(
    matvec: Matvec, values: Float[Array, " k"], vectors: PyTree[Array], i: Array
) -> Scalar:
    u = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), vectors)
    return norm(add_scaled(checked(pin_to_iteration(matvec, i), u), -values[i], u))


def _allowed(tol: float | Array, theta: Float[Array, " m"]) -> Scalar:
    return jnp.asarray(tol, theta.dtype) * jnp.max(jnp.abs(theta))


def _basis_size(params: Params, k: int, basis_size: int | None) -> int:
    most = dimension(params)
    if basis_size is None:
        return min(most, max(2 * k + 1, 20))
    check_steps(params, basis_size=basis_size)
    if basis_size <= k and k < most:
        raise ValueError(f"basis_size must be above k: got {basis_size} for k = {k}.")
    return basis_size
