"""The files of a run directory besides its checkpoints: config, metrics and samples.

Of the processes of a run only the first one changes files; in the others nothing is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from sapo_jax.cli import flat, from_config
from sapo_jax.tasks import jsonl
from sapo_jax.training.checks import check_type
from sapo_jax.training.files import (
    check_directory,
    is_remote,
    normal,
    read_json,
    write_json,
    write_text,
)
from sapo_jax.training.tracker import TRACKERS, Tracker

PART_LINES = 100
RECORD = {"iteration": int}
FOLDERS = "metrics", "samples", "checkpoints", *TRACKERS
FILES = "config.json", "provenance.json", "report.html", "lease.json", ".lock", "wandb.json"


def write_config(workdir: epath.PathLike, config: dict) -> None:
    """Store the resolved config of a run as config.json."""
    write_json(normal(workdir) / "config.json", config)


def read_config(workdir: epath.PathLike) -> dict | None:
    """The stored config, or None before the first start."""
    return read_json(normal(workdir) / "config.json")


def is_run(workdir: epath.PathLike) -> bool:
    """Whether a directory is of a run: its config.json is none of Hugging Face, say."""
    config = read_config(workdir)
    return isinstance(config, dict) and {"iterations", "learner", "sampler"} <= set(config)


def check_workdir(workdir: epath.PathLike) -> None:
    """Refuse a directory that holds files and is of no run, or a file where one of a run has none.

    Raises:
      ValueError: naming the path, and what must be there.
    """
    check_directory(workdir, "--workdir=", is_run, "a run's, with its config.json")
    workdir = normal(workdir)
    if is_remote(workdir):  # object stores have no directories
        return
    for path in map(workdir.joinpath, FOLDERS):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file; must be a directory, or not be there")
    parts = [p for folder in ("metrics", "samples") for p in workdir.glob(f"{folder}/*.jsonl")]
    for path in (*map(workdir.joinpath, FILES), *parts):
        if path.is_dir():
            raise ValueError(f"{path}: is a directory; must be a file, or not be there")
    for path in workdir.glob("checkpoints/*"):
        if path.name.isdecimal() and not path.is_dir():
            raise ValueError(f"{path}: is a file; must be a directory, or not be there")


def check_config(workdir: epath.PathLike, config: dict, *, may_differ: frozenset[str]) -> None:
    """Refuse to go on with a run under another config than it was started with.

    Raises:
      ValueError: a dotted key that is not in ``may_differ`` has another value than is stored.
    """
    stored = read_config(workdir)
    if stored is None:
        return
    old, new = flat(stored), flat(json.loads(json.dumps(config)))
    base = from_config("base")
    try:
        for field in sorted(old.keys() & may_differ):  # what is replaced: damage would be hidden
            check_type(base, field, old[field])
    except ValueError as error:
        where = normal(workdir) / "config.json"
        raise ValueError(f"{where}: {error}; repair the file, or give another --workdir") from None
    defaults = flat(json.loads(base.to_json_best_effort()))  # of fields that are newer than the run
    files = dict(old.pop("files", [])), dict(new.pop("files", []))
    differences = [
        f"{path} has changed: SHA-256 {files[0][path][:12]} then, {now[:12]} now"
        for path, now in files[1].items()
        if files[0].get(path, now) != now
    ]
    for key in sorted((old.keys() | new.keys()) - may_differ):
        before, now = old.get(key, defaults.get(key, "(absent)")), new.get(key, "(absent)")
        if before != now:
            differences.append(f"{key}: stored {before!r}, given {now!r}")
    if differences:
        raise ValueError(
            f"{normal(workdir)} is of a run with another config: {'; '.join(differences)}; "
            "give another --workdir, or restore the stored values"
        )


class Metrics:
    """Writes records as JSON lines in numbered parts, metrics/part-00000.jsonl, and to trackers.

    Object stores cannot append, so every record rewrites its part, of at most 100 lines, as a
    whole: a killed process leaves only whole lines.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        first_iteration: int,
        trackers: Sequence[str] = ("tensorboard",),
    ):
        """Cut the records beyond ``first_iteration``, the number of finished iterations restored.

        Where nothing was restored, -1 cuts the record of an evaluation before training as well.
        """
        self._directory = normal(workdir) / "metrics"
        self._part, self._lines, self._trackers = 0, [], []
        if jax.process_index() > 0:
            return
        parts = _numbered(self._directory, "part")
        for part, path in parts.items():
            records = _read_lines(path, RECORD, may_be_cut=part == max(parts))
            rest = [r for r in records if r["iteration"] <= first_iteration]
            if not rest:
                path.unlink()
            elif (text := "".join(map(_line, rest))).encode() != path.read_bytes():
                write_text(path, text)
        self._part = max(_numbered(self._directory, "part"), default=-1) + 1
        place, step = normal(workdir), first_iteration + 1
        self._trackers = [Tracker(name, place, step) for name in trackers]

    def write(self, record: dict) -> None:
        """Add one record of numbers, lists and dicts; non-finite numbers become null."""
        record = _plain(record)
        if type(record.get("iteration")) is not int:
            raise ValueError(f"a record needs an integer 'iteration', got {sorted(record)}")
        if len(self._lines) == PART_LINES:
            self._part, self._lines = self._part + 1, []
        self._lines.append(_line(record))
        write_text(self._directory / f"part-{self._part:05d}.jsonl", "".join(self._lines))
        for tracker in self._trackers:
            tracker.write(record)

    def close(self) -> None:
        """Let the trackers write what is left; the JSON lines are already there."""
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """All records in order; a last line that was cut off in a copy is ignored.

    Raises:
      ValueError: any other line is broken.
    """
    parts = _numbered(normal(workdir) / "metrics", "part")
    return [r for n, p in parts.items() for r in _read_lines(p, RECORD, may_be_cut=n == max(parts))]


def gaps(records: list[dict], first: int, last: int) -> str:
    """The iterations of a range that have no record, such as "3, 5 to 9"; "" where all have."""
    found = {record["iteration"] for record in records} | {last + 1}
    spans, start = [], first
    for i in range(first, last + 2):
        if i in found:
            spans += [(start, i - 1)] if start < i else []
            start = i + 1
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in spans)


def write_samples(workdir: epath.PathLike, iteration: int, rows: list[dict]) -> None:
    """Store rows of a rollout as samples/iteration-000010.jsonl."""
    path = normal(workdir) / "samples" / f"iteration-{iteration:06d}.jsonl"
    write_text(path, "".join(_line(_plain(row)) for row in rows))


def read_samples(workdir: epath.PathLike, iteration: int | None = None) -> list[dict]:
    """Rows of an iteration, by default of the newest; [] where none was stored."""
    paths = _numbered(normal(workdir) / "samples", "iteration")
    path = paths.get(max(paths, default=None) if iteration is None else iteration)
    return [] if path is None else _read_lines(path)


def cut_samples(workdir: epath.PathLike, after_iteration: int) -> None:
    """Remove the samples of iterations beyond ``after_iteration``."""
    for iteration, path in _numbered(normal(workdir) / "samples", "iteration").items():
        if iteration > after_iteration and jax.process_index() == 0:
            path.unlink()


def remove_temporary(workdir: epath.PathLike) -> None:
    """Remove files that a kill left half written; that of the lease is under way."""
    workdir = normal(workdir)
    for folder in (workdir, workdir / "metrics", workdir / "samples"):
        for path in folder.glob("*.tmp") if folder.exists() else ():
            if path.name != "lease.json.tmp" and jax.process_index() == 0:
                path.unlink()


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if hasattr(x, "__array__"):
        return _plain(np.asarray(x).tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _read_lines(
    path: epath.Path, fields: jsonl.Fields | None = None, *, may_be_cut: bool = False
) -> list[dict]:
    try:
        rows = jsonl.read(path, fields, strict=True, may_be_cut=may_be_cut)
    except ValueError as error:
        raise ValueError(f"{error}; repair the line or remove it") from error
    return [row for _, row in rows]


def _numbered(directory: epath.Path, prefix: str) -> dict[int, epath.Path]:
    """The files <prefix>-<number>.jsonl in order; leftovers of atomic writes are not among them."""
    paths = directory.iterdir() if directory.exists() else []
    matches = [(re.fullmatch(rf"{prefix}-(\d+)\.jsonl", path.name), path) for path in paths]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))
