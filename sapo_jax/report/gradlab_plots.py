"""The plots of the gradient lab's report: one function from its statistics to a figure for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from sapo_jax.report.run_words import COLOURS

Found = Mapping[str, Any]
Draw = Callable[[FigureBase, Found], None]

# Curves that get a colour where all algorithms would be too many; the rest stay pale.
COLOURED = {
    "ungated": "ink", "ungated_token": "soft", "sapo": "blue", "grpo": "orange", "gspo": "green",
    "reinforce": "purple", "cispo": "amber",
}  # fmt: skip
BANDED = ("sapo",)  # the bands of all would cover each other
SHOWN = ("sapo", "grpo", "gspo", "mhpo_unit")  # gates whose histograms are drawn


def _colour(name: str) -> str:
    return COLOURS[COLOURED.get(name, "grey")]


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _names(found: Found) -> list[str]:
    return found["stages"][0]["gradients"]["names"]


def _moved(found: Found) -> list[Mapping[str, Any]]:
    """The last of the run's own minibatches, and the most stale stage."""
    stages = found["stages"]
    near = [s for s in stages if 0 < s["updates"] <= 3][-1:]
    return [*near, *(s for s in stages[-1:] if s not in near)]


def _at(stage: Mapping[str, Any]) -> str:
    n = stage["updates"]
    return f"after {n} update{'s' if n != 1 else ''}"


def _stale_axis(ax: Axes, found: Found) -> np.ndarray:
    """Positions of the stages, evenly spaced whatever the number of updates."""
    updates = [s["updates"] for s in found["stages"]]
    ax.set_xticks(range(len(updates)), [str(n) for n in updates])
    ax.set_xlabel("updates since the completions were sampled")
    return np.arange(len(updates))


def _curves(ax: Axes, found: Found, values: Callable[[Found, int], Any]) -> None:
    """A curve over staleness for every algorithm, with its interval where it has one."""
    x = _stale_axis(ax, found)
    names = _names(found)
    for k in sorted(range(len(names)), key=lambda k: names[k] in COLOURED):
        entries = [values(stage["gradients"], k) for stage in found["stages"]]
        coloured = names[k] in COLOURED
        style = {"color": _colour(names[k]), "linewidth": 1.9 if coloured else 0.9}
        if entries and isinstance(entries[0], Mapping):
            low, high = ([_number(e[b]) for e in entries] for b in ("low", "high"))
            if names[k] in BANDED:
                ax.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            entries = [e["value"] for e in entries]
        y = [_number(e) for e in entries]
        ax.plot(x, y, marker="o", markersize=3, label=names[k] if coloured else None, **style)


def _legend(ax: Axes, columns: int = 6) -> None:
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    if ax.get_legend_handles_labels()[0]:
        ax.legend(ncols=columns, handlelength=1.3, columnspacing=1.2, **place)


def _forest(ax: Axes, labels: Sequence[str], entries: Sequence[Mapping], colour: str = "blue"):
    """A point with its interval for each label, from top to bottom; 0 is marked."""
    y = np.arange(len(labels))[::-1]
    value, low, high = ([_number(e[k]) for e in entries] for k in ("value", "low", "high"))
    ax.axvline(0, color=COLOURS["grey"], linewidth=1, linestyle=(0, (4, 3)))
    ax.hlines(y, low, high, color=COLOURS[colour], linewidth=1.4, alpha=0.6)
    ax.plot(value, y, "o", color=COLOURS[colour], markersize=4.5)
    ax.set_yticks(y, labels)
    ax.set_ylim(-0.6, len(labels) - 0.4)


def _draw_fidelity(figure: FigureBase, found: Found) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    targets = (("reward", "expected reward"), ("own", "own average, no gate"))
    for ax, (key, title) in zip(axes, targets, strict=True):
        _curves(ax, found, lambda g, k, key=key: g["fidelity"][key][k])
        ax.set_title(title, loc="right")
    axes[0].set_ylabel("fidelity")
    _legend(axes[0])


def _draw_difference(figure: FigureBase, found: Found) -> None:
    stages, names = _moved(found), _names(found)
    axes = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for ax, stage in zip(axes, stages, strict=True):
        entries = stage["gradients"]["fidelity"]["reward"][2:]
        _forest(ax, names[2:], [e["difference"] for e in entries])
        ax.set(title=_at(stage), xlabel="fidelity minus that of the bare ratio")


def _draw_removed(figure: FigureBase, found: Found) -> None:
    stages, names = _moved(found), _names(found)
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for ax, stage in zip(axes, stages, strict=True):
        removed = stage["gradients"]["removed"]
        labels = [f"{n} ({m:.2%})" for n, m in zip(names, removed["mass"], strict=True)]
        _forest(ax, labels[2:], removed["reward"][2:], "orange")
        ax.set(title=_at(stage), xlabel="fidelity of what was removed")


def _split_stage(found: Found) -> Mapping[str, Any] | None:
    return next((s for s in reversed(found["stages"]) if "groups" in s), None)


KINDS = {
    "sign": "advantage",
    "log_ratio": "|log r|",
    "probability": "decile of the old probability",
    "entropy": "decile of the entropy",
}


def _by_kind(found: Found, draw: Callable[[Axes, list[str], list[int], Mapping], None], figure):
    stage = _split_stage(found)
    if stage is None:
        return
    split = stage["groups"]
    axes = figure.subplots(1, len(KINDS), width_ratios=[2, 3, 5, 5], sharey=True)
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        chosen = [i for i, (k, _) in enumerate(split["names"]) if k == kind]
        labels = [split["names"][i][1] for i in chosen]
        draw(ax, labels, chosen, split)
        ax.set_xticks(range(len(labels)), labels, rotation=30 if kind == "log_ratio" else 0)
        ax.set(xlabel=title, xlim=(-0.6, len(labels) - 0.4))
    axes[0].set_title(f"{found['focus']}, {_at(stage)}")


def _draw_groups(figure: FigureBase, found: Found) -> None:
    def draw(ax, labels, chosen, split):
        ax.axhline(0, color=COLOURS["grey"], linewidth=1, linestyle=(0, (4, 3)))
        for shift, key, colour in ((-0.12, "carried", "grey"), (0.12, "removed", "orange")):
            entries = [split[key]["reward"][i] for i in chosen]
            x = np.arange(len(labels)) + shift
            value, low, high = ([_number(e[b]) for e in entries] for b in ("value", "low", "high"))
            ax.vlines(x, low, high, color=COLOURS[colour], linewidth=1.3, alpha=0.6)
            ax.plot(x, value, "o", color=COLOURS[colour], markersize=4, label=key)

    _by_kind(found, draw, figure)
    if figure.axes:
        figure.axes[0].set_ylabel("fidelity to the expected reward")
        figure.axes[-1].legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _draw_share(figure: FigureBase, found: Found) -> None:
    def draw(ax, labels, chosen, split):
        shares = [split["removed"]["mass"][i] for i in chosen]
        ax.bar(range(len(labels)), shares, color=COLOURS["orange"], width=0.6)

    _by_kind(found, draw, figure)
    if figure.axes:
        figure.axes[0].set_ylabel("share of the whole mass")


def _draw_cosines(figure: FigureBase, found: Found) -> None:
    stages, names = _moved(found), _names(found)
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    tables = [np.array(s["gradients"]["cosine"]["whole"], float) for s in stages]
    low = min(np.nanmin(t) for t in tables)
    for ax, stage, table in zip(axes, stages, tables, strict=True):
        ax.pcolormesh(table, vmin=min(low, 0.9), vmax=1, cmap="Blues")  # the page shows no images
        ax.invert_yaxis()
        for i, j in np.ndindex(table.shape):
            dark = table[i, j] > (1 + min(low, 0.9)) / 2
            colour = "#ffffff" if dark else "#111111"  # on a colour, in a dark page too
            middle = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            ax.text(j + 0.5, i + 0.5, f"{table[i, j]:.2f}", **middle)
        ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right")
        ax.set_yticks(np.arange(len(names)) + 0.5, names)
        ax.set_title(_at(stage))
        ax.grid(False)


def _draw_layers(figure: FigureBase, found: Found) -> None:
    gradients = found["stages"][-1]["gradients"]
    parts = [p for p in gradients["cosine"] if p != "whole"]
    layers = sorted((p for p in parts if p.startswith("layer")), key=lambda p: int(p.split()[1]))
    kinds = [p for p in parts if not p.startswith("layer")]
    axes = figure.subplots(1, 2, sharey=True, width_ratios=[max(3, len(layers)), 2 + len(kinds)])
    for ax, chosen in zip(axes, (layers, kinds), strict=True):
        for k, name in enumerate(gradients["names"][2:], 2):
            y = [_number(gradients["cosine"][part][k][0]) for part in chosen]
            coloured = name in COLOURED
            ax.plot(
                range(len(chosen)), y, "o-" if ax is axes[0] else "o", color=_colour(name),
                markersize=3.5, linewidth=1.7 if coloured else 0.8,
                label=name if coloured else None,
            )  # fmt: skip
        ax.set_xticks(range(len(chosen)), [c.removeprefix("layer ") for c in chosen])
    axes[0].set(xlabel="layer", ylabel="cosine with ungated")
    axes[0].set_title(_at(found["stages"][-1]), loc="right")
    _legend(axes[0])


def _draw_norms(figure: FigureBase, found: Found) -> None:
    ax = figure.subplots()
    _curves(ax, found, lambda g, k: g["norm"]["whole"][k] / g["norm"]["whole"][0])
    ax.set(ylabel="length / that of ungated", yscale="log")
    _legend(ax, 3)


def _draw_noise(figure: FigureBase, found: Found) -> None:
    ax = figure.subplots()
    stage = found["stages"][-1]
    values = [_number(v) for v in stage["gradients"]["noise_scale"]]
    _bars(ax, _names(found), values)
    ax.set(xlabel=f"problems, {_at(stage)}", xscale="log")


def _bars(ax: Axes, labels: Sequence[str], values: Sequence[float]) -> None:
    y = np.arange(len(labels))[::-1]
    ax.barh(y, values, color=[_colour(n) for n in labels], height=0.62)
    ax.set_yticks(y, labels)


def _histograms(kind: str, xlabel: str) -> Draw:
    def draw(figure: FigureBase, found: Found) -> None:
        tokens = found["stages"][-1]["tokens"]
        shown = [n for n in SHOWN if n in tokens["algorithms"]]
        if not shown:
            return
        edges = np.array(tokens["gate_edges"])
        axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
        for ax, name in zip(axes, shown, strict=True):
            sides = tokens["algorithms"][name]["histograms"]
            ax.stairs(
                sides["positive"][kind], edges, fill=True, alpha=0.5, color=COLOURS["blue"],
                label="A > 0",
            )  # fmt: skip
            ax.stairs(sides["negative"][kind], edges, color=COLOURS["orange"], label="A < 0")
            ax.set(title=name, xlabel=xlabel, yscale="log", ylim=(0.7, None))
        axes[0].set_ylabel("tokens")
        axes[-1].legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))

    return draw


def _of_tokens(value: Callable[[Mapping], float | None], xlabel: str) -> Draw:
    """Bars by algorithm at the most stale stage."""

    def draw(figure: FigureBase, found: Found) -> None:
        algorithms = found["stages"][-1]["tokens"]["algorithms"]
        ax = figure.subplots()
        _bars(ax, list(algorithms), [_number(value(a)) for a in algorithms.values()])
        ax.set_xlabel(f"{xlabel}, {_at(found['stages'][-1])}")

    return draw


def _draw_sequences(figure: FigureBase, found: Found) -> None:
    rows = [r for r in found["stages"][-1]["tokens"]["sequences"] if r["variance"] > 1e-12]
    if not rows:
        return
    ax = figure.subplots()
    variance, bound = (np.array([r[k] for r in rows]) for k in ("variance", "bound"))
    for key, colour, label in (("d_actual", "orange", "on r − 1"), ("d_log", "blue", "on log r")):
        d = np.maximum([r[key] for r in rows], 1e-12)
        ax.plot(variance, d, ".", color=COLOURS[colour], markersize=4, alpha=0.6, label=label)
    order = np.argsort(variance)
    ax.plot(variance[order], bound[order], color=COLOURS["ink"], linewidth=1, label="bound")
    ax.set(xscale="log", yscale="log", xlabel="Var of log r in the sequence", ylabel="D")
    _legend(ax, 3)


def _draw_negative(figure: FigureBase, found: Found) -> None:
    algorithms = found["stages"][-1]["tokens"]["algorithms"]
    ax = figure.subplots()
    y = np.arange(len(algorithms))[::-1]
    for shift, side, colour, label in (
        (0.18, "positive", "blue", "A > 0"), (-0.18, "negative", "orange", "A < 0")
    ):  # fmt: skip
        values = [a["logits"][side]["l2"] for a in algorithms.values()]
        ax.barh(y + shift, values, height=0.34, color=COLOURS[colour], label=label)
    ax.set_yticks(y, list(algorithms))
    ax.set_xlabel(f"push on other tokens, {_at(found['stages'][-1])}")
    _legend(ax, 2)


def _draw_collateral(figure: FigureBase, found: Found) -> None:
    ax = figure.subplots()
    x = _stale_axis(ax, found)
    for name in ("gspo", "gspo_token", "luspo", "gmpo"):
        each = [s["tokens"]["algorithms"].get(name) for s in found["stages"]]
        if all(each):
            for key, dash, label in (
                ("dropped_sequences", "-", "sequences dropped"),
                ("collateral", "--", "of their tokens, unmoved"),
            ):
                y = [_number(a[key]) for a in each]
                ax.plot(x, y, dash, marker="o", markersize=3, color=_colour(name),
                        label=f"{name}: {label}")  # fmt: skip
    ax.set(ylabel="share", ylim=(-0.03, 1.03))
    _legend(ax, 2)


PLOTS: dict[str, Draw] = {
    "fidelity": _draw_fidelity,
    "difference": _draw_difference,
    "removed": _draw_removed,
    "groups": _draw_groups,
    "share": _draw_share,
    "cosines": _draw_cosines,
    "layers": _draw_layers,
    "norms": _draw_norms,
    "noise": _draw_noise,
    "gates": _histograms("w", "gate weight w"),
    "coefficients": _histograms("c", "coefficient c"),
    "mass": _of_tokens(lambda a: a["mass_off_policy"]["0.05"], "share of gradient mass"),
    "ess": _of_tokens(lambda a: a["ess"], "effective share of c"),
    "sequences": _draw_sequences,
    "negative": _draw_negative,
    "collateral": _draw_collateral,
}
HEIGHTS = {"difference": 3.6, "removed": 3.6, "cosines": 4.6, "noise": 3.4, "mass": 3.4, "ess": 3.4}
WIDE = {
    "fidelity", "difference", "removed", "groups", "share", "cosines", "layers", "gates",
    "coefficients",
}  # fmt: skip


def size_of(name: str) -> tuple[float, float]:
    """Width and height of a plot, in inches."""
    return 11.2 if name in WIDE else 5.4, HEIGHTS.get(name, 3.1)


def figure_of(name: str, found: Found) -> Figure | None:
    """A plot, or None where there is nothing to draw."""
    figure = Figure(figsize=size_of(name), layout="constrained")
    PLOTS[name](figure, found)
    return figure if any(ax.has_data() for ax in figure.axes) else None
