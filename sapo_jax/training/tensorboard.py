"""TensorBoard events of records: numbers and histograms."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath


def write(directory: epath.Path, purge_step: int, records: Callable[..., Iterator[dict]]) -> None:
    """See `tracker.TRACKERS`; TensorBoard forgets what earlier starts wrote from a step on."""
    from tensorboardX import record_writer
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    place = os.fspath(directory)
    record_writer.directory_check(place)
    # Two writers of one second must not write one file.
    unique = f"{time.time():.0f}.{socket.gethostname()}.{secrets.token_hex(4)}"
    path = os.path.join(place, f"events.out.tfevents.{unique}")
    with contextlib.closing(record_writer.RecordWriter(path)) as writer:

        def event(**fields):
            writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

        event(file_version="brain.Event:2")
        event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        for record in records(writer.flush):
            for summary in _summaries(record):
                event(step=record["iteration"], summary=summary)


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
