"""JSON lines: the one reader of them, and what tasks share whose problems come from such files."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from etils import epath

from sapo_jax.tasks.base import PRINTABLE, Example, check_option

Fields = Mapping[str, type | tuple[type, ...]]


def read(
    path: epath.PathLike,
    fields: Fields | None = None,
    *,
    strict: bool = False,
    may_be_cut: bool = False,
) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with its line number, from 1.

    Args:
      path: local, or anything that ``etils.epath`` opens.
      fields: name -> type of the fields that each object must have.
      strict: every line holds an object, and there may be none, as in the files of a run; by
        default blank lines are passed over, and there must be an object.
      may_be_cut: a last line without an end that is no JSON is left out.

    Raises:
      ValueError: no such file, no object in it, or a broken line, by its number.
    """
    path = epath.Path(path).expanduser()
    if not path.is_file():
        there = "is a directory; must be a file of JSON lines" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {there}")
    *lines, tail = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, tail] if tail else lines, start=1):
        line = line.removeprefix(codecs.BOM_UTF8)  # of the file, or of one that was appended
        if not strict and not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if may_be_cut and number > len(lines):
                break
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from None
        try:
            _check(row, fields or {})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append((number, row))
    if not strict and not rows:
        raise ValueError(f"{path} is empty: it must hold at least one line")
    return rows


def some(complaints: list[str]) -> str:
    """The first complaints of many, in one line."""
    more = f"; and {len(complaints) - 3} more" if len(complaints) > 3 else ""
    return "; ".join(complaints[:3]) + more


def _check(row: Any, fields: Fields) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"no field {name!r}; it has {', '.join(row)}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"field {name!r} is {row[name]!r:.60}")


@dataclass(frozen=True)
class FileTask:
    """A task with one problem a line; a subclass says by ``_parse`` what is on a line.

    Args:
      train: JSON-lines file of the training split; "" where there is none.
      test: the same of the test split.
      completion_chars: what ``max_completion_chars`` says, since there are no demonstrations.

    Raises:
      ValueError: an option is out of its range.
    """

    train: str = ""
    test: str = ""
    completion_chars: int = 4096

    _fields: ClassVar[Fields] = {}

    def __post_init__(self):
        check_option("completion_chars", self.completion_chars, 1)

    def _parse(self, row: dict[str, Any], key: str) -> tuple[Example, Any]:
        """The example of a line, which ``key`` names, and what it is judged by besides."""
        raise NotImplementedError

    @functools.cached_property
    def _splits(self) -> dict[str, list[tuple[Example, Any]]]:
        return {split: self._read(path) for split, path in self._paths.items() if path}

    @property
    def _paths(self) -> dict[str, str]:
        return {"train": self.train, "test": self.test}

    def _read(self, path: str) -> list[tuple[Example, Any]]:
        rows, bad = [], []
        for line, row in read(path, self._fields):
            try:
                rows.append(self._parse(row, f"{path}#{line}"))
            except ValueError as error:
                bad.append(f"line {line}: {error}")
        if bad:
            raise ValueError(f"{path}, {some(bad)}")
        return rows

    @functools.cached_property
    def _prompts(self) -> list[str]:
        return [example.prompt for rows in self._splits.values() for example, _ in rows]

    @functools.cached_property
    def alphabet(self) -> str:
        """The characters of the prompts, and printable ASCII for the completions, sorted."""
        return "".join(sorted(PRINTABLE.union(*self._prompts)))

    @functools.cached_property
    def max_prompt_chars(self) -> int:
        """The longest prompt of the files."""
        return max(map(len, self._prompts), default=0)

    @property
    def max_completion_chars(self) -> int:
        """As configured: there are no demonstrations."""
        return self.completion_chars

    def examples(self, split: str) -> Sequence[Example]:
        """The problems of ``"train"`` or ``"test"``, in the order of the file."""
        if split not in self._paths:
            raise ValueError(f"unknown split {split!r}; allowed: {', '.join(self._paths)}")
        if not self._paths[split]:
            raise ValueError(f"split {split!r} has no file: set the task's option {split!r} to one")
        return [example for example, _ in self._splits[split]]
