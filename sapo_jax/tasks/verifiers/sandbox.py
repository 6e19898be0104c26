"""Runs programs that nobody has read: no network, no writes outside, bounded in all they use.

``docs/sandbox.md`` says what each mode promises, and what it does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import glob
import importlib.util
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

MODES = ("namespaces", "plain")
JAIL = os.path.join(os.path.dirname(__file__), "jail")
LIBRARIES = ("landlockpy", "seccompy")  # of the interpreter that runs this, for that of the jail
PREFIX = "sapo-program-"
STARTUP = 30.0  # seconds; nothing of the program runs until then
GRACE = 5.0  # seconds after a test's limit, which the sandbox itself watches, until it is given up
FIRST_USER, USERS = 1_100_000_000, 1 << 24
HELP = {
    "namespaces": "Let users create namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a "
    "container also its seccomp profile), or ask for weaker isolation by name: isolation='plain'",
    "plain": "The option python must name an interpreter that other users can read, such as "
    "/usr/bin/python3",
}
_numbers = itertools.count(os.getpid() * 1000)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
      seconds: wall time of a test; its processor time may be a second more.
      memory_mb: address space of each process.
      disk_mb: the work folder; with ``plain``, each file.
      processes: processes and threads together; with ``plain``, threads.
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
      mode: one of ``MODES``.
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
        mode: str = MODES[0],
        python: str = "",
    ):
        self.limits, self.mode = limits or Limits(), mode
        # What a test may print, which JSON may write sixfold.
        self._longest = 6 * self.limits.output_bytes + (1 << 20)
        self._folder, self._held = _work_folder() if mode == "plain" else ("", None)
        self._python = os.path.realpath(python or sys.executable)
        self._process = subprocess.Popen(
            [self._python, "-I", "-S", JAIL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            process_group=0,
        )
        setup = {
            "mode": mode,
            "program": program,
            "function": function,
            "folder": self._folder,
            "packages": _packages(),
            "user": FIRST_USER + next(_numbers) % USERS,
            **dataclasses.asdict(self.limits),
        }
        started = self._ask(setup, STARTUP)
        self.locks = started.output
        if started.status != "ready":
            self.close()
            reason = started.output or f"{self._python} did not answer"
            raise RuntimeError(
                f"this machine does not permit the sandbox {mode!r}: {reason}. {HELP[mode]}. "
                "See docs/sandbox.md"
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
        if self._folder:
            _remove(self._folder)
            with contextlib.suppress(OSError):
                os.close(self._held)
            self._folder = ""

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


def check(mode: str, python: str = "") -> str:
    """Try a mode; returns what else the kernel locks, in words.

    Raises:
      RuntimeError: it does not work here.
    """
    with Sandbox("print(1)", mode=mode, python=python) as sandbox:
        found = sandbox.stdin("")
        if found != Outcome("ok", "1\n"):
            raise RuntimeError(f"the sandbox {mode!r} starts, but runs nothing: {found.status}")
        return sandbox.locks


@functools.cache
def _packages() -> list[str]:
    """The folders in which the libraries for the kernel's locks lie, where they are installed."""
    found = filter(None, map(importlib.util.find_spec, LIBRARIES))
    return list(dict.fromkeys(os.path.dirname(os.path.dirname(spec.origin)) for spec in found))


def _work_folder() -> tuple[str, int]:
    """A folder, and the file descriptor whose lock says that this process lives."""
    _remove_stale()
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        if os.path.exists(folder):  # else another process has taken it for a dead one's
            return os.path.realpath(folder), held
        os.close(held)


@functools.cache
def _remove_stale() -> None:
    """Remove the folders of processes that were killed; their locks ended with them."""
    for folder in glob.glob(os.path.join(tempfile.gettempdir(), PREFIX + "*")):
        with contextlib.suppress(OSError):
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
            finally:
                os.close(held)


def _remove(folder: str) -> None:
    with contextlib.suppress(RecursionError):  # of a depth that nobody needs
        shutil.rmtree(folder, ignore_errors=True)
