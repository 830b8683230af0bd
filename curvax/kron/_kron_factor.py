"""The structures of a Kronecker factor: one class each, with all operations on factors.

A new structure is a class with the methods of `KronFactor`, and its name in `STRUCTURES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax._batch import ENTRIES_AT_A_TIME
from curvax._xla import is_on_one_device, one_after_another
from curvax.kron._host_eigh import eigh_on_host, is_traced

F = TypeVar("F", bound="KronFactor")
T = TypeVar("T")

# s: slices of a stack, n: rows of a factor, r: rows of data, i: inputs, o: outputs
PerSlice = Float[Array, " s"]
Matrices = Float[Array, "s i o"]
Rows = Float[Array, "s r n"]
Vectors = Float[Array, "s n"]
Squares = Float[Array, "s n n"]


class Eigen(NamedTuple):
    """A symmetric factor in its eigenbasis, `Q diag(values) Q'`.

    Attributes:
      values: `[s, n]`, never negative.
      vectors: Q, `[s, n, n]` in columns; None for the identity.
    """

    values: Array
    vectors: Array | None

    def power(self, exponent: float) -> KronFactor:
        """Raise the factor to a power, `Q diag(values^exponent) Q'`."""
        raised = self.values**exponent
        if self.vectors is None:
            return Diagonal(raised)
        columns = self.vectors * raised[:, None, :]
        return Full(matmul(columns, _t(self.vectors)))


class Pencil(NamedTuple):
    """Two factors X and Y, Y positive definite, made diagonal together: `K'XK = D` and `K'YK = I`.

    Attributes:
      values: the diagonal of D, `[s, n]`, never negative.
      vectors: `[s, n, n]`; None for the identity.
      scales: `[s, n]`, with `K = vectors diag(scales)`; None for ones.
    """

    values: Array
    vectors: Array | None
    scales: Array | None


class KronFactor(Protocol):
    """What a structure offers.

    Instances are pytrees. Each of their arrays begins with the stack's axis and is linear in the
    factor, so that `scaled` and `added` serve all structures.
    """

    @staticmethod
    def moment_shape(stack: int, size: int) -> tuple[int, ...]:
        """Return the shape of the array in which a second moment accumulates."""
        ...

    @staticmethod
    def second_moment(x: Rows, y: Rows | None) -> Array:
        """Sum the symmetric part of `x y'` over rows, in the precision of x; y is x by default."""
        ...

    @staticmethod
    def moment_of_counts(counts: Vectors, with_one: bool) -> Array:
        """Return the second moment of one-hot rows that occurred so often.

        Args:
          counts: how often each row number occurred.
          with_one: the last coordinate is a bias's 1, beside every one-hot row.
        """
        ...

    @staticmethod
    def with_zero_row(moment: Array) -> Array:
        """Append a coordinate that is 0 in all data."""
        ...

    @staticmethod
    def padded_moment(moment: Array, size: int) -> Array:
        """Enlarge a moment to `size` rows, by its mean eigenvalue."""
        ...

    @classmethod
    def from_moment(cls: type[F], mean: Array) -> F:
        """Make a factor of a mean second moment."""
        ...

    @property
    def size(self) -> int:
        """Number of rows n."""
        ...

    def trace(self) -> PerSlice:
        """Return the sum of the eigenvalues."""
        ...

    def mean_eigenvalue(self) -> PerSlice:
        """Return the trace divided by the size."""
        ...

    def as_multiple(self) -> PerSlice | None:
        """Return c if the structure says that the factor is `c I`, else None."""
        ...

    def damped(self: F, amount: Any) -> F:
        """Add `amount I`, at least as much as the trace's rounding error."""
        ...

    def inverse(self: F) -> F:
        """Invert a positive definite factor; NaN where it is not."""
        ...

    def eigh(self) -> Eigen:
        """Decompose; negative eigenvalues, which are rounding errors, become 0."""
        ...

    def pencil(self: F, other: F) -> Pencil:
        """Make this factor and a positive definite other one of its structure diagonal."""
        ...

    def power(self, exponent: float) -> KronFactor:
        """Raise a positive definite factor to a power."""
        ...

    def logdet(self) -> PerSlice:
        """Return the logarithm of the determinant of a positive definite factor."""
        ...

    def largest_eigenvalue(self) -> PerSlice:
        """Return the largest eigenvalue, or a lower bound by power iteration."""
        ...

    def diagonal(self) -> Vectors:
        """Return the diagonal."""
        ...

    def left(self, x: Matrices) -> Matrices:
        """Multiply matrices by the factor from the left."""
        ...

    def right(self, x: Matrices) -> Matrices:
        """Multiply matrices by the factor from the right."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Full:
    """A symmetric matrix for each slice.

    Attributes:
      matrix: `[s, n, n]`.
    """

    matrix: Array

    @staticmethod
    def moment_shape(stack: int, size: int) -> tuple[int, ...]:
        """See `KronFactor`."""
        return stack, size, size

    @staticmethod
    def second_moment(x: Rows, y: Rows | None) -> Array:
        """See `KronFactor`."""
        if y is None:
            return _gram(x)
        # Pairs `u_k = e_k`, `v_k = S e_k` sum to a symmetric matrix only over all k.
        product = matmul(_t(x), y)
        return (product + _t(product)) / 2

    @staticmethod
    def moment_of_counts(counts: Vectors, with_one: bool) -> Array:
        """See `KronFactor`."""
        # One-hot rows with different ones never occur together: beside the diagonal are zeros.
        moment = jax.vmap(jnp.diag)(counts)
        if with_one:  # a one-hot row and the 1 beside it occur together
            rows = counts[:, :-1]
            moment = moment.at[:, -1, :-1].set(rows).at[:, :-1, -1].set(rows)
        return moment

    @staticmethod
    def with_zero_row(moment: Array) -> Array:
        """See `KronFactor`."""
        return jnp.pad(moment, ((0, 0), (0, 1), (0, 1)))

    @staticmethod
    def padded_moment(moment: Array, size: int) -> Array:
        """See `KronFactor`."""
        return Full(moment).padded(size).matrix

    @classmethod
    def from_moment(cls, mean: Array) -> Full:
        """See `KronFactor`."""
        return cls(mean)

    @property
    def size(self) -> int:
        """See `KronFactor`."""
        return int(self.matrix.shape[-1])

    def trace(self) -> PerSlice:
        """See `KronFactor`."""
        return jnp.trace(self.matrix, axis1=-2, axis2=-1)

    def mean_eigenvalue(self) -> PerSlice:
        """See `KronFactor`."""
        return self.trace() / self.size

    def as_multiple(self) -> PerSlice | None:
        """See `KronFactor`."""
        # By the shape alone: values are not known when this is traced.
        return self.matrix[:, 0, 0] if self.size == 1 else None

    def damped(self, amount: Any) -> Full:
        """See `KronFactor`."""
        identity = jnp.eye(self.size, dtype=self.matrix.dtype)
        amount = _at_least_rounding(self, amount)
        return Full(self.matrix + amount[:, None, None] * identity)

    def inverse(self) -> Full:
        """See `KronFactor`.

        With `L L' = matrix` and `R = L^-1` the inverse is `R'R`. R is built by halving, which
        leaves nearly all work to matrix products, at full speed on every backend: on two CPU cores
        2.5 times as fast as Cholesky and two triangular solves.
        """
        return Full(_gram_of_lower(_inverse_root(self.matrix)))

    def eigh(self) -> Eigen:
        """See `KronFactor`."""
        # The matrix is symmetric as it was accumulated: symmetrizing would be a copy.
        vectors, values = lax.linalg.eigh(self.matrix, symmetrize_input=False)
        return Eigen(jnp.maximum(values, 0), vectors)

    def pencil(self, other: Full) -> Pencil:
        """See `KronFactor`.

        With `other = L L'` and `L^-1 X L^-T = U D U'` the vectors are `K = L^-T U`.
        """
        root = _inverse_root(other.matrix)  # R = L^-1
        whitened = matmul(matmul(root, self.matrix), _t(root))
        # Rounding of two products makes it unsymmetric.
        vectors, values = lax.linalg.eigh(whitened, symmetrize_input=True)
        return Pencil(jnp.maximum(values, 0), matmul(_t(root), vectors), None)

    def power(self, exponent: float) -> KronFactor:
        """See `KronFactor`."""
        return self.eigh().power(exponent)

    def logdet(self) -> PerSlice:
        """See `KronFactor`."""
        # det(L L') = prod_i L_ii^2
        root = lax.linalg.cholesky(self.matrix, symmetrize_input=False)
        logs = jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1))
        return 2 * jnp.sum(logs, axis=-1)

    def largest_eigenvalue(self) -> PerSlice:
        """See `KronFactor`."""
        # Eigenvalues would be exact at about 10 n^3; a bound takes two products with vectors.
        multiply = partial(jnp.einsum, "sij,sj->si", self.matrix, precision=lax.Precision.HIGHEST)
        return lower_bound_of_largest(multiply, self.diagonal())

    def diagonal(self) -> Vectors:
        """See `KronFactor`."""
        return jnp.asarray(jnp.diagonal(self.matrix, axis1=-2, axis2=-1))

    def left(self, x: Matrices) -> Matrices:
        """See `KronFactor`."""
        return matmul(self.matrix, x)

    def right(self, x: Matrices) -> Matrices:
        """See `KronFactor`."""
        return matmul(x, self.matrix)

    def padded(self, size: int) -> Full:
        """Enlarge to `size` rows by the mean eigenvalue, which keeps the extreme ones."""
        # The inverse of blockdiag(F, c I) is blockdiag(F^-1, I / c), from which F^-1 is cut out.
        missing = size - self.size
        if missing == 0:
            return self
        is_old = jnp.arange(size) < self.size
        filled = jnp.where(is_old, 0, self.mean_eigenvalue()[:, None])
        diagonal = filled[:, None] * jnp.eye(size, dtype=self.matrix.dtype)
        padded = jnp.pad(self.matrix, ((0, 0), (0, missing), (0, missing)))
        return Full(padded + diagonal)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagonal:
    """The diagonal of a matrix for each slice; nothing is known beside it.

    Attributes:
      entries: `[s, n]`.
    """

    entries: Array

    @staticmethod
    def moment_shape(stack: int, size: int) -> tuple[int, ...]:
        """See `KronFactor`."""
        return stack, size

    @staticmethod
    def second_moment(x: Rows, y: Rows | None) -> Array:
        """See `KronFactor`."""
        return jnp.sum(x * (x if y is None else y), axis=1)

    @staticmethod
    def moment_of_counts(counts: Vectors, with_one: bool) -> Array:
        """See `KronFactor`."""
        # The 1 of a bias meets other inputs beside the diagonal only, and that is not kept.
        del with_one
        return counts

    @staticmethod
    def with_zero_row(moment: Array) -> Array:
        """See `KronFactor`."""
        return jnp.pad(moment, ((0, 0), (0, 1)))

    @staticmethod
    def padded_moment(moment: Array, size: int) -> Array:
        """See `KronFactor`."""
        missing = size - moment.shape[1]
        mean = jnp.mean(moment, axis=1, keepdims=True)
        return jnp.concatenate([moment, jnp.repeat(mean, missing, axis=1)], axis=1)

    @classmethod
    def from_moment(cls, mean: Array) -> Diagonal:
        """See `KronFactor`."""
        return cls(mean)

    @property
    def size(self) -> int:
        """See `KronFactor`."""
        return int(self.entries.shape[-1])

    def trace(self) -> PerSlice:
        """See `KronFactor`."""
        return jnp.sum(self.entries, axis=-1)

    def mean_eigenvalue(self) -> PerSlice:
        """See `KronFactor`."""
        return self.trace() / self.size

    def as_multiple(self) -> PerSlice | None:
        """See `KronFactor`."""
        return self.entries[:, 0] if self.size == 1 else None

    def damped(self, amount: Any) -> Diagonal:
        """See `KronFactor`."""
        return Diagonal(self.entries + _at_least_rounding(self, amount)[:, None])

    def inverse(self) -> Diagonal:
        """See `KronFactor`."""
        return Diagonal(1 / self.entries)

    def eigh(self) -> Eigen:
        """See `KronFactor`."""
        # The basis is Q = I, which None stands for: no product with it is ever computed.
        return Eigen(jnp.maximum(self.entries, 0), None)

    def pencil(self, other: Diagonal) -> Pencil:
        """See `KronFactor`."""
        # k = y^-1/2 makes y into 1 and x into x / y
        values = jnp.maximum(self.entries, 0) / other.entries
        scales = 1 / jnp.sqrt(other.entries)
        return Pencil(values, None, scales)

    def power(self, exponent: float) -> Diagonal:
        """See `KronFactor`."""
        return Diagonal(self.entries**exponent)

    def logdet(self) -> PerSlice:
        """See `KronFactor`."""
        return jnp.sum(jnp.log(self.entries), axis=-1)

    def largest_eigenvalue(self) -> PerSlice:
        """See `KronFactor`."""
        return jnp.max(self.entries, axis=-1)

    def diagonal(self) -> Vectors:
        """See `KronFactor`."""
        return self.entries

    def left(self, x: Matrices) -> Matrices:
        """See `KronFactor`."""
        return self.entries[:, :, None] * x

    def right(self, x: Matrices) -> Matrices:
        """See `KronFactor`."""
        return x * self.entries[:, None, :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity:
    """A multiple of the identity for each slice: no second moment is measured.

    Attributes:
      scale: `[s]`.
      size: number of rows n.
    """

    scale: Array
    size: int = field(metadata={"static": True})

    @staticmethod
    def moment_shape(stack: int, size: int) -> tuple[int, ...]:
        """See `KronFactor`."""
        return stack, size

    @staticmethod
    def second_moment(x: Rows, y: Rows | None) -> Array:
        """See `KronFactor`."""
        del y
        # Nothing is measured, yet merging and averaging need an array of this shape.
        return jnp.zeros((x.shape[0], x.shape[2]), x.dtype)

    @staticmethod
    def moment_of_counts(counts: Vectors, with_one: bool) -> Array:
        """See `KronFactor`."""
        del with_one
        return counts

    @staticmethod
    def with_zero_row(moment: Array) -> Array:
        """See `KronFactor`."""
        return jnp.pad(moment, ((0, 0), (0, 1)))

    @staticmethod
    def padded_moment(moment: Array, size: int) -> Array:
        """See `KronFactor`."""
        return jnp.pad(moment, ((0, 0), (0, size - moment.shape[1])))

    @classmethod
    def from_moment(cls, mean: Array) -> Identity:
        """See `KronFactor`."""
        # The factor is I, whatever the moment is, which gives the shape and dtype only.
        return cls(jnp.ones(mean.shape[:1], mean.dtype), mean.shape[1])

    def trace(self) -> PerSlice:
        """See `KronFactor`."""
        return self.size * self.scale

    def mean_eigenvalue(self) -> PerSlice:
        """See `KronFactor`."""
        return self.scale

    def as_multiple(self) -> PerSlice | None:
        """See `KronFactor`."""
        return self.scale

    def damped(self, amount: Any) -> Identity:
        """See `KronFactor`."""
        return Identity(self.scale + _at_least_rounding(self, amount), self.size)

    def inverse(self) -> Identity:
        """See `KronFactor`."""
        return self.power(-1)

    def eigh(self) -> Eigen:
        """See `KronFactor`."""
        return Eigen(jnp.maximum(self.diagonal(), 0), None)

    def pencil(self, other: Identity) -> Pencil:
        """See `KronFactor`."""
        return Diagonal(self.diagonal()).pencil(Diagonal(other.diagonal()))

    def power(self, exponent: float) -> Identity:
        """See `KronFactor`."""
        return Identity(self.scale**exponent, self.size)

    def logdet(self) -> PerSlice:
        """See `KronFactor`."""
        # det(c I) = c^n
        return self.size * jnp.log(self.scale)

    def largest_eigenvalue(self) -> PerSlice:
        """See `KronFactor`."""
        return self.scale

    def diagonal(self) -> Vectors:
        """See `KronFactor`."""
        return jnp.broadcast_to(self.scale[:, None], (*self.scale.shape, self.size))

    def left(self, x: Matrices) -> Matrices:
        """See `KronFactor`."""
        return self.scale[:, None, None] * x

    def right(self, x: Matrices) -> Matrices:
        """See `KronFactor`."""
        return self.left(x)


STRUCTURES: dict[str, type[KronFactor]] = {
    "full": Full,
    "diagonal": Diagonal,
    "identity": Identity,
}
"""The structures that a layout may name."""


def scaled(factor: F, c: PerSlice) -> F:
    """Multiply every slice of a factor by a number."""

    def times(x: Array) -> Array:
        return c.reshape(-1, *[1] * (x.ndim - 1)) * x

    result: F = jax.tree.map(times, factor)
    return result


def added(x: F, y: F) -> F:
    """Add two factors of one structure."""
    result: F = jax.tree.map(jnp.add, x, y)
    return result


class Inverted(NamedTuple):
    """The inverse of a factor, and what is known of the factor's spectrum; `[s]` each.

    Attributes:
      inverse: the inverse, of the same structure.
      largest: largest eigenvalue of the factor: a lower bound where the structure is full.
      smallest: smallest eigenvalue of the factor: an upper bound where the structure is full.
    """

    inverse: KronFactor
    largest: Array
    smallest: Array


def invert_all(factors: Sequence[KronFactor]) -> list[Inverted]:
    """Invert positive definite factors.

    Full factors of about equal size are a batch, one compiled program for all of them. The smaller
    ones are padded with their mean eigenvalue, which changes neither the inverse nor the extreme
    eigenvalues.
    """
    results = []
    batched = in_batches(_invert, factors, nearly_equal_sizes)
    for factor, (inverse, largest, smallest) in zip(factors, batched, strict=True):
        if isinstance(inverse, Full):  # cut off what padding added
            inverse = Full(inverse.matrix[:, : factor.size, : factor.size])
        results.append(Inverted(inverse, largest, smallest))
    return results


def eigh_all(factors: Sequence[KronFactor]) -> list[Eigen]:
    """Decompose factors: on the host in float64, or if they are traced, in the program around.

    In a program, full ones of equal size are a batch.
    """
    if is_traced(factors):
        return in_batches(_eigh, factors, equal_sizes)
    return [_eigh_on_host(factor) for factor in factors]


def equal_sizes(sizes: Sequence[int]) -> dict[int, int]:
    return {size: size for size in sizes}


def nearly_equal_sizes(sizes: Sequence[int]) -> dict[int, int]:
    """Return to which size every size is padded."""
    if jax.default_backend() != "cpu":
        # Here a batch is one call: fewer of them are worth some arithmetic.
        return {n: n if n <= 64 else -(-n // 64) * 64 for n in sizes}
    # A width with its bias joins the same width without one: at most 1 + n / 64 rows more, which is
    # 5 % of the arithmetic for large n.
    padded: dict[int, int] = {}
    target = max(sizes, default=0)
    for size in sorted(sizes, reverse=True):
        if target - size > max(1, target // 64):
            target = size
        padded[size] = target
    return padded


def _invert(factor: KronFactor) -> Inverted:
    inverse = factor.inverse()
    # The smallest eigenvalue of F is 1 / the largest of F^-1, which power iteration can bound.
    return Inverted(inverse, factor.largest_eigenvalue(), 1 / inverse.largest_eigenvalue())


def _eigh(factor: KronFactor) -> Eigen:
    return factor.eigh()


def _eigh_on_host(factor: KronFactor) -> Eigen:
    # Other structures than a full one are diagonal, and lose nothing in their precision.
    if not isinstance(factor, Full):
        return factor.eigh()
    return Eigen(*eigh_on_host(factor.matrix))


def in_batches(
    fn: Callable[..., T],
    factors: Sequence[KronFactor],
    padded_sizes: Callable[[Sequence[int]], Mapping[int, int]],
    operands: Sequence[Array | None] | None = None,
) -> list[T]:
    """Apply `fn` to every factor, to full ones of equal padded size at once.

    A program for every factor would take long to compile: of 20 seconds for a K-FAC step of an
    autoencoder with 16 factors, 9.

    Args:
      fn: the function of a factor, or of a factor and its operand. Each array that it returns
        begins with the stack's axis.
      factors: the factors.
      padded_sizes: to which size each size is padded.
      operands: for each factor an array that begins with the stack's axis and is not padded. Only
        full factors need one.
    """
    results: dict[int, T] = {}

    def operand_of(k: int) -> tuple[Array | None, ...]:
        return () if operands is None else (operands[k],)

    # Only full factors gain from batches; others are done at once.
    for k, factor in enumerate(factors):
        if not isinstance(factor, Full):
            results[k] = fn(factor, *operand_of(k))
    for batch in _batches(factors, padded_sizes):
        matrices = [factor.matrix for factor in batch.values()]
        others = zip(*map(operand_of, batch), strict=True)
        columns = [matrices, *map(list, others)]
        result = _slice_by_slice(fn, *map(jnp.concatenate, columns))
        # Every factor gets its slices back.
        ends = itertools.accumulate(map(len, matrices))
        for k, matrix, end in zip(batch, matrices, ends, strict=True):
            part = slice(end - len(matrix), end)
            results[k] = jax.tree.map(lambda x, part=part: x[part], result)
    return [results[k] for k in range(len(factors))]


def _batches(
    factors: Sequence[KronFactor],
    padded_sizes: Callable[[Sequence[int]], Mapping[int, int]],
) -> list[dict[int, Full]]:
    """Group the full factors, by their numbers, into batches of equal padded size."""
    padded = padded_sizes([factor.size for factor in factors if isinstance(factor, Full)])
    by_size: dict[int, list[dict[int, Full]]] = {}
    for k, factor in enumerate(factors):
        if not isinstance(factor, Full):
            continue
        factor = factor.padded(padded[factor.size])
        batches = by_size.setdefault(factor.size, [{}])
        # A batch is a copy of its matrices, and another of the results: its memory is bounded.
        # Matrices so large take longer to invert than a program for them to compile.
        entries = sum(member.matrix.size for member in batches[-1].values())
        if entries and entries + factor.matrix.size > ENTRIES_AT_A_TIME:
            batches.append({})
        batches[-1][k] = factor
    return [batch for size in sorted(by_size) for batch in by_size[size]]


def _slice_by_slice(fn: Callable[..., T], matrices: Squares, *operands: Array) -> T:
    """Apply `fn` to a stack of matrices; on CPUs one slice after another, which is faster there."""
    if jax.default_backend() != "cpu":
        return fn(Full(matrices), *operands)

    def of_slice(matrix: Float[Array, "n n"], *operands: Array) -> T:
        with_stack = [x[None] for x in operands]
        result: T = jax.tree.map(lambda x: x[0], fn(Full(matrix[None]), *with_stack))
        return result

    one_by_one = one_after_another(of_slice)
    if len(matrices) == 1:
        first = [x[0] for x in operands]
        only: T = jax.tree.map(lambda x: x[None], one_by_one(matrices[0], *first))
        return only
    slices: T = lax.map(lambda xs: one_by_one(*xs), (matrices, *operands))
    return slices


def lower_bound_of_largest(multiply: Callable[[Array], Array], diagonal: Array) -> PerSlice:
    """Bound the largest eigenvalue of a positive semidefinite matrix S from below.

    Two steps of power iteration from the unit vector of the largest diagonal entry:
    `x'SSx / x'Sx` with `x = S e`.

    Args:
      multiply: the product with S for every slice; it maps arrays like `diagonal`.
      diagonal: the diagonal of S, with the stack's axis first.
    """
    axes = tuple(range(1, diagonal.ndim))
    # Of several that are as large the first: their sum can be a vector that S maps to zero.
    flat = diagonal.reshape(len(diagonal), -1)
    first = jax.nn.one_hot(jnp.argmax(flat, axis=1), flat.shape[1], dtype=flat.dtype)
    # Entries of a semidefinite S are at most its largest diagonal entry: divided by that, products
    # are of order 1, whatever the unit of S, and their squares do not overflow.
    largest = jnp.max(diagonal, axis=axes, keepdims=True)
    x = multiply(first.reshape(diagonal.shape)) / largest
    y = multiply(x) / largest
    # The Rayleigh quotient of S at S^1/2 x: never above the largest eigenvalue.
    quotient = jnp.sum(y * y, axis=axes) / jnp.sum(x * y, axis=axes)
    return quotient * largest.reshape(-1)


def matmul(x: Array, y: Array) -> Array:
    """Multiply matrices in full precision."""
    # The default of accelerators rounds to bfloat16 or TensorFloat-32, with 3 digits: too few
    # for the inverse of an ill-conditioned factor.
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


_SMALL = 256
"""Matrices up to this size are inverted by Cholesky and a triangular solve."""


def _inverse_root(matrix: Squares) -> Squares:
    """Return R with `R'R = matrix^-1`, lower triangular, by halving."""
    size = matrix.shape[-1]
    if size <= _SMALL:
        # LAPACK reads columns, which are the rows of the transpose as they lie in memory. It is the
        # same matrix: without it, all of a large one would be copied into that order.
        lower = lax.linalg.cholesky(_t(matrix), symmetrize_input=False)
        identity = jnp.broadcast_to(jnp.eye(size, dtype=matrix.dtype), matrix.shape)
        return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    # With L = [[L1, 0], [B, L2]] and L1^-1 = R1: B = S21 R1', L2 L2' = S22 - B B',
    # and R = [[R1, 0], [-R2 B R1, R2]].
    half = size // 2
    root1 = _inverse_root(matrix[:, :half, :half])
    b = matmul(matrix[:, half:, :half], _t(root1))
    # The Schur complement S22 - S21 S11^-1 S12 = S22 - B B'.
    root2 = _inverse_root(matrix[:, half:, half:] - matmul(b, _t(b)))
    corner = -matmul(root2, matmul(b, root1))
    root = _written(jnp.zeros_like(matrix), root1, 0, 0)
    root = _written(root, corner, half, 0)
    return _written(root, root2, half, half)


_STRIPS = 6
"""Number of strips of columns, at most, in which a product with a triangle is computed."""


def _gram_of_lower(root: Squares) -> Squares:
    """Return `R'R` of a lower triangular R.

    For a strip of columns of the product, the rows of R above the strip's first do not count, nor
    do columns after its last, which are the mirror image of other strips.
    """
    n = root.shape[-1]
    if n <= _SMALL:
        return matmul(_t(root), root)
    # A product copies what it takes of R, and XLA makes the copies of all strips at once. Together
    # k strips take k / 6 times the memory of R, and 1/3 + 1/k of the full product's arithmetic.
    width = max(_SMALL, -(-n // _STRIPS))
    gram = jnp.zeros_like(root)
    for start in range(0, n, width):
        stop = min(start + width, n)
        rows = root[:, start:]
        strip = matmul(_t(rows[:, :, start:stop]), rows[:, :, :stop])
        # The corner on the diagonal is its own mirror image but for rounding.
        corner = strip[:, :, start:]
        symmetric = jnp.tril(corner) + _t(jnp.tril(corner, -1))
        gram = _written(gram, symmetric, start, start)
        if start > 0:
            beside = strip[:, :, :start]
            gram = _written(gram, beside, start, 0)
            gram = _written(gram, _t(beside), 0, start)
    return gram


def _written(matrix: Squares, part: Matrices, row: int, column: int) -> Squares:
    """Write a part of a matrix, from a row and a column on; XLA does it in place."""
    return lax.dynamic_update_slice(matrix, part, (0, row, column))


def _gram(x: Rows) -> Squares:
    """Sum `x x'` over rows: on GPUs by the symmetric product of BLAS, which XLA has not for CPUs.

    (There, leaving out half of the product by strips of rows costs more in copies than it saves in
    arithmetic.)
    """
    # XLA cannot divide that call among devices: each would gather all rows.
    if jax.default_backend() == "gpu" and is_on_one_device():
        stack, _, n = x.shape
        zeros = jnp.zeros((stack, n, n), x.dtype)
        product = lax.linalg.symmetric_product(_t(x), zeros, symmetrize_output=True)
        return jnp.asarray(product)
    return matmul(_t(x), x)


def _at_least_rounding(factor: KronFactor, amount: Any) -> PerSlice:
    """Return an amount of damping, at least the rounding error of the factor's trace."""
    trace = factor.trace()
    amount = jnp.asarray(amount, trace.dtype)
    # Less would be lost where it is added, and Cholesky fail on a factor without full rank.
    rounding = jnp.finfo(trace.dtype).eps * trace
    return jnp.maximum(amount, rounding)


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)
