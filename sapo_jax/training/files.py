"""Files that are whole after any kill, on a local disk or on gs://."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
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
    """Replace a file as a whole, for good: a kill or a loss of power leaves the old or the new one.

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
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)


def sync(path: epath.Path) -> None:
    """Return when all that lies below a path would outlive a loss of power, its name included."""
    if not is_remote(path):
        for place in (*pathlib.Path(path).rglob("*"), path, path.parent):
            _fsync(place)


def _fsync(path: epath.Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


LEFT_OVER = {  # by a start that was killed before it wrote down what it is
    ".lock", "lease.json", "lease.json.tmp", "config.json.tmp", "manifest.json.tmp",
}  # fmt: skip


def check_directory(
    path: epath.PathLike, flag: str, is_ours: Callable[[epath.Path], bool], what: str
) -> None:
    """Refuse to write into a directory that holds files of somebody else.

    Args:
      path: of the directory; there may be none yet.
      flag: that named it, with what comes before the value.
      is_ours: whether a directory that is not empty is `what`.

    Raises:
      ValueError: it is a file, or neither empty nor ours.
    """
    path = normal(path)
    _check_above(path, flag)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag}{path}: is a file; must be a directory")
    names = {p.name for p in path.iterdir()} if path.exists() else set()
    if (found := sorted(names - LEFT_OVER)) and not is_ours(path):
        some = ", ".join(found[:3]) + ", …" * (len(found) > 3)
        raise ValueError(
            f"{flag}{path}: holds {some} and is not {what}; must be new, empty, or {what}"
        )


def _check_above(path: epath.Path, flag: str) -> None:
    """Refuse what can lie, or be written, nowhere."""
    if is_remote(path):
        return
    above = next(place for place in path.parents if place.exists())
    if not above.is_dir():
        raise ValueError(f"{flag}{path}: {above} is a file; must be a directory")
    place = path if path.is_dir() else above
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}{path}: {place} may not be written by this user")


def check_file(
    path: epath.PathLike, flag: str, is_ours: Callable[[bytes], bool], what: str
) -> None:
    """Refuse to replace a file that is not ours, before anything is computed for it.

    Raises:
      ValueError: it is a directory, or holds anything else than `what`.
    """
    path = normal(path)
    _check_above(path, flag)
    if path.is_dir():
        raise ValueError(f"{flag}{path}: is a directory; must be a file")
    if path.exists() and path.read_bytes() and not is_ours(path.read_bytes()):
        raise ValueError(f"{flag}{path}: exists and is not {what}; must be a new file, or {what}")


def write_json(path: epath.PathLike, value: Any) -> None:
    """Store a value as JSON, as a whole."""
    write_text(normal(path), json.dumps(value, indent=2, sort_keys=True) + "\n")


KINDS = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number"}


def read_json(path: epath.PathLike, shape: Any = dict) -> Any:
    """What JSON a file holds; None where there is no file.

    Args:
      path: of the file.
      shape: a type; or [shape of each]; or {key: shape}, the keys that it must have.

    Raises:
      ValueError: naming the file: it is a directory, no JSON, or not of the shape.
    """
    path = normal(path)
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a directory; must be a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON, {error}; repair or remove it") from None
    _check_shape(value, shape, f"{path}: ")
    return value


def _check_shape(value: Any, shape: Any, where: str) -> None:
    kind = shape if isinstance(shape, type) else type(shape)
    number = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if not (isinstance(value, kind) or number):
        raise ValueError(f"{where}is {value!r:.60}, must be {KINDS[kind]}")
    for i, item in enumerate(value if isinstance(shape, list) else ()):
        _check_shape(item, shape[0], f"{where}[{i}] ")
    for key, inner in shape.items() if isinstance(shape, dict) else ():
        if key not in value:
            raise ValueError(f"{where}has no {key!r}; it has {', '.join(value)[:200] or 'nothing'}")
        _check_shape(value[key], inner, f"{where}{key} ")
