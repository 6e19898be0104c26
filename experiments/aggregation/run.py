"""seq_mean, token_mean and seq_sum for SAPO, GRPO and GSPO, on answers of 48 to 200 tokens.

python -m experiments.aggregation.run --jobs=2
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from experiments.evidence import policy, stats, store, sweeps
from experiments.evidence.study import Claim, Page
from experiments.evidence.sweeps import SEEDS, Section, select
from sapo_jax.axes import axis, product
from sapo_jax.report.sweep_stats import Run

NAMES = ("sapo", "grpo", "gspo")
AGGREGATIONS = ("seq_mean", "token_mean", "seq_sum")
LEARNING_RATE = 2e-4
LONG = "eval/long/pass_at_1"
CLAIMS = (
    Claim("token_mean", "token_mean does better than seq_mean", "SCAPO; Pass@1 in the second half, "
          "mean over the three algorithms"),
    Claim("seq_sum", "seq_sum does better than seq_mean", "2512.01374; the same"),
    Claim("long", "token_mean does better than seq_mean on the longest problems",
          "2512.01374; the same, of 18 operands"),
)  # fmt: skip


def sections(size: str) -> dict[str, Section]:
    """Every algorithm with every average."""
    names = NAMES[:1] if size == "smoke" else NAMES
    settings = product(axis("objective.name", *names),
                       axis("objective.aggregation", *AGGREGATIONS))  # fmt: skip
    config = policy.learning(size, **{"learner.learning_rate": LEARNING_RATE})
    return {"averages": Section(config, product(settings, axis("seed", *range(SEEDS[size]))))}


def effects(runs: list[Run]) -> dict[str, stats.Effect]:
    """Each average against seq_mean; a seed's value is the mean over the algorithms."""

    def of(aggregation: str, key: str = "eval/pass_at_1") -> dict[int, float]:
        some = select(runs, objective__aggregation=aggregation)
        return sweeps.seeds(some, functools.partial(sweeps.late, key=key))

    found = {name: stats.difference(of(name), of("seq_mean")) for name in AGGREGATIONS[1:]}
    return found | {"long": stats.difference(of("token_mean", LONG), of("seq_mean", LONG))}


def report(stored: Mapping[str, Any]) -> Page:
    """A table an algorithm, against seq_mean."""
    runs = store.runs_of(stored["averages"])
    own = {name: select(runs, objective__name=name) for name in NAMES}
    own = {name: some for name, some in own.items() if some}
    tables = {name: sweeps.table(some, "Pass@1, second half, %") for name, some in own.items()}
    panels = [sweeps.panel("pass", some, f"{name}: held-out Pass@1") for name, some in own.items()]
    panels.append(sweeps.panel("length", next(iter(own.values())), "SAPO: length of a response"))
    return Page(tables, panels, effects(runs), store.minutes(runs))


def protocol() -> dict[str, str]:
    """What was fixed before."""
    return {
        "Runs": f"{', '.join(NAMES)} × {', '.join(AGGREGATIONS)}, {SEEDS['default']} shared seeds",
        "Learning rate": f"{LEARNING_RATE:g}; gradients longer than 1 are scaled down to it, "
        "and AdamW does not see their scale",
        "Primary endpoint": f"Pass@1 ({policy.HELD_OUT}) over the evaluations of "
        "the second half, the mean over the three algorithms",
    }


STUDY = sweeps.study("aggregation", CLAIMS, sections, protocol, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
