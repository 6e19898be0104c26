"""Runs of one process or several: how they start, agree, watch each other, and stop when asked."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

HUNG = 70  # exit status of a process that its watchdog ended
HEARTBEAT = 100  # seconds after which a process that has died, or was suspended, ends the others
AGAIN = (
    "Another process may have died or hang, or a verifier may not return: read the logs of all "
    "processes, then start all of them again by the same command; the run goes on from its newest "
    "checkpoint."
)


def _in_cluster() -> bool:
    """Whether the environment says that this process is one of several, or a TPU host."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(int(os.environ.get(name, "1")) > 1 for name in counts)
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    chips = epath.Path("/dev").glob("accel[0-9]*"), epath.Path("/dev/vfio").glob("[0-9]*")
    has_tpu = importlib.util.find_spec("libtpu") is not None and any(map(any, chips))
    return several or ("tpu" in platforms and has_tpu)


def start(address: str | None, count: int | None, index: int | None, *, timeout: float = 0) -> None:
    """Join the other processes of a run; before anything else of JAX.

    Args:
      address: of process 0, ``host:port``.
      count: of processes.
      index: of this one.
      timeout: the watchdog's seconds; a process that answers no more ends the others after that
        time, or after HEARTBEAT if that is less.

    Without any of them the environment decides: under SLURM (``srun``) and Open MPI where there are
    several tasks, and on TPU hosts (Cloud TPU VMs, GKE), `jax.distributed.initialize` finds the
    others by itself; elsewhere there is one process.

    Raises:
      ValueError: some of address, count and index are missing, or out of range.
    """
    heartbeat = int(min(HEARTBEAT, timeout + 5)) if timeout else HEARTBEAT
    given = {"--coordinator": address, "--processes": count, "--process": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if _in_cluster():
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
        return
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: give all of {', '.join(given)}, or none")
    if not 0 <= index < count:
        raise ValueError(f"--process={index}: must be from 0 to --processes={count} less 1")
    if ":" not in address:
        raise ValueError(f"--coordinator={address!r}: must be host:port, of process 0")
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=heartbeat)


def end(status: int) -> None:
    """End a process of several that has failed, now: leaving in good order waits for the others."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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

    def __exit__(self, kind: Any, error: BaseException | None, *trace: object) -> None:
        self._stopped.set()
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            error.add_note(f"process {self.index}, in {self._place}. {AGAIN}")

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout / 4)):
            silent = time.monotonic() - self._last
            if silent > self.timeout:
                print(
                    f"error: process {self.index}: no phase has finished for {silent:.0f} s "
                    f"(config.distributed.timeout={self.timeout:g}), in {self._place}. {AGAIN}",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()  # where the threads are
                os._exit(HUNG)


def all_gather(value: np.ndarray) -> np.ndarray:
    """The values of all processes, [processes, …]; every process must ask."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: all of them take the same branch."""
    return bool(all_gather(np.array(flag)).any())


def broadcast_from_first(value: int | None) -> int | None:
    """What process 0 says; None or a number ≥ 0."""
    first = int(all_gather(np.int32(-1 if value is None else value))[0])
    return None if first < 0 else first


def first_says(flag: bool) -> bool:
    """Whether process 0 has the flag set: what it reads of files need not be what others see."""
    return bool(all_gather(np.array(flag))[0])


def first_of(rows: list[dict]) -> list[dict]:
    """The rows, as JSON holds them, of the first process that has any."""
    if jax.process_count() == 1:
        return rows
    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    sizes = all_gather(np.int32(len(text) if rows else 0))
    if not sizes.any():
        return rows
    every = all_gather(np.pad(text, (0, max(0, sizes.max() - len(text))))[: sizes.max()])
    first = int(np.flatnonzero(sizes)[0])
    return json.loads(every[first, : sizes[first]].tobytes())


@contextlib.contextmanager
def only_first(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """A context that process 0 enters alone.

    Raises:
      Exception: what entering it raised; in the other processes RuntimeError.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(context)
            except Exception as refused:
                error = refused
        if any_process(error is not None):
            raise error or RuntimeError("process 0 does not start; its message says why")
        yield
