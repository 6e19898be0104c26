"""The device's part of a rollout: compiled programs that fill slots and decode.

What is below works on one part of the rows, with its own slots and prompts (see `decode_state`);
on a mesh the parts only agree on when to stop. Where several runs lie side by side on it, the
parameters, the noise's base and the controls have a leading axis R, and a part is of one run.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sapo_jax.model import attention, transformer, vision
from sapo_jax.parallel import collectives, runs, sharding
from sapo_jax.sampler import decode_state, images, results, sampling, weights
from sapo_jax.sampler.decode_state import DecodeState
from sapo_jax.sampler.results import ROWS, WHOLE


def _draw_rows(keys_XY, index_XY, logits_XYV, controls, truncate):
    """Draw a token for each row."""
    one = partial(sampling.draw, c=controls, truncate=truncate)
    return jax.vmap(jax.vmap(one))(keys_XY, index_XY, logits_XYV)


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
    own = sharding.by_run((weights.partition_specs(config), WHOLE, WHOLE), mesh)
    in_specs = (own[0], ROWS, *own[1:], specs, ROWS, ROWS)
    arguments = (params, prompts, base, controls, state, slot_F, prompt_F)
    return sharding.shard_map(local, mesh, in_specs, specs)(*arguments)


def _read(params, config, state, tokens_BN, sight, caches, write):
    """Left-aligned rows through the layers; each layer's keys and values [B, K, N, d] are given to
    ``write`` with its caches.
    """
    # Pads stand at the end, where causal attention never looks: one segment will do.
    segments_BN = jnp.ones_like(tokens_BN)
    rope = jax.tree.map(lambda x: x[: tokens_BN.shape[1]], state.rope)
    x = transformer.embed(params, config, tokens_BN)
    if sight is not None:
        rope, x = vision.rotary(sight.positions, config), sight.embed(x)
    written, routings = [], []
    for n, (layer, cache) in enumerate(zip(params["layers"], caches, strict=True)):
        fresh = []

        def attend(q_, k, v, fresh=fresh):
            fresh.extend(jnp.swapaxes(y, 1, 2).astype(config.cache_dtype) for y in (k, v))
            return attention.causal(q_, k, v, segments_BN, config.attention)

        x, routed = transformer.layer(layer, config, x, rope, attend)
        x = x if sight is None else sight.add(x, n)
        routings.append(routed)
        written.append(tuple(write(old, new) for old, new in zip(cache, fresh, strict=True)))
    return x, written, routings


def _fill_slots(config, truncate, params, prompts, base, controls, state, slot_F, prompt_F):
    params, base, controls = map(runs.of_device, (params, base, controls))
    group = state.order.shape[1]
    # Entries that fill nothing compute some prompt; what they write is dropped.
    own = jax.tree.map(lambda x: x.at[prompt_F].get(mode="clip"), prompts)
    tokens_FN, length_F = own.tokens, own.length

    def fill(old, new):
        return old.at[slot_F].set(new, mode="drop")

    sight = images.sight(config, own.images, tokens_FN)
    delta_F = jnp.zeros_like(length_F) if sight is None else sight.delta
    x, prompt_kv, routings = _read(params, config, state, tokens_FN, sight, state.prompt_kv, fill)
    last_FD = jnp.take_along_axis(x, (length_F - 1)[:, None, None], 1)[:, 0]
    last_FD = transformer.rms_norm(last_FD, params["final_norm"], config.rms_norm_eps)
    logits_FV = transformer.logits_of(params, config, last_FD)
    # All completions of a prompt draw their first token from the same logits.
    keys_FG = sampling.row_keys(base, own.id, group, own.occurrence, own.iteration)
    logits_FGV = jnp.broadcast_to(logits_FV[:, None], (*keys_FG.shape, logits_FV.shape[-1]))
    index_FG = jnp.zeros(keys_FG.shape, jnp.int32)
    token_FG, logp_FG = _draw_rows(keys_FG, index_FG, logits_FGV, controls, truncate)
    sampled = state.results
    token_FG, logp_FG = (  # of a completion that goes on, those that it has
        jnp.where(sampled.tokens[prompt_F, :, 0] < 0, new, old[prompt_F, :, 0])
        for old, new in ((sampled.tokens, token_FG), (sampled.logp, logp_FG))
    )
    ended_FG = results.ends(config, token_FG, index_FG, sampled.tokens.shape[-1])
    sampled = sampled.replace(  # entries that fill nothing name the last prompt, which is none
        tokens=sampled.tokens.at[prompt_F, :, 0].set(token_FG),
        logp=sampled.logp.at[prompt_F, :, 0].set(logp_FG),
    )
    filled = state.replace(
        prompt_kv=prompt_kv,
        prompt=fill(state.prompt, prompt_F),
        length=fill(state.length, length_F),
        delta=fill(state.delta, delta_F),
        keys=fill(state.keys, keys_FG),
        token=fill(state.token, token_FG),
        order=fill(state.order, jnp.argsort(ended_FG, axis=-1, stable=True).astype(jnp.int32)),
        first=fill(state.first, jnp.zeros_like(slot_F)),
        end=fill(state.end, jnp.sum(~ended_FG, -1)),
        results=results.write_prompt_routing(sampled, routings, prompt_F),
    )
    return decode_state.take(filled)


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="state")
def resume_slots(params, config, prompts, state, slot_F, prompt_F, *, mesh=None) -> DecodeState:
    """Let slots, just filled, go on where the results of their prompts end.

    Each completion takes a row of its own (W = G), and its keys and values are computed by one pass
    over prompt and completion, at the places of the cache (of its largest size) that decoding would
    have put them at.
    """
    local, specs = partial(_resume_slots, config), decode_state.partition_specs()
    in_specs = (weights.partition_specs(config), ROWS, specs, ROWS, ROWS)
    arguments = (params, prompts, state, slot_F, prompt_F)
    return sharding.shard_map(local, mesh, in_specs, specs)(*arguments)


def _resume_slots(config, params, prompts, state, slot_F, prompt_F):
    own = jax.tree.map(lambda x: x.at[prompt_F].get(mode="clip"), prompts)
    drawn_FGT = state.results.tokens.at[prompt_F].get(mode="clip")
    f, g, t = drawn_FGT.shape
    n, size = own.tokens.shape[1], state.completion_kv[0][0].shape[2]
    count_FG = jnp.sum(drawn_FGT >= 0, -1)
    last_FG = jnp.take_along_axis(drawn_FGT, count_FG[..., None] - 1, 2)[..., 0]
    ended_FG = results.ends(config, last_FG, count_FG - 1, t)
    offset_FGS = jnp.arange(n + t) - own.length[:, None, None]
    index_FGS = jnp.broadcast_to(jnp.clip(offset_FGS, 0, t - 1), (f, g, n + t))
    prompt_FGS = jnp.pad(own.tokens, ((0, 0), (0, t)))[:, None]
    drawn_FGS = jnp.maximum(jnp.take_along_axis(drawn_FGT, index_FGS, 2), 0)
    tokens_FGS = jnp.where(offset_FGS < 0, prompt_FGS, drawn_FGS)
    # The last token drawn is not in the cache yet; it is fed at this clock. See `step`.
    age_C = (state.clock - jnp.arange(size)) % t
    token_FGC = count_FG[..., None] - 1 - age_C
    place_FGC = jnp.clip(own.length[:, None, None] + token_FGC, 0, n + t - 1)

    def write(old, new_BKSd):
        moved = jnp.take_along_axis(new_BKSd, place_FGC.reshape(f * g, 1, size, 1), 2)
        by_slot = old.reshape(-1, g, *old.shape[1:])
        written = by_slot.at[slot_F].set(moved.reshape(f, g, *old.shape[1:]), mode="drop")
        return written.reshape(old.shape)

    rows_BS = tokens_FGS.reshape(f * g, n + t)
    sight = images.sight(config, own.images, rows_BS, g)
    _, completion_kv, _ = _read(params, config, state, rows_BS, sight, state.completion_kv, write)

    def fill(old, new):
        return old.at[slot_F].set(new, mode="drop")

    none_F, every_FG = jnp.zeros_like(slot_F), jnp.broadcast_to(jnp.arange(g), (f, g))
    return state.replace(
        completion_kv=completion_kv,
        first=fill(state.first, none_F),
        end=fill(state.end, none_F),
        live=fill(state.live, ~ended_FG),
        sample=fill(state.sample, every_FG),
        start=fill(state.start, state.clock - (count_FG - 1)),
        last=fill(state.last, last_FG),
    )


def step(params, config, controls, truncate, state: DecodeState) -> DecodeState:
    """Feed the last tokens, draw the next."""
    n, c = state.prompt_kv[0][0].shape[2], state.completion_kv[0][0].shape[2]
    t = state.results.tokens.shape[-1]
    index_QW = state.clock - state.start  # of the token that is fed, in its completion
    position_QW = (state.length + state.delta)[:, None] + index_QW
    rope = jax.tree.map(lambda x: x[position_QW], state.rope)
    # All rows write at one place of the cache, whenever they started; no completion is longer than
    # T, so nothing is overwritten that is still read. Entries older than the row's first token are
    # of the completion before, and are not visible. While C < T, the clock is below C.
    at = state.clock % t
    age_C = (state.clock - jnp.arange(c)) % t
    completion_visible_QWC = age_C <= index_QW[..., None]
    prompt_visible_QN = jnp.arange(n)[None, :] < state.length[:, None]
    x = transformer.embed(params, config, state.last)
    completion_kv, routings = [], []
    for layer, prompt_kv, cache in zip(
        params["layers"], state.prompt_kv, state.completion_kv, strict=True
    ):
        fresh = []

        def attend(q, k, v, fresh=fresh, cache=cache, prompt_kv=prompt_kv):
            for old, new in zip(cache, (k, v), strict=True):
                update = new.reshape(-1, *new.shape[2:])[:, :, None].astype(old.dtype)
                fresh.append(jax.lax.dynamic_update_slice_in_dim(old, update, at, 2))
            visible = (prompt_visible_QN, completion_visible_QWC)
            return attention.cached(q, prompt_kv, fresh, *visible)

        x, routed = transformer.layer(layer, config, x, rope, attend)
        routings.append(routed)
        completion_kv.append(tuple(fresh))
    x = transformer.rms_norm(x, params["final_norm"], config.rms_norm_eps)
    logits_QWV = transformer.logits_of(params, config, x)
    keys_QW = jnp.take_along_axis(state.keys, state.sample, 1)
    token_QW, logp_QW = _draw_rows(keys_QW, index_QW + 1, logits_QWV, controls, truncate)
    ended_QW = results.ends(config, token_QW, index_QW + 1, t)
    # Rows that have nothing to take go on, writing to no prompt: shapes are fixed.
    prompt_QW = jnp.where(state.live, state.prompt[:, None], len(state.results.tokens) - 1)
    stepped = state.replace(
        clock=state.clock + 1,
        completion_kv=completion_kv,
        live=state.live & ~ended_QW,
        last=token_QW,
        results=results.write(
            state.results, prompt_QW, state.sample, index_QW, token_QW, logp_QW, routings
        ),
    )
    return decode_state.take(stepped)


@partial(jax.jit, static_argnames=("config", "truncate", "mesh"), donate_argnames="state")
def decode(params, config, controls, state, until, limits_2n, quorum, *, truncate, mesh=None):
    """Decode until the clock reaches ``until``, or there is something for the host to do.

    That is: in ``quorum`` of the n parts of the rows, at least as many slots are idle as the first
    of its two limits says, or at most as many rows are live as the second.

    Returns:
      (state, i32[Q, W + 2 + G] on every device: what a `scheduler.View` is made of).
    """
    local, specs = partial(_decode, config, truncate), decode_state.partition_specs()
    own = sharding.by_run((weights.partition_specs(config), WHOLE), mesh)
    in_specs = (*own, specs, WHOLE, ROWS, WHOLE)
    arguments = (params, controls, state, until, limits_2n, quorum)
    return sharding.shard_map(local, mesh, in_specs, (specs, WHOLE))(*arguments)


def _decode(config, truncate, params, controls, state, until, limits_2, quorum):
    params, controls = map(runs.of_device, (params, controls))

    def agree(s):
        idle, live = jnp.sum(~jnp.any(s.live, -1)), jnp.sum(s.live)
        met = (idle >= limits_2[0]) | (live <= limits_2[1])
        return collectives.psum(met.astype(jnp.int32), sharding.SLOTS)

    # A step may hold collectives, so all parts take equally many: they stop by one sum.
    def go_on(carry):
        s, agreed = carry
        return (s.clock < until) & (agreed < quorum)

    def advance(carry):
        s = step(params, config, controls, truncate, carry[0])
        return s, agree(s)

    state, _ = jax.lax.while_loop(go_on, advance, (state, agree(state)))
    columns = (state.live, state.first[:, None], state.end[:, None], state.order)
    table_QX = jnp.concatenate([x.astype(jnp.int32) for x in columns], -1)
    return state, collectives.all_gather(table_QX, sharding.SLOTS)
