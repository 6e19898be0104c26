"""Write what follows from the results: experiments' READMEs, experiments/README.md, README.md.

python -m experiments.evidence.pages
"""

from __future__ import annotations

import functools
import importlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.evidence import stats
from experiments.evidence.study import NOT_RUN, ROOT, Page, Study, fill, markdown, verdicts

STUDIES = (
    "gates", "assumption_validation", "algorithm_comparison", "staleness", "temperature_ablation",
    "multi_task", "gate_families", "aggregation", "weakest_assumption",
)  # fmt: skip
WITHOUT_CLAIMS = ("vision", "pilots")
FIRST = (stats.CONTRADICTED, stats.UNDECIDED, stats.SUPPORTED, NOT_RUN)


def study(name: str) -> Study:
    """The experiment of a folder."""
    return importlib.import_module(f"experiments.{name}.run").STUDY


@functools.cache
def page(name: str) -> Page:
    """What the results of an experiment say."""
    own = study(name)
    return own.page(own.folder / "results")


def claims(most: int | None) -> list[Mapping[str, Any]]:
    """Claims with their verdicts, what did not hold first.

    With ``most``, so many of each experiment that has run.
    """
    rows = []
    for name in STUDIES:
        found = verdicts(study(name).claims, page(name).effects)
        if most:
            found = [row for row in found if row["verdict"] != NOT_RUN][:most]
        rows += [{"experiment": name, **row} for row in found]
    return sorted(rows, key=lambda row: FIRST.index(row["verdict"]))


def table(folder: str, most: int | None = None) -> str:
    """Claim → experiment → what was measured → verdict; links from a page beside ``folder``."""
    rows = []
    for row in claims(most):
        link = f"[{row['experiment']}]({folder}{row['experiment']}/README.md)"
        claim = f"{row['claim']} ({row['source']})"
        rows.append([claim, link, row["measured"] or "–", row["verdict"]])
    return markdown(["claim", "experiment", "measured (95% interval)", "verdict"], rows)


def files() -> Iterator[tuple[pathlib.Path, str]]:
    """Paths of pages, and what is to be in them."""
    for name in (*STUDIES, *WITHOUT_CLAIMS):
        own, path = study(name), ROOT / name / "README.md"
        yield path, own.filled(path.read_text(), page(name))
    for path, part in (
        (ROOT / "README.md", table("")), (ROOT.parent / "README.md", table("experiments/", 1)),
    ):  # fmt: skip
        yield path, fill(path.read_text(), "claims", part)


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text)
