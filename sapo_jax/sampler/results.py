"""What a rollout has sampled, by prompt, and how it becomes rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from sapo_jax.model import moe
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.types import GOES_ON, LENGTH, STOP, Prompts, Rollout

WHOLE, ROWS = PartitionSpec(), sharding.spec("slots")


@struct.dataclass
class Results:
    """What has been sampled, by prompt; the last entry takes what idle rows write."""

    tokens: jax.Array  # i32[P + 1, G, T], −1 where none is
    logp: jax.Array  # f32[P + 1, G, T]
    # MoE: experts of the prompts [P + 1, N, L', k] and of the completions [P + 1, G, T, L', k]
    routing: Any = None


@struct.dataclass
class Begun:
    """Completions that go on, by prompt; where a prompt has none, nothing."""

    tokens: jax.Array  # i32[P, G, T], −1 where none is
    logp: jax.Array  # f32[P, G, T], by the policies that sampled them
    steps: jax.Array  # i32[P, G, T], which these are
    routing: Any = None  # MoE: [P, G, T, L', k]


def none_begun(config: ModelConfig, p: int, g: int, t: int) -> Begun:
    """No completion of P prompts, G of T tokens each, has begun."""
    routing = _no_routing(config, (p, g, t))
    return Begun(
        tokens=jnp.full((p, g, t), -1, jnp.int32),
        logp=jnp.zeros((p, g, t), jnp.float32),
        steps=jnp.zeros((p, g, t), jnp.int32),
        routing=routing and routing[0],
    )


def empty(config: ModelConfig, p: int, width: int, g: int, t: int) -> Results:
    """Room for what P prompts of N tokens, G completions of T tokens each, will give."""
    completions = (p + 1, g, t)
    return Results(
        tokens=jnp.full(completions, -1, jnp.int32),
        logp=jnp.zeros(completions, jnp.float32),
        routing=_no_routing(config, (p + 1, width), completions),
    )


def _no_routing(config: ModelConfig, *shapes: tuple[int, ...]) -> Any:
    """Nothing recorded yet, −1; None for a dense model."""
    if not config.num_experts:
        return None
    choice, dtype = (len(config.sparse_layers), config.num_experts_per_tok), moe.id_dtype(config)
    return tuple(jnp.full((*shape, *choice), -1, dtype) for shape in shapes)


def ends(config: ModelConfig, token_X: jax.Array, index_X: jax.Array, limit: int) -> jax.Array:
    """Whether a completion ends with the token at its index."""
    return jnp.isin(token_X, jnp.asarray(config.stop_tokens)) | (index_X == limit - 1)


def write_prompt_routing(results: Results, routings: list, prompt_F: jax.Array) -> Results:
    """Record what prefill routed; entries that fill nothing name the last prompt, which is none."""
    if results.routing is None:
        return results
    prompts, completions = results.routing
    experts = _experts(routings).astype(prompts.dtype)
    return results.replace(routing=(prompts.at[prompt_F].set(experts), completions))


def write(
    results: Results, prompt_QW, sample_QW, index_QW, token_QW, logp_QW, routings: list
) -> Results:
    """Note what rows have drawn, for the place behind ``index_QW``, and what they were fed.

    Tokens and log-probabilities of the completion's next token; the experts of the one just fed.
    Idle rows name the last prompt, which is none.
    """
    index_QW = jnp.minimum(index_QW, results.tokens.shape[2] - 2)  # of idle rows it goes on
    at, after = ((prompt_QW, sample_QW, index_QW + i) for i in (0, 1))
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
    """Tokens with pads, their count, and how they ended."""
    drawn_XT = tokens_XT >= 0
    stopped_X = jnp.any(jnp.isin(tokens_XT, jnp.asarray(config.stop_tokens)), -1)
    tokens_XT = jnp.where(drawn_XT, tokens_XT, config.pad_token)
    finished_X = jnp.where(stopped_X, STOP, jnp.where(drawn_XT[..., -1], LENGTH, GOES_ON))
    return tokens_XT, jnp.sum(drawn_XT, -1), finished_X


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


@partial(jax.jit, static_argnames="mesh", donate_argnames="results")
def go_on(results: Results, begun: Begun, mesh: Mesh | None = None) -> Results:
    """Empty results with what has been sampled before."""

    def local(results, begun):
        before = (begun.tokens, begun.logp)
        tokens, logp = (
            x.at[:-1].set(old)
            for x, old in zip((results.tokens, results.logp), before, strict=True)
        )
        if begun.routing is not None:
            prompts, completions = results.routing
            results = results.replace(routing=(prompts, completions.at[:-1].set(begun.routing)))
        return results.replace(tokens=tokens, logp=logp)

    return sharding.shard_map(local, mesh, (ROWS, ROWS), ROWS)(results, begun)


@partial(jax.jit, static_argnames=("config", "mesh"))
def leave_off(
    config: ModelConfig,
    results: Results,
    prompts: Prompts,
    before: Begun,
    policy_step,
    mesh: Mesh | None = None,
) -> tuple[Rollout, Begun]:
    """All that is there as rows, and of the prompts with completions that go on what they have."""

    def local(results, prompts, before, policy_step):
        own = jax.tree.map(lambda x: x[:-1], results)
        steps_PGT = jnp.where(before.tokens >= 0, before.steps, policy_step)
        rows = _to_rollout(config, results, prompts, policy_step, steps_PGT)
        goes_on_P = (_finished(config, own.tokens)[2] == GOES_ON).any(-1)

        def left(x, fill):
            return jnp.where(
                goes_on_P.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.asarray(fill, x.dtype)
            )

        routing = own.routing and left(own.routing[1], -1)
        tokens = left(own.tokens, -1)
        steps = jnp.where(tokens >= 0, steps_PGT, 0)
        return rows, Begun(tokens, left(own.logp, 0), steps, routing)

    in_specs = (ROWS, ROWS, ROWS, WHOLE)
    return sharding.shard_map(local, mesh, in_specs, ROWS)(results, prompts, before, policy_step)


def _to_rollout(config, results, prompts, iteration, steps_PGT=None) -> Rollout:
    results = jax.tree.map(lambda x: x[:-1], results)
    tokens_PGT, count_PG, finished_PG = _finished(config, results.tokens)
    p, n = prompts.tokens.shape
    (group, t), whole = tokens_PGT.shape[1:], steps_PGT is None
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
        policy_step=jnp.full(p * group, iteration, jnp.int32)
        if whole
        else steps_PGT[..., 0].ravel(),
        finished=finished_PG.reshape(-1),
        segments=(mask_PGS | in_prompt_PGS).astype(jnp.int32).reshape(p * group, -1),
        routing=results.routing and rows(*results.routing, -1),
        token_step=None if whole else rows(jnp.zeros((p, n), jnp.int32), steps_PGT, 0),
        images=prompts.images,
    )
