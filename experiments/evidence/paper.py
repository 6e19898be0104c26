"""Curves of the paper's figures, digitised from the images of arXiv 2511.20347v2 (±0.002)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import FigureBase

from sapo_jax.report.style import COLOURS, Panel

FOLDER = pathlib.Path(__file__).parent / "paper_figures"
PALETTE = ("blue", "orange", "green")


def read(name: str) -> Mapping[str, Any]:
    """A figure's values."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def points(figure: Mapping[str, Any], panel: str) -> Iterator[tuple[str, list, list]]:
    """Label, steps and values of each curve of a panel."""
    for label, pairs in figure["panels"][panel].items():
        steps, values = zip(*pairs, strict=True)
        yield label, list(steps), list(values)


def panel(name: str, which: str) -> Panel:
    """A panel of a figure of the paper, marked as such."""

    def draw(figure: FigureBase, _: Any) -> None:
        ax = figure.subplots()
        for (label, steps, values), colour in zip(points(read(name), which), PALETTE, strict=False):
            look = {"markersize": 3, "linewidth": 1.2, "color": COLOURS[colour]}
            ax.plot(steps, values, "o--", label=label, **look)
        ax.set(xlabel="gradient steps", ylabel=which)
        ax.legend(fontsize=7.5)

    number = name.partition("_")[2]
    return Panel(f"The paper's Figure {number}: digitised, one run each", draw)
