"""The side of a contestant: build, compile, then one round for each line that comes in.

The first line out says what was built; each later one is a round. NumPy is not needed here.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve(build: Callable[[], tuple[Callable[[], dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer a coordinator on standard input and output.

    Args:
      build: () → (round, facts): ``round()`` blocks until its work is done and returns what it
        found, such as a loss or a number of tokens; the facts go into the first line.
    """
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        once, facts = build()
        built = time.perf_counter() - start
        first = once()
        began = time.perf_counter()
        once()
        again = time.perf_counter() - began
        found = {
            "build_s": round(built, 3),
            "first_s": round(began - start - built, 3),
            "compile_s": round(max(0.0, began - start - built - again), 3),
            **first, **facts,
        }  # fmt: skip
        print(json.dumps(found), file=out, flush=True)
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), _cpu()
            found = once()
            times = {"wall_s": time.perf_counter() - wall, "cpu_s": _cpu() - cpu}
            print(json.dumps(times | found), file=out, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_rss_bytes": peak}), file=out, flush=True)
