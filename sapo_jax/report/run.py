"""A run directory told as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from sapo_jax.report import page, preflight_tables, run_records, style
from sapo_jax.report import run_plots as plots
from sapo_jax.report.page import Tile
from sapo_jax.report.run_records import Config, Records, is_number, series
from sapo_jax.report.style import Panel
from sapo_jax.training import provenance
from sapo_jax.training.files import read_json
from sapo_jax.training.workdir import gaps, read_config, read_metrics, read_samples

SAMPLES = 24
PREFLIGHT = {"checks": [{"name": str}], "refused": dict}
PNG = "data:image/png;base64,"
RIGHT = 0.5  # in runs that did not record what is right: a larger reward
# What means something where nothing was sampled: there is no old policy to compare with.
SUPERVISED = ("iteration", "update", "eval/", "policy/loss", "policy/entropy", "grad/", "time/")


def _read(workdir: epath.PathLike) -> tuple[Records, Config]:
    records, config = read_metrics(workdir), read_config(workdir) or {}
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
    updates, speed = (series(records, k)[1] for k in ("update", "time/tokens_per_second"))
    spent = sum(sum(run_records.seconds(r).values()) for r in records)
    result: dict[str, Any] = {
        "iterations": records[-1]["iteration"] if records else 0,
        "window": window,
        "updates": int(updates[-1]) if len(updates) else None,
        "minutes": spent / 60 if spent else None,
        "tokens_per_second": float(np.median(speed)) if len(speed) else None,
    }
    evaluated = [r for r in records if is_number(r.get("eval/pass_at_1"))] or [{}]
    for when, index, part in (("first", 0, slice(window)), ("last", -1, slice(-window, None))):
        for bound in ("", "_low", "_high"):
            value = evaluated[index].get(f"eval/pass_at_1{bound}")
            result[f"pass_at_1_{when}{bound}"] = value if is_number(value) else None
        for name, key in (("reward", "reward/mean"), ("loss", "policy/loss")):
            y = series(records, key)[1][part]
            result[f"{name}_{when}"] = float(y.mean()) if len(y) else None
    return result


def _tiles(records: Records) -> list[Tile]:
    found, tiles = summary(records), []

    def moved(label: str, name: str, form: str, note: str) -> None:
        first, last = found[f"{name}_first"], found[f"{name}_last"]
        if last is not None:
            begin = None if first == last else form.format(first)
            tiles.append(Tile(label, form.format(last), note, begin))

    low, high = found["pass_at_1_last_low"], found["pass_at_1_last_high"]
    sure = f"95% interval {100 * low:.1f}–{high:.1%}" if None not in (low, high) else ""
    moved("Pass@1", "pass_at_1", "{:.1%}", sure)
    over = "means of {window} iterations" if found["window"] > 1 else "first and last iteration"
    label, name = ("Loss", "loss") if found["reward_last"] is None else ("Reward", "reward")
    moved(label, name, "{:#.3g}", over.format(**found) if len(records) > 1 else "")
    note = "" if found["updates"] is None else f"{found['updates']:,} updates"
    tiles.append(Tile("Iterations", f"{found['iterations']:,}", note))
    if (minutes := found["minutes"]) is not None:
        note = f"{60 * minutes / max(found['iterations'], 1):.3g} s per iteration"
        tiles.append(Tile("Minutes", f"{minutes:,.1f}", note))
    if (speed := found["tokens_per_second"]) is not None:
        tiles.append(Tile("Tokens per second", f"{speed:,.0f}", "median of iterations"))
    return tiles


def _evaluations(records: Records) -> list[list[str]]:
    """Of each evaluation the first, the best and the last Pass@1, in per cent."""
    rows = []
    for name in run_records.evaluations(records):
        key = f"eval/{name}/pass_at_1"
        x, y = series(records, key)
        (*_, last) = (r for r in records if is_number(r.get(key)))
        low, high = (last.get(f"{key}_{end}") for end in ("low", "high"))
        sure = f" ({100 * low:.1f} to {100 * high:.1f})" if None not in (low, high) else ""
        best = f"{100 * y.max():.1f} at {x[y.argmax()]:g}"
        rows.append([name, f"{100 * y[0]:.1f}", best, f"{100 * y[-1]:.1f}{sure}"])
    return rows


def _warning(records: Records) -> str:
    """A collapse, metrics that were not finite or not measured, and since when."""
    first: dict[str, int] = {}
    for record in records:
        for key in (k for k, v in record.items() if v is None):
            first.setdefault(key, record["iteration"])
    where = ", ".join(f"{key} (first in iteration {first[key]})" for key in sorted(first))
    lost = gaps(records, 1, records[-1]["iteration"]) if records else ""
    notes = [f"Not finite or not measured, and left out of the plots: {where}."] if where else []
    if records and (since := records[-1].get("run/collapsed_at")):
        notes.append(f"Collapsed at iteration {since}, by the rule of config.collapse.")
    return " ".join(notes + ([f"No records of the iterations {lost}."] if lost else []))


def _head(config: Config) -> dict[str, Any]:
    """What was trained, and how."""
    supervised = config.get("source") == "demonstrations"
    objective = run_records.objective_of(config)
    method = str(objective.pop("name", "")).replace("_", " ").upper()
    chips = {} if supervised else {**objective}
    chips |= {"task": _task(config), "seed": config.get("seed")}
    chips = {key: value for key, value in chips.items() if value not in (None, math.inf)}
    return {"supervised": supervised, "method": "" if supervised else method, "chips": chips}


def _task(config: Config) -> Any:
    """The name of the run's task, the names of several."""
    one, several = config.get("task"), config.get("tasks")
    if several and isinstance(several, Mapping):
        return ", ".join(several)
    return one.get("name") if isinstance(one, Mapping) else one


def _shares(records: Records) -> list[tuple[str, str, float, float]]:
    """Phases of an iteration: name, colour, seconds in all, and their share of the total."""
    spent = [run_records.seconds(r) for r in records]
    totals = {phase: sum(s[phase] for s in spent) for phase in run_records.PHASES}
    whole, colours = sum(totals.values()), run_records.PHASES
    return [(p, colours[p], total, total / whole) for p, total in totals.items() if total]


def _is_right(sample: Mapping[str, Any]) -> bool:
    if isinstance(sample.get("right"), bool):
        return sample["right"]
    return is_number(sample.get("reward")) and sample["reward"] > RIGHT


def pick_samples(samples: Records) -> list[list[Mapping[str, Any]]]:
    """Completions to learn from, by problem, right ones first; no two of a problem are alike.

    First a right and a wrong one of each problem that has both, then, in turn, one of problems that
    were always failed or always solved, then more of each.
    """
    sides: dict[Any, dict[bool, dict[Any, Mapping]]] = {}
    for sample in samples:
        of_problem = sides.setdefault(str(sample.get("prompt_id")), {True: {}, False: {}})
        of_problem[_is_right(sample)].setdefault(str(sample.get("completion")), sample)
    turns: dict[tuple, int] = {}
    ranked = []
    for problem, of_problem in sides.items():
        one_sided = not all(of_problem.values())
        for right, different in of_problem.items():
            for depth, sample in enumerate(different.values()):
                key = (depth, one_sided, right)
                turn = turns[key] = turns.get(key, -1) + 1
                ranked.append(((depth, one_sided, turn, not right), problem, sample))
    chosen: dict[Any, list[Mapping]] = {}
    for _, problem, sample in sorted(ranked, key=lambda entry: entry[0])[:SAMPLES]:
        chosen.setdefault(problem, []).append(sample)
    return [sorted(some, key=_is_right, reverse=True) for some in chosen.values()]


def _problems(samples: Records) -> list[dict[str, Any]]:
    """What the page shows of problems and their completions."""
    shown = []
    for chosen in pick_samples(samples):
        one = chosen[0]
        group = [s for s in samples if s.get("prompt_id") == one.get("prompt_id")]
        right, count = (one.get(f"group_{name}") for name in ("right", "size"))
        whole = is_number(right) and is_number(count)
        shown.append({
            "prompt": one.get("prompt"),
            "answer": one.get("answer"),
            "images": [x for x in one.get("images", []) if str(x).startswith(PNG)],
            "where": f"iteration {one.get('iteration')}, problem {one.get('prompt_id')}",
            "right": right if whole else sum(map(_is_right, group)),
            "count": f"{count} completions" if whole else f"{len(group)} recorded completions",
            "samples": [_completion(sample) for sample in chosen],
        })  # fmt: skip
    return sorted(shown, key=lambda problem: len(problem["samples"]) == 1)


def _completion(sample: Mapping[str, Any]) -> dict[str, Any]:
    notes = [f"sample {sample.get('sample_index')}"]
    for name in ("reward", "advantage"):
        if is_number(value := sample.get(name)):
            notes.append(f"{name} {value:.3g}".replace("-", "−"))
    notes += ["cut at the length limit"] if sample.get("finished") == 1 else []
    verdict = "right" if _is_right(sample) else "wrong"
    return {"verdict": verdict, "notes": ", ".join(notes), "text": sample.get("completion")}


def preflight(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The table of a preflight whose results lie in the run directory."""
    found = read_json(epath.Path(workdir) / "preflight.json", PREFLIGHT)
    if found is None:
        return None
    missed = [c["name"] for c in found["checks"] if not c["met"]]
    missed += [f"{name}: {why}" for name, why in found["refused"].items()]
    note = f"Demands that are not met: {', '.join(missed)}." if missed else "Every demand is met."
    rows, columns = preflight_tables.rows(found), preflight_tables.COLUMNS
    return {"title": preflight_tables.head(found), "columns": columns, "rows": rows, "note": note}


def write(workdir: epath.PathLike) -> epath.Path:
    """Write ``report.html`` into a run directory, from what the directory holds.

    The same directory gives the same bytes. What the run did not measure is left out; results of
    preflight are shown where they lie in ``preflight.json``.

    Returns:
        The path of the page.
    """
    records, config = _read(workdir)
    return page.write(
        epath.Path(workdir).expanduser() / "report.html",
        "run",
        name=str(config.get("name") or epath.Path(workdir).name or "run"),
        **_head(config),
        tiles=_tiles(records),
        warning=_warning(records),
        starts=provenance.read(workdir),
        plots=page.plots(plots.PLOTS, records, config),
        evaluations=_evaluations(records),
        shares=_shares(records),
        preflight=preflight(workdir),
        problems=_problems(read_samples(workdir)),
        config=config,
    )


def picture(workdir: epath.PathLike, path: epath.PathLike) -> None:
    """Write one PNG of the most telling panels of a run, at most four.

    Raises:
        ValueError: The run has nothing to draw.
    """
    records, config = _read(workdir)
    length = ("length/mean", "orange", "length (tokens)")
    entropy = ("policy/entropy", "green", "entropy (nats per token)")
    sampled = len(series(records, "length/mean")[0])
    title = "Response length and entropy" if sampled else "Entropy"
    both = plots.pair(title, length, entropy, percent=False)
    last = [r for r in records if run_records.counts_of(r, "histogram/gate_pos")][-1:]
    gate = Panel(
        "Gate weight of tokens, by sign of the advantage",
        lambda figure, _, config: plots.PLOTS["gate-weight"].draw(figure, last, config),
    )
    whole, reward, loss, gradient = map(plots.PLOTS.get, ("pass", "reward", "loss", "gradient"))
    style.picture(path, [whole, reward, both, gate, loss, gradient], records, config)
