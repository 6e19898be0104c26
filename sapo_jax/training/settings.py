"""From a config to what a run is made of; every wrong field is refused here, before any compile."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sapo_jax import advantages, corrections, learner, model, objectives, sampler, tasks
from sapo_jax.data import stream
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.model import params, routing
from sapo_jax.objectives.kl import KL_ESTIMATORS
from sapo_jax.parallel import sharding
from sapo_jax.rewards import Recipe
from sapo_jax.tasks.base import Example, Task
from sapo_jax.training import build
from sapo_jax.training.checks import choice as _choice
from sapo_jax.training.checks import require as _require

SOURCES = ("rollout", "demonstrations")
OLD_LOGP = ("sampler", "recompute")
POPULATION_METHODS = ("auto", "map", "vmap", "devices")
MAY_DIFFER = {
    "iterations", "profile_steps", "compilation_cache", "checkpoint.every",
    "log.samples", "log.samples_every", "data.workers", "reward.workers", "distributed.timeout",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert",  # but for the last bits
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked config, with the objects that its fields describe.

    Attributes:
      config: the plain dictionary, as written to the run directory.
      tasks: what is asked, by name.
      shares: of each task in a batch.
      keep: whether an example has room; None where all have.
      width: tokens of room for a prompt, N.
      max_new_tokens: T; rows have N + T tokens.
      bounds: of the sampler correction, where there is one.
      plan, eval_plan: the sampler's shapes, for training and for evaluation.
      eval_batch: prompts that an evaluation samples at a time.
      mesh: None on one device.
    """

    config: dict[str, Any]
    tasks: Mapping[str, Task]
    shares: Mapping[str, float]
    recipe: Recipe
    tokenizer: Tokenizer
    keep: stream.Fits | None
    model: model.ModelConfig
    hp: learner.Hyperparameters
    width: int
    max_new_tokens: int
    bounds: Mapping[str, float]
    plan: sampler.Plan
    eval_plan: sampler.Plan
    eval_batch: int
    mesh: Mesh | None

    @property
    def task(self) -> Task:
        """The judge of every example: the only task, or all of them as one."""
        only, *more = self.tasks.values()
        return tasks.Mixture(self.tasks) if more else only

    def sources(self, split: str) -> dict[str, Sequence[Example]]:
        """The examples of each task."""
        return {name: task.examples(split) for name, task in self.tasks.items()}

    @property
    def supervised(self) -> bool:
        """Whether batches come from demonstrations instead of rollouts."""
        return self.config["source"] == "demonstrations"

    @property
    def needs_reference(self) -> bool:
        """Whether a KL penalty compares the policy with the one that the run started from."""
        in_reward = self.config["reward"]["kl_coef"] != 0
        return self.hp.objective.needs_reference or in_reward

    @property
    def may_differ(self) -> frozenset[str]:
        """Fields that may change when a run is started again: no result depends on them."""
        fixed_length = self.config["learner"]["schedule"] != "constant"
        return frozenset(MAY_DIFFER - ({"iterations"} if fixed_length else set()))

    @property
    def rows(self) -> int:
        """Rows that an iteration learns from, B."""
        return self.config["batch"]["prompts"] * self.config["batch"]["group_size"]

    @property
    def sampled(self) -> int:
        """Rows that an iteration samples: more than B where prompts are drawn to spare."""
        return self.rows * self.config["batch"]["oversample"]


def _at_least(config: dict, bound: float, *fields: str) -> None:
    for field in fields:
        value: Any = config
        for part in field.split("."):
            value = value[part]
        _require(value >= bound and math.isfinite(value), field, value, f"at least {bound}")


def _positive(config: dict, *fields: str) -> None:
    for field in fields:
        section, name = field.split(".")
        value = config[section][name]
        _require(value > 0, field, value, "greater than 0")


def _check_numbers(c: dict) -> None:
    _at_least(
        c, 1, "iterations", "batch.prompts", "batch.group_size", "batch.minibatches",
        "batch.micro_batches", "batch.oversample", "eval.prompts", "eval.samples",
        "checkpoint.every", "learner.head_chunk", "log.samples_every", "reward.workers",
    )  # fmt: skip
    _at_least(
        c, 0, "seed", "sampler.max_new_tokens", "sampler.slots", "sampler.shrink", "eval.every",
        "eval.temperature", "learner.warmup", "learner.weight_decay", "log.samples",
        "profile_steps", "learner.learning_rate", "data.max_prompt_tokens", "data.workers",
        "distributed.timeout", "reward.kl_coef",
    )  # fmt: skip
    _positive(c, "sampler.temperature", "learner.max_grad_norm", "learner.eps")
    for name in ("b1", "b2"):
        value = c["learner"][name]
        _require(0 <= value < 1, f"learner.{name}", value, "in [0, 1)")
    _require(c["seed"] < 2**32, "seed", c["seed"], "below 2**32")
    top_k, top_p = c["eval"]["top_k"], c["eval"]["top_p"]
    _require(top_k is None or top_k >= 1, "eval.top_k", top_k, "at least 1, or None")
    _require(top_p is None or 0 < top_p <= 1, "eval.top_p", top_p, "in (0, 1], or None")


def _check_batch(c: dict) -> None:
    batch = c["batch"]
    parts, micro = batch["minibatches"], batch["micro_batches"]
    _require(
        batch["prompts"] % parts == 0,
        "batch.prompts",
        batch["prompts"],
        f"a multiple of batch.minibatches={parts}: a group stays in one minibatch",
    )
    rows = batch["prompts"] * batch["group_size"] // parts
    divisor = f"a divisor of {rows}, the rows of a minibatch"
    _require(rows % micro == 0, "batch.micro_batches", micro, divisor)
    if c["source"] == "rollout" and c["advantages"] in ("group", "leave_one_out"):
        _require(
            batch["group_size"] >= 2,
            "batch.group_size",
            batch["group_size"],
            f"at least 2 for advantages={c['advantages']!r}, which compare the rows of a group",
        )
    whole = c["advantages"] != "reinforce_pp" or batch["oversample"] == 1
    only = "1 with advantages='reinforce_pp', which compare all rows"
    _require(whole, "batch.oversample", batch["oversample"], only)
    slots = c["sampler"]["slots"]
    most = f"at most batch.prompts={batch['prompts']}"
    _require(slots <= batch["prompts"], "sampler.slots", slots, most)


def _objective(c: dict) -> objectives.Objective:
    fields = dict(c["objective"])
    name, aggregation, kl = (fields.pop(key) for key in ("name", "aggregation", "kl"))
    if c["source"] == "demonstrations":
        only = "'reinforce' for source='demonstrations': likelihood is REINFORCE with advantage 1"
        _require(name == "reinforce", "objective.name", name, only)
    _choice("objective.kl", kl, KL_ESTIMATORS)
    try:
        given = {key: value for key, value in fields.items() if value is not None}
        objective = objectives.resolve(name, **given)
        if aggregation is not None:
            objective = dataclasses.replace(objective, aggregation=aggregation)
    except ValueError as error:
        raise ValueError(f"config.objective: {error}") from None
    has_reference = not objective.needs_reference or c["init_from"] != ""
    only = "0 without config.init_from, whose policy is the reference"
    _require(has_reference, "objective.kl_coef", given.get("kl_coef"), only)
    return objective


def _mesh(c: dict, shape: model.ModelConfig, devices: Sequence[Any] | None) -> Mesh | None:
    alone = devices is None and jax.process_count() == 1
    if alone and all(size == 1 for size in c["mesh"].values()):
        return None
    batch = c["batch"]
    micro = batch["minibatches"] * batch["micro_batches"]
    rows = {"a micro-batch": batch["prompts"] * batch["group_size"] // micro}
    if c["source"] == "rollout":
        rows |= {
            "batch.prompts": batch["prompts"] * batch["oversample"],
            "sampler.slots": c["sampler"]["slots"],
        }
    split = [sharding.Dimension(name, "rows", size) for name, size in rows.items()]
    try:
        mesh = sharding.make_mesh(**c["mesh"], devices=devices)
        sharding.check(mesh, split + params.dimensions(shape))
    except ValueError as error:
        raise ValueError(f"config.mesh: {error}") from None
    return mesh


def _hyperparameters(
    c: dict, shape: model.ModelConfig, objective: objectives.Objective, mesh: Mesh | None
) -> learner.Hyperparameters:
    options = c["learner"]
    _choice("learner.schedule", options["schedule"], learner.SCHEDULES)
    _choice("learner.old_logp", options["old_logp"], OLD_LOGP)
    replay, aux = options["routing_replay"], options["router_aux_coef"]
    _choice("learner.routing_replay", replay, routing.REPLAY)
    sparse = "'none' for a model without experts"
    _require(replay == "none" or shape.num_experts > 0, "learner.routing_replay", replay, sparse)
    recompute = replay != "R2" or options["old_logp"] == "recompute"
    only = "'recompute' with learner.routing_replay='R2', which records the old policy's routing"
    _require(recompute, "learner.old_logp", options["old_logp"], only)
    updates = c["batch"]["minibatches"]
    return learner.Hyperparameters(
        objective=objective,
        learning_rate=options["learning_rate"],
        weight_decay=options["weight_decay"],
        max_grad_norm=options["max_grad_norm"],
        temperature=c["sampler"]["temperature"],
        model=shape,
        micro_batches=c["batch"]["micro_batches"],
        head_chunk=options["head_chunk"],
        remat=options["remat"],
        kl=c["objective"]["kl"],
        schedule=options["schedule"],
        warmup=options["warmup"],
        total=0 if options["schedule"] == "constant" else c["iterations"] * updates,
        b1=options["b1"],
        b2=options["b2"],
        eps=options["eps"],
        routing_replay=replay,
        router_aux_coef=aux or None,
        mesh=mesh,
    )


def _bounds(c: dict) -> dict[str, float]:
    """Bounds of the sampler correction; π_old has to come from the learner."""
    fields = dict(c["correction"])
    name, source = fields.pop("name"), c["learner"]["old_logp"]
    if name == "none":
        given = {key: value for key, value in fields.items() if value is not None}
        _require(not given, "correction", given, "empty with correction.name='none'")
        return {}
    _choice("correction.name", name, ("none", *corrections.CORRECTIONS))
    only = f"'recompute' with correction.name={name!r}: the sampler's own ratio to itself is 1"
    _require(source == "recompute" and c["source"] == "rollout", "learner.old_logp", source, only)
    try:
        return corrections.resolve(name, **fields)
    except ValueError as error:
        raise ValueError(f"config.correction: {error}") from None


def _recipe(c: dict, room: int) -> Recipe:
    fields = dict(c["reward"])
    kl_coef, kl, _ = (fields.pop(name) for name in ("kl_coef", "kl", "workers"))
    _choice("reward.kl", kl, KL_ESTIMATORS)
    only = "0 without config.init_from, whose policy is the reference"
    _require(kl_coef == 0 or c["init_from"] != "", "reward.kl_coef", kl_coef, only)
    try:
        return Recipe(**{**fields, "max_length": fields["max_length"] or room})
    except ValueError as error:
        raise ValueError(f"config.{error}") from None


def resolve(config: ConfigDict, *, devices: Sequence[Any] | None = None) -> Settings:
    """Check a config and build what it describes; compiles nothing.

    Args:
      config: the experiment.
      devices: those of the mesh, such as a topology description's; by default all of this run.

    Raises:
      ValueError: naming the field, its value and what is allowed.
    """
    c = json.loads(config.to_json_best_effort())
    _choice("source", c["source"], SOURCES)
    _choice("advantages", c["advantages"], tuple(advantages.ESTIMATORS))
    _choice("population.method", c["population"]["method"], POPULATION_METHODS)
    _check_numbers(c)
    _check_batch(c)
    made, shares = build.make_tasks(c)
    tokenizer = build.make_tokenizer(c, made)
    objective = _objective(c)
    shape = build.make_model(c, tokenizer)
    width, room, keep = build.lengths(c, made, tokenizer, shape)
    slots, shrink = c["sampler"]["slots"], c["sampler"]["shrink"]
    mesh = _mesh(c, shape, devices)
    parts = sharding.parts(mesh)
    options = {"slots": slots, "shrink": shrink, "parts": parts}
    plan = partial(sampler.make_plan, max_new_tokens=room, **options)
    # The last batch of an evaluation is filled up, and so is one that the mesh does not divide.
    eval_batch = -(-min(c["batch"]["prompts"], c["eval"]["prompts"]) // parts) * parts
    return Settings(
        config=c,
        tasks=made,
        shares=shares,
        recipe=_recipe(c, room),
        tokenizer=tokenizer,
        keep=keep,
        model=shape,
        hp=_hyperparameters(c, shape, objective, mesh),
        width=width,
        max_new_tokens=room,
        bounds=_bounds(c),
        plan=plan(c["batch"]["prompts"] * c["batch"]["oversample"]),
        eval_plan=plan(eval_batch),
        eval_batch=eval_batch,
        mesh=mesh,
    )
