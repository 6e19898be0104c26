"""One process at a time in a run directory."""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import math
import os
import secrets
import signal
import socket
import threading
import time

from absl import logging
from etils import epath

from sapo_jax.training import files
from sapo_jax.training.files import normal, read_json, write_json

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0


class Lease:
    """Keeps a second process out of a run directory while the context is open.

    On a local disk an OS lock decides, which the kernel frees even after SIGKILL; on gs:// a
    heartbeat in lease.json, younger than 60 s, refuses. A run that finds its lease taken (it was
    suspended for longer), or its directory deleted, gets a KeyboardInterrupt.
    """

    def __init__(self, workdir: epath.PathLike):
        self._workdir = normal(workdir)
        self._file = self._workdir / "lease.json"
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": secrets.token_hex(16),
            "started": time.time(),
        }
        self._lock: int | None = None
        self._lost = ""  # why
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease, or raise RuntimeError if another process holds it."""
        self._workdir.mkdir(parents=True, exist_ok=True)
        if not files.is_remote(self._workdir):
            self._take_lock()
        else:
            held = read_json(self._file, {"heartbeat": float}) or {"heartbeat": -math.inf}
            if time.time() - held["heartbeat"] < EXPIRY_SECONDS:
                raise self._refusal()
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(ValueError):  # broken, so not ours
            if self._read().get("token") == self._mine["token"]:
                self._file.unlink()
        gone = self._deleted()
        self._close_lock()
        if gone and any(isinstance(one, Exception) for one in exception):
            raise RuntimeError(f"{gone}: nothing more is written")  # whatever failed by it

    def check(self) -> None:
        """Raise RuntimeError if another process has taken the lease, or the directory is gone."""
        if why := self._lost or self._deleted():
            raise RuntimeError(f"{why}: nothing more is written")

    def _deleted(self) -> str:
        gone = self._lock is not None and os.fstat(self._lock).st_nlink == 0
        return f"{self._workdir} was deleted while a run worked there" if gone else ""

    def _taken(self) -> str:
        other = self._read().get("token", self._mine["token"]) != self._mine["token"]
        return f"another process took {self._workdir}" if other else ""

    def _take_lock(self) -> None:
        self._lock = os.open(self._workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close_lock()
            raise self._refusal() from None
        # A forked worker would share the lock and hold it beyond the death of this process.
        os.register_at_fork(after_in_child=self._close_lock)

    def _close_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._lost = self._deleted() or self._taken()
                if self._lost:
                    logging.error("%s: stopping.", self._lost)
                    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                        os._exit(1)  # in the background of a script, no interrupt would arrive
                    _thread.interrupt_main()
                    return
                self._write()
            except Exception as error:  # the next beat may get through
                logging.warning("No heartbeat in %s: %s", self._file, error)

    def _read(self) -> dict:
        return read_json(self._file) or {}

    def _write(self) -> None:
        write_json(self._file, self._mine | {"heartbeat": time.time()})

    def _refusal(self) -> RuntimeError:
        other = {"pid": "unknown", "host": "unknown"}
        with contextlib.suppress(ValueError):  # broken; the lock is there all the same
            other |= self._read()
        return RuntimeError(
            f"run directory {self._workdir} is in use by process {other['pid']} on host "
            f"{other['host']}; expected to be alone in it: end that process or wait for it (on "
            f"gs://, {EXPIRY_SECONDS:.0f} s beyond its death), or give another --workdir"
        )
