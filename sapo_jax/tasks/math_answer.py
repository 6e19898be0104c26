r"""Mathematics with a final answer in ``\boxed{}``, problems from JSON lines (AIME, GSM8K)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sapo_jax.tasks.base import Example, check_option, make_example
from sapo_jax.tasks.jsonl import FileTask
from sapo_jax.tasks.verifiers.math_equal import same
from sapo_jax.tasks.verifiers.math_text import MAX_ANSWER_CHARS, last_boxed

TEMPLATE = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


def boxed(completion: str, answer: str) -> float:
    r"""1.0 iff the last ``\boxed{}`` holds the answer; see ``math_equal.same``."""
    found = last_boxed(completion)
    return float(bool(found) and same(answer, found))


def reference(text: str) -> str:
    """The answer in a field of a dataset: of GSM8K's, what stands behind "####".

    Raises:
      ValueError: no completion can meet it.
    """
    answer = text.rpartition("####")[2].strip()
    if not boxed(rf"\boxed{{{answer}}}", answer):
        raise ValueError(
            f"no completion can meet the answer {answer!r:.60}: it must be mathematics or words in "
            f"at most {MAX_ANSWER_CHARS} characters of ASCII or common symbols, its braces balanced"
        )
    return answer


@dataclass(frozen=True)
class MathAnswer(FileTask):
    r"""A problem is answered by text whose last ``\boxed{}`` holds the reference answer.

    Args:
      train, test, completion_chars: see ``FileTask``.
      problem_field: field with the problem, a string.
      answer_field: field with the answer, a string or number; see ``reference``.
      template: the prompt; ``{problem}`` stands for the problem.
      workers: of no effect; answers were once compared in processes.

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
        answer = reference(str(row[self.answer_field]))
        prompt = self.template.replace("{problem}", row[self.problem_field])
        return make_example(prompt, answer, ""), None

    def verify(self, example: Example, completion: str) -> float:
        r"""1.0 iff the last ``\boxed{}`` holds the answer; see ``math_equal.same``."""
        return boxed(completion, example.answer)
