"""SIGTERM and Ctrl-C: a command ends in good order, in time, by the statuses 143 and 130."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
PATIENCE = 10.0  # seconds until a command that does not end is ended


class Stopped(SystemExit):
    """A command was asked to stop, and has done what it does then.

    Args:
      number: of the signal; the status is 128 more.
      text: a line for the person who asked.
    """

    def __init__(self, number: int, text: str = ""):
        super().__init__(128 + number)
        self.text = text or f"stopped by {NAMES[number]}"


def stop(number: int) -> NoReturn:
    """Stop here and now."""
    raise Stopped(number)


def end(number: int, text: str = "") -> None:
    """End the process, whatever its threads do."""
    print(f"\n{Stopped(number, text).text}", file=sys.stderr, flush=True)
    os._exit(128 + number)


class Signals:
    """Answers SIGTERM and SIGINT while it is open; a context manager.

    Python's own handlers wait for the main thread, which may compile or compute for minutes. A
    thread looks after them.

    Args:
      noticed: called in the main thread, with the number of the signal.
      overdue: called in another one, where the context is still open ``patience`` seconds later.
      patience: seconds.
    """

    def __init__(
        self,
        noticed: Callable[[int], None] = stop,
        overdue: Callable[[int], None] = end,
        patience: float = PATIENCE,
    ):
        self._noticed, self._overdue, self._patience = noticed, overdue, patience
        self._closed = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals belong to the main thread
        self._bytes, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._outer = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of jobs in the background
                handler = signal.signal(number, lambda number, _: self._noticed(number))
                self._before[number] = handler
        threading.Thread(target=self._watch, daemon=True, name="signals").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._before:
            signal.set_wakeup_fd(self._outer)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._wakeup.close()

    def _watch(self) -> None:
        while received := self._bytes.recv(1):  # of every signal that Python handles
            if received[0] in NAMES and not self._closed.wait(self._patience):
                self._overdue(received[0])
