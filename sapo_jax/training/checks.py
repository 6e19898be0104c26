"""Refusals of config fields: the field, its value, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any


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
        near = difflib.get_close_matches(str(value), allowed, 1, 0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"config.{field}={value!r}: must be one of {', '.join(allowed)}{hint}")
