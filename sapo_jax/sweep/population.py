"""R runs that differ in traced values, through the same executables: an explicit leading axis R.

Every function is that of one run, put over the axis by `stacked.over`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import learner, objectives
from sapo_jax.learner import Hyperparameters
from sapo_jax.model.config import ModelConfig
from sapo_jax.objectives import Objective, Switch
from sapo_jax.sampler import SamplerParams, decode, decode_state, sampling, weights
from sapo_jax.sampler.decode_state import DecodeState
from sapo_jax.sweep.vectorize import over, pick, spread
from sapo_jax.types import Batch, Prompts, Rollout, TrainState


def as_one(named: Sequence[tuple[str, Objective]]) -> list[Objective | Switch]:
    """The objectives of R runs in one form: as they are, or as choices of one switch.

    Args:
      named: of each run, a name and an objective; those of one name differ in traced values only.

    Returns:
      R objectives that differ in the values of their hyperparameters alone.
    """
    members: dict[str, Objective] = {}
    for name, objective in named:
        members.setdefault(name, objective)
    if len(members) == 1:
        return [objective for _, objective in named]
    both = objectives.switch(members)
    out = []
    for name, objective in named:
        own = {f"{name}.{key}": value for key, value in objective.hyperparameters.items()}
        out.append(objectives.resolve(both, index=list(members).index(name), **own))
    return out


@partial(jax.jit, static_argnames="domain")
def base_keys(seed_R: jax.Array, domain: str, iteration: jax.Array) -> jax.Array:
    """`sampling.base_key` of R runs."""
    return jax.vmap(lambda seed: sampling.base_key(seed, domain, iteration))(seed_R)


# A decoding state with an axis R on everything but the clock, which all runs share.
RUNS = DecodeState(**{**dict.fromkeys(DecodeState.__dataclass_fields__, 0), "clock": None})


def decode_runs(params, config, controls, state, until, *, truncate) -> DecodeState:
    """`decode.decode` for R runs at once, to the end of them all.

    The predicate is reduced over the runs: under `jax.vmap` a loop whose predicate has their axis
    would select, at each step, between the old and the new of everything, caches included. The
    steps of a run that has finished change none of its results.
    """

    def advance(params, controls, state):
        return decode.step(params, config, controls, truncate, state)

    step = jax.vmap(advance, in_axes=(0, 0, RUNS), out_axes=RUNS)
    return jax.lax.while_loop(
        lambda s: (s.clock < until) & ~jnp.all(s.done), lambda s: step(params, controls, s), state
    )


@partial(jax.jit, static_argnames=("config", "method"))
def _convert(live_R: jax.Array, params: Any, config: ModelConfig, *, method: str) -> SamplerParams:
    return over(method, live_R, partial(weights.convert, config=config), params)


def to_sampler(
    live_R: jax.Array, params: Any, config: ModelConfig, *, method: str
) -> SamplerParams:
    """`sampler.to_sampler` of R runs."""
    names = weights.unchanged(jax.eval_shape(partial(pick, run=0), params), config)
    rest = {name: value for name, value in params.items() if name not in names}
    converted = _convert(live_R, rest, config, method=method)
    return SamplerParams(converted | {name: params[name] for name in names})


@partial(
    jax.jit,
    static_argnames=("config", "group_size", "max_new_tokens", "cache", "truncate", "method"),
)
def rollout(
    live_R: jax.Array,
    params: SamplerParams,
    config: ModelConfig,
    prompts: Prompts,
    base_R: jax.Array,
    controls: sampling.Controls,
    iteration: jax.Array,
    *,
    group_size: int,
    max_new_tokens: int,
    cache: tuple[int, ...],
    truncate: bool,
    method: str,
) -> Rollout:
    """`sampler.rollout` of R runs, as one program: all prompts at once, no slot is refilled.

    Args:
      live_R: bool[R]; other runs write nothing.
      params: from `to_sampler`.
      config: the model's shape.
      prompts: of R runs, [R, P, …].
      base_R: key[R], from `base_keys`.
      controls: from `sampling.controls`, of R runs.
      iteration: i32[], of the policies.
      group_size: G.
      max_new_tokens: T.
      cache: sizes of the completion cache, ascending, the last one T (see `sampler.Plan`).
      truncate: whether top_k and top_p apply.
      method: one of "map", "vmap", "devices".

    Returns:
      Rollout with a leading axis R.
    """
    p, width = prompts.tokens.shape[1:]
    every, none = jnp.arange(p, dtype=jnp.int32), np.iinfo(np.int32).max

    shape = decode_state.Shape(p, cache[0], p, width, group_size, max_new_tokens)

    def start(params, prompts, base, controls):
        state = decode_state.empty(config, shape)
        arguments = (params, config, prompts, base, controls, state, every, every)
        return decode.prefill(*arguments, truncate=truncate)

    def end(state, prompts):
        return decode_state.to_rollout(config, state.results, prompts, iteration)

    def one(params, prompts, base, controls):
        state = start(params, prompts, base, controls)
        for i, size in enumerate(cache):
            if i:
                larger = decode_state.grow_cache(state.completion_kv, size)
                state = state.replace(completion_kv=larger)
            until = size if size < cache[-1] else none
            arguments = (params, config, controls, state, until, jnp.array([p]), 1)
            state, _ = decode.decode(*arguments, truncate=truncate)
        return end(state, prompts)

    def all_of(method, live_R, params, prompts, base_R, controls):
        if method == "map":
            return over(method, live_R, one, params, prompts, base_R, controls)
        state = jax.vmap(start, out_axes=RUNS)(params, prompts, base_R, controls)
        state = state.replace(done=state.done | ~live_R[:, None, None])
        for i, size in enumerate(cache):
            if i:
                grow = jax.vmap(partial(decode_state.grow_cache, size=size))
                state = state.replace(completion_kv=grow(state.completion_kv))
            until = size if size < cache[-1] else none
            state = decode_runs(params, config, controls, state, until, truncate=truncate)
        return jax.vmap(end, in_axes=(RUNS, 0))(state, prompts)

    return spread(method, live_R, all_of, params, prompts, base_R, controls)


@partial(jax.jit, static_argnames=("method", "parts"))
def split_rows(live_R: jax.Array, batch: Batch, *, parts: int, method: str) -> tuple[Batch, ...]:
    """`learner.split_rows` of R runs."""
    return over(method, live_R, partial(learner.split_rows, parts=parts), batch)


@partial(jax.jit, static_argnames="method")
def score(live_R: jax.Array, params: Any, batch: Batch, hp: Hyperparameters, *, method: str):
    """`learner.score` of R runs."""
    return over(method, live_R, learner.score, params, batch, hp)


@partial(jax.jit, static_argnames="method")
def score_routing(live_R: jax.Array, params: Any, batch: Batch, hp: Hyperparameters, *, method):
    """`learner.score_routing` of R runs."""
    return over(method, live_R, learner.score_routing, params, batch, hp)


@partial(
    jax.jit,
    static_argnames=("method", "estimator", "group_size", "kl", "correction", "parts"),
)
def learn_from(
    live_R: jax.Array,
    scored: tuple[Batch, ...],
    rows_RB: jax.Array,
    signal_RB: jax.Array,
    rewards_RB: jax.Array,
    kl_coef_R: jax.Array,
    bounds: dict[str, jax.Array],
    *,
    method: str,
    **static: Any,
) -> tuple[tuple[Batch, ...], dict[str, jax.Array]]:
    """`learner.select_rows`, then `learner.make_minibatches`, of R runs."""

    def one(scored, rows_B, signal_B, *arguments):
        batch = learner.select_rows(scored, rows_B, signal_B)
        return learner.make_minibatches(batch, *arguments, **static)

    return over(method, live_R, one, scored, rows_RB, signal_RB, rewards_RB, kl_coef_R, bounds)


@partial(jax.jit, static_argnames="method", donate_argnames="state")
def update(
    live_R: jax.Array, state: TrainState, batch: Batch, hp: Hyperparameters, *, method: str
) -> tuple[TrainState, dict[str, Any]]:
    """`learner.update` of R runs."""
    return over(method, live_R, learner.update, state, batch, hp)


@partial(jax.jit, static_argnames="method")
def _finish(live_R: jax.Array, metrics: tuple, *, method: str) -> tuple[dict, list[dict]]:
    return over(method, live_R, learner.finish_iteration, metrics)


def learn(
    live_R: np.ndarray,
    state: TrainState,
    minibatches: Sequence[Batch],
    hp: Hyperparameters,
    *,
    method: str,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """`learner.learn` of R runs: the state, and a record for each run."""
    collected = []
    for batch in minibatches:
        state, metrics = update(live_R, state, batch, hp, method=method)
        collected.append(metrics)
    found = jax.device_get(_finish(live_R, tuple(collected), method=method))
    records = [learner.record(*pick(found, r)) for r in range(len(live_R))]
    return learner.end_iteration(state), records
