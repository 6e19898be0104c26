"""Runs programs that nobody has read: no network, no writes outside, bounded in all they use."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, BinaryIO

from sapo_jax.tasks.verifiers import jail

MODES = ("namespaces", "plain")
STARTUP = 30.0  # seconds; nothing of the program runs until then
GRACE = 0.3  # seconds after a test's limit in which the sandbox must have answered
FIRST_USER, USERS = 1_100_000_000, 1 << 24
_numbers = itertools.count(os.getpid() * 1000)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
      seconds: wall time of a test; its processor time may be a second more.
      memory_mb: address space of each process.
      disk_mb: the work folder; with ``plain``, each file.
      processes: processes and threads together; with ``plain``, none beside the program's own.
      output_bytes: what a test may print.
    """

    seconds: float = 6.0
    memory_mb: int = 1024
    disk_mb: int = 64
    processes: int = 8
    output_bytes: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one test ended, and what it printed or returned.

    ``status``: ok, error (exception or exit code), time, output (too much), or lost (the sandbox
    itself was gone).
    """

    status: str
    output: str = ""


class Sandbox:
    """One program in a sandbox of its own, test by test; a context manager.

    Args:
      program: Python source.
      function: call it (a method of ``Solution``, if there is one) instead of reading stdin.
      limits: what it may use.
      mode: one of ``MODES``; None: the first that the machine permits.
      python: interpreter; the default is the running one, without installed packages.

    Raises:
      RuntimeError: the machine does not permit the mode.
    """

    def __init__(
        self,
        program: str,
        *,
        function: str = "",
        limits: Limits | None = None,
        mode: str | None = None,
        python: str = "",
    ):
        self.limits, self.mode = limits or Limits(), mode or available()
        # What a test may print, which JSON may write sixfold.
        self._longest = 6 * self.limits.output_bytes + (1 << 20)
        self._folder = tempfile.mkdtemp(prefix="program-")
        self._python = os.path.realpath(python or sys.executable)
        self._process = subprocess.Popen(
            [self._python, "-I", "-S", jail.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            process_group=0,
        )
        setup = {
            "mode": self.mode,
            "program": program,
            "function": function,
            "folder": self._folder,
            "prefix": os.path.dirname(os.path.dirname(self._python)),
            "user": FIRST_USER + next(_numbers) % USERS,
            **dataclasses.asdict(self.limits),
        }
        if self._ask(setup, STARTUP).status != "ready":
            self.close()
            raise RuntimeError(
                f"this machine does not permit the sandbox {self.mode!r}, or its interpreter "
                f"{self._python} is not readable by other users"
            )

    def stdin(self, text: str) -> Outcome:
        """Run the program on an input; the output is what it printed."""
        return self._ask({"stdin": text}, self.limits.seconds + GRACE)

    def call(self, *arguments: Any) -> Outcome:
        """Call the function with JSON values; the output is its value as JSON."""
        return self._ask({"arguments": arguments}, self.limits.seconds + GRACE)

    def close(self) -> None:
        """Kill everything that runs in the sandbox, and remove its folder."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception):
        self.close()

    def _ask(self, message: dict, seconds: float) -> Outcome:
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            line = read_line(self._process.stdout, seconds, self._longest)
            return Outcome(**json.loads(line))
        except (OSError, EOFError, ValueError, TypeError):
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return Outcome("lost")


def read_line(pipe: BinaryIO, seconds: float, limit: float = math.inf) -> bytes:
    """A line of a process that cannot be trusted to write one.

    Raises:
      TimeoutError: there is none in time.
      EOFError: the process ended, or wrote more bytes than the limit.
    """
    deadline, pieces, size = time.monotonic() + seconds, [b""], 0
    while not pieces[-1].endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError("no answer in time")
        pieces.append(os.read(pipe.fileno(), 1 << 20))
        size += len(pieces[-1])
        if not pieces[-1] or size > limit:
            raise EOFError("the process ended, or says too much")
    return b"".join(pieces)


@functools.cache
def available() -> str:
    """The strongest of ``MODES`` that the machine permits.

    Raises:
      RuntimeError: none.
    """
    for mode in MODES:
        with contextlib.suppress(RuntimeError), Sandbox("print(1)", mode=mode) as sandbox:
            if sandbox.stdin("") == Outcome("ok", "1\n"):
                return mode
    raise RuntimeError(
        "no sandbox works here: run as a user who may create namespaces, or with an interpreter "
        "that other users can read"
    )
