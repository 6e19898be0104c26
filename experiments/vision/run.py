"""The quickstart that sees, over seeds and against a blind control: Figure 6 with pictures.

python -m experiments.vision.run

Each seed has a cold start of its own, which its runs share.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import quickstart_vl, quickstart_vl_sft
from experiments.evidence import paper, store
from experiments.evidence.study import Page, Study, markdown
from experiments.evidence.sweeps import select
from sapo_jax import cli, train
from sapo_jax.report import sweep_stats
from sapo_jax.report.style import COLOURS, Panel
from sapo_jax.report.sweep_stats import Run
from sapo_jax.training import settings

SEEDS = {"smoke": 2, "default": 3, "large": 8}
SMALL = {"iterations": 2, "batch.prompts": 8, "eval.prompts": 6, "eval.samples": 2}
BLIND = "sapo, images swapped"
RUNS = {
    "sapo": {"objective.name": "sapo"},
    BLIND: {"objective.name": "sapo", "data.swap_images": True},
    "gspo": {"objective.name": "gspo"},
    "grpo": {"objective.name": "grpo"},
}
TASKS = {
    "sums": "Sums in pictures",
    "shapes": "Shapes to count",
    "text": "Sums in text",
}


def _trained(config: ConfigDict, place: pathlib.Path, size: str, fields: Mapping) -> pathlib.Path:
    config.unlock()
    config.update_from_flattened_dict({**fields, **(SMALL if size == "smoke" else {})})
    train.run(settings.from_config(config.lock()), place)
    return place


def compute(given: cli.Flags) -> Iterator[tuple[str, Any]]:
    """Cold starts, runs; the curves of the runs."""
    workdir, runs = pathlib.Path(given.workdir), []
    for seed in range(SEEDS[given.size]):
        own = {"seed": seed}
        cold = _trained(quickstart_vl_sft.get_config(), workdir / f"cold-{seed}", given.size, own)
        for name, fields in RUNS.items():
            place = workdir / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            fields = {**own, "init_from": str(cold), **fields}
            _trained(quickstart_vl.get_config(), place, given.size, fields)
            overrides = {"objective.name": name, "seed": seed}
            runs.append(store.curves(place, f"{name}, seed {seed}", overrides))
    yield "vision", {"runs": runs, "provenance": store.starts(place)}


def _ends(runs: list[Run], key: str) -> str:
    """The means over the seeds of the first and the last evaluation, and the range of the last."""
    found = [sweep_stats.series(run.records, key) for run in runs]
    first, last = ([own[pick(own)] for own in found] for pick in (min, max))
    ends = f"{sum(last) / len(last):.3f} ({min(last):.3f} to {max(last):.3f})"
    return f"{sum(first) / len(first):.3f} → {ends}"


def _draw(task: str, runs: list[Run], figure: Any, _: Any) -> None:
    """A line a seed, the mean of the seeds in bold."""
    ax = figure.subplots()
    for name, colour in zip(RUNS, ("blue", "grey", "orange", "green"), strict=True):
        found = [sweep_stats.series(run.records, f"eval/{task}/pass_at_1")
                 for run in select(runs, objective__name=name)]  # fmt: skip
        for own in found:
            ax.plot(*zip(*own.items(), strict=True), color=COLOURS[colour], alpha=0.35, lw=1)
        mean = {i: sum(own[i] for own in found) / len(found) for i in found[0]}
        ax.plot(*zip(*mean.items(), strict=True), color=COLOURS[colour], lw=2, label=name)
    ax.set(xlabel="iteration", ylabel="held-out Pass@1", ylim=(0, 1))
    ax.legend(fontsize=7.5)


def report(stored: Mapping[str, Any]) -> Page:
    """Pass@1 by task before and after; the paper's panel beside the curves."""
    runs = store.runs_of(stored["vision"])
    rows = []
    for name in RUNS:
        own = select(runs, objective__name=name)
        each = [_ends(own, f"eval/{task}/pass_at_1") for task in TASKS]
        rows.append([name, str(len(own)), *each])
    columns = ["run", "seeds", *TASKS.values()]
    title = "Held-out Pass@1: mean of the seeds at the start → at the end (range of the seeds)"
    panels = [Panel(text, functools.partial(_draw, task, runs)) for task, text in TASKS.items()]
    panels.append(paper.panel("figure_6", "aggregated validation"))
    return Page({title: markdown(columns, rows)}, panels, {}, store.minutes(runs))


def protocol() -> dict[str, str]:
    """What was fixed before."""
    c = quickstart_vl.get_config()
    shares = ", ".join(f"{text.lower()} {c.tasks[task].share:.3g}" for task, text in TASKS.items())
    return {
        "Tasks": f"in fixed shares of every batch: {shares}",
        "Policy": "a Qwen3-VL, tower and decoder from random weights by a cold start of its own "
        "for each seed, on worked answers of a teacher who slips",
        "Runs": f"{', '.join(RUNS)}; {SEEDS['default']} shared seeds each",
        "Length": f"{c.iterations} iterations of {c.batch.minibatches} minibatches, learning rate "
        f"{c.learner.learning_rate:g}",
        "Control": "the same with every prompt shown the image of the next prompt of its task, in "
        "training and in evaluation",
        "Endpoint": f"Pass@1 by task ({c.eval.samples} samples of each of {c.eval.prompts} "
        "held-out problems in these shares) at the end; three seeds are too few for a test",
    }


STUDY = Study("vision", (), protocol, compute, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
