"""Sweeps as data: lists of overrides, one dictionary of config fields for each run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Overrides = list[dict[str, Any]]  # field, dotted, to value; one dictionary a run


def axis(path: str, *values: Any) -> Overrides:
    """One run for each value of a field: ``axis("objective.tau_neg", 0.95, 1.0, 1.05)``.

    Scalars of NumPy become plain numbers, as JSON holds them.

    Raises:
      ValueError: no value, or values in a list.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"axis({path!r}, …): must begin with a field's name, such as 'seed'")
    if len(values) == 1 and isinstance(values[0], list | tuple | range):
        raise ValueError(f"axis({path!r}, {values[0]!r}): write axis({path!r}, *values)")
    if not values:
        raise ValueError(f"axis({path!r}): must have at least one value")
    return [{path: value.item() if hasattr(value, "item") else value} for value in values]


def product(*parts: Overrides) -> Overrides:
    """Every combination of the parts' runs; the last part varies fastest.

    Raises:
      ValueError: no part, or two parts with the same field.
    """
    combined: Overrides = [{}]
    for part in _checked("product", parts):
        combined = [{**left, **right} for left in combined for right in part]
    return combined


def zip_(*parts: Overrides) -> Overrides:
    """The first runs of all parts as one run, the second ones as another, and so on.

    Raises:
      ValueError: no part, parts of different lengths, or two parts with the same field.
    """
    parts = _checked("zip_", parts)
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        named = ", ".join(f"{'/'.join(part[0])}: {len(part)}" for part in parts)
        raise ValueError(f"zip_: the parts must be of one length, they are {named}")
    return [dict(_items(runs)) for runs in zip(*parts, strict=True)]


def _items(runs: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
    return (item for run in runs for item in run.items())


def _checked(name: str, parts: tuple[Overrides, ...]) -> tuple[Overrides, ...]:
    if not parts or not all(parts):
        raise ValueError(f"{name}: must combine at least one part, none of them empty")
    seen: set[str] = set()
    for part in parts:
        if not isinstance(part, list) or not all(isinstance(run, dict) for run in part):
            raise ValueError(f"{name}: a part must be axis(…), product(…) or zip_(…), got {part!r}")
        fields = {field for run in part for field in run}
        if seen & fields:
            raise ValueError(f"{name}: {', '.join(sorted(seen & fields))} is in two parts")
        seen |= fields
    return parts
