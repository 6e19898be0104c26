"""Everything about one GPU in one call, at most nine minutes.

    python -m experiments.gpu.run               # make gpu
    python -m experiments.gpu.run --toy         # the same at toy sizes, on any machine

First what need not be timed, all at once: compiling into a cache, and comparing results with those
of a CPU. Then a section after the other has the device to itself. Each is a process of its own with
a limit of time, and prints a line of JSON for each result at once; `results/` gets all of them.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from sapo_jax import cli

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
UNTIMED = ("parity", "attention", "updates", "decoding")
TIMED = ("machine", "attention", "experts", "updates", "decoding", "population")
FLAGS = cli.Flags("experiments.gpu.run", __doc__)
FLAGS.boolean("toy", False, "Toy sizes: a test of the script itself.")
FLAGS.words("skip", [], "Sections to leave out.")
FLAGS.integer("seconds", 540, "Limit of all sections together.", 1)
FLAGS.string("out", str(HERE / "results"), "Where the results go.")


def start(section: str, phase: str, given: cli.Flags, log: Any) -> subprocess.Popen:
    """A section's process, which prints its results as lines of JSON."""
    command = [sys.executable, "-m", "experiments.gpu.section", section, phase]
    own = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(".cache/gpu").absolute()),
        "XLA_PYTHON_CLIENT_PREALLOCATE": str(phase == "timed").lower(),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    }
    if given.toy:
        command.append("toy")
    pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
    return subprocess.Popen(command, env=os.environ | own, cwd=ROOT, **pipes)


def lines(process: subprocess.Popen, section: str, limit: float) -> list[dict[str, Any]]:
    """What a section has found until it ends, or its time does."""
    try:
        text, _ = process.communicate(timeout=max(1, limit))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        text += json.dumps({"section": section, "error": "out of time"}) + "\n"
    found = [json.loads(x) for x in text.splitlines() if x.startswith("{")]
    if process.returncode not in (0, -9):
        found.append(
            {"section": section, "error": f"exit status {process.returncode}, see the log"}
        )
    return found


def main(given: cli.Flags) -> None:
    """Run the sections, and write what they find."""
    out, begin = pathlib.Path(given.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("w") as file, (out / "log.txt").open("w") as log:

        def left() -> float:
            return given.seconds - (time.perf_counter() - begin)

        def write(found: list[dict[str, Any]]) -> None:
            for record in found:
                line = json.dumps(record)
                file.write(line + "\n")
                print(line[:400], flush=True)
            file.flush()

        names = [name for name in UNTIMED if name not in given.skip]
        started = [(name, start(name, "untimed", given, log)) for name in names]
        for name, process in started:
            write(lines(process, name, left()))
        write([{"section": "untimed", "seconds": time.perf_counter() - begin}])
        for name in TIMED:
            if name not in given.skip and left() > 5:
                since = time.perf_counter()
                write(lines(start(name, "timed", given, log), name, left()))
                write([{"section": name, "seconds_of_section": time.perf_counter() - since}])


if __name__ == "__main__":
    cli.run(main, FLAGS)
