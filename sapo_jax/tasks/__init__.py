"""The tasks by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from sapo_jax.tasks.base import Task
from sapo_jax.tasks.chain_sum import ChainSum
from sapo_jax.tasks.countdown import Countdown
from sapo_jax.tasks.math_answer import MathAnswer
from sapo_jax.tasks.mixture import Mixture as Mixture
from sapo_jax.tasks.prepared import Gsm8k, Prepared
from sapo_jax.tasks.programs import Programs
from sapo_jax.tasks.reasoning import ReasoningGym

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
