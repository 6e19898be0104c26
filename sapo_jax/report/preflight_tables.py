"""Preflight's results as tables: for a terminal, in Markdown, and for a run's report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

GIB = 2**30
COLUMNS = (
    "program", "memory a chip, GiB (temporaries)", "executed ÷ model FLOPs",
    "collectives a chip, GB", "at least, s", "MFU at most", "compiled in, s",
)  # fmt: skip


def _grid(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _number(x: float) -> str:
    return f"{x:.2f}" if x == 0 or x >= 0.1 else f"{x:.2g}"


def _least(x: float) -> str:
    """A time or a cost, which is a second of a chip for a toy and months of them for a pod."""
    return f"{x:,.1f}" if x >= 0.1 else f"{x:.2g}"


def of_model(result: dict[str, Any]) -> list[str]:
    """Executed over model FLOPs, and the MFU, of a program that has any."""
    model = result["model_flops"]
    return [f"{result['flops'] / model:.2f}", f"{result['mfu']:.0%}"] if model else ["–", "–"]


def _memory(results: Sequence[dict[str, Any]], hbm: float) -> list[list[str]]:
    kinds = list(dict.fromkeys(kind for r in results for kind in r["memory"]["kinds"]))
    rows = [["GiB a chip", *kinds, "temporaries", "total", f"of {hbm / GIB:.2f}"]]
    for r in results:
        m = r["memory"]
        sizes = [m["kinds"].get(kind, 0) for kind in kinds] + [m["temporaries"], m["total"]]
        rows.append([r["program"], *(_number(n / GIB) for n in sizes), f"{m['total'] / hbm:.0%}"])
    return rows


def _speed(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["a chip", "GFLOP", "÷ model", "GB moved", "compute s", "memory s", "links s", "MFU",
             "compiled in s"]]  # fmt: skip
    for r in results:
        ratio, mfu = of_model(r)
        bounds = (f"{x:.3f}" for x in r["bounds"].values())
        rows.append([r["program"], f"{r['flops'] / 1e9:.0f}", ratio, f"{r['bytes'] / 1e9:.1f}",
                     *bounds, mfu, f"{r['compile_seconds']:.0f}"])  # fmt: skip
    return rows


def _moved(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["program", "collective", "where", "count", "GB", "largest MB"]]
    for r in results:
        for c in sorted(r["collectives"], key=lambda c: -c["bytes"]):
            where = "layers" if c["in_layers"] else ""
            size, largest = _number(c["bytes"] / 1e9), _number(c["largest"] / 1e6)
            rows.append([r["program"], c["kind"], where, str(c["count"]), size, largest])
    return rows


def _demands(checks: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["demand", "value", "at most", ""]]
    for c in checks:
        verdict = "" if c["met"] else "NOT MET"
        rows.append([c["name"], _number(c["value"]), _number(c["limit"]), verdict])
    return rows


def head(report: dict[str, Any]) -> str:
    """What was compiled, for which devices, and how far that can be trusted."""
    compiled = "as on the pod" if report["tpu"] else (
        "FOR THE CPU, without libtpu: memory, kernels and collectives differ from a pod's"
    )  # fmt: skip
    return f"{report['name']} on {report['topology']}, {report['mesh']}; compiled {compiled}"


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    results, hbm = report["programs"], report["chip"]["hbm"]
    tables = [_memory(results, hbm), _speed(results), _moved(results), _demands(report["checks"])]
    parts = [head(report), *map(_grid, tables if results else [])]
    parts += [f"{name} DOES NOT FIT: {why}" for name, why in report["refused"].items()]
    if not report["refused"]:
        runs = report.get("runs", 1)
        beside = f", of {runs} runs side by side" if runs > 1 else ""
        parts.append(
            f"An iteration takes at least {_least(report['iteration_seconds'])} s{beside}."
        )
    return "\n\n".join(parts)


def _search(
    tried: Sequence[dict[str, Any]], hbm: float, head: Sequence[str], cells: Callable
) -> tuple[str, list[dict[str, Any]]]:
    """A search as a table, with the first cells of each row by a function; and what fits."""
    table = [[*head, f"of {hbm / GIB:.2f}"]]
    for t in tried:
        size = "more" if t["total"] is None else f"{t['total'] / GIB:.2f}"
        table.append([*map(str, cells(t)), size, "fits" if t["fits"] else "does not fit"])
    return _grid(table), [t for t in tried if t["fits"]]


def runs_text(tried: Sequence[dict[str, Any]], hbm: float, chips: int, iterations: int) -> str:
    """The search for the most runs that fit side by side, in words, and what one of them costs."""
    head = ("runs", "chips each", "GiB a chip")
    table, best = _search(tried, hbm, head, lambda t: (t["runs"], chips // t["runs"]))
    if not best:
        return f"{table}\n\nNo run fits."
    (t,) = best
    own, hours = chips // t["runs"], t["seconds"] * iterations / 3600
    flags = " ".join(f"--config.{field}={value}" for field, value in t["fields"].items())
    return (
        f"{table}\n\nMost that fit: {t['runs']}, by {flags}\n"
        f"A run of {iterations} iterations takes {own} chip{'s' * (own > 1)} for at least "
        f"{_least(hours)} hours, {_least(own * hours)} chip-hours; an iteration at least "
        f"{_least(t['seconds'])} s."
    )


def fit_text(tried: Sequence[dict[str, Any]], hbm: float) -> str:
    """The search for the largest micro-batch, in words."""
    head = ("rows a chip", "config.batch.micro_batches", "GiB")
    table, best = _search(tried, hbm, head, lambda t: (t["rows"], t["micro_batches"]))
    found = "No micro-batch fits."
    if best:
        found = f"Largest that fits: --config.batch.micro_batches={best[-1]['micro_batches']}"
    return f"{table}\n\n{found}"


def rows(report: dict[str, Any]) -> list[list[str]]:
    """A row for each program, under `COLUMNS`."""
    found, hbm = [], report["chip"]["hbm"]
    for r in report["programs"]:
        m, moved = r["memory"], sum(c["bytes"] for c in r["collectives"]) / 1e9
        used = f"{m['total'] / GIB:.1f} of {hbm / GIB:.2f} ({m['temporaries'] / GIB:.1f})"
        ratio, mfu = of_model(r)
        found.append([r["program"], used, ratio, f"{moved:.2f}", f"{r['step_seconds']:.3g}", mfu,
                      f"{r['compile_seconds']:.0f}"])  # fmt: skip
    none = ["–"] * (len(COLUMNS) - 2)
    return found + [[name, "does not fit", *none] for name in report["refused"]]


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """Many reports as one table, a row for each program."""
    lines = [("config, topology, mesh", *COLUMNS)]
    for report in reports:
        where = f"`{report['name']}`, `{report['topology']}`, {report['mesh']}"
        for row in rows(report):
            lines.append((where, *row))
            where = ""
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of them the head."""
    head, *body = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body))
