"""Files that are whole after any kill, on a local disk or on gs://."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is one of an object store."""
    return "://" in os.fspath(path)


def normal(path: epath.PathLike) -> epath.Path:
    """The path with ~ and links resolved, where it is local."""
    path = epath.Path(path)
    return path if is_remote(path) else path.expanduser().resolve()


def write_text(path: epath.Path, text: str) -> None:
    """Replace a file as a whole: a killed process leaves the old or the new one.

    Of the processes of a run only the first one writes.
    """
    if jax.process_index() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_text(text)  # an object appears when it is complete
    else:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Store a value as JSON, as a whole."""
    write_text(normal(path), json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: epath.PathLike) -> Any:
    """What JSON a file holds; None where there is no file."""
    try:
        return json.loads(normal(path).read_bytes())
    except FileNotFoundError:
        return None
