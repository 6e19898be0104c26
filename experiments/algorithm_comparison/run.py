"""The paper's Figure 4 with seeds: SAPO, GSPO and GRPO-R2 on a mixture of experts, and others.

python -m experiments.algorithm_comparison.run --jobs=2
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from experiments.evidence import paper, policy, stats, store, sweeps
from experiments.evidence.study import Claim, Page, interval, markdown
from experiments.evidence.sweeps import SEEDS, Section, select
from sapo_jax.axes import Overrides, axis, product
from sapo_jax.report.sweep_stats import Run

OTHER_SEEDS = {"smoke": 2, "default": 4, "large": 16}
RATES = (1e-4, 2e-4, 4e-4)
MAIN = (
    {"objective.name": "sapo", "objective.tau_pos": 1.0, "objective.tau_neg": 1.05},
    {"objective.name": "gspo", "objective.eps_low": 3e-4, "objective.eps_high": 4e-4},
    {"objective.name": "grpo_r2", "objective.eps_low": 0.2, "objective.eps_high": 0.27,
     "learner.old_logp": "recompute"},
)  # fmt: skip
MINIRL = {  # docs/algorithms/README.md
    "objective.name": "grpo", "objective.aggregation": "seq_sum", "correction.name": "token_tis",
    "learner.old_logp": "recompute", "learner.routing_replay": "R2",
}  # fmt: skip
OTHERS = (
    *axis("objective.name", "dapo", "cispo", "reinforce", "vespo"),
    {"objective.name": "dr_grpo", "objective.max_length": 128.0, "advantages": "mean"},
    MINIRL,
)
LABELS = {"sapo": "SAPO", "gspo": "GSPO", "grpo_r2": "GRPO-R2", "grpo": "MiniRL"}
CLAIMS = (
    Claim("last grpo_r2", "SAPO lasts longer than GRPO-R2", "Fig. 4; share of the iterations "
          "before a collapse, mean over the learning rates"),
    Claim("last gspo", "SAPO lasts longer than GSPO", "Fig. 4; the same"),
    Claim("pass grpo_r2", "SAPO reaches a higher Pass@1 than GRPO-R2", "Fig. 4; second half of the "
          "run, each at its best learning rate"),
    Claim("pass gspo", "SAPO reaches a higher Pass@1 than GSPO", "Fig. 4; the same"),
)  # fmt: skip


def sections(size: str) -> dict[str, Section]:
    """The paper's three; and others, with fewer seeds."""
    rates = axis("learner.learning_rate", *(RATES[:2] if size == "smoke" else RATES))

    def section(algorithms: Overrides, seeds: int) -> Section:
        runs = product(list(algorithms), rates, axis("seed", *range(seeds)))
        return Section(policy.learning(size), runs)

    found = {"main": section(MAIN, SEEDS[size])}
    if size != "smoke":
        found["others"] = section(OTHERS, OTHER_SEEDS[size])
    return found


def name_of(run: Run) -> str:
    """As the paper calls an algorithm."""
    name = run.overrides["objective.name"]
    return LABELS.get(name, name)


def _at(runs: list[Run], rate: float) -> list[Run]:
    return sweeps.named(select(runs, learner__learning_rate=rate), name_of)


def effects(runs: list[Run]) -> dict[str, stats.Effect]:
    """What decides the claims."""
    own = {name: select(runs, objective__name=name) for name in ("sapo", "gspo", "grpo_r2")}
    last = {name: sweeps.seeds(some, sweeps.lasted) for name, some in own.items()}
    best = {name: sweeps.best_rate(some) for name, some in own.items()}
    found = {}
    for name in ("grpo_r2", "gspo"):
        found[f"last {name}"] = stats.difference(last["sapo"], last[name])
        found[f"pass {name}"] = stats.difference(best["sapo"], best[name])
    return found


def _best(runs: list[Run]) -> str:
    rows = []
    for name in dict.fromkeys(run.overrides["objective.name"] for run in runs):
        own = select(runs, objective__name=name)
        best = stats.effect(list(sweeps.best_rate(own).values()))
        row = [name_of(own[0]), str(best.seeds), interval(best, sign="")]
        for held_out in policy.TERMS:
            endpoint = functools.partial(sweeps.late, key=f"eval/{held_out}/pass_at_1")
            found = sweeps.best_rate(own, endpoint)
            row.append(f"{100 * sum(found.values()) / len(found):.1f}")
        rows.append(row)
    return markdown(["algorithm", "seeds", "Pass@1, %", *policy.TERMS], rows)


def report(stored: Mapping[str, Any]) -> Page:
    """Tables of each section; the paper's panels beside ours."""
    sections = {name: store.runs_of(data) for name, data in stored.items()}
    main, every = sections["main"], [run for runs in sections.values() for run in runs]
    rates = sorted({run.overrides["learner.learning_rate"] for run in main})
    highest = rates[-1]
    tables = {"Each at its best of the learning rates, chosen by the other seeds; second half of "
              "the run, and by held-out set": _best(every)}  # fmt: skip
    for rate in rates:
        title = f"Learning rate {rate:g}: Pass@1 in the second half"
        tables[title] = sweeps.table(_at(every, rate), "Pass@1, %")
    here = _at(main, highest)
    panels = [
        paper.panel("figure_4", "training reward"),
        sweeps.panel(
            "reward",
            here,
            f"Here, learning rate {highest:g}: training reward, {len(here) // 3} seeds",
        ),
        sweeps.panel("pass", here, "Here: Pass@1 on held-out problems, 16 samples"),
        sweeps.panel("survival", here, "Here: runs that have not collapsed"),
    ]
    return Page(tables, panels, effects(main), store.minutes(every))


def protocol() -> dict[str, str]:
    """What was fixed before."""
    c = policy.learning("default")
    names = [LABELS.get(name, name) for name in (o["objective.name"] for o in OTHERS)]
    return {
        "Runs": f"SAPO (1, 1.05), GSPO (3e-4, 4e-4), GRPO-R2 (0.2, 0.27): {SEEDS['default']} seeds "
        f"each; {', '.join(names)}: {OTHER_SEEDS['default']}",
        "Learning rates": f"{', '.join(f'{rate:g}' for rate in RATES)}, all for each algorithm",
        "Length": f"{c.iterations} iterations of {c.batch.minibatches} minibatches, "
        f"{c.batch.prompts} × {c.batch.group_size} rows an iteration",
        "Primary endpoint": "the share of the iterations before a collapse, the mean over the "
        "learning rates, by seed; collapsed is below half of the best mean accuracy of "
        f"{c.collapse.window} iterations, for good",
        "Second endpoint": f"Pass@1 ({policy.HELD_OUT}) over the evaluations of "
        "the second half, at the learning rate that is best for the other seeds",
    }


STUDY = sweeps.study("algorithm_comparison", CLAIMS, sections, protocol, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
