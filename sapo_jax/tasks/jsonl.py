"""Problems from JSON lines: read whole, every mistake reported with its line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from etils import epath

from sapo_jax.tasks.base import Example


def read(path: str, required: Mapping[str, type | tuple[type, ...]]) -> list[tuple[int, dict]]:
    """The objects of a file, each with its line number; empty lines are skipped.

    Args:
        path: local, or anything that ``etils.epath`` opens.
        required: name -> type of the fields that each object must have.

    Raises:
        ValueError: no such file, no object in it, or a broken line, by its number.
    """
    try:
        lines = epath.Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    rows = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {i}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {i}: not an object: {line[:40]!r}")
        for name, kind in required.items():
            if name not in row:
                raise ValueError(f"{path}, line {i}: no field {name!r}; it has {', '.join(row)}")
            if not isinstance(row[name], kind) or isinstance(row[name], bool):
                raise ValueError(f"{path}, line {i}: field {name!r} is {row[name]!r:.60}")
        rows.append((i, row))
    if not rows:
        raise ValueError(f"{path}: no problems in it")
    return rows


def split_path(split: str, paths: Mapping[str, str]) -> str:
    """The file of a split.

    Raises:
        ValueError: unknown split, or one without a file.
    """
    if split not in paths:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(paths)}")
    if not paths[split]:
        raise ValueError(f"split {split!r} has no file: set the task's option {split!r} to one")
    return paths[split]


def alphabet(examples: Sequence[Example]) -> str:
    """Every character of the prompts, and printable ASCII for the completions, sorted."""
    printable = {chr(i) for i in range(32, 127)} | {"\n"}
    return "".join(sorted(printable.union(*(e.prompt for e in examples))))
