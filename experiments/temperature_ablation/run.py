"""The paper's Figure 5 with seeds: τ_neg around 1; a grid of both temperatures; schedules.

python -m experiments.temperature_ablation.run --jobs=2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.evidence import paper, policy, stats, store, sweeps
from experiments.evidence.study import Claim, Page
from experiments.evidence.sweeps import Section, select
from sapo_jax.axes import axis, product
from sapo_jax.report.sweep_stats import Run

SEEDS = {"smoke": 3, "default": 24, "large": 64}
TAU_NEG = (1.05, 1.0, 0.95)
GRID = (0.25, 1.0, 4.0, 16.0)
GRID_SEEDS = {"default": 3, "large": 8}
SCHEDULES = {  # τ_pos, τ_neg at the start; those at the end
    "(1, 1.05) → (10, 12)": ((1.0, 1.05), (10.0, 12.0)),
    "(10, 12) → (1, 1.05)": ((10.0, 12.0), (1.0, 1.05)),
    "(10, 12)": ((10.0, 12.0), (10.0, 12.0)),
}
SCHEDULE_SEEDS = {"default": 8, "large": 32}
LEARNING_RATE = 2.5e-4
PASS = "second half of the run"
CLAIMS = (
    Claim("last 1.0", "τ_neg = 1.05 lasts longer than 1.0", "Fig. 5; share of the iterations "
          "before a collapse"),
    Claim("last 0.95", "τ_neg = 1.05 lasts longer than 0.95", "Fig. 5; the same"),
    Claim("pass 1.0", "τ_neg = 1.05 reaches a higher Pass@1 than 1.0", f"Fig. 5; {PASS}"),
    Claim("sharp", "(10, 12) does better than (1, 1.05)", f"2602.19345; Pass@1, {PASS}"),
)  # fmt: skip


def _scheduled(start: tuple[float, float], end: tuple[float, float]) -> dict[str, Any]:
    own = {"objective.tau_pos": start[0], "objective.tau_neg": start[1]}
    if start != end:
        own["objective.schedule"] = "linear"
        own["objective.end.tau_pos"], own["objective.end.tau_neg"] = end
    return own


def sections(size: str) -> dict[str, Section]:
    """The ablation; the grid and the schedules are no part of the smallest size."""
    config = policy.learning(size, **{
        "objective.tau_pos": 1.0, "learner.learning_rate": LEARNING_RATE,
    })  # fmt: skip
    seeds = axis("seed", *range(SEEDS[size]))
    found = {"ablation": Section(config, product(axis("objective.tau_neg", *TAU_NEG), seeds))}
    if size != "smoke":
        grid = product(axis("objective.tau_pos", *GRID), axis("objective.tau_neg", *GRID),
                       axis("seed", *range(GRID_SEEDS[size])))  # fmt: skip
        found["grid"] = Section(config, grid)
        settings = [_scheduled(*ends) for ends in SCHEDULES.values()]
        some = axis("seed", *range(SCHEDULE_SEEDS[size]))
        found["schedules"] = Section(config, product(settings, some))
    return found


def _of(runs: list[Run], tau_neg: float) -> list[Run]:
    return select(runs, objective__tau_neg=tau_neg)


def effects(sections: Mapping[str, list[Run]]) -> dict[str, stats.Effect]:
    """What decides the claims, as far as its sections are there."""
    found, first = {}, _of(sections["ablation"], TAU_NEG[0])
    for other in TAU_NEG[1:]:
        pair = first, _of(sections["ablation"], other)
        last = (sweeps.seeds(runs, sweeps.lasted) for runs in pair)
        found[f"last {other}"] = stats.difference(*last)
        found[f"pass {other}"] = stats.difference(*map(sweeps.seeds, pair))
    if "schedules" in sections:
        sharp = select(sections["schedules"], objective__tau_pos=10.0, objective__schedule=None)
        found["sharp"] = stats.difference(sweeps.seeds(sharp), sweeps.seeds(first))
    return found


def _schedule(run: Run) -> str:
    """Its name in `SCHEDULES`; of the ablation, its temperatures."""
    own = {key: value for key, value in run.overrides.items() if key != "seed"}
    names = {name: _scheduled(*ends) for name, ends in SCHEDULES.items()}
    return next((name for name, some in names.items() if some == own), "(1, 1.05)")


def report(stored: Mapping[str, Any]) -> Page:
    """Tables of each section; the paper's panel beside ours."""
    sections = {name: store.runs_of(data) for name, data in stored.items()}
    runs, shown = sections["ablation"], dict(sections)
    if "schedules" in sections:
        some = sweeps.seeds(sections["schedules"])
        fixed = [run for run in _of(runs, TAU_NEG[0]) if run.overrides["seed"] in some]
        shown["schedules"] = sweeps.named(fixed + sections["schedules"], _schedule)
    titles = {"ablation": "τ_neg at τ_pos = 1", "grid": "τ_pos × τ_neg",
              "schedules": "Schedules, against (1, 1.05) throughout on the same seeds"}  # fmt: skip
    tables = {titles[name]: sweeps.table(of, "Pass@1, second half, %")
              for name, of in shown.items()}  # fmt: skip
    panels = [
        paper.panel("figure_5", "training reward"),
        sweeps.panel("reward", runs, f"Here: training reward, {len(runs) // 3} seeds"),
        sweeps.panel("survival", runs, "Here: runs that have not collapsed"),
    ]
    if "grid" in sections:
        panels.append(sweeps.panel("heat", sections["grid"], "Here: final Pass@1 over the grid"))
    every = [run for some in sections.values() for run in some]
    return Page(tables, panels, effects(sections), store.minutes(every))


def protocol() -> dict[str, str]:
    """What was fixed before."""
    grid, c = ", ".join(f"{tau:g}" for tau in GRID), policy.learning("default")
    return {
        "Ablation": f"τ_neg of {', '.join(map(str, TAU_NEG))} at τ_pos = 1, {SEEDS['default']} "
        "shared seeds each",
        "Grid": f"τ_pos and τ_neg of {grid}, {GRID_SEEDS['default']} seeds; no test",
        "Schedules": f"{'; '.join(SCHEDULES)}; linear over the run, {SCHEDULE_SEEDS['default']} "
        "seeds",
        "Learning rate": f"{LEARNING_RATE:g}, at which some runs collapse",
        "Primary endpoint": "the share of the iterations before a collapse, by seed: below half of "
        f"the best mean accuracy of {c.collapse.window} iterations, for good",
        "Second endpoint": f"Pass@1 ({policy.HELD_OUT}) over the evaluations of the second half",
    }


STUDY = sweeps.study("temperature_ablation", CLAIMS, sections, protocol, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
