"""The plots of the gradient lab's report: one function from its statistics to a figure for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from sapo_jax.report import style
from sapo_jax.report.style import COLOURS, Panel

Found = Mapping[str, Any]

# Curves that get a colour where all algorithms would be too many; the rest stay pale.
COLOURED = {
    "ungated": "ink", "ungated_token": "soft", "sapo": "blue", "grpo": "orange", "gspo": "green",
    "reinforce": "purple", "cispo": "amber",
}  # fmt: skip
BANDED = "sapo"  # the bands of all would cover each other
SHOWN = ("sapo", "grpo", "gspo", "mhpo_unit")  # gates whose histograms are drawn
DROPPING = ("gspo", "gspo_token", "luspo", "gmpo")  # whole sequences
KINDS = {
    "sign": "advantage",
    "log_ratio": "|log r|",
    "probability": "decile of the old probability",
    "entropy": "decile of the entropy",
}


def _colour(name: str) -> str:
    return COLOURS[COLOURED.get(name, "grey")]


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


def _curves(ax: Axes, found: Found, value: Callable[[Mapping, int], float | Mapping]) -> None:
    """A curve over staleness for every algorithm, with its interval where it has one."""
    x, names = _stale_axis(ax, found), found["stages"][0]["gradients"]["names"]
    for k in sorted(range(len(names)), key=lambda k: names[k] in COLOURED):
        y = [value(stage["gradients"], k) for stage in found["stages"]]
        coloured, colour = names[k] in COLOURED, _colour(names[k])
        if isinstance(y[0], Mapping):
            if names[k] == BANDED:
                band = (style.numbers(y, "low"), style.numbers(y, "high"))
                ax.fill_between(x, *band, color=colour, alpha=0.12, linewidth=0)
            y = style.numbers(y, "value")
        look = {"color": colour, "linewidth": 1.9 if coloured else 0.9, "markersize": 3}
        ax.plot(x, y, marker="o", label=names[k] if coloured else None, **look)


def _draw_fidelity(figure: FigureBase, found: Found) -> None:
    axes = style.row(figure, 2, sharey=True)
    targets = (("reward", "the expected reward"), ("own", "its own average"))
    for ax, (key, title) in zip(axes, targets, strict=True):
        _curves(ax, found, lambda g, k, key=key: g["fidelity"][key][k])
        ax.set(ylabel=f"fidelity to {title}")
    style.legend(axes[0], columns=4)


def _forests(
    title: str, entries: Callable[[Mapping], Sequence[Mapping]],
    label: Callable[[Mapping, int], str], xlabel: str, colour: str,
) -> Panel:  # fmt: skip
    """For each algorithm but the ungated ones a point with its interval, from top to bottom."""

    def draw(figure: FigureBase, found: Found) -> None:
        stages = _moved(found)
        for ax, stage in zip(style.row(figure, len(stages)), stages, strict=True):
            gradients = stage["gradients"]
            y = style.lines(ax, [label(gradients, i) for i in range(2, len(gradients["names"]))])
            style.level(ax, 0, vertical=True)
            style.intervals(ax, y, entries(gradients)[2:], colour)
            ax.set(title=_at(stage), xlabel=xlabel)

    return Panel(title, draw, wide=True)


def _by_kind(figure: FigureBase, found: Found, ylabel: str, draw: Callable) -> list[Axes]:
    """An axes for each way to split tokens into groups; ``draw(ax, x, split, chosen)``."""
    stage = next((s for s in reversed(found["stages"]) if "groups" in s), None)
    if stage is None:
        return []
    split = stage["groups"]
    axes = style.row(figure, len(KINDS), [2, 3, 5, 5], sharey=True)
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        chosen = [i for i, (k, _) in enumerate(split["names"]) if k == kind]
        labels = [split["names"][i][1] for i in chosen]
        draw(ax, np.arange(len(chosen)), split, chosen)
        ax.set_xticks(range(len(labels)), labels, rotation=30 if kind == "log_ratio" else 0)
        ax.set(xlabel=title, xlim=(-0.6, len(labels) - 0.4))
    axes[0].set(title=f"{found['focus']}, {_at(stage)}", ylabel=ylabel)
    return axes


def _draw_groups(figure: FigureBase, found: Found) -> None:
    def draw(ax: Axes, x: np.ndarray, split: Mapping, chosen: list[int]) -> None:
        style.level(ax, 0)
        for shift, key, colour in ((-0.12, "carried", "grey"), (0.12, "removed", "orange")):
            entries = [split[key]["reward"][i] for i in chosen]
            style.intervals(ax, x + shift, entries, colour, vertical=True, label=key)

    axes = _by_kind(figure, found, "fidelity to the expected reward", draw)
    if axes:
        style.legend(axes[-1] if axes[0].get_subplotspec().is_last_row() else axes[0])


def _draw_share(figure: FigureBase, found: Found) -> None:
    def draw(ax: Axes, x: np.ndarray, split: Mapping, chosen: list[int]) -> None:
        mass = np.array([split["removed"]["mass"][i] for i in chosen], float)
        ax.bar(x, mass, color=COLOURS["orange"], width=0.6)

    _by_kind(figure, found, "share of the whole mass", draw)


def _draw_cosines(figure: FigureBase, found: Found) -> None:
    stages = _moved(found)
    tables = [np.array(s["gradients"]["cosine"]["whole"], float) for s in stages]
    scale = {"vmin": np.nanmin([0.9, *map(np.min, tables)]), "vmax": 1, "cmap": "Blues"}
    for ax, stage, table in zip(style.row(figure, len(stages)), stages, tables, strict=True):
        names = stage["gradients"]["names"]
        style.heat(ax, table, names, names, "{:.2f}", **scale)
        ax.tick_params(axis="x", rotation=90)
        ax.set_title(_at(stage))


def _draw_layers(figure: FigureBase, found: Found) -> None:
    gradients = found["stages"][-1]["gradients"]
    parts = [p for p in gradients["cosine"] if p != "whole"]
    layers = sorted((p for p in parts if p.startswith("layer")), key=lambda p: int(p.split()[1]))
    kinds = [p for p in parts if not p.startswith("layer")]
    axes = style.row(figure, 2, [max(3, len(layers)), 2 + len(kinds)], sharey=True)
    for ax, chosen, mark in zip(axes, (layers, kinds), ("o-", "o"), strict=True):
        for k, name in enumerate(gradients["names"][2:], 2):
            y = np.array([gradients["cosine"][part][k][0] for part in chosen], float)
            named = name in COLOURED
            look = {"color": _colour(name), "markersize": 3.5, "linewidth": 1.7 if named else 0.8}
            ax.plot(range(len(chosen)), y, mark, label=name if named else None, **look)
        ax.set_xticks(range(len(chosen)), [c.removeprefix("layer ") for c in chosen])
    axes[0].set(xlabel="layer", ylabel=f"cosine {_at(found['stages'][-1])}")
    style.legend(axes[0])


def _draw_norms(figure: FigureBase, found: Found) -> None:
    ax = figure.subplots()
    _curves(ax, found, lambda g, k: g["norm"]["whole"][k] / (g["norm"]["whole"][0] or np.nan))
    ax.set_ylabel("length / that of ungated")
    style.logarithmic(ax)
    style.legend(ax, columns=3)


def _histograms(title: str, kind: str, xlabel: str) -> Panel:
    def draw(figure: FigureBase, found: Found) -> None:
        tokens = found["stages"][-1]["tokens"]
        edges, algorithms = tokens["gate_edges"], tokens["algorithms"]
        sides = {n: algorithms[n]["histograms"] for n in SHOWN if n in algorithms}
        counts = {n: [s[side][kind] for side in ("positive", "negative")] for n, s in sides.items()}
        if not np.any([*counts.values()]):
            return
        axes = style.row(figure, len(counts), sharex=True, sharey=True)
        for ax, (name, (positive, negative)) in zip(axes, counts.items(), strict=True):
            look = {"fill": True, "alpha": 0.5, "color": COLOURS["blue"]}
            ax.stairs(positive, edges, label="A > 0", **look)
            ax.stairs(negative, edges, color=COLOURS["orange"], label="A < 0")
            ax.set(title=name, yscale="log", ylim=(0.7, None))
        style.by_bin(axes[0], edges, np.sum([*counts.values()], (0, 1)))
        style.label(axes, xlabel, "tokens")
        style.legend(axes[0])

    return Panel(title, draw, wide=True)


def _bars(title: str, values: Callable[[Mapping], Mapping], xlabel: str, scale="linear") -> Panel:
    """A bar for each algorithm at the most stale stage; null leaves a gap."""

    def draw(figure: FigureBase, found: Found) -> None:
        last = found["stages"][-1]
        named = values(last)
        length = np.array(list(named.values()), float)
        if not (length > 0).any():  # a logarithmic scale needs a number
            return
        ax = figure.subplots()
        ax.barh(style.lines(ax, list(named)), length, 0.62, color=[_colour(n) for n in named])
        ax.set(xlabel=f"{xlabel}, {_at(last)}", xscale=scale)

    return Panel(title, draw)


def _of_tokens(value: Callable[[Mapping], float]) -> Callable[[Mapping], dict[str, float]]:
    return lambda stage: {name: value(a) for name, a in stage["tokens"]["algorithms"].items()}


def _draw_sequences(figure: FigureBase, found: Found) -> None:
    rows = [r for r in found["stages"][-1]["tokens"]["sequences"] if r["variance"] > 1e-12]
    if not rows:
        return
    ax, variance = figure.subplots(), style.numbers(rows, "variance")
    for key, colour, label in (("d_actual", "orange", "on r − 1"), ("d_log", "blue", "on log r")):
        d = np.maximum(style.numbers(rows, key), 1e-12)
        ax.plot(variance, d, ".", color=COLOURS[colour], markersize=4, alpha=0.6, label=label)
    order = np.argsort(variance)
    bound = style.numbers(rows, "bound")[order]
    ax.plot(variance[order], bound, color=COLOURS["ink"], linewidth=1, label="bound")
    ax.set(xscale="log", yscale="log", xlabel="Var of log r in the sequence", ylabel="D")
    style.legend(ax)


def _draw_negative(figure: FigureBase, found: Found) -> None:
    ax, algorithms = figure.subplots(), found["stages"][-1]["tokens"]["algorithms"]
    y = style.lines(ax, list(algorithms))
    for shift, side, colour, label in (
        (0.18, "positive", "blue", "A > 0"), (-0.18, "negative", "orange", "A < 0")
    ):  # fmt: skip
        values = [a["logits"][side]["l2"] for a in algorithms.values()]
        ax.barh(y + shift, values, height=0.34, color=COLOURS[colour], label=label)
    ax.set_xlabel(f"push on other tokens, {_at(found['stages'][-1])}")
    style.legend(ax)


def _draw_collateral(figure: FigureBase, found: Found) -> None:
    ax = figure.subplots()
    x = _stale_axis(ax, found)
    for name in DROPPING:
        each = [s["tokens"]["algorithms"].get(name) for s in found["stages"]]
        if all(each):
            look = {"color": _colour(name), "marker": "o", "markersize": 3}
            ax.plot(x, style.numbers(each, "dropped_sequences"), label=f"{name}: dropped", **look)
            unmoved = style.numbers(each, "collateral")
            ax.plot(x, unmoved, "--", label="of their tokens, unmoved", **look)
    ax.set(ylabel="share", ylim=(-0.03, 1.03))
    style.legend(ax, columns=2)


PLOTS = {
    "fidelity": Panel("Fidelity as the completions grow stale", _draw_fidelity, wide=True),
    "difference": _forests(
        "Fidelity minus that of the bare ratio",
        lambda g: [entry["difference"] for entry in g["fidelity"]["reward"]],
        lambda g, i: g["names"][i],
        "fidelity minus that of the bare ratio",
        "blue",
    ),
    "removed": _forests(
        "Fidelity of what each algorithm removed",
        lambda g: g["removed"]["reward"],
        lambda g, i: f"{g['names'][i]} ({style.share(g['removed']['mass'][i])})",
        "fidelity of what was removed",
        "orange",
    ),
    "groups": Panel("The gate's removal by groups of tokens", _draw_groups, wide=True),
    "share": Panel("Where the gate removes", _draw_share, wide=True),
    "cosines": Panel("Cosines between gradients", _draw_cosines, wide=True, height=4.3),
    "layers": Panel(
        "Cosine with the ungated gradient, by part of the model", _draw_layers, wide=True
    ),
    "norms": Panel("Length of the gradient", _draw_norms),
    "noise": _bars(
        "Gradient noise scale",
        lambda s: dict(zip(*(s["gradients"][k] for k in ("names", "noise_scale")), strict=True)),
        "problems",
        "log",
    ),
    "gates": _histograms("Gate weights w", "w", "gate weight w"),
    "coefficients": _histograms("Coefficients c = r·w", "c", "coefficient c"),
    "mass": _bars(
        "Off-policy gradient mass",
        _of_tokens(lambda a: a["mass_off_policy"]["0.05"]),
        "share of gradient mass",
    ),
    "ess": _bars(
        "Effective share of the samples", _of_tokens(lambda a: a["ess"]), "effective share of c"
    ),
    "sequences": Panel("Gates within a sequence", _draw_sequences),
    "negative": Panel("Push on tokens that were not drawn", _draw_negative),
    "collateral": Panel("Dropped sequences", _draw_collateral),
}
