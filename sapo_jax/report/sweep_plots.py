"""The plots of a sweep's report: functions from the summary of `sweep_stats` to figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from sapo_jax.report import style, sweep_stats
from sapo_jax.report.style import COLOURS, Panel

Found = Mapping[str, Any]
PALETTE = ("blue", "orange", "green", "purple", "amber", "grey", "ink")
FEW = 12  # points of a curve that are marked: evaluations, between which nothing is known
MOST_EVALUATIONS = 4  # beside each other
MOST_BANDS = 12  # more settings are drawn without bands: they would hide each other


def label(found: Found, setting: Mapping[str, Any]) -> str:
    """A setting in as few words as tell it from the others."""
    fields = sweep_stats.varied(found) or list(setting)
    if len(fields) == 1 and isinstance(value := setting.get(fields[0]), str):
        return value
    named = [f"{field.rpartition('.')[2]} {setting.get(field)}" for field in fields]
    return ", ".join(named) or "base"


def _coloured(found: Found) -> list[tuple[Mapping[str, Any], Any]]:
    """Settings with a colour each: along a scale where there are more than the palette has."""
    settings = found["settings"]
    scale = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(settings)))
    few = len(settings) <= len(PALETTE)
    colours = [COLOURS[name] for name in PALETTE] if few else map(matplotlib.colors.to_hex, scale)
    return list(zip(settings, colours, strict=False))


def _curves(title: str, key: str, ylabel: str, *, scale: int = 1) -> Panel:
    """A metric's mean over the seeds of each setting, with its interval."""

    def draw(figure: FigureBase, found: Found) -> None:
        ax = figure.subplots()
        _draw_curve(ax, found, key, scale)
        ax.set(xlabel="iteration", ylabel=ylabel)
        if ax.has_data():
            ax.legend(fontsize=7.5, ncols=1 + (len(found["settings"]) > 8))

    return Panel(title, draw)


def _draw_curve(ax: Axes, found: Found, key: str, scale: int) -> None:
    count = len(found["settings"])
    for i, (entry, colour) in enumerate(_coloured(found)):
        curve = entry["curves"].get(key) or {"iteration": []}
        if not (x := curve["iteration"]):
            continue
        mean, low, high = (scale * np.array(curve[k], float) for k in ("mean", "low", "high"))
        if count <= MOST_BANDS:
            ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        marker = "o" if len(x) <= FEW else ""
        # Thinner and thinner: where curves lie on each other, all of them show.
        width = 1.5 + (0.9 * (count - 1 - i) if count <= 4 else 0)
        look = {"marker": marker, "markersize": 3 + width, "linewidth": width}
        ax.plot(x, mean, color=colour, label=label(found, entry["setting"]), **look)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _draw_evaluations(figure: FigureBase, found: Found) -> None:
    names = list(found["settings"][0].get("evaluations", ()))[:MOST_EVALUATIONS]
    if not names:
        return
    axes = style.row(figure, len(names))
    for ax, name in zip(axes, names, strict=True):
        _draw_curve(ax, found, f"eval/{name}/pass_at_1", 100)
        ax.set(title=name, xlabel="iteration")
    axes[0].set_ylabel("Pass@1 (%)")
    axes[0].legend(fontsize=7.5)


def _by_setting(figure: FigureBase, found: Found, ylabel: str) -> Axes:
    ax = figure.subplots()
    names = [label(found, entry["setting"]) for entry in found["settings"]]
    turned = {"rotation": 30, "ha": "right"} if sum(map(len, names)) > 60 else {}
    ax.set_xticks(range(len(names)), names, **turned)
    ax.set(ylabel=ylabel, xlim=(-0.6, len(names) - 0.4))
    ax.grid(visible=False, axis="x")
    return ax


def _points(ax: Axes, x: float, shares: list[float], mean: Mapping[str, Any], colour: Any) -> None:
    """A point for each run, in per cent, over the mean with its interval."""
    low, middle, high = (100 * np.array(mean[key], float) for key in ("low", "mean", "high"))
    spread = x + np.linspace(-0.14, 0.14, len(shares)) * (len(shares) > 1)
    ax.scatter(spread, 100 * np.array(shares), s=14, color=colour, alpha=0.75)
    ax.plot([x, x], [low, high], color=colour, linewidth=5, alpha=0.3)
    ax.plot([x - 0.16, x + 0.16], [middle, middle], color=colour, linewidth=2)


def _draw_ends(figure: FigureBase, found: Found) -> None:
    ax = _by_setting(figure, found, "Pass@1 (%)")
    for i, (entry, colour) in enumerate(_coloured(found)):
        ends = [run["pass_at_1"] for run in entry["runs"] if run["pass_at_1"] is not None]
        if ends:
            _points(ax, i, ends, entry["pass_at_1"], colour)


def _draw_differences(figure: FigureBase, found: Found) -> None:
    first = found["settings"][0]
    if not any(entry["difference"] for entry in found["settings"]):
        return
    ax = _by_setting(figure, found, "difference, points")
    ax.text(0, 0, "reference", ha="center", va="bottom", fontsize=7.5, color=COLOURS["grey"])
    ax.axhline(0, color=COLOURS["soft"], linewidth=1)
    reference = sweep_stats.ends_of(first)
    for i, (entry, colour) in enumerate(_coloured(found)):
        if entry["difference"]:
            pairs = [(run["pass_at_1"], reference.get(run["seed"])) for run in entry["runs"]]
            gains = [a - b for a, b in pairs if a is not None and b is not None]
            _points(ax, i, gains, entry["difference"], colour)


def grid(found: Found) -> tuple[tuple[str, list], tuple[str, list], np.ndarray] | None:
    """Rows, columns and Pass@1 of a two-dimensional sweep; None for another.

    The axes are the two fields that vary, or one of them and the seed.
    """
    fields = sweep_stats.varied(found)
    cells: dict[tuple, list[float]] = {}
    for entry in found["settings"]:
        for run in entry["runs"]:
            values = [entry["setting"].get(field) for field in fields]
            values += [run["seed"]] if len(fields) == 1 else []
            if run["pass_at_1"] is not None:
                cells.setdefault(tuple(values), []).append(run["pass_at_1"])
    if len(fields) not in (1, 2) or not cells:
        return None
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if min(len(rows), len(columns)) < 2 or len(cells) < len(rows) * len(columns):
        return None
    table = np.array([[np.mean(cells[r, c]) for c in columns] for r in rows])
    return (fields[0], rows), ((*fields, "seed")[1], columns), table


def _draw_heat(figure: FigureBase, found: Found) -> None:
    if not (parts := grid(found)):
        return
    (row_name, rows), (column_name, columns), table = parts
    ax = figure.subplots()
    mesh = style.heat(ax, 100 * table, rows, columns, "{:.1f}", cmap="viridis")
    ax.set(xlabel=column_name, ylabel=row_name)
    figure.colorbar(mesh, ax=ax, label="Pass@1 (%)", pad=0.01).solids.set_rasterized(False)


def _draw_collapse(figure: FigureBase, found: Found) -> None:
    each = [entry["collapse"] for entry in found["settings"]]
    if not any(kind["steps"] for collapse in each for kind in collapse.values()):
        return
    ax = _by_setting(figure, found, "share of runs (%)")
    kinds = {"reward": "orange", "entropy": "green", "finite": "purple"}
    for k, (kind, colour) in enumerate(kinds.items()):
        shares = [100 * collapse[kind]["share"] for collapse in each]
        x, name = np.arange(len(shares)) + 0.26 * (k - 1), kind.replace("finite", "not finite")
        ax.bar(x, shares, width=0.24, color=COLOURS[colour], label=name)
    ax.set(ylim=(0, 105))
    style.legend(ax)


def lives(found: Found) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Settings with their survival; none where `lifelines` was not there."""
    groups = (found.get("survival") or {"groups": {}})["groups"]
    return list(zip(found["settings"], groups.values(), strict=False))


def _draw_survival(figure: FigureBase, found: Found) -> None:
    """Steps, with a tick where a run was last seen; nothing where no run collapsed."""
    each = lives(found)
    if all(own["share"][-1] == 1 for _, own in each):
        return
    ax = figure.subplots()
    for (entry, own), (_, colour) in zip(each, _coloured(found), strict=True):
        x, share, low, high = (np.array(own[k]) for k in ("iteration", "share", "low", "high"))
        look = {"color": colour, "label": label(found, entry["setting"])}
        ax.step(x, 100 * share, where="post", linewidth=1.8, **look)
        if len(each) <= 4:
            fill = {"step": "post", "color": colour, "alpha": 0.12, "linewidth": 0}
            ax.fill_between(x, 100 * low, 100 * high, **fill)
        left = np.unique(own["left"])
        at = share[np.searchsorted(x, left, "right") - 1]
        ax.plot(left, 100 * at, "|", color=colour, markersize=7)
    ax.set(xlabel="iteration", ylabel="runs not collapsed (%)", ylim=(-2, 104))
    ax.legend(fontsize=7.5, loc="lower left")


PLOTS = {
    "pass": _curves("Pass@1 on held-out problems", "eval/pass_at_1", "Pass@1 (%)", scale=100),
    "reward": _curves("Reward of the sampled completions", "reward/mean", "mean reward"),
    "entropy": _curves("Entropy of the policy", "policy/entropy", "nats per token"),
    "length": _curves("Response length", "length/mean", "tokens"),
    "ends": Panel("Final Pass@1 of every run", _draw_ends),
    "differences": Panel("Difference to the first setting, seed by seed", _draw_differences),
    "evaluations": Panel("Pass@1 of each evaluation", _draw_evaluations, wide=True),
    "heat": Panel("Final Pass@1 over the two axes of the sweep", _draw_heat, wide=True),
    "survival": Panel("Runs that have not collapsed (Kaplan–Meier)", _draw_survival),
    "collapse": Panel("Share of runs that collapsed", _draw_collapse),
}
