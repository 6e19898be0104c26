"""What a run does that is asked to stop: it saves the last iteration that it has finished.

The loop can stop between the segments of a rollout, the phases of an iteration and, of a long one,
its updates. An update takes the buffers of the state that it starts from. Where what follows is
long, a copy on the host is taken before; where it is short, it is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sapo_jax.cli import signals
from sapo_jax.parallel import distributed
from sapo_jax.training import startup
from sapo_jax.training.checkpoint import Checkpoints
from sapo_jax.training.engine import Bundle
from sapo_jax.training.lease import Lease

PATIENCE = 6.0  # seconds that a loop gets to come to where it can stop
OFTEN = 2.0  # seconds between two looks of several processes at each other, about
SHORT = 5.0  # seconds from the first update of an iteration to its end, without a copy


class Interrupted(BaseException):
    """A signal has asked to stop, and the loop is where it can."""


class Finished(NamedTuple):
    """Runs behind an iteration, as they are saved."""

    iteration: int
    bundles: Sequence[Bundle]
    positions: list[dict]  # of the streams, which go on while the next iteration is under way
    score: float | None = None
    copied: bool = False  # states are made again from the host

    @classmethod
    def now(cls, iteration: int, bundles: Sequence[Bundle], score: float | None = None):
        """The runs as they stand."""
        positions = [stream.position for bundle in bundles for stream in bundle.streams]
        own = [b._replace(carry=b.carry and b.carry.copy()) for b in bundles]
        return cls(iteration, own, positions, score)

    def copy(self) -> Finished:
        """The same on the host, whatever becomes of the device's buffers."""
        bundles = [b._replace(state=jax.tree.map(_copied, b.state)) for b in self.bundles]
        return self._replace(bundles=bundles, copied=True)

    def states(self) -> list[Bundle]:
        """The runs with their states on the device."""
        if not self.copied:
            return list(self.bundles)
        return [b._replace(state=jax.tree.map(lambda x: x(), b.state)) for b in self.bundles]


def _copied(x: jax.Array):
    """A function that makes an array again, from this process's parts of it."""
    parts = [(part.device, np.array(part.data)) for part in x.addressable_shards]

    def again():
        placed = [jax.device_put(data, device) for device, data in parts]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)

    return again


class Stop:
    """Between a loop, its checkpoints and the signals that end it.

    Args:
      checkpoints: of the loop.
      lease: of their directory; a run that has lost it writes nothing more.
      minutes: between checkpoints, at most; 0: as long as it takes.
      alone: see `startup.save`.
    """

    def __init__(self, checkpoints: Checkpoints, lease: Lease, minutes: float, *, alone: bool):
        self._checkpoints, self._lease, self._alone = checkpoints, lease, alone
        self._minutes = minutes
        self._number = 0  # of the signal
        self._lock = threading.RLock()  # held while there is nothing to save, or it is saved
        self._held = self._saving = False
        self._seconds: dict[tuple[bool, ...], float] = {}  # see SHORT; by kind of iteration
        self._saved_at = time.monotonic()
        self._calls, self._stride, self._begun = 0, 1, time.monotonic()  # of `pause`
        self._saved = 0
        self._finished: Finished | None = None

    def signals(self) -> signals.Signals:
        """The context in which signals stop the loop."""
        return signals.Signals(self._note, self._overdue, PATIENCE)

    def begin(self, iteration: int, bundles: Sequence[Bundle]) -> None:
        """These runs are in the checkpoints, or new."""
        self._finished, self._saved = Finished.now(iteration, bundles), iteration

    def check(self) -> None:
        """Leave the iteration here, if that was asked for; all processes have to come by."""
        if not self._held and distributed.any_process(self._number != 0):
            raise Interrupted

    def pause(self) -> None:
        """`check` between segments, which may be many: now and then, if it takes a collective."""
        self._calls += 1
        if jax.process_count() == 1 or self._calls % self._stride == 0:
            self.check()

    def hold(self, *, evaluates: bool, apart: bool = False) -> Callable[[], None] | None:
        """Updates are to come, which take the buffers of what is finished.

        Iterations that evaluate, and those that sample meanwhile, take their own time.

        Returns:
          What to call between them, which may raise; None where they are short.
        """
        self._since, self._kind = time.monotonic(), (evaluates, apart)
        each = (self._since - self._begun) / max(1, self._calls)
        times = [self._seconds.get(self._kind, 1e9), each]
        expected, each = distributed.all_gather(np.array(times, np.float32)).max(0)
        self._calls, self._stride = 0, max(1, int(OFTEN / max(each, 1e-3)))
        if expected > SHORT:
            with self._lock:
                self._finished = self._finished.copy()
            return self.check
        self._lock.acquire()
        self._held = True
        return None

    def finish(self, finished: Finished) -> None:
        """An iteration is done and recorded."""
        with self._lock:
            self._finished = finished
            self._seconds[self._kind] = time.monotonic() - self._since

    def wants_saving(self) -> bool:
        """Whether a signal, or the time, asks for a checkpoint."""
        late = 0 < 60 * self._minutes < time.monotonic() - self._saved_at
        return distributed.any_process(self._number != 0 or late)

    def save(self) -> None:
        """Start saving what is finished, where it is not saved."""
        with self._lock:
            self._save()

    def release(self) -> None:
        """The next iteration may be left."""
        self._begun = time.monotonic()
        if self._held:
            self._held = False
            self._lock.release()

    def leave(self) -> signals.Stopped:
        """What to raise, when what is finished is saved."""
        with self._lock:
            self._save()
            self._checkpoints.wait()
        number = int(distributed.all_gather(np.int32(self._number)).max())
        return signals.Stopped(number, self._text(number))

    def _save(self) -> None:
        self._saving, done = True, self._finished
        self._lease.check()
        if done.iteration > self._saved:
            startup.save(
                self._checkpoints, done.iteration, done.states(), done.positions,
                alone=self._alone, score=done.score,
            )  # fmt: skip
            self._saved, self._saved_at = done.iteration, time.monotonic()
        self._saving = False

    def _text(self, number: int) -> str:
        what = f"iteration {self._saved} is saved; " if self._saved else ""
        return f"stopped by {signals.NAMES[number]}: {what}the same command goes on"

    def _note(self, number: int) -> None:
        if number == self._number == signals.signal.SIGINT:
            raise KeyboardInterrupt  # for the second time
        self._number = number

    def _overdue(self, number: int) -> None:
        """The main thread computes on: save beside it, and end."""
        unsaved = self._finished is not None and self._finished.iteration > self._saved
        if unsaved and jax.process_count() > 1:
            return  # saving takes all of them
        if self._lock.acquire(timeout=SHORT) or (self._saving and self._lock.acquire()):
            try:
                if self._finished is not None:
                    self._save()
                    self._checkpoints.wait()
            except Exception as error:
                logging.error("Iteration %d is not saved: %s", self._finished.iteration, error)
        signals.end(number, self._text(number))
