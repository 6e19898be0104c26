"""What a compiled program executes, moves and holds, each loop's body as often as it turns.

XLA's own cost analysis visits the body of a loop once and sees nothing inside a Pallas kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from sapo_jax.preflight.hlo import (
    NONE,
    Computation,
    Executed,
    Instruction,
    Module,
    arrays,
    dimensions,
    executed,
    root,
    size,
)

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
NOTHING_NEW = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "partition-id",
)  # fmt: skip

Kernel = Callable[[Instruction, Computation], float]


class Collective(NamedTuple):
    """One instruction that moves data between devices.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: of the whole array on one device: what an all-gather returns, what a reduce-scatter
        or an all-reduce takes.
      times: how often it runs.
      loops: turns of the loops around it, outermost first.
      op_name: where it comes from in the traced program.
    """

    kind: str
    bytes: int
    times: int
    loops: tuple[int, ...]
    op_name: str


class Buffer(NamedTuple):
    """An array that a program writes to a device's main memory."""

    bytes: int
    shape: str
    opcode: str
    op_name: str


def _dot(instruction: Instruction, computation: Computation) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    sides = dimensions(computation[instruction.operands[0]].shape)
    depth = math.prod(sides[int(i)] for i in contracted[1].split(",") if i) if contracted else 1
    return 2 * depth * math.prod(dimensions(instruction.shape))


def _window(rest: str, rank: int) -> dict[str, tuple[int, ...]]:
    text = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(f.split("=") for f in text[1].split()) if text else {}
    window = {
        key: tuple(int(n) for n in fields[key].split("x")) if key in fields else (1,) * rank
        for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    }
    pads = fields["pad"].split("x") if "pad" in fields else ["0_0"] * rank
    return window | {"low": tuple(int(p.split("_")[0]) for p in pads)}


def _pairs(size_in: int, size_out: int, window: Mapping[str, tuple[int, ...]], axis: int) -> int:
    """Pairs of an output and a kernel position that meet an entry of the input, along one axis."""
    spread = window["lhs_dilate"][axis]
    starts = np.arange(size_out) * window["stride"][axis] - window["low"][axis]
    count = 0
    for tap in range(window["size"][axis]):
        at = starts + tap * window["rhs_dilate"][axis]
        count += int(((at % spread == 0) & (at >= 0) & (at < size_in * spread)).sum())
    return count


def _convolution(instruction: Instruction, computation: Computation) -> int:
    """2 · outputs · products of each, without those that fall on padding.

    For TPU, XLA writes matmuls as convolutions, batched ones over padded axes.
    """
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    given, kernel = (dimensions(computation[n].shape) for n in instruction.operands[:2])
    result = dimensions(instruction.shape)
    axes = [c for c in out if c.isdigit()]
    window = _window(instruction.rest, len(axes))
    pairs = math.prod(
        _pairs(given[left.index(c)], result[out.index(c)], window, int(c)) for c in axes
    )
    outputs = result[out.index("b")] * result[out.index("f")]
    return 2 * outputs * kernel[right.index("i")] * pairs


def flops(
    module: Module,
    *,
    unknown: Mapping[str, int] = NONE,
    kernels: Mapping[str, Kernel] | None = None,
) -> float:
    """Executed FLOPs of matmuls, convolutions and kernels, on one device.

    A multiplication and its addition are 2; what is not a matmul counts nothing.

    Args:
      module: from `hlo.parse`.
      unknown: see `hlo.executed`.
      kernels: FLOPs of custom calls, by how their names start.
    """
    total = 0.0
    for e in executed(module, unknown=unknown):
        if e.instruction.opcode == "dot":
            total += e.times * _dot(e.instruction, e.computation)
        elif e.instruction.opcode == "convolution":
            total += e.times * _convolution(e.instruction, e.computation)
        elif e.instruction.opcode == "custom-call":
            for start, formula in (kernels or {}).items():
                if e.instruction.name.startswith(start):
                    total += e.times * formula(e.instruction, e.computation)
    return total


def collectives(module: Module, *, unknown: Mapping[str, int] = NONE) -> list[Collective]:
    """Everything that moves between devices, in the order of the text.

    TPU's fusion of an all-reduce and the slice that each device keeps is a reduce-scatter. A
    collective that runs next to several matmuls, a piece in the fusion of each, counts once.
    """
    found, chains = [], set()
    for e in executed(module, unknown=unknown):
        kind = e.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if chain := re.search(r'chain_id="(\d+)"', e.instruction.rest):
            piece = (chain[1], re.search(r"channel_id=(\d+)", e.instruction.rest)[1])
            if piece in chains:
                continue
            chains.add(piece)
        taken = sum(size(e.computation[name].shape) for name in e.instruction.operands)
        given = size(e.instruction.shape)
        if e.instruction.opcode.endswith("-start"):
            given -= taken  # it returns what it takes, too
        if kind == "all-reduce" and "all-reduce-scatter" in e.where:
            kind = "reduce-scatter"
        found.append(Collective(kind, max(taken, given), e.times, e.loops, e.instruction.op_name))
    return found


def buffers(module: Module) -> list[Buffer]:
    """The arrays that the program writes to main memory, largest first, one of each shape.

    What is inside a fusion never exists there. Several may share their memory. Of what is started
    and done, the end counts: the start names what it takes, too.
    """
    found: dict[str, Buffer] = {}
    for e in executed(module, fused=False):
        if e.instruction.opcode in NOTHING_NEW or e.instruction.opcode.endswith("-start"):
            continue
        for dtype, dims, layout in arrays(e.instruction.shape):
            text = f"{dtype}[{','.join(map(str, dims))}]"
            count = size(f"{text}{{{layout}}}", on_chip=False)
            if count and text not in found:
                found[text] = Buffer(count, text, e.instruction.opcode, e.instruction.op_name)
    return sorted(found.values(), key=lambda b: -b.bytes)


def _touched(name: str, computation: Computation, whole: int) -> int:
    """Bytes of a value that the instructions of its computation read."""
    users = [i for i in computation.values() if name in i.operands]
    total = 0
    for user in users:
        if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
            total += size(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            total += size(computation[user.operands[1]].shape)
        elif user.opcode in ("bitcast", "reshape"):
            total += _touched(user.name, computation, whole)
        else:
            return whole
    return min(total, whole)


def _written(end: Instruction, computation: Computation) -> int:
    while end.opcode in ("bitcast", "reshape"):
        end = computation[end.operands[0]]
    if end.opcode == "dynamic-update-slice":
        return size(computation[end.operands[1]].shape)
    if end.opcode == "tuple":
        return sum(_written(computation[name], computation) for name in end.operands)
    return size(end.shape, on_chip=False)


def _moved(module: Module, e: Executed) -> int:
    """Bytes that one run of an instruction reads and writes."""
    i = e.instruction
    result = size(i.shape, on_chip=False)
    given = [size(e.computation[name].shape, on_chip=False) for name in i.operands]
    if i.opcode == "fusion":
        inner = module.computations[i.called[0]]
        names = {int(p.literal): p.name for p in inner.values() if p.opcode == "parameter"}
        read = sum(_touched(names[n], inner, whole) for n, whole in enumerate(given) if whole)
        return read + (result and min(result, _written(root(inner), inner)))
    if i.opcode == "dynamic-update-slice":
        return 2 * size(e.computation[i.operands[1]].shape)
    if i.opcode in ("slice", "dynamic-slice", "gather"):
        return size(i.shape) + result
    if i.opcode == "slice-start":  # it returns what it takes, too
        return size(i.shape) - size(e.computation[i.operands[0]].shape)
    read = 0 if i.opcode.endswith("-done") else sum(given)
    return read + (0 if i.opcode.endswith("-start") else result)


def memory_bytes(module: Module, *, unknown: Mapping[str, int] = NONE) -> int:
    """Bytes read from and written to a device's main memory, if nothing stays on the chip.

    Of what an instruction slices, the slice counts; of what it updates in place, the update.
    """
    return sum(
        e.times * _moved(module, e)
        for e in executed(module, unknown=unknown, fused=False)
        if e.instruction.opcode not in NOTHING_NEW
    )
