"""Pilots: learning rates and minibatches between "all learn alike" and "all collapse".

python -m experiments.pilots.run --sections=rates,minibatches
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.evidence import policy, store, sweeps
from experiments.evidence.study import Page, markdown
from experiments.evidence.sweeps import Section
from experiments.staleness.run import many
from sapo_jax.axes import axis, product
from sapo_jax.report import sweep_plots, sweep_stats
from sapo_jax.report.sweep_stats import Run

NAMES = ("sapo", "grpo", "gspo")
MINIBATCHES = (16, 64)
UPDATES = 128
MIDDLE, BETWEEN = 2e-4, 3e-4
TAUS = ((1.0, 1.05), (1.0, 0.95), (10.0, 12.0))
RATES = (1e-4, 4e-4)
SHORT = {"iterations": 32, "eval.every": 16}


def sections(size: str) -> dict[str, Section]:
    """One seed or two each."""
    names = axis("objective.name", *(NAMES[:1] if size == "smoke" else NAMES))
    rates = axis("learner.learning_rate", *(RATES[:1] if size == "smoke" else RATES))
    if size == "smoke":
        return {"rates": Section(policy.learning(size), product(rates, names, axis("seed", 0)))}
    found = {
        "rates": Section(policy.learning(size, **SHORT), product(rates, names, axis("seed", 0)))
    }
    middle = policy.learning(size, **SHORT, **{"learner.learning_rate": MIDDLE})
    taus = [{"objective.tau_pos": p, "objective.tau_neg": n} for p, n in TAUS]
    found["temperatures"] = Section(middle, product(taus, axis("seed", 0, 1)))
    between = policy.learning(size, **SHORT, **{"learner.learning_rate": BETWEEN})
    found["temperatures_between"] = Section(between, product(taus[:2], axis("seed", 0, 1, 2)))
    low = policy.learning(size, **{"learner.learning_rate": RATES[0]})
    for count in MINIBATCHES:
        runs = product([many(count, UPDATES)], names, axis("seed", 0))
        found[f"minibatches_{count}"] = Section(low, runs)
    return found


def _row(label: str, run: Run) -> list[str]:
    accuracy = list(sweep_stats.series(run.records, "reward/accuracy").values())
    smooth = np.convolve(accuracy, np.ones(4) / 4, "valid") if len(accuracy) > 3 else accuracy
    passes = sweep_stats.series(run.records, "eval/pass_at_1")
    entropy = list(sweep_stats.series(run.records, "policy/entropy").values())
    ratio = sweep_stats.series(run.records, "policy/ratio_max").values()
    life, spent = sweep_stats.life(run), store.minutes([run]) * 60
    iteration = np.median(list(sweep_stats.series(run.records, "time/iteration").values()))
    return [
        label, f"{passes[min(passes)]:.3f}", f"{max(passes.values()):.3f}",
        f"{passes[max(passes)]:.3f}", f"{max(smooth):.3f}", f"{smooth[-1]:.3f}",
        f"{entropy[0]:.2f} → {entropy[-1]:.2f}", f"{max(ratio):.3g}",
        f"{life.iterations}" if life.collapsed else "–", f"{iteration:.2f}", f"{spent:.0f}",
    ]  # fmt: skip


def report(stored: Mapping[str, Any]) -> Page:
    """A row a run."""
    columns = ["run", "Pass@1 before", "best", "last", "reward, best", "last", "entropy",
               "largest r", "collapsed at", "s an iteration", "s in all"]  # fmt: skip
    tables, spent = {}, 0.0
    for name, data in stored.items():
        runs = store.runs_of(data)
        found = sweep_stats.summarise(runs)
        labels = [sweep_plots.label(found, entry["setting"]) for entry in found["settings"]]
        groups = zip(labels, sweep_stats.group(runs).values(), strict=True)
        rows = [_row(label, run) for label, some in groups for run in some]
        tables[name], spent = markdown(columns, rows), spent + store.minutes(runs)
    return Page(tables, [], {}, minutes=spent)


def protocol() -> dict[str, str]:
    """Nothing was fixed before."""
    return {"Purpose": "To choose the regime of the other experiments; no claim rests on it"}


STUDY = sweeps.study("pilots", (), sections, protocol, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
