"""What one device does and sends in a compiled program, counted in its optimized HLO text.

The compiler's own `cost_analysis` counts the body of a loop once and a LAPACK call as nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # others say their bits: f32, u8
ARRAY = re.compile(r"(pred|bf16|[sufc]\d+)\[([\d,]*)\]")

# FLOPs of one matrix [m, n], with leading terms alone. A triangular solve has [m, m] and [m, n].
LAPACK: dict[str, Callable[[int, int], float]] = {
    "potrf": lambda m, n: n**3 / 3,
    "trsm": lambda m, n: m**2 * n,
    "syevd": lambda m, n: 10 * n**3,
    "getrf": lambda m, n: 2 / 3 * n**3,
    "geqrf": lambda m, n: 2 * m * n**2 - 2 / 3 * n**3,
    "orgqr": lambda m, n: 2 * m * n**2 - 2 / 3 * n**3,
}
FACTORIZATIONS = ("potrf", "syevd", "getrf", "geqrf")
FREE_CALLS = ("Sharding", "AllocateBuffer", "TopK")

# Bytes that each of n devices sends on a ring, by bytes of the operands and of the results.
SENT: dict[str, Callable[[int, float, float], float]] = {
    "all-reduce": lambda n, inputs, outputs: 2 * (n - 1) / n * inputs,
    "all-gather": lambda n, inputs, outputs: (n - 1) / n * outputs,
    "reduce-scatter": lambda n, inputs, outputs: (n - 1) / n * inputs,
    "all-to-all": lambda n, inputs, outputs: (n - 1) / n * inputs,
    "collective-permute": lambda n, inputs, outputs: inputs if n > 1 else 0,
}


class Array(NamedTuple):
    """Type and shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        size = BYTES.get(self.dtype)
        return math.prod(self.shape) * (size or int(re.sub(r"\D", "", self.dtype)) / 8)


class Collective(NamedTuple):
    """A collective: what each device gets by it, and how many bytes it sends, in all rounds."""

    kind: str
    results: tuple[Array, ...]
    sent: float
    scope: str


@dataclass(frozen=True)
class Work:
    """What one device does in a program: FLOPs of matrix products and LAPACK, and what it sends."""

    matrix_flops: float = 0
    lapack_flops: float = 0
    num_factorizations: int = 0
    collectives: tuple[Collective, ...] = field(default=(), repr=False)

    @property
    def sent(self) -> float:
        """Bytes."""
        return sum(collective.sent for collective in self.collectives)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matrix_flops + other.matrix_flops,
            self.lapack_flops + other.lapack_flops,
            self.num_factorizations + other.num_factorizations,
            self.collectives + other.collectives,
        )

    def repeated(self, times: int) -> Work:
        return Work(
            times * self.matrix_flops,
            times * self.lapack_flops,
            times * self.num_factorizations,
            tuple(c._replace(sent=times * c.sent) for c in self.collectives),
        )


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    results: tuple[Array, ...]
    kind: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match and match[1]


def work(text: str) -> Work:
    """Count the work of one device, in the text of a compiled program for several.

    Loops count with the number of their rounds; one without a known number may have no work in it.
    Of a condition the costliest branch counts.
    """
    computations, entry = _computations(text)
    match = re.search(r"num_partitions=(\d+)", text)
    num_devices = int(match[1]) if match else 1

    @cache
    def of_computation(name: str) -> Work:
        here = {instruction.name: instruction for instruction in computations[name]}
        total = Work()
        for instruction in here.values():
            operands = [here[name].results for name in instruction.operands if name in here]
            total += of_instruction(instruction, [x for each in operands for x in each])
        return total

    def of_instruction(x: Instruction, operands: list[Array]) -> Work:
        if x.kind == "while":
            rounds = x.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
            body = of_computation(x.attribute(r"body=%?([\w.-]+)"))
            if rounds is None and body != Work():
                raise ValueError(f"the loop {x.name} has {body}, for an unknown number of rounds")
            return body.repeated(int(rounds or 0))
        if x.kind == "conditional":
            return max(map(of_computation, _branches(x)), key=_cost)
        if x.kind in ("fusion", "call"):
            return of_computation(x.attribute(r"(?:calls|to_apply)=%?([\w.-]+)"))
        if x.kind == "dot":
            axes = x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
            contracted = math.prod(operands[0].shape[axis] for axis in _numbers(axes))
            return Work(matrix_flops=2 * contracted * math.prod(x.results[0].shape))
        if x.kind == "custom-call":
            return _lapack(x, operands)
        if x.kind in SENT:
            return _collective(x, operands, num_devices)
        if x.kind == "convolution" or x.kind.startswith(tuple(SENT)):
            raise ValueError(f"{x.kind} is not counted here, but the program has {x.name}")
        return Work()

    return of_computation(entry)


def _cost(x: Work) -> float:
    return x.matrix_flops + x.lapack_flops + x.sent


def _branches(x: Instruction) -> list[str]:
    """Names of the computations of a condition, of which one runs."""
    names = x.attribute(r"branch_computations=\{([^}]*)\}")
    if names is None:
        names = ",".join(re.findall(r"(?:true|false)_computation=(%?[\w.-]+)", x.attributes))
    return [name.strip().removeprefix("%") for name in names.split(",")]


def _lapack(x: Instruction, operands: list[Array]) -> Work:
    target = x.attribute(r'custom_call_target="([^"]*)"')
    for name, flops in LAPACK.items():
        if name in target:
            # The right-hand side of a triangular solve is its last operand.
            *batch, m, n = operands[-1 if name == "trsm" else 0].shape
            number = math.prod(batch)
            return Work(
                lapack_flops=number * flops(m, n),
                num_factorizations=number if name in FACTORIZATIONS else 0,
            )
    if target not in FREE_CALLS:
        raise ValueError(f"the call of {target} is not counted here")
    return Work()


def _collective(x: Instruction, operands: list[Array], num_devices: int) -> Work:
    size = _group_size(x, num_devices)
    inputs, outputs = (sum(array.bytes for array in each) for each in (operands, x.results))
    sent = SENT[x.kind](size, inputs, outputs)
    scope = x.attribute(r'op_name="([^"]*)"') or ""
    return Work(collectives=(Collective(x.kind, x.results, sent, scope),))


def _group_size(x: Instruction, num_devices: int) -> int:
    """How many devices take part together: of `{{0,1},{2,3}}`, `[2,2]<=[4]`, or axes of a mesh."""
    if x.kind == "collective-permute":
        return num_devices
    mesh = re.search(r"replica_groups=mesh\[([^]]*)\] ?\{([^}]*)\}", x.attributes)
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # A part of an axis is written `'axis':(1)2`, with its size last.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    tiles = x.attribute(r"replica_groups=\[\d+,(\d+)\]")
    if tiles is not None:
        return int(tiles)
    listed = x.attribute(r"replica_groups=\{\{([\d,]*)\}")
    return len(_numbers(listed)) if listed else num_devices


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Read all computations by name, and the name of the one that is run."""
    computations: dict[str, list[Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*-> .*\{$", line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and " = " in line:
            computations[name].append(_instruction(line))
    return computations, entry


def _instruction(line: str) -> Instruction:
    """Read `%name = type kind(operands), attributes`, where a type may be a tuple of types."""
    name, content = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)", line).groups()
    end = _closing(content) if content.startswith("(") else content.index(" ")
    results, content = content[:end], content[end:].lstrip()
    kind, content = content[: content.index("(")], content[content.index("(") :]
    end = _closing(content)
    return Instruction(
        name,
        tuple(Array(dtype, tuple(_numbers(shape))) for dtype, shape in ARRAY.findall(results)),
        kind,
        tuple(re.findall(r"%([\w.-]+)", content[:end])),
        content[end:],
    )


def _closing(text: str) -> int:
    """Where the parenthesis ends that the text begins with."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"no parenthesis closes in: {text[:100]}")
