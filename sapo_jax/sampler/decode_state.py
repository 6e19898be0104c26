"""The state of a rollout on the device: slots, caches, and results that become rows.

A slot holds one prompt, whose keys and values are stored once, and W ≤ G rows. The completions of
the prompt flow through the rows: a row whose completion has ended takes the next one. Each row has
keys and values of its own, at the clock (the number of decode steps so far) modulo
``max_new_tokens``: one contiguous write a step serves rows that started at different times.

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

from sapo_jax.model import attention, moe
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import collectives, sharding
from sapo_jax.sampler.scheduler import Moves
from sapo_jax.types import LENGTH, STOP, Prompts, Rollout

WHOLE, ROWS = PartitionSpec(), sharding.spec("rows")
CACHE = sharding.spec("rows", "kv_heads")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a state, those of all parts of the rows together."""

    slots: int  # Q, prompts in flight
    rows: int  # W, of a slot
    cache: int  # C, completion tokens that have room in the cache
    prompts: int  # P, of the whole rollout
    width: int  # N, tokens of room for a prompt
    group_size: int  # G
    max_new_tokens: int  # T


@struct.dataclass
class Results:
    """What has been sampled, by prompt; the last entry takes what idle rows write."""

    tokens: jax.Array  # i32[P + 1, G, T], −1 where none is
    logp: jax.Array  # f32[P + 1, G, T]
    routing: Any = (
        None  # MoE: experts of prompts [P + 1, N, L', k], completions [P + 1, G, T, L', k]
    )


@struct.dataclass
class DecodeState:
    """The state of the decode loop; Q slots, W rows each."""

    clock: jax.Array  # i32[], decode steps done
    rope: tuple[jax.Array, jax.Array]  # of `attention.rotary` at positions 0 … N + T − 1
    prompt_kv: Any  # per layer (keys, values) [Q, K, N, d]
    completion_kv: Any  # per layer (keys, values) [Q·W, K, C, d]
    prompt: jax.Array  # i32[Q], index of the slot's prompt; P where the slot is empty
    length: jax.Array  # i32[Q], tokens of the prompt
    keys: jax.Array  # key[Q, G], of the prompt's completions
    token: jax.Array  # i32[Q, G], their first tokens
    order: jax.Array  # i32[Q, G], in which rows take them; those that ended at once come last
    first: jax.Array  # i32[Q], of those that wait, as a place in the order
    end: jax.Array  # i32[Q], behind the last of them
    live: jax.Array  # bool[Q, W], whether the row has a completion under way
    sample: jax.Array  # i32[Q, W], which one
    start: jax.Array  # i32[Q, W], clock at which its first token is fed
    last: jax.Array  # i32[Q, W], last token drawn, not in the cache yet
    results: Results


def partition_specs() -> DecodeState:
    """Where the state lies on a mesh, with one spec for each of its trees."""
    by_row = dict.fromkeys(DecodeState.__dataclass_fields__, ROWS)
    whole = {"clock": WHOLE, "rope": WHOLE}
    return DecodeState(**by_row | whole | {"prompt_kv": CACHE, "completion_kv": CACHE})


@partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def empty(config: ModelConfig, shape: Shape, mesh: Mesh | None = None) -> DecodeState:
    """Empty slots, and room for the results."""
    parts = sharding.parts(mesh)
    part = dataclasses.replace(shape, slots=shape.slots // parts, prompts=shape.prompts // parts)
    return sharding.shard_map(partial(_empty, config, part), mesh, (), partition_specs())()


def _empty(config: ModelConfig, shape: Shape) -> DecodeState:
    q, w, g, p = shape.slots, shape.rows, shape.group_size, shape.prompts
    kv, d = config.num_key_value_heads // collectives.axis_size("tensor"), config.head_dim
    completions = (p + 1, g, shape.max_new_tokens)

    def pair(*sizes):
        return tuple(jnp.zeros(sizes, config.cache_dtype) for _ in range(2))

    def integers(*sizes):
        return jnp.zeros(sizes, jnp.int32)

    layers = range(config.num_hidden_layers)
    return DecodeState(
        clock=jnp.int32(0),
        rope=attention.rotary(jnp.arange(shape.width + shape.max_new_tokens), config),
        prompt_kv=[pair(q, kv, shape.width, d) for _ in layers],
        completion_kv=[pair(q * w, kv, shape.cache, d) for _ in layers],
        prompt=jnp.full(q, p, jnp.int32),
        length=jnp.ones(q, jnp.int32),
        keys=jax.random.wrap_key_data(jnp.zeros((q, g, 2), jnp.uint32), impl="threefry2x32"),
        token=integers(q, g),
        order=integers(q, g),
        first=integers(q),
        end=integers(q),
        live=jnp.zeros((q, w), bool),
        sample=integers(q, w),
        start=integers(q, w),
        last=integers(q, w),
        results=Results(
            tokens=jnp.full(completions, -1, jnp.int32),
            logp=jnp.zeros(completions, jnp.float32),
            routing=_no_routing(config, (p + 1, shape.width), completions),
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
    """Enlarge the completion cache, or that of a layer."""
    larger = jax.tree.map(partial(_with_room, size), completion_kv)
    return sharding.constrain(larger, mesh, CACHE)


def _with_room(size: int, cache: jax.Array) -> jax.Array:
    return jnp.pad(cache, ((0, 0), (0, 0), (0, size - cache.shape[2]), (0, 0)))


@partial(jax.jit, static_argnames=("size", "mesh"))
def move_cache(
    prompt_kv: Any, completion_kv: Any, moves: Moves, size: int, mesh: Mesh | None = None
) -> tuple[Any, Any]:
    """The caches of a layer for other slots and rows, with a completion cache of this size."""

    def local(prompt_kv, completion_kv, moves):
        row_R = moves.row.reshape(-1)
        chosen = jax.tree.map(lambda x: x[moves.slot], prompt_kv)
        return chosen, jax.tree.map(lambda x: _with_room(size, x[row_R]), completion_kv)

    move = sharding.shard_map(local, mesh, (CACHE, CACHE, ROWS), (CACHE, CACHE))
    return move(prompt_kv, completion_kv, moves)


@partial(jax.jit, static_argnames="mesh")
def move_rows(state: DecodeState, moves: Moves, mesh: Mesh | None = None) -> DecodeState:
    """Other slots and rows of a state without caches and results; see `scheduler.Moves`."""

    def local(state, moves):
        def of(names, index, axes):
            trees = {name: getattr(state, name) for name in names}
            return {n: x.reshape(-1, *x.shape[axes:])[index] for n, x in trees.items()}

        return take(
            state.replace(
                **of(("prompt", "length", "keys", "token"), moves.slot, 1),
                **of(("sample", "start", "last"), moves.row, 2),
                order=moves.order,
                first=jnp.zeros_like(moves.waiting),
                end=moves.waiting,
                live=moves.live,
            )
        )

    specs = partition_specs().replace(prompt_kv=None, completion_kv=None, results=None)
    return sharding.shard_map(local, mesh, (specs, ROWS), specs)(state, moves)


def take(state: DecodeState) -> DecodeState:
    """Let the rows without a completion take those that wait in their slot, from this clock on.

    Its first token was drawn in the prefill, and the keys of its prompt are there.
    """
    rows = jnp.arange(state.live.shape[1])
    free_QW = ~state.live
    before_QW = jnp.sum(
        free_QW[:, None] & (rows < rows[:, None]), -1
    )  # compiles faster than cumsum
    place_QW = state.first[:, None] + before_QW
    takes_QW = free_QW & (place_QW < state.end[:, None])
    last_place = state.order.shape[1] - 1
    next_QW = jnp.take_along_axis(state.order, jnp.clip(place_QW, 0, last_place), 1)
    return state.replace(
        live=state.live | takes_QW,
        first=state.first + jnp.sum(takes_QW, -1),
        sample=jnp.where(takes_QW, next_QW, state.sample),
        start=jnp.where(takes_QW, state.clock, state.start),
        last=jnp.where(takes_QW, jnp.take_along_axis(state.token, next_QW, 1), state.last),
    )


def ends(config: ModelConfig, token_X: jax.Array, index_X: jax.Array, limit: int) -> jax.Array:
    """Whether a completion ends with the token at its index."""
    return jnp.isin(token_X, jnp.asarray(config.stop_tokens)) | (index_X == limit - 1)


def write_prompt_routing(results: Results, routings: list, prompt_F: jax.Array) -> Results:
    """Record what prefill routed; entries that fill nothing name a prompt out of range."""
    if results.routing is None:
        return results
    prompts, completions = results.routing
    experts = _experts(routings).astype(prompts.dtype)
    return results.replace(routing=(prompts.at[prompt_F].set(experts, mode="drop"), completions))


def write(state: DecodeState, index_QW, token_QW, logp_QW, routings: list) -> Results:
    """Note what live rows have drawn, for the place behind ``index_QW``, and what they were fed.

    Tokens and log-probabilities of the completion's next token; the experts of the one just fed.
    """
    results = state.results
    nowhere, limit = results.tokens.shape[0] - 1, results.tokens.shape[2]
    prompt_QW = jnp.where(state.live, state.prompt[:, None], nowhere)
    index_QW = jnp.minimum(index_QW, limit - 2)  # of idle rows it goes on
    at, after = ((prompt_QW, state.sample, index_QW + i) for i in (0, 1))
    if results.routing is not None:
        prompts, completions = results.routing
        experts = _experts(routings).astype(completions.dtype)
        results = results.replace(routing=(prompts, completions.at[at].set(experts)))
    return results.replace(
        tokens=results.tokens.at[after].set(token_QW), logp=results.logp.at[after].set(logp_QW)
    )


def _experts(routings: list) -> jax.Array:
    """The experts of all sparse layers, [..., L', k]."""
    return jnp.stack([r.experts for r in routings if r is not None], -2)


def _finished(config: ModelConfig, tokens_XT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens with pads, their count, and STOP or LENGTH."""
    drawn_XT = tokens_XT >= 0
    stopped_X = jnp.any(jnp.isin(tokens_XT, jnp.asarray(config.stop_tokens)), -1)
    tokens_XT = jnp.where(drawn_XT, tokens_XT, config.pad_token)
    return tokens_XT, jnp.sum(drawn_XT, -1), jnp.where(stopped_X, STOP, LENGTH)


@partial(jax.jit, static_argnames=("config", "mesh"))
def completions(
    config: ModelConfig, results: Results, prompt_Q: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, count and finished of some prompts, by their place in their part of the rows."""

    def local(tokens, prompt_Q):
        return _finished(config, tokens[prompt_Q])

    return sharding.shard_map(local, mesh, ROWS, ROWS)(results.tokens, prompt_Q)


@partial(jax.jit, static_argnames=("config", "mesh"))
def to_rollout(
    config: ModelConfig, results: Results, prompts: Prompts, iteration, mesh: Mesh | None = None
) -> Rollout:
    """Prompts and completions as left-aligned, gap-free rows."""
    local = sharding.shard_map(partial(_to_rollout, config), mesh, (ROWS, ROWS, WHOLE), ROWS)
    return local(results, prompts, iteration)


def _to_rollout(config, results, prompts, iteration) -> Rollout:
    results = jax.tree.map(lambda x: x[:-1], results)
    tokens_PGT, count_PG, finished_PG = _finished(config, results.tokens)
    p, n = prompts.tokens.shape
    group, t = tokens_PGT.shape[1:]
    offset_PGS = jnp.arange(n + t)[None, None, :] - prompts.length[:, None, None]
    offset_PGS = jnp.broadcast_to(offset_PGS, (p, group, n + t))
    in_prompt_PGS = offset_PGS < 0
    mask_PGS = ~in_prompt_PGS & (offset_PGS < count_PG[..., None])

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
        tokens=rows(prompts.tokens, tokens_PGT, config.pad_token),
        mask=mask_PGS.reshape(p * group, -1),
        sampler_logp=rows(jnp.zeros((p, n), jnp.float32), results.logp, 0),
        prompt_id=jnp.repeat(prompts.id, group),
        sample_index=jnp.tile(jnp.arange(group, dtype=jnp.int32), p),
        policy_step=jnp.full(p * group, iteration, jnp.int32),
        finished=finished_PG.reshape(-1),
        segments=(mask_PGS | in_prompt_PGS).astype(jnp.int32).reshape(p * group, -1),
        routing=results.routing and rows(*results.routing, -1),
    )
