"""The gradient lab as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from sapo_jax.report import gradlab_plots as plots
from sapo_jax.report import page, style
from sapo_jax.report.page import Tile
from sapo_jax.training.files import read_json

PICTURED = ("fidelity", "removed", "groups")
CHIPS = {
    "model": "model", "iteration": "iteration", "trained with": "trained_with",
    "learning rate": "learning_rate", "seed": "seed", "problems": "prompts",
    "completions of each": "group_size",
}  # fmt: skip
STAGE = {"updates": int, "tokens": dict, "gradients": {"names": list, "fidelity": dict}}
RESULT = {"stages": [STAGE], "focus": object} | dict.fromkeys(CHIPS.values(), object)
UNGATED = 2  # algorithms that stand first: what the others are compared with


def _read(path: epath.PathLike) -> Mapping[str, Any]:
    found = read_json(path, RESULT)
    if not found["stages"]:
        raise ValueError(f"{path} is no result of the gradient lab: it has no 'stages'")
    return found


def _signed(entry: Mapping[str, Any]) -> tuple[str, str]:
    """A value and its interval."""
    if entry["value"] is None:
        return "–", ""
    value, low, high = (f"{entry[k]:+.3f}".replace("-", "−") for k in ("value", "low", "high"))
    return value, f"({low} to {high})"


def _tiles(found: Mapping[str, Any]) -> list[Tile]:
    last, focus, tiles = found["stages"][-1], found["focus"], []
    gradients = last["gradients"]
    if focus in gradients["names"]:
        i = gradients["names"].index(focus)
        value, interval = _signed(gradients["fidelity"]["reward"][i]["difference"])
        note = f"{interval} of {focus}, {last['updates']} updates after sampling; 95% interval"
        tiles.append(Tile("Fidelity against ungated", value, note))
        tiles.append(
            Tile("Fidelity of what it removed", *_signed(gradients["removed"]["reward"][i]))
        )
        mass = style.share(gradients["removed"]["mass"][i])
        tiles.append(Tile("Gradient mass removed", mass, "share of Σ|c·A|"))
    moved = last["tokens"]["abs_log_ratio"]
    tiles.append(Tile("Mean |log r|", f"{moved['mean']:.4f}", f"max {moved['max']:.2f}"))
    note = f"cosine of its halves, {found['fresh']} fresh samples a problem"
    half = gradients["target_halves"][0] or 0
    return [*tiles, Tile("Certainty of the target", f"{half:.2f}", note)]


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The numbers of the most stale stage, an algorithm a row."""
    gradients, tokens = (found["stages"][-1][key] for key in ("gradients", "tokens"))
    rows = []
    for i, name in enumerate(gradients["names"]):
        entry, own = gradients["fidelity"]["reward"][i], tokens["algorithms"].get(name, {})
        shares = (own.get("ess"), own.get("silenced"))
        rows.append([
            name,
            f"{gradients['norm']['whole'][i]:.3g}",
            " ".join(_signed(entry)),
            " ".join(_signed(entry["difference"])) if i >= UNGATED else "–",
            style.share(gradients["removed"]["mass"][i]),
            " ".join(_signed(gradients["removed"]["reward"][i])),
            *("–" if share is None else f"{share:.1%}" for share in shares),
        ])  # fmt: skip
    return rows


def write(path: epath.PathLike) -> epath.Path:
    """Write the page of a JSON file of statistics beside it; returns its path."""
    path = epath.Path(path)
    found = _read(path)
    chips = {label: found[key] for label, key in CHIPS.items()}
    chips["tokens"] = found["stages"][0]["tokens"]["tokens"]
    return page.write(
        path.with_suffix(".html"),
        "gradlab",
        name=path.stem,
        chips=chips,
        tiles=_tiles(found),
        warning="",
        starts=[found["provenance"]] if "provenance" in found else [],
        plots=page.plots(plots.PLOTS, found),
        rows=_rows(found),
    )


def picture(path: epath.PathLike, target: epath.PathLike) -> None:
    """Write one PNG of the panels that answer the main question, from a JSON file of statistics."""
    style.picture(target, [plots.PLOTS[name] for name in PICTURED], _read(path), columns=1)
