"""From a config to what a run is made of; every wrong field is refused here, before any compile."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sapo_jax import advantages, cli, learner, model, sampler, tasks
from sapo_jax.data.stream import Fits
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.parallel import sharding
from sapo_jax.rewards import PARTS, Recipe
from sapo_jax.tasks.base import Example, Task
from sapo_jax.training import build, collapse, evals, objective, policy, tracker
from sapo_jax.training.checks import (
    LARGEST,
    check_fields,
    check_sizes,
    choice,
    of_field,
    require,
)
from sapo_jax.training.workdir import read_config

SOURCES = ("rollout", "demonstrations")
POPULATION_METHODS = ("auto", "map", "vmap", "devices")
MAY_DIFFER = {
    "iterations", "profile_steps", "compilation_cache", "checkpoint.every", "checkpoint.minutes",
    "log.samples", "log.samples_every", "log.trackers", "data.workers", "reward.workers",
    "distributed.timeout", "learner.max_skipped",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert",  # but for the last bits
    "sampler.mesh.data", "sampler.mesh.tensor", "sampler.mesh.expert", "sampler.devices",
}  # fmt: skip
GONE = {"sampler.shrink"}  # fields that runs of before have
ONE_DEVICE = {f"mesh.{axis}": 1 for axis in sharding.AXES} | {
    f"sampler.{field}": 0 for field in ("devices", "mesh.data", "mesh.tensor", "mesh.expert")
}
OPEN = {"task", "tasks", "evals", "mesh", "template_options", "end"}  # read by the names in them


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked config, with the objects that its fields describe.

    Attributes:
      plain: the config as a dictionary, as the run directory stores it; with ``files``, the paths
        and fingerprints of files that it names code of.
      config: the same as frozen dataclasses: ``config.batch.prompts``.
      tasks: what the prompts are of, by name.
      judges: these, and then the tasks of evaluations.
      shares: of each task in a batch.
      keep: whether an example has room; None where all have.
      images: what the images of a prompt have room in; None where no task has any.
      width: tokens of room for a prompt, N.
      max_new_tokens: T; rows have N + T tokens.
      bounds: of the sampler correction, where there is one.
      packing: of the rows of an update; None where they are not packed.
      plan: the sampler's shapes in training.
      evals: the evaluations by name; "" is the name of config.eval, where it is the only one.
      mesh: the learner's; None on one device. Of several runs side by side, that of all.
      sampler_mesh: the same, the same devices in another shape, or devices of the sampler's own.
    """

    plain: dict[str, Any]
    config: Any
    tasks: Mapping[str, Task]
    judges: Mapping[str, Task]
    shares: Mapping[str, float]
    recipe: Recipe
    tokenizer: Tokenizer
    keep: Fits | None
    images: model.vision.Room | None
    model: model.ModelConfig
    hp: learner.Hyperparameters
    width: int
    max_new_tokens: int
    bounds: Mapping[str, float]
    packing: learner.PackedShape | None
    plan: sampler.Plan
    evals: evals.Evals
    mesh: Mesh | None
    sampler_mesh: Mesh | None

    @property
    def task(self) -> Task:
        """The judge of every example: the only task, or all of them as one."""
        only, *more = self.judges.values()
        return tasks.Mixture(self.judges) if more else only

    def sources(self, split: str) -> dict[str, Sequence[Example]]:
        """The examples of each task."""
        return {name: task.examples(split) for name, task in self.tasks.items()}

    def sampling(self, evaluation: str | None = None) -> dict[str, Any]:
        """The config's arguments of `sampler.rollout`, in training or for an evaluation."""
        c, common = self.config, {"max_new_tokens": self.max_new_tokens, "seed": self.config.seed}
        if evaluation is not None:
            return common | self.evals[evaluation].sampling
        sizes = {"group_size": c.batch.group_size, "plan": self.plan}
        return common | sizes | {"domain": "train", "temperature": c.sampler.temperature}

    @property
    def supervised(self) -> bool:
        """Whether batches come from demonstrations instead of rollouts."""
        return self.config.source == "demonstrations"

    @property
    def needs_reference(self) -> bool:
        """Whether a KL penalty compares the policy with the one that the run started from."""
        both = self.hp.objective, self.hp.objective_schedule.end
        return any(o.needs_reference for o in both) or self.config.reward.kl_coef != 0

    def scheduled(self, iteration: int) -> dict[str, float]:
        """The hyperparameters that change over the run, as they are in an iteration (from 1)."""
        now = self.hp.objective_schedule.at(self.hp.objective, iteration - 1, np)
        return {f"objective/{k}": float(now.hyperparameters[k]) for k in self.config.objective.end}

    @property
    def may_differ(self) -> frozenset[str]:
        """Fields that may change when a run is started again: no result depends on them."""
        schedules = self.config.learner.schedule, self.config.objective.schedule
        fixed_length = schedules != ("constant", "constant") or self.config.staleness > 0
        return frozenset(GONE | MAY_DIFFER - ({"iterations"} if fixed_length else set()))

    @property
    def rows(self) -> int:
        """Rows that an iteration learns from, B."""
        return self.config.batch.prompts * self.config.batch.group_size

    @property
    def drawn(self) -> int:
        """Prompts that an iteration samples for: more than it learns from where some are spare."""
        return self.config.batch.prompts * self.config.batch.oversample

    @property
    def sampled(self) -> int:
        """Rows that an iteration samples: more than B where prompts are drawn to spare."""
        return self.drawn * self.config.batch.group_size


def frozen(values: Mapping[str, Any], name: str = "Config") -> Any:
    """A config's dictionary as a tree of frozen dataclasses; what is OPEN stays a dictionary."""
    fields = {
        key: frozen(value, key) if isinstance(value, dict) and key not in OPEN else value
        for key, value in values.items()
    }
    return dataclasses.make_dataclass(name, fields, frozen=True)(**fields)


def _bounded(c: Any, bound: float, *fields: str) -> None:
    for field in fields:
        value = operator.attrgetter(field)(c)
        require(value >= bound and math.isfinite(value), field, value, f"at least {bound}")


def _check_numbers(c: Any) -> None:
    _bounded(
        c, 1, "iterations", "batch.prompts", "batch.group_size", "batch.minibatches",
        "batch.micro_batches", "batch.oversample", "checkpoint.every", "learner.max_skipped",
        "log.samples_every", "reward.workers", "collapse.window",
    )  # fmt: skip
    _bounded(
        c, 0, "seed", "staleness", "sampler.budget", "sampler.max_new_tokens", "sampler.slots",
        "sampler.devices", "eval.every", "learner.warmup", "learner.weight_decay", "log.samples",
        "profile_steps", "learner.head_chunk", "learner.learning_rate", "data.max_prompt_tokens",
        "data.max_image_tokens", "data.workers", "distributed.timeout", "reward.kl_coef",
        "reward.max_length", "reward.buffer", "checkpoint.minutes", "learner.router_aux_coef",
    )  # fmt: skip
    for field in ("sampler.temperature", "learner.max_grad_norm", "learner.eps"):
        value = operator.attrgetter(field)(c)
        require(value > 0, field, value, "greater than 0")
    for field in ("collapse.reward", "collapse.entropy", "collapse.least"):
        value = operator.attrgetter(field)(c)
        require(0 <= value <= 1, field, value, "in [0, 1]")
    for field in ("learner.b1", "learner.b2"):
        value = operator.attrgetter(field)(c)
        require(0 <= np.float32(value) < 1, field, value, "in [0, 1), in float32 too")
    updates = f"at most {LARGEST // c.batch.minibatches} with batch.minibatches="
    updates += f"{c.batch.minibatches}: updates are counted in 32 bits"
    require(c.iterations * c.batch.minibatches <= LARGEST, "iterations", c.iterations, updates)


def _check_batch(c: Any) -> None:
    batch, slots = c.batch, c.sampler.slots
    whole = f"a multiple of batch.minibatches={batch.minibatches}: a group stays in one minibatch"
    require(batch.prompts % batch.minibatches == 0, "batch.prompts", batch.prompts, whole)
    rows = batch.prompts * batch.group_size // batch.minibatches
    divisor = f"a divisor of {rows}, the rows of a minibatch"
    divides = rows % batch.micro_batches == 0
    require(divides, "batch.micro_batches", batch.micro_batches, divisor)
    alone = c.advantages != "reinforce_pp" or batch.oversample == 1
    only = "1 with advantages='reinforce_pp', which compare all rows"
    require(alone, "batch.oversample", batch.oversample, only)
    most = f"at most batch.prompts={batch.prompts}"
    require(slots <= batch.prompts, "sampler.slots", slots, most)


def _check_learning(c: Any) -> None:
    """Refuse what would train and learn nothing, or rounding errors."""
    masters = "'float32': steps are lost in bfloat16's rounding; dtype.compute may be 'bfloat16'"
    learnt = c.lora.rank is None  # the parameters of dtype.params; adapters are in float32
    require(not learnt or c.dtype.params == "float32", "dtype.params", c.dtype.params, masters)
    if c.source != "rollout":
        return
    reward, size, own = c.reward, c.batch.group_size, c.advantages
    if own == "reinforce_pp":
        rows = c.batch.prompts * size
        require(rows >= 2, "batch.prompts", c.batch.prompts, f"at least 2 with {size} row each")
    else:
        compared = f"at least 2 for advantages={own!r}, which compare the rows of a group"
        require(size >= 2, "batch.group_size", size, compared)
    signals = [getattr(reward, part) for part in PARTS]
    signals += [reward.kl_coef, c.objective.kl_coef]
    require(any(signals), "reward.accuracy", reward.accuracy, "above 0: no other part has a weight")
    rounded = reward.kl_coef and "bfloat16" in (c.dtype.compute, c.dtype.cache)
    only = "'recompute' with reward.kl_coef in bfloat16: the sampler's rounding is no KL"
    recompute = c.learner.old_logp == "recompute"
    require(recompute or not rounded, "learner.old_logp", c.learner.old_logp, only)


def of_run(workdir: epath.PathLike, changes: Mapping[str, Any] = ONE_DEVICE) -> Settings:
    """The settings that a run was started with, but for ``changes`` of dotted fields.

    Raises:
      ValueError: there is no run, or its config is none.
    """
    stored = read_config(workdir)
    if stored is None:
        raise ValueError(f"{workdir} has no config.json: name the --workdir of a run")
    stored.pop("files", None)  # whose fingerprints are taken anew
    config = cli.from_config("base")  # with the fields that the run is older than
    for section, field in (name.split(".") for name in GONE):
        if isinstance(stored.get(section), dict):
            stored[section].pop(field, None)
    try:
        check_fields(_merged(config.to_dict(), stored))
    except ValueError as error:
        raise ValueError(f"{workdir}/config.json: {error}") from None
    with config.unlocked():
        config.update(ConfigDict(stored))
        config.update_from_flattened_dict(changes)
    return from_config(config, learns=False)


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of both; where both have one, that of ``given``."""
    inner = {k for k in base if isinstance(base[k], dict) and isinstance(given.get(k), dict)}
    return {**base, **given, **{key: _merged(base[key], given[key]) for key in inner}}


def _check_tokens(c: Any, width: int, room: int, each: evals.Evals) -> None:
    """Refuse rows whose tokens 32 bits do not count, of an iteration or of an evaluation."""
    sizes = {f"batch.{n}": getattr(c.batch, n) for n in ("prompts", "oversample", "group_size")}
    largest, rows = max(sizes, key=sizes.get), math.prod(sizes.values())
    of_evals = [(f"{one.field}.samples", one.samples, one.batch) for one in each.values()]
    for field, count, others in ((largest, sizes[largest], rows // sizes[largest]), *of_evals):
        most = LARGEST // (others * (width + room))
        tokens = f"at most {most}, for {others} times as many rows of {width + room} tokens"
        require(count <= most, field, count, tokens)
    minibatch = max(2**16, rows // c.batch.minibatches * (width + room))
    chunk, all_of_them = c.learner.head_chunk, f"at most {minibatch}, as many as there can be"
    require(chunk <= minibatch, "learner.head_chunk", chunk, all_of_them)


def from_config(
    config: ConfigDict, *, devices: Sequence[Any] | None = None, learns: bool = True
) -> Settings:
    """Check a config and build what it describes; compiles nothing.

    Args:
      config: the experiment.
      devices: those of the mesh, such as a topology description's; by default all of this run.
      learns: refuse, too, what would learn nothing; not of runs that are only looked at.

    Raises:
      ValueError: naming the field, its value and what is allowed.
    """
    check_sizes(config)
    plain = json.loads(config.to_json_best_effort())
    plain.pop("files", None)  # of a stored config
    check_fields(plain)
    c = frozen(plain)
    choice("source", c.source, SOURCES)
    sampled = "0 with source='demonstrations', which no policy samples"
    require(c.source == "rollout" or c.staleness == 0, "staleness", c.staleness, sampled)
    choice("advantages", c.advantages, tuple(advantages.ESTIMATORS))
    choice("population.method", c.population.method, POPULATION_METHODS)
    some = f"some of {', '.join(tracker.TRACKERS)}, or none"
    known = set(tracker.listed(c.log.trackers)) <= set(tracker.TRACKERS)
    require(known, "log.trackers", c.log.trackers, some)
    choice("collapse.rule", c.collapse.rule, collapse.RULES)
    _check_numbers(c)
    _check_batch(c)
    if learns:
        _check_learning(c)
        with of_field("model", named=True):
            platform = devices[0].platform if devices else jax.default_backend()
            model.attention.check(c.model.attention, platform)
    made, shares = build.make_tasks(c)
    sets = evals.make(c, made, shares)
    judges = evals.judges(made, sets)
    tokenizer = build.make_tokenizer(c, judges)
    chosen = objective.make_objective(c)
    shape = policy.add_adapters(c, policy.make_model(c, tokenizer))
    images = policy.make_room(c, judges, shape)
    width, room, keep = build.lengths(c, judges, tokenizer, shape, images)
    mesh = build.make_mesh(c, shape, devices)
    sampler_mesh = build.make_sampler_mesh(c, shape, mesh, devices)
    with of_field("reward.function"):
        cli.own.fingerprints([c.reward.function])  # the others were read
    names = [task["name"] for task in build.entries(c).values()] + list(evals.task_names(c))
    files = cli.own.fingerprints([c.objective.name, *names, c.reward.function])
    parts = sharding.parts(sampler_mesh)
    options = {"slots": c.sampler.slots, "parts": parts}
    packing = build.make_packing(c, shape, width, room, mesh)
    hp = build.make_hyperparameters(c, shape, chosen, mesh, packing)
    sets = evals.shaped(sets, c.batch.prompts, room, keep=keep, width=width, **options)
    _check_tokens(c, width, room, sets)
    return Settings(
        plain=plain | ({"files": files} if files else {}),
        config=c,
        tasks=made,
        judges=judges,
        shares=shares,
        recipe=build.make_recipe(c, room),
        tokenizer=tokenizer,
        keep=keep,
        images=images,
        model=shape,
        hp=hp.replace(objective_schedule=objective.make_schedule(c, chosen)),
        width=width,
        max_new_tokens=room,
        bounds=build.make_bounds(c),
        packing=packing,
        plan=build.make_plan(c, room, options, mesh),
        evals=sets,
        mesh=mesh,
        sampler_mesh=sampler_mesh,
    )
