"""Sections of an experiment that are sweeps: trained, collected, put into tables."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.evidence import policy, stats, store
from experiments.evidence.study import Claim, Page, Study, interval, markdown
from sapo_jax import cli
from sapo_jax.axes import Overrides
from sapo_jax.report import sweep_plots, sweep_stats
from sapo_jax.report.style import Panel
from sapo_jax.report.sweep_stats import Run
from sapo_jax.sweep import cohorts, schedule

Runs = Sequence[Run]
SEEDS = {"smoke": 3, "default": 8, "large": 32}
# Runs of a cohort: on a CPU so few that the processes of a sweep end together.
MOST = {"smoke": 8, "default": 8, "large": 64}
# Of one core, from the pilots.
SECONDS_A_ROW, SECONDS_AN_EVALUATION = 0.0066, 2.0


class Section(NamedTuple):
    """A sweep: what its runs have in common, what each changes, and the kind of its cold start."""

    config: ConfigDict
    sweep: Overrides
    kind: str = "moe"


def study(
    name: str,
    claims: tuple[Claim, ...],
    sections: Callable[[str], Mapping[str, Section]],
    protocol: Callable[[], Mapping[str, str]],
    report: Callable[[Mapping[str, Any]], Page],
) -> Study:
    """An experiment whose results are sweeps: its claims are tested over shared seeds.

    Args:
      name, claims, report: see `Study`.
      sections: by size.
      protocol: rows before those of the cost and the test.
    """

    def compute(given: cli.Flags) -> Iterator[tuple[str, Any]]:
        yield from train(sections(given.size), given, f"experiments.{name}.run")

    def rows() -> Mapping[str, str]:
        if not claims:
            return protocol()
        family = {3: "three", 4: "four"}[len(claims)]
        test = f"paired by seed, sign-flip; Holm over the {family} claims"
        common = {"Cost": cost(sections("default")), "Test": f"{test}; 95% bootstrap intervals"}
        return {**protocol(), **common}

    return Study(name, claims, rows, compute, report, parallel=True)


def train(
    sections: Mapping[str, Section], given: cli.Flags, module: str
) -> Iterator[tuple[str, Any]]:
    """Train what is left of the sections, in ``given.jobs`` processes; yields their curves."""
    place, jobs = pathlib.Path(given.workdir), given.jobs
    chosen = {k: s for k, s in sections.items() if k in (given.sections or sections)}
    each = {}
    for name, (config, sweep, kind) in chosen.items():
        config.init_from = str(policy.start(kind, place.parent / "cold_start", given.size))
        each[name] = cohorts.make(config, sweep, most=MOST[given.size])
    with _others(module, given):
        for name, parts in each.items():
            schedule.run(parts, place / name, job=(given.job, jobs))
    if given.job:
        return
    for name, parts in each.items():
        schedule.run(parts, place / name)  # whatever a process that failed left
        yield name, store.collect(place / name)


@contextlib.contextmanager
def _others(module: str, given: cli.Flags) -> Iterator[None]:
    """The other processes of job 0: waited for at the end, and stopped where this one is."""
    others = [] if given.job else [_start(module, given, k) for k in range(1, given.jobs)]
    try:
        yield
        for other in others:
            other.wait()
    finally:
        for other in others:
            other.terminate()  # nothing, where it has ended
            other.wait()


def _start(module: str, given: cli.Flags, job: int) -> subprocess.Popen:
    flags = [f"--{k}={getattr(given, k)}" for k in ("size", "workdir", "jobs")]
    flags += [f"--sections={','.join(given.sections)}", f"--job={job}"]
    log = pathlib.Path(given.workdir) / f"job-{job}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        command = [sys.executable, "-m", module, *flags]
        return subprocess.Popen(command, stdout=file, stderr=file)


def cost(sections: Mapping[str, Section]) -> str:
    """How many runs, and how long they take as far as the pilots tell."""
    seconds = count = 0.0
    for config, sweep, _ in sections.values():
        for override in sweep:
            own = {"iterations": config.iterations, "batch.prompts": config.batch.prompts,
                   "eval.every": config.eval.every, **override}  # fmt: skip
            rows = own["iterations"] * own["batch.prompts"] * config.batch.group_size
            evaluations = 1 + own["iterations"] // own["eval.every"]
            seconds += rows * SECONDS_A_ROW + evaluations * SECONDS_AN_EVALUATION
            count += 1
    return f"{count:.0f} runs, {seconds / count:.0f} s each: {seconds / 60:.0f} minutes of a core"


def late(run: Run, key: str = "eval/pass_at_1") -> float:
    """The mean of the evaluations in the second half of a run; those after it stopped are 0.

    What a collapse has cost counts, and so does when it came.
    """
    found, total = sweep_stats.series(run.records, key), run.config["iterations"]
    every = run.config["eval"]["every"]
    planned = [i for i in range(every, total + 1, every) if 2 * i >= total]
    return sum(found.get(i, 0.0) for i in planned) / len(planned)


def lasted(run: Run) -> float:
    """The share of its iterations before a run collapsed or stopped; 1 if it did neither."""
    return min(1.0, sweep_stats.life(run).iterations / run.config["iterations"])


def select(runs: Runs, **fields: Any) -> list[Run]:
    """The runs with these values of fields; ``__`` stands for the dot, None for "has it not"."""
    wanted = {key.replace("__", "."): value for key, value in fields.items()}
    return [r for r in runs if all(r.overrides.get(k) == v for k, v in wanted.items())]


def named(runs: Runs, name: Callable[[Run], str]) -> list[Run]:
    """The runs with a name as their only setting."""
    return [
        run._replace(overrides={"objective.name": name(run), "seed": run.overrides["seed"]})
        for run in runs
    ]


def seeds(runs: Runs, endpoint: Callable[[Run], float] = late) -> dict[int, float]:
    """The endpoint of each seed; of several runs with a seed, the mean."""
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run.overrides["seed"], []).append(endpoint(run))
    return {seed: sum(values) / len(values) for seed, values in found.items()}


def best_rate(runs: Runs, endpoint: Callable[[Run], float] = late) -> dict[int, float]:
    """The endpoint of each seed at the learning rate that is best for the others.

    A seed has no say in the choice by which it is judged.
    """
    rates = dict.fromkeys(run.overrides["learner.learning_rate"] for run in runs)
    each = {rate: seeds(select(runs, learner__learning_rate=rate), endpoint) for rate in rates}
    out = {}
    for seed in next(iter(each.values())):
        others = {rate: [v for s, v in own.items() if s != seed] for rate, own in each.items()}
        out[seed] = each[max(others, key=lambda rate: sum(others[rate]))][seed]
    return out


def panel(plot: str, runs: Runs, title: str = "") -> Panel:
    """A plot of a sweep's report, of these runs, which are summarised when it is drawn."""
    own = sweep_plots.PLOTS[plot]
    return Panel(
        title or own.title,
        lambda figure, _: own.draw(figure, sweep_stats.summarise(runs)),
        own.wide,
    )


def table(runs: Runs, heading: str, endpoint: Callable[[Run], float] = late) -> str:
    """Settings with their endpoint in per cent, against the first one seed by seed; collapses.

    p is Holm's over the rows.
    """
    groups = sweep_stats.group(runs)
    found = {"settings": [{"setting": json.loads(key)} for key in groups]}
    first, *others = values = [seeds(some, endpoint) for some in groups.values()]
    against = dict(enumerate((stats.difference(own, first) for own in others), 1))
    p, rows = stats.holm({k: effect.p for k, effect in against.items()}), []
    for k, (entry, some) in enumerate(zip(found["settings"], groups.values(), strict=True)):
        label = sweep_plots.label(found, entry["setting"])
        ends = interval(stats.effect(list(values[k].values())), sign="")
        compared = [interval(against[k]), f"{p[k]:.2g}"] if k else ["reference", ""]
        rows.append([label, str(len(some)), ends, *compared, collapsed(some)])
    columns = ["setting", "seeds", heading, "difference", "p (Holm)", "collapsed"]
    return markdown(columns, rows)


def collapsed(runs: Runs) -> str:
    """How many runs collapsed, and when in the median."""
    lives = [sweep_stats.life(run) for run in runs]
    when = sorted(life.iterations for life in lives if life.collapsed)
    median = f", iteration {when[len(when) // 2]}" if when else ""
    return f"{len(when)} of {len(lives)}{median}"
