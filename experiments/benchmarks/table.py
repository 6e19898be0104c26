"""A table and a picture of contests: ``python -m experiments.benchmarks.table`` makes them anew."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
COLUMNS = ("contestant", "median s", "spread", "÷ ours", "tokens/s", "of peak", "compile s")


def _rows(records: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    """A contest's lines; the first contestant is ours, the last one the machine."""
    first, peak = records[0], records[-1]
    rate = peak["flops"] / peak["wall_s"]
    for r in records[:-1]:
        spread = f"{min(r['walls_s']):.2f}–{max(r['walls_s']):.2f}"
        tokens = f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else ""
        share = f"{r['flops'] / r['wall_s'] / rate:.0%}" if "flops" in r else ""
        yield (
            r["contestant"], f"{r['wall_s']:.3f}", spread, f"{r['wall_s'] / first['wall_s']:.2f}",
            tokens, share, f"{r['compile_s']:.1f}",
        )  # fmt: skip


def of(records: Sequence[dict[str, Any]]) -> str:
    """One contest as a table in Markdown."""
    peak = records[-1]
    title = f"**{records[0]['contest']}** (shape `{records[0]['shape']}`; "
    title += f"matrix products here reach {peak['flops'] / peak['wall_s'] / 1e9:.0f} GFLOP/s)"
    lines = [COLUMNS, ["---"] * len(COLUMNS), *_rows(records)]
    return "\n".join([title, "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def contests(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each contest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["contest"], []).append(record)
    return found


def draw(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Each contest's times as bars, relative to ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    each = {k: v for k, v in contests(records).items() if len(v) > 2}
    figure, axes = pyplot.subplots(len(each), 1, figsize=(6, 1 + 1.3 * len(each)), squeeze=False)
    for axis, (name, found) in zip(axes[:, 0], each.items(), strict=True):
        own = found[:-1][::-1]
        labels, walls = [r["contestant"] for r in own], [r["wall_s"] for r in own]
        spread = [[w - min(r["walls_s"]) for r, w in zip(own, walls, strict=True)],
                  [max(r["walls_s"]) - w for r, w in zip(own, walls, strict=True)]]  # fmt: skip
        ours = [r["module"] if "module" in r else r["contestant"] for r in own]
        colours = ["tab:blue" if o.startswith(found[0]["contestant"]) else "0.7" for o in ours]
        axis.barh(labels, walls, xerr=spread, color=colours, error_kw={"lw": 1})
        axis.set_title(f"{name}: seconds", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(records: Sequence[dict[str, Any]], out: pathlib.Path) -> None:
    """The table of all contests, and the picture."""
    text = "\n".join(of(found) for found in contests(records).values())
    (out / "table.md").write_text(text)
    draw(records, out / "contests.png")


if __name__ == "__main__":
    results = HERE / "results"
    write([json.loads(x) for x in (results / "results.jsonl").read_text().splitlines()], results)
