"""Time a sweep of τ_neg × seed against one of its runs, and the ways to put runs on a device.

    python -m experiments.population.run --init_from=runs/quickstart_sft

Everything is measured in one process without a compilation cache; `results/` gets the numbers.
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
from absl import app, flags, logging

from configs.sweeps import temperature
from sapo_jax import cohort_run, cohorts, rundir, sweep, sweep_report, train
from sapo_jax.axes import axis, product
from sapo_jax.progress import Progress

HERE = pathlib.Path(__file__).parent
RUNS = pathlib.Path("runs/experiments/population")
_INIT = flags.DEFINE_string("init_from", "runs/quickstart_sft", "Cold start; '' for none.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Seeds of the sweep, for each of 3 temperatures.", 1)
_ITERATIONS = flags.DEFINE_integer("iterations", 20, "Iterations of a run.", 1)
_SINGLES = flags.DEFINE_integer("singles", 3, "Runs alone, after one that compiles.", 1)
_METHODS = flags.DEFINE_integer("method_runs", 4, "Runs by which map and vmap are compared.", 2)
COMPILED = "/jax/core/compile/backend_compile_duration"


def config(**fields):
    """The quickstart, shortened, evaluated twice."""
    c = temperature.get_config()
    times = {"iterations": _ITERATIONS.value, "eval.every": _ITERATIONS.value}
    own = {"init_from": _INIT.value, "compilation_cache": ""}
    with c.unlocked():
        c.update_from_flattened_dict({**times, **own, **fields})
    return c


def singles() -> list[float]:
    """Seconds of whole runs alone, their reports included; the first, which compiles, is left out.

    Steady: the programs are compiled, as they are for all but the first run of a sweep.
    """
    seconds = []
    for seed in range(_SINGLES.value + 1):
        (alone,) = cohorts.resolve(config(), axis("seed", seed))
        start = time.perf_counter()
        train.run(alone.lead, RUNS / f"alone-{seed}")
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def whole_sweep() -> dict:
    """Wall time of the sweep with everything, and what it compiled."""
    compiled: dict[str, list[float]] = collections.defaultdict(list)

    def listen(event, duration, **about):
        if event == COMPILED:
            compiled[str(about.get("fun_name"))].append(duration)

    start = time.perf_counter()
    jax.monitoring.register_event_duration_secs_listener(listen)
    taus = axis("objective.tau_neg", 0.95, 1.0, 1.05)
    parts = cohorts.resolve(config(), product(taus, axis("seed", *range(_SEEDS.value))))
    complete = sweep.run(parts, RUNS / "sweep")
    sweep_report.write(RUNS / "sweep")
    seconds = time.perf_counter() - start
    jax.monitoring.unregister_event_duration_listener(listen)
    if not complete:
        raise RuntimeError("the sweep was stopped: start again in an empty directory")
    large = {name: times for name, times in compiled.items() if max(times) > 0.5}
    return {
        "runs": sum(len(part.runs) for part in parts),
        "cohorts": len(parts),
        "method": parts[0].method,
        "seconds": seconds,
        "compile_seconds": sum(sum(times) for times in compiled.values()),
        "compilations_of_large_programs": {name: len(times) for name, times in large.items()},
    }


def methods() -> dict[str, float]:
    """Seconds of an iteration of one run in a small population, by map and by vmap."""
    found = {}
    for method in ("map", "vmap"):
        fields = {"population.method": method, "iterations": 5, "eval.every": 0}
        seeds = axis("seed", *range(_METHODS.value))
        (cohort,) = cohorts.resolve(config(**fields), seeds)
        place = RUNS / method
        cohort_run.run(cohort, place, Progress(5 * _METHODS.value, 0, method))
        records = rundir.read_metrics(place / cohort.names[0])
        found[method] = statistics.median(r["time/iteration"] for r in records)
    return found


def table(found: dict) -> str:
    """The result as Markdown."""
    whole, ratio = found["sweep"], found["ratio"]
    lines = [
        "| | seconds |",
        "|---|---|",
        f"| one run alone, everything compiled: median of {len(found['alone'])} "
        f"| {found['one']:.1f} |",
        f"| {whole['runs']} runs as one population, compiling included | {whole['seconds']:.1f} |",
        f"| of which compiling | {whole['compile_seconds']:.1f} |",
        f"| ratio to {whole['runs']} × one run | {ratio:.3f} |",
        *(
            f"| an iteration of one of {found['method_runs']} runs, by {name} | {seconds:.3f} |"
            for name, seconds in found["methods"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Measure, and write the results."""
    del argv
    logging.set_verbosity(logging.WARNING)
    shutil.rmtree(RUNS, ignore_errors=True)
    load = os.getloadavg()[0]
    alone = singles()
    found = {"alone": alone, "one": statistics.median(alone), "sweep": whole_sweep()}
    found["ratio"] = found["sweep"]["seconds"] / (found["sweep"]["runs"] * found["one"])
    found |= {"methods": methods(), "method_runs": _METHODS.value}
    found |= {"iterations": _ITERATIONS.value, "load_at_the_start": load}
    found |= {"backend": jax.default_backend(), "cores": os.cpu_count(), "jax": jax.__version__}
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps(found, indent=1))
    (out / "table.md").write_text(table(found))
    print(table(found))
    for name, count in found["sweep"]["compilations_of_large_programs"].items():
        print(f"compiled {count} time(s): {name}")


if __name__ == "__main__":
    app.run(main)
