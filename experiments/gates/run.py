"""The paper's Figure 1 and the coefficient c = r·w of every preset, exactly; nothing is trained.

python -m experiments.gates.run
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import FigureBase

from experiments.evidence.store import rounded
from experiments.evidence.study import Claim, Exact, Page, Study, markdown
from sapo_jax import cli, objectives
from sapo_jax.objectives import OBJECTIVES, Objective
from sapo_jax.report import style
from sapo_jax.report.style import COLOURS, Panel

FIGURE_1 = {
    "unclipped": ("grpo", {"eps_low": float("inf"), "eps_high": float("inf")}),
    "hard clip, ε = 1": ("grpo", {"eps_low": 1.0, "eps_high": 1.0}),
    "τ = 1": ("sapo", {"tau_pos": 1.0}),
    "τ = 2": ("sapo", {"tau_pos": 2.0}),
    "τ = 3": ("sapo", {"tau_pos": 3.0}),
}
SHOWN = {"SAPO": "sapo", "GRPO-R2": "grpo_r2", "CISPO": "cispo", "GMPO": "gmpo", "P3O": "p3o",
         "REINFORCE": "reinforce"}  # fmt: skip
RATIOS = np.round(np.linspace(0, 5, 501), 3)
TABLE = (0.5, 0.8, 1.0, 1.2, 2.0, 5.0)
LEAST = 1e-8  # in place of r = 0, whose log there is none
FINE = np.linspace(0.001, 40, 40_000)
CLAIMS = (
    Claim("attenuates", "A token counts less, the further its ratio is from 1",
          "Fig. 1; of the gradient's coefficient c = r·w"),
    Claim("weight", "The weight w = f′(r) is 1 at r = 1 and falls on both sides, faster for a "
          "larger τ", "Fig. 1, Eq. 8"),
    Claim("both signs", "What was not the update's own way (A > 0 and r < 1, A < 0 and r > 1), "
          "SAPO damps as well, which PPO's clip never does", "Section 3"),
)  # fmt: skip
SIDES = ("positive", "negative")
COLOUR = ("grey", "ink", "blue", "orange", "green", "purple", "amber")


def coefficients(objective: Objective, ratios: np.ndarray) -> np.ndarray:
    """c of one-token sequences with A = 1 and A = −1, f64[2, N], by differentiating the loss."""
    with jax.enable_x64(True):
        old = jnp.full((2 * len(ratios), 1), np.log(0.5))
        mask, a = jnp.ones(old.shape, bool), jnp.repeat(jnp.array([1.0, -1.0]), len(ratios))

        def total(logp):
            loss, _ = objectives.policy_loss(objective, logp, old, a, mask)
            return -loss * len(a)

        log_ratio = jnp.log(jnp.maximum(jnp.asarray(ratios, jnp.float64), LEAST))
        c = jax.grad(total)(old + jnp.tile(log_ratio, 2)[:, None])[:, 0] * a + 0.0  # no −0
        return np.asarray(c).reshape(2, -1)


def surrogate(objective: Objective, ratios: np.ndarray) -> np.ndarray:
    """f of tokens with A = 1, f64[N]."""
    with jax.enable_x64(True):
        log_ratio = jnp.log(jnp.maximum(jnp.asarray(ratios, jnp.float64), LEAST))[:, None]
        ones, mask = jnp.ones(len(ratios)), jnp.ones(log_ratio.shape, bool)
        inputs, _ = objectives.token_inputs(
            objective, log_ratio, jnp.zeros_like(log_ratio), ones, mask
        )
        return np.asarray(objective.gate(inputs, objective.hyperparameters))[:, 0]


def named(name: str, **hyperparameters: float) -> Objective:
    """A preset whose number that has none is 1."""
    if "max_length" in OBJECTIVES[name].hyperparameters:
        hyperparameters["max_length"] = 1.0
    found = objectives.resolve(name, **hyperparameters)
    return dataclasses.replace(found, hyperparameters=found.hyperparameters | {"kl_coef": 0.0})


def peak(c: np.ndarray) -> dict[str, float | None]:
    """The largest c over FINE, where it is, and between which ratios c is above 1."""
    above = FINE[c > 1 + 1e-9]
    bounded = c.argmax() < len(c) - 1
    return {
        "max": float(c.max()) if bounded else None,
        "at": float(FINE[c.argmax()]) if bounded else None,
        "above_1": [float(above[0]), float(above[-1])] if len(above) else None,
    }


def compute(given: cli.Flags) -> Iterator[tuple[str, Any]]:
    """Curves of Figure 1; c of all presets on a grid, and its peaks."""
    figure = {}
    for label, (name, own) in FIGURE_1.items():
        f, (c, _) = (g(named(name, **own), RATIOS) for g in (surrogate, coefficients))
        figure[label] = {"f": f.tolist(), "w": (c / np.maximum(RATIOS, LEAST)).tolist()}
    presets = {}
    for name in OBJECTIVES:
        each = zip(*(coefficients(named(name), r) for r in (FINE, np.array(TABLE), RATIOS)),
                   strict=True)  # fmt: skip
        presets[name] = {
            side: peak(fine) | {"at_table": table.tolist(), "c": drawn.tolist()}
            for side, (fine, table, drawn) in zip(SIDES, each, strict=True)
        }
    yield "gates", rounded({"ratios": RATIOS.tolist(), "figure_1": figure, "presets": presets})


def _draw(figure: FigureBase, page: Page, *, found: Mapping, keys: tuple[str, str]) -> None:
    axes = style.row(figure, 2)
    for ax, key in zip(axes, keys, strict=True):
        for (label, entry), colour in zip(found["figure_1"].items(), COLOUR, strict=False):
            line = "--" if "clip" in label else "-"
            ax.plot(found["ratios"], entry[key], line, color=COLOURS[colour], label=label)
        ax.set(xlabel="r", ylabel={"f": "f(r)", "w": "weight w = f′(r)"}[key])
    axes[0].legend(fontsize=7.5)


def _draw_coefficients(figure: FigureBase, page: Page, *, found: Mapping) -> None:
    axes = style.row(figure, 2)
    for ax, side in zip(axes, SIDES, strict=True):
        for (label, name), colour in zip(SHOWN.items(), COLOUR[2:] + COLOUR[:2], strict=False):
            c = found["presets"][name][side]["c"]
            ax.plot(found["ratios"], c, color=COLOURS[colour], label=label)
        style.level(ax, 1)
        ax.set(xlabel="r", ylim=(-0.1, 3), title=f"A {'>' if side == 'positive' else '<'} 0")
    axes[0].set_ylabel("c = r·w")
    axes[0].legend(fontsize=7.5)


def _number(x: float | None) -> str:
    return "no bound" if x is None else f"{x:.3f}"


def _row(name: str, entry: Mapping) -> list[str]:
    row = [f"`{name}`"]
    for side in SIDES:
        own = entry[side]
        at = "" if own["at"] is None or own["above_1"] is None else f" at {own['at']:.2f}"
        row.append(_number(own["max"]) + at)
    pairs = zip(*(entry[side]["at_table"] for side in SIDES), strict=True)
    return [*row, *(f"{positive:.3g}, {negative:.3g}" for positive, negative in pairs)]


def effects(found: Mapping) -> dict[str, Exact]:
    """What holds of the claims, from the curves."""
    w = {label: np.array(entry["w"]) for label, entry in found["figure_1"].items()}
    smooth = [w[f"τ = {k}"] for k in (1, 2, 3)]
    one, two = map(RATIOS.tolist().index, (1, 2))
    away = np.flatnonzero(RATIOS != 1)
    falls = all(x[one] == 1 and x.argmax() == one for x in smooth)
    faster = all(np.all(a[away] > b[away]) for a, b in itertools.pairwise(smooth))
    sapo = found["presets"]["sapo"]
    (_, high), (_, high_neg) = (sapo[side]["above_1"] for side in SIDES)
    peaks = " and ".join(f"{sapo[s]['max']:.3f} at r = {sapo[s]['at']:.2f}"
                         for s in SIDES)  # fmt: skip
    text = (f"c is above 1 for r in (1, {high:.2f}) where A > 0 and in (1, {high_neg:.2f}) where "
            f"A < 0, with maxima of {peaks}")  # fmt: skip
    at = TABLE.index(0.5), TABLE.index(2.0)
    own = sapo["positive"]["at_table"][at[0]] / 0.5, sapo["negative"]["at_table"][at[1]] / 2
    grpo = found["presets"]["grpo_r2"]
    hard = grpo["positive"]["at_table"][at[0]] / 0.5, grpo["negative"]["at_table"][at[1]] / 2
    damped = f"w(0.5) = {own[0]:.3f} where A > 0, w(2) = {own[1]:.3f} where A < 0; PPO's are "
    damped += f"{hard[0]:.0f} and {hard[1]:.0f}"
    return {
        "weight": Exact(falls and faster, f"w(2) = {', '.join(f'{x[two]:.3f}' for x in smooth)} "
                        "for τ = 1, 2, 3"),
        "attenuates": Exact(sapo["positive"]["above_1"] is None, text),
        "both signs": Exact(max(own) < 1 == min(hard), damped),
    }  # fmt: skip


def report(stored: Mapping[str, Any]) -> Page:
    """The table of all presets, and Figure 1."""
    found = stored["gates"]
    columns = ["preset", "largest c, A > 0", "largest c, A < 0", *(f"r = {r:g}" for r in TABLE)]
    rows = [_row(name, entry) for name, entry in found["presets"].items()]
    draw = functools.partial
    panels = [
        Panel("Figure 1 again: hard and soft gates, A > 0",
              draw(_draw, found=found, keys=("f", "w")), wide=True),
        Panel("What the optimizer sees: c, the factor of A·∇log π",
              draw(_draw_coefficients, found=found), wide=True),
    ]  # fmt: skip
    title = "c = r·w of a one-token sequence: A > 0, A < 0 (π_old = ½; r up to 40 looked at)"
    return Page({title: markdown(columns, rows)}, panels, effects(found), columns=1)


def protocol() -> dict[str, str]:
    """Exact: nothing is estimated."""
    return {
        "Figure 1": "r in [0, 5]; unclipped, hard clip with ε = 1.0, τ of 1, 2, 3; A > 0",
        "Coefficients": f"c of all {len(OBJECTIVES)} presets by differentiating their surrogates "
        "in f64, both signs, r up to 40",
        "Verdicts": "a claim holds on the whole grid, or does not",
    }


STUDY = Study("gates", CLAIMS, protocol, compute, report)

if __name__ == "__main__":
    STUDY.run(__doc__)
