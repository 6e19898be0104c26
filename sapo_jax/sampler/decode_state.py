"""The state of a rollout on the device: slots, rows, and their caches.

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
from jax.sharding import Mesh

from sapo_jax.model import attention
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import collectives, sharding
from sapo_jax.sampler import results
from sapo_jax.sampler.results import ROWS, WHOLE, Results
from sapo_jax.sampler.scheduler import Moves

CACHE = sharding.spec("slots", "kv_heads")


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
class DecodeState:
    """The state of the decode loop; Q slots, W rows each."""

    clock: jax.Array  # i32[], decode steps done
    rope: tuple[jax.Array, jax.Array]  # of `attention.rotary` at positions 0 … N + T − 1
    prompt_kv: Any  # per layer (keys, values) [Q, K, N, d]
    completion_kv: Any  # per layer (keys, values) [Q·W, K, C, d]
    prompt: jax.Array  # i32[Q], index of the slot's prompt; P where the slot is empty
    length: jax.Array  # i32[Q], tokens of the prompt
    delta: jax.Array  # i32[Q], ≤ 0: what follows it is at its index + delta, see `vision`
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
    parts = sharding.parts(mesh, "slots")
    part = dataclasses.replace(shape, slots=shape.slots // parts, prompts=shape.prompts // parts)
    return sharding.shard_map(partial(_empty, config, part), mesh, (), partition_specs())()


def _empty(config: ModelConfig, shape: Shape) -> DecodeState:
    q, w, g, p = shape.slots, shape.rows, shape.group_size, shape.prompts
    kv, d = config.num_key_value_heads // collectives.axis_size("tensor"), config.head_dim

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
        delta=integers(q),
        keys=jax.random.wrap_key_data(jnp.zeros((q, g, 2), jnp.uint32), impl="threefry2x32"),
        token=integers(q, g),
        order=integers(q, g),
        first=integers(q),
        end=integers(q),
        live=jnp.zeros((q, w), bool),
        sample=integers(q, w),
        start=integers(q, w),
        last=integers(q, w),
        results=results.empty(config, p, shape.width, shape.group_size, shape.max_new_tokens),
    )


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
                **of(("prompt", "length", "delta", "keys", "token"), moves.slot, 1),
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
    # A cumsum, which takes longer to compile.
    before_QW = jnp.sum(free_QW[:, None] & (rows < rows[:, None]), -1)
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
