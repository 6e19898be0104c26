"""The programs of a run with abstract arguments, as `jax.stages.Lowered`: nothing is computed.

They are the function objects that train. Only shapes, dtypes and shardings stand for their
arguments, so that a pod's programs can be compiled where no pod is. Where several runs lie side by
side on the mesh, arguments are those of all runs, and counts those of one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapo_jax import learner
from sapo_jax.model import lora, params
from sapo_jax.parallel import runs, sharding
from sapo_jax.preflight import model_flops
from sapo_jax.sampler import SamplerParams, decode, decode_state, images, sampling, weights
from sapo_jax.training.queue import abstract_batch, abstract_images, placed
from sapo_jax.training.settings import Settings
from sapo_jax.types import Batch, Frozen, Prompts, TrainState

Abstract = jax.ShapeDtypeStruct
SLOTS = sharding.spec("slots")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      lower: traces it; the result compiles for the platform of its mesh.
      arguments: what it is given, by kind.
      runs: how often an iteration calls it (decode steps: of completions of full length).
      mesh: the learner's or the sampler's.
      tokens: of one pass through the layers, on all devices of a run together.
      turns: of loops whose length is known at run time only, see `hlo.executed`.
      one_turn: its costs are those of one turn of its loop, a decode step.
      resident: what lies in memory meanwhile, by kind.
      result: what it leaves, by kind, where that is not an argument updated in place.
      model_flops: of the model, on all devices of a run together; nothing that is computed again.
    """

    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Any]
    runs: float
    mesh: Mesh | None
    tokens: int = 0
    turns: dict[str, int] = dataclasses.field(default_factory=dict)
    model_flops: float = 0.0
    one_turn: bool = False
    resident: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)


def fed(tree: Any, mesh: Mesh | None) -> Any:
    """Abstract values that come from the host: split by slots, or as they are."""
    return tree if mesh is None else placed(tree, mesh, SLOTS)


def _lower(
    settings: Settings, function: Callable, *trees: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Lowered:
    """A learner's program: of one run as it is; trees are what `runs.abstract` gives, and hp."""
    count = sharding.runs(settings.mesh)
    if count == 1:
        return function.lower(*trees)

    def many(tree):
        hp = isinstance(tree, learner.Hyperparameters)
        return jax.tree.map(lambda x: jnp.full(count, x), tree) if hp else tree

    return runs.vmapped(function, settings.mesh, donate).lower(*map(many, trees))


def _chip_bytes(x: Abstract) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return math.prod(shape) * (8 if key else x.dtype.itemsize)


def bytes_per_chip(tree: Any) -> int:
    """Bytes of abstract values on one device."""
    return sum(_chip_bytes(x) for x in jax.tree.leaves(tree))


def _batch(settings: Settings, *, scored: bool) -> Batch:
    return runs.abstract(abstract_batch(settings, scored=scored), settings.mesh)


def abstract_prompts(settings: Settings) -> Prompts:
    """The prompts of an iteration."""
    p, integers = settings.drawn * sharding.runs(settings.mesh), jnp.int32
    made = Prompts(
        tokens=Abstract((p, settings.width), integers), length=Abstract((p,), integers),
        id=Abstract((p,), jnp.uint32), task=Abstract((p,), integers),
        occurrence=Abstract((p,), integers), images=abstract_images(settings, p, patches=False),
    )  # fmt: skip
    return fed(made, settings.sampler_mesh)


def abstract_decoding(settings: Settings, cache: int = -1) -> decode_state.DecodeState:
    """The decode loop's state with its first slots and the largest cache, or an earlier one."""
    plan, mesh = settings.plan, settings.sampler_mesh
    count = sharding.runs(mesh)
    shape = decode_state.Shape(
        count * plan.slots[0], plan.rows[0], plan.cache[cache], count * settings.drawn,
        settings.width,
        settings.config.batch.group_size, settings.max_new_tokens,
    )  # fmt: skip
    empty = jax.eval_shape(lambda: decode_state.empty(settings.model, shape, mesh))
    return placed(empty, mesh, decode_state.partition_specs())


def abstract_sampler(
    settings: Settings, mesh: Mesh | None, column: int = sharding.SAMPLER
) -> SamplerParams:
    """The sampler's parameters, on a mesh as a column of the table says."""
    config = settings.model
    shapes = jax.eval_shape(lambda x: weights.convert(x, config), params.abstract(config))
    return runs.abstract(placed(shapes, mesh, weights.partition_specs(config, column)), mesh)


def _abstract_state(settings: Settings) -> TrainState:
    """The learner's state, and on one device its place."""
    hp, mesh = settings.hp, settings.mesh
    return runs.abstract(placed(learner.abstract(hp), mesh, learner.partition_specs(hp)), mesh)


def _abstract_frozen(settings: Settings) -> Frozen | None:
    """The base of adapters, placed likewise."""
    config = settings.model
    specs = lora.frozen(params.partition_specs(config), config)
    one = placed(learner.abstract_frozen(settings.hp), settings.mesh, specs)
    return runs.abstract(one, settings.mesh)


def _reference(settings: Settings) -> dict[str, Any]:
    """The reference policy, where a KL penalty needs it: it stays in memory throughout.

    With LoRA it is the base, which is there anyway.
    """
    needed = settings.needs_reference and not settings.model.lora_rank
    return {"reference": _abstract_state(settings).params} if needed else {}


def _learner_programs(settings: Settings) -> dict[str, Program]:
    hp, options = settings.hp, settings.config.batch
    state, frozen = _abstract_state(settings), _abstract_frozen(settings)
    unscored, batch = (_batch(settings, scored=scored) for scored in (False, True))
    n, t, parts = settings.width, settings.max_new_tokens, sharding.parts(settings.mesh)
    rows, shared = settings.rows // options.minibatches, settings.packing
    prompts = rows // shared.group_size if shared else rows
    config, size = settings.model, (prompts * n + rows * t, rows * t)
    forward = model_flops.forward(config, size[0], (n + t) / 2, size[1])
    # Nothing computes the gradients of frozen matrices.
    spared = model_flops.matmuls(lora.base(config), *size) if config.lora_rank else 0.0
    tower = config.train_vision * model_flops.tower(
        settings, options.prompts // options.minibatches
    )
    passes = hp.static.micro_batches
    turns = {
        "micro_batches": passes,
        "head_chunks": math.ceil(rows * t / (passes * parts * hp.static.head_chunk)),
        "waves": 0,  # of experts after the first: none, if the load is balanced
    }
    tokens = batch.tokens.size // sharding.runs(settings.mesh) // passes
    parameters, optimizer = {"parameters": (state.params, frozen)}, {"optimizer": state.opt_state}
    score = learner.score_routing if hp.static.routing_replay == "R2" else learner.score
    recompute = settings.config.learner.old_logp == "recompute"
    scored = options.minibatches * options.oversample
    # The rollout and its minibatches are there while one is scored; in an update, minibatches are.
    # The first update of a run is on a copy of the state, so that nothing changes.
    rollout = {"rows": [unscored] * (2 * scored - 1)}
    sampler = {"sampler's parameters": abstract_sampler(settings, settings.sampler_mesh)}
    others = {"rows": [batch] * (options.minibatches - 1), "copy at the start": state}
    return {
        "score": Program(
            lambda: _lower(settings, score, state.params, unscored, hp, frozen),
            parameters | {"rows": unscored},
            runs=scored * (recompute + settings.needs_reference), mesh=settings.mesh,
            tokens=tokens, turns=turns, model_flops=forward + tower,
            resident=optimizer | rollout | sampler | _reference(settings),
        ),
        "update": Program(
            lambda: _lower(settings, learner.update, state, batch, hp, frozen, donate=(0,)),
            parameters | optimizer | {"rows": batch}, runs=options.minibatches,
            mesh=settings.mesh, tokens=tokens, turns=turns,
            model_flops=3 * (forward + tower) - spared,
            resident=others | _reference(settings),
        ),
    }  # fmt: skip


def _sampler_programs(settings: Settings) -> dict[str, Program]:
    config, mesh, plan = settings.model, settings.sampler_mesh, settings.plan
    train, frozen = _abstract_state(settings), _abstract_frozen(settings)
    policy, count = lora.join(train.params, frozen, None), sharding.runs(mesh)
    sampler_params, state = abstract_sampler(settings, mesh), abstract_decoding(settings)
    smaller = abstract_decoding(settings, -min(2, len(plan.cache)))
    prompts = abstract_prompts(settings)
    seeds, controls = np.uint32(0), sampling.controls(1.0)
    if count > 1:
        seeds, controls = np.zeros(count, np.uint32), sampling.controls([1.0] * count)
    group, n, t = settings.config.batch.group_size, settings.width, settings.max_new_tokens
    base = jax.eval_shape(lambda: sampling.base_key(seeds, "train", np.int32(0)))
    static = {"truncate": False, "mesh": mesh}
    sizes = count * plan.refill, 2 * sharding.parts(mesh, "slots")
    slots, limits = (fed(Abstract((size,), jnp.int32), mesh) for size in sizes)
    optimizer = {"optimizer": train.opt_state} | _reference(settings)
    resident = optimizer | {"parameters": policy}
    cache = {"cache": (state.prompt_kv, state.completion_kv)}
    results = state.replace(prompt_kv=None, completion_kv=None)
    sampler = {"sampler's parameters": sampler_params}
    rows = plan.slots[0] * plan.rows[0]

    return {
        **_to_sampler(settings, policy, sampler_params, optimizer),
        **_see(settings, sampler_params, prompts, resident),
        "prefill": Program(
            lambda: decode.fill_slots.lower(
                sampler_params, config, prompts, base, controls, state.replace(completion_kv=None),
                slots, slots, **static,
            ),
            sampler | {"cache": state.prompt_kv, "rows": (prompts, results)},
            runs=settings.drawn / plan.refill, mesh=mesh, tokens=plan.refill * n,
            model_flops=model_flops.forward(config, plan.refill * n, n / 2, plan.refill),
            resident=resident | {"cache": state.completion_kv},
        ),
        "decode": Program(
            lambda: decode.decode.lower(
                sampler_params, config, controls, state, np.int32(0), limits, np.int32(1), **static
            ),
            sampler | cache | {"rows": results}, runs=t * settings.drawn * group / rows,
            tokens=rows, model_flops=model_flops.forward(config, rows, n + t, rows), one_turn=True,
            mesh=mesh, resident=resident,
        ),
        "grow": Program(
            lambda: decode_state.grow_cache.lower(smaller.completion_kv[0], plan.cache[-1], mesh),
            {"cache": smaller.completion_kv[0]},
            runs=(len(plan.cache) - 1) * config.num_hidden_layers, mesh=mesh,
            resident=resident | sampler | {"rows": results}
            | {"cache": (state.prompt_kv, state.completion_kv[1:])},
            result={"cache": state.completion_kv[0]},
        ),
    }  # fmt: skip


def _to_sampler(
    settings: Settings, policy: dict[str, Any], moved: SamplerParams, optimizer: dict[str, Any]
) -> dict[str, Program]:
    """See `sampler.to_sampler`: parameters are cast, and move where meshes are not the same."""
    config, own, mesh = settings.model, settings.mesh, settings.sampler_mesh
    count, moves = sharding.runs(own), own != mesh
    frozen = _abstract_frozen(settings) if count > 1 else None
    given = policy if frozen is None else _abstract_state(settings).params
    same = [] if moves else weights.unchanged(given, config)
    rest = {name: x for name, x in given.items() if name not in same}
    column = sharding.TRAINING if moves else sharding.SAMPLER
    cast = abstract_sampler(settings, own, column)

    def convert():
        if count == 1:
            return weights.convert.lower(rest, config, own, column)
        static = {"config": config, "mesh": own, "column": column}
        scale = None if frozen is None else np.ones(count, np.float32)
        return runs.vmapped(weights.convert_joined, own, **static).lower(rest, frozen, scale)

    kind, kept = "sampler's parameters", {"parameters": {name: policy[name] for name in same}}
    found = Program(
        convert, {"parameters": (rest, frozen)}, runs=1, mesh=own, resident=optimizer | kept,
        result={kind: {name: x for name, x in cast.items() if name not in same}},
    )  # fmt: skip
    if not moves or settings.config.sampler.devices:
        return {"to_sampler": found}
    layer, rest_of = weights.moves(config, mesh)
    i = max(range(len(layer)), key=lambda i: bytes_per_chip(moved["layers"][i]))

    def split(tree):
        """The largest layer, the other ones, and the parameters beside them."""
        beside = {name: x for name, x in tree.items() if name != "layers"}
        return tree["layers"][i], tree["layers"][:i] + tree["layers"][i + 1 :], beside

    (one, others, top), (own_one, own_others, own_top) = split(cast), split(moved)
    there = optimizer | {"parameters": policy}
    return {
        "to_sampler": found,
        "move_layer": Program(
            lambda: layer[i].lower(one), {kind: one}, runs=len(layer), mesh=mesh,
            resident=there | {kind: (others, own_others, top)}, result={kind: own_one},
        ),
        "move_rest": Program(
            lambda: rest_of.lower(top), {kind: top}, runs=1, mesh=mesh,
            resident=there | {kind: (cast["layers"], moved["layers"])}, result={kind: own_top},
        ),
    }  # fmt: skip


def _see(
    settings: Settings, sampler_params: SamplerParams, prompts: Prompts, resident: dict[str, Any]
) -> dict[str, Program]:
    """The tower's pass over the images of an iteration, if there are any."""
    if settings.images is None:
        return {}
    config, mesh = settings.model, settings.sampler_mesh
    tower = {"vision": sampler_params["vision"]}
    patches = fed(abstract_images(settings, len(prompts.id), patches=True), mesh)
    program = Program(
        lambda: images.see.lower(tower, config, patches, mesh=mesh),
        {"sampler's parameters": tower, "rows": patches}, runs=1, mesh=mesh, resident=resident,
        model_flops=model_flops.tower(settings, settings.drawn), result={"rows": prompts.images},
    )  # fmt: skip
    return {"see": program}


def programs(settings: Settings) -> dict[str, Program]:
    """What an iteration runs on the device, in its order."""
    found = _sampler_programs(settings) | _learner_programs(settings)
    learnt = ("update",) if settings.supervised else tuple(found)
    rows, waiting = _batch(settings, scored=True), {}
    if settings.config.staleness:
        count = settings.config.staleness * settings.config.batch.minibatches
        waiting = {"rows that wait": [rows] * count}
    return {
        name: dataclasses.replace(found[name], resident=found[name].resident | waiting)
        for name in learnt
        if found[name].runs
    }
