"""The gradient lab along training, with seeds: does what a gate removes point the wrong way?

python -m experiments.weakest_assumption.run
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import FigureBase

from experiments.evidence import policy, stats
from experiments.evidence.store import rounded
from experiments.evidence.study import Claim, Page, Study, interval, markdown
from experiments.gradient_statistics import run as lab
from sapo_jax import cli, train
from sapo_jax.gradlab import UNGATED
from sapo_jax.report import style
from sapo_jax.report.style import COLOURS, Panel
from sapo_jax.training import settings
from sapo_jax.training.files import read_json, write_json
from sapo_jax.training.progress import Progress

SEEDS = {"smoke": 2, "default": 8, "large": 32}
POINTS = {"smoke": (1,), "default": (4, 24, 48), "large": (4, 24, 48)}  # iterations of training
UPDATES = {"smoke": (0, 1), "default": (3, 15), "large": (3, 15)}  # since sampling
NAMES = ("sapo", "grpo", "gspo")
LEARNING_RATE = 2e-4
FRESH = 8  # for each frozen row
DRAWS = 100
REMOVED, HELPS = "removed", "fidelity"
HARMFUL = "What SAPO's gate removes is harmful: its fidelity is below 0"
CLAIMS = (
    Claim("removed first", HARMFUL, "Section 3; 3 updates after sampling, as with 4 minibatches",
          -1, 1, ""),
    Claim("removed last", HARMFUL, "Section 3; 15 updates after sampling, as with 16 minibatches",
          -1, 1, ""),
    Claim("helps last", "With its gate, SAPO's gradient points better than that of the bare ratio",
          "Section 3; 15 updates after sampling", 1, 1, ""),
)  # fmt: skip


def compute(given: cli.Flags) -> Iterator[tuple[str, Any]]:
    """Every seed's run goes on to the next point, where the lab looks at its policy."""
    size, place = given.size, pathlib.Path(given.workdir)
    cold = policy.start("moe", place.parent / "cold_start", size)
    algorithms, found = lab.algorithms_of(NAMES), []
    every = [(seed, point) for seed in range(SEEDS[size]) for point in POINTS[size]]
    with Progress(len(every), "weakest assumption") as bar:
        for seed, point in every:
            own = place / f"seed-{seed}"
            stored = own / "gradlab" / f"{point}.json"
            if not stored.exists():
                fields = {"seed": seed, "init_from": str(cold), "iterations": point}
                fields |= {"learner.learning_rate": LEARNING_RATE, "eval.every": 0}
                train.run(settings.from_config(policy.learning(size, **fields)), own)
                arguments = (lab.load(str(own)), own, algorithms, list(UPDATES[size]), FRESH, "")
                *_, last = lab.examine(*arguments, draws=DRAWS)
                write_json(stored, last)
            stages = [
                {"updates": s["updates"], "reward": s["reward"], **_of(s["gradients"])}
                for s in read_json(stored)["stages"]
            ]
            found.append({"seed": seed, "point": point, "stages": stages})
            bar.step()
    yield "stages", rounded(found)


def _of(gradients: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a stage, by algorithm."""
    out = {}
    for k, name in enumerate(gradients["names"]):
        if name not in UNGATED.values():
            removed = gradients["removed"]
            out[name] = {
                HELPS: gradients["fidelity"]["reward"][k]["difference"],
                REMOVED: removed["reward"][k], "mass": removed["mass"][k],
            }  # fmt: skip
    return out


def pooled(
    found: list[Mapping], name: str, what: str, updates: int, points: list[int]
) -> stats.Effect | None:
    """The mean over seeds, of a seed over the points of its training that have a value."""
    draws, values = [], []
    for seed in dict.fromkeys(entry["seed"] for entry in found):
        each = [
            stage[name][what]
            for entry in found if entry["seed"] == seed and entry["point"] in points
            for stage in entry["stages"]
            if stage["updates"] == updates and stage[name][what]["value"] is not None
        ]  # fmt: skip
        if each:
            values.append(sum(e["value"] for e in each) / len(each))
            own = zip(*(e["draws"] for e in each), strict=False)
            draws.append([sum(some) / len(some) for some in own])
    return stats.hierarchical(draws, values) if len(values) > 1 else None


def _table(found: list[Mapping], points: list[int], updates: list[int]) -> str:
    cells = {(name, u, p): pooled(found, name, REMOVED, u, [p])
             for name in NAMES for u in updates for p in points}  # fmt: skip
    p_of = stats.holm({key: cell.p for key, cell in cells.items() if cell})
    rows = []
    for (name, u, point), cell in cells.items():
        if cell is None:
            continue
        stages = [s for e in found if e["point"] == point for s in e["stages"] if s["updates"] == u]
        mass = [s[name]["mass"] for s in stages if s[name]["mass"] is not None]
        helps = pooled(found, name, HELPS, u, [point])
        rows.append([
            name, str(u), str(point), str(cell.seeds), f"{sum(mass) / len(mass):.2%}",
            interval(cell, 1, 2), f"{p_of[name, u, point]:.2g}",
            interval(helps, 1, 2) if helps else "–",
        ])  # fmt: skip
    columns = ["algorithm", "updates since sampling", "iterations of training", "seeds",
               "mass removed", "fidelity of what was removed", "p (Holm)",
               "fidelity minus that of the bare ratio"]  # fmt: skip
    return markdown(columns, rows)


def _draw(figure: FigureBase, page: Page, *, found: list[Mapping], what: str, label: str) -> None:
    points = list(dict.fromkeys(entry["point"] for entry in found))
    updates = [stage["updates"] for stage in found[0]["stages"]]
    axes = style.row(figure, len(updates))
    for ax, u in zip(axes, updates, strict=True):
        for k, (name, colour) in enumerate(zip(NAMES, ("blue", "green", "orange"), strict=True)):
            each = [(i + 0.2 * (k - 1), pooled(found, name, what, u, [p]))
                    for i, p in enumerate(points)]  # fmt: skip
            for x, cell in each:
                if cell and cell.low is not None:
                    ax.vlines(x, cell.low, cell.high, color=COLOURS[colour], alpha=0.6)
            known = [(x, cell.mean) for x, cell in each if cell]
            if known:
                ax.plot(*zip(*known, strict=True), "o", color=COLOURS[colour], label=name)
        style.level(ax, 0)
        ax.set_xticks(range(len(points)), points)
        ax.set(title=f"{u} updates since sampling", xlabel="iterations of training")
    axes[0].set_ylabel(label)
    style.legend(axes[-1])


def report(stored: Mapping[str, Any]) -> Page:
    """Every stage, and what is pooled over them."""
    found = stored["stages"]
    points = list(dict.fromkeys(entry["point"] for entry in found))
    updates = [stage["updates"] for stage in found[0]["stages"]]
    effects = {
        "removed first": pooled(found, "sapo", REMOVED, updates[0], points),
        "removed last": pooled(found, "sapo", REMOVED, updates[-1], points),
        "helps last": pooled(found, "sapo", HELPS, updates[-1], points),
    }
    effects = {name: effect for name, effect in effects.items() if effect}
    panels = [
        Panel(title, lambda figure, page, w=what, t=label: _draw(figure, page, found=found,
                                                                 what=w, label=t), wide=True)
        for title, what, label in (
            ("What gates removed: above 0 it was signal", REMOVED, "fidelity of what was removed"),
            ("What gates are good for", HELPS, "fidelity minus the bare ratio's"),
        )
    ]  # fmt: skip
    tables = {"By stage": _table(found, points, updates)}
    return Page(tables, panels, effects, columns=1)


def protocol() -> dict[str, str]:
    """What was fixed before."""
    c = policy.learning("default")
    return {
        "Policies": f"SAPO's after {', '.join(map(str, POINTS['default']))} iterations, learning "
        f"rate {LEARNING_RATE:g}, {SEEDS['default']} seeds",
        "Rows": f"{c.batch.prompts} problems × {c.batch.group_size} completions a seed, frozen; "
        f"{FRESH * c.batch.group_size} fresh ones a problem for the target",
        "Staleness": f"{' and '.join(map(str, UPDATES['default']))} updates on other rows",
        "Primary endpoint": "fidelity of what SAPO's gate removed, the mean over the three points "
        "of training",
        "Cost": "about 45 minutes of a core, from one seed at the first point",
        "Test": "sign-flip over seeds; Holm over the three claims; 95% hierarchical bootstrap, "
        "seeds and then problems",
    }


STUDY = Study("weakest_assumption", CLAIMS, protocol, compute, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
