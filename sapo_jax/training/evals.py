"""What a run is evaluated on: the sets of config.evals, or the one of config.eval."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sapo_jax import sampler
from sapo_jax.cli import nearest
from sapo_jax.data import encode
from sapo_jax.data.stream import Fits, slots
from sapo_jax.tasks.base import Example, Task
from sapo_jax.training import build
from sapo_jax.training.checks import choice, of_field, require, shown

MEAN = "mean"  # what config.eval.best says besides a name
FIELDS = ("task", "prompts", "samples", "temperature", "top_k", "top_p")
Evals = Mapping[str, "Evaluation"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A held-out set, and how it is sampled.

    Attributes:
      field: of the config.
      tasks: what the prompts are of, by name.
      shares: of each task among the prompts.
      offset: where the tasks stand among all that judge the run, see `judges`.
      prompts, samples, temperature, top_k, top_p: as in config.eval.
      keep: whether an example has room; None where all have.
      width: tokens of room for a prompt.
      batch: prompts sampled at a time.
      plan: the sampler's shapes.
    """

    field: str
    tasks: Mapping[str, Task]
    shares: Mapping[str, float]
    offset: int
    prompts: int
    samples: int
    temperature: float
    top_k: int | None
    top_p: float | None
    keep: Fits | None = None
    width: int = 0
    batch: int = 0
    plan: sampler.Plan | None = None

    @functools.cached_property
    def examples(self) -> list[Example]:
        """The first examples of the test splits, in the tasks' shares.

        Raises:
          ValueError: a task has too few, or none with room.
        """
        parts = collections.Counter(slots(self.shares, self.prompts))
        found = []
        for k, (name, task) in enumerate(self.tasks.items()):
            source = task.examples("test")
            room = f"larger: no prompt of the test split of {name} has room"
            some = self.keep is None or encode.distinct(source, 1, keep=self.keep)
            require(bool(some), "data.max_prompt_tokens", self.width, room)
            which = {"keep": self.keep, "task": self.offset + k, "field": f"{self.field}.prompts"}
            found += encode.held_out(source, parts[k], total=self.prompts, **which)
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """Its arguments of `sampler.rollout`; what samples alike has the same."""
        top = {"top_k": self.top_k, "top_p": self.top_p, "temperature": self.temperature}
        return {"domain": "eval", "group_size": self.samples, "plan": self.plan, **top}


def make(c: Any, made: Mapping[str, Task], shares: Mapping[str, float]) -> dict[str, Evaluation]:
    """The evaluations by name; that of config.eval, where it is the only one, is named "".

    Args:
      c: the config.
      made, shares: the run's own tasks, which an evaluation without one is of.
    """
    choice("eval.best", c.eval.best, (MEAN, *c.evals))
    found, offset = {}, len(made)
    for name, entry in c.evals.items() or [("", {})]:
        field = f"evals.{name}" if name else "eval"
        if c.evals:
            _check_entry(name, entry)
        numbers = {key: entry.get(key, getattr(c.eval, key)) for key in FIELDS[1:]}
        _check_numbers(field, numbers)
        task, own = entry.get("task"), {"tasks": made, "shares": shares, "offset": 0}
        if isinstance(task, str) and task in made:
            own = {"tasks": {task: made[task]}, "offset": list(made).index(task)}
        elif task is not None:
            own = {"tasks": {name: build.make_task(f"{field}.task", task)}, "offset": offset}
            offset += 1
        own.setdefault("shares", dict.fromkeys(own["tasks"], 1.0))
        found[name] = Evaluation(field=field, **own, **numbers)
        _check_prompts(c, found[name])
    return found


def _check_entry(name: str, entry: Any) -> None:
    letters = "named by letters, digits, _ and -, and not 'mean'"
    named = re.fullmatch(r"[\w-]+", name) and name != MEAN
    require(bool(named), f"evals.{name}", entry, letters)
    require(isinstance(entry, dict), f"evals.{name}", entry, f"a dictionary of {', '.join(FIELDS)}")
    for key, value in entry.items():
        only = f"one of {', '.join(FIELDS)}{nearest(key, FIELDS)}"
        where = f"evals.{name}.{key}={shown(value)}: there is no such field: must be {only}"
        if key not in FIELDS:
            raise ValueError(f"config.{where}")


def _check_numbers(field: str, numbers: Mapping[str, Any]) -> None:
    for key in ("prompts", "samples"):
        value = numbers[key]
        whole = type(value) is int and value >= 1
        require(whole, f"{field}.{key}", value, "a whole number, at least 1")
    temperature, top_k, top_p = (numbers[key] for key in ("temperature", "top_k", "top_p"))
    warm = type(temperature) in (int, float) and 0 <= temperature < math.inf
    require(warm, f"{field}.temperature", temperature, "a number, at least 0")
    known = top_k is None or (type(top_k) is int and top_k >= 1)
    require(known, f"{field}.top_k", top_k, "at least 1, or None")
    known = top_p is None or (type(top_p) in (int, float) and 0 < top_p <= 1)
    require(known, f"{field}.top_p", top_p, "in (0, 1], or None")


def _check_prompts(c: Any, own: Evaluation) -> None:
    """Refuse more prompts than the test splits have, and fewer than tasks."""
    field, count = f"{own.field}.prompts", len(own.tasks)
    require(own.prompts >= count, field, own.prompts, f"at least {count}, one of each task")
    for key, task in own.tasks.items() if c.eval.every else ():
        of_run = f"tasks.{key}" if c.tasks else "task"
        with of_field(f"{own.field}.task" if own.offset else of_run):
            size, part = len(task.examples("test")), int(own.shares[key] * own.prompts)
        most = int(size / own.shares[key])
        text = f"at most {most}, for the test split of {key} has {size} prompts"
        require(part <= size, field, own.prompts, text)


def judges(made: Mapping[str, Task], evals: Evals) -> dict[str, Task]:
    """All tasks of a run in the order in which ``Example.task`` counts them, its own first."""
    new = [one for one in evals.values() if one.offset >= len(made)]
    return {**made, **{one.field: task for one in new for task in one.tasks.values()}}


def task_names(c: Any) -> Iterator[str]:
    """The ``task.name`` of each evaluation that has one."""
    for task in (entry.get("task") for entry in c.evals.values()):
        yield from [task["name"]] if isinstance(task, dict) else [task] if task else []


def shaped(
    evals: Evals, prompts: int, room: int, *, keep: Fits | None, width: int, **options: Any
) -> dict[str, Evaluation]:
    """The evaluations with the shapes that their prompts are sampled in.

    Those of as many samples share their programs: they have one batch, as large as those that
    sample alike can fill. The last batch is filled up, and so is one that the mesh does not divide.

    Args:
      evals: from `make`.
      prompts: sampled at a time, at most.
      room: tokens of a completion.
      keep, width: see `Evaluation`.
      **options: of `sampler.make_plan`.
    """
    parts, largest = options["parts"], {}
    for names in alike(evals):
        samples, total = evals[names[0]].samples, sum(evals[name].prompts for name in names)
        largest[samples] = max(largest.get(samples, 0), min(prompts, total))
    found = {}
    for name, one in evals.items():
        batch = -(-largest[one.samples] // parts) * parts
        plan = sampler.make_plan(batch, room, group_size=one.samples, **options)
        own = {"keep": keep, "width": width, "batch": batch, "plan": plan}
        found[name] = dataclasses.replace(one, **own)
    return found


def alike(evals: Evals) -> list[list[str]]:
    """The names of evaluations in groups that are sampled together, as one set of prompts.

    A prompt that two of a group share has the same samples in both, as each has alone.
    """
    groups: dict[tuple, list[str]] = {}
    for name, one in evals.items():
        key = (one.samples, one.temperature, one.top_k, one.top_p)
        groups.setdefault(key, []).append(name)
    return list(groups.values())
