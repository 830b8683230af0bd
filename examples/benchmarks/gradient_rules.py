"""How much longer a step takes with rules on gradients than with Adam, and what they remember.

    python examples/benchmarks/gradient_rules.py                    # a few minutes
    python examples/benchmarks/gradient_rules.py --json rules.json

Every figure is the mean time of a step over a cycle of ten, divided by Adam's in the same run: all
rules take turns, and the median over rounds is printed. Roots and bases are computed once in a
cycle, but those of ASGO, which are in every step. "limit" is the same ratio in floating-point
operations: of the gradient, and of the products and decompositions that the method's equations
ask for. "of the limit" is the quotient of the two. Memory is that of the optimizer's state, in
parameters: Adam has 2. `optax muon` is `optax.contrib.muon` on the same matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from _harness import Problem, parser, report, seconds, write_json
from kfac import CYCLE, cycle, problems

import curvax

T = 10
EIGH = 9  # operations of a symmetric eigendecomposition with vectors, in n^3
QR = 8 / 3  # of a QR decomposition with its Q


class Rule(NamedTuple):
    """A rule, and the operations that it asks for with a matrix [i, o], beside the gradient's."""

    build: Callable[[Any, curvax.kron.Layout], optax.GradientTransformation]
    operations: Callable[[int, int], float]


def products(i: int, o: int) -> float:
    """Two products, with a square matrix of either side."""
    return 2 * i * o * (i + o)


def statistics(i: int, o: int) -> float:
    """`V V'` and `V' V`, which are symmetric."""
    return i * o * (i + o)


def cubes(i: int, o: int) -> float:
    return i**3 + o**3


def of_shampoo(i: int, o: int) -> float:
    # A root is a decomposition, and a product that is symmetric.
    return statistics(i, o) + products(i, o) + (EIGH + 1) * cubes(i, o) / T


def of_asgo(i: int, o: int) -> float:
    n = min(i, o)
    return 3 * i * o * n + (EIGH + 1) * n**3


def of_soap(i: int, o: int) -> float:
    # Into the basis and out of it; at a refresh m goes the same way, L P and its QR decomposition.
    refresh = 2 * products(i, o) + (2 + QR) * cubes(i, o)
    return statistics(i, o) + 2 * products(i, o) + refresh / T


def of_kl(i: int, o: int) -> float:
    # Whitened products: V Q and P' V, which P' V Q then shares; the step turns and turns back.
    return statistics(i, o) + products(i, o) + 2 * i * i * o + of_soap(i, o) - statistics(i, o)


def of_muon(i: int, o: int) -> float:
    # Five times X X', its square, and the product with X.
    n, m = min(i, o), max(i, o)
    return 5 * (n * n * m + n**3 + 2 * n * n * m)


def optax_muon(params: Any, layout: curvax.kron.Layout) -> optax.GradientTransformation:
    """Muon of optax on the layout's matrices, each of which is a leaf here."""
    del layout
    return optax.contrib.muon(1e-3)


RULES = {
    "shampoo": Rule(lambda _, layout: curvax.scale_by_shampoo(layout, refresh_every=T), of_shampoo),
    "soap": Rule(lambda _, layout: curvax.scale_by_soap(layout, refresh_every=T), of_soap),
    "kl_shampoo": Rule(
        lambda _, layout: curvax.scale_by_kl_shampoo(layout, refresh_every=T), of_kl
    ),
    "kl_soap": Rule(lambda _, layout: curvax.scale_by_kl_soap(layout, refresh_every=T), of_kl),
    "asgo": Rule(lambda _, layout: curvax.scale_by_asgo(layout), of_asgo),
    "muon": Rule(lambda _, layout: curvax.scale_by_muon(layout), of_muon),
    "optax muon": Rule(optax_muon, of_muon),
}


def limit(rule: Rule, layout: curvax.kron.Layout, adam: float) -> float:
    """Ratio of the operations that a step needs to those of Adam's step."""
    total = adam
    for block in layout.blocks:
        stack, rows, columns = block.shape
        total += stack * rule.operations(rows, columns)
    return total / adam


def measure(problem: Problem, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Time rules and Adam, taking turns."""
    layout = curvax.kron_layout(problem.objective, problem.params, problem.batch)
    matrices = curvax.kron.gradient_layout(layout)
    built = {"adam": cycle(optax.adam(1e-3), problem)}
    for name in names:
        rule = RULES[name].build(problem.params, layout)
        tx = optax.chain(rule, optax.scale_by_learning_rate(1e-3))
        built[name] = cycle(tx, problem)
    times = seconds({name: run for name, (run, *_) in built.items()}, rounds)
    num_params = sum(x.nbytes for x in jax.tree.leaves(problem.params))
    rows: list[dict[str, Any]] = []
    for name, (_, first, size, flops) in built.items():
        ratio = times[name] / times["adam"]
        bound = limit(RULES[name], matrices, built["adam"][3]) if name in RULES else 1.0
        rows.append(
            {
                "problem": problem.name,
                "optimizer": name,
                "ms per step": 1e3 * times[name] / CYCLE,
                "ratio to Adam": ratio,
                "limit": bound,
                "of the limit": ratio / bound,
                "counted": flops / built["adam"][3],
                "state": size / num_params,
                "first step s": first,
            }
        )
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    args = flags.parse_args()
    rows: list[dict[str, Any]] = []
    names = args.rules[:1] if args.smoke else args.rules
    for problem in problems(args.smoke):
        found = measure(problem, names, 1 if args.smoke else args.rounds)
        report(f"{problem.name}: time of a step, roots and bases every {T}", found)
        rows += found
    write_json(args.json, {"gradient_rules": rows})


if __name__ == "__main__":
    main()
