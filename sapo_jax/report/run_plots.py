"""The plots of a run's report: one function from records to a figure for each panel."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from sapo_jax.report import run_records, style
from sapo_jax.report.run_records import Config, Records, counts_of, is_number, series
from sapo_jax.report.style import COLOURS, FLOOR, Panel

Curve = tuple[str, str, str]  # metric key, colour, label

POINTS = 800  # longer curves are binned: the eye sees no difference and the page stays small
SMOOTHED = 40  # curves this long are drawn with their running mean


def _binned(x: np.ndarray, y: np.ndarray, reduce=np.mean) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([reduce(y[p]) for p in parts])


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """A curve; a long one is pale under its running mean."""
    colour = COLOURS[colour]
    if len(x) < SMOOTHED:
        ax.plot(x, y, color=colour, label=label, marker="o", markersize=3, linewidth=1.6)
        return
    window = np.ones(len(x) // 20 | 1)
    smooth = np.convolve(y, window, "same") / np.convolve(np.ones(len(x)), window, "same")
    ax.plot(*_binned(x, y), color=colour, alpha=0.3, linewidth=0.9)
    ax.plot(*_binned(x, smooth), color=colour, label=label, linewidth=1.9)


def _axes(figure: FigureBase, records: Records, ylabel: str) -> Axes:
    """Axes over the iterations of the run, the same in every plot."""
    ax = figure.subplots()
    first, last = (records[i]["iteration"] if records else 0 for i in (0, -1))
    margin = max(0.6, 0.03 * (last - first))
    ax.set(xlabel="iteration", ylabel=ylabel, xlim=(first - margin, last + margin))
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    return ax


def _curves(title: str, ylabel: str, *curves: Curve, scale: str = "linear") -> Panel:
    """Metrics over iterations."""

    def draw(figure: FigureBase, records: Records, config: Config) -> None:
        ax = _axes(figure, records, ylabel)
        found = [series(records, key) for key, _, _ in curves]
        logarithmic = scale == "log" and any(y.any() for _, y in found)
        for (x, y), (_, colour, label) in zip(found, curves, strict=True):
            if len(x):
                _line(ax, x, np.maximum(y, FLOOR) if logarithmic else y, colour, label)
        if logarithmic:
            style.logarithmic(ax)
        elif scale == "percent":
            style.percent(ax)
        style.legend(ax)

    return Panel(title, draw)


def pair(title: str, left: Curve, right: Curve, *, percent: bool) -> Panel:
    """Two metrics, each on a scale of its own."""

    def draw(figure: FigureBase, records: Records, config: Config) -> None:
        ax = _axes(figure, records, "")
        axes = [ax]
        for key, colour, label in (left, right):
            x, y = series(records, key)
            if not len(x):
                continue
            if ax.lines:
                axes.append(ax.twinx())
                axes[-1].grid(False)
            _line(axes[-1], x, y, colour, label.split(" (")[0])
            axes[-1].set_ylabel(label, color=COLOURS[colour])
            if percent and key == right[0]:
                axes[-1].set_ylim(-1, max(0.05, 1.05 * y.max()))
                style.percent(axes[-1])
        style.legend(*axes)

    return Panel(title, draw)


def _draw_pass(figure: FigureBase, records: Records, config: Config) -> None:
    ax = _axes(figure, records, "problems solved")
    found = {int(k[13:]) for r in records for k in r if re.fullmatch(r"eval/pass_at_\d+", k)}
    found = [n for n in sorted(found) if len(series(records, f"eval/pass_at_{n}")[0])]
    for n, colour in zip(found, ("blue", "orange", "green", "purple"), strict=False):
        _with_band(ax, records, f"eval/pass_at_{n}", COLOURS[colour], f"Pass@{n}")
    style.percent(ax)
    style.legend(ax)


def _with_band(ax: Axes, records: Records, key: str, colour: str, label: str) -> None:
    """A share at evaluations, with its interval."""
    x, y = series(records, key)
    ax.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=label)
    sure = [r for r in records if all(is_number(r.get(key + b)) for b in ("_low", "_high"))]
    (x, low), (_, high) = series(sure, f"{key}_low"), series(sure, f"{key}_high")
    ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    ax.vlines(x, low, high, color=colour, alpha=0.35, linewidth=1)


def _draw_evaluations(figure: FigureBase, records: Records, config: Config) -> None:
    ax = _axes(figure, records, "Pass@1")
    colours = itertools.cycle(("blue", "orange", "green", "purple", "amber", "ink", "grey"))
    for name, colour in zip(run_records.evaluations(records), colours, strict=False):
        _with_band(ax, records, f"eval/{name}/pass_at_1", COLOURS[colour], name)
    style.percent(ax)
    style.legend(ax, columns=3)


def _draw_extremes(figure: FigureBase, records: Records, config: Config) -> None:
    curves = []
    for name, colour, reduce in (("max", "orange", np.max), ("min", "blue", np.min)):
        points = [
            (r["iteration"] + j / len(r["minibatch"]) - 0.5, max(m[f"policy/ratio_{name}"], FLOOR))
            for r in records
            for j, m in enumerate(r.get("minibatch") or [])
            if is_number(m.get(f"policy/ratio_{name}"))
        ]
        if points:
            curves.append((name, colour, _binned(*np.array(points).T, reduce)))
    if not curves:
        return
    ax = _axes(figure, records, "probability ratio r")
    style.level(ax, 1)
    for name, colour, (x, y) in curves:
        ax.plot(x, y, "o", color=COLOURS[colour], markersize=2, alpha=0.75, label=f"{name}imum")
    style.logarithmic(ax, shown=(0.5, 2))  # or the rounding errors of r = 1 would fill the plot
    style.legend(ax)


def _histograms(title: str, kind: str, xlabel: str) -> Panel:
    """First, middle and last histogram, split by the sign of the advantage."""
    signs = (("pos", "blue", "A > 0"), ("neg", "orange", "A < 0"))

    def draw(figure: FigureBase, records: Records, config: Config) -> None:
        found = [
            [counts_of(r, f"histogram/{kind}_{sign}") for sign, _, _ in signs] for r in records
        ]
        edges = [h[1] for each in found for h in each if h][-1:]
        if not edges:
            return
        # Before a restart, an older version may have counted between other edges.
        held = [
            (record["iteration"], [h and h[0] for h in each])
            for record, each in zip(records, found, strict=True)
            if any(each) and all(h is None or np.array_equal(h[1], edges[0]) for h in each)
        ]
        held = [held[i] for i in sorted({0, len(held) // 2, len(held) - 1})]
        axes = style.row(figure, len(held), sharex=True, sharey=True)
        for ax, (iteration, each) in zip(axes, held, strict=True):
            ax.set_title(f"iteration {iteration}")
            for counts, (sign, colour, label) in zip(each, signs, strict=True):
                if counts is not None:
                    fill = {"fill": sign == "pos", "alpha": 0.5 if sign == "pos" else 1.0}
                    ax.stairs(counts, edges[0], color=COLOURS[colour], label=label, **fill)
        seen = np.array([c for _, each in held for c in each if c is not None])
        style.by_bin(axes[0], edges[0], seen.sum(0))
        axes[0].set_ylim(0.7, 2 * seen.max())
        style.logarithmic(axes[0])
        style.label(axes, xlabel, "tokens")
        style.legend(axes[0])

    return Panel(title, draw, wide=True)


def _draw_gate(figure: FigureBase, records: Records, config: Config) -> None:
    """SAPO's gate weight in closed form, over the ratios that the run has seen."""
    objective = run_records.objective_of(config)
    taus = [objective.get("tau_pos"), objective.get("tau_neg")]
    low, high = series(records, "policy/ratio_min")[1], series(records, "policy/ratio_max")[1]
    known = all(map(is_number, taus)) and len(low) and len(high)
    if objective.get("name") != "sapo" or not known:
        return
    ax = _axes(figure, records, "gate weight w")
    ax.set(xlabel="probability ratio r", xlim=(0, 4), ylim=(0, 1.05))
    r = np.linspace(0, 4, 201)
    for tau, colour, sign, dash in zip(taus, ("blue", "orange"), "><", ("-", "--"), strict=True):
        w = 1 / np.cosh(tau * (r - 1) / 2) ** 2
        ax.plot(r, w, dash, color=COLOURS[colour], label=f"A {sign} 0, τ = {tau:g}")
    span = np.clip([low.min(), high.max()], 0, r[-1])
    ax.axvspan(*span, color=COLOURS["grey"], alpha=0.18, linewidth=0, label="seen here")
    style.legend(ax)


def _stacked(
    figure: FigureBase, records: Records, ylabel: str, layers: Mapping[str, tuple[str, np.ndarray]]
) -> Axes:
    """Parts of a whole over iterations: colour and values, one a record, by their labels."""
    ax = _axes(figure, records, ylabel)
    parts = np.array_split(np.arange(len(records)), min(len(records), POINTS))
    edges = [records[p[0]]["iteration"] - 0.5 for p in parts] + [records[-1]["iteration"] + 0.5]
    base = np.zeros(len(parts))
    for label, (colour, y) in layers.items():
        top = base + np.array([y[p].mean() for p in parts])
        if y.any():
            ax.stairs(top, edges, baseline=base, fill=True, color=colour, label=label)
        base = top
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05 * base.max()))
    style.legend(ax)
    return ax


def _draw_phases(figure: FigureBase, records: Records, config: Config) -> None:
    # The start, which takes as long as many iterations, is left out.
    spent = [run_records.seconds(r) | {"startup": 0.0} for r in records]
    if any(sum(s.values()) for s in spent):
        phases = run_records.PHASES.items()
        parts = {p: (COLOURS[c], np.array([s[p] for s in spent])) for p, c in phases}
        _stacked(figure, records, "seconds per iteration", parts)


def _draw_ages(figure: FigureBase, records: Records, config: Config) -> None:
    """Nothing where all tokens are of the present policy."""
    found = [(r, h[0] / h[0].sum()) for r in records if (h := counts_of(r, "histogram/age"))]
    shares_kN = np.array([share for _, share in found]).T
    oldest = max(np.flatnonzero(shares_kN.any(-1)), default=0)
    if not oldest:
        return
    fade = LinearSegmentedColormap.from_list("age", [COLOURS["blue"], COLOURS["amber"]])
    layers = {
        f"{k} older" if k else "of the policy": (to_hex(fade(k / oldest)), shares_kN[k])
        for k in range(oldest + 1)
    }
    style.percent(_stacked(figure, [r for r, _ in found], "share of tokens", layers))


PLOTS = {
    "pass": Panel("Pass@1 on held-out problems", _draw_pass),
    "evaluations": Panel("Pass@1 of each evaluation", _draw_evaluations),
    "reward": _curves(
        "Reward of the sampled completions", "mean reward", ("reward/mean", "blue", "reward")
    ),
    "length": pair(
        "Response length",
        ("length/mean", "blue", "length (tokens)"),
        ("length/truncated", "orange", "cut at the limit (share)"),
        percent=True,
    ),
    "zero-groups": _curves(
        "Problems without a learning signal",
        "share of problems",
        ("advantage/zero_groups", "purple", "share"),
        scale="percent",
    ),
    "entropy": _curves(
        "Entropy of the policy", "nats per token", ("policy/entropy", "green", "entropy")
    ),
    "gradient": _curves("Gradient norm", "norm", ("grad/norm", "orange", "norm"), scale="log"),
    "gap": _curves(
        "Sampler against learner",
        "difference of log π (nats)",
        ("sampler/logp_gap_max", "orange", "largest"),
        ("sampler/logp_gap_mean", "blue", "mean"),
        scale="log",
    ),
    "loss": _curves("Loss", "loss", ("policy/loss", "blue", "loss")),
    "log-ratio": _histograms("Log probability ratio of tokens", "log_ratio", "log r (nats)"),
    "gate-weight": _histograms("Gate weight of tokens", "gate", "gate weight w"),
    "extremes": Panel("Extreme ratios of each minibatch", _draw_extremes),
    "kl": _curves(
        "Divergence from the old policy", "KL (nats per token)", ("policy/kl_old", "purple", "KL")
    ),
    "gate-mean": pair(
        "Mean gate weight, and silenced tokens",
        ("policy/gate_mean", "blue", "mean gate weight"),
        ("policy/clipped", "orange", "silenced tokens (share)"),
        percent=True,
    ),
    "ages": Panel("Age of the tokens", _draw_ages),
    "effective": _curves(
        "Effective updates",
        "share",
        ("policy/eur_pos", "blue", "weight, A > 0"),
        ("policy/eur_neg", "orange", "weight, A < 0"),
        ("ratio/ess", "green", "tokens by r"),
        scale="percent",
    ),
    "quadrants": _curves(
        "What moves the policy",
        "share of |c·A|",
        ("coefficient/pos_above", "blue", "A > 0, r > 1"),
        ("coefficient/pos_below", "soft", "A > 0, r < 1"),
        ("coefficient/neg_below", "orange", "A < 0, r < 1"),
        ("coefficient/neg_above", "amber", "A < 0, r > 1"),
        scale="percent",
    ),
    "spread": _curves(
        "Variance of log r within a sequence",
        "nats²",
        ("ratio/var_p99", "orange", "99th percentile"),
        ("ratio/var_mean", "blue", "mean"),
        scale="log",
    ),
    "reduction": _curves(
        "Gates of tokens against one of the sequence",
        "distance",
        ("ratio/bound_mean", "grey", "bound, τ²/4 · variance"),
        ("ratio/d_log_mean", "blue", "gates on log r"),
        ("ratio/d_gate_mean", "orange", "gates in use"),
        scale="log",
    ),
    "gate": Panel("The gate in closed form", _draw_gate),
    "phases": Panel("Phases of an iteration", _draw_phases, wide=True),
}
