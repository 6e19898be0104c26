"""Many minibatches a rollout, and late rollouts: SAPO, GRPO, GSPO, VESPO, with and without replay.

python -m experiments.staleness.run --jobs=2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.evidence import policy, stats, store, sweeps
from experiments.evidence.study import Claim, Page
from experiments.evidence.sweeps import SEEDS, Section, select
from sapo_jax.axes import Overrides, axis, product
from sapo_jax.report.sweep_stats import Run

MINIBATCHES = (4, 16, 64)
ITERATIONS_BEHIND = (1, 4)  # and 0, which is that of 4 minibatches
LEARNING_RATE = 1e-4
UPDATES = 256
GROUPS = 3  # of a minibatch, whatever their number
NAMES = ("sapo", "grpo", "gspo", "vespo")
R2 = {"objective.name": "grpo", "learner.old_logp": "recompute", "learner.routing_replay": "R2"}
CLAIMS = (
    Claim("sapo vespo", "With 64 minibatches a rollout SAPO does worse than VESPO",
          "2602.10693; Pass@1 in the second half, no replay", claimed=-1),
    Claim("sapo grpo", "From 4 to 64 minibatches SAPO loses more than GRPO", "2602.10693; "
          "difference of the two differences", claimed=-1),
    Claim("replay", "Replayed routing (R3) helps with 16 and 64 minibatches",
          "2512.01374; mean over the four algorithms"),
)  # fmt: skip


def many(count: int, updates: int = UPDATES) -> dict[str, Any]:
    """N minibatches of the same size a rollout, for as many updates in all."""
    iterations = max(2, updates // count)
    return {
        "batch.minibatches": count, "batch.prompts": count * GROUPS, "iterations": iterations,
        "eval.every": max(1, iterations // 4), "collapse.window": max(1, iterations // 8),
    }  # fmt: skip


def sections(size: str) -> dict[str, Section]:
    """One for each number of minibatches; and rollouts of older policies."""
    small = size == "smoke"
    counts, updates = (MINIBATCHES[:1], 8) if small else (MINIBATCHES, UPDATES)
    seeds, config = axis("seed", *range(SEEDS[size])), {"learner.learning_rate": LEARNING_RATE}
    replays = axis("learner.routing_replay", "none", "R3")
    names = axis("objective.name", *(NAMES[::3] if small else NAMES))
    found = {}
    for count in counts:
        settings: Overrides = [*product(names, replays), *([] if small else [R2])]
        base = policy.learning(size, **config, **many(count, updates))
        found[f"minibatches_{count}"] = Section(base, product(settings, seeds))
    if not small:
        behind = product(axis("objective.name", "sapo", "grpo"),
                         axis("staleness", *ITERATIONS_BEHIND), seeds)  # fmt: skip
        found["behind"] = Section(policy.learning(size, **config, **many(4, updates)), behind)
    return found


def _minus(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def effects(by_count: Mapping[int, list[Run]]) -> dict[str, stats.Effect]:
    """What decides the claims, as far as its sections are there."""

    def of(count: int, name: str, replay: str = "none") -> dict[int, float]:
        fields = {"objective__name": name, "learner__routing_replay": replay}
        return sweeps.seeds(select(by_count[count], **fields))

    least, most = min(by_count), max(by_count)
    found = {"sapo vespo": stats.difference(of(most, "sapo"), of(most, "vespo"))}
    if most > least:
        lost = [_minus(of(most, name), of(least, name)) for name in ("sapo", "grpo")]
        found["sapo grpo"] = stats.difference(*lost)
        some = [run for count, runs in by_count.items() if count > least for run in runs]
        some = [run for name in NAMES for run in select(some, objective__name=name)]
        each = [sweeps.seeds(select(some, learner__routing_replay=r)) for r in ("R3", "none")]
        found["replay"] = stats.difference(*each)
    return found


def report(stored: Mapping[str, Any]) -> Page:
    """A table a section, against SAPO without replay."""
    sections = {name: store.runs_of(data) for name, data in stored.items()}
    by_count = {n: sections[f"minibatches_{n}"] for n in MINIBATCHES
                if f"minibatches_{n}" in sections}  # fmt: skip
    tables = {f"{n} minibatches a rollout": sweeps.table(runs, "Pass@1, second half, %")
              for n, runs in by_count.items()}  # fmt: skip
    if "behind" in sections:
        title = "Rollouts of the policy of 1 and 4 iterations before, 4 minibatches"
        tables[title] = sweeps.table(sections["behind"], "Pass@1, second half, %")
    panels = [
        sweeps.panel("pass", runs, f"{n} minibatches a rollout: held-out Pass@1")
        for n, runs in by_count.items()
    ]
    if "behind" in sections:
        panels.append(sweeps.panel("pass", sections["behind"], "Older rollouts: held-out Pass@1"))
    every = [run for runs in sections.values() for run in runs]
    return Page(tables, panels, effects(by_count) if by_count else {}, store.minutes(every))


def protocol() -> dict[str, str]:
    """What was fixed before."""
    c = policy.learning("default")
    return {
        "Runs": f"{', '.join(NAMES)}, each without replay and with R3, GRPO with R2 too: "
        f"{SEEDS['default']} shared seeds each",
        "Minibatches": f"N = {', '.join(map(str, MINIBATCHES))} of {GROUPS} × "
        f"{c.batch.group_size} rows each, and {UPDATES} updates in all, so that samples and "
        "updates are as many whatever N is",
        "Staleness": f"k = {', '.join(map(str, ITERATIONS_BEHIND))} for SAPO and GRPO, N = 4; "
        "k = 0 is above",
        "Learning rate": f"{LEARNING_RATE:g}",
        "Primary endpoint": f"Pass@1 ({policy.HELD_OUT}), the mean of the "
        "evaluations in the second half of the run; what stopped counts 0",
    }


STUDY = sweeps.study("staleness", CLAIMS, sections, protocol, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
