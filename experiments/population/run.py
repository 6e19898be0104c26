"""Time a sweep of τ_neg × seed against one of its runs, and the ways to put runs on a device.

    python -m experiments.population.run --init_from=runs/quickstart_sft

Everything is measured in one process without a compilation cache; a run that is not counted
compiles first. `results/` gets the numbers.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import shutil
import statistics
import time

import jax
from absl import logging

from configs.sweeps import temperature
from sapo_jax import cli, train
from sapo_jax.axes import axis, product
from sapo_jax.report import sweep
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import workdir
from sapo_jax.training.progress import Progress

HERE = pathlib.Path(__file__).parent
RUNS = pathlib.Path("runs/experiments/population")
FLAGS = cli.Flags("experiments.population.run", __doc__)
FLAGS.string("init_from", "runs/quickstart_sft", "Cold start; '' for none.")
FLAGS.integer("seeds", 8, "Seeds of the sweep, for each of 3 temperatures.", 1)
FLAGS.integer("iterations", 20, "Iterations of a run.", 1)
FLAGS.integer("singles", 2, "Runs alone, before the sweep and after it.", 1)
FLAGS.integer("method_runs", 4, "Runs by which map and vmap are compared.", 2)
COMPILED = "/jax/core/compile/backend_compile_duration"
CLOCKS = ("seconds", "cpu_seconds")
TAUS = (1.0, 1.05, 2.0)
SHOWN = tuple(f"time/{k}" for k in ("iteration", "to_sampler", "rollout", "update", "eval"))


def config(given: cli.Flags, **fields):
    """The quickstart, shortened."""
    c = temperature.get_config()
    times = {"iterations": given.iterations, "eval.every": 10}
    own = {"init_from": given.init_from, "compilation_cache": ""}
    with c.unlocked():
        c.update_from_flattened_dict({**times, **own, **fields})
    return c


class Timer:
    """Seconds that passed, and seconds of all cores, since it was made."""

    def __init__(self):
        self._start = time.perf_counter(), time.process_time()

    def __call__(self) -> dict[str, float]:
        """Seconds so far, by clock."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = (b - a for a, b in zip(self._start, now, strict=True))
        return {"seconds": wall, "cpu_seconds": cpu}


def phases(places: list) -> dict[str, float]:
    """Seconds of each phase, the mean over runs."""
    total: dict[str, float] = collections.Counter()
    for place in places:
        for record in workdir.read_metrics(place):
            total.update({k: v for k, v in record.items() if k in SHOWN})
    return {key: total[key] / len(places) for key in SHOWN}


def single(name: str, seed: int) -> dict:
    """Time of a whole run alone, its report included."""
    (alone,) = cohorts.make(config(FLAGS), axis("seed", seed))
    timer = Timer()
    train.run(alone.lead, RUNS / name)
    return timer() | {"phases": phases([RUNS / name])}


def singles(when: str) -> list[dict]:
    """Runs alone with everything compiled, as it is for all but the first run of a sweep."""
    return [single(f"alone-{when}-{seed}", seed) for seed in range(FLAGS.singles)]


def whole_sweep() -> dict:
    """Wall time of the sweep with everything, and what it compiled."""
    compiled: dict[str, list[float]] = collections.defaultdict(list)

    def listen(event, duration, **about):
        if event == COMPILED:
            compiled[str(about.get("fun_name"))].append(duration)

    timer = Timer()
    jax.monitoring.register_event_duration_secs_listener(listen)
    taus = axis("objective.tau_neg", *TAUS)
    parts = cohorts.make(config(FLAGS), product(taus, axis("seed", *range(FLAGS.seeds))))
    complete = schedule.run(parts, RUNS / "sweep")
    sweep.write(RUNS / "sweep")
    spent = timer()
    jax.monitoring.unregister_event_duration_listener(listen)
    if not complete:
        raise RuntimeError("the sweep was stopped: start again in an empty directory")
    large = {name: times for name, times in compiled.items() if max(times) > 0.5}
    return {
        "runs": sum(len(part.runs) for part in parts),
        "cohorts": len(parts),
        "method": parts[0].method,
        **spent,
        "phases": phases([RUNS / "sweep" / f"cohort-000/{name}" for name in parts[0].names]),
        "compile_seconds": sum(sum(times) for times in compiled.values()),
        "compilations_of_large_programs": {name: len(times) for name, times in large.items()},
    }


def methods() -> dict[str, float]:
    """Seconds of an iteration of one run in a small population, by map and by vmap."""
    found = {}
    for method in ("map", "vmap"):
        fields = {"population.method": method, "iterations": 4, "eval.every": 0}
        seeds = axis("seed", *range(FLAGS.method_runs))
        (cohort,) = cohorts.make(config(FLAGS, **fields), seeds)
        place = RUNS / method
        with Progress(4 * FLAGS.method_runs, method) as bar:
            schedule.run_cohort(cohort, place, bar)
        records = workdir.read_metrics(place / cohort.names[0])
        found[method] = statistics.median(r["time/iteration"] for r in records)
    return found


def table(found: dict) -> str:
    """The result as Markdown."""
    whole, one = found["sweep"], found["one"]
    lines = [
        "| | seconds | seconds of both cores |",
        "|---|---|---|",
        f"| one run alone, everything compiled: median of {len(found['alone'])} "
        f"| {one['seconds']:.1f} | {one['cpu_seconds']:.1f} |",
        f"| {whole['runs']} runs as one population, all reports included "
        f"| {whole['seconds']:.1f} | {whole['cpu_seconds']:.1f} |",
        f"| ratio to {whole['runs']} × one run "
        f"| {found['ratio']['seconds']:.3f} | {found['ratio']['cpu_seconds']:.3f} |",
        f"| of which compiling what a run alone does not have | {whole['compile_seconds']:.1f} | |",
        "",
        "| phase | alone, seconds a run | in the population |",
        "|---|---|---|",
        *(
            f"| {key.removeprefix('time/')} | {one['phases'][key]:.2f} "
            f"| {whole['phases'][key]:.2f} |"
            for key in SHOWN
        ),
        "",
        f"| an iteration of one of {found['method_runs']} runs | seconds |",
        "|---|---|",
        *(f"| {name} | {seconds:.3f} |" for name, seconds in found["methods"].items()),
    ]
    return "\n".join(lines) + "\n"


def middle(runs: list[dict]) -> dict:
    """The median of each number over runs alone."""
    phases = [run["phases"] for run in runs]
    return {key: statistics.median(run[key] for run in runs) for key in CLOCKS} | {
        "phases": {key: statistics.median(p[key] for p in phases) for key in SHOWN}
    }


def main(given: cli.Flags) -> None:
    """Measure, and write the results."""
    logging.set_verbosity(logging.WARNING)
    shutil.rmtree(RUNS, ignore_errors=True)
    load = [os.getloadavg()[0]]
    single("compiles", 0)
    alone = singles("before")
    whole = whole_sweep()
    alone += singles("after")
    load.append(os.getloadavg()[0])
    one = middle(alone)
    found = {"alone": alone, "one": one, "sweep": whole}
    found["ratio"] = {key: whole[key] / (whole["runs"] * one[key]) for key in CLOCKS}
    found |= {"methods": methods(), "method_runs": given.method_runs}
    found |= {"iterations": given.iterations, "load_at_start_and_end": load}
    found |= {"backend": jax.default_backend(), "cores": os.cpu_count(), "jax": jax.__version__}
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(table(found))
    shutil.copy(RUNS / "sweep" / "report.json", out / "report.json")
    print(table(found))
    for name, count in whole["compilations_of_large_programs"].items():
        print(f"compiled {count} time(s): {name}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
