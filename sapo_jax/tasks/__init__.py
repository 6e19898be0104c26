"""Tasks by name: what a policy is asked, and how its answers are judged.

    task = tasks.make("countdown", numbers=4)
    example = task.examples("test")[0]           # its prompt, its answer, a worked completion
    task.verify(example, "(12-3)*5")             # 1.0 where that is right

A config names its task and the options in ``c.task``, or several tasks in ``c.tasks``.

A task of your own is a frozen dataclass whose fields are its options, with the members that
`base.Task` describes (docs/howto/task.md has one), and a line in TASKS, or `register`, or neither:
of a file of yours it is ``make("my.py:Reverse", length=3)``, and in a config ``c.task.name =
"my.py:Reverse"``. `chain_sum` is one like it; `jsonl.FileTask` reads problems from files; a program
is run by `verifiers.sandbox`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sapo_jax import cli
from sapo_jax.tasks import own
from sapo_jax.tasks.base import Task
from sapo_jax.tasks.chain_sum import ChainSum
from sapo_jax.tasks.countdown import Countdown
from sapo_jax.tasks.image_files import Grounding, MathVision
from sapo_jax.tasks.math_answer import MathAnswer
from sapo_jax.tasks.mixture import Mixture
from sapo_jax.tasks.prepared import Gsm8k, Prepared
from sapo_jax.tasks.programs import Programs
from sapo_jax.tasks.reasoning import ReasoningGym
from sapo_jax.tasks.visual import ChartValue, CountShapes, Maze, ReadClock, VisualSum

__all__ = ["TASKS", "Mixture", "Task", "make", "register"]

TASKS: dict[str, type] = {
    "chain_sum": ChainSum,
    "countdown": Countdown,
    "prepared": Prepared,
    "gsm8k": Gsm8k,
    "math_answer": MathAnswer,
    "reasoning_gym": ReasoningGym,
    "programs": Programs,
    "visual_sum": VisualSum,
    "count_shapes": CountShapes,
    "read_clock": ReadClock,
    "chart_value": ChartValue,
    "maze": Maze,
    "mathvision": MathVision,
    "grounding": Grounding,
}

SHIPPED = frozenset(TASKS)


def register(name: str, kind: Callable[..., Task] | None = None) -> Callable:
    """Give a task of your own a name in this process: ``@tasks.register("reverse")``.

    Raises:
      ValueError: the name is one of the project's, or what it is given to can be no task.
    """
    if kind is None:
        return lambda kind: register(name, kind)
    if name in SHIPPED or not name.isidentifier():
        raise ValueError(f"tasks.register({name!r}): must be a new name of letters, digits and _")
    if not callable(kind):
        raise ValueError(f"tasks.register({name!r}): must get the task's class, not {kind!r}")
    TASKS[name] = kind
    return kind


def make(name: str, /, **options: Any) -> Task:
    """The task of a name, or of a file ("my.py:MyTask"), with its options.

    Raises:
      ValueError: unknown name, an option that the task lacks, or a value that it refuses; of a task
        that is not the project's, what it lacks, and what differs between processes.
    """
    if cli.own.is_reference(name):
        kind = cli.own.load(name)
    elif name in TASKS:
        kind = TASKS[name]
    else:
        raise ValueError(
            f"unknown task {name!r}; allowed: {', '.join(TASKS)}, or one in a file, my.py:MyTask"
            f"{cli.nearest(name, TASKS)}"
        )
    if not callable(kind):
        raise ValueError(f"task {name!r} is {kind!r}: must be the task's class")
    known = inspect.signature(kind).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = ", ".join(known) or "none"
        near = cli.nearest(unknown[0], known)
        raise ValueError(f"task {name!r} has no option {unknown}; it has {has}{near}")
    types = {option: known[option].annotation for option in options}
    try:
        task = kind(**options)
    except (TypeError, AttributeError) as error:
        own.check_types(name, options, types)  # where that says more
        raise ValueError(f"task {name!r} with the options {options}: {error}") from error
    own.check_types(name, options, types)
    if name not in SHIPPED:
        own.check(name, task, options)
    return task
