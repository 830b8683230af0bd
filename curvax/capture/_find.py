"""Follow parameters through a program, and find the linear maps that use them.

What a variable may hold, the lattice of the walk:

  HoldsView    entries of parameters, moved (or repeated), and multiplied by constants: a `View`
  HoldsOutput  the output of a use, perhaps moved, cast, times a number, or with something added:
               its cotangent is that of the use, but for the number
  None         anything else

What a primitive does to it:

  primitive                    operands                     result
  ---------------------------  ---------------------------  ------------------------------------
  cast, copy, barrier, ...     anything                     the same
  reshape, transpose, slice..  a view                       the view, moved
  concatenate, stack           views                        the views, joined
  gather, dynamic_slice        a view, constant indices     the view, its entries taken
  mul, div, neg, select_n      a view and constants         the view, multiplied
  add, sub                     a view and what depends on   the view: its cotangent is that of the
                               params or nothing            sum (a straight-through estimator)
  broadcast_in_dim             a view                       the view, its repeats noted in `axes`
  dot, convolution, gather     a view and None              a new use, and its HoldsOutput
  add, sub                     a view and a HoldsOutput     the output; the view becomes its bias
  add                          rows of a table, and what    a new use, a lookup by constants
                               depends on the inputs
  add, sub                     a HoldsOutput and None       the output
  mul, div, neg                a HoldsOutput and a number   the output, times that
  transpose, reshape           a HoldsOutput                the output, its axes moved
  stop_gradient                anything                     None: no gradient comes back
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

import jax.numpy as jnp
import numpy as np

from curvax._jaxpr import inner_program
from curvax.capture._frames import Constant, Source
from curvax.capture._moves import MOVES, joined
from curvax.capture._settle import Refusal, settled, with_bias
from curvax.capture._uses import (
    Use,
    is_lookup,
    is_ragged,
    of_added_rows,
    of_conv,
    of_dot,
    of_lookup,
    of_ragged,
)
from curvax.capture._views import (
    View,
    entry_numbers,
    factor_of,
    leaf_view,
    reshape,
    take,
    times,
    without_factors,
)
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
      gathers: the places of equations that have taken entries of it by constant indices, and could
        be read as lookups too.
    """

    view: View
    loops: tuple[int, ...] = ()
    axes: tuple[int | None, ...] | None = None
    gathers: frozenset[tuple[int, ...]] = frozenset()


@dataclass(frozen=True)
class HoldsOutput:
    """A variable whose cotangent is that of a use's output.

    Attributes:
      use: the number of the use.
      axes: for each axis of the variable its place in `spread`, or None for a position.
      spread: sizes of the axes along which the kernel runs, in the order of the kernel.
      scale: the number that the output has been multiplied by.
    """

    use: int
    axes: tuple[int | None, ...]
    spread: tuple[int, ...]
    scale: float = 1.0


Holds: TypeAlias = HoldsView | HoldsOutput | None


@dataclass
class Findings:
    """What a walk through a program has met so far.

    Attributes:
      lookups: places of gathers by constant indices that are read as lookups.
      inputs: a bit for each argument of the program that has a batch axis.
      uses: the uses, in the order of the program.
      reasons: for every leaf that does anything else than enter linear maps, what it does.
      maps: for leaves that are added to the output of a map that is no use, the bits of what the
        kernel of that map is made of.
      kernel_loops: for each use the loops over which its kernel is stacked.
      refused_gathers: places of gathers by constant indices whose results are refused, with the
        leaves that they gather.
      gathered: leaves that enter linear maps after such a gather.
      num_loops: the number of loops met so far.
    """

    lookups: frozenset[tuple[int, ...]]
    inputs: int
    uses: list[Use] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)
    kernel_loops: list[tuple[int, ...]] = field(default_factory=list)
    refused_gathers: dict[tuple[int, ...], set[str]] = field(default_factory=dict)
    gathered: set[str] = field(default_factory=set)
    num_loops: int = 0

    def refuse(
        self,
        value: Holds,
        reason: str,
    ) -> None:
        """Note why the leaves of a view can be in no kernel (the first reason stays)."""
        if isinstance(value, HoldsView):
            for site in value.gathers:
                self.refused_gathers.setdefault(site, set()).update(value.view.leaves)
            for path in value.view.leaves:
                self.reasons.setdefault(path, reason)

    def note_gathered(self, value: HoldsView) -> None:
        """Note that a view enters a linear map, perhaps after a gather by constant indices."""
        if value.gathers:
            self.gathered.update(value.view.leaves)

    def add(
        self,
        use: Use,
        loops: tuple[int, ...],
    ) -> HoldsOutput:
        """Note a use whose kernel is stacked over the loops; return what its output holds."""
        self.uses.append(use)
        self.kernel_loops.append(loops)
        return HoldsOutput(len(self.uses) - 1, use.axes, use.spread)


def find_uses(
    program: Any,
    arguments: Sequence[Holds],
    live: Sequence[bool],
    batched: Sequence[bool],
) -> Findings:
    """Walk through a program.

    Args:
      program: the program, with its constants.
      arguments: what each of its arguments holds.
      live: for each output whether it counts; what leads to the others alone is dead code.
      batched: for each argument whether it has a batch axis.
    """
    # A bit for each argument; the lowest is that of what no argument explains.
    bits = [2 << number for number in range(len(arguments))]
    place = Place(sources=tuple(map(Source, bits)))
    inputs = sum(bit for bit, has_batch in zip(bits, batched, strict=True) if has_batch)
    lookups: frozenset[tuple[int, ...]] = frozenset()
    while True:
        findings = Findings(lookups=lookups, inputs=inputs)
        for output in walk(program, arguments, live, _rules(findings), place):
            findings.refuse(output, "is an output of the model")
        # Rows of a table at constant indices (of positions, say) are taken for entries that may
        # enter a linear map; where they do something else instead, they are looked up.
        others = set()
        for site, leaves in findings.refused_gathers.items():
            if not leaves & findings.gathered:
                others.add(site)
        if others <= lookups:
            break
        lookups |= others
    _explain_biases(findings, arguments, bits)
    return findings


def _explain_biases(
    findings: Findings,
    arguments: Sequence[Holds],
    bits: Sequence[int],
) -> None:
    """Say of the biases of maps in no block why the map is in none."""
    for path, kernel in findings.maps.items():
        for argument, bit in zip(arguments, bits, strict=True):
            if not (kernel & bit and isinstance(argument, HoldsView)):
                continue
            (leaf,) = argument.view.leaves
            if leaf in findings.reasons:
                reason = f"its map is in no block: {leaf} {findings.reasons[leaf]}"
                findings.reasons[path] = reason
                break


def _rules(findings: Findings) -> Rules:
    return Rules(
        partial(_results, findings),
        inner_program,
        _unless_output,
        stops=frozenset({"stop_gradient"}),
    )


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
    if name == "stop_gradient":
        return nothing
    # `a a'` of complex inputs is no factor of a real kernel.
    if views and _is_complex(eqn):
        for view in views:
            findings.refuse(view, f"becomes complex in `{name}`; blocks are of real linear maps")
        return nothing
    # A cast changes precision, not what an entry is: the view is read in its own dtype.
    if name in _SAME:
        return operands
    # Only an output arrives here without a view: does it go on?
    if not views:
        return [_moved_output(step)] if len(eqn.outvars) == 1 else nothing
    # A structural move of parameters alone is a larger view, not a use.
    moved = _moved_views(eqn, views) if len(views) == len(operands) else None
    if moved is not None:
        return moved
    if len(views) == 1:
        followed = _with_constants(findings, step, views[0])
        if followed is not None:
            return [followed]
        # What is subtracted is added with the other sign.
        if name == "sub" and step.operands[1] is views[0]:
            minus_one = np.full([1] * len(views[0].view.shape), -1.0)
            negative = dataclasses.replace(views[0], view=times(views[0].view, minus_one))
            step = step._replace(operands=[operands[0], negative])
            return [_added(findings, step, negative)]
        if name == "add":
            return [_added(findings, step, views[0])]
    # A linear map of something else with a view is a use; anything else is none.
    use = _linear_map(step, views)
    if isinstance(use, Use):
        findings.note_gathered(views[0])
        # The result holds the output, whose cotangent is that of this use.
        return [findings.add(use, views[0].loops)]
    for view in views:
        if isinstance(use, Refusal):
            findings.note_gathered(view)
            findings.refuse(view, use.reason)
        else:
            both = " with another parameter" if len(views) > 1 else ""
            findings.refuse(view, f"enters `{name}`{both}{_ADVICE.get(name, '')}")
    return nothing


def _is_complex(eqn: Any) -> bool:
    return any(jnp.iscomplexobj(variable.aval) for variable in eqn.outvars)


def _through_branches(findings: Findings, step: Step) -> None:
    """Walk through every branch of a `cond`."""
    _, *operands = map(_unless_output, step.operands)
    sources = tuple(map(step.frame.source, step.eqn.invars[1:]))
    for number, branch in enumerate(step.eqn.params["branches"]):
        place = dataclasses.replace(step.place.at(number), sources=sources)
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
            xs[i] = dataclasses.replace(value, loops=(*value.loops, number))

    # 3. A carry that changes may reach any output in a later round: it counts as live.
    live = [not same for same in unchanged] + step.live[num_carry:]
    loops = (*step.place.loops, (number, eqn.params["length"]))
    sources = _sources_in_scan(step, unchanged, number)
    place = dataclasses.replace(step.place, loops=loops, sources=sources)
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


def _sources_in_scan(
    step: Step,
    unchanged: Sequence[bool],
    number: int,
) -> tuple[Source, ...]:
    """Say where the arguments of a loop's body come from; `number` is that of the loop."""
    frame, eqn = step.frame, step.eqn
    consts, carry, xs = scan_operands(eqn, eqn.invars)
    sources = list(map(frame.source, consts))
    for atom, same in zip(carry, unchanged, strict=True):
        # A carry that changes may come to depend on anything that the loop reads.
        sources.append(frame.source(atom) if same else frame.unknown(eqn.invars))
    sources += [frame.source(atom, number) for atom in xs]
    return tuple(sources)


def _linear_map(
    step: Step,
    views: Sequence[HoldsView],
) -> Use | Refusal | None:
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
    elif name == "ragged_dot_general" and which == 1 and is_ragged(eqn):
        use = of_ragged(kernel.view, hidden, eqn)
    else:
        return None
    # What constants have done to the kernel goes to its inputs and cotangents.
    return settled(_in_loops(use, step.place, kernel.loops))


def _in_loops(
    use: Use,
    place: Place,
    kernel_loops: Sequence[int],
) -> Use:
    """Say where a use is: a loop that slices the kernel makes a stack, others more positions."""
    return dataclasses.replace(
        use,
        site=place.site,
        lengths=tuple(length for _, length in place.loops),
        stacked=tuple(number in kernel_loops for number, _ in place.loops),
    )


# -- constants -----------------------------------------------------------------------------------


def _with_constants(
    findings: Findings,
    step: Step,
    value: HoldsView,
) -> HoldsView | None:
    """Follow a view through what constants do to it; None if the equation does something else."""
    eqn = step.eqn
    name, which = eqn.primitive.name, step.operands.index(value)
    # The output of a use is no constant.
    if any(isinstance(operand, HoldsOutput) for operand in step.operands):
        return None
    if name in ("gather", "dynamic_slice") and which == 0:
        return _taken(findings, step, value)
    factor: Any = None
    if name == "neg":
        factor = Constant(-1)
    elif name == "mul":
        factor = step.frame.constant(eqn.invars[1 - which])
    elif name == "div" and which == 0:
        divisor = step.frame.constant(eqn.invars[1])
        if divisor is not None:
            factor = divisor._replace(value=1 / _as_float(divisor.value))
    elif name == "select_n" and which > 0:
        factor = _mask(findings, step, which)
    elif name in ("add", "sub") and _is_of_params(findings, step, eqn.invars[1 - which]):
        # d(w + f)/dw = 1, whatever f is: w + stop_gradient(f(w) - w) is a straight-through
        # estimator, Bengio et al. (2013).
        factor = Constant(-1 if name == "sub" and which == 1 else 1)
    # An operation that repeats the entries gives no view of them.
    if factor is None or eqn.outvars[0].aval.shape != eqn.invars[which].aval.shape:
        return None
    aligned = _aligned(factor, value)
    if aligned is None:
        return None
    if np.all(aligned == 1):
        return value
    return dataclasses.replace(value, view=times(value.view, aligned))


def _mask(
    findings: Findings,
    step: Step,
    which: int,
) -> Constant | None:
    """Return where a `select_n` lets a view through, if that is constant."""
    which_case, *cases = step.eqn.invars
    others = [atom for number, atom in enumerate(cases, 1) if number != which]
    if not all(_is_of_params(findings, step, atom) for atom in others):
        return None
    chosen = step.frame.constant(which_case)
    if chosen is None:
        return None
    return chosen._replace(value=np.asarray(chosen.value) == which - 1)


def _is_of_params(
    findings: Findings,
    step: Step,
    atom: Any,
) -> bool:
    """Tell whether a value depends on params and constants only, not on the inputs."""
    return not step.frame.origins(atom) & findings.inputs


def _aligned(factor: Constant, value: HoldsView) -> Any:
    """Bring a factor to axes of the view; None if it varies where the view cannot."""
    array = _as_float(factor.value)
    rounds = array.shape[: len(factor.loops)]
    shape = array.shape[len(factor.loops) :]
    # Where entries are repeated, only a number multiplies all repeats alike.
    is_number = math.prod(shape) == 1
    if not set(factor.loops) <= set(value.loops) or (value.axes is not None and not is_number):
        return None
    sizes = dict(zip(factor.loops, rounds, strict=True))
    hidden = [sizes.get(loop, 1) for loop in value.loops]
    ndim = len(value.view.shape) - len(hidden)
    return array.reshape(*hidden, *([1] * ndim if is_number else shape))


def _as_float(x: Any) -> np.ndarray:
    """Read a constant in NumPy, which knows bfloat16 by its conversion only."""
    return np.asarray(x).astype(np.float64)


def _taken(
    findings: Findings,
    step: Step,
    value: HoldsView,
) -> HoldsView | None:
    """Follow entries that are taken by constant indices."""
    eqn, site = step.eqn, step.place.site
    if site in findings.lookups or value.axes is not None:
        return None
    # What is read out of range counts as number 0, whatever the program has there.
    if "fill_value" in eqn.params:
        eqn = eqn.replace(params={**eqn.params, "fill_value": 0})
    # The equation itself says which entries, applied to their numbers; 0 is none.
    numbers = np.arange(1, math.prod(value.view.shape) + 1, dtype=np.int32)
    operand = Constant(numbers.reshape(value.view.shape), value.loops)
    result = step.frame.evaluated(eqn, {eqn.invars[0]: operand})
    if result is None or result.loops != value.loops:
        return None
    entries = np.asarray(result.value)
    if np.any(entries < 1):
        findings.refuse(value, "is gathered by constant indices, some of them out of range")
        return None
    could_be_lookup = eqn.primitive.name == "gather" and is_lookup(eqn)
    gathers = value.gathers | {site} if could_be_lookup else value.gathers
    return dataclasses.replace(value, view=take(value.view, entries - 1), gathers=gathers)


# -- what is added -------------------------------------------------------------------------------


def _added(
    findings: Findings,
    step: Step,
    value: HoldsView,
) -> Holds:
    """Join what is added to a use's output as its bias, read it as rows, or note that it is none.

    Rows of a table that are added, such as embeddings of positions, are a lookup.
    """
    which = step.operands.index(value)
    output: Holds = step.operands[1 - which]
    name = step.eqn.primitive.name
    reason = f"enters `{name}`, not straight on a linear map's output"
    # One bias a kernel has: a second one would be another row with the same input 1.
    if isinstance(output, HoldsOutput):
        use = findings.uses[output.use]
        joined_use = _joined_bias(findings, step, value, output)
        reason = f"enters `{name}` with axes other than a bias has"
        if joined_use is not None and use.bias is None:
            findings.uses[output.use] = joined_use
            return output
        if joined_use is not None:
            findings.refuse(value, f"enters `{name}` as a second bias")
            return output
    rows = _added_rows(step, value, which)
    if rows is None:
        findings.refuse(value, reason)
        if output is None:
            _note_map(findings, step, value, step.eqn.invars[1 - which])
        return output
    after = findings.add(_in_loops(rows, step.place, value.loops), value.loops)
    # What is added later may be a bias of the use before, if that has not been repeated here.
    is_repeated = step.eqn.invars[1 - which].aval.shape != step.eqn.outvars[0].aval.shape
    return after if output is None or is_repeated else output


def _joined_bias(
    findings: Findings,
    step: Step,
    bias: HoldsView,
    output: HoldsOutput,
) -> Use | None:
    """Join a bias to a use, if what is added varies as a bias does."""
    shape = step.eqn.outvars[0].aval.shape
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
    if not fits:
        return None
    use = findings.uses[output.use]
    return with_bias(use, bias.view, hidden, places, output.spread, output.scale)


def _added_rows(
    step: Step,
    value: HoldsView,
    which: int,
) -> Use | None:
    """Read what is added as rows of a table `[rows, columns]`, a leaf, if it is that."""
    view, hidden = without_factors(value.view), len(value.loops)
    rounds, shape = view.shape[:hidden], view.shape[hidden:]
    long_axes = [axis for axis, size in enumerate(shape) if size > 1]
    leaf_sizes = [size for sizes in view.leaf_shapes.values() for size in sizes if size > 1]
    # 1. A table for each round, of more than one row: one row alone is no lookup.
    tables = [size for size in rounds if size > 1]
    if len(view.leaves) > 1 or len(long_axes) < 1 or len(leaf_sizes) != len(tables) + 2:
        return None
    *before, num_rows, num_columns = leaf_sizes
    column_axis = long_axes[-1]
    if before != tables or shape[column_axis] != num_columns:
        return None
    # 2. Entries of rows that are complete, the same in all rounds.
    entries = entry_numbers(view, view.leaf_shapes)
    entries = np.moveaxis(entries, hidden + column_axis, -1)
    entries = entries.reshape(math.prod(rounds), -1, num_columns)
    first = np.arange(len(entries))[:, None] * num_rows
    rows = entries[:, :, 0] // num_columns - first
    complete = (rows + first)[:, :, None] * num_columns + np.arange(num_columns)
    if np.any(entries != complete) or np.any(rows != rows[0]):
        return None
    # 3. Where these axes are in what they are added to.
    axes = range(len(shape)) if value.axes is None else value.axes
    others = [axis for axis in axes if axis != column_axis]
    row_shape = [1 if axis is None else shape[axis] for axis in others]
    row_axes = [axis for axis in others if axis is not None]
    if row_axes != sorted(row_axes):
        return None
    (leaf,) = view.leaf_shapes.items()
    use = of_added_rows(
        table=reshape(leaf_view(*leaf), (len(entries), num_rows, num_columns)),
        rows=rows[0].reshape(row_shape),
        feature_axis=list(axes).index(column_axis),
        which=1 - which,
        eqn=step.eqn,
    )
    # A number that multiplies the rows goes to the cotangents.
    factor = factor_of(value.view) if value.view.has("times") else np.ones(1)
    if not np.all(factor == factor.flat[0]):
        return None
    scaled = settled(
        dataclasses.replace(use, view=times(use.view, factor.flat[:1].reshape(1, 1, 1)))
    )
    return scaled if isinstance(scaled, Use) else None


def _note_map(
    findings: Findings,
    step: Step,
    value: HoldsView,
    atom: Any,
) -> None:
    """Note of what is added to the output of a linear map what the map's kernel is made of."""
    defined = step.frame.definition(atom)
    while defined is not None and defined[1].primitive.name in _PASSES_ON:
        frame, eqn = defined
        defined = frame.definition(eqn.invars[0])
    if defined is None or defined[1].primitive.name not in _MAPS:
        return
    frame, eqn = defined
    # Of the operands of a map the kernel is the one that does not depend on the inputs.
    operands = [frame.origins(operand) for operand in eqn.invars]
    kernels = [bits for bits in operands if not bits & findings.inputs]
    for path in value.view.leaves:
        findings.maps[path] = sum(set(kernels))


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
        gathers = frozenset().union(*(value.gathers for value in views))
        return [HoldsView(joined(eqn, parts, hidden), first.loops, gathers=gathers)]
    if name not in MOVES:
        return None
    moved = MOVES[name](eqn, first.view, hidden)
    return [dataclasses.replace(first, view=view) for view in moved]


def _broadcast(eqn: Any, value: HoldsView) -> HoldsView:
    """Insert axes: of size 1 into the view itself, others as repeats of it."""
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    hidden, view = len(value.loops), value.view
    before = value.axes
    if before is None and math.prod(shape) == math.prod(view.shape[hidden:]):
        return dataclasses.replace(value, view=reshape(view, (*view.shape[:hidden], *shape)))
    if before is None:
        before = tuple(range(len(view.shape) - hidden))
    axes: list[int | None] = [None] * len(shape)
    for axis, to in zip(before, places, strict=True):
        if axis is not None and view.shape[hidden + axis] == shape[to]:
            axes[to] = axis
    return dataclasses.replace(value, axes=tuple(axes))


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
    number = _number(step, operands.index(output))
    if number is not None and before == after:
        return dataclasses.replace(output, scale=output.scale * number)
    if name == "transpose":
        axes = tuple(output.axes[i] for i in eqn.params["permutation"])
        return dataclasses.replace(output, axes=axes)
    if name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped_output(output, before, after)
    return None


def _number(
    step: Step,
    which: int,
) -> float | None:
    """Return the constant number that an equation multiplies operand `which` by, if it does so."""
    name, atoms = step.eqn.primitive.name, step.eqn.invars
    if name == "neg":
        return -1.0
    if name not in ("mul", "div") or (name == "div" and which == 1):
        return None
    constant = step.frame.constant(atoms[1 - which])
    if constant is None or constant.loops:
        return None
    array = _as_float(constant.value)
    number = float(array.flat[0])
    # Zero would leave nothing of the cotangent.
    if number == 0 or np.any(array != number):
        return None
    return number if name == "mul" else 1 / number


def _reshaped_output(
    output: HoldsOutput,
    before: Sequence[int],
    after: Sequence[int],
) -> HoldsOutput | None:
    """Carry places in the spread through a reshape, which may split or merge axes of the spread.

    None where an axis of the spread is merged with positions, or with others in another order.
    """
    runs: dict[int, tuple[int, list[int]]] = {}  # first place: number of places, sizes after
    moved: list[tuple[int, int] | None] = []
    for old, new in _matching_segments(before, after):
        places = [output.axes[i] for i in old if before[i] > 1]
        if all(place is None for place in places):
            moved += [None] * len(new)
            continue
        first = places[0]
        if first is None or places != list(range(first, first + len(places))):
            return None
        sizes: list[int] = []
        for i in new:
            moved.append((first, len(sizes)) if after[i] > 1 else None)
            sizes += [after[i]] if after[i] > 1 else []
        runs[first] = len(places), sizes
    # The spread, with these runs replaced.
    spread: list[int] = []
    start: dict[int, int] = {}
    place = 0
    while place < len(output.spread):
        count, sizes = runs.get(place, (1, [output.spread[place]]))
        start[place] = len(spread)
        spread += sizes
        place += count
    axes = [None if at is None else start[at[0]] + at[1] for at in moved]
    return dataclasses.replace(output, axes=tuple(axes), spread=tuple(spread))


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

_PASSES_ON = frozenset(
    {*_SAME, "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "add"}
)
"""Primitives behind which a linear map may be whose bias is added."""

_MAPS = frozenset(
    {"dot_general", "conv_general_dilated", "ragged_dot_general", "gather", "custom_vjp_call"}
)
"""Primitives that may be linear maps of their operands."""

_OF_SOLVERS = "choose for a solver an adjoint that differentiates its steps, as DirectAdjoint does"

_ADVICE = {
    "custom_vjp_call": f", which has a derivative of its own; {_OF_SOLVERS}",
    "custom_vjp_call_jaxpr": f", which has a derivative of its own; {_OF_SOLVERS}",
    "while": f", whose steps have no taps; use `scan`, or {_OF_SOLVERS}",
}
"""What helps, by the primitive that a leaf enters."""
