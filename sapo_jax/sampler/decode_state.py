"""The state of a rollout on the device: slots, caches, and results that become rows.

A slot holds one prompt and its G completions. The prompt's keys and values are stored once; each
row has its own for the completion, at the clock (the number of decode steps so far) modulo
``max_new_tokens``: one contiguous write a step serves slots that started at different times.

On a mesh, each part of the rows has slots and prompts of its own, numbered from 0.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from sapo_jax.model import moe
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import collectives, sharding
from sapo_jax.types import LENGTH, STOP, Prompts, Rollout

WHOLE, ROWS = PartitionSpec(), sharding.spec("rows")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a state, those of all parts of the rows together."""

    slots: int  # Q, groups in flight
    cache: int  # C, completion tokens that have room in the cache
    prompts: int  # P, of the whole rollout
    width: int  # N, tokens of room for a prompt
    group_size: int  # G
    max_new_tokens: int  # T


@struct.dataclass
class Results:
    """What has been sampled, by prompt; the last entry takes what empty slots write."""

    tokens: jax.Array  # i32[P + 1, G, T]
    logp: jax.Array  # f32[P + 1, G, T]
    count: jax.Array  # i32[P + 1, G], tokens of the completion
    finished: jax.Array  # i32[P + 1, G], STOP or LENGTH
    routing: Any = (
        None  # MoE: experts of prompts [P + 1, N, L', k], completions [P + 1, G, T, L', k]
    )


@struct.dataclass
class DecodeState:
    """The state of the decode loop; Q slots, G rows each."""

    clock: jax.Array  # i32[], decode steps done
    prompt_kv: Any  # per layer (keys, values) [Q, K, N, d]
    completion_kv: Any  # per layer (keys, values) [Q, G, K, C, d]
    prompt: jax.Array  # i32[Q], index of the slot's prompt; P where the slot is empty
    length: jax.Array  # i32[Q], tokens of the prompt
    start: jax.Array  # i32[Q], clock at which the slot was filled
    token: jax.Array  # i32[Q, G], last token drawn, not in the cache yet
    done: jax.Array  # bool[Q, G]
    keys: jax.Array  # key[Q, G]
    results: Results


def partition_specs() -> DecodeState:
    """Where the state lies on a mesh, with one spec for each of its trees."""
    by_row = dict.fromkeys(DecodeState.__dataclass_fields__, ROWS)
    caches = {
        "prompt_kv": sharding.spec("rows", "kv_heads"),
        "completion_kv": sharding.spec("rows", None, "kv_heads"),
    }
    return DecodeState(**by_row | {"clock": WHOLE} | caches)


@partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def empty(config: ModelConfig, shape: Shape, mesh: Mesh | None = None) -> DecodeState:
    """Empty slots, and room for the results."""
    parts = sharding.parts(mesh)
    part = dataclasses.replace(shape, slots=shape.slots // parts, prompts=shape.prompts // parts)
    return sharding.shard_map(partial(_empty, config, part), mesh, (), partition_specs())()


def _empty(config: ModelConfig, shape: Shape) -> DecodeState:
    q, g, p, t = shape.slots, shape.group_size, shape.prompts, shape.max_new_tokens
    kv, d = config.num_key_value_heads // collectives.axis_size("tensor"), config.head_dim

    def pair(*sizes):
        return tuple(jnp.zeros(sizes, config.cache_dtype) for _ in range(2))

    layers = range(config.num_hidden_layers)
    key = jax.random.key(0, impl="threefry2x32")
    return DecodeState(
        clock=jnp.int32(0),
        prompt_kv=[pair(q, kv, shape.width, d) for _ in layers],
        completion_kv=[pair(q, g, kv, shape.cache, d) for _ in layers],
        prompt=jnp.full(q, p, jnp.int32),
        length=jnp.ones(q, jnp.int32),
        start=jnp.zeros(q, jnp.int32),
        token=jnp.zeros((q, g), jnp.int32),
        done=jnp.ones((q, g), bool),
        keys=jnp.broadcast_to(key, (q, g)),
        results=Results(
            tokens=jnp.full((p + 1, g, t), config.pad_token, jnp.int32),
            logp=jnp.zeros((p + 1, g, t), jnp.float32),
            count=jnp.zeros((p + 1, g), jnp.int32),
            finished=jnp.zeros((p + 1, g), jnp.int32),
            routing=_no_routing(config, (p + 1, shape.width), (p + 1, g, t)),
        ),
    )


def _no_routing(config: ModelConfig, *shapes: tuple[int, ...]) -> Any:
    """Nothing recorded yet, −1; None for a dense model."""
    if not config.num_experts:
        return None
    choice, dtype = (len(config.sparse_layers), config.num_experts_per_tok), moe.id_dtype(config)
    return tuple(jnp.full((*shape, *choice), -1, dtype) for shape in shapes)


@partial(jax.jit, static_argnames=("size", "mesh"))
def grow_cache(completion_kv: Any, size: int, mesh: Mesh | None = None) -> Any:
    """Enlarge the completion cache."""
    larger = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, size - x.shape[3]), (0, 0))), completion_kv
    )
    return sharding.constrain(larger, mesh, partition_specs().completion_kv)


@partial(jax.jit, static_argnames="mesh")
def select_slots(state: DecodeState, slots: jax.Array, mesh: Mesh | None = None) -> DecodeState:
    """Some of the slots, named by their place in their part of the rows."""

    def local(state, slots):
        own = state.replace(clock=None, results=None)  # all that has an axis Q
        chosen = jax.tree.map(lambda x: x[slots], own)
        return chosen.replace(clock=state.clock, results=state.results)

    specs = partition_specs()
    return sharding.shard_map(local, mesh, (specs, ROWS), specs)(state, slots)


def write_tokens(
    results: Results, config: ModelConfig, prompt_Q, index_Q, token_QG, logp_QG, live_QG
) -> tuple[Results, jax.Array]:
    """Write the tokens of live rows at their index of the completion; and which rows ended."""
    stops_QG = jnp.isin(token_QG, jnp.asarray(config.stop_tokens))
    last_Q1 = (index_Q == results.tokens.shape[-1] - 1)[:, None]
    at = (prompt_Q[:, None], jnp.arange(token_QG.shape[1])[None, :])
    at_token = (*at, index_Q[:, None])

    def put(buffer, index, new):
        return buffer.at[index].set(jnp.where(live_QG, new, buffer[index]))

    results = results.replace(
        tokens=put(results.tokens, at_token, token_QG),
        logp=put(results.logp, at_token, logp_QG),
        count=put(results.count, at, index_Q[:, None] + 1),
        finished=put(results.finished, at, jnp.where(stops_QG, STOP, LENGTH)),
    )
    return results, stops_QG | last_Q1


def write_prompt_routing(results: Results, routings: list, prompt_F: jax.Array) -> Results:
    """Record what prefill routed; entries that fill nothing name a prompt out of range."""
    if results.routing is None:
        return results
    prompts, completions = results.routing
    experts = _experts(routings).astype(prompts.dtype)
    return results.replace(routing=(prompts.at[prompt_F].set(experts, mode="drop"), completions))


def write_routing(results: Results, routings: list, prompt_Q, index_Q, live_QG) -> Results:
    """Record what the tokens just fed were routed to, at their place in the completion."""
    if results.routing is None:
        return results
    prompts, completions = results.routing
    at = (prompt_Q[:, None], jnp.arange(live_QG.shape[1])[None, :], index_Q[:, None])
    new = jnp.where(live_QG[..., None, None], _experts(routings), completions[at])
    return results.replace(routing=(prompts, completions.at[at].set(new.astype(completions.dtype))))


def _experts(routings: list) -> jax.Array:
    """The experts of all sparse layers, [..., L', k]."""
    return jnp.stack([r.experts for r in routings if r is not None], -2)


@partial(jax.jit, static_argnames="mesh")
def completions(
    results: Results, prompt_Q: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, count and finished of some prompts, by their place in their part of the rows."""

    def local(arrays, prompt_Q):
        return jax.tree.map(lambda x: x[prompt_Q], arrays)

    arrays = (results.tokens, results.count, results.finished)
    return sharding.shard_map(local, mesh, ROWS, ROWS)(arrays, prompt_Q)


@partial(jax.jit, static_argnames=("config", "mesh"))
def to_rollout(
    config: ModelConfig, results: Results, prompts: Prompts, iteration, mesh: Mesh | None = None
) -> Rollout:
    """Prompts and completions as left-aligned, gap-free rows."""
    local = sharding.shard_map(partial(_to_rollout, config), mesh, (ROWS, ROWS, WHOLE), ROWS)
    return local(results, prompts, iteration)


def _to_rollout(config, results, prompts, iteration) -> Rollout:
    results = jax.tree.map(lambda x: x[:-1], results)
    p, n = prompts.tokens.shape
    group, t = results.tokens.shape[1:]
    offset_PGS = jnp.arange(n + t)[None, None, :] - prompts.length[:, None, None]
    offset_PGS = jnp.broadcast_to(offset_PGS, (p, group, n + t))
    in_prompt_PGS = offset_PGS < 0
    mask_PGS = ~in_prompt_PGS & (offset_PGS < results.count[..., None])

    def rows(prompt, completion, pad):
        """[P, N, ...] and [P, G, T, ...] at their places, [B, S, ...]."""
        rest = completion.shape[3:]
        index, mask, in_prompt = (
            x.reshape(*x.shape, *(1 for _ in rest))
            for x in (jnp.clip(offset_PGS, 0, t - 1), mask_PGS, in_prompt_PGS)
        )
        own = jnp.take_along_axis(completion, index, 2)
        own = jnp.where(mask, own, jnp.asarray(pad, own.dtype))
        widths = ((0, 0), (0, t), *((0, 0) for _ in rest))
        prompt = jnp.pad(prompt, widths, constant_values=pad)[:, None]
        return jnp.where(in_prompt, prompt, own).reshape(p * group, n + t, *rest)

    return Rollout(
        tokens=rows(prompts.tokens, results.tokens, config.pad_token),
        mask=mask_PGS.reshape(p * group, -1),
        sampler_logp=rows(jnp.zeros((p, n), jnp.float32), results.logp, 0),
        prompt_id=jnp.repeat(prompts.id, group),
        sample_index=jnp.tile(jnp.arange(group, dtype=jnp.int32), p),
        policy_step=jnp.full(p * group, iteration, jnp.int32),
        finished=results.finished.reshape(-1),
        segments=(mask_PGS | in_prompt_PGS).astype(jnp.int32).reshape(p * group, -1),
        routing=results.routing and rows(*results.routing, -1),
    )
