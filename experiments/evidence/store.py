"""Curves of a sweep's runs as one compressed file, whose bytes depend on the curves alone."""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from sapo_jax.report.sweep_stats import Run, hours
from sapo_jax.sweep.schedule import MANIFEST
from sapo_jax.training import provenance
from sapo_jax.training.files import read_json
from sapo_jax.training.workdir import read_config, read_metrics

KEYS = (
    "eval/pass_at_1", "reward/mean", "reward/accuracy", "policy/entropy", "length/mean",
    "policy/loss", "policy/ratio_max", "policy/clipped", "policy/eur", "policy/kl_old",
    "ratio/var_mean", "ratio/bound_broken", "ratio/ess", "router/differs", "grad/norm",
    "advantage/kept_groups", "update/skipped", "time/iteration", "time/eval", "time/startup",
    "time/checkpoint",
)  # fmt: skip
FIELDS = ("iterations", "collapse", "learner", "batch", "eval")  # of the config
DIGITS = 5


def rounded(value: Any) -> Any:
    """Numbers of a tree with DIGITS significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def write(path: pathlib.Path, data: Any) -> None:
    """JSON, compressed; without a time or a name in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def read(path: pathlib.Path) -> Any:
    """What `write` wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))


def _stored(key: str) -> bool:
    return key in KEYS or (key.startswith("eval/") and key.endswith("/pass_at_1"))


def _curve(records: list[dict], key: str) -> list[list]:
    pairs = [(r["iteration"], r[key]) for r in records if key in r]
    return [list(column) for column in zip(*pairs, strict=True)]


def collect(workdir: epath.PathLike) -> dict[str, Any]:
    """The curves of every run of a sweep, those that stopped early included."""
    workdir = epath.Path(workdir)
    listed = read_json(workdir / MANIFEST, {"runs": [dict]})["runs"]
    runs = [curves(workdir / run["directory"], run["name"], run["overrides"]) for run in listed]
    return {"runs": runs, "provenance": starts(workdir / listed[0]["directory"])}


def curves(place: epath.Path, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one run."""
    records, config = read_metrics(place), read_config(place) or {}
    keys = sorted({key for record in records for key in record if _stored(key)})
    return {
        "name": name,
        "overrides": dict(overrides),
        "config": {key: config[key] for key in FIELDS if key in config},
        "curves": {key: rounded(_curve(records, key)) for key in keys},
    }


def starts(place: epath.Path) -> list[dict[str, Any]]:
    """What a run was started with, each time."""
    facts = ("commit", "versions", "device", "started")
    return [{key: one[key] for key in facts} for one in provenance.read(place)]


def runs_of(stored: dict[str, Any]) -> list[Run]:
    """The runs with their records, for `report.sweep_stats`."""
    out = []
    for run in stored["runs"]:
        records: dict[int, dict] = {}
        for key, (iterations, values) in run["curves"].items():
            for iteration, value in zip(iterations, values, strict=True):
                records.setdefault(iteration, {"iteration": iteration})[key] = value
        ordered = [records[i] for i in sorted(records)]
        out.append(Run(run["name"], "", run["overrides"], ordered, run["config"]))
    return out


def minutes(runs: list[Run]) -> float:
    """Of one process, over all runs."""
    return 60 * hours(runs)
