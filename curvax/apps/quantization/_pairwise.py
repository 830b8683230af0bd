"""What quantizing two layers together costs beyond the sum of both: interactions by curvature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from curvax._checks import look_up
from curvax._host import loops_for
from curvax._trees import by_path
from curvax._types import Matvec, Params, tree_at_least_float32
from curvax._xla import fast_convs_in_loops, pin_to_iteration
from curvax.apps.quantization._allocation import Allocation, allocate
from curvax.apps.quantization._quantizers import Scheme, Table, layers_by_path, quantize
from curvax.solve._damped import checked

MOST_CHOICES = 2**20
"""The number of combinations of widths up to which all are tried."""

# dW_l(b) = Q_b(W_l) - W_l: what quantizing layer l to b bits changes; H_lm: block of the Hessian


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Interactions:
    """The quadratic model's terms of every two choices of a layer and a width.

    Attributes:
      matrix: `dW_l(b)' H_lm dW_m(c)` in the row of `(l, b)` and the column of `(m, c)`; symmetric.
        On the diagonal are the exact terms of single layers.
      choices: the pairs `(layer, bits)`, in the order of rows.
    """

    matrix: Float[Array, "n n"]
    choices: tuple[tuple[str, int], ...] = field(metadata={"static": True})

    def diagonal(self) -> Table:
        """Return the terms of single layers, `dW_l(b)' H_ll dW_l(b)`, as `allocate` takes them."""
        table: Table = {}
        for (layer, width), value in zip(self.choices, jnp.diagonal(self.matrix), strict=True):
            table.setdefault(layer, {})[width] = value
        return table


def interactions(
    matvec: Matvec,
    params: Params,
    widths: Iterable[int] = (2, 4, 8),
    scheme: Scheme | None = None,
) -> Interactions:
    """Compute `dW_l(b)' H_lm dW_m(c)` for all layers l, m and widths b, c.

    Half the sum over chosen pairs, `sum_lm dW_l' H_lm dW_m / 2 = dW' H dW / 2`, is what
    quantization adds to the quadratic model of the loss, with no assumption about errors. HAWQ-V2
    has an estimate of the terms with l = m, and no others.

    Args:
      matvec: a function `v -> H v` on trees like params, of a symmetric H; see `hawq`.
      params: the trained parameters.
      widths: widths in bits, each from 2 to 8, all different.
      scheme: how weights are quantized; None: `Scheme()`.

    Returns:
      `Interactions`, for `allocate_pairwise`.

    Raises:
      ValueError: there is no width, one is outside [2, 8], or two are equal; the scheme quantizes
        no leaf.

    Cost: one product for each layer and width. Memory: params for each width, and two products.

    Example: `H = [[1, 1], [1, 1]]`, and both errors are 0.25.
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> params = {"a": jnp.array([[0.75, 2.0]]), "b": jnp.array([[0.75, 2.0]])}
      >>> def matvec(v):
      ...     total = v["a"] + v["b"]
      ...     return {"a": total, "b": total}
      >>> pairs = quantization.interactions(matvec, params, widths=(2,))
      >>> pairs.choices, pairs.matrix.tolist()
      ((("['a']", 2), ("['b']", 2)), [[0.5625, 0.5625], [0.5625, 0.5625]])

    References: the quadratic form is that of Dong et al. (2020), HAWQ-V2,
      https://arxiv.org/abs/1911.03852, section 3, before its assumption 1. That layers interact is
      also the subject of work on inter-layer dependency, which we know by its abstract only: this
      is our own generic form of it.
    """
    widths = tuple(widths)
    if not widths:
        raise ValueError("widths is empty: give the bits to choose from, such as (2, 4, 8).")
    if len(set(widths)) < len(widths):
        raise ValueError(f"widths are {widths}, which has one twice; give each width once.")
    layer_of = layers_by_path(params, scheme)
    layers = tuple(dict.fromkeys(layer_of.values()))
    wide = tree_at_least_float32(params)
    changes = [_change(params, wide, width, scheme) for width in widths]
    # dW of all layers, one width after the other on a first axis.
    stacked: Params = jax.tree.map(lambda *x: jnp.stack(x), *changes)
    structure = jax.tree.structure(params)

    def row(k: Array) -> Float[Array, "layers widths"]:
        """Multiply dW of one layer at one width by H, and by every dW."""
        layer, width = k // len(widths), k % len(widths)
        leaves = []
        for path, x in by_path(stacked).items():
            is_inside = layer == layers.index(layer_of[path]) if path in layer_of else False
            leaves.append(jnp.where(is_inside, x[width], 0 * x[width]))
        tangent = jax.tree.unflatten(structure, leaves)
        product = by_path(checked(pin_to_iteration(matvec, k), tangent))
        sums = [jnp.zeros(len(widths)) for _ in layers]
        for path, x in by_path(stacked).items():
            if path in layer_of:
                terms = jnp.sum(x * product[path], axis=range(1, x.ndim))
                place = layers.index(layer_of[path])
                sums[place] = sums[place] + terms
        return jnp.stack(sums)

    with loops_for(matvec):
        rows = lax.map(fast_convs_in_loops(row), jnp.arange(len(layers) * len(widths)))
    matrix = rows.reshape(len(rows), -1)
    choices = tuple(itertools.product(layers, widths))
    # H is symmetric, and products are up to rounding.
    return Interactions((matrix + matrix.T) / 2, choices)


def _change(params: Params, wide: Params, width: int, scheme: Scheme | None) -> Params:
    """Return `Q_b(W) - W` in at least float32."""
    quantized = tree_at_least_float32(quantize(params, width, scheme))
    return jax.tree.map(jnp.subtract, quantized, wide)


def allocate_pairwise(
    omegas: Mapping[str, Mapping[int, Any]],
    pairs: Interactions,
    sizes: Mapping[str, int],
    budget: float,
    *,
    method: str = "exact",
) -> Allocation:
    """Choose widths of least total sensitivity, interactions of layers included.

    It solves `min sum_l Omega_l(b_l) + sum_(l != m) dW_l(b_l)' H_lm dW_m(b_m)` subject to
    `sum_l n_l b_l <= budget`, a quadratic integer programme. The dynamic programme of `allocate`
    does not apply, since the terms of a layer depend on all others.

    Args:
      omegas: the terms of single layers, `{layer: {bits: Omega}}`: HAWQ-V2's, or the exact
        `pairs.diagonal()`, with which the sum is `dW' H dW`.
      pairs: the `interactions` of all these layers and widths.
      sizes: the numbers of weights n_l by layer.
      budget: the size in bits that these weights may have.
      method: "exact" tries all combinations, of which there may be 2^20; "exchange" starts from
        the optimum of `allocate` and makes the best change of the widths of one or two layers
        that fits, until none lowers the sum: a local optimum, never worse than that start.

    Returns:
      An `Allocation`; its `omega` is the whole sum, which can be negative where H, or the sum of
      estimates with interactions, is not positive semidefinite.

    Raises:
      ValueError: no choice meets the budget, a layer or width is missing in `pairs`, a number is
        not finite, or there are too many combinations for "exact".

    Cost: "exact": `(layers widths)^2` multiplications for each combination at most; "exchange": for
      each change `(layers widths)^2` sums of `layers` terms.

    Example: two errors of opposite effect cancel, if both layers have 2 bits.
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> matrix = jnp.diag(jnp.array([1.0, 0.5, 1.0, 0.5]))
      >>> matrix = matrix.at[0, 2].set(-0.9).at[2, 0].set(-0.9)
      >>> pairs = quantization.Interactions(matrix, (("a", 2), ("a", 4), ("b", 2), ("b", 4)))
      >>> sizes = {"a": 10, "b": 10}
      >>> quantization.allocate(pairs.diagonal(), sizes, 80).bits
      {'a': 4, 'b': 4}
      >>> quantization.allocate_pairwise(pairs.diagonal(), pairs, sizes, 80).bits
      {'a': 2, 'b': 2}

    References: see `interactions`; both methods of choice are ours.
    """
    search = look_up("method", method, {"exact": _exhaustive, "exchange": _exchange})
    # the separable optimum, and with it the checks of omegas, sizes and budget
    start = allocate(omegas, sizes, budget)
    problem = _Problem(omegas, pairs, sizes, budget)
    return problem.allocation(search(problem, problem.places(start)))


class _Problem:
    """The quadratic programme in arrays: a choice is a number of widths' places, one by layer."""

    def __init__(
        self,
        omegas: Mapping[str, Mapping[int, Any]],
        pairs: Interactions,
        sizes: Mapping[str, int],
        budget: float,
    ) -> None:
        """Gather the terms of these layers and widths, by their place."""
        self.widths = {layer: list(row) for layer, row in omegas.items()}
        self.budget = budget
        numbers = {choice: k for k, choice in enumerate(pairs.choices)}
        wanted = [(layer, width) for layer, row in omegas.items() for width in row]
        missing = [choice for choice in wanted if choice not in numbers]
        if missing:
            raise ValueError(
                f"pairs has no interactions of {missing}; compute them for the layers and widths "
                "of omegas: quantization.interactions(matvec, params, widths, scheme)."
            )
        places = np.array([numbers[choice] for choice in wanted])
        terms = np.asarray(pairs.matrix, np.float64)[np.ix_(places, places)]
        if not np.isfinite(terms).all():
            raise ValueError("pairs.matrix has entries that are not finite.")
        # Of one layer with itself is Omega, and no product of two different widths.
        layer_numbers = np.repeat(np.arange(len(omegas)), self.lengths)
        terms[layer_numbers[:, None] == layer_numbers] = 0
        single = [float(omegas[layer][width]) for layer, width in wanted]
        self.terms = terms + np.diag(single)
        self.sizes = np.array([sizes[layer] * width for layer, width in wanted])
        # where the rows of a layer begin
        self.first = np.cumsum([0, *self.lengths[:-1]])

    @property
    def lengths(self) -> list[int]:
        """The number of widths of each layer."""
        return [len(row) for row in self.widths.values()]

    def places(self, chosen: Allocation) -> np.ndarray:
        """Return the places of an allocation's widths."""
        return np.array([self.widths[layer].index(bits) for layer, bits in chosen.bits.items()])

    def evaluate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return size and Omega of many choices `[n, layers]`; Omega is infinite beyond the budget.

        The sum over pairs is taken layer by layer, so that it takes no memory but `[n]`.
        """
        rows = places + self.first
        size = self.sizes[rows].sum(axis=1)
        omega = np.zeros(len(rows))
        for layer, other in itertools.product(range(rows.shape[1]), repeat=2):
            omega += self.terms[rows[:, layer], rows[:, other]]
        return size, np.where(size <= self.budget, omega, np.inf)

    def best(self, places: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the choice of least Omega (of several, one of least size), and its Omega."""
        size, omega = self.evaluate(places)
        number = np.lexsort((size, omega))[0]
        return places[number], float(omega[number])

    def allocation(self, places: np.ndarray) -> Allocation:
        """Name the widths of a choice."""
        (size,), (omega,) = self.evaluate(places[None])
        chosen = zip(self.widths.items(), places, strict=True)
        bits = {layer: row[place] for (layer, row), place in chosen}
        return Allocation(bits, int(size), float(omega))


def _exhaustive(problem: _Problem, start: np.ndarray) -> np.ndarray:
    """Try all combinations."""
    del start
    number = math.prod(problem.lengths)
    if number > MOST_CHOICES:
        raise ValueError(
            f"{number} combinations of widths are too many to try them all (up to {MOST_CHOICES}); "
            'take method="exchange", or fewer layers or widths.'
        )
    # The digits of every number in the mixed radix of the layers' widths, the last one first.
    numbers, digits = np.arange(number), []
    for length in reversed(problem.lengths):
        numbers, digit = np.divmod(numbers, length)
        digits.append(digit)
    return problem.best(np.stack(digits[::-1], axis=1))[0]


def _exchange(problem: _Problem, start: np.ndarray) -> np.ndarray:
    """Change the widths of one or two layers as long as that lowers Omega."""
    places = start
    omega = problem.best(places[None])[1]
    while True:
        # A change of one layer is among those of two, the other to the width that it has.
        near = np.concatenate([places[None], *_neighbours(problem, places)])
        candidate, least = problem.best(near)
        # Omega falls strictly, and there are finitely many choices: this ends.
        if not least < omega:
            return places
        places, omega = candidate, least


def _neighbours(problem: _Problem, places: np.ndarray) -> list[np.ndarray]:
    """Return all choices that differ in at most two layers, for each two layers `[n, layers]`."""
    lengths = problem.lengths
    results = []
    for layer, other in itertools.combinations(range(len(places)), 2):
        shape = (lengths[layer], lengths[other])
        changed = np.tile(places, (shape[0] * shape[1], 1))
        changed[:, layer], changed[:, other] = (x.ravel() for x in np.indices(shape))
        results.append(changed)
    return results
