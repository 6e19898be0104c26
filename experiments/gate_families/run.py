"""Smooth gates by equal τ and by equal width, at SAPO's temperatures and at the gate study's.

python -m experiments.gate_families.run --jobs=2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.evidence import policy, stats, store, sweeps
from experiments.evidence.study import Claim, Page
from experiments.evidence.sweeps import SEEDS, Section
from sapo_jax.axes import Overrides, axis, product
from sapo_jax.report.sweep_stats import Run

TEMPERATURES = {"SAPO's": (1.0, 1.05), "the study's": (10.0, 12.0)}
# Project τ by the τ of arXiv 2602.19345, where its gates are written otherwise; by the project's
# own τ all gates have SAPO's half-width, |r − 1| = 1.763/τ.
EQUAL = {"sapo": 1.0, "sapo_erf": 1.497, "sapo_arctan": 1.763, "sapo_softsign": 2.300}
LEARNING_RATE = 2e-4
CLAIMS = (
    Claim("sharp", "τ of (10, 12) does better than (1, 1.05)", "2602.19345; Pass@1 in the second "
          "half, mean over the four gates at matched width"),
    Claim("sapo_erf", "The erf gate does better than SAPO's", "2602.19345; mean over both "
          "temperatures and matchings"),
    Claim("sapo_arctan", "The arctan gate does better than SAPO's", "2602.19345; the same"),
)  # fmt: skip


def setting(gate: str, temperature: str, factor: float) -> dict[str, Any]:
    """A gate at one of TEMPERATURES, times a factor."""
    pos, neg = TEMPERATURES[temperature]
    return {"objective.name": gate, "objective.tau_pos": round(pos * factor, 4),
            "objective.tau_neg": round(neg * factor, 4)}  # fmt: skip


def settings(size: str) -> Overrides:
    """Every gate at both temperatures, by either matching where they differ."""
    gates = list(EQUAL)[:2] if size == "smoke" else list(EQUAL)
    return [
        setting(gate, temperature, factor)
        for gate in gates for temperature in TEMPERATURES
        for factor in dict.fromkeys((1.0, EQUAL[gate]))
    ]  # fmt: skip


def sections(size: str) -> dict[str, Section]:
    """One sweep."""
    config = policy.learning(size, **{"learner.learning_rate": LEARNING_RATE})
    return {"gates": Section(config, product(settings(size), axis("seed", *range(SEEDS[size]))))}


def _of(runs: list[Run], wanted: Overrides) -> dict[int, float]:
    some = [r for r in runs if {k: v for k, v in r.overrides.items() if k != "seed"} in wanted]
    return sweeps.seeds(some)


def effects(runs: list[Run]) -> dict[str, stats.Effect]:
    """What decides the claims; a seed's value is the mean over the settings named there."""
    gates = [g for g in EQUAL if any(run.overrides["objective.name"] == g for run in runs)]
    each = [_of(runs, [setting(g, t, 1.0) for g in gates]) for t in TEMPERATURES]
    found = {"sharp": stats.difference(each[1], each[0])}
    sapo = _of(runs, [setting("sapo", t, 1.0) for t in TEMPERATURES])
    for gate in ("sapo_erf", "sapo_arctan"):
        if gate in gates:
            own = [setting(gate, t, f) for t in TEMPERATURES for f in (1.0, EQUAL[gate])]
            found[gate] = stats.difference(_of(runs, own), sapo)
    return found


def report(stored: Mapping[str, Any]) -> Page:
    """One table, against SAPO at its own temperatures."""
    runs = store.runs_of(stored["gates"])
    soft = {t: [r for r in runs if r.overrides["objective.tau_pos"] in
                [round(TEMPERATURES[t][0] * f, 4) for f in {1.0, *EQUAL.values()}]]
            for t in TEMPERATURES}  # fmt: skip
    panels = [sweeps.panel("pass", some, f"{t} temperatures: held-out Pass@1")
              for t, some in soft.items()]  # fmt: skip
    tables = {"All gates and temperatures": sweeps.table(runs, "Pass@1, second half, %")}
    return Page(tables, panels, effects(runs), store.minutes(runs))


def protocol() -> dict[str, str]:
    """What was fixed before."""
    names = {"sapo": "sigmoid (SAPO's)", "sapo_erf": "erf", "sapo_arctan": "arctan",
             "sapo_softsign": "softsign"}  # fmt: skip
    each = "; ".join(f"{t}: ({a:g}, {b:g})" for t, (a, b) in TEMPERATURES.items())
    return {
        "Gates": ", ".join(names[gate] for gate in EQUAL),
        "(τ_pos, τ_neg)": f"{each}; at the half-width of SAPO's gate at that τ, and where the gate "
        "study writes a gate otherwise, at the same τ in its notation, too",
        "Seeds": f"{SEEDS['default']}, shared; learning rate {LEARNING_RATE:g}",
        "Primary endpoint": f"Pass@1 ({policy.HELD_OUT}) over the evaluations of the second half",
    }


STUDY = sweeps.study("gate_families", CLAIMS, sections, protocol, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
