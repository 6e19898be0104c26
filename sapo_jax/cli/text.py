"""Names, values and tables as a person writes and reads them."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

NEAR = 0.6  # of 1: the least likeness of a name that is worth mentioning


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
    """The values of a config by dotted field; with ``sections``, those too.

    Raises:
      ValueError: a key is no text.
    """
    fields = {}
    for key, value in config.items():
        if not isinstance(key, str):
            raise ValueError(f"{prefix}{key!r}: a key must be text")
        inner = isinstance(value, Mapping | ConfigDict) and len(value) > 0
        if sections or not inner:
            fields[prefix + key] = value
        if inner:
            fields |= flat(value, f"{prefix}{key}.", sections=sections)
    return fields


def nearest(name: str, names: Iterable[str], form: str = "{!r}") -> str:
    """How a refusal ends that knows a name like the one that is wrong: "; the nearest is 'sapo'".

    It is "" where none is like it, as a whole and behind the last dot or slash; two letters that
    changed places make no difference.
    """
    name = str(name)[:100].lower()

    def last(text: str) -> str:
        return re.split(r"[./]", text)[-1]

    def likeness(one: str, other: str) -> float:
        likes = [one, *(one[:i] + one[i : i + 2][::-1] + one[i + 2 :] for i in range(len(one)))]
        return max(difflib.SequenceMatcher(None, x, other.lower(), False).ratio() for x in likes)

    best = max(names, key=lambda other: (likeness(name, other), other), default="")
    if min(likeness(name, best), likeness(last(name), last(best))) < NEAR:
        return ""
    return f"; the nearest is {form.format(best)}"


def several(count: int, noun: str) -> str:
    """A number of things: "1 prompt", "8 prompts"."""
    return f"{count} {noun}" + "s" * (count != 1)


def table(rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of aligned columns."""
    rows = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  " + "  ".join(map(str.ljust, row, [*widths, 0])).rstrip() for row in rows]
