"""A sweep as one self-contained HTML page and a JSON file, from which its picture is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from sapo_jax.report import page
from sapo_jax.report import sweep_plots as plots
from sapo_jax.report.run_plots import STYLE
from sapo_jax.report.sweep_stats import Run, summarise, varied
from sapo_jax.report.sweep_words import LEAD, PANELS, SECTIONS, TERMS
from sapo_jax.training import workdir as rundir
from sapo_jax.training.files import write_json

CARDS = {
    "learning": ("pass", "reward", "entropy", "length"),
    "final": ("ends", "differences", "heat"),
    "collapse": ("collapse",),
}
PICTURED = ("pass", "reward", "differences", "heat", "ends", "entropy")
Found = Mapping[str, Any]


def read(workdir: epath.PathLike) -> list[Run]:
    """The runs of a sweep's directory, in the order of its manifest."""
    workdir = epath.Path(workdir)
    runs = json.loads((workdir / "manifest.json").read_text())["runs"]
    return [Run(**run, records=rundir.read_metrics(workdir / run["directory"])) for run in runs]


def _percent(value: float | None, *, signed: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if signed else ''}.1f}"


def _with_interval(entry: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    mean, low, high = (_percent(entry[k], signed=signed) for k in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are markup; the first column is words, the others are numbers."""
    side = ["", *[' class="number"'] * (len(heads) - 1)]
    head = "".join(f"<th{s}>{page.text(h)}</th>" for s, h in zip(side, heads, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{s}>{cell}</td>' for s, cell in zip(side, row, strict=True))}</tr>"
        for row in rows
    )
    return (
        '<div class="card wide scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _finals(found: Found) -> str:
    rows = []
    for entry in found["settings"]:
        difference = entry["difference"]
        better = "–" if difference is None else f"{difference['better']:.0%}"
        cells = [
            plots.label(found, entry["setting"]) or "base",
            str(len(entry["runs"])),
            _with_interval(entry["pass_at_1"]),
            "reference"
            if entry is found["settings"][0]
            else _with_interval(difference, signed=True),
            better,
        ]
        rows.append([page.text(cell) for cell in cells])
    heads = (
        "setting",
        "runs",
        "Pass@1, % (95% interval)",
        "paired difference, points",
        "seeds better",
    )
    return _table(heads, rows)


def _collapsed(found: Found) -> str:
    rows = []
    for entry in found["settings"]:
        cells = [plots.label(found, entry["setting"]) or "base"]
        for kind in ("reward", "entropy", "finite"):
            of_kind = entry["collapse"][kind]
            when = "" if of_kind["median"] is None else f", median iteration {of_kind['median']:g}"
            cells.append(f"{of_kind['share']:.0%}{when}")
        rows.append([page.text(cell) for cell in cells])
    return _table(("setting", "reward", "entropy", "not finite"), rows)


def _runs(found: Found) -> str:
    rows = [
        [
            f'<a href="{page.text(run["directory"])}/report.html">{page.text(run["name"])}</a>',
            page.text(_percent(run["pass_at_1"])),
            *(page.text(run[f"collapse_{k}"] or "–") for k in ("reward", "entropy", "finite")),
        ]
        for entry in found["settings"]
        for run in entry["runs"]
    ]
    heads = ("run", "Pass@1, %", "reward collapsed at", "entropy collapsed at", "not finite at")
    return _table(heads, rows)


def _tiles(found: Found) -> list[str]:
    settings = found["settings"]
    count = sum(len(entry["runs"]) for entry in settings)
    tiles = []
    known = [entry for entry in settings if entry["pass_at_1"]["mean"] is not None]
    if known:
        best = max(known, key=lambda entry: entry["pass_at_1"]["mean"])
        note = f"{plots.label(found, best['setting'])}; {_with_interval(best['pass_at_1'])} %"
        tiles.append(page.tile("Best mean Pass@1", None, f"{best['pass_at_1']['mean']:.1%}", note))
    tiles.append(page.tile("Runs", None, f"{count}", f"{len(settings)} settings"))
    lost = sum(len(entry["collapse"]["reward"]["steps"]) for entry in settings)
    tiles.append(page.tile("Reward collapsed", None, f"{lost / count:.0%}", f"of {count} runs"))
    spent = found["hours"]
    value = f"{spent:.1f} h" if spent >= 1 else f"{60 * spent:.1f} min"
    tiles.append(page.tile("Time", None, value, f"{3600 * spent / count:.1f} s a run"))
    return tiles


def _cards(names: Sequence[str], found: Found) -> list[str]:
    """The panels that have data; an odd one out takes a whole row."""
    drawn = [n for n in names if plots.figure_of(n, found) is not None]
    narrow = [n for n in drawn if n not in plots.WIDE]
    wide = plots.WIDE | set(narrow[-1:] if len(narrow) % 2 else [])
    figures = {n: plots.figure_of(n, found, wide=n in wide) for n in drawn}
    return [page.figure(n, f, wide=n in wide, panels=PANELS) for n, f in figures.items()]


def write(workdir: epath.PathLike) -> epath.Path:
    """Write ``report.html`` and ``report.json`` of a sweep; returns the path of the page."""
    workdir = epath.Path(workdir)
    found = summarise(read(workdir))
    write_json(workdir / "report.json", found)
    tables = {"final": _finals, "collapse": _collapsed}
    body = {}
    with matplotlib.rc_context(STYLE):
        for slug, names in CARDS.items():
            cards = _cards(names, found)
            cards += [tables[slug](found)] if slug in tables else []
            if cards:
                body[slug] = page.grid(cards)
    body["runs"] = page.grid([_runs(found)])
    chips = {
        field: ", ".join(dict.fromkeys(str(e["setting"].get(field)) for e in found["settings"]))
        for field in varied(found)
    }
    chips["seeds"] = len({run["seed"] for e in found["settings"] for run in e["runs"]})
    head = page.header("Sweep", workdir.name, LEAD, chips, _tiles(found), "")
    target = workdir / "report.html"
    markup = page.document(workdir.name, head, body, sections=SECTIONS, terms=TERMS)
    target.write_text(markup, encoding="utf-8")
    return target


def picture(workdir: epath.PathLike, path: epath.PathLike) -> None:
    """Write one PNG of the most telling panels, at most four, from ``report.json``.

    Raises:
      ValueError: there is nothing to draw.
    """
    found = json.loads((epath.Path(workdir) / "report.json").read_text())
    with matplotlib.rc_context(STYLE):
        drawn = [n for n in PICTURED if plots.figure_of(n, found) is not None][:4]
        if not drawn:
            raise ValueError(f"nothing to draw in {workdir}")
        rows = math.ceil(len(drawn) / 2)
        figure = Figure(figsize=(11, 3.4 * rows), layout="constrained", dpi=160)
        parts = figure.subfigures(rows, min(len(drawn), 2), squeeze=False, hspace=0.06).flat
        for part, name in zip(parts, drawn, strict=False):
            plots.PLOTS[name](part, found)
            part.suptitle(PANELS[name][0], x=0.02, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.15)
