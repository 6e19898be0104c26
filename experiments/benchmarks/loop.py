"""What the contests leave out: the quickstart against its past, the loop, idle rows, deep models.

    python -m experiments.benchmarks.loop     # 40 minutes; nothing else should run

The code of before is taken from the repository's history. `results/loop.json` gets the numbers, the
README a table of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from experiments.benchmarks import ours, table, workload
from experiments.evidence.study import fill, markdown
from sapo_jax import cli, sampler
from sapo_jax.training import workdir

ROOT = table.HERE.parents[1]
RUNS = ROOT / "runs" / "experiments" / "loop"
PAST = "9f2cc37"  # before packed rows, attention in blocks and rows that flow
FLAGS = cli.Flags("experiments.benchmarks.loop", __doc__)
FLAGS.integer("iterations", 100, "Iterations of the quickstart.", 5)
FLAGS.integer("seeds", 3, "Runs of the quickstart by each version, in turn.", 2)
PASS = "eval/pass_at_1"
PHASES = ("to_sampler", "rollout", "score_exposed", "logp", "update")


def train(root: pathlib.Path, name: str, *flags: str) -> float:
    """Seconds of a command line of a folder's `make train`, compiling included."""
    config = "quickstart_sft" if name == "cold" else "quickstart"
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    own |= dict(re.findall(r"(GLIBC_TUNABLES)=(\S+)", (root / "Makefile").read_text()))
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "sapo_jax.main", f"--config=configs/{config}.py",
         f"--workdir={RUNS / root.name / name}", "--config.compilation_cache=", *flags],
        cwd=root, env=os.environ | own, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - start


def quickstart(iterations: int, seeds: int) -> dict[str, Any]:
    """The cold start, and iterations after it, by the code of then and of now in turn."""
    past = RUNS / "past"
    past.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", PAST], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=past, input=archive.stdout, check=True)
    roots = {"then": past, "now": ROOT}
    found = {k: {"cold_s": train(root, "cold"), "runs": []} for k, root in roots.items()}
    for seed in range(seeds):
        for key, root in roots.items():
            start = f"--config.init_from={RUNS / root.name / 'cold'}"
            wall = train(root, str(seed), start, f"--config.{iterations=}", f"--config.{seed=}")
            records = workdir.read_metrics(RUNS / root.name / str(seed))
            kept = [r for r in records if r["iteration"] > 2 and "time/update" in r]
            phases = {p: statistics.median(r.get(f"time/{p}", 0.0) for r in kept) for p in PHASES}
            whole = statistics.median(r["time/iteration"] for r in kept)
            curve = {r["iteration"]: r[PASS] for r in records if PASS in r}
            run = {"wall_s": wall, "iteration_s": whole, "phases_s": phases, "pass_at_1": curve}
            found[key]["runs"].append(run)
    return found


def idle() -> float:
    """Rows that decode steps compute ÷ tokens, 32 prompts × 16 whose mean ÷ longest is 0.33."""
    shape = workload.SHAPES["many"]
    config, params = ours.policy(shape)
    computed: list[int] = []
    rollout = sampler.rollout(
        sampler.to_sampler(params, config), config, ours.prompts_of(shape),
        group_size=shape.group, max_new_tokens=shape.completion, temperature=1.0, seed=0,
        iteration=0, on_end=computed.append,
    )  # fmt: skip
    return computed[0] / int(rollout.mask.sum())


def compiling() -> dict[int, float]:
    """Seconds of compiling an update, by layers."""
    shape = workload.SHAPES["small"]
    deep = {layers: dataclasses.replace(shape, layers=layers) for layers in (4, 28)}
    return {layers: ours.update(own)[1]["compile_s"] for layers, own in deep.items()}


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was aimed at and what is reached."""
    both = [found["quickstart"][key] for key in ("then", "now")]
    now = both[1]

    def median(own, key):
        return statistics.median(r[key] for r in own["runs"])

    each = [median(own, "iteration_s") for own in both]
    long, short = (own["cold_s"] + median(own, "wall_s") for own in both)
    curves = [[statistics.mean(r["pass_at_1"].values()) for r in own["runs"]] for own in both]
    gain = statistics.mean(curves[1]) - statistics.mean(curves[0])
    noise = sum(statistics.variance(own) / len(own) for own in curves) ** 0.5
    share = statistics.median(r["iteration_s"] / sum(r["phases_s"].values()) for r in now["runs"])
    host = statistics.median(
        1 - sum(r["phases_s"][p] for p in ("rollout", "update")) / r["iteration_s"]
        for r in now["runs"]
    )
    layers = {int(k): v for k, v in found["compile_s"].items()}
    measured = (
        ("quickstart, its cold start too, ÷ that of before", short / long, 0.55),
        ("an iteration of it ÷ that of before", each[1] / each[0], 0.55),
        ("iteration ÷ sum of its phases", share, 1.02),
        ("share of an iteration that is neither rollout nor update", host, 0.05),
        ("rows of decode steps ÷ tokens, ragged, 32 × 16", found["rows_per_token"], 1.25),
        ("compiling an update of 28 layers ÷ of 4", layers[28] / layers[4], 1.3),
    )
    learns = (
        f"mean Pass@1 of its evaluations less that of before, {len(curves[0])} seeds each",
        f"{gain:+z.3f} ± {noise:.3f}", "within two standard errors",
        "yes" if abs(gain) <= 2 * noise else "**no**",
    )  # fmt: skip
    return [learns] + [
        (what, f"{value:z.2f}", f"≤ {aim:g}", "yes" if value <= aim else "**no**")
        for what, value, aim in measured
    ]


def main(given: cli.Flags) -> None:
    """Measure, and write the results."""
    shutil.rmtree(RUNS, ignore_errors=True)
    found = {
        "quickstart": quickstart(given.iterations, given.seeds),
        "rows_per_token": idle(),
        "compile_s": compiling(),
    }
    (table.HERE / "results" / "loop.json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(["what", "here", "aim", "met"], rows(found))
    table.README.write_text(fill(table.README.read_text(), "loop", text))
    print(text)


if __name__ == "__main__":
    cli.run(main, FLAGS)
