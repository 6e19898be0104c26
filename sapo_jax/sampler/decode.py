"""The device's part of a rollout: compiled programs that fill slots and decode.

What is below works on one part of the rows, with its own slots and prompts (see `decode_state`);
on a mesh the parts only agree on when to stop.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sapo_jax.model import attention, transformer
from sapo_jax.parallel import collectives, sharding
from sapo_jax.sampler import decode_state, sampling, weights
from sapo_jax.sampler.decode_state import ROWS, WHOLE, DecodeState


def _draw_rows(keys_QG, index_Q, logits_QGV, controls, truncate):
    """Draw a token for each row: rows of a slot share the completion index."""
    one = partial(sampling.draw, c=controls, truncate=truncate)
    per_row = jax.vmap(lambda k, i, x: jax.vmap(lambda kk, xx: one(kk, i, xx))(k, x))
    return per_row(keys_QG, index_Q, logits_QGV)


def prefill(
    params, config, prompts, base, controls, state, slot_F, prompt_F, *, truncate, mesh=None
) -> DecodeState:
    """`fill_slots` around the completion caches, whose size would make it compile again."""
    arguments = (prompts, base, controls, state.replace(completion_kv=None), slot_F, prompt_F)
    filled = fill_slots(params, config, *arguments, truncate=truncate, mesh=mesh)
    return filled.replace(completion_kv=state.completion_kv)


@partial(jax.jit, static_argnames=("config", "truncate", "mesh"), donate_argnames="state")
def fill_slots(
    params, config, prompts, base, controls, state, slot_F, prompt_F, *, truncate, mesh=None
) -> DecodeState:
    """Fill slots with prompts (entries of slot_F that are Q fill nothing) and draw first tokens."""
    local, specs = partial(_fill_slots, config, truncate), decode_state.partition_specs()
    in_specs = (weights.partition_specs(config), ROWS, WHOLE, WHOLE, specs, ROWS, ROWS)
    arguments = (params, prompts, base, controls, state, slot_F, prompt_F)
    return sharding.shard_map(local, mesh, in_specs, specs)(*arguments)


def _fill_slots(config, truncate, params, prompts, base, controls, state, slot_F, prompt_F):
    q, group = state.done.shape
    # Entries that fill nothing compute some prompt; what they write is dropped.
    own = jax.tree.map(lambda x: x.at[prompt_F].get(mode="clip"), prompts)
    tokens_FN, length_F = own.tokens, own.length

    def fill(old, new):
        return old.at[slot_F].set(new, mode="drop")

    # Pads stand after the prompt, where causal attention never looks: one segment will do.
    segments_FN = jnp.ones_like(tokens_FN)
    rope = attention.rotary(attention.positions(segments_FN), config)
    x = transformer.embed(params, config, tokens_FN)
    prompt_kv, routings = [], []
    for layer, cache in zip(params["layers"], state.prompt_kv, strict=True):
        fresh = []

        def attend(q_, k, v, fresh=fresh):
            fresh.extend(jnp.swapaxes(y, 1, 2).astype(config.cache_dtype) for y in (k, v))
            return attention.causal(q_, k, v, segments_FN, config.attention)

        x, routed = transformer.layer(layer, config, x, rope, attend)
        routings.append(routed)
        prompt_kv.append(tuple(fill(old, new) for old, new in zip(cache, fresh, strict=True)))
    last_FD = jnp.take_along_axis(x, (length_F - 1)[:, None, None], 1)[:, 0]
    last_FD = transformer.rms_norm(last_FD, params["final_norm"], config.rms_norm_eps)
    logits_FV = transformer.logits_of(params, config, last_FD)
    # All completions of a prompt draw their first token from the same logits.
    keys_FG = sampling.row_keys(base, own.id, group, own.occurrence)
    logits_FGV = jnp.broadcast_to(logits_FV[:, None], (*keys_FG.shape, logits_FV.shape[-1]))
    index_F = jnp.zeros_like(slot_F)
    token_FG, logp_FG = _draw_rows(keys_FG, index_F, logits_FGV, controls, truncate)
    real_F = slot_F < q
    results, ended_FG = decode_state.write_tokens(
        state.results, config,
        jnp.where(real_F, prompt_F, state.results.tokens.shape[0] - 1), index_F,
        token_FG, logp_FG, jnp.broadcast_to(real_F[:, None], token_FG.shape),
    )  # fmt: skip
    return state.replace(
        prompt_kv=prompt_kv,
        prompt=fill(state.prompt, prompt_F),
        length=fill(state.length, length_F),
        start=fill(state.start, jnp.broadcast_to(state.clock, slot_F.shape)),
        token=fill(state.token, token_FG),
        done=fill(state.done, ended_FG),
        keys=fill(state.keys, keys_FG),
        results=decode_state.write_prompt_routing(results, routings, prompt_F),
    )


def step(params, config, controls, truncate, state: DecodeState) -> DecodeState:
    """Feed the last tokens, draw the next."""
    n, c = state.prompt_kv[0][0].shape[2], state.completion_kv[0][0].shape[3]
    t = state.results.tokens.shape[-1]
    index_Q = state.clock - state.start  # of the token that is fed, in its completion
    position_QG = jnp.broadcast_to((state.length + index_Q)[:, None], state.token.shape)
    rope = attention.rotary(position_QG, config)
    # All rows write at one place of the cache, whenever their slot was filled; no completion is
    # longer than T, so nothing is overwritten that is still read. Entries older than the slot's
    # first token are of the group before, and are not visible. While C < T, the clock is below C.
    at = state.clock % t
    age_C = (state.clock - jnp.arange(c)) % t
    completion_visible_QC = age_C[None, :] <= index_Q[:, None]
    prompt_visible_QN = jnp.arange(n)[None, :] < state.length[:, None]
    x = transformer.embed(params, config, state.token)
    completion_kv, routings = [], []
    for layer, prompt_kv, cache in zip(
        params["layers"], state.prompt_kv, state.completion_kv, strict=True
    ):
        fresh = []

        def attend(q, k, v, fresh=fresh, cache=cache, prompt_kv=prompt_kv):
            for old, new in zip(cache, (k, v), strict=True):
                update = new[:, :, :, None].astype(old.dtype)
                fresh.append(jax.lax.dynamic_update_slice_in_dim(old, update, at, 3))
            visible = (prompt_visible_QN, completion_visible_QC)
            return attention.cached(q, prompt_kv, fresh, *visible)

        x, routed = transformer.layer(layer, config, x, rope, attend)
        routings.append(routed)
        completion_kv.append(tuple(fresh))
    x = transformer.rms_norm(x, params["final_norm"], config.rms_norm_eps)
    logits_QGV = transformer.logits_of(params, config, x)
    token_QG, logp_QG = _draw_rows(state.keys, index_Q + 1, logits_QGV, controls, truncate)
    # Rows that are done go on until their slot is refilled, with pads and writing nothing: shapes
    # are fixed. Their index may run beyond T, hence the minimum.
    live_QG, prompt_Q = ~state.done, state.prompt
    results = decode_state.write_routing(
        state.results, routings, prompt_Q, jnp.minimum(index_Q, t - 1), live_QG
    )
    results, ended_QG = decode_state.write_tokens(
        results, config, prompt_Q, jnp.minimum(index_Q + 1, t - 1), token_QG, logp_QG, live_QG
    )
    return state.replace(
        clock=state.clock + 1,
        completion_kv=completion_kv,
        token=jnp.where(live_QG, token_QG, config.pad_token),
        done=state.done | ended_QG,
        results=results,
    )


@partial(jax.jit, static_argnames=("config", "truncate", "mesh"), donate_argnames="state")
def decode(params, config, controls, state, until, enough_n, quorum, *, truncate, mesh=None):
    """Decode until the clock reaches ``until``, or enough slots have finished.

    That is: in ``quorum`` of the n parts of the rows, at least as many as ``enough_n`` says for it.

    Returns:
      (state, bool[Q] on every device: which slots have finished).
    """
    local, specs = partial(_decode, config, truncate), decode_state.partition_specs()
    in_specs = (weights.partition_specs(config), WHOLE, specs, WHOLE, ROWS, WHOLE)
    arguments = (params, controls, state, until, enough_n, quorum)
    return sharding.shard_map(local, mesh, in_specs, (specs, WHOLE))(*arguments)


def _decode(config, truncate, params, controls, state, until, enough_1, quorum):
    def agree(s):
        finished = jnp.sum(jnp.all(s.done, -1))
        return collectives.psum((finished >= enough_1[0]).astype(jnp.int32), sharding.ROWS)

    # A step may hold collectives, so all parts take equally many: they stop by one sum.
    def go_on(carry):
        s, agreed = carry
        return (s.clock < until) & (agreed < quorum)

    def advance(carry):
        s = step(params, config, controls, truncate, carry[0])
        return s, agree(s)

    state, _ = jax.lax.while_loop(go_on, advance, (state, agree(state)))
    return state, collectives.all_gather(jnp.all(state.done, -1), sharding.ROWS)
