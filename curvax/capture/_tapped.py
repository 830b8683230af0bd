"""Run a program with taps: record the input of every use, and perturb its output.

The perturbation trick. We want the cotangent g of the output `y = a W` of every use, and a backward
pass gives cotangents of arguments only: that of W is the sum `a' g`, from which g cannot be had. So
every use gets an argument z of the shape of its output, which is zero, and the program computes
`y = a W + z`. The cotangent of z is g; W itself is not differentiated, so that the products `a' g`,
a third of the work of training, are never formed. The inputs a are returned beside the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from curvax._jaxpr import AsItIs, inner_program, interpret
from curvax._xla import fast_convs_in_loops
from curvax.capture._uses import Use
from curvax.capture._walk import scan_operands

Site: TypeAlias = tuple[int, ...]
"""The place of a use relative to a program."""

UsesBySite: TypeAlias = Mapping[Site, Use]
"""The uses in a program, by where their equations are."""

Taps: TypeAlias = dict[Site, Array]
"""An array for each use."""

Tapped: TypeAlias = tuple[Sequence[Any], Taps]
"""Results of a program, and the inputs of its uses."""


def run_tapped(
    program: Any,
    uses: Sequence[Use],
    args: Sequence[Any],
    perturbations: Sequence[Array],
) -> tuple[Sequence[Any], list[Array]]:
    """Run a program, adding a perturbation to the output of each use.

    Perturbations and inputs have a leading axis for every loop around the use. A use in a branch
    that is not taken records zeros, and its perturbation does nothing.

    Returns:
      The results of the program, and the input of each use.
    """
    # A use is known by where its equation is.
    by_site = {use.site: use for use in uses}
    zeros = {use.site: z for use, z in zip(uses, perturbations, strict=True)}
    results, inputs = _run(program, args, by_site, zeros)
    return results, [inputs[use.site] for use in uses]


def zero_perturbation(use: Use) -> Shaped[Array, "*loops_and_output"]:
    """Return a perturbation that changes nothing."""
    return jnp.zeros((*use.lengths, *use.output.shape), use.output.dtype)


def _run(
    program: Any,
    args: Sequence[Any],
    uses: UsesBySite,
    zeros: Taps,
) -> Tapped:
    """Evaluate a program equation by equation where there are uses, in one piece elsewhere."""
    inputs: Taps = {}

    def rule(
        index: int,
        eqn: Any,
        values: list[Any],
        as_it_is: AsItIs,
    ) -> Sequence[Any]:
        # The equation is a use: y = a W + z.
        site = (index,)
        if site in uses:
            use = uses[site]
            inputs[site] = values[use.operand]
            (output,) = as_it_is()
            perturb = use.perturb or _added
            return [perturb(values, output, zeros[site])]
        # Or there are uses inside.
        inside = _inside(uses, index)
        results, recorded = _enter(eqn, values, inside, _inside(zeros, index))
        inputs.update({(index, *site): x for site, x in recorded.items()})
        return results

    # Equations without uses in or around them are run as they are, many at once.
    first = {site[0] for site in uses}
    return interpret(program, args, lambda index, eqn: index in first, rule), inputs


def _added(operands: Sequence[Any], output: Array, zeros: Array) -> Array:
    """Perturb the output itself."""
    del operands
    return output + zeros


def _inside(
    taps: Mapping[Site, Any],
    index: int,
) -> dict[Site, Any]:
    """Return what belongs to the equation (or branch) of that index, relative to it."""
    return {site[1:]: x for site, x in taps.items() if site[0] == index}


def _enter(
    eqn: Any,
    values: list[Any],
    uses: UsesBySite,
    zeros: Taps,
) -> Tapped:
    """Rebuild a nested program around its tapped inside, by the public function that made it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, values, uses, zeros)
    if name == "cond":
        return _cond(eqn, values, uses, zeros)

    def run(values: list[Any], zeros: Taps) -> Tapped:
        return _run(inner_program(eqn), values, uses, zeros)

    # What remat saves is up to its policy: the rebuilt program keeps it.
    if "policy" in params:  # remat
        prevent = params["prevent_cse"]
        prevent = any(prevent) if isinstance(prevent, tuple) else prevent
        run = jax.checkpoint(run, prevent_cse=prevent, policy=params["policy"])
    return run(values, zeros)


def _scan(
    eqn: Any,
    values: list[Any],
    uses: UsesBySite,
    zeros: Taps,
) -> Tapped:
    """Scan over the perturbations too, and stack the inputs of all rounds."""
    consts, init, xs = scan_operands(eqn, values)

    def step(
        carry: list[Any],
        x: tuple[list[Any], Taps],
    ) -> tuple[list[Any], Any]:
        slices, zeros_of_round = x
        # One round: its slice of what is scanned over, and of the perturbations.
        args = [*consts, *carry, *slices]
        results, inputs = _run(eqn.params["jaxpr"], args, uses, zeros_of_round)
        return list(results[: len(init)]), (results[len(init) :], inputs)

    settings = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, inputs) = lax.scan(
        step,
        init,
        (xs, zeros),
        **settings,
    )
    return [*carry, *ys], inputs


def _cond(
    eqn: Any,
    values: list[Any],
    uses: UsesBySite,
    zeros: Taps,
) -> Tapped:
    """Switch between tapped branches, each of which records zeros for the uses of the others."""
    index, *args = values

    def tapped_branch(number: int) -> Callable[..., Tapped]:
        inside = _inside(uses, number)

        def run(zeros: Taps, *args: Any) -> Tapped:
            branch = eqn.params["branches"][number]
            results, inputs = _run(branch, args, inside, _inside(zeros, number))
            return results, {(number, *site): x for site, x in inputs.items()}

        return run

    # Every branch has uses of its own, recorded under its number.
    branches = [tapped_branch(number) for number in range(len(eqn.params["branches"]))]
    # What all branches record together.
    shapes: dict[Site, Any] = {}
    for run in branches:
        shapes |= jax.eval_shape(run, zeros, *args)[1]

    def completed(run: Callable[..., Tapped]) -> Callable[..., Tapped]:
        def run_completed(zeros: Taps, *args: Any) -> Tapped:
            # On CPUs convolutions inside of branches are slow in the layout of backward passes.
            results, inputs = fast_convs_in_loops(run)(zeros, *args)
            # All branches of a `cond` return trees of one structure.
            zero_inputs = {site: jnp.zeros(x.shape, x.dtype) for site, x in shapes.items()}
            return results, zero_inputs | inputs

        return run_completed

    tapped: Tapped = lax.switch(
        index,
        list(map(completed, branches)),
        zeros,
        *args,
    )
    return tapped
