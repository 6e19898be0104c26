"""Refusals of config fields: the field, its value, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from sapo_jax.cli import flat, nearest

LARGEST = 2**31 - 1  # counts are i32 on the device
MOST = {"seed": 2**32 - 1, "sampler.shrink": 30, "reward.workers": 4096, "data.workers": 1024}
OF_TASKS = ("task.", "tasks.", "tokenizer.template_options.")  # what others read: up to 64 bits
CHARACTERS = 2**16


def shown(value: Any) -> str:
    """A value as a refusal shows it, in a hundred characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "(a longer integer)"
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse numbers and texts that are too large for anything, before anything reads them.

    Raises:
      ValueError: naming the field.
    """
    for field, value in flat(config).items():
        if isinstance(value, float) and math.isfinite(value):
            require(abs(value) < 2.0**128, field, value, "a number of 32 bits, below 3.4e38")
        elif isinstance(value, int):
            most = MOST.get(field, 2**63 - 1 if field.startswith(OF_TASKS) else LARGEST)
            require(abs(value) <= most, field, value, f"at most {most}")
        elif isinstance(value, str):
            characters = f"at most {CHARACTERS} characters, none of them NUL"
            require(len(value) <= CHARACTERS and "\0" not in value, field, value, characters)


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Refuse a value unless the condition holds.

    Raises:
      ValueError: it does not.
    """
    if not condition:
        raise ValueError(f"config.{field}={shown(value)}: must be {allowed}")


def choice(field: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a value that is not among those allowed, and name the nearest.

    Raises:
      ValueError: it is not.
    """
    if value not in allowed:
        near = f"the nearest is {nearest(value, allowed)!r}"
        require(False, field, value, f"one of {', '.join(allowed)}; {near}")
