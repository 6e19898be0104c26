"""Compiled programs as data: the text of optimised HLO, and how often each instruction runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax

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

NONE: Mapping[str, int] = MappingProxyType({})


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
class Module:
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


def parse(text: str) -> Module:
    """The module of ``compiled.as_text()``."""
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
    return Module(computations, entry)


def root(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(i for i in computation.values() if i.root)


def _constant(computation: Computation, name: str) -> int | None:
    """The value of a scalar that is a constant but for copies; None if it is computed."""
    while (found := computation.get(name)) is not None:
        if found.opcode == "constant":
            return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None
        if found.opcode not in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
            return None
        name = found.operands[0]
    return None


def _carried(
    loop: Instruction, computation: Computation, inside: Computation, name: str
) -> tuple[int | None, str | None]:
    """(index in the carry, instruction that starts it) of a value inside of a loop."""
    found = inside.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert"):
        found = inside.get(found.operands[0])
    if found is None or found.opcode != "get-tuple-element":
        return None, None
    index = int(re.search(r"index=(\d+)", found.rest)[1])
    start = computation.get(loop.operands[0])
    return index, start.operands[index] if start is not None and start.opcode == "tuple" else None


def _less_than(module: Module, condition: Computation) -> tuple[str, ...]:
    """The names of a and b in a loop's condition a < b, or () where it is another one."""
    compare = end = root(condition)
    if end.opcode == "fusion":
        compare = root(inner := module.computations[end.called[0]])
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return ()
    if compare is end:
        return end.operands
    inputs = [inner[name] for name in compare.operands]
    if any(i.opcode != "parameter" for i in inputs):
        return ()
    return tuple(end.operands[int(i.literal)] for i in inputs)


def trips(module: Module, loop: Instruction, computation: Computation) -> int | None:
    """How often a loop turns; None if that is known at run time only.

    XLA notes the number on the CPU. For TPU it does not: there it is read off a condition
    i < n, where i is carried and grows by 1, and i's start and n are constants (n may be carried).
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition, body = (
        module.computations[re.search(rf"{kind}=%?([\w.-]+)", loop.rest)[1]]
        for kind in ("condition", "body")
    )
    values = []
    for name in _less_than(module, condition):
        value = _constant(condition, name)
        index, start = _carried(loop, computation, condition, name)
        if value is None and start is not None:
            value = _constant(computation, start)
        values.append((value, index))
    if not values:
        return None
    (first, counter), (last, _) = values
    if first is None or last is None or counter is None or not _counts_up(module, body, counter):
        return None
    return max(0, last - first)


def _counts_up(module: Module, body: Computation, index: int) -> bool:
    """Whether a loop's body adds 1 to an entry of its carry."""
    end = root(body)
    step = body.get(end.operands[index]) if end.opcode == "tuple" else None
    if step is not None and step.opcode == "fusion":
        body = module.computations[step.called[0]]
        step = root(body)
    return (
        step is not None
        and step.opcode == "add"
        and 1 in (_constant(body, name) for name in step.operands)
    )


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile; of the cache, only a program with the same scopes, by which loops are known."""
    option = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[option]
    jax.config.update(option, True)
    try:
        return lowered.compile()
    finally:
        jax.config.update(option, before)


def _turns(loop: Instruction, unknown: Mapping[str, int]) -> int:
    """Turns of a loop by the innermost of the scopes around it that ``unknown`` has, else 1."""
    scopes = re.findall(r"\w+", loop.op_name)
    return next((unknown[name] for name in reversed(scopes) if name in unknown), 1)


def executed(
    module: Module, *, unknown: Mapping[str, int] = NONE, fused: bool = True
) -> Iterator[Executed]:
    """Every instruction with how often it runs.

    Args:
      module: from `parse`.
      unknown: turns of loops whose number is known at run time only, by `jax.named_scope`.
      fused: go into fusions; without, a fusion is one instruction.

    Of a conditional, every branch counts.
    """

    def visit(name: str, times: int, loops: tuple[int, ...]) -> Iterator[Executed]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield Executed(instruction, computation, name, times, loops)
            inside, path = times, loops
            if instruction.opcode == "while":
                count = trips(module, instruction, computation)
                count = _turns(instruction, unknown) if count is None else count
                inside, path = times * count, (*loops, count)
            if instruction.opcode != "fusion" or fused:
                for called in instruction.called:
                    yield from visit(called, inside, path)

    yield from visit(module.entry, 1, ())


def turn(module: Module) -> Module:
    """One turn of the first loop that the module comes to, without what is around it."""
    loops = (e.instruction for e in executed(module) if e.instruction.opcode == "while")
    body = re.search(r"body=%?([\w.-]+)", next(loops).rest)[1]
    return dataclasses.replace(module, entry=body)
