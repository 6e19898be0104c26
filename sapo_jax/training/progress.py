"""Clocks of an iteration's phases, and the progress that a person sees."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from sapo_jax.cli import several

# Disjoint; their sum is the run's time.
WALL = ("time/startup", "time/iteration", "time/eval", "time/checkpoint")


class _Lines(io.TextIOBase):
    """Standard error for a bar that is no terminal's: a line for each of its states."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        if state := text.strip():
            print(state, file=sys.stderr, flush=True)
        return len(text)


class _Above(io.TextIOBase):
    """Standard error above the bars of a terminal, for what is logged."""

    def write(self, text: str) -> int:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr, end="")
        return len(text)


class Clock:
    """Seconds by phase since the last `lap`.

    Args:
      beat: called with the place whenever a phase starts or ends.
      check: called where a phase can be left, by raising.
    """

    def __init__(self, beat: Callable[[str], None] = str, check: Callable[[], None] = lambda: None):
        self._seconds: dict[str, float] = {}
        self._last: dict[str, tuple[float, float]] = {}  # when a phase began and ended
        self._beat, self.check = beat, check
        self.iteration = 0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time inside the context to a phase."""
        start = time.perf_counter()
        self._beat(f"phase {phase!r} of iteration {self.iteration}")
        try:
            yield
        finally:
            self._beat(f"iteration {self.iteration}, after phase {phase!r}")
            self._last[phase] = start, time.perf_counter()
            self.add(phase, self._last[phase][1] - start)

    def overlap(self, first: str, second: str) -> None:
        """Add the time in which two phases were last under way together to ``overlap``."""
        (begun, ended), (other_begun, other_ended) = self._last[first], self._last[second]
        together = min(ended, other_ended) - max(begun, other_begun)
        self.add("overlap", max(0.0, together))

    def add(self, phase: str, seconds: float) -> None:
        """Add time that was spent elsewhere, such as on other threads, to a phase."""
        self._seconds[phase] = self._seconds.get(phase, 0) + seconds

    def lap(self) -> dict[str, float]:
        """``time/<phase>`` of every phase, and start again."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}


class Progress:
    """A bar over iterations with the numbers that matter, and lines above it; a context manager.

    What is logged meanwhile has lines of its own, above the bar. In a file, where nothing can be
    overwritten, each state of the bar is a line, too.

    Args:
      total: iterations, of all runs together.
      description: what stands before the bar.
      unit: of what is counted.
    """

    def __init__(self, total: int, description: str, unit: str = "it"):
        self._named = {"total": total, "desc": description, "unit": unit}
        self._pass_at_1 = None

    @functools.cached_property
    def _bar(self) -> Any:
        from tqdm import tqdm

        shown, index = sys.stderr.isatty(), jax.process_index()
        return tqdm(
            **self._named, dynamic_ncols=True, mininterval=0.5 if shown else 10, disable=index > 0,
            file=None if shown else _Lines(),
        )  # fmt: skip

    def __enter__(self) -> Progress:
        self._handler = logging.get_absl_handler().python_handler
        if self._handler.stream is sys.stderr and sys.stderr.isatty():
            self._handler.setStream(_Above())
        return self

    def __exit__(self, *exception: object) -> None:
        if isinstance(self._handler.stream, _Above):
            self._handler.setStream(sys.stderr)
        if "_bar" in vars(self):
            self._bar.close()

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text)

    def note(self, text: str) -> None:
        """Show what is going on in place of the numbers; in a log, until iterations show it."""
        bar = self._bar
        bar.set_postfix_str(text, refresh=sys.stderr.isatty() or bar.n == bar.initial)

    def show(self, record: dict) -> None:
        """Show a record of metrics; the last Pass@1 stays until there is a new one."""
        self._pass_at_1 = record.get("eval/pass_at_1", self._pass_at_1)
        shown = {
            "reward": record.get("reward/mean"),
            "loss": record.get("policy/loss") if "reward/mean" not in record else None,
            "pass@1": self._pass_at_1,
        }
        parts = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
        if record.get("update/skipped"):
            parts.append(f"{record['update/skipped']:g} updates skipped")
        if "length/mean" in record:
            parts.append(f"length {record['length/mean']:.1f}")
        if "time/tokens_per_second" in record:
            parts.append(f"{record['time/tokens_per_second']:,.0f} tokens/s")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def step(self, count: int = 1) -> None:
        """One more iteration is done, or several."""
        self._bar.update(count)

    def skip(self, count: int) -> None:
        """Iterations were done before this start; they count for nothing in the speed."""
        for name in ("initial", "n", "last_print_n"):  # not all of them in a bar that is not shown
            setattr(self._bar, name, getattr(self._bar, name, 0) + count)


def mean_of(records: Sequence[dict]) -> dict[str, float]:
    """What the bar shows, as means over runs, and how many updates they skipped."""
    keys = ("reward/mean", "policy/loss", "eval/pass_at_1", "length/mean", "time/tokens_per_second")
    known = [key for key in keys if all(record.get(key) is not None for record in records)]
    means = {key: float(np.mean([record[key] for record in records])) for key in known}
    return means | {"update/skipped": sum(record.get("update/skipped", 0) for record in records)}


class Skips:
    """The updates that a run has skipped in a row, because a number was not finite.

    Args:
      most: so many of them stop the run.
      records: of its iterations so far.

    Attributes:
      why: the run has to stop; "" while it has not.
    """

    def __init__(self, most: int, records: Sequence[dict]):
        self.why, self._most, self._row = "", most, []
        for record in records:
            self.add(record)

    @property
    def doubtful(self) -> bool:
        """Whether the last update was skipped, and the run goes on: no state to keep for good."""
        return bool(self._row) and not self.why

    def add(self, record: dict) -> None:
        """An iteration more."""
        for index, minibatch in enumerate(record.get("minibatch") or (), start=1):
            first = minibatch.get("update/nonfinite")
            where = f"iteration {record['iteration']}, minibatch {index}"
            self._row = [*self._row, f"{first} in {where}"] if first else []
            if len(self._row) >= self._most and not self.why:
                self.why = (
                    f"{where}: {len(self._row)} updates in a row were skipped "
                    f"(config.learner.max_skipped={self._most}), of numbers that are not finite; "
                    f"the first was the {self._row[0]}"
                )


def reached(records: list[dict]) -> str:
    """The end of a run in one line, from its records."""
    seconds = sum(v for r in records for k, v in r.items() if k in WALL and v)
    count = several(records[-1]["iteration"], "iteration")
    parts = [f"{count} in {seconds / 60:.1f} minutes"]
    for name, key in (("reward", "reward/mean"), ("Pass@1", "eval/pass_at_1")):
        values = [r[key] for r in records if r.get(key) is not None]
        if values:
            parts.append(f"{name} {values[0]:.3f} → {values[-1]:.3f}")
    last = records[-1]
    if last.get("eval/pass_at_1_low") is not None:
        low, high = last["eval/pass_at_1_low"], last["eval/pass_at_1_high"]
        parts.append(f"95% interval {low:.3f} to {high:.3f}")
    return ", ".join(parts)
