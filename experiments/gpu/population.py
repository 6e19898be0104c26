"""64 runs of the quickstart as one program, by vmap, against one of them; and one end to end."""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from typing import Any

from configs import quickstart, quickstart_sft
from experiments.gpu.timing import attempt
from sapo_jax import train
from sapo_jax.axes import axis
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import workdir
from sapo_jax.training.progress import Progress


def config(module: Any, **fields: Any) -> Any:
    """A config with other fields."""
    c = module.get_config()
    with c.unlocked():
        c.update_from_flattened_dict(fields)
    return c


def alone(c: Any, place: pathlib.Path) -> None:
    """One run."""
    (only,) = cohorts.make(c, axis("seed", 0))
    train.run(only.lead, place)


def steady(place: pathlib.Path) -> float:
    """Median seconds of an iteration after the first three."""
    found = [r["time/iteration"] for r in workdir.read_metrics(place) if "time/iteration" in r]
    return statistics.median(found[3:])


def population(place: pathlib.Path, runs: int, iterations: int, cold: str) -> dict[str, Any]:
    """Seconds of an iteration of the population ÷ those of so many runs one after another."""
    short = {"iterations": iterations, "eval.every": 0, "init_from": cold}
    alone(config(quickstart, **short), place / "one")
    one = steady(place / "one")
    own = config(quickstart, **short, **{"population.method": "vmap"})
    (cohort,) = cohorts.make(own, axis("seed", *range(runs)))
    with Progress(iterations * runs, "vmap") as bar:
        schedule.run_cohort(cohort, place / "many", bar)
    # An iteration's time is shared out among the runs of a population.
    each = steady(place / "many" / cohort.names[0])
    return {"runs": runs, "one_s": one, "of_population_s": each, "ratio": each / one}


def end_to_end(place: pathlib.Path, iterations: int, cold: str) -> dict[str, Any]:
    """The whole quickstart from its cold start on."""
    start = time.perf_counter()
    alone(config(quickstart, iterations=iterations, init_from=cold), place / "whole")
    records = workdir.read_metrics(place / "whole")
    passes = [r["eval/pass_at_1"] for r in records if r.get("eval/pass_at_1") is not None]
    spent = time.perf_counter() - start
    return {"seconds": spent, "iteration_s": steady(place / "whole"), "pass_at_1": passes}


def main(toy: bool) -> None:
    """Emit the ratio, then the quickstart's curve."""
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        cold = str(place / "cold")
        sft = {"iterations": 4, "eval.every": 0} if toy else {}
        start = time.perf_counter()
        alone(config(quickstart_sft, **sft), place / "cold")
        what = {"cold_start_s": time.perf_counter() - start}
        sizes = (2, 5) if toy else (64, 10)
        attempt("population", what, lambda: population(place, *sizes, cold))
        attempt("quickstart", {}, lambda: end_to_end(place, 5 if toy else 100, cold))
