"""What the records of a run say: curves, histograms, phases of an iteration, the objective."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sapo_jax import objectives

Records = Sequence[Mapping[str, Any]]
Config = Mapping[str, Any]

PHASES = {  # of a run, in their order
    "startup": "ink",
    "rollout": "blue",
    "score": "amber",
    "logp": "soft",
    "update": "orange",
    "eval": "green",
    "checkpoint": "purple",
    "other": "grey",
}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, not null, text or a list."""
    return isinstance(value, int | float) and math.isfinite(value)


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations at which ``key`` is a finite number, and those numbers."""
    points = [(r["iteration"], r[key]) for r in records if is_number(r.get(key))]
    x, y = np.array(points, float).reshape(-1, 2).T
    return x, y


def counts_of(record: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts and edges of a histogram that holds something."""
    value = record.get(key) or {}
    edges, counts = value.get("edges") or [], value.get("counts") or []
    whole = len(edges) == len(counts) + 1 and all(map(is_number, [*edges, *counts]))
    return (np.array(counts, float), np.array(edges, float)) if whole and any(counts) else None


def evaluations(records: Records) -> list[str]:
    """The names of evaluations, and of tasks, with a Pass@1 of their own."""
    keys = dict.fromkeys(key for record in records for key in record)
    found = [re.fullmatch(r"eval/(.+)/pass_at_1", key) for key in keys]
    return [match[1] for match in found if match and len(series(records, match[0])[0])]


def seconds(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase; ``other`` is what is left of what lies in an iteration."""
    spent = {phase: record.get(f"time/{phase}") for phase in PHASES}
    spent = {phase: float(s) if is_number(s) else 0.0 for phase, s in spent.items()}
    if is_number(exposed := record.get("time/score_exposed")):
        spent["score"] = float(exposed)  # the rest of it overlapped with other phases
    loop = record.get("time/iteration")  # without evaluation and checkpoint
    inside = sum(spent[phase] for phase in ("rollout", "score", "logp", "update"))
    return spent | {"other": max(loop - inside, 0.0) if is_number(loop) else 0.0}


def objective_of(config: Config) -> dict[str, Any]:
    """The objective's name and hyperparameters, those of its preset where the config has None."""
    given = config.get("objective") or {}
    given = given if isinstance(given, Mapping) else {"name": given}
    preset = objectives.OBJECTIVES.get(str(given.get("name")))
    whole = {"aggregation": preset.aggregation, **preset.hyperparameters} if preset else {}
    unset = (None, {}, "constant")  # a schedule without an end
    whole |= {key: value for key, value in given.items() if value not in unset}
    return whole if whole.get("kl_coef") else {k: v for k, v in whole.items() if k[:2] != "kl"}
