"""The programs of a run with abstract arguments, as `jax.stages.Lowered`: nothing is computed.

They are the function objects that train. Only shapes, dtypes and shardings stand for their
arguments, so that a pod's programs can be compiled where no pod is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sapo_jax import decoding, handover, learner, sampling, sharding
from sapo_jax.model import moe, params
from sapo_jax.settings import Settings
from sapo_jax.types import Batch, Prompts

ROWS, WHOLE = sharding.spec("rows"), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      lower: traces it; the result compiles for the platform of the run's mesh.
      arguments: what it is given, by kind.
      resident: what lies in memory meanwhile, by kind.
      result: what it leaves, by kind, where that is not an argument updated in place.
      tokens: of one pass through the layers, on all devices together.
      turns: of a loop whose length is known at run time only: chunks of the head, decode steps.
      model_flops: of the model, on all devices together; nothing that is computed again.
      runs: how often an iteration calls it (for "decode", steps of completions of full length).
    """

    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Any]
    tokens: int
    turns: int
    model_flops: float
    runs: float
    resident: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)


def placed(tree: Any, mesh: Mesh | None, specs: Any) -> Any:
    """Abstract values that lie on a mesh as a tree of specs, or one for all, says."""
    if mesh is None:
        return tree
    specs = jax.tree.broadcast(specs, tree, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, s)),
        tree, specs,
    )  # fmt: skip


def _chip_bytes(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return math.prod(shape) * (8 if key else x.dtype.itemsize)


def bytes_per_chip(tree: Any) -> int:
    """Bytes of abstract values on one device."""
    return sum(_chip_bytes(x) for x in jax.tree.leaves(tree))


def abstract_batch(settings: Settings) -> Batch:
    """A minibatch."""
    rows = settings.rows // settings.config["batch"]["minibatches"]
    s, shape = settings.width + settings.max_new_tokens, settings.model
    routing = ref_logp = None
    if shape.num_experts:
        choice = (len(shape.sparse_layers), shape.num_experts_per_tok)
        routing = (rows, s, *choice), moe.id_dtype(shape)
    objective = settings.hp.objective
    if objective.kl_against == "ref" and objective.hyperparameters["kl_coef"] != 0:
        ref_logp = (rows, s), jnp.float32
    floats = ((rows, s), jnp.float32)
    fields = {
        "tokens": ((rows, s), jnp.int32), "mask": ((rows, s), jnp.bool),
        "segments": ((rows, s), jnp.int32), "sampler_logp": floats, "old_logp": floats,
        "advantages": ((rows,), jnp.float32), "ref_logp": ref_logp, "routing": routing,
    }  # fmt: skip
    made = {k: v if v is None else jax.ShapeDtypeStruct(*v) for k, v in fields.items()}
    return placed(Batch(**made), settings.mesh, ROWS)


def abstract_prompts(settings: Settings) -> Prompts:
    """The prompts of an iteration."""
    p = settings.config["batch"]["prompts"]
    shapes = ((p, settings.width), jnp.int32), ((p,), jnp.int32), ((p,), jnp.uint32)
    made = Prompts(*(jax.ShapeDtypeStruct(*x) for x in (*shapes, ((p,), jnp.int32))))
    return placed(made, settings.mesh, ROWS)


def abstract_decoding(settings: Settings) -> decoding.Decoding:
    """The decode loop's state with all its slots and the largest cache."""
    plan, batch, mesh = settings.plan, settings.config["batch"], settings.mesh
    sizes = (plan.slots[0], plan.cache[-1], batch["prompts"], settings.width,
             batch["group_size"], settings.max_new_tokens)  # fmt: skip
    empty = jax.eval_shape(lambda: decoding.empty(settings.model, *sizes, mesh))
    return placed(empty, mesh, decoding.specs())


def abstract_sampler(settings: Settings) -> Any:
    """The sampler's parameters."""
    config = settings.model
    shapes = jax.eval_shape(lambda w: handover.convert(w, config), params.abstract(config))
    return placed(shapes, settings.mesh, handover.specs(config))


def _layer_flops(settings: Settings) -> int:
    """Forward FLOPs of a token in the layers' matmuls: 2 for each parameter that it meets."""
    config = settings.model
    share = config.num_experts_per_tok / max(1, config.num_experts)
    return 2 * sum(
        int(math.prod(spec.shape) * len(spec.layers) * (share if "experts" in spec.axes else 1))
        for spec in params.layer_table(config).values()
        if spec.fan_in
    )


def _attention_flops(settings: Settings, keys: float) -> float:
    """Forward FLOPs of a token that attends to so many."""
    config = settings.model
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys


def _head_flops(settings: Settings) -> int:
    return 2 * settings.model.vocab_size * settings.model.hidden_size


def _learner_programs(settings: Settings) -> dict[str, Program]:
    batch, hp, options = abstract_batch(settings), settings.hp, settings.config["batch"]
    state = learner.abstract(hp)
    rows, s = batch.tokens.shape
    t = settings.max_new_tokens
    forward = rows * s * (_layer_flops(settings) + _attention_flops(settings, s / 2))
    forward += rows * t * _head_flops(settings)
    micro_rows = rows // hp.micro_batches // sharding.parts(settings.mesh)
    common = {"tokens": rows // hp.micro_batches * s,
              "turns": -(-micro_rows * t // hp.head_chunk)}  # fmt: skip
    weights, optimizer = {"parameters": state.params}, {"optimizer": state.opt_state}
    score = learner.score_routing if hp.routing_replay == "R2" else learner.score
    recompute = settings.config["learner"]["old_logp"] == "recompute"
    return {
        "score": Program(
            lambda: score.lower(state.params, batch, hp),
            weights | {"batch": batch}, resident=optimizer, model_flops=forward,
            runs=options["minibatches"] * recompute, **common,
        ),
        "update": Program(
            lambda: learner.update.lower(state, batch, hp),
            weights | optimizer | {"batch": batch}, model_flops=3 * forward,
            runs=options["minibatches"], **common,
        ),
    }  # fmt: skip


def _sampler_programs(settings: Settings) -> dict[str, Program]:
    config, mesh, plan = settings.model, settings.mesh, settings.plan
    train = learner.abstract(settings.hp)
    weights, state = abstract_sampler(settings), abstract_decoding(settings)
    prompts, controls = abstract_prompts(settings), sampling.controls(1.0)
    group, n, t = settings.config["batch"]["group_size"], settings.width, settings.max_new_tokens
    base = jax.eval_shape(lambda: decoding.base_key(np.uint32(0), "train", np.int32(0)))
    static = {"truncate": False, "mesh": mesh}
    slots = placed(jax.ShapeDtypeStruct((plan.refill,), jnp.int32), mesh, ROWS)
    parts = placed(jax.ShapeDtypeStruct((sharding.parts(mesh),), jnp.int32), mesh, ROWS)
    resident = {"parameters": train.params, "optimizer": train.opt_state}
    cache = {"cache": (state.prompt_kv, state.own_kv)}
    results = {"results": state.replace(prompt_kv=None, own_kv=None)}
    given = {"sampler's parameters": weights, "prompts": prompts}
    same = handover.unchanged(train.params, config)
    kept = {name: value for name, value in train.params.items() if name in same}
    rest = {name: value for name, value in train.params.items() if name not in same}
    moved = {name: value for name, value in weights.items() if name not in same}
    rows = plan.slots[0] * group
    step = rows * (_layer_flops(settings) + _head_flops(settings))
    step += rows * _attention_flops(settings, n + t)
    fill = plan.refill * n * (_layer_flops(settings) + _attention_flops(settings, n / 2))
    return {
        "to_sampler": Program(
            lambda: handover.convert.lower(rest, config, mesh),
            {"parameters": rest}, resident={"optimizer": train.opt_state, "parameters kept": kept},
            result={"sampler's parameters": moved}, tokens=0, turns=1, model_flops=0.0, runs=1,
        ),
        "prefill": Program(
            lambda: decoding.fill_slots.lower(
                weights, config, prompts, base, controls, state.replace(own_kv=None),
                slots, slots, **static,
            ),
            given | {"cache": state.prompt_kv} | results,
            resident=resident | {"completions' cache": state.own_kv},
            tokens=plan.refill * n, turns=1, runs=prompts.id.shape[0] / plan.refill,
            model_flops=fill + plan.refill * _head_flops(settings),
        ),
        "decode": Program(
            lambda: decoding.decode.lower(
                weights, config, controls, state, np.int32(0), parts, np.int32(1), **static
            ),
            {"sampler's parameters": weights} | cache | results, resident=resident,
            tokens=rows, turns=1, runs=t * prompts.id.shape[0] / plan.slots[0], model_flops=step,
        ),
    }  # fmt: skip


def programs(settings: Settings) -> dict[str, Program]:
    """What an iteration runs on the device, in its order."""
    return _sampler_programs(settings) | _learner_programs(settings)
