"""Compiled programs as data: the text of optimised HLO, and how often each instruction runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
# `async-start` and what it calls, a fusion and its parts, and so on: the attributes that call.
CALLS = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; ``rest`` holds its attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    rest: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where it comes from: the path of the primitive in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        return [n for group in CALLS.findall(self.rest) for n in re.findall(r"[\w.-]+", group)]


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a module by name."""

    computations: Mapping[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, its computation and that one's name, its runs, and the turns of its loops."""

    instruction: Instruction
    computation: Computation
    where: str
    times: int
    loops: tuple[int, ...]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(dtype, dimensions, layout) of each array in a shape, tuples flattened."""
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in ARRAY.findall(shape)
    ]


def dimensions(shape: str) -> tuple[int, ...]:
    """The dimensions of a shape's first array."""
    return arrays(shape)[0][1]


def size(shape: str, *, on_chip: bool = True) -> int:
    """Bytes of a shape; without ``on_chip``, of the arrays that lie in a device's main memory."""
    found = arrays(shape)
    if not on_chip:
        found = [a for a in found if not re.search(r"S\([1-9]", a[2])]
    return int(sum(BYTES.get(dtype, 0) * math.prod(dims) for dtype, dims, _ in found))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    literal = line[opening + 1 : closing]
    # Newer texts leave out the operands' shapes, older ones the percent signs.
    names = re.findall(r"%([\w.-]+)", literal) or re.findall(r"([\w.-]+)(?:,|$)", literal)
    return Instruction(
        name=head[2], shape=line[at:end], opcode=line[end:opening].strip(), operands=tuple(names),
        literal=literal, rest=line[closing + 1 :], root=bool(head[1]),
    )  # fmt: skip


def parse(text: str) -> Program:
    """The program of ``compiled.as_text()``."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, last = "", {}, None
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if start:
            current, last = computations.setdefault(start[2], {}), None
            entry = start[2] if start[1] else entry
        elif found := _instruction(line):
            last = current[found.name] = found
        elif last is not None:  # attributes of kernels go over several lines
            last = current[last.name] = dataclasses.replace(last, rest=last.rest + line)
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return Program(computations, entry)


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _constant(program: Program, computation: Computation, name: str) -> int | None:
    """The value of a scalar that is a constant but for copies; None if it is computed."""
    while (found := computation.get(name)) is not None:
        if found.opcode == "constant":
            return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None
        if found.opcode not in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
            return None
        name = found.operands[0]
    return None


def _carried(loop: Instruction, computation: Computation, body: Computation, name: str):
    """(index in the carry, instruction that starts it) of a value of a loop's computation."""
    found = body.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert"):
        found = body.get(found.operands[0])
    if found is None or found.opcode != "get-tuple-element":
        return None, None
    index = int(re.search(r"index=(\d+)", found.rest)[1])
    start = computation.get(loop.operands[0])
    return index, start.operands[index] if start is not None and start.opcode == "tuple" else None


def _compared(program: Program, condition: Computation) -> tuple[Instruction, list[str]] | None:
    """The comparison that ends a loop, and its two operands as names of the condition."""
    root = _root(condition)
    if root.opcode == "compare":
        return root, list(root.operands)
    if root.opcode != "fusion":
        return None
    inner = program.computations[root.called[0]]
    compare = _root(inner)
    if compare.opcode != "compare":
        return None
    names = []
    for operand in compare.operands:
        if inner[operand].opcode != "parameter":
            return None
        names.append(root.operands[int(inner[operand].literal)])
    return compare, names


def trips(program: Program, loop: Instruction, computation: Computation) -> int | None:
    """How often a loop turns; None if that is known at run time only."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = program.computations[re.search(r"condition=%?([\w.-]+)", loop.rest)[1]]
    body = program.computations[re.search(r"body=%?([\w.-]+)", loop.rest)[1]]
    found = _compared(program, condition)
    if found is None or "direction=LT" not in found[0].rest:
        return None
    values = []
    for name in found[1]:
        value = _constant(program, condition, name)
        index, start = _carried(loop, computation, condition, name)
        if value is None and start is not None:
            value = _constant(program, computation, start)
        values.append((value, index))
    (first, counter), (last, _) = values
    if first is None or last is None or counter is None or not _counts_up(program, body, counter):
        return None
    return max(0, last - first)


def _counts_up(program: Program, body: Computation, index: int) -> bool:
    """Whether a loop's body adds 1 to an entry of its carry."""
    root = _root(body)
    step = body.get(root.operands[index]) if root.opcode == "tuple" else None
    if step is not None and step.opcode == "fusion":
        inner = program.computations[step.called[0]]
        step, body = _root(inner), inner
    if step is None or step.opcode != "add":
        return False
    return 1 in [_constant(program, body, name) for name in step.operands]


def executed(program: Program, *, unknown: int = 1, fused: bool = True) -> Iterator[Executed]:
    """Every instruction with how often it runs.

    Args:
      program: from `parse`.
      unknown: turns of a loop whose number is known at run time only.
      fused: go into fusions; without, a fusion is one instruction.

    Of a conditional, every branch counts.
    """

    def visit(name: str, times: int, loops: tuple[int, ...]) -> Iterator[Executed]:
        computation = program.computations[name]
        for instruction in computation.values():
            yield Executed(instruction, computation, name, times, loops)
            inside, path = times, loops
            if instruction.opcode == "while":
                count = trips(program, instruction, computation)
                count = unknown if count is None else count
                inside, path = times * count, (*loops, count)
            if instruction.opcode != "fusion" or fused:
                for called in instruction.called:
                    yield from visit(called, inside, path)

    yield from visit(program.entry, 1, ())


def turn(program: Program) -> Program:
    """One turn of the first loop that the program comes to, without what is around it."""
    loops = (e.instruction for e in executed(program) if e.instruction.opcode == "while")
    body = re.search(r"body=%?([\w.-]+)", next(loops).rest)[1]
    return dataclasses.replace(program, entry=body)
