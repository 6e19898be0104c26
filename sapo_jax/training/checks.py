"""Refusals of config fields: the field, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sapo_jax.cli import nearest


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Refuse a value unless the condition holds.

    Raises:
      ValueError: it does not.
    """
    if not condition:
        raise ValueError(f"config.{field}={value!r}: must be {allowed}")


def choice(field: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a value that is not among those allowed, and name the nearest.

    Raises:
      ValueError: it is not.
    """
    if value not in allowed:
        hint = f"; the nearest is {nearest(value, allowed)!r}"
        raise ValueError(f"config.{field}={value!r}: must be one of {', '.join(allowed)}{hint}")
