r"""Mathematics with a final answer in ``\boxed{}``, problems from JSON lines (AIME, GSM8K)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sapo_jax.tasks import jsonl
from sapo_jax.tasks.base import Example, check_option, make_example
from sapo_jax.tasks.verifiers.forks import Forks
from sapo_jax.tasks.verifiers.math_equal import same
from sapo_jax.tasks.verifiers.math_text import last_boxed

TEMPLATE = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


class Boxed(Forks):
    r"""Judges the last ``\boxed{}`` of a completion, in processes where symbols are compared.

    Args:
        workers: processes.
    """

    def __init__(self, workers: int = 1):
        super().__init__(
            "sapo_jax.tasks.verifiers.math_equal:compare", workers=workers, seconds=0.9
        )

    def __call__(self, completion: str, answer: str) -> float:
        """1.0 iff it agrees with the answer; see ``agreement.same``."""
        found = last_boxed(completion)
        return float(bool(found) and same(answer, found, self.call))

    def __reduce__(self):  # a copy in a process that reads data starts its own
        return Boxed, (self.workers,)


@dataclass(frozen=True)
class MathAnswer:
    r"""A problem is answered by text whose last ``\boxed{}`` holds the reference answer.

    Args:
        train: JSON-lines file of the training split; "" where there is none.
        test: the same of the test split.
        problem_field: field with the problem, a string.
        answer_field: field with the answer, a string or number; for GSM8K, the text after "####".
        template: the prompt; ``{problem}`` stands for the problem.
        completion_chars: what ``max_completion_chars`` says.
        workers: processes for symbolic comparison.

    Raises:
        ValueError: an option is out of its range.
    """

    train: str = ""
    test: str = ""
    problem_field: str = "problem"
    answer_field: str = "answer"
    template: str = TEMPLATE
    completion_chars: int = 2048
    workers: int = 1

    name: ClassVar[str] = "math_answer"

    def __post_init__(self):
        check_option("completion_chars", self.completion_chars, 1)
        check_option("workers", self.workers, 1, 64)
        if "{problem}" not in self.template:
            raise ValueError(f"template must contain {{problem}}, got {self.template!r}")

    @functools.cached_property
    def _splits(self) -> dict[str, tuple[Example, ...]]:
        return {s: self._read(path) for s, path in self._paths.items() if path}

    @property
    def _paths(self) -> dict[str, str]:
        return {"train": self.train, "test": self.test}

    def _read(self, path: str) -> tuple[Example, ...]:
        fields = {self.problem_field: str, self.answer_field: (str, int, float)}
        examples = []
        for _, row in jsonl.read(path, fields):
            answer = str(row[self.answer_field]).rpartition("####")[2].strip()
            prompt = self.template.replace("{problem}", row[self.problem_field])
            examples.append(make_example(prompt, answer, ""))
        return tuple(examples)

    @functools.cached_property
    def alphabet(self) -> str:
        """The characters of the prompts, and printable ASCII."""
        return jsonl.alphabet([e for split in self._splits.values() for e in split])

    @functools.cached_property
    def max_prompt_chars(self) -> int:
        """The longest prompt of the files."""
        return max((len(e.prompt) for split in self._splits.values() for e in split), default=0)

    @property
    def max_completion_chars(self) -> int:
        """As configured: there are no demonstrations."""
        return self.completion_chars

    def examples(self, split: str) -> Sequence[Example]:
        """The problems of ``"train"`` or ``"test"``, in the order of the file."""
        jsonl.split_path(split, self._paths)
        return self._splits[split]

    def verify(self, example: Example, completion: str) -> float:
        r"""1.0 iff the last ``\boxed{}`` holds the answer; see ``agreement.same``."""
        return self._judge(completion, example.answer)

    @functools.cached_property
    def _judge(self) -> Boxed:
        return Boxed(self.workers)

    def start(self) -> None:
        """Start the processes for symbolic comparison, so that no row waits for their imports."""
        self._judge.start()

    def close(self) -> None:
        """End the processes; a later comparison starts new ones."""
        self._judge.close()
