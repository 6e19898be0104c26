"""Trackers beside the metrics, which are the truth: what fails here costs what they show."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import logging
from etils import epath

from sapo_jax.cli import missing
from sapo_jax.training import tensorboard, wandb

ROOM = 1000  # records that may wait for a slow disk
FLUSH = 10.0  # seconds
PATIENCE = 5.0  # seconds that the last records get when a run ends
# Each writes ``records(flush)`` until they end, in a directory of its name. ``purge_step`` is the
# first iteration that this start writes, perhaps once more; ``flush`` is called now and then.
TRACKERS: dict[str, Callable] = {"tensorboard": tensorboard.write, "wandb": wandb.write}


def listed(names: Iterable[str]) -> list[str]:
    """Names, each once; on a command line commas stand between them."""
    return list(dict.fromkeys(filter(None, ",".join(names).split(","))))


class Tracker:
    """Writes the numbers and histograms of records on a thread of its own.

    Nothing waits for it. What fails, or hangs, is dropped with one warning. (The thread of
    `tensorboardX.SummaryWriter`, when it dies, blocks for ever those who write to it.)

    Args:
      name: in TRACKERS.
      workdir: of the run; what is written is in ``<workdir>/<name>``.
      purge_step: see TRACKERS.
    """

    def __init__(self, name: str, workdir: epath.Path, purge_step: int):
        self._name, self._directory, self._purge_step = name, workdir / name, purge_step
        self._records: queue.Queue = queue.Queue(ROOM)
        self._dropped = False
        self._thread = threading.Thread(target=self._guarded, daemon=True, name=name)
        self._thread.start()

    def write(self, record: dict[str, Any] | None) -> None:
        """Add a record, whose "iteration" is the step; None is the end."""
        if not self._dropped:
            try:
                self._records.put_nowait(record)
            except queue.Full:
                self._drop(f"{ROOM} records wait to be written")

    def close(self) -> None:
        """Let the last records be written."""
        self.write(None)
        if not self._dropped:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._drop(f"the last ones take longer than {PATIENCE:g} s")

    def _drop(self, why: object) -> None:
        self._dropped = True
        text = "No records are written to %s, by %s: %s"
        logging.warning(text, self._directory, self._name, why)

    def _guarded(self) -> None:
        try:
            TRACKERS[self._name](self._directory, self._purge_step, self._until_end)
        except ImportError as error:
            self._drop(missing(error))
        except Exception as error:
            self._drop(error)

    def _until_end(self, flush: Callable[[], None] = lambda: None) -> Iterator[dict[str, Any]]:
        flushed = -math.inf
        while True:
            with contextlib.suppress(queue.Empty):
                record = self._records.get(timeout=FLUSH)
                if record is None:
                    return
                yield record
            if time.monotonic() - flushed > FLUSH:
                flush()
                flushed = time.monotonic()
