"""Prompts and completions joined into left-aligned, gap-free rows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.types import Prompts, Rollout


@partial(jax.jit, static_argnames=("config", "mesh"))
def assemble(
    config: ModelConfig, results, prompts: Prompts, iteration, routing, mesh: Mesh | None
) -> Rollout:
    """The rows of what `decoding` has written for each prompt; the last of each part is dropped."""
    rows, whole = sharding.spec("rows"), PartitionSpec()
    local = sharding.shard_map(partial(_assemble, config), mesh, (rows, rows, whole, rows), rows)
    return local(results, prompts, iteration, routing)


def _assemble(config, results, prompts, iteration, routing):
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
