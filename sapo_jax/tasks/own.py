"""What a task of a user's own is held to before a run starts."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from sapo_jax import cli
from sapo_jax.tasks.base import Example, Task

COUNT = 8  # examples of each split that are looked at
MEMBERS = "name", "alphabet", "max_prompt_chars", "max_completion_chars"
METHODS = {"examples": ("split",), "verify": ("example", "completion")}


def check(name: str, task: Task, options: dict[str, Any]) -> None:
    """Refuse what lacks a member of `Task`, and a file's that is not the same in every process.

    Raises:
      ValueError: it does, or is not.
    """
    lacks = [member for member in (*MEMBERS, *METHODS) if not hasattr(task, member)]
    if lacks:
        raise ValueError(f"task {name!r} lacks {', '.join(lacks)} (docs/howto/task.md)")
    for method, arguments in METHODS.items():
        try:
            inspect.signature(getattr(task, method)).bind(*arguments)
        except TypeError:
            wanted = f"{method}({', '.join(arguments)})"
            raise ValueError(f"task {name!r}: must have the method {wanted}") from None
    if not cli.own.is_reference(name):
        return
    found = cli.own.agree(f"task {name!r}", probe, name, options)
    prompts = {split: {e[1] for e in found[f"examples({split!r})"]} for split in ("train", "test")}
    both = prompts["train"] & prompts["test"]
    if both:
        raise ValueError(f"task {name!r}: the prompt {min(both)!r} is in both splits")


def probe(name: str, options: dict[str, Any]) -> dict[str, Callable]:
    """The calls on whose results processes have to agree, see `cli.own.agree`."""
    task = cli.own.load(name)(**options)

    @functools.cache
    def first(split: str) -> list[Example]:
        try:
            examples = task.examples(split)
        except ValueError:
            if split == "train":
                raise
            return []  # whether a run needs it is the run's to say
        rows = [examples[i] for i in range(min(COUNT, len(examples)))]
        for row in rows:
            if not isinstance(row, Example):
                raise ValueError(f"an example must be a tasks.base.Example, got {row!r:.200}")
            strange = set(row.prompt + row.demonstration) - set(task.alphabet)
            if strange:
                raise ValueError(f"the alphabet lacks {sorted(strange)} of {row.prompt!r:.200}")
            if len(row.prompt) > task.max_prompt_chars:
                bound = f"max_prompt_chars={task.max_prompt_chars}"
                raise ValueError(f"the prompt {row.prompt!r:.200} is longer than {bound}")
        return rows

    def verdict(split: str, i: int, text: Callable[[Example], str]) -> float | None:
        if i >= len(first(split)):
            return None
        row = first(split)[i]
        value = task.verify(row, text(row))
        if not 0 <= value <= 1:  # NaN fails too
            raise ValueError(f"verify must return a number in [0, 1], got {value!r}")
        return float(value)

    texts = {
        "answer": lambda row: row.answer,
        "demonstration": lambda row: row.demonstration,
        "prompt": lambda row: row.prompt,
        "''": lambda row: "",
    }
    calls: dict[str, Callable] = {"its members": lambda: [getattr(task, m) for m in MEMBERS]}
    for split in ("train", "test"):
        read = functools.partial(first, split)
        calls[f"examples({split!r})"] = lambda read=read: list(map(dataclasses.astuple, read()))
        for i in range(COUNT):
            for what, text in texts.items():
                judge = functools.partial(verdict, split, i, text)
                calls[f"verify(examples({split!r})[{i}], {what})"] = judge
    return calls
