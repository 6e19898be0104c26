"""The objective of a run: its hyperparameters, and what they become over the iterations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sapo_jax import objectives
from sapo_jax.cli import from_config, nearest
from sapo_jax.objectives.kl import KL_PENALTIES
from sapo_jax.training import build
from sapo_jax.training.checks import check_name, choice, of_field, require

OF_OBJECTIVE = ("name", "aggregation", "kl", "schedule", "end")  # beside its hyperparameters


def make_objective(c: Any) -> objectives.Objective:
    """The objective with its hyperparameters."""
    fields = dict(vars(c.objective))
    name, aggregation, kl, *_ = (fields.pop(key) for key in OF_OBJECTIVE)
    if c.source == "demonstrations":
        only = "'reinforce' for source='demonstrations': likelihood is REINFORCE with advantage 1"
        require(name == "reinforce", "objective.name", name, only)
    check_name("objective.name", name, objectives.OBJECTIVES, "my.py:name")
    choice("objective.kl", kl, KL_PENALTIES)
    others = from_config("base").objective  # whose fields may be None, whoever has them
    given = {k: value for k, value in fields.items() if value is not None or k not in others}
    with of_field("objective.name"):
        known = [*objectives.named(name).hyperparameters, *OF_OBJECTIVE]
    with of_field("objective", [*given, *known]):
        for key, value in given.items():
            if key not in known:
                has = f"it has {', '.join(known[: -len(OF_OBJECTIVE)]) or 'none'}"
                near = nearest(key, known)
                raise ValueError(f"{name} has no hyperparameter {key!r}; {has}{near}")
            if isinstance(value, int) and not isinstance(value, bool):
                given[key] = float(value)  # programs are of their types
        objective = objectives.resolve(name, **given)
        if aggregation is not None:
            objective = dataclasses.replace(objective, aggregation=aggregation)
    has_reference = not objective.needs_reference or c.init_from != ""
    require(has_reference, "objective.kl_coef", given.get("kl_coef"), build.NO_REFERENCE)
    return objective


def make_schedule(c: Any, objective: objectives.Objective) -> objectives.Schedule:
    """How its hyperparameters change over the run."""
    shape, end = c.objective.schedule, dict(c.objective.end)
    choice("objective.schedule", shape, objectives.SHAPES)
    moves = shape != "constant"
    only = "'constant' without config.objective.end, the values in the last iteration"
    require(bool(end) or not moves, "objective.schedule", shape, only)
    require(moves or not end, "objective.end", end, "empty with objective.schedule='constant'")
    for key, value in end.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number, f"objective.end.{key}", value, "a number")
        start = objective.hyperparameters.get(key, 0.0)
        finite = f"left out where it starts from {start}, of which there is no part"
        require(math.isfinite(start), f"objective.end.{key}", value, finite)
    with of_field("objective.end", end):
        at_end = objectives.resolve(objective, **{key: float(x) for key, x in end.items()})
    has_reference = not at_end.needs_reference or c.init_from != ""
    require(has_reference, "objective.end.kl_coef", end.get("kl_coef"), build.NO_REFERENCE)
    return objectives.Schedule(at_end, float(objectives.SHAPES.index(shape)), float(c.iterations))
