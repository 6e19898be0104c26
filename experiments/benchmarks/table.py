"""A table and a picture of contests: ``python -m experiments.benchmarks.table`` makes them anew."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments.evidence.study import fill, markdown

HERE = pathlib.Path(__file__).parent
README = HERE / "README.md"
PEERS = ("torch", "trl", "tunix", "transformers")
COLUMNS = ("contestant", "median s", "spread", "÷ ours", "tokens/s", "of peak", "compile s")


class Target(NamedTuple):
    """A ratio of two contestants of a contest: at most, or at least, what was aimed at."""

    what: str
    contest: str
    over: str
    under: str
    aim: float
    key: str = "wall_s"

    def row(self, records: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        """A line of the table; where rates are divided, more is better."""
        of = {r["contestant"]: r[self.key] for r in records if self.key in r}
        least = self.key == "tokens_per_s"
        ratio = of[self.over] / of[self.under] if self.under else of[self.over]
        met = ratio >= self.aim if least else ratio <= self.aim
        sign = "≥" if least else "≤"
        return self.what, f"{ratio:.2f}", f"{sign} {self.aim:g}", "yes" if met else "**no**"


TARGETS = (
    Target("update ÷ plain torch", "update", "update_packed", "torch", 0.90),
    Target("the same, prompts shared", "update", "update", "torch", 0.75),
    Target("update ÷ TRL", "update", "update", "trl", 0.62),
    Target("update ÷ tunix", "update", "update_grpo", "tunix", 0.50),
    Target("update of wide rows ÷ plain torch", "update_wide", "update", "torch", 0.90),
    Target("update of long rows ÷ plain torch", "update_long", "update", "torch", 0.90),
    Target("update of ragged rows ÷ the same unpacked", "update_ragged", "update", "update_rows",
           0.40),
    Target("SAPO ÷ cross-entropy", "objectives", "update", "update_cross_entropy", 1.02),
    Target("tokens/s ÷ transformers", "generate", "generate", "transformers", 2.5, "tokens_per_s"),
    Target("tokens/s ÷ tunix", "generate", "generate", "tunix", 2.5, "tokens_per_s"),
    Target("the same, ragged", "generate_ragged", "generate", "tunix", 5, "tokens_per_s"),
    Target("the same, ragged, 32 × 16", "generate_many", "generate", "tunix", 5, "tokens_per_s"),
    Target("loss head ÷ its matrix products", "head", "head", "head_products", 1.3),
    Target("bytes of the head ÷ those of logits", "head", "head", "", 0.10,
           "temp_share_of_logits"),
    Target("compiling an update, s", "update", "update", "", 5, "compile_s"),
)  # fmt: skip


def targets(records: Sequence[dict[str, Any]]) -> str:
    """What was aimed at and what is reached, as Markdown."""
    each, rows = contests(records), []
    for target in TARGETS:
        found = each.get(target.contest, [])
        if {target.over, target.under or target.over} <= {r["contestant"] for r in found}:
            rows.append(target.row(found))
    return markdown(["what", "here", "aim", "met"], rows)


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
    """Each contest's times as bars; those of peers are grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    each = {k: v[-2::-1] for k, v in contests(records).items() if len(v) > 2}  # without the machine
    bars = [len(own) for own in each.values()]
    figure, axes = pyplot.subplots(
        len(each), 1, figsize=(7, sum(bars) / 4 + len(bars)), squeeze=False,
        height_ratios=[count + 1 for count in bars], layout="constrained",
    )  # fmt: skip
    for axis, (name, own) in zip(axes[:, 0], each.items(), strict=True):
        labels, walls = [r["contestant"] for r in own], [r["wall_s"] for r in own]
        spread = [[w - min(r["walls_s"]) for r, w in zip(own, walls, strict=True)],
                  [max(r["walls_s"]) - w for r, w in zip(own, walls, strict=True)]]  # fmt: skip
        colours = ["0.7" if label in PEERS else "tab:blue" for label in labels]
        axis.barh(labels, walls, xerr=spread, color=colours, error_kw={"lw": 1})
        axis.set_title(f"{name} ({own[0]['shape']}): seconds", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(records: Sequence[dict[str, Any]], out: pathlib.Path) -> None:
    """The tables of targets and contests, and the picture; the README has the first one, too."""
    text = "\n".join(of(found) for found in contests(records).values())
    (out / "table.md").write_text(f"{targets(records)}\n{text}")
    draw(records, out / "contests.png")
    if out == HERE / "results":
        README.write_text(fill(README.read_text(), "targets", targets(records)))


if __name__ == "__main__":
    results = HERE / "results"
    write([json.loads(x) for x in (results / "results.jsonl").read_text().splitlines()], results)
