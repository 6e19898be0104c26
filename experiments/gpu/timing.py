"""What the sections share: times of programs on the device, the device's own limits, and lines."""

from __future__ import annotations

import collections
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def emit(section: str, **found: Any) -> None:
    """One result, as a line of JSON, at once."""
    print(json.dumps({"section": section, **found}), flush=True)


def attempt(section: str, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Emit what is measured, or why it could not be: the rest of a section goes on."""
    try:
        emit(section, **what, **measure())
    except Exception as error:  # whatever a kernel or its compiler says
        emit(section, **what, error=f"{type(error).__name__}: {error}"[:500])


def seconds(run: Callable[[], Any], repeats: int = 5, inner: int = 1) -> float:
    """Median wall seconds of a call, the device's work included, after a first one."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = run()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / inner)
    return statistics.median(found)


def compiled(function: Callable, *arguments: Any) -> tuple[Callable, dict[str, Any]]:
    """The program, and what compiling it took and it needs."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    memory = program.memory_analysis()
    return program, {
        "compile_s": round(time.perf_counter() - start, 2),
        "temp_gib": round(memory.temp_size_in_bytes / 2**30, 3),
    }


def random(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal numbers: zeros would run faster than real data."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def matmul_peak(size: int, dtype: Any = jnp.bfloat16) -> float:
    """FLOP/s of the device's own product of two matrices."""
    x, y = random(0, size, size, dtype=dtype), random(1, size, size, dtype=dtype)
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, precision="highest"))
    return 2 * size**3 / seconds(lambda: multiply(x, y), inner=20)


def copy_bandwidth(size: int) -> float:
    """Bytes/s that a large elementwise program reads and writes."""
    x = random(0, size)
    double = jax.jit(lambda x: x * 2)
    return 2 * x.nbytes / seconds(lambda: double(x), inner=20)


def kernels(run: Callable[[], Any], most: int = 12) -> dict[str, float]:
    """Milliseconds of a call by kernel, the longest first, and of all together."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        spent: collections.Counter[str] = collections.Counter()
        for plane in planes:
            for line in plane.lines if "GPU" in plane.name else ():
                if line.name.startswith("Stream"):
                    for event in line.events:
                        spent[event.name[:60]] += event.duration_ns / 1e6
    found = {name: round(ms, 3) for name, ms in spent.most_common(most)}
    return {"all": round(sum(spent.values()), 3), **found}
