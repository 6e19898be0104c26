"""Prepared datasets as tasks: prompts and reference answers from ArrayRecord files."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from sapo_jax.tasks.base import IMAGE, Example, fingerprint, make_example
from sapo_jax.tasks.jsonl import some
from sapo_jax.tasks.math_answer import boxed, reference
from sapo_jax.tasks.records import HOW, Records, locate

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)"
_NUMBER = re.compile(rf"({_DIGITS})(?:\s?/\s?({_DIGITS}))?", re.ASCII)
_MINUS = re.compile(r"(^|.)(?:(\s*)[-−–‐‑‒])(\s?)[$€£]?\s?$", re.DOTALL)
_MULTIPLE = re.compile(
    r"\s?(?:[kKM]|bn|(?:dozen|hundred|thousand|[bmtr]+illion|lakh|crore)s?)(?![A-Za-z])|"
    r"\s?\^|[½⅓⅔¼¾⁰¹²³⁴⁵⁶⁷⁸⁹]"
)
_PART = re.compile(r"(?:\^\{?|_|\}\{|√|sqrt[({]|\d[eE][+-]?)$")  # before it: no number of its own
MAX_DIGITS = 64


def exact(completion: str, answer: str) -> float:
    """1.0 iff the two are the same text, but for white space around them."""
    return float(completion.strip() == answer.strip())


def last_number(completion: str, answer: str) -> float:
    """1.0 iff the last number of the completion equals the last of the answer, as ``1,000``=1000.0.

    Numbers of more than ``MAX_DIGITS`` characters equal nothing, nor does what is more than a
    number: ``5k``, ``2^5``, ``1 1/2``.
    """
    mine, reference = _last(completion), _last(answer)
    return float(mine is not None and mine == reference)


def _last(text: str) -> Fraction | None:
    """The last number of a text, with its sign, if that is all that it is."""
    *_, match = (None, *_NUMBER.finditer(text))
    if not match or len(match[0]) > MAX_DIGITS or _MULTIPLE.match(text, match.end()):
        return None
    above, below = (Fraction((part or "1").replace(",", "")) for part in match.groups())
    before = text[max(0, match.start() - 8) : match.start()]
    mixed = "/" in match[0] and re.search(r"\d\s$", before)  # 1 1/2
    if _PART.search(before) or mixed or not below:
        return None
    minus = _MINUS.search(before)
    if not minus:
        return above / below
    left, apart, loose = minus.groups()
    if loose:  # 10 - 5, and the dash of a list, are no signs
        negative = left in tuple("=:(,<>≈")
    else:
        negative = bool(apart) or not re.match(r"[\w)\]}%]", left)
    return -above / below if negative else above / below


VERIFIERS: dict[str, Callable[[str, str], float]] = {  # of (completion, answer)
    "exact": exact,
    "last_number": last_number,
    "boxed": boxed,
}


class PreparedExamples(Sequence[Example]):
    """The records of a split as examples."""

    def __init__(self, task: Prepared, split: str):
        self._task, self._records = task, Records(task.directory, split)
        wanted = filter(None, (task.prompt, task.answer, task.image))
        missing = [f for f in wanted if f not in self._records[0]]
        if missing:
            raise ValueError(
                f"{task.directory} has no field {missing}; it has {', '.join(self._records[0])}"
            )

    def check(self) -> None:
        """Refuse answers that no completion can meet."""
        task, bad = self._task, []
        for index in range(len(self) if task.verifier != "exact" else 0):
            try:
                answer = self[index].answer
                if task.verifier == "last_number" and not last_number(answer, answer):
                    raise ValueError(f"the answer {answer!r:.60} ends in no number")
            except ValueError as error:
                bad.append(f"record {index}: {error}")
        if bad:
            raise ValueError(f"{task.directory}, {some(bad)}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        task, record = self._task, self._records[index]
        answer, prompt = record[task.answer], task.template.replace("{}", record[task.prompt])
        images = [record[task.image]] if task.image else []
        return make_example(
            prompt if not images or IMAGE in prompt else IMAGE + prompt,
            reference(answer) if task.verifier == "boxed" else answer,
            record.get(task.demonstration, ""),
            images=images,
            shows="".join(map(fingerprint, images)),
        )


@dataclass(frozen=True)
class Prepared:
    """Prompts and answers that ``python -m sapo_jax.datasets``, or any TFDS builder, prepared.

    Args:
      directory: of the dataset; see ``records.locate``.
      verifier: one of ``VERIFIERS``: the whole text, the last number, or the last
        ``\\boxed{}`` as ``math_answer`` judges it.
      template: the prompt of a policy, where ``{}`` stands for the dataset's.
      prompt, answer, demonstration: fields of the records; a dataset need not have the last.
      image: field with a picture, a TFDS feature or the bytes of a file; "" for text alone.
      train, test: splits, or parts of one such as ``train[:95%]``.

    Raises:
      ValueError: nothing is prepared there, an unknown verifier, or a template without ``{}``.
    """

    directory: str = ""
    verifier: str = "exact"
    template: str = "{}"
    prompt: str = "prompt"
    answer: str = "answer"
    demonstration: str = "demonstration"
    image: str = ""
    train: str = "train"
    test: str = "test"

    name: ClassVar[str] = "prepared"

    def __post_init__(self):
        if not self.directory:
            raise ValueError(f"directory='' names no prepared dataset: {HOW}")
        locate(self.directory)
        if self.verifier not in VERIFIERS:
            raise ValueError(f"unknown verifier {self.verifier!r}; allowed: {', '.join(VERIFIERS)}")
        if "{}" not in self.template:
            raise ValueError(f"template {self.template!r} must contain {{}}, the dataset's prompt")

    @functools.cached_property
    def _checked(self) -> set[str]:
        """The splits whose answers can be met."""
        return set()

    @functools.cached_property
    def _texts(self) -> tuple[set[str], int, int]:
        """Characters of both splits, and the longest prompt and demonstration; reads them all."""
        splits = [self.examples(split) for split in ("train", "test")]
        texts = [(e.prompt, e.demonstration) for examples in splits for e in examples]
        characters = set().union(*(set(part) for text in texts for part in text))
        return characters, max(len(p) for p, _ in texts), max(len(d) for _, d in texts)

    @property
    def alphabet(self) -> str:
        """The characters that occur, sorted; those of an answer only where it is demonstrated."""
        return "".join(sorted(self._texts[0]))

    @property
    def max_images(self) -> int:
        """One, or none."""
        return int(bool(self.image))

    @property
    def max_prompt_chars(self) -> int:
        """The length of the longest prompt."""
        return self._texts[1]

    @property
    def max_completion_chars(self) -> int:
        """The length of the longest demonstration; 0, no bound, where there are none."""
        return self._texts[2]

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of ``"train"`` or ``"test"``; see ``Task.examples``."""
        if split not in ("train", "test"):
            raise ValueError(f"unknown split {split!r}; allowed: train, test")
        examples = PreparedExamples(self, getattr(self, split))
        if split not in self._checked:
            examples.check()
            self._checked.add(split)
        return examples

    def verify(self, example: Example, completion: str) -> float:
        """The verdict of the verifier."""
        return VERIFIERS[self.verifier](completion, example.answer)


@dataclass(frozen=True)
class Gsm8k(Prepared):
    """Grade-school word problems with worked answers, as the TFDS catalogue's builder parses them.

    Source: arXiv 2110.14168; ``python -m sapo_jax.datasets --catalogue=gsm8k --out=data``.
    """

    directory: str = "data/gsm8k"
    verifier: str = "last_number"
    prompt: str = "question"
    answer: str = "short_answer"
    demonstration: str = "answer"

    name: ClassVar[str] = "gsm8k"
