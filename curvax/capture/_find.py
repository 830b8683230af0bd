"""Follow parameters through a program, and find the linear maps that use them.

What a variable may hold, the lattice of the walk:

  HoldsView    entries of parameters, moved (or repeated) but not changed: a `View`
  HoldsOutput  the output of a use, perhaps moved, cast, or with something added: its cotangent is
               that of the use
  None         anything else

What a primitive does to it:

  primitive                    operands                     result
  ---------------------------  ---------------------------  ------------------------------------
  cast, copy, barrier, ...     anything                     the same
  reshape, transpose, slice..  a view                       the view, moved
  concatenate, stack           views                        the views, joined
  broadcast_in_dim             a view                       the view, its repeats noted in `axes`
  dot, convolution, gather     a view and None              a new use, and its HoldsOutput
  add                          a view and a HoldsOutput     the output; the view becomes its bias
  add, sub                     a HoldsOutput and None       the output
  transpose, reshape           a HoldsOutput                the output, its axes moved
  stop_gradient                a view                       None: no gradient comes back
  jit, remat                   anything                     walked through in place
  scan                         views                        None; the body is walked through, a
                                                            view scanned over gains a loop axis, one
                                                            in a carry may only pass through
  cond                         views                        None; every branch is walked through
  anything else                a view                       None; its leaves can be in no kernel

A HoldsOutput that two equations read is None to both: its cotangent is a sum, so that what is added
after the split is not a bias of the use, whose cotangent has the other branch in it.

Axes, in three systems of coordinates:

  of a variable   as the program has it, in one round of the loops around it
  of a view       the loops of `HoldsView.loops` first, then those of the variable; `hidden` is the
                  number of the former
  spread          the axes of a use's output along which its kernel runs (stack, out), in the
                  kernel's order; all other axes of the output are positions
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from curvax._jaxpr import inner_program
from curvax.capture._moves import MOVES, joined
from curvax.capture._uses import Use, is_lookup, of_conv, of_dot, of_lookup, with_bias
from curvax.capture._views import View, reshape
from curvax.capture._walk import Place, Rules, Step, scan_operands, walk


@dataclass(frozen=True)
class HoldsView:
    """A variable that holds a view of parameters.

    Attributes:
      view: its first `len(loops)` axes run over the rounds of the loops around; in one round the
        variable holds one slice.
      loops: the numbers of those loops.
      axes: where entries are repeated: for each axis of the variable that of the view (after the
        loops'), None along a repeat. None where nothing is repeated.
    """

    view: View
    loops: tuple[int, ...] = ()
    axes: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class HoldsOutput:
    """A variable whose cotangent is that of a use's output.

    Attributes:
      use: the number of the use.
      axes: for each axis of the variable its place in the use's `spread`, or None for a position.
    """

    use: int
    axes: tuple[int | None, ...]


Holds: TypeAlias = HoldsView | HoldsOutput | None


@dataclass
class Findings:
    """What a walk through a program has met so far.

    Attributes:
      uses: the uses, in the order of the program.
      reasons: for every leaf that does anything else than enter linear maps, what it does.
      kernel_loops: for each use the loops over which its kernel is stacked.
      num_loops: the number of loops met so far.
    """

    uses: list[Use] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    kernel_loops: list[tuple[int, ...]] = field(default_factory=list)
    num_loops: int = 0

    def refuse(self, value: Holds, reason: str) -> None:
        """Note why the leaves of a view can be in no kernel (the first reason stays)."""
        if isinstance(value, HoldsView):
            for path in value.view.leaves:
                self.reasons.setdefault(path, reason)


def find_uses(
    program: Any,
    arguments: Sequence[Holds],
    live: Sequence[bool],
) -> Findings:
    """Walk through a program.

    Args:
      program: the program, with its constants.
      arguments: what each of its arguments holds.
      live: for each output whether it counts; what leads to the others alone is dead code.
    """
    findings = Findings()
    for output in walk(program, arguments, live, _rules(findings), Place()):
        findings.refuse(output, "is an output of the model")
    return findings


def _rules(findings: Findings) -> Rules:
    return Rules(partial(_results, findings), inner_program, _unless_output)


def _unless_output(value: Holds) -> Holds:
    """Keep views alone: where an output is read twice, or enters a loop or a branch."""
    return value if isinstance(value, HoldsView) else None


def _results(findings: Findings, step: Step) -> Sequence[Holds]:
    """Say what the results of an equation hold: the table at the top of this file."""
    eqn, operands = step.eqn, step.operands
    name = eqn.primitive.name
    nothing: list[Holds] = [None] * len(eqn.outvars)
    views = [operand for operand in operands if isinstance(operand, HoldsView)]
    # Nested programs that are not walked through in place.
    if name == "scan":
        return _through_scan(findings, step)
    if name == "cond":
        _through_branches(findings, step)
        return nothing
    # A cast changes precision, not what an entry is: the view is read in its own dtype.
    if name in _SAME:
        return operands
    # Only an output arrives here without a view: does it go on?
    if not views:
        return [_moved_output(step)] if len(eqn.outvars) == 1 else nothing
    if name == "stop_gradient":
        return nothing
    # A structural move of parameters alone is a larger view, not a use.
    moved = _moved_views(eqn, views) if len(views) == len(operands) else None
    if moved is not None:
        return moved
    if name == "add" and len(views) == 1:
        return [_added(findings, step, views[0])]
    # A linear map of something else with a view is a use; anything else is none.
    use = _linear_map(step, views)
    if use is None:
        both = " with another parameter" if len(views) > 1 else ""
        for view in views:
            findings.refuse(view, f"enters `{name}`{both}")
        return nothing
    # The result holds the output, whose cotangent is that of this use.
    findings.uses.append(use)
    findings.kernel_loops.append(views[0].loops)
    return [HoldsOutput(len(findings.uses) - 1, use.axes)]


def _through_branches(findings: Findings, step: Step) -> None:
    """Walk through every branch of a `cond`."""
    _, *operands = map(_unless_output, step.operands)
    for number, branch in enumerate(step.eqn.params["branches"]):
        place = step.place.at(number)
        for result in walk(branch, operands, step.live, _rules(findings), place):
            findings.refuse(result, "is returned by a branch of `cond`")


def _through_scan(findings: Findings, step: Step) -> list[Holds]:
    """Walk through the body of a loop once, for all of its rounds."""
    eqn = step.eqn
    body = eqn.params["jaxpr"].jaxpr
    outer = scan_operands(eqn, step.operands)
    num_carry = len(outer.carry)
    # Numbered, for the same loop around a kernel and its bias to be recognized.
    number = findings.num_loops
    findings.num_loops += 1

    # 1. What is closed over stays what it is; so does a carry that every round hands on as it is.
    carried_in = scan_operands(eqn, body.invars).carry
    carried_out = body.outvars[:num_carry]
    unchanged = [a is b for a, b in zip(carried_in, carried_out, strict=True)]
    consts, carry, xs = (list(map(_unless_output, group)) for group in outer)
    for i, value in enumerate(carry):
        if not unchanged[i]:
            findings.refuse(value, "is changed in the carry of a `scan`")
            carry[i] = None

    # 2. The leading axis of what is scanned over becomes a loop axis: a slice for each round.
    for i, value in enumerate(xs):
        if not isinstance(value, HoldsView):
            continue
        if value.axes is not None:
            findings.refuse(value, "is repeated and then scanned over")
            xs[i] = None
        else:
            xs[i] = HoldsView(value.view, (*value.loops, number))

    # 3. A carry that changes may reach any output in a later round: it counts as live.
    live = [not same for same in unchanged] + step.live[num_carry:]
    loops = (*step.place.loops, (number, eqn.params["length"]))
    place = dataclasses.replace(step.place, loops=loops)
    results = walk(
        eqn.params["jaxpr"],
        [*consts, *carry, *xs],
        live,
        _rules(findings),
        place,
    )
    for result in results[num_carry:]:
        findings.refuse(result, "is returned by a `scan`")
    after = [value if same else None for value, same in zip(outer.carry, unchanged, strict=True)]
    return [*after, *[None] * (len(results) - num_carry)]


def _linear_map(
    step: Step,
    views: Sequence[HoldsView],
) -> Use | None:
    """Read an equation as a linear map with one operand a view of parameters, if it is one."""
    eqn, kernel = step.eqn, views[0]
    if len(views) > 1 or kernel.axes is not None:
        return None
    name, which, hidden = eqn.primitive.name, step.operands.index(kernel), len(kernel.loops)
    if name == "dot_general":
        use = of_dot(kernel.view, hidden, which, eqn)
    elif name == "conv_general_dilated" and which == 1 and eqn.params["batch_group_count"] == 1:
        use = of_conv(kernel.view, hidden, eqn)
    elif name == "gather" and which == 0 and is_lookup(eqn):
        use = of_lookup(kernel.view, hidden, eqn)
    else:
        return None
    # A loop that slices the kernel makes a stack, any other one more positions.
    loops = step.place.loops
    return dataclasses.replace(
        use,
        site=step.place.site,
        lengths=tuple(length for _, length in loops),
        stacked=tuple(number in kernel.loops for number, _ in loops),
    )


def _added(findings: Findings, step: Step, bias: HoldsView) -> Holds:
    """Join what is added to a use's output as its bias, or note that it is none."""
    shape = step.eqn.outvars[0].aval.shape
    (output,) = (operand for operand in step.operands if operand is not bias)
    if not isinstance(output, HoldsOutput):
        findings.refuse(bias, "enters `add`, not straight on a linear map's output")
        return None
    # One bias a kernel has: a second one would be another row with the same input 1.
    use = findings.uses[output.use]
    if use.bias is not None:
        findings.refuse(bias, "enters `add` as a second bias")
        return output
    # Match the axes of the bias with those of the spread, through the axes of the variable.
    hidden = len(bias.loops)
    sizes = bias.view.shape[hidden:]
    variable_axes = range(len(sizes)) if bias.axes is None else bias.axes
    places: list[int | None] = [None] * len(sizes)
    fits = bias.loops == findings.kernel_loops[output.use]
    for i, axis in enumerate(variable_axes):
        if axis is not None and sizes[axis] > 1:
            fits &= output.axes[i] is not None and sizes[axis] == shape[i]
            places[axis] = output.axes[i]
    joined_use = with_bias(use, bias.view, hidden, places) if fits else None
    if joined_use is None:
        findings.refuse(bias, "enters `add` with axes other than a bias has")
    else:
        findings.uses[output.use] = joined_use
    return output


def _moved_views(
    eqn: Any,
    views: list[HoldsView],
) -> list[Holds] | None:
    """Move entries of parameters; None for a primitive that does something else with them."""
    name, first = eqn.primitive.name, views[0]
    hidden = len(first.loops)
    # Repeats are only noted: whether they are those of a bias is seen where it is added.
    if name == "broadcast_in_dim":
        return [_broadcast(eqn, first)]
    # A repeated view has no other moves: only a bias is repeated, just before it is added.
    if any(value.axes is not None or value.loops != first.loops for value in views):
        return None
    if name in ("concatenate", "stack"):
        parts = [value.view for value in views]
        return [HoldsView(joined(eqn, parts, hidden), first.loops)]
    if name not in MOVES:
        return None
    return [
        HoldsView(view, first.loops)
        for view in MOVES[name](
            eqn,
            first.view,
            hidden,
        )
    ]


def _broadcast(eqn: Any, value: HoldsView) -> HoldsView:
    """Insert axes: of size 1 into the view itself, others as repeats of it."""
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    hidden, view = len(value.loops), value.view
    before = value.axes
    if before is None and math.prod(shape) == math.prod(view.shape[hidden:]):
        return HoldsView(reshape(view, (*view.shape[:hidden], *shape)), value.loops)
    if before is None:
        before = tuple(range(len(view.shape) - hidden))
    axes: list[int | None] = [None] * len(shape)
    for axis, to in zip(before, places, strict=True):
        if axis is not None and view.shape[hidden + axis] == shape[to]:
            axes[to] = axis
    return HoldsView(view, value.loops, tuple(axes))


def _moved_output(step: Step) -> Holds:
    """Follow an output through what leaves its cotangent the same but for the order of axes."""
    eqn, operands = step.eqn, step.operands
    name = eqn.primitive.name
    output = next(operand for operand in operands if isinstance(operand, HoldsOutput))
    before, after = eqn.invars[operands.index(output)].aval.shape, eqn.outvars[0].aval.shape
    # The cotangent of what is subtracted has the other sign.
    is_added = name == "add" or (name == "sub" and operands[0] is output)
    # An addend that broadcasts the output would sum its cotangent over repeats.
    if is_added and before == after:
        return output
    if name == "transpose":
        axes = tuple(output.axes[i] for i in eqn.params["permutation"])
        return HoldsOutput(output.use, axes)
    if name in ("reshape", "squeeze", "expand_dims"):
        moved = _reshaped_axes(before, after, output.axes)
        return None if moved is None else HoldsOutput(output.use, moved)
    return None


def _reshaped_axes(
    before: Sequence[int],
    after: Sequence[int],
    axes: Sequence[int | None],
) -> tuple[int | None, ...] | None:
    """Carry places in the spread through a reshape; None if an axis with one is split or merged."""
    moved: list[int | None] = []
    for old, new in _matching_segments(before, after):
        places = [axes[i] for i in old if before[i] > 1 and axes[i] is not None]
        long_old = [i for i in old if before[i] > 1]
        long_new = [i for i in new if after[i] > 1]
        # An axis goes on if it is alone on both sides of its segment, but for axes of size 1.
        if places and (len(long_new) != 1 or after[long_new[0]] != before[long_old[0]]):
            return None
        moved += [places[0] if places and i == long_new[0] else None for i in new]
    return tuple(moved)


def _matching_segments(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Cut the axes of two shapes into the shortest runs whose products are equal, in order."""
    segments = []
    i = j = 0
    while i < len(before) or j < len(after):
        # One axis of each, if there is one ...
        old, new = list(range(i, len(before)))[:1], list(range(j, len(after)))[:1]
        m, n = math.prod(before[k] for k in old), math.prod(after[k] for k in new)
        i, j = i + len(old), j + len(new)
        # ... and then more of whichever is the smaller.
        while m != n:
            if m < n:
                old.append(i)
                m, i = m * before[i], i + 1
            else:
                new.append(j)
                n, j = n * after[j], j + 1
        segments.append((old, new))
    return segments


_SAME = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "sharding_constraint",
        "optimization_barrier",
        "name",
        "reshard",
        "reduce_precision",
        "mesh_cast",
        "pvary",
    }
)
"""Primitives whose results hold what their operands hold."""
