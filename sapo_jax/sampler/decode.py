"""The device's part of a rollout: compiled programs that fill slots and decode.

A slot holds one prompt and its G completions. The prompt's keys and values are stored once; each
row has its own for the completion, at the clock (the number of decode steps so far) modulo
``max_new_tokens``: one contiguous write a step serves slots that started at different times.

On a mesh, each part of the rows has slots and prompts of its own: what is below works on one part,
with its own numbers of slots and prompts, and the parts only agree on when to stop.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from sapo_jax.model import attention, moe, transformer
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import collectives, sharding
from sapo_jax.sampler import sampling
from sapo_jax.sampler import weights as handover
from sapo_jax.types import LENGTH, STOP


@struct.dataclass
class Decoding:
    """The state of the decode loop; Q slots, G rows each."""

    clock: jax.Array  # i32[], decode steps done
    prompt_kv: Any  # per layer (keys, values) [Q, K, N, d]
    own_kv: Any  # per layer (keys, values) [Q, G, K, C, d]
    prompt: jax.Array  # i32[Q], index of the slot's prompt; P where the slot is empty
    length: jax.Array  # i32[Q], tokens of the prompt
    start: jax.Array  # i32[Q], clock at which the slot was filled
    token: jax.Array  # i32[Q, G], last token drawn, not in the cache yet
    done: jax.Array  # bool[Q, G]
    keys: jax.Array  # key[Q, G]
    tokens: jax.Array  # i32[P + 1, G, T], results; the last entry takes what empty slots write
    logp: jax.Array  # f32[P + 1, G, T]
    count: jax.Array  # i32[P + 1, G], tokens of the completion
    finished: jax.Array  # i32[P + 1, G], STOP or LENGTH
    routing: Any = (
        None  # MoE: experts of prompts [P + 1, N, L', k], completions [P + 1, G, T, L', k]
    )


WHOLE, ROWS = PartitionSpec(), sharding.spec("rows")


def specs() -> Decoding:
    """Where the state lies on a mesh, with one spec for each of its trees."""
    by_row = dict.fromkeys(Decoding.__dataclass_fields__, ROWS)
    caches = {
        "prompt_kv": sharding.spec("rows", "kv_heads"),
        "own_kv": sharding.spec("rows", None, "kv_heads"),
    }
    return Decoding(**by_row | {"clock": WHOLE} | caches)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6, 7))
def empty(
    config: ModelConfig,
    slots: int,
    size: int,
    prompts: int,
    width: int,
    group: int,
    t: int,
    mesh: Mesh | None = None,
) -> Decoding:
    """Q empty slots, with a completion cache of ``size`` and results for P prompts."""
    parts = sharding.parts(mesh)
    local = partial(_empty, config, slots // parts, size, prompts // parts, width, group, t)
    return sharding.shard_map(local, mesh, (), specs())()


def _empty(config: ModelConfig, q: int, size: int, prompts: int, width: int, group: int, t: int):
    kv, d = config.num_key_value_heads // collectives.axis_size("tensor"), config.head_dim

    def pair(*shape):
        return tuple(jnp.zeros(shape, config.cache_dtype) for _ in range(2))

    layers = range(config.num_hidden_layers)
    key = jax.random.key(0, impl="threefry2x32")
    return Decoding(
        clock=jnp.int32(0),
        prompt_kv=[pair(q, kv, width, d) for _ in layers],
        own_kv=[pair(q, group, kv, size, d) for _ in layers],
        prompt=jnp.full(q, prompts, jnp.int32),
        length=jnp.ones(q, jnp.int32),
        start=jnp.zeros(q, jnp.int32),
        token=jnp.zeros((q, group), jnp.int32),
        done=jnp.ones((q, group), bool),
        keys=jnp.broadcast_to(key, (q, group)),
        tokens=jnp.full((prompts + 1, group, t), config.pad_token, jnp.int32),
        logp=jnp.zeros((prompts + 1, group, t), jnp.float32),
        count=jnp.zeros((prompts + 1, group), jnp.int32),
        finished=jnp.zeros((prompts + 1, group), jnp.int32),
        routing=_no_routing(config, (prompts + 1, width), (prompts + 1, group, t)),
    )


def _no_routing(config: ModelConfig, *shapes: tuple[int, ...]) -> Any:
    """Nothing recorded yet, −1; None for a dense model."""
    if not config.num_experts:
        return None
    choice, dtype = (len(config.sparse_layers), config.num_experts_per_tok), moe.id_dtype(config)
    return tuple(jnp.full((*shape, *choice), -1, dtype) for shape in shapes)


def _join(routings: list) -> jax.Array | None:
    """The experts of all sparse layers, [..., L', k]."""
    chosen = [r.experts for r in routings if r is not None]
    return jnp.stack(chosen, -2) if chosen else None


def _draw_all(keys, index_Q, logits_QGV, controls, truncate):
    """Draw a token for each row: rows of a slot share the completion index."""
    one = partial(sampling.draw, c=controls, truncate=truncate)
    per_row = jax.vmap(lambda k, i, x: jax.vmap(lambda kk, xx: one(kk, i, xx))(k, x))
    return per_row(keys, index_Q, logits_QGV)


def _record(state: Decoding, config: ModelConfig, prompt_Q, index_Q, token_QG, logp_QG, live_QG):
    """Write the tokens just drawn into the results; returns the state and which rows ended."""
    t = state.tokens.shape[-1]
    stops_QG = jnp.isin(token_QG, jnp.asarray(config.stop_tokens))
    last_Q1 = (index_Q == t - 1)[:, None]
    at = (prompt_Q[:, None], jnp.arange(token_QG.shape[1])[None, :])
    at_token = (*at, index_Q[:, None])

    def put(buffer, index, new):
        return buffer.at[index].set(jnp.where(live_QG, new, buffer[index]))

    state = state.replace(
        tokens=put(state.tokens, at_token, token_QG),
        logp=put(state.logp, at_token, logp_QG),
        count=put(state.count, at, index_Q[:, None] + 1),
        finished=put(state.finished, at, jnp.where(stops_QG, STOP, LENGTH)),
    )
    return state, stops_QG | last_Q1


@partial(jax.jit, static_argnames=("config", "truncate", "mesh"), donate_argnames="state")
def fill_slots(
    weights, config, prompts, base, controls, state, slot_F, prompt_F, *, truncate, mesh=None
):
    """Fill slots with prompts (entries of slot_F that are Q fill nothing) and draw first tokens."""
    local = partial(_fill_slots, config, truncate)
    in_specs = (handover.specs(config), ROWS, WHOLE, WHOLE, specs(), ROWS, ROWS)
    arguments = (weights, prompts, base, controls, state, slot_F, prompt_F)
    return sharding.shard_map(local, mesh, in_specs, specs())(*arguments)


def _fill_slots(config, truncate, weights, prompts, base, controls, state, slot_F, prompt_F):
    q, group = state.done.shape
    tokens_FN = prompts.tokens.at[prompt_F].get(mode="clip")
    length_F = prompts.length.at[prompt_F].get(mode="clip")
    ids_F = prompts.id.at[prompt_F].get(mode="clip")
    segments_FN = jnp.ones_like(tokens_FN)
    rope = attention.rotary(attention.positions(segments_FN), config)
    x = transformer.embed(weights, config, tokens_FN)
    prompt_kv, routings = [], []
    for layer, cache in zip(weights["layers"], state.prompt_kv, strict=True):
        fresh = []

        def attend(q_, k, v, fresh=fresh):
            fresh.extend(jnp.swapaxes(y, 1, 2).astype(config.cache_dtype) for y in (k, v))
            return attention.causal(q_, k, v, segments_FN, config.attention)

        x, routed = transformer.layer(layer, config, x, rope, attend)
        routings.append(routed)
        prompt_kv.append(
            tuple(
                old.at[slot_F].set(new, mode="drop") for old, new in zip(cache, fresh, strict=True)
            )
        )
    last_FD = jnp.take_along_axis(x, (length_F - 1)[:, None, None], 1)[:, 0]
    last_FD = transformer.rms_norm(last_FD, weights["final_norm"], config.rms_norm_eps)
    logits_FV = transformer.logits_of(weights, config, last_FD)
    keys_FG = sampling.row_keys(base, ids_F, group)
    logits_FGV = jnp.broadcast_to(logits_FV[:, None], (*keys_FG.shape, logits_FV.shape[-1]))
    index_F = jnp.zeros_like(slot_F)
    token_FG, logp_FG = _draw_all(keys_FG, index_F, logits_FGV, controls, truncate)
    real_F = slot_F < q
    state, ended_FG = _record(
        state, config, jnp.where(real_F, prompt_F, state.tokens.shape[0] - 1), index_F,
        token_FG, logp_FG, jnp.broadcast_to(real_F[:, None], token_FG.shape),
    )  # fmt: skip

    def fill(old, new):
        return old.at[slot_F].set(new, mode="drop")

    return _keep_prompt_routing(state, routings, prompt_F).replace(
        prompt_kv=prompt_kv,
        prompt=fill(state.prompt, prompt_F),
        length=fill(state.length, length_F),
        start=fill(state.start, jnp.broadcast_to(state.clock, slot_F.shape)),
        token=fill(state.token, token_FG),
        done=fill(state.done, ended_FG),
        keys=fill(state.keys, keys_FG),
    )


def _keep_prompt_routing(state: Decoding, routings: list, prompt_F: jax.Array) -> Decoding:
    """Record what prefill routed; entries that fill nothing name a prompt out of range."""
    if state.routing is None:
        return state
    prompts, completions = state.routing
    prompts = prompts.at[prompt_F].set(_join(routings).astype(prompts.dtype), mode="drop")
    return state.replace(routing=(prompts, completions))


def _keep_routing(state: Decoding, routings: list, index_Q, live_QG) -> Decoding:
    """Record what the tokens just fed were routed to, at their place in the completion."""
    if state.routing is None:
        return state
    prompts, completions = state.routing
    at = (state.prompt[:, None], jnp.arange(live_QG.shape[1])[None, :], index_Q[:, None])
    new = jnp.where(live_QG[..., None, None], _join(routings), completions[at])
    return state.replace(routing=(prompts, completions.at[at].set(new.astype(completions.dtype))))


def step(weights, config, controls, truncate, state: Decoding) -> Decoding:
    """Feed the last tokens, draw the next."""
    _, n = state.prompt_kv[0][0].shape[1:3]
    c = state.own_kv[0][0].shape[3]
    t = state.tokens.shape[-1]
    index_Q = state.clock - state.start
    position_QG = jnp.broadcast_to((state.length + index_Q)[:, None], state.token.shape)
    rope = attention.rotary(position_QG, config)
    at = state.clock % t
    age_C = (state.clock - jnp.arange(c)) % t
    own_visible_QC = age_C[None, :] <= index_Q[:, None]
    prompt_visible_QN = jnp.arange(n)[None, :] < state.length[:, None]
    x = transformer.embed(weights, config, state.token)
    own_kv, routings = [], []
    for layer, prompt_kv, cache in zip(
        weights["layers"], state.prompt_kv, state.own_kv, strict=True
    ):
        fresh = []

        def attend(q, k, v, fresh=fresh, cache=cache, prompt_kv=prompt_kv):
            for old, new in zip(cache, (k, v), strict=True):
                update = new[:, :, :, None].astype(old.dtype)
                fresh.append(jax.lax.dynamic_update_slice_in_dim(old, update, at, 3))
            return attention.cached(q, prompt_kv, fresh, prompt_visible_QN, own_visible_QC)

        x, routed = transformer.layer(layer, config, x, rope, attend)
        routings.append(routed)
        own_kv.append(tuple(fresh))
    x = transformer.rms_norm(x, weights["final_norm"], config.rms_norm_eps)
    logits_QGV = transformer.logits_of(weights, config, x)
    token_QG, logp_QG = _draw_all(state.keys, index_Q + 1, logits_QGV, controls, truncate)
    live_QG = ~state.done
    state = _keep_routing(state, routings, jnp.minimum(index_Q, t - 1), live_QG)
    state, ended_QG = _record(
        state, config, state.prompt, jnp.minimum(index_Q + 1, t - 1), token_QG, logp_QG, live_QG
    )
    return state.replace(
        clock=state.clock + 1,
        own_kv=own_kv,
        token=jnp.where(live_QG, token_QG, config.pad_token),
        done=state.done | ended_QG,
    )


@partial(jax.jit, static_argnames=("config", "truncate", "mesh"), donate_argnames="state")
def decode(weights, config, controls, state, until, enough_n, quorum, *, truncate, mesh=None):
    """Decode until the clock reaches ``until``, or enough slots have finished.

    That is: in ``quorum`` of the n parts of the rows, at least as many as ``enough_n`` says for it.

    Returns:
      (state, bool[Q] on every device: which slots have finished).
    """
    local = partial(_decode, config, truncate)
    in_specs = (handover.specs(config), WHOLE, specs(), WHOLE, ROWS, WHOLE)
    arguments = (weights, controls, state, until, enough_n, quorum)
    return sharding.shard_map(local, mesh, in_specs, (specs(), WHOLE))(*arguments)


def _decode(config, truncate, weights, controls, state, until, enough_1, quorum):
    def agree(s):
        finished = jnp.sum(jnp.all(s.done, -1))
        return collectives.psum((finished >= enough_1[0]).astype(jnp.int32), sharding.ROWS)

    def go_on(carry):
        s, agreed = carry
        return (s.clock < until) & (agreed < quorum)

    def advance(carry):
        s = step(weights, config, controls, truncate, carry[0])
        return s, agree(s)

    state, _ = jax.lax.while_loop(go_on, advance, (state, agree(state)))
    return state, collectives.all_gather(jnp.all(state.done, -1), sharding.ROWS)


@partial(jax.jit, static_argnames=("size", "mesh"))
def grow(own_kv: Any, size: int, mesh: Mesh | None = None) -> Any:
    """Enlarge the completion cache."""
    larger = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, size - x.shape[3]), (0, 0))), own_kv
    )
    return sharding.constrain(larger, mesh, specs().own_kv)


@partial(jax.jit, static_argnames="mesh")
def take(state: Decoding, slots: jax.Array, mesh: Mesh | None = None) -> Decoding:
    """Keep some slots only, named by their place in their part of the rows."""

    def local(state, slots):
        names = ("prompt_kv", "own_kv", "prompt", "length", "start", "token", "done", "keys")
        kept = {name: jax.tree.map(lambda x: x[slots], getattr(state, name)) for name in names}
        return state.replace(**kept)

    return sharding.shard_map(local, mesh, (specs(), ROWS), specs())(state, slots)


@partial(jax.jit, static_argnames="mesh")
def completions(
    results: tuple[jax.Array, ...], prompt_Q: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, ...]:
    """What has been recorded of some prompts, named by their place in their part of the rows."""

    def local(results, prompt_Q):
        return jax.tree.map(lambda x: x[prompt_Q], results)

    return sharding.shard_map(local, mesh, ROWS, ROWS)(results, prompt_Q)


def prefill(
    weights, config, prompts, base, controls, state, slot_F, prompt_F, *, truncate, mesh=None
):
    """`fill_slots` around the completion caches, whose size would make it compile again."""
    arguments = (prompts, base, controls, state.replace(own_kv=None), slot_F, prompt_F)
    filled = fill_slots(weights, config, *arguments, truncate=truncate, mesh=mesh)
    return filled.replace(own_kv=state.own_kv)


base_key = jax.jit(sampling.base_key, static_argnames="domain")
