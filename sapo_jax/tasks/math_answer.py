r"""Mathematics with a final answer in ``\boxed{}``, problems from JSON lines (AIME, GSM8K)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from sapo_jax.tasks.base import Example, check_option, make_example
from sapo_jax.tasks.jsonl import FileTask
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
        """1.0 iff it agrees with the answer; see ``math_equal.same``."""
        found = last_boxed(completion)
        return float(bool(found) and same(answer, found, self.call))

    def __reduce__(self):  # a copy in a process that reads data starts its own
        return Boxed, (self.workers,)


@dataclass(frozen=True)
class MathAnswer(FileTask):
    r"""A problem is answered by text whose last ``\boxed{}`` holds the reference answer.

    Args:
      train, test, completion_chars: see ``FileTask``.
      problem_field: field with the problem, a string.
      answer_field: field with the answer, a string or number; for GSM8K, the text after "####".
      template: the prompt; ``{problem}`` stands for the problem.
      workers: processes for symbolic comparison.

    Raises:
      ValueError: an option is out of its range.
    """

    completion_chars: int = 2048
    problem_field: str = "problem"
    answer_field: str = "answer"
    template: str = TEMPLATE
    workers: int = 1

    name: ClassVar[str] = "math_answer"

    def __post_init__(self):
        super().__post_init__()
        check_option("workers", self.workers, 1, 64)
        if "{problem}" not in self.template:
            raise ValueError(f"template must contain {{problem}}, got {self.template!r}")

    @property
    def _fields(self) -> dict[str, Any]:
        return {self.problem_field: str, self.answer_field: (str, int, float)}

    def _parse(self, row: dict[str, Any], key: str) -> tuple[Example, None]:
        del key
        answer = str(row[self.answer_field]).rpartition("####")[2].strip()
        prompt = self.template.replace("{problem}", row[self.problem_field])
        return make_example(prompt, answer, ""), None

    def verify(self, example: Example, completion: str) -> float:
        r"""1.0 iff the last ``\boxed{}`` holds the answer; see ``math_equal.same``."""
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
