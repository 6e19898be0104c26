"""Several tasks in one run: each example is judged by the task that it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from sapo_jax.tasks.base import Example, Task


@dataclass(frozen=True)
class Mixture:
    """The run's tasks as one; ``Example.task`` counts them in their order."""

    tasks: Mapping[str, Task]

    name: ClassVar[str] = "mixture"

    @property
    def alphabet(self) -> str:
        """The characters of all of them, sorted."""
        return "".join(sorted(set().union(*(task.alphabet for task in self.tasks.values()))))

    @property
    def max_prompt_chars(self) -> int:
        """The largest bound."""
        return max(task.max_prompt_chars for task in self.tasks.values())

    @property
    def max_completion_chars(self) -> int:
        """The largest bound; 0 where a task has none."""
        bounds = [task.max_completion_chars for task in self.tasks.values()]
        return max(bounds) if all(bounds) else 0

    @property
    def max_images(self) -> int:
        """The most of a prompt; 0 where no task has images."""
        return max(getattr(task, "max_images", 0) for task in self.tasks.values())

    def examples(self, split: str) -> Sequence[Example]:
        """One example of each task in turn, until a task has no more; see ``Task.examples``."""
        return _InTurn([task.examples(split) for task in self.tasks.values()])

    def verify(self, example: Example, completion: str) -> float:
        """The verdict of the example's own task."""
        return list(self.tasks.values())[example.task].verify(example, completion)

    def start(self) -> None:
        """Start what the tasks need before the first verdict."""
        for task in self.tasks.values():
            getattr(task, "start", lambda: None)()

    def close(self) -> None:
        """End the tasks' processes."""
        for task in self.tasks.values():
            getattr(task, "close", lambda: None)()


@dataclass(frozen=True)
class _InTurn(Sequence[Example]):
    sources: list[Sequence[Example]]

    def __len__(self) -> int:
        return len(self.sources) * min(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        turn, task = divmod(range(len(self))[operator.index(index)], len(self.sources))
        return replace(self.sources[task][turn], task=task)
