"""An experiment as data: what it computes, what it claims, and the files that follow from both.

``results/*.json.gz`` is what was measured. From it alone follow ``results/table.md``,
``results/figure.png``, ``results/verdicts.json``, and what stands between the marks of the README.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.evidence import stats, store
from experiments.evidence.stats import Effect
from sapo_jax import cli
from sapo_jax.report import style
from sapo_jax.report.style import Panel

ROOT = pathlib.Path(__file__).parents[1]
SIZES = ("smoke", "default", "large")
NOT_RUN = "not run yet"


class Claim(NamedTuple):
    """What is put to the test; the verdict follows by the rule of `stats.verdict`.

    Attributes:
      name: of the effect that decides.
      text: what is claimed, in a sentence.
      source: who claims it.
      claimed: 1 where the effect is claimed to be above 0, −1 below.
      scale, unit: by which the effect is written.
    """

    name: str
    text: str
    source: str
    claimed: int = 1
    scale: float = 100.0
    unit: str = "points"


class Exact(NamedTuple):
    """A claim that needs no seeds: whether it holds, and what was found."""

    holds: bool
    measured: str


@dataclasses.dataclass(frozen=True)
class Page:
    """What a report says: Markdown tables by title, panels of the figure, effects by claim."""

    tables: Mapping[str, str]
    panels: Sequence[Panel]
    effects: Mapping[str, Effect | Exact]
    minutes: float = 0.0  # of one process
    columns: int = 2  # of panels


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
      name: of its folder.
      claims: what it puts to the test; one family of tests.
      protocol: what was fixed before, in rows.
      compute: (flags) → names and data of results, as they come.
      report: results by name → Page.
      parallel: whether it has parts to choose from, which several processes can share.
    """

    name: str
    claims: tuple[Claim, ...]
    protocol: Callable[[], Mapping[str, str]]
    compute: Callable[[cli.Flags], Iterator[tuple[str, Any]]]
    report: Callable[[Mapping[str, Any]], Page]
    parallel: bool = False

    @property
    def folder(self) -> pathlib.Path:
        """Of its README."""
        return ROOT / self.name

    def flags(self, text: str) -> cli.Flags:
        """Those that every experiment has, and those of one that is parallel."""
        found = cli.Flags(f"experiments.{self.name}.run", text)
        found.enum("size", "default", list(SIZES), "How much: seconds, one laptop, one GPU.")
        found.boolean("report_only", False, "Tables and figure from results/; nothing is computed.")
        found.string("workdir", f"runs/experiments/{self.name}", "Where its runs are.")
        if self.parallel:
            found.words("sections", [], "Which parts are computed; by default all.")
            found.integer("jobs", 1, "Processes that share the runs.", 1)
            text = "Which of them this one is; the others are started by job 0."
            found.integer("job", 0, text, 0)
        return found

    def run(self, text: str) -> None:
        """The command of its module, whose docstring is the text."""
        cli.run(self.main, self.flags(text))

    def results(self, size: str, workdir: str) -> pathlib.Path:
        """Where a size's results lie: those of smoke are no results."""
        own = {"default": self.folder / "results", "large": self.folder / "results/large"}
        return own.get(size, pathlib.Path(workdir) / "results")

    def main(self, given: cli.Flags) -> None:
        """Compute what is missing, then write what follows."""
        out = self.results(given.size, given.workdir)
        if not given.report_only:
            cli.use_cache(".cache/xla")
            for name, data in self.compute(given):
                store.write(out / f"{name}.json.gz", data)
            if self.parallel and given.job:
                return
        print(self.write(out))

    def write(self, out: pathlib.Path) -> str:
        """Write tables, figure and verdicts beside the results, and the README's part."""
        page = self.page(out)
        out.mkdir(parents=True, exist_ok=True)
        text = self.tables(page)
        (out / "table.md").write_text(text)
        found = json.dumps(verdicts(self.claims, page.effects), indent=1, ensure_ascii=False)
        (out / "verdicts.json").write_text(found + "\n")
        if page.panels:
            style.picture(out / "figure.png", page.panels, page, columns=page.columns)
        if out == self.folder / "results":
            readme = self.folder / "README.md"
            readme.write_text(self.filled(readme.read_text(), page))
        return text

    def page(self, out: pathlib.Path) -> Page:
        """What the results of a folder say; a page of nothing where there are none."""
        stored = {p.name.removesuffix(".json.gz"): store.read(p) for p in out.glob("*.json.gz")}
        return self.report(dict(sorted(stored.items()))) if stored else Page({}, [], {})

    def tables(self, page: Page) -> str:
        """Verdicts, if there are claims, then the tables."""
        parts = [claims_table(verdicts(self.claims, page.effects))] if self.claims else []
        parts += [f"**{title}**\n\n{table}" for title, table in page.tables.items()]
        return "\n".join(parts)

    def filled(self, readme: str, page: Page) -> str:
        """A README with what is generated between its marks."""
        picture = "![Figure](results/figure.png)\n\n" if page.panels else ""
        spent = f"Time here: {page.minutes:.0f} minutes of one process.\n\n" * (page.minutes > 0)
        protocol = markdown(["", ""], [[k, v] for k, v in self.protocol().items()])
        result = spent + picture + self.tables(page)
        return fill(fill(readme, "protocol", protocol), "result", result)


def fill(text: str, mark: str, content: str) -> str:
    """Text with new content between ``<!-- mark -->`` and ``<!-- /mark -->``."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{content}\n{m[2]}", text, flags=re.DOTALL)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def verdicts(claims: Sequence[Claim], effects: Mapping[str, Effect | Exact]) -> list[dict]:
    """Each claim with what was measured, the adjusted p of the family, and the verdict.

    What is not measured yet counts as a test with p = 1.
    """
    kinds = {claim.name: effects.get(claim.name) for claim in claims}
    tested = {k: 1.0 if e is None else e.p for k, e in kinds.items() if not isinstance(e, Exact)}
    adjusted, rows = stats.holm(tested), []
    for claim in claims:
        found, row = effects.get(claim.name), {"claim": claim.text, "source": claim.source}
        if found is None:
            row |= {"measured": "", "p": None, "verdict": NOT_RUN}
        elif isinstance(found, Exact):
            own = stats.SUPPORTED if found.holds else stats.CONTRADICTED
            row |= {"measured": found.measured, "p": None, "verdict": own}
        else:
            p = adjusted[claim.name]
            own = stats.verdict(found, p, claim.claimed)
            row |= {"measured": written(found, claim), "p": float(f"{p:.3g}"), "verdict": own}
        rows.append({"name": claim.name, **row})
    return rows


def interval(found: Effect, scale: float = 100, digits: int = 1, sign: str = "+") -> str:
    """A mean with its interval: ``+1.2 (−0.3 to +2.5)``; ``sign=""``: ``1.2 (−0.3 to 2.5)``."""
    numbers = (x for x in (found.mean, found.low, found.high) if x is not None)
    texts = (f"{scale * x:{sign}.{digits}f}".replace("-", "−") for x in numbers)
    mean, *bounds = texts
    return f"{mean} ({' to '.join(bounds)})" if bounds else mean


def written(found: Effect, claim: Claim) -> str:
    """An effect in words."""
    size = "" if found.size is None else f", d = {found.size:+.2f}".replace("-", "−")
    value = f"{interval(found, claim.scale, 1 if claim.scale == 100 else 2)} {claim.unit}"
    return f"{value.rstrip()}, {found.seeds} seeds{size}"


def claims_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Claims, what was measured, and verdicts."""
    table = []
    for row in rows:
        p = "" if row["p"] is None else f"{row['p']:.2g}"
        claim = f"{row['claim']} ({row['source']})"
        table.append([claim, row["measured"] or "–", p, f"**{row['verdict']}**"])
    return markdown(["claim", "measured (95% interval)", "p (Holm)", "verdict"], table)
