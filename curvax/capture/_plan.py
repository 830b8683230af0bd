"""The plan of a capture: which uses of a model's program belong to which kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from curvax._batch import map_rows
from curvax._checks import describe
from curvax._jaxpr import trace_model
from curvax._shared import is_shared, unwrap
from curvax._trees import by_path
from curvax._types import Params
from curvax.capture._find import Findings, HoldsView, find_uses
from curvax.capture._kernels import Kernel, Reasons, Shapes, UseKind, group_uses, match_uses
from curvax.capture._mixing import keeps_examples_apart, mixing_operation
from curvax.capture._uses import Use
from curvax.capture._views import leaf_view
from curvax.objective import Objective


@dataclass(frozen=True)
class Plan:
    """What `record` does, as static facts: hashable, and equal for the same model and shapes.

    Attributes:
      program: the program of the model, `(params, inputs) -> outputs`; of one row if `per_example`.
      paths: what the kernels call the leaves of params, in the order in which the program takes
        them.
      outputs: the structure of the outputs, which are the program's first results.
      uses: for each kernel, by name, its uses in the program.
      leaves: paths of the leaves whose gradients are recorded too.
      per_example: whether every row is run by itself.
    """

    program: Any
    paths: tuple[str, ...]
    outputs: Any
    uses: tuple[tuple[str, tuple[Use, ...]], ...]
    leaves: tuple[str, ...]
    per_example: bool

    @property
    def all_uses(self) -> list[Use]:
        """The uses of all kernels, one after the other."""
        return [use for _, uses in self.uses for use in uses]


class _Model(NamedTuple):
    """A model as its program, on shapes of params and inputs.

    Attributes:
      program: the program, with its constants.
      paths: what kernels call the leaves of params, in order.
      outputs: shapes of the outputs, the first results of the program.
      live: for each result whether it is an output (and not aux).
    """

    program: Any
    paths: tuple[str, ...]
    outputs: PyTree
    live: list[bool]


def find_kernels(
    objective: Objective, params: Params, inputs: Any
) -> tuple[dict[Kernel, tuple[Use, ...]], Reasons]:
    """Follow every leaf of params to the linear maps that it enters.

    Args:
      objective: the `curvax.Objective`.
      params: pytree of float arrays, or of their shapes.
      inputs: the inputs of a batch, or their shapes.

    Returns:
      The kernels with their uses, and for each leaf that is not wholly in kernels, by path, why.

    Cost: a trace of the model, unless JAX has one of it for these shapes.
    """
    return _find_kernels(_trace(objective, params, inputs), params, inputs)


def uses_in_part(
    objective: Objective, params: Params, inputs: Any, kernels: Sequence[Kernel]
) -> list[tuple[UseKind, ...]]:
    """Return what the uses of every kernel are in the model of one part of an objective.

    Args:
      objective: the part.
      params: pytree of float arrays, or of their shapes.
      inputs: the inputs of its batch, or their shapes.
      kernels: the kernels of all parts together, as `find_kernels` finds them in `curvax.total`.
    """
    matched = _match_kernels(_trace(objective, params, inputs), params, inputs, kernels)
    kinds = {kernel.view: kernel.uses for kernel in matched}
    return [kinds.get(kernel.view, ()) for kernel in kernels]


def are_examples_apart(objective: Objective, params: Params, inputs: Any) -> bool:
    """Tell whether the model is known to compute every row of its outputs from one row of inputs.

    Args:
      objective: the `curvax.Objective`.
      params: pytree of float arrays, or of their shapes.
      inputs: the inputs of a batch, or their shapes.
    """
    model = _trace(objective, params, inputs)
    return keeps_examples_apart(model.program, _are_batched(params, inputs), model.live)


def plan(
    objective: Objective,
    params: Params,
    inputs: Any,
    kernels: Mapping[str, Kernel],
    leaves: Iterable[str],
    per_example: bool,
    paths: Sequence[str] | None = None,
) -> Plan:
    """Find the uses of kernels in the program of a model.

    Args:
      objective: the `curvax.Objective`. Its model is traced as `jax.jit` would trace it: once for
        given shapes, so that values that it closes over are those of the first trace.
      params: pytree of float arrays.
      inputs: the inputs of a batch.
      kernels: kernels of this model (as `find_kernels` finds them), by names of your choice.
      leaves: paths of the leaves whose gradients are recorded too: those with entries in no kernel.
      per_example: run every row by itself, as a batch of one; otherwise the batch is one "example"
        that has all positions.
      paths: what the kernels call the leaves of params, in order, where that is not what
        `jax.tree_util.keystr` prints: their containers may have changed.

    Returns:
      A `Plan` for `record(plan, params, inputs)`.

    Raises:
      ValueError: if a kernel is not one of this model; per example, if the model mixes examples, or
        if its outputs have no row for each row of inputs.

    Cost: a trace of the model, unless JAX has one of it for these shapes.
    """
    # Per example, the program is that of a batch of one; its kernels must be those of the batch.
    rows = inputs
    if per_example:
        rows = jax.eval_shape(lambda: map_rows(lambda x: x[:1], inputs))
    model = _trace(objective, params, rows, paths)
    uses_of, _ = _find_kernels(model, params, rows)
    # Kernels of several parts together: another part may say which way round one is, and its bias.
    if any(kernel not in uses_of for kernel in kernels.values()):
        uses_of = _match_kernels(model, params, rows, list(kernels.values()))
    # By value: a layout made earlier, in another process even, is recognized.
    for name, kernel in kernels.items():
        if kernel not in uses_of:
            raise ValueError(_unknown_kernel(name, kernel, per_example))
    if per_example:
        _check_rows(model.outputs)
        _check_unmixed(_trace(objective, params, inputs), params, inputs)
    return Plan(
        program=model.program,
        paths=model.paths,
        outputs=jax.tree.structure(model.outputs),
        uses=tuple((name, uses_of[kernel]) for name, kernel in kernels.items()),
        leaves=tuple(leaves),
        per_example=per_example,
    )


def _trace(
    objective: Objective, params: Params, inputs: Any, paths: Sequence[str] | None = None
) -> _Model:
    # The model itself is traced, not a function made here: by its identity JAX knows it again.
    program, results = trace_model(objective.model, params, unwrap(inputs))
    outputs = objective.outputs_of(results)
    # Aux comes after the outputs among the results, and is dead code to us.
    num_outputs = len(jax.tree.leaves(outputs))
    live = [i < num_outputs for i in range(len(program.jaxpr.outvars))]
    return _Model(program, tuple(by_path(params) if paths is None else paths), outputs, live)


def _find_kernels(
    model: _Model, params: Params, inputs: Any
) -> tuple[dict[Kernel, tuple[Use, ...]], Reasons]:
    """Find the kernels of a program whose arguments are the leaves of params and of inputs."""
    findings, shapes = _findings(model, params, inputs)
    kernels, reasons = group_uses(findings.uses, findings.reasons, shapes)
    return _with_uses(kernels, findings), reasons


def _match_kernels(
    model: _Model, params: Params, inputs: Any, kernels: Sequence[Kernel]
) -> dict[Kernel, tuple[Use, ...]]:
    """Find the uses of known kernels in a program."""
    findings, shapes = _findings(model, params, inputs)
    matched = match_uses(kernels, findings.uses, findings.reasons, shapes)
    return _with_uses(matched, findings)


def _findings(model: _Model, params: Params, inputs: Any) -> tuple[Findings, Shapes]:
    """Walk through a program; return what was met, and the shapes of the leaves of params."""
    # Of the leaves alone: a kernel is made of entries of params.
    leaves = zip(model.paths, jax.tree.leaves(params), strict=True)
    shapes = {path: tuple(x.shape) for path, x in leaves}
    # The arguments of the program: first the leaves of params, then the inputs.
    views = [HoldsView(leaf_view(path, shape)) for path, shape in shapes.items()]
    nothing = [None] * len(jax.tree.leaves(inputs))
    batched = _are_batched(params, inputs)
    return find_uses(model.program, [*views, *nothing], model.live, batched), shapes


def _with_uses(
    kernels: Mapping[Kernel, tuple[int, ...]], findings: Findings
) -> dict[Kernel, tuple[Use, ...]]:
    """Replace the numbers of uses by the uses."""
    uses_of = {}
    for kernel, numbers in kernels.items():
        uses_of[kernel] = tuple(findings.uses[number] for number in numbers)
    return uses_of


def _unknown_kernel(name: str, kernel: Kernel, per_example: bool) -> str:
    """Say that a kernel is not one of the model."""
    bias = "" if kernel.bias is None else f" with bias {kernel.bias}"
    alone = (
        "; if it is of this one, the model takes another path for a single row of inputs, and "
        "cannot be worked through example by example"
    )
    return (
        f"the layout is of another model: there, {name}{bias} is used by {len(kernel.uses)} linear "
        "map(s) as a block of its own, here it is not. Make it again for this batch: "
        f"curvax.kron_layout(objective, params, batch){alone * per_example}. What is constant in "
        "the model and changes kernels (masks, indices, factors) must be so here, and not traced."
    )


def _check_unmixed(model: _Model, params: Params, inputs: Any) -> None:
    """Raise if one row of the inputs influences the outputs of another."""
    mixing = mixing_operation(model.program, _are_batched(params, inputs), model.live)
    if mixing is not None:
        raise ValueError(
            f"the model mixes examples: its `{mixing}` runs over the batch axis (as BatchNorm in "
            "training does): no example has a gradient of its own. Work by example "
            '(sharing="reduce", EK-FAC, fisher "exact" and "empirical") is not defined for it; '
            'K-FAC with sharing="expand" and fisher="mc" is.'
        )


def _are_batched(params: Params, inputs: Any) -> list[bool]:
    """Tell for each argument of a model's program whether it has a batch axis."""
    # Params are the same for all rows, and so are `Shared` parts of the inputs.
    batched = [False] * len(jax.tree.leaves(params))
    for x in jax.tree.leaves(inputs, is_leaf=is_shared):
        batched += [not is_shared(x)] * len(jax.tree.leaves(x))
    return batched


def _check_rows(outputs: PyTree) -> None:
    """Raise unless one row of inputs gives one row of outputs."""
    for path, x in jax.tree.leaves_with_path(outputs):
        if x.shape[:1] != (1,):
            raise ValueError(
                f"for one row of inputs, outputs{jax.tree_util.keystr(path)} is {describe(x)}; "
                'work by example (sharing="reduce", EK-FAC, fisher "exact", "empirical") needs a '
                "row of outputs for each row of inputs."
            )
