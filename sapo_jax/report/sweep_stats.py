"""What the runs of a sweep say together: curves over seeds, paired differences, collapses.

A *setting* is what a run changes besides its seed (and besides the cold start that goes with the
seed, where there is one for each). Its runs are its replicates; runs of one seed share prompts and
noise, so that settings are compared seed by seed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sapo_jax.cli import from_config
from sapo_jax.report import run_records, survival
from sapo_jax.report.run_records import Records
from sapo_jax.training.bootstrap import interval
from sapo_jax.training.collapse import Collapse
from sapo_jax.training.progress import WALL, Skips

FEWEST = 3  # seeds of an interval: resampling two tells of nothing between them
COLLAPSES = ("reward", "entropy", "finite")
CURVES = ("eval/pass_at_1", "reward/mean", "policy/entropy", "length/mean")

Overrides = Mapping[str, Any]


class Run(NamedTuple):
    """A run of a sweep, with its records of metrics."""

    name: str
    directory: str
    overrides: Overrides
    records: Records
    config: Mapping[str, Any] = MappingProxyType({})  # as the run stored it; else the defaults

    def section(self, name: str) -> dict[str, Any]:
        """A section of its config, with the defaults of fields that are newer than the run."""
        return _defaults()[name] | self.config.get(name, {})


@functools.cache
def _defaults() -> dict[str, Any]:
    """Of all fields; read once, where a report asks for them run by run."""
    return from_config("base").to_dict()


def replicate_fields(runs: Sequence[Overrides]) -> set[str]:
    """The fields that tell replicates apart: the seed, and a cold start that follows from it."""
    starts: dict[Any, set] = {}
    for run in runs:
        starts.setdefault(run.get("seed"), set()).add(run.get("init_from"))
    follows = len(starts) > 1 and all(len(found) == 1 for found in starts.values())
    return {"seed", "init_from"} if follows else {"seed"}


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The replicates of each setting, in the order of the sweep; keys are the settings in JSON."""
    replicates = replicate_fields([run.overrides for run in runs])
    groups: dict[str, list[Run]] = {}
    for run in runs:
        setting = {k: v for k, v in run.overrides.items() if k not in replicates}
        groups.setdefault(json.dumps(setting), []).append(run)
    return groups


def series(records: Records, key: str) -> dict[int, float]:
    """Values by iteration, where they are finite."""
    found = {r["iteration"]: r.get(key) for r in records}
    return {i: float(v) for i, v in found.items() if v is not None}


def mean_of(values: Sequence[float]) -> dict[str, float | None]:
    """The mean over seeds with its interval; null of nothing, and no interval of too few."""
    low, high = interval(np.array(values)) if len(values) >= FEWEST else (None, None)
    mean = float(np.mean(values)) if len(values) else None
    return {"mean": mean, "low": low, "high": high}


def curve(runs: Sequence[Run], key: str) -> dict[str, list]:
    """Mean over the runs, with the bounds of its interval, at the iterations that all have."""
    each = [series(run.records, key) for run in runs]
    common = sorted(set.intersection(*(set(s) for s in each))) if each else []
    means = [mean_of([s[i] for s in each]) for i in common]
    return {"iteration": common} | {k: [m[k] for m in means] for k in ("mean", "low", "high")}


def evaluations(runs: Sequence[Run]) -> list[str]:
    """The names of evaluations, and of tasks, that all runs have a Pass@1 of."""
    each = [run_records.evaluations(run.records) for run in runs]
    return [name for name in each[0] if all(name in own for own in each)] if each else []


def final(records: Records, key: str = "eval/pass_at_1") -> float | None:
    """The last value of a metric."""
    found = series(records, key)
    return found[max(found)] if found else None


def paired(
    ends: Mapping[Any, float | None], reference: Mapping[Any, float | None]
) -> dict[str, Any] | None:
    """Final Pass@1 by seed minus that of the reference, with the interval of the mean."""
    pairs = [(end, reference.get(seed)) for seed, end in ends.items()]
    differences = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if not len(differences):
        return None
    better = float((differences > 0).mean())
    return {"pairs": len(differences), "better": better, **mean_of(differences)}


def ends_of(entry: Mapping[str, Any]) -> dict[Any, float | None]:
    """The final Pass@1 of a setting's runs by seed."""
    return {run["seed"]: run["pass_at_1"] for run in entry["runs"]}


def leaders(settings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The setting with the highest mean Pass@1, and those that are not told apart from it.

    A setting is told apart where the interval of its paired difference, seed by seed, is below 0.
    """
    known = [entry for entry in settings if entry["pass_at_1"]["mean"] is not None]
    known.sort(key=lambda entry: -entry["pass_at_1"]["mean"])
    found = known[:1]
    for entry in known[1:]:
        difference = paired(ends_of(entry), ends_of(known[0]))
        if difference is None or difference["high"] is None or difference["high"] >= 0:
            found.append(entry)
    return found


def collapse(
    records: Records, rule: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, int | None]:
    """The iteration at which a run collapsed, in three ways; None where it did not.

    ``reward`` and ``entropy`` are those of `training.collapse`, by the fields of config.collapse
    in ``rule``, the others being the defaults; ``finite``: an update was skipped for the first
    time, since a number was not finite.
    """
    found = Collapse(_defaults()["collapse"] | dict(rule), records)
    # A number that is not finite is null in a record, and so is what is not measured where no group
    # has a signal, or none has ended: what was skipped is counted, but in runs of before.
    broken = [
        r["iteration"] for r in records
        if r.get("update/skipped", None in (r.get("policy/loss", 0), r.get("grad/norm", 0)))
    ]  # fmt: skip
    finite = min(broken, default=None)
    return {kind: found.since(kind) or None for kind in COLLAPSES[:2]} | {"finite": finite}


def life(run: Run) -> survival.Life:
    """How long a run lasted: to its collapse, as run/collapsed_at has it, or to where it stopped
    since its numbers were not finite; else to its last iteration.
    """
    last = run.records[-1]["iteration"] if run.records else 0
    since = Collapse(run.section("collapse"), run.records).since()
    stopped = Skips(run.section("learner")["max_skipped"], run.records).why != ""
    return survival.Life(since or last, since > 0 or stopped)


def collapses(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Of each way to collapse: the share of runs, and the median of the iterations."""
    each = [collapse(run.records, run.section("collapse")) for run in runs]
    out = {}
    for kind in COLLAPSES:
        steps = [found[kind] for found in each if found[kind] is not None]
        median = float(np.median(steps)) if steps else None
        out[kind] = {"share": len(steps) / len(each), "median": median, "steps": steps}
    return out


def _shown(run: Run, end: float | None) -> dict[str, Any]:
    named = {"name": run.name, "directory": run.directory, "seed": run.overrides.get("seed")}
    collapsed = collapse(run.records, run.section("collapse"))
    return named | {"pass_at_1": end} | {f"collapse_{k}": v for k, v in collapsed.items()}


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the report shows, as JSON holds it; the first setting is the reference."""
    groups, names = group(runs), evaluations(runs)
    keys = {name: f"eval/{name}/pass_at_1" for name in names}
    settings: list[dict[str, Any]] = []
    for key, members in groups.items():
        ends = [final(run.records) for run in members]
        settings.append({
            "setting": json.loads(key),
            "runs": list(map(_shown, members, ends)),
            "pass_at_1": mean_of([end for end in ends if end is not None]),
            "difference": None,
            "collapse": collapses(members),
            "curves": {
                key: curve(members, key)
                for key in (*CURVES, *keys.values())
                if series(members[0].records, key)
            },
            "evaluations": {
                name: mean_of([x for run in members if (x := final(run.records, key)) is not None])
                for name, key in keys.items()
            },
        })  # fmt: skip
    first, *others = settings
    for entry in others:
        entry["difference"] = paired(ends_of(entry), ends_of(first))
    return {
        "settings": settings,
        "hours": hours(runs),
        "survival": survival.compare({k: list(map(life, some)) for k, some in groups.items()}),
    }


def hours(runs: Sequence[Run]) -> float:
    """Time that all runs took, in hours."""
    return sum(r.get(key) or 0 for run in runs for r in run.records for key in WALL) / 3600


def varied(found: Mapping[str, Any]) -> list[str]:
    """The fields that differ between the settings."""
    settings = [entry["setting"] for entry in found["settings"]]
    fields = dict.fromkeys(field for setting in settings for field in setting)
    return [f for f in fields if len({json.dumps(s.get(f)) for s in settings}) > 1]
