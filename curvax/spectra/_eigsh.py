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
from curvax.solve._rows import get_row, sharded_zeros, zero_rows
from curvax.spectra._lanczos import NOT_FINITE, Krylov, check_steps, extend

# m: rows of the basis; p: rows that a restart keeps; k: pairs wanted; d: parameters
# V: [m, d], the basis; H = V A V'; theta: Ritz values, S: the eigenvectors of H, in columns

WHICH = {
    "largest": "largest values",
    "smallest": "smallest values",
    "both": "from both ends in turn",
    "magnitude": "largest absolute values",
}
_MESSAGES = {
    Result.MAX_STEPS: "max_restarts were not enough: raise max_restarts, basis_size or tol, "
    "or ask for fewer eigenvalues at an end where they lie close together.",
    Result.STALLED: "the products are not exact enough, or not symmetric, to meet the tolerance "
    "(info.residuals): raise tol, compute in a wider dtype, or see whether "
    "curvax.solve.check_symmetric passes.",
    Result.NOT_FINITE: NOT_FINITE,
}


class EigInfo(NamedTuple):
    """What an eigenvalue iteration tells about itself.

    Attributes:
      residuals: `|A u_i - theta_i u_i|`, computed from the results; an eigenvalue of A lies within
        this distance of theta_i.
      steps: the number of products with A, without the k for the residuals.
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
    """Find k extreme eigenvalues and eigenvectors of a symmetric matrix, `A u_i = theta_i u_i`.

    Lanczos fills a basis of m vectors. Of that, the approximate eigenvectors nearest to those
    wanted stay, and the basis is filled again, until all k have `|A u_i - theta_i u_i| <= tol |A|`.
    Where several are wanted at one end, the space orthogonal to these k is searched once more from
    a random vector, so that repeated eigenvalues come as often as they occur.

    Args:
      matvec: `v -> A v` on trees like params, A symmetric. It gets vectors of at least float32.
      params: a pytree of d float numbers that gives shapes, dtypes and shardings of the vectors.
      k: the number of pairs, at most d.
      key: the JAX key of the start.
      which: "largest", "smallest", "magnitude" (the largest absolute values), or "both":
        `ceil(k / 2)` of the largest and `floor(k / 2)` of the smallest.
      tol: the tolerance relative to |A|, for which the largest absolute value seen stands.
        Eigenvalues are more exact than vectors: their errors are about `residual^2 / gap`, the gap
        being that to the next eigenvalue.
      basis_size: m, above k; None stands for `max(2 k + 1, 20)`, at most d.
      max_restarts: the largest number of times that the basis is filled again.

    Returns:
      `((values, vectors), info)`. values is `[k]`, the most extreme first ("both": in descending
      order); vectors is a tree with a leading axis k, orthonormal; both are in at least float32.
      Print `info.message`.

    Raises:
      ValueError: k is above d, basis_size is not above k (unless both are d), `which` is unknown,
        or the matvec returns a tree of another structure.
      TypeError: params are not float, or the matvec changes dtypes.

    Cost: at least m products, and k more for the residuals; four passes over the basis in each.
      Memory: m trees like params, and `(k + m) / 2` more while it restarts.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> matvec = curvax.hvp(lambda w: jnp.sum(w**4) / 12, jnp.arange(6.0))  # Hessian diag(w^2)
      >>> (values, vectors), info = curvax.eigsh(matvec, jnp.zeros(6), 2, jax.random.key(0))
      >>> [round(x, 3) for x in values.tolist()], info.message
      ([25.0, 16.0], 'converged to the tolerance.')
      >>> abs(vectors).round(3).tolist()
      [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]

    References: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue
      problems.
    """
    check_params(params)
    check_steps(params, k=k)
    check_choice("which", which, WHICH)
    check_count(0, max_restarts=max_restarts)
    size = _basis_size(params, k, basis_size)
    # Wu and Simon keep more rows than are wanted; half of those beyond k is a usual choice.
    num_kept = min((k + size) // 2, size - 1)
    # One vector at each end is met from any start; and beside the whole space there is nothing.
    needs_search = size < dimension(params) and k > (2 if which == "both" else 1)

    def cycle(c: _Carry) -> _Carry:
        """Restart from the Ritz vectors, fill the basis, and see how exact they are now."""
        krylov, H = _restart(c.krylov, c.theta, c.S, c.start, c.is_search, num_kept)
        cycle_key = jax.random.fold_in(key, c.restarts)

        def step(
            j: Array,
            carry: tuple[Krylov, Array, Scalar],
        ) -> tuple[Krylov, Array, Scalar]:
            krylov, H, _ = carry
            krylov, coefficients, length = extend(matvec, krylov, j, cycle_key)
            return krylov, H.at[:, j].set(coefficients), length

        # Column j of H is V A v_j. The first after a restart also couples v_j with all Ritz vectors
        # (the arrow of Wu and Simon); b_m is what the last product has outside of the basis.
        initial = (krylov, H, jnp.zeros_like(krylov.scale))
        krylov, H, b_m = lax.fori_loop(c.start, size, step, initial)
        theta, S = _ritz(H, which)

        # With u_i = V' s_i: |A u_i - theta_i u_i| = b_m |(s_i)_m|. Half of the tolerance is asked,
        # so that rounding does not decide what is reported; and no pair can be more exact than the
        # products are.
        residuals = b_m * jnp.abs(S[-1, :k])
        allowed = _allowed(tol, theta)
        accurate = jnp.all(residuals <= jnp.maximum(allowed / 2, _asymmetry(H, c.start)))

        # A search that changes none of the k values has met nothing new: the pairs in the first k
        # rows, with which it began, are the result.
        unchanged = jnp.all(jnp.abs(theta - c.theta)[:k] <= allowed)
        search_failed = c.is_search & unchanged
        before_search = (c.theta, jnp.eye(size, dtype=S.dtype))
        theta, S = keep_unless(search_failed, before_search, (theta, S))

        search_next = accurate & ~search_failed & needs_search
        code = code_of(
            (~jnp.all(jnp.isfinite(theta)), Result.NOT_FINITE),
            (search_failed | (accurate & ~search_next), Result.CONVERGED),
            (c.restarts >= max_restarts, Result.MAX_STEPS),
            otherwise=GOING,
        )
        return _Carry(
            krylov=krylov,
            theta=theta,
            S=S,
            start=jnp.where(search_next, jnp.int32(k), num_kept),
            is_search=search_next,
            restarts=c.restarts + 1,
            steps=c.steps + size - c.start,
            code=code,
        )

    with loops_for(matvec):
        first = _init_carry(params, size)
        last = lax.while_loop(lambda c: c.code == GOING, fast_convs_in_loops(cycle), first)
        values, vectors = _pairs(last.krylov.basis, last.theta, last.S, k, which)
        residual = fast_convs_in_loops(partial(_residual, matvec, values, vectors))
        residuals = lax.map(residual, jnp.arange(k))
    # What b_m |(s_i)_m| promised must hold of the vectors that are returned.
    inaccurate = ~jnp.all(residuals <= _allowed(tol, last.theta))
    stalled = (last.code == Result.CONVERGED) & inaccurate
    code = code_of((stalled, Result.STALLED), otherwise=last.code)
    return (values, vectors), EigInfo(residuals, last.steps, code)


class _Carry(NamedTuple):
    """The state between two cycles, and how the next one begins.

    Attributes:
      krylov: the basis that the last cycle filled.
      theta: the Ritz values, most wanted first.
      S: the eigenvectors of H in that order.
      start: the number of Ritz vectors with which the next cycle begins.
      is_search: whether a random vector follows them, to look for repeated eigenvalues.
      restarts: the number of cycles so far.
      steps: the number of products so far.
      code: how it ended, or GOING.
    """

    krylov: Krylov
    theta: Float[Array, " m"]
    S: Float[Array, "m m"]
    start: Int[Array, ""]
    is_search: Bool[Array, ""]
    restarts: Int[Array, ""]
    steps: Int[Array, ""]
    code: Int[Array, ""]


@partial(compiled, static=(1,))
def _init_carry(params: Params, size: int) -> _Carry:
    """Return an empty basis, whose first row is lost, so that the iteration begins at random."""
    basis = zero_rows(params, size)
    zero = jnp.zeros_like(norm(params))
    krylov = Krylov(basis, next_row=get_row(basis, 0), lost=jnp.array(True), scale=zero)
    return _Carry(
        krylov=krylov,
        theta=jnp.zeros(size, zero.dtype),
        S=jnp.zeros((size, size), zero.dtype),
        start=jnp.int32(0),
        is_search=jnp.array(False),
        restarts=jnp.int32(0),
        steps=jnp.int32(0),
        code=jnp.int32(GOING),
    )


@partial(compiled, donate=(0,), static=(5,))
def _restart(
    krylov: Krylov,
    theta: Float[Array, " m"],
    S: Float[Array, "m m"],
    start: Int[Array, ""],
    is_search: Bool[Array, ""],
    num_kept: int,
) -> tuple[Krylov, Float[Array, "m m"]]:
    """Put the first `start` Ritz vectors `u_i = V' s_i` in place of the basis; H is then diagonal.

    The shapes are static: `num_kept` rows are computed, and those from `start` on are zero.
    """
    mask = (jnp.arange(theta.size) < start).astype(theta.dtype)
    rotation = (mask * S)[:, :num_kept]
    basis = jax.tree.map(partial(_rotated, rotation), krylov.basis)
    krylov = krylov._replace(basis=basis, lost=krylov.lost | is_search)
    return krylov, jnp.diag(mask * theta)


def _rotated(
    rotation: Float[Array, "m p"],
    rows: Float[Array, "m ..."],
) -> Float[Array, "m ..."]:
    """Return `rotation' rows` in the first p rows, and zeros below; in place, but for p rows."""
    num_kept = rotation.shape[1]
    zeros = sharded_zeros(rows[num_kept:], rows.dtype)
    rows = lax.dynamic_update_slice_in_dim(rows, _combinations(rotation, rows), 0, axis=0)
    return lax.dynamic_update_slice_in_dim(rows, zeros, num_kept, axis=0)


def _combinations(
    rotation: Float[Array, "m p"],
    rows: Float[Array, "m ..."],
) -> Float[Array, "p ..."]:
    rotation = rotation.astype(rows.dtype)
    return jnp.tensordot(rotation, rows, axes=(0, 0), precision=lax.Precision.HIGHEST)


@partial(compiled, static=(1,))
def _ritz(
    H: Float[Array, "m m"],
    which: str,
) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Return eigenvalues and vectors of H, most wanted first, from its upper triangle."""
    theta, S = jnp.linalg.eigh(jnp.triu(H) + jnp.triu(H, 1).T)
    ascending = np.arange(theta.size)
    # "both": the largest, the smallest, the second largest, ...
    both_ends = np.where(ascending % 2, ascending // 2, theta.size - 1 - ascending // 2)
    order = {
        "largest": ascending[::-1],
        "smallest": ascending,
        "both": both_ends,
        "magnitude": jnp.argsort(-jnp.abs(theta)),
    }[which]
    return theta[order], S[:, order]


@compiled
def _asymmetry(
    H: Float[Array, "m m"],
    start: Int[Array, ""],
) -> Scalar:
    """Return the largest entry of H that is zero if A is symmetric: the error of its products.

    In columns after `start`, Lanczos is a recurrence of three terms; only entries beside the
    diagonal may differ from zero.
    """
    row, column = jnp.indices(H.shape)
    is_zero_if_symmetric = (row < column - 1) & (column > start)
    return jnp.max(jnp.where(is_zero_if_symmetric, jnp.abs(H), 0))


@partial(compiled, static=(3, 4))
def _pairs(
    basis: PyTree[Array],
    theta: Float[Array, " m"],
    S: Float[Array, "m m"],
    k: int,
    which: str,
) -> tuple[Float[Array, " k"], PyTree[Array]]:
    """Return the first k Ritz values, in the order of the result, and their vectors `V' s_i`."""
    order = np.arange(k)
    if which == "both":  # they alternate between the ends; the result descends
        order = np.concatenate([order[::2], order[1::2][::-1]])
    vectors = jax.tree.map(partial(_combinations, S[:, order]), basis)
    return theta[order], vectors


def _residual(
    matvec: Matvec,
    values: Float[Array, " k"],
    vectors: PyTree[Array],
    i: Array,
) -> Scalar:
    u = get_row(vectors, i)
    product = checked(pin_to_iteration(matvec, i), u)
    return norm(add_scaled(product, -values[i], u))


def _allowed(
    tol: float | Array,
    theta: Float[Array, " m"],
) -> Scalar:
    return jnp.asarray(tol, theta.dtype) * jnp.max(jnp.abs(theta))


def _basis_size(
    params: Params,
    k: int,
    basis_size: int | None,
) -> int:
    """Return m, or raise if the basis does not leave room for a step beside k pairs."""
    most = dimension(params)
    if basis_size is None:
        return min(most, max(2 * k + 1, 20))
    check_steps(params, basis_size=basis_size)
    if basis_size <= k and k < most:
        raise ValueError(f"basis_size must be above k: got {basis_size} for k = {k}.")
    return basis_size
