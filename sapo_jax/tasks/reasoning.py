"""Procedural problems of the ``reasoning_gym`` package, by name, judged exactly.

Only data sets of ``DATASETS`` are allowed: they have one right answer each, which is given, are the
same in every process, and, but for those in ``SLOW``, are quick to make. The package's own scores
are not used: its default pays for containing the answer ("the answer is 4 or 5"), some pay for
junk, some raise or hang.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from sapo_jax.tasks.base import (
    PRINTABLE,
    Example,
    Generated,
    GeneratedExamples,
    check_option,
    make_example,
)
from sapo_jax.tasks.verifiers.math_text import last_boxed

MAX_ANSWER_CHARS = 1000
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{1,40})?")
_RATIO = re.compile(r"(-?[0-9]{1,40})/([0-9]{1,40})|\\d?frac\{(-?[0-9]{1,40})\}\{([0-9]{1,40})\}")
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


class _Templates:
    """The template of each problem of gsm_symbolic, which would draw a list of 2³¹ at the start."""

    def __init__(self, allowed: Sequence[int]):
        self._allowed = [number for number in allowed if number not in ROUNDED]

    def __getitem__(self, index: int) -> int:
        return self._allowed[index % len(self._allowed)]


def _number(pattern: re.Pattern, text: str) -> Fraction | None:
    text = text.strip().removesuffix(".")
    return Fraction(text) if pattern.fullmatch(text) else None


def _lowest_terms(text: str) -> tuple[int, int] | None:
    match = _RATIO.fullmatch(text.strip().strip("$").strip())
    return tuple(int(group) for group in match.groups() if group) if match else None


# How the answers of a data set are read; None is no answer.
KINDS: dict[str, Callable[[str], Any]] = {
    "integer": functools.partial(_number, _INTEGER),
    "decimal": functools.partial(_number, _DECIMAL),
    "fraction": _lowest_terms,
    "text": lambda text: text.strip() or None,
    "word": lambda text: text.strip().removesuffix(".").lower() or None,
}
DATASETS = {
    "aiw": "integer",
    "base_conversion": "word",
    "basic_arithmetic": "integer",
    "binary_alternation": "integer",
    "chain_sum": "integer",
    "count_bits": "integer",
    "count_primes": "integer",
    "decimal_chain_sum": "decimal",
    "family_relationships": "word",
    "fraction_simplification": "fraction",
    "gcd": "integer",
    "gsm_symbolic": "decimal",
    "lcm": "integer",
    "leg_counting": "integer",
    "letter_counting": "integer",
    "products": "integer",
    "simple_equations": "integer",
    "spell_backward": "text",
    "syllogism": "word",
    "word_sequence_reversal": "text",
    "zebra_puzzles": "word",
}
# Problems of a sample, of data sets that take long: 0.06 s a puzzle at level 1, 0.25 s at 2, then
# four times as long for each level. A uniquely solvable puzzle is the same in every process, though
# its solver goes through sets in an order that differs: it only answers whether there are two.
SLOW = {"zebra_puzzles": 24}
# Templates of gsm_symbolic whose given answer is rounded, and so wrong for some numbers.
ROUNDED = {2, 3, 4, 49, 75, 99}
_UNREADABLE = re.compile(r"\d\.\d{4}")  # 0.6666666666666666 in a question of gsm_symbolic
# What a compact prompt keeps of a question: a pattern, and how its groups are written.
COMPACT = {
    "basic_arithmetic": (r"(?P<a>[-(0-9][-+*/(). 0-9]*[0-9)])", "{a}="),
    "chain_sum": (r": (?P<a>.*) =", "{a}="),
    "count_bits": (r"number (?P<a>\d+)", "bits({a})="),
    "count_primes": (r"between (?P<a>\d+) and (?P<b>\d+)", "primes({a},{b})="),
    "decimal_chain_sum": (r": (?P<a>.*) =", "{a}="),
    "fraction_simplification": (r"(?P<a>\d+)\D+(?P<b>\d+)", "{a}/{b}="),
    "gcd": (r": (?P<a>[\d, ]+)", "gcd({a})="),
    "lcm": (r": (?P<a>[\d, ]+)", "lcm({a})="),
    "products": (r": (?P<a>[\d* ]+)", "{a}="),
    "simple_equations": (r":\s*(?P<a>[^:]+=[^:]+)$", "{a};"),
    "spell_backward": (r": (?P<a>\w+)$", "{a}<"),
}
READERS: dict[str, Callable[[str], str | None]] = {
    "whole": lambda text: text,
    "tags": lambda text: (_TAGGED.findall(text) or [None])[-1],
    "boxed": last_boxed,
    "last": lambda text: (re.findall(r"-?\d[\d.]*", text.replace(",", "")) or [None])[-1],
}


@dataclass(frozen=True)
class ReasoningGym(Generated):
    """Problems of one data set of ``reasoning_gym``, at a level of its curriculum.

    Args:
      dataset: one of ``DATASETS``.
      level: of every attribute of the curriculum; 0 is the easiest.
      levels: attribute -> level, for single attributes.
      options: fields of the data set's config, over what the curriculum says.
      prompt: "original", or "compact" for the data sets of ``COMPACT`` ("4-1-7=").
      template: around the question, which ``{question}`` stands for.
      answer: where a completion has its answer: "whole" (all of it), "tags" (the last
        ``<answer>…</answer>``), "boxed" (the last box), "last" (the last number).
      completion_chars: what ``max_completion_chars`` says; 0: the longest answer of a sample.

    Raises:
      ValueError: an option is unknown or out of its range.
    """

    dataset: str = "chain_sum"
    level: int = 0
    levels: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = "original"
    template: str = "{question}"
    answer: str = "whole"
    completion_chars: int = 0

    name: ClassVar[str] = "reasoning_gym"

    def __post_init__(self):
        check_option("level", self.level, 0, 10)
        check_option("completion_chars", self.completion_chars, 0)
        questions = COMPACT if self.prompt == "compact" else DATASETS
        for option, value, allowed in (
            ("prompt", self.prompt, ("original", "compact")),
            ("dataset", self.dataset, questions),
            ("answer", self.answer, READERS),
        ):
            if value not in allowed:
                raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
        if self.answer == "last" and DATASETS[self.dataset] not in ("integer", "decimal"):
            raise ValueError(f"answer='last' is for numbers, and {self.dataset} has none")
        if "{question}" not in self.template:
            raise ValueError(f"template must contain {{question}}, got {self.template!r}")

    @functools.cached_property
    def _problems(self):
        import reasoning_gym

        if self.dataset == "gsm_symbolic":  # it has no curriculum
            from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

            self._refuse_levels(())
            problems = self._create({"seed": 0, "size": 1})
            problems.task_indices = _Templates(tasks_ok)
            return problems
        curriculum = reasoning_gym.factory.create_curriculum(self.dataset)
        known = list(curriculum.attributes)
        self._refuse_levels(known)
        for attribute in known:
            highest = len(curriculum.attributes[attribute].levels) - 1
            level = min(self.levels.get(attribute, self.level), highest)
            curriculum.set_attr_level(attribute, level)
        return self._create(vars(curriculum.generate_configuration({"seed": 0, "size": 2**31})))

    def _refuse_levels(self, known: Sequence[str]) -> None:
        unknown = sorted(set(self.levels) - set(known))
        if unknown:
            has = ", ".join(known) or "none"
            raise ValueError(f"levels: {self.dataset} has no {unknown}; it has {has}")

    def _create(self, config: Mapping[str, Any]) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(self.dataset, **{**config, **self.options})
        except (TypeError, AssertionError) as error:
            raise ValueError(f"options of {self.dataset}: {error}") from None

    @functools.cached_property
    def _sample(self) -> list[Example]:
        count = SLOW.get(self.dataset, 200)
        return [GeneratedExamples("train", self._draw)[i] for i in range(count)]

    @functools.cached_property
    def alphabet(self) -> str:
        """The characters of a sample of prompts and answers, and printable ASCII, sorted."""
        known = PRINTABLE if self.prompt == "original" else frozenset("-+*/=().,;<0123456789")
        return "".join(sorted(known.union(*(e.prompt + e.answer for e in self._sample))))

    @functools.cached_property
    def max_prompt_chars(self) -> int:
        """Four thirds of the longest prompt of a sample; longer ones are not drawn."""
        return 4 * max(len(e.prompt) for e in self._sample) // 3

    @functools.cached_property
    def max_completion_chars(self) -> int:
        """As configured, or four thirds of the longest answer of a sample."""
        longest = max(len(e.demonstration) for e in self._sample)
        return self.completion_chars or 4 * longest // 3

    def verify(self, example: Example, completion: str) -> float:
        """1.0 iff the answer, read strictly as the data set's kind, is the reference's."""
        text = READERS[self.answer](completion)
        if text is None or len(text) > MAX_ANSWER_CHARS:
            return 0.0
        read = KINDS[DATASETS[self.dataset]]
        value = read(text)
        return float(value is not None and value == read(example.answer))

    def _generate(self, key: str) -> Example | None:
        example = self._draw(key)
        if example is None or len(example.prompt) > self.max_prompt_chars:
            return None
        return example if len(example.demonstration) <= self.max_completion_chars else None

    def _draw(self, key: str) -> Example | None:
        index = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") >> 1
        entry = self._problems[index]
        question = entry["question"]
        if self.prompt == "compact":
            question = compact(self.dataset, question)
        answer = entry["answer"]
        if question is None or KINDS[DATASETS[self.dataset]](answer) is None:
            return None
        if self.dataset == "gsm_symbolic" and (answer[0] == "-" or _UNREADABLE.search(question)):
            return None
        written = {"tags": f"<answer>{answer}</answer>", "boxed": rf"\boxed{{{answer}}}"}
        prompt = self.template.replace("{question}", question)
        return make_example(prompt, answer, written.get(self.answer, answer))


def compact(dataset: str, question: str) -> str | None:
    """The question without its words; None where it has no such form."""
    pattern, form = COMPACT[dataset]
    match = re.search(pattern, question.strip())
    return form.format(**match.groupdict()).replace(" ", "") if match else None
