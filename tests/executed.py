"""What a compiled program executes: XLA's own count visits the body of a loop once."""

import math
import re

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\(%?([\w.-]*)")
CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
CALLED = re.compile(
    r"(?:calls|to_apply|body|called_computations|branch_computations)=(\{.*?\}|\S+)"
)
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def _numbers(text):
    return [int(n) for n in text.split(",") if n]


def matmul_flops(compiled):
    """2 · rows · columns · depth of every matmul, times the trips of the loops around it."""
    own, calls, entry, shapes = {}, {}, None, {}
    for line in compiled.as_text().splitlines():
        if start := COMPUTATION.match(line):
            name, shapes = start[2], {}
            own[name], calls[name] = 0, []
            entry = name if start[1] else entry
            continue
        if found := INSTRUCTION.match(line):
            result, shape, operation, first = found.groups()
            shapes[result] = _numbers(shape)
            if operation == "dot":
                depth = math.prod(shapes[first][i] for i in _numbers(CONTRACTED.search(line)[1]))
                own[name] += 2 * depth * math.prod(shapes[result])
        trips = TRIPS.search(line)
        assert trips or " while(" not in line, f"a loop of unknown length: {line}"
        for called in CALLED.findall(line):
            times = int(trips[1]) if trips else 1
            calls[name] += [(inner, times) for inner in re.findall(r"[\w.-]+", called)]

    def total(name):
        return own[name] + sum(n * total(inner) for inner, n in calls[name])

    return total(entry)
