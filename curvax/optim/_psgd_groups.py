"""Groups of matrices Q in which PSGD fits: triangular and diagonal ones, and low-rank updates.

A probe v and its h (a product H v, or a gradient) fit `P = Q'Q` by one step on

  h' P h + v' P^-1 v,     with a = Q h and b = Q^-T v:     |a|^2 + |b|^2,

that stays in the group: `Q <- (I - mu E) Q`, where E is the part of `a a' - b b'` in the tangent
space of the group, and `mu = rate / L` with a bound L of the norm of `a a' + b b'`. On average the
step is zero where `E[a a'] = E[b b']`, which is `P E[h h'] P = I`. For matrices v, h `[i, o]` and
`Q = Q_left x Q_right` the columns of `A = Q_left h Q_right'` and `B = Q_left^-T v Q_right^-1` are
what Q_left is fitted to, and their rows what Q_right is.

Li (2018), https://arxiv.org/abs/1512.04202; Li (2024), https://arxiv.org/abs/2402.11858, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._trees import safe_divide
from curvax._types import PRNGKey
from curvax._xla import one_after_another
from curvax.kron._kron_factor import matmul
from curvax.kron._layout import Block
from curvax.optim._matrices import Matrices
from curvax.optim._matrix_parts import Sides

PerSlice: TypeAlias = Float[Array, " s"]
Squares: TypeAlias = Float[Array, "s n n"]


class FitStep(NamedTuple):
    """How far a fit goes.

    Attributes:
      rate: the step in units of `1 / L`, in (0, 1].
      bound_decay: the decay c in `L <- max(l, c L + (1 - c) l)` for the bound l of the latest
        probe; 0 for the latest alone.
    """

    rate: Any
    bound_decay: Any

    def bound(self, old: PerSlice, latest: PerSlice) -> PerSlice:
        """Return L."""
        average = self.bound_decay * old + (1 - self.bound_decay) * latest
        return jnp.maximum(latest, average.astype(old.dtype))

    def length(self, bound: PerSlice) -> Matrices:
        """Return mu, to multiply matrices by."""
        # With a bound of 0 both a and b are zero: there is nothing to fit.
        mu: Matrices = safe_divide(self.rate, bound)[:, None, None].astype(bound.dtype)
        return mu


class Group(NamedTuple):
    """What PSGD does with the Q of a stack of matrices.

    Attributes:
      init: `(block, V, key) -> Q`, the identity, from zeros like V.
      fit: `(Q, h, v, step) -> Q`, one step for a pair of matrices; the first one also sets the size
        of Q, so that `|Q h| = |Q^-T v|`.
      apply: `(Q, M) -> Q'Q M`.
    """

    init: Callable[[Block, Matrices, PRNGKey], Any]
    fit: Callable[[Any, Matrices, Matrices, FitStep], Any]
    apply: Callable[[Any, Matrices], Matrices]


# -- one side of a Kronecker product -----------------------------------------------------------


class Side(Protocol):
    """The factor Q of one side, for matrices x that it multiplies from the left."""

    def times(self, x: Matrices) -> Matrices:
        """Return `Q x`."""
        ...

    def times_gram(self, x: Matrices) -> Matrices:
        """Return `Q'Q x`."""
        ...

    def solve_transposed(self, x: Matrices) -> Matrices:
        """Return `Q^-T x`."""
        ...

    def fitted(self, a: Matrices, b: Matrices, step: FitStep) -> Side:
        """Return `(I - mu E) Q` for the columns of a and b."""
        ...

    def largest(self) -> PerSlice | None:
        """Return the largest absolute entry; None for the identity."""
        ...

    def scaled(self, c: PerSlice) -> Side:
        """Multiply Q by numbers."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Triangular:
    """An upper triangular Q with a positive diagonal for each slice.

    Attributes:
      matrix: Q, `[s, n, n]`.
      bound: L, `[s]`.
    """

    matrix: Squares
    bound: PerSlice

    def times(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return matmul(self.matrix, x)

    def times_gram(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return matmul(self.matrix.mT, matmul(self.matrix, x))

    def solve_transposed(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return _slice_by_slice(_solve_transposed, self.matrix, x)

    def fitted(self, a: Matrices, b: Matrices, step: FitStep) -> Triangular:
        """See `Side`.

        A diagonal entry is multiplied by `1 - rate E_ii / L`. With `S = A A' + B B'` both bounds
        are at least the largest `S_jj >= |E_ii|`: a rate below 1 leaves the diagonal positive, and
        Q invertible, whatever the probes are.
        """
        plus, minus = matmul(a, a.mT), matmul(b, b.mT)
        # For one column S has rank two, and its trace |a|^2 + |b|^2 is at most twice its norm.
        has_one_column = a.shape[-1] == 1
        latest = _trace(plus + minus) if has_one_column else norm_bound(plus + minus)
        bound = step.bound(self.bound, latest)
        # The tangent space of triangular matrices is the triangular matrices.
        E = jnp.triu(plus - minus)
        return Triangular(self.matrix - step.length(bound) * matmul(E, self.matrix), bound)

    def largest(self) -> PerSlice:
        """See `Side`."""
        return jnp.max(jnp.abs(self.matrix), axis=(1, 2))

    def scaled(self, c: PerSlice) -> Triangular:
        """See `Side`."""
        return Triangular(c[:, None, None] * self.matrix, self.bound)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scales:
    """A diagonal Q for each slice.

    Attributes:
      entries: the diagonal of Q, `[s, n]`.
      bound: L, `[s]`.
    """

    entries: Float[Array, "s n"]
    bound: PerSlice

    def times(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return self.entries[:, :, None] * x

    def times_gram(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return (self.entries**2)[:, :, None] * x

    def solve_transposed(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return x / self.entries[:, :, None]

    def fitted(self, a: Matrices, b: Matrices, step: FitStep) -> Scales:
        """See `Side`."""
        # The diagonals of A A' and B B'; the norm of a diagonal matrix is its largest entry.
        plus, minus = jnp.sum(a * a, axis=2), jnp.sum(b * b, axis=2)
        bound = step.bound(self.bound, jnp.max(plus + minus, axis=1))
        mu = step.length(bound)[:, :, 0]
        return Scales(self.entries - mu * (plus - minus) * self.entries, bound)

    def largest(self) -> PerSlice:
        """See `Side`."""
        return jnp.max(jnp.abs(self.entries), axis=1)

    def scaled(self, c: PerSlice) -> Scales:
        """See `Side`."""
        return Scales(c[:, None] * self.entries, self.bound)


class Unfitted(NamedTuple):
    """The identity, which stays one."""

    def times(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return x

    def times_gram(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return x

    def solve_transposed(self, x: Matrices) -> Matrices:
        """See `Side`."""
        return x

    def fitted(self, a: Matrices, b: Matrices, step: FitStep) -> Unfitted:
        """See `Side`."""
        del a, b, step
        return self

    def largest(self) -> None:
        """See `Side`."""
        return None

    def scaled(self, c: PerSlice) -> Unfitted:
        """See `Side`."""
        del c
        return self


def kronecker_group() -> Group:
    """Return the group of `Q_left x Q_right`, of the structures that a block's sides have."""

    def init(block: Block, V: Matrices, key: PRNGKey) -> Sides:
        del key
        stack, rows, columns = V.shape
        sizes = zip(block.structures, (rows, columns), strict=True)
        return Sides(*(_identity_side(name, stack, size, V.dtype) for name, size in sizes))

    def fit(Q: Sides, h: Matrices, v: Matrices, step: FitStep) -> Sides:
        Q = balanced(_with_first_scale(Q, h, v))
        # A = Q_left h Q_right',   B = Q_left^-T v Q_right^-1
        A = Q.right.times(Q.left.times(h).mT).mT
        B = Q.right.solve_transposed(Q.left.solve_transposed(v).mT).mT
        # Both sides from the old ones.
        return Sides(Q.left.fitted(A, B, step), Q.right.fitted(A.mT, B.mT, step))

    def apply(Q: Sides, M: Matrices) -> Matrices:
        # Q'Q M = Q_left' Q_left M Q_right' Q_right
        product: Matrices = Q.right.times_gram(Q.left.times_gram(M).mT).mT
        return product

    return Group(init, fit, apply)


def balanced(Q: Sides) -> Sides:
    """Give both sides the same largest entry; their product, and so P, stays what it is.

    `A`, `B` and the relative steps of both sides do not depend on how a number is split between
    them. Nothing in a fit keeps one side from growing while the other shrinks.
    """
    left, right = Q.left.largest(), Q.right.largest()
    if left is None or right is None:
        return Q
    ratio = jnp.sqrt(right / left)
    return Sides(Q.left.scaled(ratio), Q.right.scaled(1 / ratio))


def _with_first_scale(Q: Sides, h: Matrices, v: Matrices) -> Sides:
    """Multiply by the scale of the first pair, if this is that one."""
    if not isinstance(Q.left, Unfitted):
        return Sides(Q.left.scaled(_first_scale(Q.left.bound, h, v)), Q.right)
    if not isinstance(Q.right, Unfitted):
        return Sides(Q.left, Q.right.scaled(_first_scale(Q.right.bound, h, v)))
    return Q


def norm_bound(S: Squares) -> PerSlice:
    """Bound the norm of positive semidefinite matrices from below, by two steps of power iteration.

    `|S x| / |x|` with `x = S^2 e` and e the unit vector of the largest row. As ratios of moments of
    the spectrum rise, it is at least that row's norm `|S e|`, which no diagonal entry exceeds.
    """
    # In units of the largest entry, which is on the diagonal: squares cannot overflow.
    unit = jnp.max(jnp.diagonal(S, axis1=1, axis2=2), axis=1)
    scaled = safe_divide(S, jnp.broadcast_to(unit[:, None, None], S.shape))
    largest = jnp.argmax(jnp.sum(scaled * scaled, axis=2), axis=1)
    row = jnp.take_along_axis(scaled, largest[:, None, None], axis=1)
    x = matmul(row, scaled)
    norm_x, norm_y = (jnp.linalg.norm(z[:, 0], axis=1) for z in (x, matmul(x, scaled)))
    return safe_divide(norm_y, norm_x) * unit


# -- diagonal and low rank ---------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """`Q = (I + U V') diag(d)` for the entries of each slice as a vector of length n.

    Attributes:
      d: `[s, n, 1]`, positive.
      U: `[s, n, r]`.
      V: `[s, n, r]`.
      bounds: L of the moves of d, U and V, `[s, 3]`.
    """

    d: Matrices
    U: Matrices
    V: Matrices
    bounds: Float[Array, "s 3"]


def low_rank_group(rank: int) -> Group:
    """Return the group of `(I + U V') diag(d)`, with U and V of `rank` columns, on vectors."""

    def init(block: Block, V: Matrices, key: PRNGKey) -> LowRank:
        del block
        stack = len(V)
        shape = stack, V[0].size, rank
        # With U = V = 0 neither would ever change; with U = 0 alone Q is the identity.
        directions = jax.random.normal(key, shape, V.dtype) / math.sqrt(shape[1])
        return LowRank(
            d=jnp.ones((*shape[:2], 1), V.dtype),
            U=jnp.zeros(shape, V.dtype),
            V=directions,
            bounds=jnp.zeros((stack, 3), V.dtype),
        )

    def fit(Q: LowRank, h: Matrices, v: Matrices, step: FitStep) -> LowRank:
        # One after another, each from where the one before it led: steps of size 1 / L in three
        # directions at once could together go too far.
        h, v, Q = _as_vectors(h), _as_vectors(v), _with_equal_norms(Q)
        scale = _first_scale(Q.bounds[:, 0], h, v)[:, None, None]
        Q = LowRank(d=scale * Q.d, U=Q.U, V=Q.V, bounds=Q.bounds)
        for move in (_move_d, _move_u, _move_v):
            Q = move(Q, _times(Q, h), _solve_transposed_low_rank(Q, v), step)
        return Q

    def apply(Q: LowRank, M: Matrices) -> Matrices:
        y = _times(Q, _as_vectors(M))
        # Q'y = d (y + V U'y)
        product = Q.d * (y + matmul(Q.V, matmul(Q.U.mT, y)))
        return product.reshape(M.shape)

    return Group(init, fit, apply)


def _move_d(Q: LowRank, a: Matrices, b: Matrices, step: FitStep) -> LowRank:
    """Multiply Q by a diagonal matrix from the left, which stays in the group.

    `diag(c) (I + U V') diag(d) = (I + (c U) (V / c)') diag(c d)`.
    """
    plus, minus = a * a, b * b
    bound = step.bound(Q.bounds[:, 0], jnp.max(plus + minus, axis=(1, 2)))
    # Positive for a rate below 1, for L is at least the largest entry.
    c = 1 - step.length(bound) * (plus - minus)
    bounds = Q.bounds.at[:, 0].set(bound)
    return LowRank(d=c * Q.d, U=c * Q.U, V=Q.V / c, bounds=bounds)


def _move_u(Q: LowRank, a: Matrices, b: Matrices, step: FitStep) -> LowRank:
    """Multiply Q by `I - X V'` from the left: `U <- U - X (I + V'U)`."""
    bound, X = _low_rank_step(a, b, Q.V, Q.bounds[:, 1], step)
    U = Q.U - X - matmul(X, matmul(Q.V.mT, Q.U))
    return LowRank(d=Q.d, U=U, V=Q.V, bounds=Q.bounds.at[:, 1].set(bound))


def _move_v(Q: LowRank, a: Matrices, b: Matrices, step: FitStep) -> LowRank:
    """Multiply Q by `I - U X'` from the left: `V <- V - X - V U'X`."""
    bound, X = _low_rank_step(a, b, Q.U, Q.bounds[:, 2], step)
    V = Q.V - X - matmul(Q.V, matmul(Q.U.mT, X))
    return LowRank(d=Q.d, U=Q.U, V=V, bounds=Q.bounds.at[:, 2].set(bound))


def _low_rank_step(
    a: Matrices, b: Matrices, W: Matrices, old: PerSlice, step: FitStep
) -> tuple[PerSlice, Matrices]:
    """Return L and `X = mu (a a' - b b') W` for a bound L of the norm of `(a a' + b b') W W'`."""
    a_in_w, b_in_w = matmul(a.mT, W), matmul(b.mT, W)
    latest = _norm(a) * _norm(matmul(W, a_in_w.mT)) + _norm(b) * _norm(matmul(W, b_in_w.mT))
    bound = step.bound(old, latest)
    return bound, step.length(bound) * (a * a_in_w - b * b_in_w)


def _with_equal_norms(Q: LowRank) -> LowRank:
    """Give U and V the same norm; `U V'` stays what it is."""
    norm_u, norm_v = _norm(Q.U), _norm(Q.V)
    # Where U is still zero there is nothing to compare.
    ratio = jnp.where(norm_u > 0, safe_divide(norm_v, norm_u), 1)
    c = jnp.sqrt(ratio)[:, None, None]
    return LowRank(d=Q.d, U=c * Q.U, V=Q.V / c, bounds=Q.bounds)


def _times(Q: LowRank, x: Matrices) -> Matrices:
    """Return `Q x`."""
    y = Q.d * x
    return y + matmul(Q.U, matmul(Q.V.mT, y))


def _solve_transposed_low_rank(Q: LowRank, x: Matrices) -> Matrices:
    """Return `Q^-T x = y - V (I + U'V)^-1 U'y` with `y = x / d`, by Woodbury's identity."""
    y = x / Q.d
    product = matmul(Q.U.mT, Q.V)
    small = product + jnp.eye(product.shape[-1], dtype=product.dtype)
    return y - matmul(Q.V, _slice_by_slice(jnp.linalg.solve, small, matmul(Q.U.mT, y)))


# -- small parts -------------------------------------------------------------------------------


def _identity_side(structure: str, stack: int, size: int, dtype: Any) -> Side:
    """Return the identity as the Q of a structure."""
    bound = jnp.zeros(stack, dtype)
    if structure == "identity":
        return Unfitted()
    # A matrix of one row is a number, which needs no triangular solve.
    if structure == "diagonal" or size == 1:
        return Scales(jnp.ones((stack, size), dtype), bound)
    identity = jnp.eye(size, dtype=dtype)
    return Triangular(jnp.tile(identity, (stack, 1, 1)), bound)


def _first_scale(bound: PerSlice, h: Matrices, v: Matrices) -> PerSlice:
    """Return the number c that fits the first pair best, `|c h| = |v / c|`; 1 for all others.

    A fit multiplies Q by at most `1 + rate`: many would pass before a Q that begins with 1 has the
    size of curvature or gradients.
    """
    ratio = safe_divide(_norm(v), _norm(h))
    # L is zero until a pair was fitted.
    is_first = (bound == 0) & (ratio > 0)
    return jnp.where(is_first, jnp.sqrt(ratio), 1)


def _solve_transposed(Q: Float[Array, "n n"], x: Float[Array, "n o"]) -> Float[Array, "n o"]:
    return lax.linalg.triangular_solve(Q, x, left_side=True, lower=False, transpose_a=True)


def _slice_by_slice(fn: Callable[..., Array], *stacks: Array) -> Array:
    """Apply a solve to the slices of stacks; on CPUs one after another, see `one_after_another`."""
    if jax.default_backend() != "cpu":
        return jax.vmap(fn)(*stacks)
    one_by_one = one_after_another(fn)
    if len(stacks[0]) == 1:
        return one_by_one(*(x[0] for x in stacks))[None]
    solutions: Array = lax.map(lambda slices: one_by_one(*slices), stacks)
    return solutions


def _as_vectors(x: Matrices) -> Matrices:
    return x.reshape(len(x), -1, 1)


def _trace(x: Squares) -> PerSlice:
    return jnp.trace(x, axis1=1, axis2=2)


def _norm(x: Matrices) -> PerSlice:
    return jnp.sqrt(jnp.sum(x * x, axis=(1, 2)))
