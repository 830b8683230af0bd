"""Rewrite a program so that it hands out what every use is given, and takes a perturbation of every use's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from curvax._jaxpr import AsItIs, inner_program, interpret, scan_counts
from curvax._xla import fast_convs_in_loops
from curvax.capture._uses import Use

Sites: TypeAlias = Mapping[tuple[int, ...], int]
"""From the place of a use, relative to a program, to which input of its equation is recorded."""

Taps: TypeAlias = dict[tuple[int, ...], Array]
"""An array for each use, by its place relative to a program."""


def tapped(
    closed: Any, uses: Sequence[Use]
) -> Callable[[Sequence[Any], Sequence[Array]], tuple[list[Any], list[Array]]]:
    """Return `(args, perturbations) -> (results, inputs)`, with one perturbation and one input for each use.

    Perturbations are added to the uses' outputs, `perturbations(use)` gives zeros; inputs are what the uses were given.
    Both have a leading axis for every loop around the use. A use in a branch not taken records zeros, and its
    perturbation does nothing.
    """
    sites = {use.site: use.operand for use in uses}

    def run(args: Sequence[Any], perturbations: Sequence[Array]) -> tuple[list[Any], list[Array]]:
        given = {use.site: p for use, p in zip(uses, perturbations, strict=True)}
        results, taken = _run(closed, args, sites, given)
        return results, [taken[use.site] for use in uses]

    return run


def zero_perturbation(use: Use) -> Shaped[Array, "*loops_and_output"]:
    """Return a perturbation that changes nothing."""
    return jnp.zeros((*use.lengths, *use.output.shape), use.output.dtype)


def _run(closed: Any, args: Sequence[Any], sites: Sites, given: Taps) -> tuple[list[Any], Taps]:
    taken: Taps = {}

    def rule(index: int, eqn: Any, operands: list[Any], as_it_is: AsItIs) -> Sequence[Any]:
        if (index,) in sites:
            taken[(index,)] = operands[sites[(index,)]]
            (result,) = as_it_is()
            return [result + given[(index,)]]
        inside = {site[1:]: operand for site, operand in sites.items() if site[0] == index}
        perturbations = {site: given[(index, *site)] for site in inside}
        results, recorded = _enter(eqn, operands, inside, perturbations)
        taken.update({(index, *site): value for site, value in recorded.items()})
        return results

    first = {site[0] for site in sites}
    return interpret(closed, args, lambda index, eqn: index in first, rule), taken


def _enter(eqn: Any, operands: list[Any], sites: Sites, given: Taps) -> tuple[Sequence[Any], Taps]:
    """Rebuild a nested program around its tapped inside, by the public function that made it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, operands, sites, given)
    if name == "cond":
        return _cond(params, operands, sites, given)
    run = lambda operands, given: _run(inner_program(eqn), operands, sites, given)
    if "policy" in params:
        prevent = params["prevent_cse"]
        prevent = any(prevent) if isinstance(prevent, tuple) else prevent
        run = jax.checkpoint(run, prevent_cse=prevent, policy=params["policy"])
    return run(operands, given)


def _scan(eqn: Any, operands: list[Any], sites: Sites, given: Taps) -> tuple[Sequence[Any], Taps]:
    num_consts, num_carry = scan_counts(eqn)
    consts, init, xs = (
        operands[:num_consts],
        operands[num_consts:][:num_carry],
        operands[num_consts + num_carry :],
    )

    def step(
        carry: list[Any], x: tuple[list[Any], Taps]
    ) -> tuple[list[Any], tuple[list[Any], Taps]]:
        results, taken = _run(eqn.params["jaxpr"], [*consts, *carry, *x[0]], sites, x[1])
        return results[:num_carry], (results[num_carry:], taken)

    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, taken) = lax.scan(step, init, (xs, given), **how)
    return [*carry, *ys], taken


def _cond(
    params: Any, operands: list[Any], sites: Sites, given: Taps
) -> tuple[Sequence[Any], Taps]:
    index, *rest = operands

    def branch(number: int) -> Callable[..., tuple[list[Any], Taps]]:
        inside = {site[1:]: operand for site, operand in sites.items() if site[0] == number}

        def run(given: Taps, *operands: Any) -> tuple[list[Any], Taps]:
            own = {site: given[(number, *site)] for site in inside}
            results, taken = _run(params["branches"][number], operands, inside, own)
            return results, {(number, *site): value for site, value in taken.items()}

        return run

    branches = [branch(number) for number in range(len(params["branches"]))]
    shapes = [jax.eval_shape(run, given, *rest)[1] for run in branches]
    nothing = {site: struct for shape in shapes for site, struct in shape.items()}

    def complete(
        run: Callable[..., tuple[list[Any], Taps]],
    ) -> Callable[..., tuple[list[Any], Taps]]:
        def completed(given: Taps, *operands: Any) -> tuple[list[Any], Taps]:
            results, taken = fast_convs_in_loops(run)(given, *operands)
            return results, {
                site: taken.get(site, jnp.zeros(s.shape, s.dtype)) for site, s in nothing.items()
            }

        return completed

    results: tuple[Sequence[Any], Taps] = lax.switch(
        index, [complete(run) for run in branches], given, *rest
    )
    return results
