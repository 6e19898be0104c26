"""TensorBoard events beside the metrics, which are the truth: what fails here costs the events."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from sapo_jax.cli import missing

ROOM = 1000  # records that may wait for a slow disk
FLUSH = 10.0  # seconds
PATIENCE = 5.0  # seconds that the last events get when a run ends


class Tracker:
    """Writes the numbers and histograms of records on a thread of its own; a context manager.

    Nothing waits for it. What fails, or hangs, is dropped with one warning. (The thread of
    `tensorboardX.SummaryWriter`, when it dies, blocks for ever those who write to it.)

    Args:
      directory: of the event files.
      purge_step: TensorBoard forgets what earlier starts wrote of this step and later ones.
    """

    def __init__(self, directory: epath.PathLike, purge_step: int):
        self._directory, self._purge_step = os.fspath(directory), purge_step
        self._records: queue.Queue = queue.Queue(ROOM)
        self._dropped = False
        self._thread = threading.Thread(target=self._guarded, daemon=True, name="tracker")
        self._thread.start()

    def write(self, record: dict[str, Any] | None) -> None:
        """Add a record, whose "iteration" is the step; None is the end."""
        if not self._dropped:
            try:
                self._records.put_nowait(record)
            except queue.Full:
                self._drop(f"{ROOM} records wait to be written")

    def close(self) -> None:
        """Let the last events be written."""
        self.write(None)
        if not self._dropped:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._drop(f"the last ones take longer than {PATIENCE:g} s")

    def _drop(self, why: object) -> None:
        self._dropped = True
        logging.warning("No TensorBoard events are written to %s: %s", self._directory, why)

    def _guarded(self) -> None:
        try:
            self._write_all()
        except ImportError as error:
            self._drop(missing(error))
        except Exception as error:
            self._drop(error)

    def _write_all(self) -> None:
        from tensorboardX import record_writer
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        record_writer.directory_check(self._directory)
        # Two writers of one second must not write one file.
        unique = f"{time.time():.0f}.{socket.gethostname()}.{secrets.token_hex(4)}"
        path = os.path.join(self._directory, f"events.out.tfevents.{unique}")
        with contextlib.closing(record_writer.RecordWriter(path)) as writer:

            def write(**fields):
                writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

            write(file_version="brain.Event:2")
            write(step=self._purge_step, session_log=SessionLog(status=SessionLog.START))
            for record in self._until_end(writer.flush):
                for summary in _summaries(record):
                    write(step=record["iteration"], summary=summary)

    def _until_end(self, flush: Callable[[], None]) -> Iterator[dict[str, Any]]:
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


def _summaries(record: dict[str, Any]) -> Iterator[Any]:
    from tensorboardX import summary

    for key, value in record.items():
        if isinstance(value, int | float):
            yield summary.scalar(key, value)
        elif key.startswith("histogram/") and None not in value["edges"]:
            edges, counts = value["edges"], value["counts"]
            middles = np.add(edges[1:], edges[:-1]) / 2
            moments = sum(counts), np.dot(counts, middles), np.dot(counts, middles**2)
            ends = edges[0], edges[-1]
            yield summary.histogram_raw(key, *ends, *moments, edges[1:], counts)
