"""Rollouts of R runs as one program."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sapo_jax import rewards
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.parallel.runs import BY_RUN
from sapo_jax.sampler import SamplerParams, decode, decode_state, images, results, sampling, weights
from sapo_jax.sampler.decode_state import DecodeState
from sapo_jax.types import Frozen, Prompts, Rollout


def report(groups: rewards.Groups, rows: Rollout, group_size: int) -> None:
    """Have all completions of a rollout on the host judged."""
    tokens_BS, count_B = rows.tokens, rows.mask.sum(-1)
    start_B = rows.mask.argmax(-1)
    index_BT = start_B[:, None] + np.arange(max(1, count_B.max()))
    index_BT = np.minimum(index_BT, tokens_BS.shape[1] - 1)
    completions_BT = np.take_along_axis(tokens_BS, index_BT, 1)
    columns = (completions_BT, count_B, rows.finished)
    grouped = [x.reshape(-1, group_size, *x.shape[1:]) for x in columns]
    groups(np.arange(len(grouped[0])), *grouped)


# A decoding state with an axis R on everything but what all runs share.
RUNS = DecodeState(**dict.fromkeys(DecodeState.__dataclass_fields__, 0)).replace(
    clock=None, rope=None
)


def decode_runs(params, frozen, config, controls, state, until, *, truncate) -> DecodeState:
    """`decode.decode` for R runs at once, to the end of them all.

    The predicate is reduced over the runs: under `jax.vmap` a loop whose predicate has their axis
    would select, at each step, between the old and the new of everything, caches included. The
    steps of a run that has finished change none of its results.
    """

    def advance(params, frozen, controls, state):
        return decode.step(weights.join(params, frozen), config, controls, truncate, state)

    step = jax.vmap(advance, in_axes=(0, None, 0, RUNS), out_axes=RUNS)
    return jax.lax.while_loop(
        lambda s: (s.clock < until) & jnp.any(s.live),
        lambda s: step(params, frozen, controls, s),
        state,
    )


@partial(
    jax.jit,
    static_argnames=("config", "group_size", "max_new_tokens", "rows", "cache", "truncate", "mesh"),
)
def rollout(
    live_R: jax.Array,
    params: SamplerParams,
    config: ModelConfig,
    prompts: Prompts,
    base_R: jax.Array,
    controls: sampling.Controls,
    policy_step: jax.Array,
    *,
    group_size: int,
    max_new_tokens: int,
    rows: int,
    cache: tuple[int, ...],
    truncate: bool,
    frozen: Frozen | None = None,
    mesh: Mesh | None = None,
) -> tuple[Rollout, jax.Array]:
    """`sampler.rollout` of R runs, as one program: all prompts at once, no slot is refilled.

    Args:
      live_R: bool[R]; other runs end with their first token.
      params, config, prompts: as there, of R runs.
      base_R: key[R], from `sampling.base_key`.
      controls: from `sampling.controls`, of R runs.
      policy_step: i32[], the iteration of the policies.
      group_size, max_new_tokens: as there.
      rows: of each prompt's slot.
      cache: sizes of the completion cache, ascending (see `sampler.Plan`).
      truncate: whether top_k and top_p apply.
      frozen: with LoRA, where ``params`` are adapters, their base.
      mesh: over which the runs are split.

    Returns:
      (Rollout with a leading axis R, i32[R] decode steps).
    """
    p, width = prompts.tokens.shape[1:]
    every, none = jnp.arange(p, dtype=jnp.int32), np.iinfo(np.int32).max

    def look(params, frozen, prompts):
        policy = weights.join(params, frozen)
        return prompts.replace(images=images.see(policy, config, prompts.images))

    shape = decode_state.Shape(p, rows, cache[0], p, width, group_size, max_new_tokens)

    def start(params, frozen, prompts, base, controls):
        state = decode_state.empty(config, shape)
        policy = weights.join(params, frozen)
        arguments = (policy, config, prompts, base, controls, state, every, every)
        return decode.prefill(*arguments, truncate=truncate)

    def rows_of(state, prompts):
        return results.to_rollout(config, state.results, prompts, policy_step)

    def all_of(live_R, params, frozen, prompts, base_R, controls):
        if prompts.images is not None:
            prompts = jax.vmap(look, in_axes=(0, None, 0))(params, frozen, prompts)
        begin = jax.vmap(start, in_axes=(0, None, 0, 0, 0), out_axes=RUNS)
        state = begin(params, frozen, prompts, base_R, controls)
        end = jnp.where(live_R[:, None], state.end, 0)
        state = state.replace(end=end, live=state.live & live_R[:, None, None])
        for i, size in enumerate(cache):
            if i:
                grow = jax.vmap(partial(decode_state.grow_cache, size=size))
                state = state.replace(completion_kv=grow(state.completion_kv))
            until = size if size < cache[-1] else none
            state = decode_runs(params, frozen, config, controls, state, until, truncate=truncate)
        rows = jax.vmap(rows_of, in_axes=(RUNS, 0))(state, prompts)
        return rows, jnp.broadcast_to(state.clock, live_R.shape)

    specs = (BY_RUN, BY_RUN, PartitionSpec(), BY_RUN, BY_RUN, BY_RUN)
    split = sharding.shard_map(all_of, mesh, specs, BY_RUN)
    return split(live_R, params, frozen, prompts, base_R, controls)
