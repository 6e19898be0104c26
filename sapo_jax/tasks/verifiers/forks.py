"""Calls that may hang, crash or eat memory: each in a forked child of a warm, spawned process.

The spawned server imports once what the calls need and forks a child for each of them: a child that
is killed costs no second import, and the server itself never touches what a policy wrote.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO

GRACE = 0.5  # seconds between the limit of a call and the kill of a server that does not answer
STARTUP = 120.0  # seconds in which a server must have made its imports
MAX_REPLY = 1 << 16  # bytes


class Forks:
    """Calls one function of (str, ...) -> JSON value, ``workers`` at a time, from any thread.

    Args:
      function: ``"package.module:name"``; a ``warm_up`` beside it is called once per server.
      workers: servers, started when they are first needed.
      seconds: processor time of a call, so that verdicts do not depend on a busy machine.
      wall: seconds of any kind after which a call is given up; None: ten times ``seconds``.
      memory_mb: address space of a call.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int = 1,
        seconds: float = 1.0,
        wall: float | None = None,
        memory_mb: int = 2048,
    ):
        self._command = function, seconds, wall or 10 * seconds, memory_mb
        self._idle: queue.LifoQueue = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._servers: set[_Server] = set()
        self._lock = threading.Lock()
        self.workers = workers

    def start(self) -> None:
        """Start every server now, instead of when the first calls need them."""
        servers = [self._take() for _ in range(self.workers)]
        for server in servers:
            self._idle.put(server)

    def call(self, *arguments: str) -> Any:
        """The function's value, or None where it raised, crashed, or ran out of time or memory."""
        server = self._take()
        try:
            for _ in range(2):
                try:
                    return server.call(arguments)
                except (TimeoutError, ValueError):
                    self._drop(server)
                    return None
                except (OSError, EOFError):  # killed from outside; a call cannot do that
                    self._drop(server)
                    server = self._new()
            return None
        finally:
            self._idle.put(server)

    def close(self) -> None:
        """End the servers; a later call starts new ones."""
        with self._lock:
            servers, self._servers = self._servers, set()
        for server in servers:
            server.kill()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        self.close()

    def _take(self) -> _Server:
        server = self._idle.get()
        if server is not None and server.alive:
            return server
        try:
            if server is not None:
                self._drop(server)
            return self._new()
        except BaseException:
            self._idle.put(None)
            raise

    def _new(self) -> _Server:
        server = _Server(*self._command)
        with self._lock:
            self._servers.add(server)
        return server

    def _drop(self, server: _Server) -> None:
        server.kill()
        with self._lock:
            self._servers.discard(server)


class _Server:
    """The parent's end of one server; one call at a time."""

    def __init__(self, function: str, seconds: float, wall: float, memory_mb: int):
        self._wall = wall
        code = f"from {__name__} import serve; serve({function!r}, {seconds}, {wall}, {memory_mb})"
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            read_line(self._process.stdout, STARTUP)
        except (EOFError, TimeoutError):
            self.kill()
            module = function.partition(":")[0]
            raise RuntimeError(
                f"the process for {function} did not start; to see why: python -c 'import {module}'"
            ) from None

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, arguments: tuple[str, ...]) -> Any:
        self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(read_line(self._process.stdout, self._wall + GRACE))

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


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


def serve(function: str, seconds: float, wall: float, memory_mb: int) -> None:
    """The server's loop: a line of JSON arguments in, a line with the JSON value out."""
    module, _, name = function.partition(":")
    loaded = importlib.import_module(module)
    getattr(loaded, "warm_up", lambda: None)()
    requests, replies = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # nothing that a library prints is taken for a reply
    os.write(replies, b"ready\n")
    for line in requests:
        reply = _in_child(getattr(loaded, name), line, seconds, wall, memory_mb)
        os.write(replies, reply + b"\n")


def _in_child(function, line: bytes, seconds: float, wall: float, memory_mb: int) -> bytes:
    """The value as JSON, computed in a child; ``null`` where there is none in time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal kills, also inside C code
            resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.write(writer, json.dumps(function(*json.loads(line))).encode()[:MAX_REPLY])
        finally:
            os._exit(0)
    os.close(writer)
    reply, deadline = b"", time.monotonic() + wall
    while (left := deadline - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        data = os.read(reader, MAX_REPLY)
        reply += data
        if not data:
            break
    else:
        reply = b""
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        json.loads(reply)
    except ValueError:
        return b"null"
    return reply
