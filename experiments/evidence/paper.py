"""Curves of the paper's figures, digitised from the images of arXiv 2511.20347v2 (±0.002)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes

from sapo_jax.report.style import COLOURS

FOLDER = pathlib.Path(__file__).parent / "paper_figures"
NOTE = "paper, digitised; one run each"


def read(name: str) -> Mapping[str, Any]:
    """A figure's values."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def points(figure: Mapping[str, Any], panel: str) -> Iterator[tuple[str, list, list]]:
    """Label, steps and values of each curve of a panel."""
    for label, pairs in figure["panels"][panel].items():
        steps, values = zip(*pairs, strict=True)
        yield label, list(steps), list(values)


def draw(ax: Axes, name: str, panel: str, colours: Mapping[str, str]) -> None:
    """A panel as the paper has it, marked as such."""
    for label, steps, values in points(read(name), panel):
        ax.plot(steps, values, "o--", color=COLOURS[colours[label]], markersize=3, linewidth=1.2,
                label=label)  # fmt: skip
    ax.set(xlabel="gradient steps", title=NOTE)
