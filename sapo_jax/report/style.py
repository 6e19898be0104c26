"""What all plots share: colours, sizes, axes and marks; from a panel to a figure or a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's palette, safe for colour-blind readers. In the page each colour is a CSS variable
# of its name, so that the plots follow the reader's light or dark scheme.
COLOURS = {
    "ink": "#24292f",
    "soft": "#5c6570",
    "grid": "#dfe3e8",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "purple": "#b05f91",
    "amber": "#e69f00",
    "grey": "#8c959f",
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["soft"],
    "axes.labelcolor": COLOURS["soft"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "legend.frameon": False,
}
NARROW, WIDE = 5.0, 10.6  # inches: half of a page's row, or a phone's; the whole row
FLOOR = 1e-9  # where a zero goes on a logarithmic axis


class Panel(NamedTuple):
    """A plot: ``draw(figure, *data)`` adds axes with data, or nothing where there is none."""

    title: str
    draw: Callable[..., None]
    wide: bool = False
    height: float = 2.9  # inches, at least


def figure_of(panel: Panel, *data: Any, width: float | None = None) -> Figure | None:
    """A panel's figure, or None where there is nothing to draw."""
    width = width or (WIDE if panel.wide else NARROW)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, panel.height), layout="constrained")
        panel.draw(figure, *data)
        if not any(ax.has_data() for ax in figure.axes):
            return None
        names = max(len(ax.get_yticks()) for ax in figure.axes)
        rows = figure.axes[0].get_gridspec().nrows
        figure.set_figheight(max(panel.height, 1 + 0.17 * names) * (1 + 0.8 * (rows - 1)))
    return figure


def picture(path: epath.PathLike, panels: Sequence[Panel], *data: Any, columns: int = 2) -> None:
    """Write one PNG of the panels that have data, at most four; a wide one has a row to itself.

    Raises:
        ValueError: none has.
    """
    panels = [panel for panel in panels if figure_of(panel, *data)][:4]
    if not panels:
        raise ValueError("nothing to draw: no metrics that a picture shows")
    columns, rows = min(columns, len(panels)), []
    for panel in panels:
        if not rows or len(rows[-1]) == columns or panel.wide or rows[-1][0].wide:
            rows.append([])
        rows[-1].append(panel)
    heights = [max(panel.height for panel in row) + 0.5 for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, sum(heights)), layout="constrained", dpi=150)
        grid = {"height_ratios": heights, "squeeze": False, "hspace": 0.05}
        for part, row in zip(figure.subfigures(len(rows), 1, **grid).flat, rows, strict=True):
            places = part.subfigures(1, 1 if row[0].wide else columns, squeeze=False).flat
            for place, panel in zip(places, row, strict=False):
                panel.draw(place, *data)
                place.suptitle(panel.title, x=0.02, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.15)


def _is_narrow(figure: FigureBase) -> bool:
    return figure.bbox.width / figure.dpi < 0.8 * WIDE


def row(figure: FigureBase, count: int, ratios: Sequence[float] | None = None, **share) -> list:
    """Axes side by side, or below each other where the figure is narrow."""
    if _is_narrow(figure):
        return list(figure.subplots(count, 1, squeeze=False, **share).flat)
    return list(figure.subplots(1, count, squeeze=False, width_ratios=ratios, **share).flat)


def label(axes: Sequence[Axes], xlabel: str, ylabel: str) -> None:
    """The same labels for a row of axes, once for each side of it."""
    for ax in axes:
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.label_outer()


def share(value: float | None) -> str:
    """A share in per cent; a dash where it was not measured."""
    return "–" if value is None else f"{value:.2%}"


def numbers(entries: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """The values under a key, NaN for null."""
    return np.array([entry[key] for entry in entries], float)


def legend(*axes: Axes, columns: int = 6) -> None:
    """A legend above the first axes, where it hides no data; a single curve needs none."""
    entries = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    if len(entries) > 1:
        columns = min(columns, 4) if _is_narrow(axes[0].figure) else columns
        where = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
        shape = {"ncols": columns, "handlelength": 1.6, "columnspacing": 1.2}
        axes[0].legend(*zip(*entries, strict=True), **where, **shape)


def level(ax: Axes, value: float, *, vertical: bool = False) -> None:
    """A dashed line at a value that means something."""
    line = ax.axvline if vertical else ax.axhline
    line(value, color=COLOURS["grey"], linewidth=1, linestyle=(0, (4, 3)))


def intervals(
    ax: Axes, positions: np.ndarray, entries: Sequence[Mapping[str, Any]], colour: str, *,
    vertical: bool = False, label: str | None = None,
) -> None:  # fmt: skip
    """Points ``value`` with their intervals ``low`` to ``high``; null leaves a gap."""
    value, low, high = (numbers(entries, key) for key in ("value", "low", "high"))
    lines, point = (ax.vlines, (positions, value)) if vertical else (ax.hlines, (value, positions))
    lines(positions, low, high, color=COLOURS[colour], linewidth=1.4, alpha=0.6)
    ax.plot(*point, "o", color=COLOURS[colour], markersize=4.3, label=label)


def lines(ax: Axes, labels: Sequence[str]) -> np.ndarray:
    """A line for each label, from top to bottom; returns their positions."""
    y = np.arange(len(labels))[::-1]
    ax.set_yticks(y, labels)
    ax.set_ylim(-0.6, len(labels) - 0.4)
    return y


def heat(ax: Axes, table: np.ndarray, rows: Sequence, columns: Sequence, form: str, **scale) -> Any:
    """A table as coloured cells with their numbers: vector shapes, for the page shows no images."""
    mesh = ax.pcolormesh(table, **scale)
    ax.invert_yaxis()
    ax.set_xticks(0.5 + np.arange(len(columns)), [str(c) for c in columns])
    ax.set_yticks(0.5 + np.arange(len(rows)), [str(r) for r in rows])
    ax.grid(visible=False)
    centre = {"ha": "center", "va": "center", "fontsize": 7}
    for (i, j), value in np.ndenumerate(table if table.size <= 200 else table[:0]):
        dark = np.dot(mesh.cmap(mesh.norm(value))[:3], (0.3, 0.6, 0.1)) < 0.5
        ink = "#ffffff" if dark else "#111111"  # whatever the page's colours are
        ax.text(j + 0.5, i + 0.5, form.format(value), color=ink, **centre)
    return mesh


def percent(ax: Axes) -> None:
    """A scale of shares that does not go on where there are none, below 0% and above 100%."""
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, -0.02 * high), min(high, 1 + 0.02 * (1 - low)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def logarithmic(ax: Axes, shown: tuple[float, float] = (math.inf, 0)) -> None:
    """A logarithmic scale with few, plain ticks, over ``shown`` at least; zeros are at FLOOR."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    low, high = ax.set_ylim(min(low, shown[0]), max(high, shown[1]))
    subs = (1, 2, 3, 5) if high / low < 30 else (1, 2, 5) if high / low < 1000 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v > 2 * FLOOR else "0"))
    ax.yaxis.set_minor_locator(NullLocator())


def by_bin(ax: Axes, edges: np.ndarray, counts: np.ndarray) -> None:
    """A scale on which the bins of a histogram are equally wide, over those that hold something.

    Ticks are at 0, at 1 and at the roundest edges, a fifth of the width apart.
    """
    places, some = np.arange(len(edges)), np.flatnonzero(counts)
    spare = max(1, (10 - (some[-1] - some[0] + 1)) // 2)  # 10 bars at least
    low, high = max(some[0] - spare, 0), min(some[-1] + 1 + spare, len(edges) - 1)
    forward, back = (lambda x: np.interp(x, edges, places)), (lambda i: np.interp(i, places, edges))
    ticks: list[float] = []
    for value in sorted([0, 1, *edges], key=lambda v: (v not in (0, 1), len(f"{abs(v):.6g}"))):
        place = forward(value)
        apart = all(abs(place - forward(t)) >= (high - low) / 5 for t in ticks)
        if low <= place <= high and edges[0] <= value <= edges[-1] and apart:
            ticks.append(value)
    ax.set_xscale("function", functions=(forward, back))
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}".replace("-", "−")))
    ax.set_xlim(edges[low], edges[high])
