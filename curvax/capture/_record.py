"""One forward pass that records the inputs of all uses, and pulls cotangents back to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from curvax._batch import batch_size, map_rows
from curvax._checks import describe
from curvax._shared import is_shared
from curvax._trees import by_path
from curvax._types import Outputs, Params
from curvax.capture._chunks import ChunkedInputs, chunked_inputs
from curvax.capture._plan import Plan
from curvax.capture._tapped import run_tapped, zero_perturbation

T = TypeVar("T")

PerUseArray: TypeAlias = Shaped[Array, "b s t size"]
"""An array of one use: examples, stack, positions, and inputs or outputs."""


class UseCotangents(NamedTuple):
    """A cotangent of the outputs, pulled back.

    Attributes:
      blocks: for each kernel, by name, the cotangents of its uses' outputs, `[b, s, t, o]`.
      outside: gradients `[b, *leaf]` of the leaves of the plan, by path.
    """

    blocks: dict[str, list[PerUseArray]]
    outside: dict[str, Array]


class Capture(NamedTuple):
    """A model's outputs on a batch, and the inputs of its uses.

    Attributes:
      outputs: the outputs of the model, with the batch's leading axis.
      inputs: for each kernel, by name, the inputs of its uses, `[b, s, t, i]` (of a lookup row
        numbers, `[b, s, t, 1]`).
      pull: `cotangent of the outputs -> UseCotangents`.
      chunks: for each kernel and use the inputs once more, in chunks, or None where chunks would
        save nothing. What sums over them needs no `inputs`, which `jit` then leaves out.
    """

    outputs: Outputs
    inputs: dict[str, list[PerUseArray]]
    pull: Callable[[Outputs], UseCotangents]
    chunks: dict[str, list[ChunkedInputs | None]]


class _Perturbations(NamedTuple):
    """Zeros whose cotangents we are after.

    Attributes:
      uses: zeros to add to the output of each use.
      leaves: zeros to add to leaves of params, by path.
    """

    uses: list[Array]
    leaves: dict[str, Array]


def record(plan: Plan, params: Params, inputs: Any) -> Capture:
    """Run the model, and record the inputs of all uses of the plan's kernels.

    Args:
      plan: the `Plan` that `plan(objective, params, inputs, ...)` has made for arrays of these
        shapes.
      params: pytree of float arrays.
      inputs: the inputs of the batch.

    Returns:
      A `Capture`. With a plan per example its arrays have an entry for each row of the batch on
      their leading axis; otherwise that has length 1, and the rows are among the positions.

    Raises:
      ValueError: if the plan was made for arrays of other shapes.

    Cost: a forward pass; each `pull` a backward pass without the gradients of the kernels.
    """
    return (
        _record_rows(plan, params, inputs)
        if plan.per_example
        else _record_batch(plan, params, inputs)
    )


def _record_batch(plan: Plan, params: Params, inputs: Any) -> Capture:
    """Record the batch as one example that has all positions."""
    args = _arguments(plan, params, inputs)

    def forward(zeros: _Perturbations) -> tuple[Outputs, list[Array]]:
        return _perturbed(plan, args, zeros)

    outputs, pull, raw_inputs = jax.vjp(forward, _zeros(plan, params), has_aux=True)
    matrices = [use.inputs(a)[None] for use, a in zip(plan.all_uses, raw_inputs, strict=True)]
    chunks = _chunks(plan, raw_inputs)

    def pull_back(cotangent: Outputs) -> UseCotangents:
        # Cotangents of the zeros: g of every use, and the gradients of the leaves.
        (zeros,) = pull(cotangent)
        flows = [use.outputs(g)[None] for use, g in zip(plan.all_uses, zeros.uses, strict=True)]
        gradients = {path: x[None] for path, x in zeros.leaves.items()}
        return UseCotangents(_by_kernel(plan, flows), gradients)

    return Capture(outputs, _by_kernel(plan, matrices), pull_back, chunks)


def _record_rows(plan: Plan, params: Params, inputs: Any) -> Capture:
    """Record every row by itself, as a batch of one, by `vmap` over rows.

    The perturbations have an entry for every row, so that a pull-back gives one gradient for each.
    """
    # By any array with a batch axis; `Shared` parts have none.
    size = batch_size(inputs)
    # Parts without a batch axis go to every row.
    axes = jax.tree.map(
        lambda x: None if is_shared(x) else 0,
        inputs,
        is_leaf=is_shared,
    )

    def forward_row(
        row: Any,
        zeros: _Perturbations,
    ) -> tuple[Outputs, list[Array]]:
        # The model expects a batch axis: a batch of one.
        one_row = map_rows(lambda x: x[None], row)
        return _perturbed(plan, _arguments(plan, params, one_row), zeros)

    def forward(zeros: _Perturbations) -> tuple[Outputs, list[Array]]:
        return jax.vmap(forward_row, in_axes=(axes, 0))(inputs, zeros)

    # A use whose input does not depend on the row still has a cotangent that does.
    zeros_of_row = jax.eval_shape(lambda: _zeros(plan, params))
    zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), zeros_of_row)
    outputs, pull, raw_inputs = jax.vjp(forward, zeros, has_aux=True)
    uses = plan.all_uses
    matrices = [jax.vmap(use.inputs)(a) for use, a in zip(uses, raw_inputs, strict=True)]
    chunks = _chunks(plan, raw_inputs)

    def pull_back(cotangent: Outputs) -> UseCotangents:
        # Each row's cotangent is one of a batch of one.
        (zeros,) = pull(jax.tree.map(lambda x: x[:, None], cotangent))
        flows = [jax.vmap(use.outputs)(g) for use, g in zip(uses, zeros.uses, strict=True)]
        return UseCotangents(_by_kernel(plan, flows), zeros.leaves)

    # From batches of one back to rows.
    outputs = jax.tree.map(lambda x: x[:, 0], outputs)
    return Capture(outputs, _by_kernel(plan, matrices), pull_back, chunks)


def _perturbed(
    plan: Plan, args: Sequence[Array], zeros: _Perturbations
) -> tuple[Outputs, list[Array]]:
    """Return the outputs, and the raw input of each use, as a function of the perturbations.

    See `_tapped` for the trick: the cotangents of the zeros are the cotangents g of the uses, and
    the gradients of the leaves.
    """
    # Under `jit` JAX keeps this function of the plan, and its derivative, from one trace to the
    # next: a fifth of the time to trace the factors of 12 layers again. It would keep arrays that
    # the model closes over as well, for good, so that those models are traced anew.
    run = _run_plan if plan.program.consts else _run_plan_once_traced
    return run(plan, args, zeros)


def _run_plan(
    plan: Plan, args: Sequence[Array], zeros: _Perturbations
) -> tuple[Outputs, list[Array]]:
    """Run the plan's program with perturbed leaves and uses; return outputs and raw inputs."""
    leaves = dict(zip(plan.paths, args[: len(plan.paths)], strict=True))
    for path, z in zeros.leaves.items():
        leaves[path] = leaves[path] + z
    perturbed = [*leaves.values(), *args[len(plan.paths) :]]
    results, raw_inputs = run_tapped(plan.program, plan.all_uses, perturbed, zeros.uses)
    # Results after the outputs are aux, which nobody asks for here.
    outputs = results[: plan.outputs.num_leaves]
    return jax.tree.unflatten(plan.outputs, outputs), raw_inputs


_run_plan_once_traced = partial(jax.jit, static_argnums=0)(_run_plan)


def _zeros(plan: Plan, params: Params) -> _Perturbations:
    leaves = dict(zip(plan.paths, jax.tree.leaves(params), strict=True))
    return _Perturbations(
        [zero_perturbation(use) for use in plan.all_uses],
        {path: jnp.zeros_like(leaves[path]) for path in plan.leaves},
    )


def _chunks(
    plan: Plan,
    raw_inputs: Sequence[Array],
) -> dict[str, list[ChunkedInputs | None]]:
    """Return the inputs of all uses in chunks, where that saves memory."""
    chunks = []
    for use, raw in zip(plan.all_uses, raw_inputs, strict=True):
        chunks.append(chunked_inputs(use, raw, plan.per_example))
    return _by_kernel(plan, chunks)


def _by_kernel(
    plan: Plan,
    matrices: Sequence[T],
) -> dict[str, list[T]]:
    """Put arrays of all uses under the names of their kernels."""
    grouped, first = {}, 0
    for name, uses in plan.uses:
        grouped[name] = list(matrices[first : first + len(uses)])
        first += len(uses)
    return grouped


def _arguments(
    plan: Plan,
    params: Params,
    inputs: Any,
) -> list[Array]:
    """Return the arguments of the plan's program, or raise if they are not of its shapes."""
    leaves = jax.tree.leaves(params)
    args = [*leaves, *jax.tree.leaves(inputs)]
    names = [*by_path(params), *(f"inputs{path}" for path in by_path(inputs))]
    # The program is for these shapes and dtypes only; of the rows any number will do.
    expected = [variable.aval for variable in plan.program.jaxpr.invars]
    if len(leaves) != len(plan.paths) or len(args) != len(expected):
        raise ValueError(
            f"the plan is of another model: it was made for params {', '.join(plan.paths)} and "
            f"{len(expected) - len(plan.paths)} array(s) of inputs, got {', '.join(names)}. "
            "Make it again: curvax.capture.plan(objective, params, inputs, ...)."
        )
    for name, x, aval in zip(names, args, expected, strict=True):
        if jnp.shape(x) != aval.shape or jnp.result_type(x) != aval.dtype:
            rows = " for one row" * plan.per_example
            raise ValueError(
                f"the plan is of another program: {name} was {aval.str_short()}{rows} there, here "
                f"it is {describe(x)}. Make it again: "
                "curvax.capture.plan(objective, params, inputs, ...)."
            )
    return args
