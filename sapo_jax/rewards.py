"""From sampled rows to rewards: decode the completions, have their task judge them, add parts."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.parallel import distributed
from sapo_jax.tasks import own
from sapo_jax.tasks.base import Example, Task
from sapo_jax.tasks.verifiers.writing import switching
from sapo_jax.types import STOP

_THINK = re.compile(r"</?think>")
PARTS = ("accuracy", "format", "overlong", "repetition", "language")
NOTICE = 300.0  # seconds after which the verdicts that a run waits for are mentioned
PATIENCE = 5.0  # seconds that the last verdicts get when a scorer closes


class Row(NamedTuple):
    """What the reward of one completion depends on."""

    example: Example
    completion: str
    finished: int  # types.STOP or types.LENGTH
    length: int  # tokens


def rows_of(
    examples: Sequence[Example],
    completions: Sequence[str],
    finished_B: np.ndarray,
    length_B: np.ndarray,
) -> list[Row]:
    """The rows of a batch, one by one.

    Args:
      examples: B examples, what each row was asked.
      completions: B texts.
      finished_B: i32[B], ``types.STOP`` or ``types.LENGTH``.
      length_B: i32[B], completion tokens.

    Raises:
      ValueError: the lengths differ.
    """
    finished_B, length_B = np.asarray(finished_B), np.asarray(length_B)
    rows = len(examples)
    if len(completions) != rows or finished_B.shape != (rows,) or length_B.shape != (rows,):
        raise ValueError(
            f"examples, completions, finished and length must have one entry per row, got {rows}, "
            f"{len(completions)} and shapes {finished_B.shape}, {length_B.shape}"
        )
    columns = examples, completions, finished_B.tolist(), length_B.tolist()
    return [Row(*row) for row in zip(*columns, strict=True)]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A reward as a weighted sum of named parts: R = Σ weight · part.

    The default is the task's verdict alone. DeepSeek-R1's (arXiv 2501.12948, §2.2.2) is
    ``Recipe(format=…, think=True)``.

    Args:
      accuracy: weight of the task's verdict, in [0, 1]; 0 where the row ran out of length.
      function: "my.py:name", see `tasks.own.reward`: takes the verdict's place, and its weight.
      format: weight of "``<think>``, ``</think>``, answer", 0 or 1.
      overlong: weight p of the soft penalty min(0, −(|y| − (max_length − buffer)) / buffer),
        from 0 to −1 inside the buffer (DAPO, arXiv 2503.14476, Eq. 13).
      repetition: weight of −(1 − distinct n-grams / n-grams), from 0 to −1, over the words.
      language: weight of −(share of letters in another writing system than the prompt's), from −1
        to 0, see `tasks.verifiers.writing`.
      think: the task judges only what follows ``</think>``; a row without it gets accuracy 0.
      opened: the prompt already ends with ``<think>``, so that completions lack it.
      max_length: L_max, tokens; needed for overlong.
      buffer: B, tokens before L_max over which the penalty grows.
      ngram: words of an n-gram.

    Raises:
      ValueError: a weight is negative, or a field is out of its range.
    """

    accuracy: float = 1.0
    function: str = ""
    format: float = 0.0
    overlong: float = 0.0
    repetition: float = 0.0
    language: float = 0.0
    think: bool = False
    opened: bool = False
    max_length: int = 0
    buffer: int = 0
    ngram: int = 4
    call: Callable | None = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "call", own.reward(self.function) if self.function else None)
        for name in PARTS:
            weight = getattr(self, name)
            if not 0 <= weight < np.inf:
                raise ValueError(f"reward.{name} must be a number >= 0, got {weight!r}")
        if self.ngram < 1:
            raise ValueError(f"reward.ngram must be at least 1, got {self.ngram}")
        if self.overlong and not 1 <= self.buffer <= self.max_length:
            raise ValueError(
                f"reward.overlong={self.overlong} needs reward.buffer={self.buffer} in [1, "
                f"reward.max_length={self.max_length}]"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The parts that are measured, with their weights; accuracy always is."""
        first = {"accuracy": self.accuracy}
        if self.call:
            first = {"accuracy": 0.0, "function": self.accuracy}
        return first | {n: getattr(self, n) for n in PARTS[1:] if getattr(self, n)}


def judge(task: Task, row: Row, recipe: Recipe, index: int = 0) -> dict[str, float]:
    """The unweighted parts of one row, those of ``recipe.weights``.

    Raises:
      ValueError: the task's verdict is no number of [0, 1].
    """
    thought, answer = split_thought(row.completion, opened=recipe.opened)
    judged = row
    if recipe.think:
        judged = row._replace(completion=answer) if thought is not None else None
    values = {
        "function": lambda: recipe.call(
            row.example, row.completion, row.finished == STOP, row.length
        ),
        "accuracy": lambda: _verdict(task, judged, index) if judged else 0.0,
        "format": lambda: float(row.finished == STOP and thought is not None and bool(answer)),
        "overlong": lambda: overlong(row.length, recipe.max_length, recipe.buffer),
        "repetition": lambda: repetition(row.completion, recipe.ngram),
        "language": lambda: switching(row.example.prompt, row.completion),
    }
    return {name: values[name]() for name in recipe.weights}


def split_thought(completion: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Thought and answer of ``<think>thought</think>answer``, both stripped.

    Returns:
      (None, "") where the tags are not one at the start and one behind it.
    """
    text = f"<think>{completion}" if opened else completion.strip()
    tags = list(_THINK.finditer(text))
    if [tag[0] for tag in tags] != ["<think>", "</think>"] or tags[0].start():
        return None, ""
    return text[tags[0].end() : tags[1].start()].strip(), text[tags[1].end() :].strip()


def overlong(length: int, max_length: int, buffer: int) -> float:
    """min(0, −(length − (max_length − buffer)) / buffer), ≥ −1 (arXiv 2503.14476, Eq. 13)."""
    return max(-1.0, min(0.0, -(length - (max_length - buffer)) / buffer))


def repetition(text: str, ngram: int) -> float:
    """−(1 − distinct / all) of the n-grams of words; 0 for fewer than two (arXiv 2502.03373)."""
    words = text.split()
    grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return len(set(grams)) / len(grams) - 1.0 if len(grams) > 1 else 0.0


def combine(parts: Sequence[dict[str, float]], recipe: Recipe) -> tuple[np.ndarray, dict]:
    """Rewards of judged rows, and the mean of every part.

    Args:
      parts: B results of ``judge``.
      recipe: the weights.

    Returns:
      f32[B], larger is better; and ``reward/<part>`` (unweighted) for each part.
    """
    columns = {name: np.array([p[name] for p in parts], np.float32) for name in recipe.weights}
    total_B = np.zeros(len(parts), np.float32)
    for name, weight in recipe.weights.items():
        total_B += np.float32(weight) * columns[name]
    metrics = {f"reward/{n}": float(x.mean()) if len(parts) else 0.0 for n, x in columns.items()}
    return total_B, metrics


class Verdict(NamedTuple):
    """What ``judge`` found, and the seconds that it took."""

    parts: dict[str, float]
    seconds: float


class Scorer:
    """Scores rows on threads, so that slow tasks overlap work on the device; a context manager.

    A task that computes for long does so in processes of its own (``tasks.verifiers``),
    which it replaces when they die: the threads here only wait for them. A verdict that never
    comes keeps no process alive: the threads are daemons.

    Args:
      task: judges the completions.
      recipe: the parts and their weights.
      workers: rows judged at a time.

    Raises:
      ValueError: workers is less than 1.
    """

    def __init__(self, task: Task, recipe: Recipe | None = None, *, workers: int = 1):
        if workers < 1:
            raise ValueError(f"workers={workers}: must be at least 1")
        self.task = task
        self.recipe = recipe or Recipe()
        self._rows: SimpleQueue = SimpleQueue()  # (future, row, index), or None to end a thread
        self._judged: dict[Thread, Row] = {}  # at the moment
        self._error: BaseException | None = None  # the first
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, rows: Sequence[Row]) -> list[Future[Verdict]]:
        """Start to judge rows; returns the future verdict of each."""
        futures: list[Future[Verdict]] = [Future() for _ in rows]
        for item in zip(futures, rows, range(len(futures)), strict=True):
            self._rows.put(item)
        return futures

    def wait(self, futures: Sequence[Future[Verdict]]) -> None:
        """Return when all are done, or raise the error of any row, whatever hangs beside it."""
        mention = time.monotonic() + NOTICE
        while wait(futures, 1.0, FIRST_EXCEPTION).not_done:
            if self._error:
                raise self._error
            if time.monotonic() > mention:
                logging.warning("%s since %g s or more.", self._under_way(), NOTICE)
                mention += NOTICE

    def _under_way(self) -> str:
        rows = list(self._judged.values())
        first = f", the first of {rows[0].completion!r:.80}," if rows else ""
        return f"Task {self.task.name!r} computes {len(rows)} verdicts{first}"

    def _work(self) -> None:
        while (item := self._rows.get()) is not None:
            future, row, index = item
            if not future.set_running_or_notify_cancel():
                continue
            self._judged[current_thread()], start = row, time.perf_counter()
            try:
                parts = judge(self.task, row, self.recipe, index)
                future.set_result(Verdict(parts, time.perf_counter() - start))
            except BaseException as error:
                if not isinstance(error, ValueError | RuntimeError | OSError):  # of a user's code
                    what = f"{type(error).__name__}: {error}"
                    text = f"task {self.task.name!r}: judging {row.completion!r:.300} raises {what}"
                    error = RuntimeError(text).with_traceback(error.__traceback__)
                self._error = self._error or error
                future.set_exception(error)
            del self._judged[current_thread()]

    def __enter__(self) -> Scorer:
        getattr(self.task, "start", lambda: None)()
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(Empty):
            while True:
                self._rows.get_nowait()[0].cancel()
        for _ in self._threads:
            self._rows.put(None)
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._judged:
            logging.error("%s and is not waited for any more.", self._under_way())
        getattr(self.task, "close", lambda: None)()


class Groups:
    """Judges the groups of a rollout as they finish: the sampler's ``on_groups``.

    A process judges what its own devices have sampled; `wait` brings the verdicts together.

    Args:
      scorer: judges the rows.
      examples: P examples, one of each prompt of the rollout.
      tokenizer: of the policy.
    """

    def __init__(self, scorer: Scorer, examples: Sequence[Example], tokenizer: Tokenizer):
        self._scorer, self._examples, self._tokenizer = scorer, examples, tokenizer
        self._texts: list[list[str]] = [[] for _ in examples]
        self._futures: list[list[Future[Verdict]]] = [[] for _ in examples]

    def __call__(self, index_g, tokens_gGT, count_gG, finished_gG) -> None:
        """Decode and submit the completions of some prompts."""
        columns = index_g.tolist(), tokens_gGT, count_gG, finished_gG
        for p, tokens_GT, count_G, finished_G in zip(*columns, strict=True):
            texts = [
                self._tokenizer.decode(tokens_T[:count].tolist())
                for tokens_T, count in zip(tokens_GT, count_G, strict=True)
            ]
            rows = rows_of([self._examples[p]] * len(texts), texts, finished_G, count_G)
            self._texts[p], self._futures[p] = texts, self._scorer.submit(rows)

    def wait(self, size: int = 0) -> list[Verdict]:
        """The verdicts of all rows, in their order, those of other processes too.

        Of a group that was not sampled to its end, ``size`` verdicts of zeros.
        """
        self._scorer.wait([future for group in self._futures for future in group])
        own = [[future.result() for future in group] for group in self._futures]
        if jax.process_count() == 1:
            none = Verdict(dict.fromkeys(self._scorer.recipe.weights, 0.0), 0.0)
            return [verdict for group in own for verdict in group or [none] * size]
        names = list(self._scorer.recipe.weights)
        size = size or int(distributed.all_gather(np.int32(max(map(len, own)))).max())
        table = np.zeros((len(own), size, len(names) + 1), np.float32)
        for p, group in enumerate(own):
            for i, (parts, seconds) in enumerate(group):
                table[p, i] = [*(parts[name] for name in names), seconds]
        rows = distributed.all_gather(table).sum(0).reshape(-1, len(names) + 1).tolist()
        return [Verdict(dict(zip(names, parts, strict=True)), s) for *parts, s in rows]

    def texts(self, size: int) -> list[str | None]:
        """Completions of all rows, ``size`` a prompt, without stop tokens; None: elsewhere."""
        return [text for group in self._texts for text in group or [None] * size]


def _verdict(task: Task, row: Row, index: int) -> float:
    if row.finished != STOP:
        return 0.0
    verdict = task.verify(row.example, row.completion)
    if not 0.0 <= verdict <= 1.0:  # NaN fails too
        raise ValueError(f"task {task.name!r} scored row {index} with {verdict!r}, outside [0, 1]")
    return verdict
