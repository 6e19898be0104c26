"""The gradient lab as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from sapo_jax.report import gradlab_plots as plots
from sapo_jax.report import page
from sapo_jax.report.gradlab_words import PANELS, SECTIONS, TERMS
from sapo_jax.report.run_plots import STYLE

CARDS = {
    "direction": ("fidelity", "difference"),
    "removed": ("removed", "groups", "share"),
    "geometry": ("cosines", "layers", "norms", "noise"),
    "tokens": (
        "gates", "coefficients", "mass", "ess", "sequences", "negative", "collateral",
    ),
}  # fmt: skip
PICTURED = ("fidelity", "removed", "groups")
LEAD = (
    "The completions of a run, frozen, and the policy that wrote them, moved on by the run's own "
    "updates. What do different algorithms make of the same completions, and which of their "
    "gradients points where the expected reward grows?"
)


def _signed(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "–"
    return f"{entry['value']:+.3f} ({entry['low']:+.3f} to {entry['high']:+.3f})"


def _tiles(found: Mapping[str, Any]) -> list[str]:
    last = found["stages"][-1]
    names, removed = last["gradients"]["names"], last["gradients"]["removed"]
    tiles = []
    focus = found["focus"]
    if focus in names:
        i = names.index(focus)
        note = f"of {focus}, {last['updates']} updates after sampling; interval in brackets"
        difference = last["gradients"]["fidelity"]["reward"][i]["difference"]
        value, _, interval = _signed(difference).partition(" ")
        tiles.append(page.tile("Fidelity against ungated", None, value, f"{interval} {note}"))
        value, _, interval = _signed(removed["reward"][i]).partition(" ")
        tiles.append(page.tile("Fidelity of what it removed", None, value, interval))
        mass = f"{removed['mass'][i]:.2%}"
        tiles.append(page.tile("Gradient mass removed", None, mass, "share of Σ|c·A|"))
    moved = last["tokens"]["abs_log_ratio"]
    tiles.append(page.tile("Mean |log r|", None, f"{moved['mean']:.4f}", f"max {moved['max']:.2f}"))
    half = last["gradients"]["target_halves"][0]
    note = f"cosine of its halves, {found['fresh']} fresh samples a problem"
    tiles.append(page.tile("Certainty of the target", None, f"{half or 0:.2f}", note))
    return tiles


def _table(found: Mapping[str, Any]) -> str:
    """The numbers of the most stale stage."""
    last = found["stages"][-1]
    gradients, tokens = last["gradients"], last["tokens"]["algorithms"]
    heads = (
        "algorithm", "length", "fidelity", "minus ungated", "removed", "its fidelity",
        "effective share", "silenced",
    )  # fmt: skip
    rows = []
    for i, name in enumerate(gradients["names"]):
        entry, own = gradients["fidelity"]["reward"][i], tokens.get(name, {})
        shares = (own.get("ess"), own.get("silenced"))
        rows.append([
            name,
            f"{gradients['norm']['whole'][i]:.3g}",
            _signed(entry),
            _signed(entry["difference"]) if i > 1 else "–",
            f"{gradients['removed']['mass'][i]:.2%}",
            _signed(gradients["removed"]["reward"][i]),
            *("–" if share is None else f"{share:.1%}" for share in shares),
        ])  # fmt: skip
    body = "".join(
        "<tr>" + "".join(f'<td class="number">{page.text(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    head = "".join(f'<th class="number">{page.text(h)}</th>' for h in heads)
    return (
        '<div class="card wide scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def write(path: epath.PathLike) -> epath.Path:
    """Write the page of a JSON file of statistics beside it; returns its path."""
    path = epath.Path(path)
    found = json.loads(path.read_text())
    body = {}
    with matplotlib.rc_context(STYLE):
        for slug, names in CARDS.items():
            drawn = {n: f for n in names if (f := plots.figure_of(n, found)) is not None}
            narrow = [n for n in drawn if n not in plots.WIDE]
            wide = plots.WIDE | set(narrow[-1:] if len(narrow) % 2 else [])
            cards = [page.figure(n, f, wide=n in wide, panels=PANELS) for n, f in drawn.items()]
            if cards:
                body[slug] = page.grid(cards)
    body["numbers"] = page.grid([_table(found)])
    chips = {
        "model": found["model"],
        "iteration": found["iteration"],
        "trained with": found["trained_with"],
        "learning rate": f"{found['learning_rate']:g}",
        "seed": found["seed"],
        "problems": found["prompts"],
        "completions of each": found["group_size"],
        "tokens": found["stages"][0]["tokens"]["tokens"],
    }
    name = path.stem
    head = page.header("Gradient lab", name, LEAD, chips, _tiles(found), "")
    target = path.with_suffix(".html")
    markup = page.document(name, head, body, sections=SECTIONS, terms=TERMS)
    target.write_text(markup, encoding="utf-8")
    return target


def picture(path: epath.PathLike, target: epath.PathLike) -> None:
    """Write one PNG of the panels that answer the main question, from a JSON file of statistics."""
    found = json.loads(epath.Path(path).read_text())
    with matplotlib.rc_context(STYLE):
        heights = [plots.size_of(name)[1] for name in PICTURED]
        figure = Figure(figsize=(11.2, sum(heights) + 1), layout="constrained", dpi=120)
        parts = figure.subfigures(len(PICTURED), 1, height_ratios=heights, hspace=0.04)
        for part, name in zip(parts, PICTURED, strict=True):
            plots.PLOTS[name](part, found)
            part.suptitle(PANELS[name][0], x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(target, format="png", bbox_inches="tight", pad_inches=0.15)
