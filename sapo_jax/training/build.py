"""From the fields of a config to objects; a ValueError that names the field refuses the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sapo_jax import corrections, learner, model, objectives, sampler, tasks
from sapo_jax.data import hf_tokenizer
from sapo_jax.data.stream import Fits
from sapo_jax.data.tokenizer import CharTokenizer, Tokenizer
from sapo_jax.learner.packing import micro_tokens, sharing_pays
from sapo_jax.model import attention, blocked, head, params, routing
from sapo_jax.objectives.kl import KL_ESTIMATORS
from sapo_jax.parallel import sharding
from sapo_jax.rewards import Recipe
from sapo_jax.tasks.base import Task
from sapo_jax.training.checks import check_name, choice, of_field, require

OLD_LOGP = ("sampler", "recompute")
NO_REFERENCE = "0 without config.init_from, whose policy is the reference"


def entries(c: Any) -> dict[str, Any]:
    """The tasks as config.tasks lists them, also where there is only one."""
    return c.tasks or {c.task["name"]: c.task | {"share": 1.0}}


def make_tasks(c: Any) -> tuple[dict[str, Task], dict[str, float]]:
    """The tasks by name, with their shares of a batch."""
    made, shares = {}, {}
    for key, entry in entries(c).items():
        field = f"tasks.{key}" if c.tasks else "task"
        wanted = "a dictionary of name, share and, if need be, options"
        require(isinstance(entry, dict) and "share" in entry, field, entry, wanted)
        share, prompts = entry["share"], c.batch.prompts
        number = type(share) in (int, float) and 0 < share <= 1
        require(number, f"{field}.share", share, "a number in (0, 1]")
        whole = f"a whole number of the {prompts} of batch.prompts"
        divides = abs(share * prompts - round(share * prompts)) < 1e-6
        require(divides, f"{field}.share", share, whole)
        rest = {option: value for option, value in entry.items() if option != "share"}
        made[key], shares[key] = make_task(field, rest, wanted), float(share)
        with of_field(field):
            made[key].examples("train")
    total = sum(shares.values())
    require(abs(total - 1) < 1e-6, "tasks", shares, f"shares that add up to 1, not {total:g}")
    return made, shares


def make_task(
    field: str, entry: Any, wanted: str = "a dictionary of name and, if need be, options"
) -> Task:
    """The task of a dictionary with its name and, if need be, options; or of a name alone."""
    where, entry = (field, {"name": entry}) if isinstance(entry, str) else (f"{field}.name", entry)
    known = isinstance(entry, dict) and "name" in entry and not set(entry) - {"name", "options"}
    require(known, field, entry, wanted)
    name, options = entry["name"], entry.get("options", {})
    require(isinstance(name, str), where, name, "text")
    require(isinstance(options, dict), f"{field}.options", options, "a dictionary")
    check_name(where, name, tasks.TASKS, "my.py:MyTask")
    with of_field(field, [f"options.{option}" for option in options]):
        return tasks.make(name, **options)


def make_tokenizer(c: Any, made: Mapping[str, Task]) -> Tokenizer:
    """The tokenizer of the directory that the config names, or one of the tasks' characters."""
    options = dict(vars(c.tokenizer))
    directory = options.pop("directory")
    for field in ("system", "template_options"):
        alone = "empty without config.tokenizer.directory"
        require(bool(directory) or not options[field], f"tokenizer.{field}", options[field], alone)
    if not directory:
        whole, preset = tasks.Mixture(made), model.PRESETS.get(c.model.preset, {})
        return CharTokenizer(whole.alphabet, whole.max_images > 0 or "vision" in preset)
    with of_field("tokenizer"):
        return hf_tokenizer.load(directory, **options)


def lengths(
    c: Any,
    made: Mapping[str, Task],
    tokenizer: Tokenizer,
    shape: model.ModelConfig,
    images: Any = None,
) -> tuple[int, int, Fits | None]:
    """Tokens of room for a prompt and for a completion, and the filter of what has none."""
    width, room = c.data.max_prompt_tokens, c.sampler.max_new_tokens
    own_width, own_room = not width, not room
    supervised, bounded = c.source == "demonstrations", False
    if isinstance(tokenizer, CharTokenizer):
        whole = tasks.Mixture(made)
        longest, needed = whole.max_prompt_chars, whole.max_completion_chars
        longest += images.tokens if images else 0
        if supervised:
            least = f"at least {needed + 1}, the longest demonstration with its stop token"
            fits = room == 0 or room > needed
            require(fits, "sampler.max_new_tokens", room, f"{least} (0 takes that)")
        width, room = width or longest, room or (needed and needed + 1)
        bounded = width >= longest and images is None
    for field, value in (("data.max_prompt_tokens", width), ("sampler.max_new_tokens", room)):
        require(value > 0, field, value, "at least 1: the tasks have no bound of their own")
    context = shape.max_position_embeddings
    own = f"of {', '.join(map(repr, made.values())):.200}"
    prompts = f"prompts of {width} tokens ({own if own_width else 'data.max_prompt_tokens'})"
    completions = f"completions of {room} ({own if own_room else 'sampler.max_new_tokens'})"
    least = f"at least {width + room}: {prompts} and {completions}"
    require(width + room <= context, "model.max_position_embeddings", context, least)
    demonstrated = room if supervised else None
    keep = None if bounded else Fits(tokenizer, width, demonstrated, images)
    return width, room, keep


def make_mesh(c: Any, shape: model.ModelConfig, devices: Sequence[Any] | None) -> Mesh | None:
    """The mesh; None on one device."""
    alone = devices is None and jax.process_count() == 1
    devices = _split(c, devices)[0] if c.sampler.devices else devices
    if alone and all(size == 1 for size in c.mesh.values()):
        return None
    batch = c.batch
    micro = batch.minibatches * batch.micro_batches
    rows = {"a micro-batch": batch.prompts * batch.group_size // micro}
    if c.data.max_image_tokens:
        rows["the prompts of a minibatch"] = batch.prompts // batch.minibatches
    if c.source == "rollout":
        rows |= _sampled(c)
        if any(c.sampler.mesh.values()) or c.sampler.devices:
            del rows["sampler.slots"]
    split = [sharding.Dimension(name, "rows", size) for name, size in rows.items()]
    rest = [f".{axis}=-1" for axis, size in c.mesh.items() if size == -1][:1]
    with of_field("".join(["mesh", *rest])):
        mesh = sharding.make_mesh(**c.mesh, devices=devices)
        sharding.check(mesh, split + params.dimensions(shape))
    return mesh


def _split(c: Any, devices: Sequence[Any] | None) -> tuple[list[Any], list[Any]]:
    """The learner's devices and the sampler's own, the last ones."""
    count, every = c.sampler.devices, list(devices or jax.devices())
    most = f"at most {len(every) - 1}: the learner has the others of {len(every)}, in one process"
    fits = count < len(every) and jax.process_count() == 1
    require(fits, "sampler.devices", count, most)
    alone = f"1 with sampler.devices={count}, which a run by itself has"
    require(c.mesh["run"] == 1, "mesh.run", c.mesh["run"], alone)
    stale = f"at least 1 with sampler.devices={count}, which sample while others learn"
    require(c.staleness > 0, "staleness", c.staleness, stale)
    return every[:-count], every[-count:]


def make_sampler_mesh(
    c: Any, shape: model.ModelConfig, mesh: Mesh | None, devices: Sequence[Any] | None
) -> Mesh | None:
    """The mesh, or its devices in the shape that ``sampler.mesh`` says, or devices of its own."""
    sizes, apart = c.sampler.mesh, c.sampler.devices > 0
    if not apart and not any(sizes.values()):
        return mesh
    allowed = "0 along all axes where config.mesh has one device"
    require(apart or mesh is not None, "sampler.mesh", sharding.describe(sizes), allowed)
    split = [sharding.Dimension(name, "rows", size) for name, size in _sampled(c).items()]
    with of_field("sampler.mesh"):
        sizes = {axis: size or (-1 if axis == "data" else 1) for axis, size in sizes.items()}
        own = sharding.make_mesh(-1, devices=_split(c, devices)[1]) if apart else mesh
        own = sharding.reshape(own, **sizes)
        sharding.check(own, split + params.dimensions(shape), sharding.SAMPLER)
    return own


def _sampled(c: Any) -> dict[str, int]:
    """What the sampler splits by rows."""
    drawn = c.batch.prompts * c.batch.oversample
    return {"batch.prompts": drawn, "sampler.slots": c.sampler.slots}


def make_plan(c: Any, room: int, options: dict[str, int], mesh: Mesh | None) -> sampler.Plan:
    """The sampler's shapes in training, also of rollouts that a budget ends."""
    budget, whole = c.sampler.budget, "0, whole rollouts, with "
    drawn, options = _sampled(c)["batch.prompts"], options | {"whole": budget > 0}
    plan = sampler.make_plan(drawn, room, group_size=c.batch.group_size, **options)
    if budget == 0:
        return plan
    step, runs = plan.slots[0] * plan.rows[0], sharding.runs(mesh)
    alone = f"{whole}mesh.run={runs}: runs side by side have one rollout together"
    require(runs == 1, "sampler.budget", budget, alone)
    require(c.source == "rollout", "sampler.budget", budget, f"{whole}source={c.source!r}")
    least = f"0, or at least {step}, the rows of one decode step"
    require(budget >= step, "sampler.budget", budget, least)
    compared = f"{whole}advantages='reinforce_pp', which compare all rows"
    require(c.advantages != "reinforce_pp", "sampler.budget", budget, compared)
    recorded = "'sampler' with sampler.budget: several policies sample a row"
    own = c.learner.old_logp
    require(own == "sampler", "learner.old_logp", own, recorded)
    method, apart = c.population.method, "'auto' or 'map' with sampler.budget"
    require(method in ("auto", "map"), "population.method", method, apart)
    return plan


def make_packing(
    c: Any, shape: model.ModelConfig, width: int, room: int, mesh: Mesh | None
) -> learner.PackedShape | None:
    """How the rows of an update are packed; None where they stay as they are."""
    batch, parts, platform = c.batch, sharding.parts(mesh), sharding.platform(mesh)
    kernel = attention.choose(shape.attention, platform, width + room, shape.head_dim)
    share, pack = batch.share_prefix, batch.pack and kernel != "cudnn"
    if share:
        only = "None or False with batch.pack=False"
        require(batch.pack, "batch.share_prefix", share, only)
        can = f"None or False with model.attention={kernel!r}, which sees one segment a row"
        require(kernel in attention.SHARES_PREFIX, "batch.share_prefix", share, can)
    if not pack:
        return None
    rows, group_size = batch.prompts * batch.group_size // batch.minibatches, batch.group_size
    whole = rows * (width + room) // (batch.micro_batches * parts)
    budget = min(micro_tokens(platform, width + room), whole)
    if share is None:
        can = kernel in attention.SHARES_PREFIX
        share = can and sharing_pays(width, room, group_size, budget)
    if not share or c.source != "rollout":
        group_size = 1
    if group_size == 1 and width + room <= attention.SHORT:
        return None  # moving such rows together takes longer than their pads
    return learner.packed_shape(
        rows, width, room, group_size=group_size, budget=budget, parts=parts
    )


def make_hyperparameters(
    c: Any,
    shape: model.ModelConfig,
    objective: objectives.Objective,
    mesh: Mesh | None,
    packing: learner.PackedShape | None,
) -> learner.Hyperparameters:
    """What an update is told."""
    options = dict(vars(c.learner))
    del options["max_skipped"]
    old_logp, replay = options.pop("old_logp"), options["routing_replay"]
    choice("learner.schedule", options["schedule"], learner.SCHEDULES)
    choice("learner.old_logp", old_logp, OLD_LOGP)
    choice("learner.routing_replay", replay, routing.REPLAY)
    sparse = "'none' for a model without experts"
    require(replay == "none" or shape.num_experts > 0, "learner.routing_replay", replay, sparse)
    if shape.num_experts and objective.replay != "none":
        own = f"'none' or {objective.replay!r}: objective.name={c.objective.name!r} replays that"
        require(replay in ("none", objective.replay), "learner.routing_replay", replay, own)
        replay = options["routing_replay"] = objective.replay
    recompute = replay != "R2" or old_logp == "recompute"
    only = "'recompute' with routing replay R2, which records the old policy's routing"
    require(recompute, "learner.old_logp", old_logp, only)
    updates = c.iterations * c.batch.minibatches
    options["head_chunk"] = options["head_chunk"] or head.chunk_size(
        shape.vocab_size, sharding.platform(mesh)
    )
    options["block"] = blocked.block_size(packing.segment) if packing else blocked.BLOCK
    return learner.Hyperparameters(
        objective=objective,
        temperature=c.sampler.temperature,
        model=shape,
        micro_batches=packing.micro_batches if packing else c.batch.micro_batches,
        kl=c.objective.kl,
        total=0 if options["schedule"] == "constant" else updates,
        router_aux_coef=options.pop("router_aux_coef") or None,
        lora_scale=c.lora.alpha / c.lora.rank if c.lora.rank else None,
        mesh=mesh,
        **options,
    )


def make_bounds(c: Any) -> dict[str, float]:
    """Bounds of the sampler correction; π_old has to come from the learner."""
    fields, source = dict(vars(c.correction)), c.learner.old_logp
    name = fields.pop("name")
    if name == "none":
        given = {key: value for key, value in fields.items() if value is not None}
        require(not given, "correction", given, "empty with correction.name='none'")
        return {}
    choice("correction.name", name, ("none", *corrections.CORRECTIONS))
    only = f"'recompute' with correction.name={name!r}: the sampler's own ratio to itself is 1"
    require(source == "recompute" and c.source == "rollout", "learner.old_logp", source, only)
    with of_field("correction"):
        return corrections.bounds_of(name, **fields)


def make_recipe(c: Any, room: int) -> Recipe:
    """The parts of the reward."""
    fields = dict(vars(c.reward))
    kl_coef, kl, _ = (fields.pop(name) for name in ("kl_coef", "kl", "workers"))
    choice("reward.kl", kl, KL_ESTIMATORS)
    require(kl_coef == 0 or c.init_from != "", "reward.kl_coef", kl_coef, NO_REFERENCE)
    with of_field("reward", named=True):
        return Recipe(**{**fields, "max_length": fields["max_length"] or room})
