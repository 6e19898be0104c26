"""The paper's Figure 6, in text: three tasks in fixed shares of every batch, or mixed at random.

python -m experiments.multi_task.run --jobs=2
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.evidence import paper, policy, stats, store, sweeps
from experiments.evidence.study import Claim, Page
from experiments.evidence.sweeps import SEEDS, Section, select
from experiments.multi_task.mixed import Mixed
from sapo_jax.axes import axis, product
from sapo_jax.report.sweep_stats import Run

LEARNING_RATE = 2e-4
MINIBATCHES = 2
ALGORITHMS = (
    {"objective.name": "sapo"},
    {"objective.name": "gspo"},
    {"objective.name": "grpo_r2", "learner.old_logp": "recompute"},
)
CLAIMS = (
    Claim("grpo_r2", "SAPO reaches a higher Pass@1 than GRPO-R2 over several tasks", "Fig. 6; mean "
          "of the tasks, second half of the run"),
    Claim("gspo", "SAPO reaches a higher Pass@1 than GSPO over several tasks", "Fig. 6; the same"),
    Claim("fixed", "Fixed shares of every batch do better than random mixing", "Section 5.2, which "
          "does not compare them; SAPO, the same"),
)  # fmt: skip


def mixed(config: ConfigDict) -> ConfigDict:
    """The same with a batch's tasks drawn at random, and evaluated as before."""
    config = ConfigDict(config.to_dict(), type_safe=False)
    names, prompts = list(config.tasks), config.eval.prompts // len(config.tasks)
    config.evals = ConfigDict({
        name: {"task": {k: v for k, v in config.tasks[name].items() if k != "share"},
               "prompts": prompts}
        for name in names
    }, type_safe=False)  # fmt: skip
    config.tasks = ConfigDict(type_safe=False)
    config.task = ConfigDict({"name": Mixed.name, "options": {}}, type_safe=False)
    return config


def sections(size: str) -> dict[str, Section]:
    """The paper's three with fixed shares; SAPO with random ones."""
    config = policy.learning(size, "several", **{
        "learner.learning_rate": LEARNING_RATE, "batch.minibatches": MINIBATCHES,
    })  # fmt: skip
    seeds = axis("seed", *range(SEEDS[size]))
    return {
        "fixed": Section(config, product(list(ALGORITHMS), seeds), "several"),
        "random": Section(mixed(config), product(list(ALGORITHMS[:1]), seeds), "several"),
    }


def _name(run: Run) -> str:
    return run.overrides["objective.name"]


def report(stored: Mapping[str, Any]) -> Page:
    """Over all tasks, and by task; the paper's panel beside ours."""
    fixed, random = (store.runs_of(stored[name]) for name in ("fixed", "random"))
    each = {name: sweeps.seeds(select(fixed, objective__name=name))
            for name in ("sapo", "gspo", "grpo_r2")}  # fmt: skip
    effects = {name: stats.difference(each["sapo"], each[name]) for name in ("grpo_r2", "gspo")}
    effects["fixed"] = stats.difference(each["sapo"], sweeps.seeds(random))
    here = sweeps.named(fixed, _name)
    every = here + sweeps.named(random, lambda run: f"{_name(run)}, random mixing")
    tables = {"All tasks": sweeps.table(every, "Pass@1, second half, %")}
    for task in policy.SEVERAL:
        endpoint = functools.partial(sweeps.late, key=f"eval/{task}/pass_at_1")
        tables[f"Task {task}"] = sweeps.table(every, "Pass@1, %", endpoint)
    panels = [
        paper.panel("figure_6", "aggregated validation"),
        sweeps.panel("pass", every, f"Here: Pass@1 over the tasks, {len(here) // 3} seeds"),
        sweeps.panel("evaluations", every, "Here: by task"),
        sweeps.panel("reward", every, "Here: training reward"),
    ]
    return Page(tables, panels, effects, store.minutes(fixed + random))


def protocol() -> dict[str, str]:
    """What was fixed before."""
    c = policy.learning("default", "several")
    return {
        "Tasks": "sums of 8 numbers below 4, the same below 8, Countdown with 3 numbers; a "
        "third of every batch each, or drawn at random",
        "Runs": "SAPO (1, 1.05), GSPO (3e-4, 4e-4), GRPO-R2 (0.2, 0.27) with fixed shares, SAPO "
        f"with random ones: {SEEDS['default']} shared seeds each",
        "Length": f"{c.iterations} iterations of {MINIBATCHES} minibatches, learning rate "
        f"{LEARNING_RATE:g}",
        "Primary endpoint": f"Pass@1 over the three tasks ({policy.HELD_OUT}), the mean of the "
        "evaluations in the second half",
    }


STUDY = sweeps.study("multi_task", CLAIMS, sections, protocol, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
