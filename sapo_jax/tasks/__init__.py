"""Tasks by name: what a policy is asked, and how its answers are judged.

    task = tasks.make("countdown", numbers=4)
    example = task.examples("test")[0]           # its prompt, its answer, a worked completion
    task.verify(example, "(12-3)*5")             # 1.0 where that is right

A config names its task and the options in ``c.task``, or several tasks in ``c.tasks``.

A task of your own is a frozen dataclass whose fields are its options, with the members that
`base.Task` describes:

    @dataclass(frozen=True)
    class Reverse:
        length: int = 4

        name: ClassVar[str] = "reverse"
        alphabet: ClassVar[str] = "<abcde"
        max_prompt_chars = property(lambda self: self.length + 1)
        max_completion_chars = property(lambda self: self.length)

        def examples(self, split):
            return GeneratedExamples(split, self._generate)

        def verify(self, example, completion):
            return float(completion == example.answer)

        def _generate(self, key):
            word = "".join("abcde"[i] for i in draw(key, [5] * self.length))
            return make_example(f"{word}<", word[::-1], word[::-1])

and a line in TASKS. `chain_sum` is one like it; `jsonl.FileTask` reads problems from files; a
program is run by `verifiers.sandbox`.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from sapo_jax.tasks.base import Task
from sapo_jax.tasks.chain_sum import ChainSum
from sapo_jax.tasks.countdown import Countdown
from sapo_jax.tasks.math_answer import MathAnswer
from sapo_jax.tasks.mixture import Mixture
from sapo_jax.tasks.prepared import Gsm8k, Prepared
from sapo_jax.tasks.programs import Programs
from sapo_jax.tasks.reasoning import ReasoningGym

__all__ = ["TASKS", "Mixture", "Task", "make"]

TASKS: dict[str, type] = {
    "chain_sum": ChainSum,
    "countdown": Countdown,
    "prepared": Prepared,
    "gsm8k": Gsm8k,
    "math_answer": MathAnswer,
    "reasoning_gym": ReasoningGym,
    "programs": Programs,
}


def make(name: str, **options: Any) -> Task:
    """The task of a name, with its options.

    Raises:
      ValueError: unknown name, an option that the task lacks, or a value that it refuses.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown task {name!r}; allowed: {', '.join(TASKS)}; did you mean {nearest!r}?"
        )
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"task {name!r} has no option {unknown}; it has {', '.join(known)}")
    return TASKS[name](**options)
