"""Which optimizers train, called as their docstrings say, on tasks of many kinds.

    python examples/benchmarks/robust.py --json robust.json         # an hour on two cores
    python examples/benchmarks/robust.py --tasks classifier vae --methods kfac ekfac

Every method is run at a tenth, once and ten times the learning rate of its docstring, from several
seeds, and K-FAC and EK-FAC at two intervals. "trains" counts runs that end below their start, with
no loss that is not finite; "peak" is the largest rise of a mini-batch's loss above the first.
"adam" is the best of four rates of Adam after the same steps, and the last column what the method
reaches at the docstring's rate: above 1 it is behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _harness import parser, report, write_json
from _tasks import TASKS, Run, Task, train

import curvax

ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FACTORS = (0.1, 1.0, 10.0)


class Method(NamedTuple):
    """An optimizer as its docstring calls it.

    Attributes:
      rate: the learning rate of the docstring, or the first damping or the floor where there is no
        rate.
      build: `(task, layout, rate, every) -> optimizer`.
      intervals: the intervals at which it is run.
    """

    rate: float
    build: Callable[[Task, Any, jax.Array, int], optax.GradientTransformation]
    intervals: tuple[int, ...] = (1,)


def _kron(one_liner: Callable[..., optax.GradientTransformation]) -> Method:
    """K-FAC or EK-FAC, at two intervals."""

    def build(task: Task, layout: Any, rate: Any, every: int) -> optax.GradientTransformation:
        return one_liner(
            rate,
            task.objective,
            layout,
            curvature_every=every,
            inverse_every=every,
            fisher=task.fisher,
        )

    return Method(0.1, build, (1, 10))


def _auto(task: Task, layout: Any, damping: Any, every: int) -> optax.GradientTransformation:
    return curvax.kfac_auto(
        task.objective, layout, damping, inverse_every=every, fisher=task.fisher
    )


def _of_matrices(rate: float, one_liner: Callable[..., optax.GradientTransformation]) -> Method:
    """A rule on gradients, on the matrices of the model."""
    return Method(rate, lambda task, layout, rate, every: one_liner(rate, layout=layout))


def _of_model(rate: float, one_liner: Callable[..., optax.GradientTransformation]) -> Method:
    """A method that measures inputs, or inputs and cotangents, of the model."""
    return Method(rate, lambda task, layout, rate, every: one_liner(rate, task.objective, layout))


def _adam_sqr(task: Task, layout: Any, eps: Any, every: int) -> optax.GradientTransformation:
    """SANIA with the rule of its default."""
    return curvax.sania(task.objective, curvax.optim.scale_by_adam_sqr(eps=eps))


def _hutchinson(task: Task, layout: Any, alpha: Any, every: int) -> optax.GradientTransformation:
    """SANIA in the metric of the Hessian's diagonal."""
    estimator = curvax.optim.hessian_diagonal(task.objective)
    rule = curvax.scale_by_oasis(alpha=alpha)
    return curvax.sania(task.objective, curvax.estimating(rule, estimator, num_first=10))


METHODS = {
    "kfac": _kron(curvax.kfac),
    "ekfac": _kron(curvax.ekfac),
    "kfac_auto": Method(0.1, _auto, (10,)),
    "sophia_g": Method(1e-3, lambda task, _, rate, every: curvax.sophia_g(rate, task.objective)),
    "sophia_h": Method(1e-3, lambda task, _, rate, every: curvax.sophia_h(rate, task.objective)),
    "adahessian": Method(
        0.03, lambda task, _, rate, every: curvax.adahessian(rate, task.objective)
    ),
    "oasis": Method(0.01, lambda task, _, rate, every: curvax.oasis(rate, task.objective)),
    "oasis_auto": Method(
        1e-3, lambda task, _, floor, every: curvax.oasis_auto(task.objective, alpha=floor)
    ),
    "sania": Method(0.1, _adam_sqr),
    "sania_hutchinson": Method(1e-2, _hutchinson),
    "mfac": Method(0.01, lambda task, _, rate, every: curvax.mfac(rate)),
    "gauss_newton": Method(
        0.1, lambda task, _, rate, every: curvax.gauss_newton(rate, task.objective, damping=0.1)
    ),
    "shampoo": _of_matrices(3e-3, curvax.shampoo),
    "soap": _of_matrices(3e-3, curvax.soap),
    "kl_shampoo": _of_matrices(3e-3, curvax.kl_shampoo),
    "kl_soap": _of_matrices(3e-3, curvax.kl_soap),
    "asgo": _of_matrices(1e-2, curvax.asgo),
    "muon": _of_matrices(0.02, curvax.muon),
    "fismo": _of_matrices(1e-3, curvax.fismo),
    "psgd": _of_matrices(1e-3, curvax.psgd),
    "newton_muon": _of_model(0.02, curvax.newton_muon),
    "mkor": _of_model(0.1, curvax.mkor),
}
"""Optimizers with the rates of their docstrings."""

# Where a method does not apply: the loss of the flow is linear in the outputs, so it has no
# Gauss-Newton matrix and cannot sample targets.
EXCLUDED = {("flow", name) for name in ("kfac_auto", "sophia_g", "gauss_newton")}
# SANIA needs to know the least loss, which is 0 for a classifier and unknown for these.
WITHOUT_LEAST_LOSS = ("flow", "vae", "autoencoder", "characters")
EXCLUDED |= set(itertools.product(WITHOUT_LEAST_LOSS, ("sania", "sania_hutchinson")))


def run(task: Task, name: str, every: int, num_seeds: int, num_steps: int) -> Run:
    """Train with one method at all rates and seeds; members are ordered by rate, then seed."""
    method = METHODS[name]
    rates = [factor * method.rate for factor in FACTORS]
    layout = task.layout()

    def build(rate: jax.Array) -> optax.GradientTransformation:
        return method.build(task, layout, rate, every)

    return train(task, build, rates, range(num_seeds), num_steps)


def rows_of(task: Task, names: list[str], num_seeds: int, num_steps: int) -> list[dict[str, Any]]:
    """Train with Adam and every method, and say how each fared."""
    adam = train(task, optax.adam, ADAM_RATES, range(num_seeds), num_steps)
    best = np.median(adam.after.reshape(len(ADAM_RATES), num_seeds), axis=1).min()
    rows = []
    for name in names:
        if (task.name, name) in EXCLUDED:
            continue
        for every in METHODS[name].intervals:
            result = run(task, name, every, num_seeds, num_steps)
            after = result.after.reshape(len(FACTORS), num_seeds)
            before = result.before.reshape(len(FACTORS), num_seeds)
            is_finite = np.isfinite(result.batches).all(axis=1).reshape(after.shape)
            trains = is_finite & (after < before)
            peak = np.nanmax(result.batches, axis=1) - result.batches[:, 0]
            middle = np.median(after, axis=1)
            row: dict[str, Any] = {"task": task.name, "method": f"{name} /{every}"}
            for factor, count in zip(FACTORS, trains.sum(axis=1), strict=True):
                row[f"trains x{factor:g}"] = f"{count}/{num_seeds}"
            row["peak"] = float(peak.max())
            for factor, loss in zip(FACTORS, middle, strict=True):
                row[f"loss x{factor:g}"] = float(loss)
            row["adam"] = float(best)
            row["to adam"] = float(middle[1] / best) if best > 0 else float(middle[1] - best)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    flags.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=100)
    args = flags.parse_args()
    if args.smoke:
        args.tasks, args.methods, args.seeds, args.steps = ["classifier"], ["kfac"], 1, 5
    rows: list[dict[str, Any]] = []
    for name in args.tasks:
        rows += rows_of(TASKS[name](), args.methods, args.seeds, args.steps)
        if args.json:
            write_json(args.json, {"rows": rows})  # after every task, so that an hour is not lost
    report("Losses after training, by rate", rows)


if __name__ == "__main__":
    main()
