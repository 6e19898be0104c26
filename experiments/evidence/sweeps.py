"""Sections of an experiment that are sweeps: trained, collected, put into tables."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.evidence import policy, stats, store
from experiments.evidence.stats import Effect
from experiments.evidence.study import interval, markdown
from sapo_jax import cli
from sapo_jax.axes import Overrides
from sapo_jax.report import sweep_plots, sweep_stats
from sapo_jax.report.sweep_stats import Run
from sapo_jax.sweep import cohorts, schedule

MOST = 8  # runs of a cohort: few enough that the processes of a sweep end together
Runs = Sequence[Run]


class Section(NamedTuple):
    """A sweep: what its runs have in common, what each changes, and the kind of its cold start."""

    config: ConfigDict
    sweep: Overrides
    kind: str = "moe"


def train(
    sections: Mapping[str, Section], given: cli.Flags, module: str
) -> Iterator[tuple[str, Any]]:
    """Train what is left of the sections, in ``given.jobs`` processes; yields their curves."""
    place, jobs = pathlib.Path(given.workdir), given.jobs
    chosen = {k: s for k, s in sections.items() if k in (given.sections or sections)}
    each = {}
    for name, (config, sweep, kind) in chosen.items():
        config.init_from = str(policy.start(kind, place.parent / "cold_start", given.size))
        each[name] = cohorts.make(config, sweep, most=MOST)
    others = [] if given.job else [_start(module, given, k) for k in range(1, jobs)]
    for name, parts in each.items():
        schedule.run(parts, place / name, job=(given.job, jobs))
    if given.job:
        return
    for other in others:
        other.wait()
    for name, parts in each.items():
        schedule.run(parts, place / name)  # whatever a process that failed left
        yield name, store.collect(place / name)


def _start(module: str, given: cli.Flags, job: int) -> subprocess.Popen:
    flags = [f"--{k}={getattr(given, k)}" for k in ("size", "workdir", "jobs")]
    flags += [f"--sections={','.join(given.sections)}", f"--job={job}"]
    log = pathlib.Path(given.workdir) / f"job-{job}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        command = [sys.executable, "-m", module, *flags]
        return subprocess.Popen(command, stdout=file, stderr=file)


def late(run: Run, key: str = "eval/pass_at_1", share: float = 0.5) -> float:
    """The mean of the evaluations in the second half of a run; those after it stopped are 0.

    What a collapse has cost counts, and so does when it came.
    """
    found, total = sweep_stats.series(run.records, key), run.config["iterations"]
    every = run.config["eval"]["every"]
    planned = [i for i in range(every, total + 1, every) if i >= share * total]
    return sum(found.get(i, 0.0) for i in planned) / len(planned)


def by_setting(runs: Runs, endpoint: Callable[[Run], float] = late) -> dict[str, dict[int, float]]:
    """The endpoint of each seed, by setting (JSON, in the order of the sweep)."""
    groups = sweep_stats.group(runs)
    return {key: {r.overrides["seed"]: endpoint(r) for r in some} for key, some in groups.items()}


def table(
    runs: Runs, endpoint: Callable[[Run], float] = late, *, reference: int = 0, heading: str
) -> str:
    """Settings with their endpoint, against one of them seed by seed, and how many collapsed.

    p is Holm's over the rows.
    """
    found, groups = sweep_stats.summarise(runs), list(sweep_stats.group(runs).values())
    values = list(by_setting(runs, endpoint).values())
    against: dict[str, Effect] = {
        str(k): stats.difference(own, values[reference])
        for k, own in enumerate(values) if k != reference
    }  # fmt: skip
    p = stats.holm({key: effect.p for key, effect in against.items()})
    rows = []
    for k, (entry, some) in enumerate(zip(found["settings"], groups, strict=True)):
        ends, key = stats.effect(list(values[k].values())), str(k)
        lost = [sweep_stats.life(run) for run in some]
        when = sorted(life.iterations for life in lost if life.collapsed)
        collapsed = f"{len(when)} of {len(lost)}"
        collapsed += f", from iteration {when[len(when) // 2]} in the median" if when else ""
        row = [sweep_plots.label(found, entry["setting"]), str(len(some))]
        row.append(interval(ends).replace("+", ""))
        row += [interval(against[key]), f"{p[key]:.2g}"] if key in against else ["reference", ""]
        rows.append([*row, collapsed])
    columns = ["setting", "seeds", heading, "difference", "p (Holm)", "collapsed"]
    return markdown(columns, rows)
