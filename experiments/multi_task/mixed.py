"""Several tasks mixed at random: which one an example is of is drawn for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from experiments.evidence.policy import SEVERAL
from sapo_jax import tasks
from sapo_jax.tasks import Mixture
from sapo_jax.tasks.base import Example, GeneratedExamples, draw


@tasks.register("mixed")
@dataclass(frozen=True)
class Mixed:
    """One of the tasks of `policy.SEVERAL` for each example, with equal probability."""

    name: ClassVar[str] = "mixed"

    @property
    def _all(self) -> Mixture:
        return Mixture({name: tasks.make(t["name"], **t["options"]) for name, t in SEVERAL.items()})

    @property
    def alphabet(self) -> str:
        """Of all of them."""
        return self._all.alphabet

    @property
    def max_prompt_chars(self) -> int:
        """The largest bound."""
        return self._all.max_prompt_chars

    @property
    def max_completion_chars(self) -> int:
        """The largest bound."""
        return self._all.max_completion_chars

    def examples(self, split: str) -> Sequence[Example]:
        """The task is drawn by the key, and then an example of it."""
        sources = [task.examples(split) for task in self._all.tasks.values()]

        def generate(key: str) -> Example:
            which, index = draw(f"mixed/{key}", [len(sources), min(map(len, sources))])
            return sources[which][index]

        return GeneratedExamples(split, generate)

    def verify(self, example: Example, completion: str) -> float:
        """By the task that the form of the prompt shows; sums are judged alike."""
        name = "countdown" if ">" in example.prompt else "small"
        return self._all.tasks[name].verify(example, completion)
