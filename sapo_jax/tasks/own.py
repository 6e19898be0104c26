"""What tasks and rewards of a user's own are held to before a run starts."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from sapo_jax import cli
from sapo_jax.tasks.base import IMAGE, Example, Task, fingerprint, make_example

COUNT = 8  # examples of each split that are looked at
MEMBERS = "name", "alphabet", "max_prompt_chars", "max_completion_chars"
TYPES = {
    "bool": (bool, "True or False"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "text"),
}
REWARDED = "prompt", "completion", "answer", "example", "finished", "length"
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
    prompts = {
        split: {tuple(e[1::-1]) for e in found[f"examples({split!r})"]}
        for split in ("train", "test")
    }
    both = prompts["train"] & prompts["test"]
    if both:
        raise ValueError(f"task {name!r}: the prompt {min(both)[0]!r} is in both splits")


def check_types(name: str, options: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Refuse an option that is no bool, int, float or str where its annotation is that.

    Raises:
      ValueError: naming the option, its value and what is allowed.
    """
    for option, value in options.items():
        wanted = getattr(annotations[option], "__name__", annotations[option])
        kinds, text = TYPES.get(wanted, (object, ""))
        if not isinstance(value, kinds) or (isinstance(value, bool) and wanted in ("int", "float")):
            raise ValueError(f"task {name!r}: {option}={value!r}: must be {text}")


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
            text = row.prompt.replace(IMAGE, "") if row.images else row.prompt
            strange = set(text + row.demonstration) - set(task.alphabet)
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
        calls[f"examples({split!r})"] = lambda read=read: list(map(_plain, read()))
        for i in range(COUNT):
            for what, text in texts.items():
                judge = functools.partial(verdict, split, i, text)
                calls[f"verify(examples({split!r})[{i}], {what})"] = judge
    return calls


def _plain(row: Example) -> tuple:
    return dataclasses.astuple(dataclasses.replace(row, images=[*map(fingerprint, row.images)]))


def reward(reference: str) -> Callable[[Example, str, bool, int], float]:
    """A reward function of a file, "my.py:name", as one of (example, completion, finished, length).

    It takes, by their names, any of ``prompt``, ``completion``, ``answer``, ``example``,
    ``finished`` (False where the completion ran out of room) and ``length`` (tokens), and returns a
    number: larger is better.

    Raises:
      ValueError: it takes or returns something else, fails, or is not the same in every process.
    """
    if not cli.own.is_reference(reference):
        raise ValueError(f"reward.function={reference!r}: must be a function of a file, my.py:name")
    call = _reward(reference)
    cli.own.agree(f"reward.function={reference!r}", probe_reward, reference)
    return call


def _reward(reference: str) -> Callable[[Example, str, bool, int], float]:
    function, start = cli.own.load(reference), f"reward.function={reference!r}"
    if not callable(function):
        raise ValueError(f"{start} is {function!r}: must be a function")
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = [p.name for p in named if p.name in REWARDED]
    free = [p for p in named if p.name not in takes and p.default is p.empty]
    if free or not takes or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        got = ", ".join(map(str, parameters)) or "nothing"
        raise ValueError(f"{start} takes {got}: must take some of {', '.join(REWARDED)}, by name")

    def call(example: Example, completion: str, finished: bool, length: int) -> float:
        row = example.prompt, completion, example.answer, example, finished, length
        given = dict(zip(REWARDED, row, strict=True))
        value = function(**{name: given[name] for name in takes})
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) < 2.0**128:
            raise ValueError(
                f"{start} returned {value!r:.100} for {completion!r:.300}: must be a finite number "
                "of 32 bits"
            )
        return number

    return call


def probe_reward(reference: str) -> dict[str, Callable[[], float]]:
    """As `probe`, of a reward function."""
    call = _reward(reference)
    texts = ["", "7", "<think>a b c</think> 7", "1+2=3", *("x y" * n for n in range(1, 13))]
    rows = [
        (make_example(f"{i}+{i}=", str(2 * i), ""), text, i % 5 != 4, len(text))
        for i, text in enumerate(texts)
    ]
    return {f"its value for {row[1]!r}": functools.partial(call, *row) for row in rows}
