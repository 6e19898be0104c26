"""The device's part of a rollout: compiled programs that fill slots, decode, and assemble rows.

A slot holds one prompt and its G completions. The prompt's keys and values are stored once; each
row has its own for the completion, at the clock (the number of decode steps so far) modulo
``max_new_tokens``: one contiguous write a step serves slots that started at different times.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sapo_jax import sampling
from sapo_jax.model import attention, moe, params, transformer
from sapo_jax.model.config import ModelConfig
from sapo_jax.types import LENGTH, STOP, Prompts, Rollout


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


@partial(jax.jit, static_argnames="config")
def _convert(weights: Any, config: ModelConfig) -> Any:
    def cast(path, x):  # a router decides in f32, in the sampler as in the learner
        is_router = getattr(path[-1], "key", None) == "router"
        return x if is_router else x.astype(config.compute_dtype)

    converted = jax.tree.map_with_path(cast, weights)
    return {**converted, "layers": params.unstack(converted["layers"], config)}


def to_sampler(weights: Any, config: ModelConfig) -> Any:
    """Parameters as the sampler reads them: compute dtype, one leaf per layer.

    Decoding from slices of stacked weights would copy them at each step. What has the dtype and
    the layout already comes back as it is, buffers included.
    """
    if isinstance(weights["layers"], list):
        return weights
    dtype = jnp.dtype(config.compute_dtype)
    same = {k: jnp.asarray(v) for k, v in weights.items() if k != "layers" and v.dtype == dtype}
    return _convert({k: v for k, v in weights.items() if k not in same}, config) | same


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def empty(
    config: ModelConfig, slots: int, size: int, prompts: int, width: int, group: int, t: int
) -> Decoding:
    """Q empty slots, with a completion cache of ``size`` and results for P prompts."""
    q = slots
    kv, d = config.num_key_value_heads, config.head_dim

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


@partial(jax.jit, static_argnames=("config", "truncate"), donate_argnames="state")
def fill_slots(weights, config, prompts, base, controls, state, slot_F, prompt_F, *, truncate):
    """Fill slots with prompts (entries of slot_F that are Q fill nothing) and draw first tokens."""
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
            return attention.causal(q_, k, v, segments_FN)

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


@partial(jax.jit, static_argnames=("config", "truncate"), donate_argnames="state")
def decode(weights, config, controls, state, until, enough, *, truncate):
    """Decode until the clock reaches ``until`` or at least ``enough`` slots have finished."""

    def go_on(s):
        finished = jnp.sum(jnp.all(s.done, -1))
        return (s.clock < until) & (finished < enough)

    state = jax.lax.while_loop(go_on, partial(step, weights, config, controls, truncate), state)
    return state, jnp.all(state.done, -1)


@partial(jax.jit, static_argnames="size")
def grow(own_kv: Any, size: int) -> Any:
    """Enlarge the completion cache."""
    return jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, size - x.shape[3]), (0, 0))), own_kv
    )


@jax.jit
def take(state: Decoding, slots: jax.Array) -> Decoding:
    """Keep some slots only."""
    names = ("prompt_kv", "own_kv", "prompt", "length", "start", "token", "done", "keys")
    kept = {name: jax.tree.map(lambda x: x[slots], getattr(state, name)) for name in names}
    return state.replace(**kept)


@jax.jit
def completions(results: tuple[jax.Array, ...], prompt_Q: jax.Array) -> tuple[jax.Array, ...]:
    """What has been recorded of some prompts; entries out of range repeat the last prompt's."""
    return jax.tree.map(lambda x: x.at[prompt_Q].get(mode="clip"), results)


@partial(jax.jit, static_argnames="config")
def assemble(config, results, prompts: Prompts, iteration, routing=None) -> Rollout:
    """Join prompts and completions into left-aligned, gap-free rows."""
    tokens_PGT, logp_PGT, count_PG, finished_PG = (x[:-1] for x in results)
    p, n = prompts.tokens.shape
    group, t = tokens_PGT.shape[1:]
    length_P1 = prompts.length[:, None]
    s = n + t
    index_S = jnp.arange(s)[None, None, :]
    offset = index_S - length_P1[..., None]
    inside = (offset >= 0) & (offset < count_PG[..., None])

    def place(values_PGT, fill):
        gathered = jnp.take_along_axis(
            values_PGT, jnp.broadcast_to(jnp.clip(offset, 0, t - 1), (p, group, s)), -1
        )
        return jnp.where(inside, gathered, fill)

    prompt_PS = jnp.pad(prompts.tokens, ((0, 0), (0, t)), constant_values=config.pad_token)
    in_prompt = offset < 0
    tokens = jnp.where(in_prompt, prompt_PS[:, None], place(tokens_PGT, config.pad_token))
    rows = partial(jnp.reshape, shape=(p * group, s))
    return Rollout(
        tokens=rows(tokens),
        mask=rows(inside),
        sampler_logp=rows(place(logp_PGT, 0.0)),
        prompt_id=jnp.repeat(prompts.id, group),
        sample_index=jnp.tile(jnp.arange(group, dtype=jnp.int32), p),
        policy_step=jnp.full(p * group, iteration, jnp.int32),
        finished=finished_PG.reshape(-1),
        segments=rows((inside | in_prompt).astype(jnp.int32)),
        routing=None if routing is None else _assemble_routing(routing, offset, inside, in_prompt),
    )


def _assemble_routing(routing, offset_PGS, inside_PGS, in_prompt_PGS) -> jax.Array:
    """Routing of prompts and completions at their places in the rows, [B, S, L', k]."""
    prompts, completions = (x[:-1] for x in routing)
    p, g, s = inside_PGS.shape
    t, *choice = completions.shape[2:]
    prompts = jnp.pad(prompts, ((0, 0), (0, t), (0, 0), (0, 0)), constant_values=-1)[:, None]
    index = jnp.broadcast_to(jnp.clip(offset_PGS, 0, t - 1), (p, g, s))[..., None, None]
    own = jnp.take_along_axis(completions, index, 2)
    own = jnp.where(inside_PGS[..., None, None], own, jnp.asarray(-1, own.dtype))
    in_prompt = jnp.broadcast_to(in_prompt_PGS, (p, g, s))[..., None, None]
    return jnp.where(in_prompt, prompts, own).reshape(p * g, s, *choice)


def prefill(weights, config, prompts, base, controls, state, slot_F, prompt_F, *, truncate):
    """`fill_slots` around the completion caches, whose size would make it compile again."""
    arguments = (prompts, base, controls, state.replace(own_kv=None), slot_F, prompt_F)
    filled = fill_slots(weights, config, *arguments, truncate=truncate)
    return filled.replace(own_kv=state.own_kv)


base_key = jax.jit(sampling.base_key, static_argnames="domain")
