"""The plots of a sweep's report: functions from the summary of `sweep_stats` to figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sapo_jax.report import sweep_stats
from sapo_jax.report.run_words import COLOURS

Found = Mapping[str, Any]
PALETTE = ("blue", "orange", "green", "purple", "amber", "grey", "ink")
FEW = 12  # points of a curve that are marked: evaluations, between which nothing is known
MOST_BANDS = 12  # more settings are drawn without bands: they would hide each other


def label(found: Found, setting: Mapping[str, Any]) -> str:
    """A setting in as few words as tell it from the others."""
    fields = sweep_stats.varied(found) or list(setting)
    named = {field: setting.get(field) for field in fields}
    if len(named) == 1:
        field, value = next(iter(named.items()))
        return str(value) if isinstance(value, str) else f"{field.rpartition('.')[2]} {value}"
    return ", ".join(f"{field.rpartition('.')[2]} {value}" for field, value in named.items())


def _colours(found: Found) -> list:
    """One for each setting: in order along a scale where there are more than the palette has."""
    count = len(found["settings"])
    if count <= len(PALETTE):
        return [COLOURS[name] for name in PALETTE[:count]]
    scale = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(scale(x)) for x in np.linspace(0, 0.9, count)]


def _curves(key: str, unit: str, *, percent: bool = False) -> Callable[[Figure, Found], None]:
    def draw(figure: Figure, found: Found) -> None:
        ax = figure.subplots()
        count = len(found["settings"])
        bands = count <= MOST_BANDS
        for i, (entry, colour) in enumerate(zip(found["settings"], _colours(found), strict=True)):
            curve = entry["curves"].get(key)
            if not curve or not curve["iteration"]:
                continue
            scale = 100 if percent else 1
            x = curve["iteration"]
            mean, low, high = (scale * np.array(curve[k]) for k in ("mean", "low", "high"))
            if bands:
                ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            named = label(found, entry["setting"])
            marker = "o" if len(x) <= FEW else ""
            # Thinner and thinner: where curves lie on each other, all of them show.
            width = 1.5 + (0.9 * (count - 1 - i) if count <= 4 else 0)
            ax.plot(x, mean, marker=marker, ms=3 + width, color=colour, lw=width, label=named)
        ax.set(xlabel="iteration", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if ax.has_data():
            ax.legend(fontsize=7.5, ncols=1 + (count > 8))

    return draw


def _interval(ax: Axes, x: float, entry: Mapping[str, Any], colour: str) -> None:
    """A mean with its interval, as a bar of its own next to the points."""
    ax.plot([x, x], [100 * entry["low"], 100 * entry["high"]], color=colour, linewidth=5, alpha=0.3)
    ax.plot([x - 0.16, x + 0.16], [100 * entry["mean"]] * 2, color=colour, linewidth=2)


def _by_setting(figure: Figure, found: Found, unit: str) -> Axes:
    ax = figure.subplots()
    names = [label(found, entry["setting"]) for entry in found["settings"]]
    turned = {"rotation": 30, "ha": "right"} if len(names) > 6 else {}
    ax.set_xticks(range(len(names)), names, **turned)
    ax.set(ylabel=unit, xlim=(-0.6, len(names) - 0.4))
    ax.grid(visible=False, axis="x")
    return ax


def _draw_ends(figure: Figure, found: Found) -> None:
    ax = _by_setting(figure, found, "Pass@1 (%)")
    for i, (entry, colour) in enumerate(zip(found["settings"], _colours(found), strict=True)):
        y = [run["pass_at_1"] for run in entry["runs"] if run["pass_at_1"] is not None]
        if y:
            spread = np.linspace(-0.14, 0.14, len(y)) if len(y) > 1 else [0.0]
            ax.scatter(i + np.array(spread), 100 * np.array(y), s=14, color=colour, alpha=0.75)
            _interval(ax, i, entry["pass_at_1"], colour)


def _draw_differences(figure: Figure, found: Found) -> None:
    if not any(entry["difference"] for entry in found["settings"]):
        return
    first = label(found, found["settings"][0]["setting"])
    ax = _by_setting(figure, found, f"Pass@1 minus that of {first} (points)")
    ax.text(0, 0, "reference", ha="center", va="bottom", fontsize=7.5, color=COLOURS["grey"])
    ax.axhline(0, color=COLOURS["soft"], linewidth=1)
    reference = {run["seed"]: run["pass_at_1"] for run in found["settings"][0]["runs"]}
    for i, (entry, colour) in enumerate(zip(found["settings"], _colours(found), strict=True)):
        if entry["difference"]:
            pairs = [(run["pass_at_1"], reference.get(run["seed"])) for run in entry["runs"]]
            y = 100 * np.array([a - b for a, b in pairs if a is not None and b is not None])
            spread = np.linspace(-0.14, 0.14, len(y)) if len(y) > 1 else np.zeros(1)
            ax.scatter(i + spread, y, s=14, color=colour, alpha=0.75)
            _interval(ax, i, entry["difference"], colour)


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


def _draw_heat(figure: Figure, found: Found) -> None:
    parts = grid(found)
    if parts is None:
        return
    (row_name, rows), (column_name, columns), table = parts
    ax = figure.subplots()
    mesh = ax.pcolormesh(100 * table, cmap="viridis")  # the page shows no images
    ax.set_yticks(0.5 + np.arange(len(rows)), [str(r) for r in rows])
    ax.set_xticks(0.5 + np.arange(len(columns)), [str(c) for c in columns])
    ax.invert_yaxis()
    ax.set(xlabel=column_name, ylabel=row_name)
    ax.grid(visible=False)
    middle = (table.min() + table.max()) / 2
    if table.size <= 160:
        for (i, j), value in np.ndenumerate(table):
            ink = "#ffffff" if value < middle else "#000000"
            ax.text(
                j + 0.5,
                i + 0.5,
                f"{100 * value:.1f}",
                ha="center",
                va="center",
                color=ink,
                fontsize=7.5,
            )
    bar = figure.colorbar(mesh, ax=ax, label="Pass@1 (%)", pad=0.01)
    bar.solids.set_rasterized(False)


def _draw_collapse(figure: Figure, found: Found) -> None:
    if not any(kind["steps"] for e in found["settings"] for kind in e["collapse"].values()):
        return
    ax = _by_setting(figure, found, "share of runs (%)")
    kinds = {"reward": "orange", "entropy": "green", "finite": "purple"}
    for k, (kind, colour) in enumerate(kinds.items()):
        shares = [100 * entry["collapse"][kind]["share"] for entry in found["settings"]]
        name = "not finite" if kind == "finite" else kind
        x = np.arange(len(shares)) + 0.26 * (k - 1)
        ax.bar(x, shares, width=0.24, color=COLOURS[colour], label=name)
    ax.set(ylim=(0, 105))
    ax.legend(fontsize=7.5)


PLOTS: dict[str, Callable[[Figure, Found], None]] = {
    "pass": _curves("eval/pass_at_1", "Pass@1 (%)", percent=True),
    "reward": _curves("reward/mean", "mean reward"),
    "entropy": _curves("policy/entropy", "nats per token"),
    "length": _curves("length/mean", "tokens"),
    "ends": _draw_ends,
    "differences": _draw_differences,
    "heat": _draw_heat,
    "collapse": _draw_collapse,
}
WIDE = {"heat"}


def figure_of(name: str, found: Found, *, wide: bool = False) -> Figure | None:
    """A plot, or None where there is nothing to draw."""
    height = 3.1
    if name == "heat" and (parts := grid(found)):
        height = min(7.0, 1.4 + 0.34 * len(parts[0][1]))
    figure = Figure(figsize=(11.2 if wide else 5.4, height), layout="constrained")
    PLOTS[name](figure, found)
    return figure if any(ax.has_data() for ax in figure.axes) else None
