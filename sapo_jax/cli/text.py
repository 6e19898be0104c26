"""Names, values and tables as a person writes and reads them."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


def literal(text: str) -> Any:
    """The value that Python reads in a text, or the text itself.

    Raises:
      ValueError: it is meant as a value, but is JSON's true, false or null, or broken.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text in ("true", "false", "null") or text.startswith(("{", "[", "(")):
            only = "as in Python: True, False, None, not true, false, null; 'text' in quotes"
            raise ValueError(f"must be written {only}") from None
        return text


def flat(config: Mapping[str, Any], prefix: str = "", *, sections: bool = False) -> dict[str, Any]:
    """The values of a config by dotted field; with ``sections``, those too."""
    fields = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping | ConfigDict) and len(value) > 0
        if sections or not inner:
            fields[prefix + key] = value
        if inner:
            fields |= flat(value, f"{prefix}{key}.", sections=sections)
    return fields


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that is most like another, two letters that changed places aside."""
    name = str(name)[:100].lower()
    likes = [name, *(name[:i] + name[i : i + 2][::-1] + name[i + 2 :] for i in range(len(name)))]

    def likeness(other: str) -> float:
        ratios = (difflib.SequenceMatcher(None, x, other.lower(), False).ratio() for x in likes)
        return max(ratios)

    return max(names, key=lambda other: (likeness(other), other))


def table(rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of aligned columns."""
    rows = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  " + "  ".join(map(str.ljust, row, [*widths, 0])).rstrip() for row in rows]
