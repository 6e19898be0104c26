"""What keeps long runs honest: a watchdog over the phases, and a clean stop when asked for one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

HUNG = 70  # exit status of a process that its watchdog ended


class Watchdog:
    """Ends the process when no phase of an iteration has finished for too long; a context manager.

    A collective waits for ever for a process that died, and a verifier may never return. A thread
    looks at the clock, since the main thread may be anywhere, inside XLA too.

    Args:
      timeout: seconds without a `beat`; 0: never ends the process.
      index: of the process, for the message.
    """

    def __init__(self, timeout: float, *, index: int = 0):
        self.timeout, self.index = timeout, index
        self._place, self._last = "start", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self, place: str) -> None:
        """A phase has finished; ``place`` says what comes next."""
        self._place, self._last = place, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self.timeout:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout / 4)):
            silent = time.monotonic() - self._last
            if silent > self.timeout:
                print(
                    f"error: process {self.index}: no phase has finished for {silent:.0f} s "
                    f"(config.distributed.timeout={self.timeout:g}), in {self._place}. Another "
                    "process may have died or hang, or a verifier may not return: read the logs of "
                    "all processes, then start all of them again by the same command; the run goes "
                    "on from its newest checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HUNG)


class Preemption:
    """Whether SIGTERM has been received."""

    def __init__(self):
        self.requested = False

    def _note(self, *_: object) -> None:
        self.requested = True


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Take SIGTERM as a request to save and stop, while the context is open."""
    seen = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield seen  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGTERM, seen._note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, before)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: all of them take the same branch."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
