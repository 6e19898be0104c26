"""A run directory told as one self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from sapo_jax.report import page, preflight_tables
from sapo_jax.report import run_plots as plots
from sapo_jax.report.run_plots import Config, Records
from sapo_jax.report.run_words import KINDS, SECTIONS
from sapo_jax.training import workdir as rundir

SAMPLES = 24
RIGHT = 0.5  # a completion with a larger reward counts as right
# What means something where nothing was sampled: there is no old policy to compare with.
SUPERVISED = ("iteration", "update", "eval/", "policy/loss", "policy/entropy", "grad/", "time/")


def _read(workdir: epath.PathLike) -> tuple[Records, Config]:
    records, config = rundir.read_metrics(workdir), rundir.read_config(workdir) or {}
    if config.get("source") == "demonstrations":
        records = [{k: v for k, v in r.items() if k.startswith(SUPERVISED)} for r in records]
    return records, config


def summary(records: Records) -> dict[str, Any]:
    """The numbers that a run reached; a number that the run does not have is None.

    Args:
        records: One mapping of metrics per iteration, oldest first.

    Returns:
        ``iterations``, ``updates``, ``minutes``, ``tokens_per_second`` (median over iterations);
        ``pass_at_1_{first,last}`` with ``…_low`` and ``…_high``; ``reward_{first,last}`` and
        ``loss_{first,last}``, means over the first and last ``window`` iterations.
    """
    window = min(max(round(len(records) / 10), 1), 10)
    iterations = records[-1]["iteration"] if records else 0
    result: dict[str, Any] = {"iterations": iterations, "window": window}
    updates = plots.series(records, "update")[1]
    result["updates"] = int(updates[-1]) if len(updates) else None
    spent = sum(sum(plots.seconds(r).values()) for r in records)
    result["minutes"] = spent / 60 if spent else None
    speed = plots.series(records, "time/tokens_per_second")[1]
    result["tokens_per_second"] = float(np.median(speed)) if len(speed) else None
    evaluated = [r for r in records if plots.is_number(r.get("eval/pass_at_1"))]
    for when, index in (("first", 0), ("last", -1)):
        for bound in ("", "_low", "_high"):
            value = evaluated[index].get(f"eval/pass_at_1{bound}") if evaluated else None
            result[f"pass_at_1_{when}{bound}"] = value if plots.is_number(value) else None
        for name, key in (("reward", "reward/mean"), ("loss", "policy/loss")):
            y = plots.series(records, key)[1]
            y = y[:window] if when == "first" else y[-window:]
            result[f"{name}_{when}"] = float(y.mean()) if len(y) else None
    return result


def picture(workdir: epath.PathLike, path: epath.PathLike) -> None:
    """Write one PNG of the most telling panels of a run, at most four.

    Raises:
        ValueError: The run has nothing to draw.
    """
    records, config = _read(workdir)
    length = ("length/mean", "orange", "length (tokens)")
    entropy = ("policy/entropy", "green", "entropy (nats per token)")
    title = "Response length and entropy" if plots.has(records, "length/mean") else "Entropy"
    gated = [r for r in records if plots.counts_of(r, "histogram/gate_pos")][-1:]
    candidates = [
        ("Pass@1 on held-out problems", plots.PLOTS["pass"], records),
        ("Reward of the sampled completions", plots.PLOTS["reward"], records),
        (title, plots.pair(length, entropy, percent=False), records),
        ("Gate weight of tokens, by sign of the advantage", plots.PLOTS["gate-weight"], gated),
        ("Loss", plots.PLOTS["loss"], records),
        ("Gradient norm", plots.PLOTS["gradient"], records),
    ]
    with matplotlib.rc_context(plots.STYLE):
        panels = [panel for panel in candidates if plots.figure_of(*panel[1:], config)][:4]
        if not panels:
            raise ValueError(f"nothing to draw in {workdir}")
        rows = math.ceil(len(panels) / 2)
        figure = Figure(figsize=(11, 3.4 * rows), layout="constrained", dpi=160)
        parts = figure.subfigures(rows, min(len(panels), 2), squeeze=False, hspace=0.06).flat
        for part, (title, draw, shown) in zip(parts, panels, strict=False):
            draw(part, shown, config)
            part.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.15)


def _tiles(records: Records) -> list[str]:
    numbers = summary(records)
    tiles = []

    def moved(label: str, name: str, form: str, note: str) -> None:
        first, last = numbers[f"{name}_first"], numbers[f"{name}_last"]
        if last is not None:
            begin = None if first == last else form.format(first)
            tiles.append(page.tile(label, begin, form.format(last), note))

    low, high = numbers["pass_at_1_last_low"], numbers["pass_at_1_last_high"]
    known = low is not None and high is not None
    interval = f"95% interval {100 * low:.1f}–{high:.1%}" if known else ""
    moved("Pass@1", "pass_at_1", "{:.1%}", interval)
    window = numbers["window"]
    over = f"means of {window} iterations" if window > 1 else "first and last iteration"
    rewarded = numbers["reward_last"] is not None
    label, name = ("Reward", "reward") if rewarded else ("Loss", "loss")
    moved(label, name, "{:#.3g}", over if len(records) > 1 else "")
    note = f"{numbers['updates']:,} updates" if numbers["updates"] is not None else ""
    tiles.append(page.tile("Iterations", None, f"{numbers['iterations']:,}", note))
    minutes, speed = numbers["minutes"], numbers["tokens_per_second"]
    if minutes is not None:
        note = f"{60 * minutes / max(numbers['iterations'], 1):.3g} s per iteration"
        tiles.append(page.tile("Minutes", None, f"{minutes:,.1f}", note))
    if speed is not None:
        tiles.append(page.tile("Tokens per second", None, f"{speed:,.0f}", "median of iterations"))
    return tiles


def _warning(records: Records) -> str:
    """Metrics that were not finite, and since when."""
    first: dict[str, int] = {}
    for record in records:
        for key in (k for k, v in record.items() if v is None):
            first.setdefault(key, record["iteration"])
    where = ", ".join(f"{key} (first in iteration {first[key]})" for key in sorted(first))
    return f"Not finite at times, and left out of the plots: {where}." if where else ""


def _header(records: Records, config: Config, name: str) -> str:
    objective, kind = plots.objective_of(config), KINDS["reinforcement"]
    method = str(objective.pop("name", "")).replace("_", " ").upper()
    if config.get("source") == "demonstrations":
        objective, method, kind = {}, "", KINDS["demonstrations"]
    chips, task = objective, config.get("task")
    chips["task"] = task.get("name") if isinstance(task, Mapping) else task
    chips["seed"] = config.get("seed")
    chips = {key: value for key, value in chips.items() if value not in (None, math.inf)}
    title = f"{kind[0]}: {method}" if method else kind[0]
    return page.header(title, name, kind[1], chips, _tiles(records), _warning(records))


def _time_shares(records: Records) -> str:
    spent = [plots.seconds(r) for r in records]
    totals = {phase: sum(s[phase] for s in spent) for phase in plots.PHASES}
    whole = sum(totals.values())
    rows = [(p, plots.PHASES[p], total, total / whole) for p, total in totals.items() if total]
    return page.shares(rows)


def _pick_samples(samples: Records) -> list[tuple[bool, Mapping[str, Any]]]:
    """As many right as wrong completions where there are, of many problems."""
    sides: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    seen: dict[tuple[Any, ...], int] = {}
    for index, sample in enumerate(samples):
        right = plots.is_number(sample.get("reward")) and sample["reward"] > RIGHT
        problem = (right, sample.get("prompt_id"))
        seen[problem] = seen.get(problem, 0) + 1
        sides[right].append((seen[problem], index))
    rights = max(SAMPLES // 2, SAMPLES - len(sides[False]))
    chosen = [(i, True) for _, i in sorted(sides[True])[:rights]]
    chosen += [(i, False) for _, i in sorted(sides[False])[: SAMPLES - len(chosen)]]
    return [(right, samples[i]) for i, right in sorted(chosen)]


def _cards(panels: Sequence[str], records: Records, config: Config) -> list[str]:
    """The panels that have data; an odd one out takes a whole row, so that no row has a hole."""
    drawn = {
        p: f
        for p in panels
        if (f := plots.figure_of(plots.PLOTS[p], records, config, p in plots.WIDE))
    }
    narrow = [p for p in drawn if p not in plots.WIDE]
    wide = plots.WIDE | set(narrow[-1:] if len(narrow) % 2 else [])
    for panel in wide & set(narrow):
        drawn[panel] = plots.figure_of(plots.PLOTS[panel], records, config, wide=True)
    return [page.figure(p, figure, wide=p in wide) for p, figure in drawn.items()]


def _preflight(path: epath.Path) -> str:
    """The table of a preflight whose results lie in the run directory."""
    found = json.loads(path.read_text())
    missed = [c["name"] for c in found["checks"] if not c["met"]]
    missed += [f"{name}: {why}" for name, why in found["refused"].items()]
    note = f"Demands that are not met: {', '.join(missed)}." if missed else "Every demand is met."
    rows = preflight_tables.rows(found)
    return page.table(preflight_tables.head(found), preflight_tables.COLUMNS, rows, note)


def write(workdir: epath.PathLike) -> epath.Path:
    """Write ``report.html`` into a run directory, from what the directory holds.

    The same directory gives the same bytes. What the run did not measure is left out; results of
    preflight are shown where they lie in ``preflight.json``.

    Returns:
        The path of the page.
    """
    records, config = _read(workdir)
    samples = rundir.read_samples(workdir)
    body: dict[str, str] = {}
    with matplotlib.rc_context(plots.STYLE):
        for slug, (_, _, panels) in SECTIONS.items():
            cards = _cards(panels, records, config)
            if slug == "time" and cards:
                cards.append(_time_shares(records))
            if cards:
                body[slug] = page.grid(cards)
    preflight = epath.Path(workdir).expanduser() / "preflight.json"
    if preflight.exists():
        body["preflight"] = _preflight(preflight)
    if samples:
        body["samples"] = page.samples(_pick_samples(samples))
    if config:
        body["config"] = page.tree(config)
    name = str(config.get("name") or epath.Path(workdir).name or "run")
    path = epath.Path(workdir).expanduser() / "report.html"
    path.write_text(page.document(name, _header(records, config, name), body), encoding="utf-8")
    return path
