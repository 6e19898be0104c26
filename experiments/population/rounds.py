"""Is an iteration in a population faster than alone? Rounds of alone, 4 runs by `map`, alone.

    python -m experiments.population.rounds

A machine that others share changes its speed by more than what is compared, within minutes: only
neighbours are. The first round compiles and is left out. `results/rounds.json` gets the numbers.
"""

from __future__ import annotations

import json
import shutil
import statistics

from absl import logging

from experiments.population.run import HERE, RUNS, config
from sapo_jax import cli, train
from sapo_jax.axes import axis
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import workdir
from sapo_jax.training.progress import Progress

FLAGS = cli.Flags("experiments.population.rounds", __doc__)
FLAGS.string("init_from", "runs/quickstart_sft", "Cold start; '' for none.")
FLAGS.integer("iterations", 8, "Iterations of a run; the first two are left out.", 3)
FLAGS.integer("rounds", 3, "Rounds that are measured.", 1)
SHOWN = ("time/update", "time/rollout", "time/iteration")


def seconds(runs: int, name: str) -> dict[str, float]:
    """Seconds of a phase, the median over the iterations of each run."""
    (cohort,) = cohorts.make(config(FLAGS, **{"eval.every": 0}), axis("seed", *range(runs)))
    place = RUNS / "rounds" / name
    if runs == 1:
        train.run(cohort.lead, place)
        places = [place]
    else:
        with Progress(FLAGS.iterations * runs, name) as bar:
            schedule.run_cohort(cohort, place, bar)
        places = [place / run for run in cohort.names]
    kept = [r for x in places for r in workdir.read_metrics(x) if r["iteration"] > 2]
    return {key: statistics.median(r[key] for r in kept if key in r) for key in SHOWN}


def main(given: cli.Flags) -> None:
    """Measure, and write the results."""
    logging.set_verbosity(logging.WARNING)
    shutil.rmtree(RUNS / "rounds", ignore_errors=True)
    found = []
    for number in range(given.rounds + 1):
        before, among, after = (
            seconds(runs, f"{number}-{place}") for place, runs in enumerate((1, 4, 1))
        )
        alone = {key: (before[key] + after[key]) / 2 for key in SHOWN}
        found.append({"before": before, "among": among, "after": after,
                      "ratio": {key: among[key] / alone[key] for key in SHOWN}})  # fmt: skip
    found = found[1:]
    (HERE / "results" / "rounds.json").write_text(json.dumps(found, indent=1) + "\n")
    for key in SHOWN:
        ratios = sorted(row["ratio"][key] for row in found)
        print(f"{key}: in the population ÷ alone {', '.join(f'{x:.3f}' for x in ratios)}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
