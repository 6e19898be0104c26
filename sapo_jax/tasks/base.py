"""What a task is, and the lazy, deterministic sequences that its examples come from."""

from __future__ import annotations

import hashlib
import math
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

LENGTHS = {"train": 2**20, "test": 4096}  # examples per split of a generated task
HELD_OUT = 8  # one problem in this many belongs to "test"
MAX_ATTEMPTS = 100_000
SLIP_UNITS = 10**6  # of which a teacher's luck is drawn
IMAGE = "<image>"  # in a prompt: where an image stands
PRINTABLE = frozenset(map(chr, range(32, 127))) | {"\n"}  # ASCII, for free completions


@dataclass(frozen=True)
class Example:
    """One question with its reference answer."""

    id: int  # u32, crc32 of the prompt: stable across processes and versions
    prompt: str
    answer: str
    demonstration: str  # a worked completion for a supervised cold start; "" when there is none
    task: int = 0  # which of the run's tasks it belongs to
    images: tuple[Any, ...] = ()  # paths, bytes of files, or pictures of Pillow, one an IMAGE


class Task(Protocol):
    """What is asked, and how an answer is judged.

    Threads share it, and processes that read data have copies: nothing in it changes. One that
    needs processes of its own has the methods ``start()`` and ``close()`` too, which a run calls
    before its first verdict and at its end; one with images has ``max_images``, the most of a
    prompt.
    """

    @property
    def name(self) -> str:
        """The task's key in ``TASKS``."""

    @property
    def alphabet(self) -> str:
        """The characters of prompts and demonstrations, sorted: the tokens of a CharTokenizer."""

    @property
    def max_prompt_chars(self) -> int:
        """A bound on the length of every prompt."""

    @property
    def max_completion_chars(self) -> int:
        """A bound on the length of every demonstration, without the stop token; 0: no bound."""

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of ``"train"`` or ``"test"``, made or read where they are asked for.

        The same index is the same example in any process, on any machine, after any restart, and
        no prompt is in both splits: so neither ``hash()`` nor a generator that goes on. `draw` and
        `GeneratedExamples` see to both.

        Raises:
          ValueError: unknown split.
        """

    def verify(self, example: Example, completion: str) -> float:
        """Judge a completion, without its stop token: from 0, wrong, to 1, right.

        It never raises and never hangs, whatever the policy wrote, and depends on nothing else:
        not on chance, nor on how busy the machine is. Evaluation counts what has exactly 1.
        """


def make_example(
    prompt: str, answer: str, demonstration: str, *, images: Sequence[Any] = (), shows: str = ""
) -> Example:
    """An example with the id that its prompt, and what its images show, imply."""
    key = zlib.crc32((prompt + shows).encode())
    return Example(key, prompt, answer, demonstration, images=tuple(images))


def fingerprint(image: Any) -> str:
    """The same for an image in any process: its path, or what its bytes are."""
    if isinstance(image, bytes) or hasattr(image, "tobytes"):
        return f"{zlib.crc32(image if isinstance(image, bytes) else image.tobytes()):08x}"
    return str(image)


def split_of(example: Example) -> str:
    """The only split that may contain the example, a function of its prompt."""
    return "test" if example.id % HELD_OUT == 0 else "train"


def check_option(field: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse an option of a task that is no integer of [low, high].

    Raises:
      ValueError: naming the field, the value and what is allowed.
    """
    most = 2**63 - 1 if high is None else high
    if isinstance(value, int) and low <= value <= most:
        return
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    raise ValueError(f"{field} must be an integer {allowed}, got {value!r}")


def check_probability(field: str, value: float) -> None:
    """Refuse an option of a task that is no number of [0, 1).

    Raises:
      ValueError: naming the field, the value and what is allowed.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{field} must be a number in [0, 1), got {value!r}")


def draw(key: str, bounds: Sequence[int]) -> list[int]:
    """Independent uniform integers as a pure function of a key.

    Args:
      key: names the draw; other keys give independent draws.
      bounds: entry k of the result is uniform in [0, bounds[k]).

    Returns:
      One integer per bound.
    """
    size = math.prod(bounds).bit_length() // 8 + 9  # 64 spare bits make the modulo bias negligible
    state = int.from_bytes(hashlib.shake_256(key.encode()).digest(size), "little")
    values = []
    for bound in bounds:
        state, value = divmod(state, bound)
        values.append(value)
    return values


class Generated:
    """A task whose examples are made, each by ``_generate`` from a key; see GeneratedExamples."""

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of ``"train"`` or ``"test"``; see ``Task.examples``."""
        return GeneratedExamples(split, self._generate)


@dataclass(frozen=True)
class GeneratedExamples(Sequence[Example]):
    """The examples of one split, each generated when it is asked for.

    Index i is the first problem of the split among ``generate("split/i/0")``,
    ``generate("split/i/1")``, …: no example depends on another, and no prompt is in two splits.

    Args:
      split: "train" or "test".
      generate: a pure function from a key to an example, or to None where the key gives none.

    Raises:
      ValueError: unknown split.
    """

    split: str
    generate: Callable[[str], Example | None]

    def __post_init__(self):
        if self.split not in LENGTHS:
            raise ValueError(f"unknown split {self.split!r}; allowed: {', '.join(LENGTHS)}")

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def __getitem__(self, index: int) -> Example:
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} {self.split} examples")
        for attempt in range(MAX_ATTEMPTS):
            example = self.generate(f"{self.split}/{position}/{attempt}")
            if example is not None and split_of(example) == self.split:
                return example
        raise ValueError(
            f"no {self.split} example in {MAX_ATTEMPTS} attempts: the options of the task allow "
            "too few problems"
        )
