"""A sweep as one self-contained HTML page and a JSON file, from which its picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from sapo_jax.report import page, style
from sapo_jax.report import sweep_plots as plots
from sapo_jax.report.page import Tile
from sapo_jax.report.sweep_stats import COLLAPSES, Run, leaders, summarise, varied
from sapo_jax.training import provenance
from sapo_jax.training.files import read_json, write_json
from sapo_jax.training.workdir import read_config, read_metrics

PICTURED = ("pass", "reward", "differences", "heat", "ends", "entropy")
Found = Mapping[str, Any]
MANIFEST = {"runs": [{"name": str, "directory": str, "overrides": dict}]}
REPORT = {"settings": [{"setting": dict, "runs": [dict], "collapse": dict}], "hours": float}


def _read(workdir: epath.Path) -> Found:
    """What the runs say together, from the runs themselves or as report.json keeps it."""
    manifest = read_json(workdir / "manifest.json", MANIFEST)
    if manifest is None:
        return read_json(workdir / "report.json", REPORT)
    places = [workdir / run["directory"] for run in manifest["runs"]]
    each = zip(manifest["runs"], places, strict=True)
    runs = [
        Run(**run, records=read_metrics(place), config=read_config(place) or {})
        for run, place in each
    ]
    starts = provenance.read(places[0])
    return summarise(runs) | ({"provenance": starts} if starts else {})


def _percent(value: float | None, *, signed: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if signed else ''}.1f}".replace("-", "−")


def _with_interval(entry: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    mean, low, high = (_percent(entry[k], signed=signed) for k in ("mean", "low", "high"))
    return mean if entry["low"] is None else f"{mean} ({low} to {high})"


def _finals(found: Found) -> list[list[str]]:
    rows = []
    for i, entry in enumerate(found["settings"]):
        name, difference = plots.label(found, entry["setting"]), entry["difference"]
        gain = _with_interval(difference, signed=True) if i else "reference"
        better = "–" if difference is None else f"{difference['better']:.0%}"
        rows.append(
            [name, str(len(entry["runs"])), _with_interval(entry["pass_at_1"]), gain, better]
        )
    return rows


def _evaluations(found: Found) -> tuple[list[str], list[list[str]]]:
    """The names of evaluations, and what each setting reached in each."""
    names = list(found["settings"][0].get("evaluations", ()))
    rows = [
        [plots.label(found, entry["setting"])]
        + [_with_interval(entry["evaluations"][name]) for name in names]
        for entry in found["settings"] if names
    ]  # fmt: skip
    return ["setting", *names], rows


def _collapsed(found: Found) -> list[list[str]]:
    rows = []
    for entry in found["settings"]:
        rows.append([plots.label(found, entry["setting"])])
        for kind in COLLAPSES:
            share, median = (entry["collapse"][kind][key] for key in ("share", "median"))
            when = "" if median is None else f", median iteration {median:g}"
            rows[-1].append(f"{share:.0%}{when}")
    return rows


def _survival(found: Found) -> list[list[str]]:
    """How long the runs of each setting last, against the first."""
    rows, survival = [], found.get("survival") or {"groups": {}}
    for i, (entry, own) in enumerate(plots.lives(found)):
        count, left = len(entry["runs"]), len(own["left"])
        low, high = (_percent(own[k][-1]) for k in ("low", "high"))
        median = "–" if own["median"] is None else f"{own['median']:g}"
        end = f"{_percent(own['share'][-1])} ({low} to {high})"
        p = _p(own["p"]) if i else "reference"
        name = plots.label(found, entry["setting"])
        rows.append([name, f"{count - left} of {count}", median, end, p])
    if rows and survival["p"] is not None:
        rows.append(["all settings", "", "", "", _p(survival["p"])])
    return rows


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _runs(found: Found, workdir: epath.Path) -> list[list]:
    rows = []
    for run in (run for entry in found["settings"] for run in entry["runs"]):
        link = f"{run['directory']}/report.html"
        name = (run["name"], link) if (workdir / run["directory"]).exists() else run["name"]
        collapsed = [run[f"collapse_{kind}"] or "–" for kind in COLLAPSES]
        rows.append([name, _percent(run["pass_at_1"]), *collapsed])
    return rows


def _tiles(found: Found) -> list[Tile]:
    settings, tiles = found["settings"], []
    count = sum(len(entry["runs"]) for entry in settings)
    if best := leaders(settings):
        first, *others = (plots.label(found, entry["setting"]) for entry in best)
        note = f"{first}; {_with_interval(best[0]['pass_at_1'])} %"
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            note = f"not told apart by their seeds: {', '.join([first, *others[:3]])}{more}"
        label = "Highest mean Pass@1" if others else "Best mean Pass@1"
        tiles.append(Tile(label, f"{best[0]['pass_at_1']['mean']:.1%}", note))
    tiles.append(Tile("Runs", f"{count}", f"{len(settings)} settings"))
    lost = sum(len(entry["collapse"]["reward"]["steps"]) for entry in settings)
    tiles.append(Tile("Reward collapsed", f"{lost / count:.0%}", f"of {count} runs"))
    spent = found["hours"]
    value = f"{spent:.1f} h" if spent >= 1 else f"{60 * spent:.1f} min"
    tiles.append(Tile("Time", value, f"{3600 * spent / count:.1f} s a run"))
    return tiles


def write(workdir: epath.PathLike) -> epath.Path:
    """Write ``report.html`` and ``report.json`` of a sweep; returns the path of the page.

    Where only report.json lies, the page is of what it says.
    """
    workdir = epath.Path(workdir).expanduser()
    found = _read(workdir)
    write_json(workdir / "report.json", found)
    chips = {
        field: ", ".join(dict.fromkeys(str(e["setting"].get(field)) for e in found["settings"]))
        for field in varied(found)
    }
    chips["seeds"] = len({run["seed"] for e in found["settings"] for run in e["runs"]})
    return page.write(
        workdir / "report.html",
        "sweep",
        name=workdir.name,
        chips=chips,
        tiles=_tiles(found),
        warning="",
        starts=found.get("provenance", []),
        plots=page.plots(plots.PLOTS, found),
        finals=_finals(found),
        evaluations=_evaluations(found),
        collapsed=_collapsed(found),
        survival=_survival(found),
        runs=_runs(found, workdir),
    )


def picture(workdir: epath.PathLike, path: epath.PathLike) -> None:
    """Write one PNG of the most telling panels, at most four, from ``report.json``.

    Raises:
      ValueError: there is nothing to draw.
    """
    found = read_json(epath.Path(workdir) / "report.json", REPORT)
    style.picture(path, [plots.PLOTS[name] for name in PICTURED], found)
