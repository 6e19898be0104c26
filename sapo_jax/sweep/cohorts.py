"""From a base config and a sweep to cohorts: runs that can share every executable."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sapo_jax.axes import Overrides
from sapo_jax.cli import flat, literal, make_room, nearest
from sapo_jax.parallel import sharding
from sapo_jax.sweep.population import choose
from sapo_jax.training import settings
from sapo_jax.training.checks import require
from sapo_jax.training.settings import Settings

# What reaches the device as a value, or not at all. The objective's numbers are values too; its
# name and aggregation are where several of them become one switch.
TRACED = {
    "seed", "init_from", "lora.alpha", "sampler.temperature", "reward.kl_coef",
    "correction.low", "correction.high", "learner.learning_rate", "learner.weight_decay",
    "learner.max_grad_norm",
}  # fmt: skip
STATIC_OF_OBJECTIVE = {"objective.kl"}


@dataclasses.dataclass(frozen=True)
class Cohort:
    """R runs whose settings differ in traced values only.

    Attributes:
      names: of the runs' directories.
      overrides: what each run changes in the base config.
      runs: their settings.
      method: see `population.choose`.
    """

    names: tuple[str, ...]
    overrides: tuple[Mapping[str, Any], ...]
    runs: tuple[Settings, ...]
    method: str

    @property
    def lead(self) -> Settings:
        """The settings of the first run, for what all of them share."""
        return self.runs[0]


def listed(sweep: Any) -> Overrides:
    """What ``get_sweep()`` returns, as a list.

    Raises:
      ValueError: it holds something else than fields with their values.
    """
    whole = sweep is None or isinstance(sweep, str | Mapping) or not isinstance(sweep, Iterable)
    runs = [sweep] if whole and sweep is not None else list(sweep or ())
    for run in runs:
        fields = isinstance(run, Mapping) and all(isinstance(field, str) for field in run)
        if whole or not fields:
            raise ValueError(
                "get_sweep() must return a list of what each run changes, such as "
                f"[{{'seed': 0}}, {{'seed': 1}}], not {run!r:.100}"
            )
    return runs


def restrict(sweep: Overrides, axes: Sequence[str]) -> Overrides:
    """The runs of a sweep that have one of the values of each "field=value,…".

    Raises:
      ValueError: no run has the field, or a value of it, or all of them together.
    """
    for text in axes:
        field, _, values = text.partition("=")
        known = {key: [run[key] for run in sweep if key in run] for run in sweep for key in run}
        if field not in known:
            fields = f"a field of the sweep, which are {', '.join(known)}" if known else "left out"
            raise ValueError(f"--axis={text}: must be FIELD=VALUE,… of {fields}")
        wanted = [literal(value) for value in values.split(",")]
        for value in wanted:
            if value not in known[field]:
                has = ", ".join(map(str, dict.fromkeys(known[field])))
                raise ValueError(f"--axis={text}: no run has {field}={value}; they have {has}")
        sweep = [run for run in sweep if field in run and run[field] in wanted]
    return sweep


def name_of(override: Mapping[str, Any]) -> str:
    """The directory of a run: ``objective.tau_neg=1.05,seed=3``."""
    text = ",".join(f"{field}={value}" for field, value in override.items())
    name = re.sub(r"[^\w.,=+-]+", "_", text) or "base"
    if len(name) > 200:  # file systems allow 255 bytes
        name = f"{name[:180]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return name


def settings_of(base: ConfigDict, override: Mapping[str, Any]) -> Settings:
    """The settings of one run of a sweep.

    Raises:
      ValueError: naming the run and the field.
    """
    config, name = copy.deepcopy(base), name_of(override)
    try:
        make_room(config, override)
        config.update_from_flattened_dict(override)
    except (KeyError, AttributeError):
        known = flat(base.to_dict())
        wrong = next(field for field in override if field not in known)
        text = f"the run {name}: there is no field {wrong!r}{nearest(wrong, known)}"
        raise ValueError(text) from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"the run {name}: {error}") from None
    try:
        checked = settings.from_config(config)
        _check(checked)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the run {name}: {error}") from None
    return checked


def _check(run: Settings) -> None:
    sampler, method = run.config.sampler, run.config.population.method
    require(sampler.devices == 0, "sampler.devices", sampler.devices, "0 in a sweep")
    if run.mesh is None:
        all_at_once = "0 in a sweep without a config.mesh: its runs sample all prompts at once"
        require(sampler.slots == 0, "sampler.slots", sampler.slots, all_at_once)
    else:
        only = "'auto' with a config.mesh, whose axis `run` says how many runs are computed at once"
        require(method == "auto", "population.method", method, only)


def _is_traced(field: str) -> bool:
    return field in TRACED or (field.startswith("objective.") and field not in STATIC_OF_OBJECTIVE)


def static(run: Settings) -> str:
    """Equal for runs that can share their executables and what is frozen."""
    fields = {k: v for k, v in flat(run.plain).items() if not _is_traced(k)}
    replay = run.hp.static.routing_replay  # an objective may have its own
    base = run.config.init_from if run.model.freezes else ""
    return json.dumps([fields, run.needs_reference, replay, base], sort_keys=True)


def _cohort(listed: Sequence[tuple[str, Mapping[str, Any], Settings]]) -> Cohort:
    names, overrides, runs = zip(*listed, strict=True)
    c = runs[0].config
    if runs[0].mesh is not None:
        method = "mesh"
    elif c.sampler.budget:  # what goes on in the next rollout is of one run
        method = "map"
    else:
        method = choose(c.population.method, len(runs))
    return Cohort(names, overrides, runs, method)


def make(base: ConfigDict, sweep: Overrides, *, most: int = 0) -> list[Cohort]:
    """The cohorts of a sweep, in the order of their first runs.

    Args:
      base: the config that the runs change.
      sweep: what each run changes, see `axes`.
      most: runs of a cohort; larger ones are cut into parts of almost one size. 0: no limit, but
        that of a mesh, which has places for so many.

    Raises:
      ValueError: a run is refused, two runs are the same, or there is none.
    """
    if not sweep:
        raise ValueError("the sweep has no runs: give at least one, see sapo_jax.axes")
    groups: dict[str, list] = {}
    seen: dict[str, str] = {}
    for override in sweep:
        name, run = name_of(override), settings_of(base, override)
        same = json.dumps(run.plain, sort_keys=True)
        if same in seen:
            raise ValueError(f"two runs of the sweep are the same: {seen[same]} and {name}")
        if name in seen.values():
            raise ValueError(f"two runs of the sweep would share the directory {name}")
        seen[same] = name
        groups.setdefault(static(run), []).append((name, override, run))
    cohorts = []
    for members in groups.values():
        mesh = members[0][2].mesh
        places = sharding.runs(mesh) if mesh else most
        largest = min(most or places, places)
        parts = math.ceil(len(members) / largest) if largest else 1
        bounds = [len(members) * i // parts for i in range(parts + 1)]
        cohorts += [_cohort(members[a:b]) for a, b in itertools.pairwise(bounds)]
    return cohorts
